# The flake that tests put in the place of nixpkgs where something is to be built: the stand-in of tests/nix (beside
# it, as `nix`), and a system that systemd-nspawn can run. What is built needs nothing but the host's /usr.
#
# A config may have options of a test's own: `trial.build` is a script that the build runs, `trial.run` one that the
# container runs before its harness, `trial.command` what runs in its place.
{
  outputs =
    { self }:
    let
      lib = import ./nix/lib.nix;
      inherit (lib) mkOption types;

      trial = {
        options.trial = {
          build = mkOption { type = types.str; default = ""; };
          run = mkOption { type = types.str; default = ""; };
          command = mkOption { type = types.str; default = "/usr/bin/python3 \"$harness\" run"; };
        };
        config.nixpkgs.overlays = [ (_: before: { ripgrep = before.git; }) ];
      };

      nixosSystem =
        { modules }:
        let
          system = import ./nix/nixos.nix { inherit lib; } { modules = modules ++ [ trial ]; };
          inherit (system) config;
          failed = builtins.filter (one: !one.assertion) config.assertions;
          toplevel = derivation {
            name = "nixos-system-${config.networking.hostName}";
            system = config.nixpkgs.hostPlatform;
            builder = "/bin/sh";
            PATH = "/usr/bin:/bin";
            harness = "${config.services.hyperhive.package.src}/harness.py";
            init = ./init.py;
            inherit (config.trial) build run command;
            args = [
              "-euc"
              ''
                eval "$build"
                mkdir -p $out
                {
                  echo '#!/bin/sh'
                  echo "$run"
                  echo exec /usr/bin/python3 "$init" HOME=/root CLAUDE_CONFIG_DIR=/root/.claude PYTHONUNBUFFERED=1 \
                    HYPERHIVE_REHEARSAL=1 HYPERHIVE_CLAUDE="'/usr/bin/python3 $harness rehearsal'" \
                    $(eval echo "$command")
                } > $out/init
                chmod 755 $out/init
              ''
            ];
          };
        in
        system
        // {
          config = config // {
            system = config.system // {
              build.toplevel =
                if failed == [ ] then toplevel else throw (lib.concatStrings (map (one: one.message) failed));
            };
          };
        };
    in
    {
      lib = lib // { inherit nixosSystem; };
      legacyPackages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (system: import ./nix { inherit system; });
    };
}
