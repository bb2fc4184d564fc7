# A stand-in for NixOS: the options that module.nix defines, with the types of the real ones, and `nixosSystem`.
# `lib` can be the real one: then the real module system judges our module.
{
  lib ? import ./lib.nix,
  # The option boot.isNspawnContainer came with NixOS 25.11.
  isNspawnContainer ? true,
}:
{ modules }:
let
  inherit (lib) mkOption types;

  option = type: default: mkOption { inherit type default; };
  value = with types; oneOf [ bool int str path package ];
  packages = types.listOf (types.either types.package types.str);
  strings = types.listOf types.str;

  service.options = {
    after = option strings [ ];
    description = option types.str "";
    environment = option (types.attrsOf (types.nullOr (types.either types.str types.package))) { };
    path = option packages [ ];
    serviceConfig = option (types.attrsOf (types.either value (types.listOf value))) { };
    unitConfig = option (types.attrsOf value) { };
    wantedBy = option strings [ ];
  };

  nixos = {
    options = {
      assertions = option (types.listOf types.raw) [ ];
      boot = {
        enableContainers = option types.bool true;
        isContainer = option types.bool false;
      }
      // (if isNspawnContainer then { isNspawnContainer = option types.bool false; } else { });
      environment.etc = option (types.attrsOf (types.submodule { options.source = mkOption { type = types.path; }; })) { };
      environment.systemPackages = option packages [ ];
      environment.variables = option (types.attrsOf types.str) { };
      networking = {
        firewall.enable = option types.bool true;
        hostName = option types.str "nixos";
        useDHCP = option types.bool true;
      };
      nix.settings = option (types.attrsOf (types.either value (types.listOf value))) { };
      nixpkgs = {
        config = option (types.attrsOf types.raw) { };
        flake.source = option (types.nullOr types.str) null;
        hostPlatform = option types.str "x86_64-linux";
        overlays = option (types.listOf types.raw) [ ];
      };
      system.build = option (types.attrsOf types.raw) { };
      system.stateVersion = option types.str "25.11";
      systemd.services = option (types.attrsOf (types.submodule service)) { };
      users.groups = option (types.attrsOf (types.submodule { options.members = option strings [ ]; })) { };
      users.users = option (types.attrsOf (types.submodule { options.isNormalUser = option types.bool false; })) { };
    };

    # Everything that a real system is built from is looked at, once no assertion failed.
    config.system.build.toplevel =
      let
        failed = builtins.filter (one: !one.assertion) config.assertions;
        messages = lib.concatStrings (map (one: "\n- ${one.message}") failed);
        parts = map (name: removeAttrs config.${name} [ "build" ]) [ "boot" "environment" "networking" "systemd" "users" ];
      in
      if failed != [ ] then
        throw "Failed assertions:${messages}"
      else
        derivation {
          name = "nixos-system-${config.networking.hostName}";
          builder = "/bin/sh";
          args = [ "-euc" script ];
          PATH = "/usr/bin:/bin";
          system = config.nixpkgs.hostPlatform;
          parts = builtins.toJSON parts;
        };
  };

  # A system as on NixOS, as far as its units, its /etc and its programs go: `init` starts systemd in a container
  # that has the /usr of the machine.
  script = ''
    mkdir -p $out/sw/bin $out/etc/systemd/system
    ${each (package: "ln -sf ${package}/bin/* $out/sw/bin") config.environment.systemPackages}
    ${each etc (lib.mapAttrsToList (name: entry: { inherit name; inherit (entry) source; }) config.environment.etc)}
    ${each unit (lib.mapAttrsToList (name: it: it // { inherit name; }) config.systemd.services)}
    cp ${./init.sh} $out/init
    chmod 755 $out/init
  '';

  each = line: list: lib.concatStrings (map (one: "${line one}\n") list);
  etc = { name, source }: ''
    mkdir -p "$(dirname $out/etc/${name})"
    ln -s ${source} $out/etc/${name}'';
  unit =
    it:
    let
      text = pkgs.writeText "${it.name}.service" (import ./systemd.nix { inherit lib pkgs; } it);
      wants = target: "$out/etc/systemd/system/${target}.wants";
    in
    "ln -s ${text} $out/etc/systemd/system/${it.name}.service\n"
    + each (target: "mkdir -p ${wants target}; ln -s ../${it.name}.service ${wants target}") it.wantedBy;

  pkgs = import ./. {
    inherit lib;
    inherit (config.nixpkgs) config overlays;
    system = config.nixpkgs.hostPlatform;
  };

  evaluated = lib.evalModules {
    modules = [ nixos ] ++ modules;
    specialArgs = { inherit pkgs; };
  };

  inherit (evaluated) config;
in
{
  inherit (evaluated) config options;
  inherit pkgs;
}
