# The systemd unit of a service that module.nix defines, as NixOS would write it, and the files that it names:
#
#   nix-instantiate --eval --strict --json tests/nix/unit.nix
#     --arg config '{ services.hyperhive.dashboardPort = 7001; }'         more NixOS configuration, or { }
#     --arg programs '{ hyperhive = "/opt/hyperhive"; git = "/usr"; }'    where they are: the folder above bin/
#     --argstr service hyperhive-harness                                  the container's, instead of the host's
#
# prints {"unit": TEXT, "files": {PATH: TEXT, …}}; without any argument Nix does not call it. Its [Install] section
# is for machines where `systemctl enable` must do what NixOS does by itself.
{
  config ? { },
  programs ? { },
  service ? "hyperhive",
  lib ? import ./lib.nix,
}:
let
  inherit (builtins) concatMap filter isList listToAttrs;

  installed = name: folder: {
    type = "derivation";
    pname = name;
    outPath = folder;
    src = folder;
    meta.mainProgram = name;
  };

  system = import ./nixos.nix { inherit lib; } {
    modules = [
      ../../module.nix
      config
      { nixpkgs.overlays = [ (_: _: builtins.mapAttrs installed programs) ]; }
      (if service == "hyperhive" then { services.hyperhive.enable = true; } else { services.hyperhive.harness.enable = true; })
      (if programs ? hyperhive then { services.hyperhive.package = installed "hyperhive" programs.hyperhive; } else { })
    ];
  };

  it = builtins.seq system.config.system.build.toplevel.drvPath system.config.systemd.services.${service};

  file = path: source: { name = builtins.unsafeDiscardStringContext path; value = source.text; };
  known = filter (value: value ? text);
  etc = lib.mapAttrsToList (name: entry: file "/etc/${name}" entry.source) system.config.environment.etc;
  named = concatMap (value: if isList value then value else [ value ]) (
    lib.mapAttrsToList (_: value: value) (it.environment // it.serviceConfig)
  );
in
{
  unit = import ./systemd.nix { inherit lib; inherit (system) pkgs; } it;
  files = listToAttrs (etc ++ map (source: file source source) (known named));
}
