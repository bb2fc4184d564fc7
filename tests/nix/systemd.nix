# The text of a unit, as NixOS would write it, from what `systemd.services` has of a service.
{ lib, pkgs }:
it:
let
  inherit (builtins) concatStringsSep isBool isList toJSON;

  # NixOS puts these at the end of every service's path.
  path = it.path ++ [
    pkgs.coreutils
    pkgs.findutils
    pkgs.gnugrep
    pkgs.gnused
    pkgs.systemd
  ];
  folders = kind: map (package: "${package}/${kind}") path;
  environment = it.environment // {
    PATH = concatStringsSep ":" (folders "bin" ++ folders "sbin");
  };

  text = value: if isBool value then (if value then "true" else "false") else toString value;
  line = key: value: "${key}=${text value}\n";
  lines = section: lib.concatStrings (
    lib.mapAttrsToList (key: value: if isList value then lib.concatStrings (map (line key) value) else line key value) section
  );
  variable = key: value: lib.optionalString (value != null) "Environment=${toJSON "${key}=${toString value}"}\n";
in
''
  [Unit]
  Description=${it.description}
  After=${concatStringsSep " " it.after}
  ${lines it.unitConfig}
  [Service]
  ${lib.concatStrings (lib.mapAttrsToList variable environment)}${lines it.serviceConfig}
  [Install]
  WantedBy=${concatStringsSep " " it.wantedBy}
''
