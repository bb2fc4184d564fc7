{
  description = "A swarm of Claude Code agents in NixOS containers, with one person who decides";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";
    nixpkgs-unstable.url = "github:NixOS/nixpkgs/nixos-unstable";
  };

  outputs =
    {
      self,
      nixpkgs,
      nixpkgs-unstable,
    }:
    let
      inherit (nixpkgs) lib;

      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];

      forEachSystem = output: lib.genAttrs systems (system: output nixpkgs.legacyPackages.${system});
    in
    {
      nixosModules.default.imports = [ ./module.nix ];

      # Claude Code moves faster than releases do. Of what is unfree, this import allows it and nothing else.
      overlays.claude-unstable = final: _: {
        inherit
          (import nixpkgs-unstable {
            inherit (final.stdenv.hostPlatform) system;
            config.allowUnfreePredicate = package: lib.getName package == "claude-code";
          })
          claude-code
          ;
      };

      # The system of one agent's container: `config` is its agent.nix, or any other module.
      lib.mkAgent =
        {
          name,
          system,
          config,
        }:
        lib.nixosSystem {
          modules = [
            self.nixosModules.default
            {
              services.hyperhive.harness = {
                enable = true;
                inherit name;
              };
              nixpkgs = {
                hostPlatform = system;
                overlays = [ self.overlays.claude-unstable ];
              };
              # What outlives a rebuild are notes and a sign-in: no state that follows a release of NixOS.
              system.stateVersion = lib.mkDefault lib.trivial.release;
            }
            config
          ];
        };

      # The module builds the package, because it must be able to where it was copied without this flake.
      packages = forEachSystem (pkgs: {
        default =
          (lib.nixosSystem {
            modules = [
              self.nixosModules.default
              { nixpkgs.hostPlatform = pkgs.stdenv.hostPlatform.system; }
            ];
          }).config.services.hyperhive.package;
      });

      checks = forEachSystem (pkgs: {
        package = self.packages.${pkgs.stdenv.hostPlatform.system}.default;

        # A host in a virtual machine, with no agent: a container can't be built in there, without a network.
        host = pkgs.testers.runNixOSTest {
          name = "hyperhive-host";

          nodes.machine = {
            imports = [ self.nixosModules.default ];
            services.hyperhive = {
              enable = true;
              adminUsers = [ "alice" ];
              settings.manager_autostart = false;
            };
            users.users = {
              alice.isNormalUser = true;
              mallory.isNormalUser = true;
            };
            systemd.services.hyperhive.serviceConfig.WatchdogSec = lib.mkForce 5;
          };

          testScript = ''
            machine.wait_for_unit("hyperhive.service")

            with subtest("an operator is who has the token or belongs to hive-admin"):
                machine.succeed("su alice -c 'hyperhive list'")
                machine.fail("su mallory -c 'hyperhive list'")
                machine.fail("curl --fail http://127.0.0.1:7000/api/state")
                token = machine.succeed("hyperhive token").strip()
                machine.succeed(f"curl --fail -H 'Authorization: Bearer {token}' http://127.0.0.1:7000/api/state")

            with subtest("a restart keeps what containers have bound"):
                machine.succeed("mkdir -p /run/hyperhive/agents/alice && systemctl restart hyperhive")
                machine.succeed("test -d /run/hyperhive/agents/alice")

            with subtest("the watchdog ends a daemon that hangs, and it comes back"):
                pid = machine.succeed("systemctl show hyperhive -P MainPID").strip()
                machine.succeed(f"kill -STOP {pid}")
                machine.wait_until_succeeds(f"test $(systemctl show hyperhive -P MainPID) -ne {pid}", timeout=120)
                machine.wait_until_succeeds("hyperhive list", timeout=60)
          '';
        };
      });

      devShells = forEachSystem (pkgs: {
        default = pkgs.mkShell {
          packages = [
            (pkgs.python3.withPackages (packages: [
              packages.bottle
              packages.waitress
            ]))
            pkgs.git
            pkgs.gnumake
            pkgs.nodejs
            pkgs.ruff
          ];
        };
      });

      # The first config of an agent, as the hive itself makes it.
      templates.default = {
        description = "The configuration of one agent";
        path = builtins.path {
          name = "agent-template";
          path = ./static;
          filter = path: _: baseNameOf path == "agent.nix";
        };
      };
    };
}
