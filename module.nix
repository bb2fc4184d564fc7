# hyperhive for NixOS, both ends of it:
#
#   services.hyperhive.enable            the host: daemon, dashboard, command line
#   services.hyperhive.harness.enable    an agent's container; `lib.mkAgent` of the flake sets it
#
# It needs nothing of the flake: copy the folder, and write `imports = [ ./hyperhive/module.nix ];`.
{
  config,
  lib,
  options,
  pkgs,
  ...
}:
let
  inherit (lib)
    getExe
    mkDefault
    mkEnableOption
    mkIf
    mkMerge
    mkOption
    types
    ;

  cfg = config.services.hyperhive;
  defaults = cfg.agentDefaults;
  inherit (cfg) harness;

  toml = pkgs.formats.toml { };
  json = pkgs.formats.json { };

  # ── package ──

  # What runs on either end, and what containers are built from: a change of tests or README rebuilds nothing.
  parts = [
    "flake.lock"
    "flake.nix"
    "harness.py"
    "hyperhive.py"
    "module.nix"
    "pyproject.toml"
    "static"
  ];

  source = builtins.path {
    name = "hyperhive-source";
    path = ./.;
    filter =
      path: _:
      let
        inside = lib.removePrefix "${toString ./.}/" (toString path);
      in
      builtins.elem (builtins.head (lib.splitString "/" inside)) parts && baseNameOf path != "__pycache__";
  };

  python = pkgs.python3.withPackages (packages: [
    packages.bottle
    packages.waitress
  ]);

  # The daemon runs as a module, because only of modules does Python keep the bytecode; -P keeps the folder
  # that it is called in off the module path. The harness runs as a script: a PYTHONPATH would reach Claude's shell.
  hyperhive = pkgs.stdenvNoCC.mkDerivation {
    pname = "hyperhive";
    inherit ((lib.importTOML ./pyproject.toml).project) version;
    src = source;
    nativeBuildInputs = [ pkgs.makeWrapper ];
    installPhase = ''
      runHook preInstall
      mkdir -p $out/lib/hyperhive
      cp -r hyperhive.py harness.py static $out/lib/hyperhive
      ${python}/bin/python3 -m compileall -q --invalidation-mode unchecked-hash $out/lib/hyperhive
      makeWrapper ${python}/bin/python3 $out/bin/hyperhive \
        --set PYTHONPATH $out/lib/hyperhive --add-flags "-P -m hyperhive"
      makeWrapper ${python}/bin/python3 $out/bin/hyperhive-harness \
        --add-flags $out/lib/hyperhive/harness.py
      runHook postInstall
    '';
    meta = {
      description = "A swarm of Claude Code agents in NixOS containers, with one person who decides";
      license = lib.licenses.mit;
      mainProgram = "hyperhive";
      platforms = lib.platforms.linux;
    };
  };

  # ── the host ──

  settingsFile = toml.generate "hyperhive.toml" cfg.settings;

  # Where it is known as a store path it can't be garbage-collected while the hive needs it.
  hostNixpkgs =
    let
      flakeSource = config.nixpkgs.flake.source or null;
    in
    toString (if flakeSource != null then flakeSource else pkgs.path);

  managerPort = cfg.settings.manager_port or 8000;
  firstAgentPort = cfg.settings.agent_port_base or 8100;

  host = {
    assertions = [
      {
        assertion =
          cfg.dashboardPort != managerPort
          && (cfg.dashboardPort < firstAgentPort || cfg.dashboardPort >= firstAgentPort + 900);
        message = ''
          services.hyperhive.dashboardPort is ${toString cfg.dashboardPort}, but ${toString managerPort} and
          ${toString firstAgentPort} to ${toString (firstAgentPort + 899)} belong to the agents' pages.
        '';
      }
      {
        assertion = !(cfg.settings ? state_dir || cfg.settings ? runtime_dir);
        message = ''
          services.hyperhive.settings.state_dir and services.hyperhive.settings.runtime_dir can't be set here:
          systemd makes /var/lib/hyperhive and /run/hyperhive for the service.
        '';
      }
      {
        assertion = !harness.enable;
        message = ''
          services.hyperhive.harness.enable belongs into an agent's container, not on the machine that has
          services.hyperhive.enable.
        '';
      }
    ];

    services.hyperhive.settings = mkMerge [
      {
        containers = mkDefault "nixos";
        source = mkDefault "${cfg.package.src}";
        nixpkgs = mkDefault hostNixpkgs;
        port = cfg.dashboardPort;
        listen_address = cfg.listenAddress;
        inherit (cfg) domains precheck;
        memory_max = defaults.memoryMax;
        cpu_quota = defaults.cpuQuota;
        tasks_max = defaults.tasksMax;
        private_users = defaults.privateUsers;
        daily_budget_usd = defaults.dailyBudgetUsd;
        warm_s = defaults.warmSeconds;
      }
      (mkIf (cfg.publicUrl != null) { public_url = cfg.publicUrl; })
      (mkIf (cfg.notifyUrl != null) { notify_url = cfg.notifyUrl; })
      (mkIf (defaults.model != null) { inherit (defaults) model; })
    ];

    boot.enableContainers = true;
    nix.settings.experimental-features = [
      "nix-command"
      "flakes"
    ];
    users.groups.hive-admin.members = cfg.adminUsers;

    environment = {
      systemPackages = [ cfg.package ];
      etc."hyperhive.toml".source = settingsFile;
      variables.HYPERHIVE_CONFIG = "/etc/hyperhive.toml";
    };

    systemd.services.hyperhive = {
      description = "hyperhive, a swarm of Claude Code agents";
      wantedBy = [ "multi-user.target" ];
      after = [
        "network.target"
        "nix-daemon.socket"
      ];
      # nixos-container, nix and systemctl are those of the system that runs.
      path = [
        pkgs.git
        "/run/current-system/sw"
      ];
      environment = {
        HOME = "/var/cache/hyperhive";
        HYPERHIVE_CONFIG = settingsFile;
        HYPERHIVE_GIT = getExe pkgs.git;
        # Builds belong to the Nix daemon: its sandbox and its limits, not what is allowed to this service.
        NIX_REMOTE = "daemon";
      };
      serviceConfig = {
        Type = "notify";
        NotifyAccess = "main";
        WatchdogSec = 60;
        ExecStart = "${getExe cfg.package} serve";
        Restart = "on-failure";
        RestartSec = 2;
        # Containers are units of their own and run on; what is killed with the daemon is a build under way.
        KillMode = "mixed";
        TimeoutStopSec = 30;
        TimeoutAbortSec = 5; # who missed the watchdog gets no more time than that
        # An evaluation that ran out of memory is a failed deploy, not the end of the service.
        OOMPolicy = "continue";
        # Idle connections to the dashboard are files, too, and need no token.
        LimitNOFILE = 65536;

        StateDirectory = "hyperhive";
        StateDirectoryMode = "0700";
        CacheDirectory = "hyperhive";
        CacheDirectoryMode = "0700";
        RuntimeDirectory = "hyperhive";
        RuntimeDirectoryMode = "0751";
        # Containers have its folders bound: if a restart wiped them, no agent could start or be reached again.
        RuntimeDirectoryPreserve = "yes";

        # Hardening
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        NoNewPrivileges = true;
        PrivateDevices = true;
        PrivateTmp = true;
        ProtectClock = true;
        ProtectControlGroups = true;
        ProtectHome = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelModules = true;
        ProtectKernelTunables = true;
        ProtectSystem = true;
        RestrictAddressFamilies = [
          "AF_UNIX"
          "AF_INET"
          "AF_INET6"
          "AF_NETLINK"
        ];
        RestrictNamespaces = "mnt pid"; # what evaluates a config sees neither agents' folders nor processes
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        SystemCallArchitectures = "native";
        SystemCallErrorNumber = "EPERM";
        SystemCallFilter = [
          "@system-service"
          "@mount"
        ];
        # Can't be had:
        #   User, CapabilityBoundingSet     nixos-container writes conf files and profiles, and starts units, as root;
        #                                   who may do that has every capability by way of a unit
        #   ProtectSystem = "full"          the conf files lie in /etc/nixos-containers
        #   ProtectSystem = "strict"        and /var/lib/nixos-containers and /nix/var are made by others, when needed
        #   PrivateNetwork, IPAddressDeny   the dashboard is a web page, and flake inputs are fetched
        #   ProtectProc, ProcSubset         doctor names who holds a port
      };
    };
  };

  # ── an agent's container ──

  # A file instead of `Environment=` lines, in which % is a specifier and NixOS allows 2 kB.
  environmentFile = pkgs.writeText "hyperhive-harness-environment" (
    lib.concatStrings (
      lib.mapAttrsToList (
        name: value:
        ''
          ${name}="${
            lib.escape [
              "\\"
              "\""
            ] value
          }"
        ''
      ) ({ HYPERHIVE_EXTRA_PROMPT = harness.extraPrompt; } // harness.environment)
    )
  );

  container = {
    assertions = [
      {
        assertion = builtins.stringLength harness.name <= 9;
        message = ''services.hyperhive.harness.name "${harness.name}" is longer than 9 characters.'';
      }
      {
        assertion = !(harness.mcpServers ? hive);
        message = "services.hyperhive.harness.mcpServers.hive: this name belongs to the hive's own tools.";
      }
    ]
    ++ lib.mapAttrsToList (name: _: {
      assertion = builtins.match "[A-Za-z_][A-Za-z0-9_]*" name != null && !lib.hasPrefix "CLAUDE_CODE_" name;
      message = ''
        services.hyperhive.harness.environment: "${name}" is no name of a variable, or begins with CLAUDE_CODE_:
        those tell one running Claude from another, and the harness passes none of them on.
      '';
    }) harness.environment;

    # Releases before 25.11 have one option for all kinds of containers.
    boot = if options.boot ? isNspawnContainer then { isNspawnContainer = true; } else { isContainer = true; };

    # The network is the host's: its addresses and its firewall are not the container's affair.
    networking = {
      hostName = mkDefault harness.name;
      useDHCP = false;
      firewall.enable = false;
    };

    # A container evaluates its own nixpkgs: what the host allows does not reach it.
    nixpkgs.config.allowUnfreePredicate = package: lib.getName package == "claude-code";

    environment.systemPackages = [
      cfg.package
      pkgs.claude-code
      pkgs.git
    ];

    systemd.services.hyperhive-harness = {
      description = "hyperhive's harness: turns mail into turns of Claude Code";
      wantedBy = [ "multi-user.target" ];
      after = [ "network.target" ];
      # Claude's shell inherits it, and so finds what agent.nix puts into environment.systemPackages.
      path = [ "/run/current-system/sw" ];
      environment = {
        HOME = "/root";
        CLAUDE_CONFIG_DIR = "/root/.claude";
        LANG = "C.UTF-8";
        ANTHROPIC_MODEL = harness.model;
        HYPERHIVE_CLAUDE = getExe pkgs.claude-code;
        HYPERHIVE_MCP_SERVERS =
          if harness.mcpServers == { } then
            null
          else
            json.generate "mcp.json" { inherit (harness) mcpServers; };
      };
      serviceConfig = {
        ExecStart = "${cfg.package}/bin/hyperhive-harness run";
        # To the console, too: that is the log of the container's unit on the host, which `hyperhive logs` shows.
        StandardOutput = "journal+console";
        StandardError = "journal+console";
        EnvironmentFile = environmentFile;
        WorkingDirectory = "/state";
        Restart = "always";
        RestartSec = 2;
        # The harness ends Claude and its tools in order; what is left after that is killed.
        KillMode = "mixed";
        TimeoutStopSec = 20;
        # A tool that runs into the memory limit must not take the agent with it.
        OOMPolicy = "continue";
        # No hardening here: the container is the sandbox, and inside it the agent may do as it likes.
      };
      unitConfig.StartLimitIntervalSec = 0;
    };
  };
in
{
  options.services.hyperhive = {
    enable = mkEnableOption "hyperhive, a swarm of Claude Code agents in containers of this machine";

    package = mkOption {
      type = types.package;
      default = hyperhive;
      defaultText = lib.literalMD "built from the folder of this module";
      example = lib.literalExpression "inputs.hyperhive.packages.x86_64-linux.default";
      description = "The hyperhive to run. Its `src` is what containers are built from.";
    };

    dashboardPort = mkOption {
      type = types.port;
      default = 7000;
      example = 7001;
      description = "TCP port of the dashboard. Agents' pages have 8000 and 8100 to 8999.";
    };

    listenAddress = mkOption {
      type = types.str;
      default = "127.0.0.1";
      example = "0.0.0.0";
      description = ''
        Address that the dashboard and the agents' pages listen on. They speak plain HTTP and ask for a token:
        beyond this machine, put a VPN or a TLS proxy in front. No port is opened in the firewall.
      '';
    };

    domains = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "hive.example.org" ];
      description = ''
        Names under which a browser may ask for the pages, besides localhost and the host's name; links use the first.
      '';
    };

    publicUrl = mkOption {
      type = types.nullOr (types.strMatching "https?://[^/]+/?");
      default = null;
      example = "https://hive.example.org";
      description = ''
        Address at which a reverse proxy serves the dashboard; links begin with it. It has to pass the Host header on.
        Links to agents' pages have its scheme and name, and the agent's port: the proxy has to serve those, too.
      '';
    };

    adminUsers = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "alice" ];
      description = ''
        Users who may use the command line without being root. They are operators: whoever approves configurations
        can become root in every agent's container.
      '';
    };

    precheck = mkOption {
      type = types.enum [
        "build"
        "eval"
        "off"
      ];
      default = "build";
      example = "eval";
      description = ''
        What the host finds out about a config while the request for it waits: whether it builds and what that
        would change, whether it evaluates, or nothing. At low priority, one at a time; it never decides.
      '';
    };

    notifyUrl = mkOption {
      type = types.nullOr (types.strMatching "https?://.+");
      default = null;
      example = "https://ntfy.example.org/hive";
      description = ''
        Address that is told what needs the operator: an ntfy topic, or a webhook with
        `settings.notify_format = "json"`. It lies in the Nix store, readable by all users of this machine.
      '';
    };

    agentDefaults = {
      memoryMax = mkOption {
        type = types.strMatching "[0-9]+[KMGT]?|[0-9]+%|infinity";
        default = "4G";
        example = "512M";
        description = "The most memory that one agent's container may use (`MemoryMax=` of systemd).";
      };

      cpuQuota = mkOption {
        type = types.strMatching "[1-9][0-9]*%";
        default = "200%";
        example = "50%";
        description = "The most CPU time that one agent's container may use; 100% is one core (`CPUQuota=`).";
      };

      tasksMax = mkOption {
        type = types.ints.positive;
        default = 4096;
        example = 1024;
        description = "The most processes and threads that one agent's container may have (`TasksMax=`).";
      };

      privateUsers = mkOption {
        type = types.enum [
          "pick"
          "no"
        ];
        default = "pick";
        example = "no";
        description = ''
          Whether root in a container is an unprivileged user of the host (`pick`). `no` is for old releases: root
          in a container is then the host's root to the kernel, and a trusted user to the Nix daemon.
        '';
      };

      model = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "sonnet";
        description = "The model of agents for which the operator chose none; `null` is Claude Code's own choice.";
      };

      dailyBudgetUsd = mkOption {
        type = types.numbers.nonnegative;
        default = 0;
        example = 20;
        description = "What an agent may cost on one day, in US dollars, before it is paused; 0 is no limit.";
      };

      warmSeconds = mkOption {
        type = types.numbers.nonnegative;
        default = 120;
        example = 600;
        description = "How long an idle agent keeps its Claude process, so that the next turn begins at once.";
      };
    };

    settings = mkOption {
      inherit (toml) type;
      default = { };
      example = {
        environment_file = "/run/secrets/hyperhive-agents";
        limits.messages_per_minute = 120;
      };
      description = ''
        Further settings of the daemon, as in its TOML file; it refuses names that it does not know. They lie in the
        Nix store, readable by all: a secret belongs into a file that `environment_file` names.
      '';
    };

    harness = {
      enable = mkEnableOption "the harness of a hyperhive agent. This is for the container, not for its host";

      name = mkOption {
        type = types.strMatching "[a-z](-?[a-z0-9])*";
        default = "agent";
        example = "alice";
        description = "Name of the agent: the container's host name. The hive knows an agent by its socket.";
      };

      extraPrompt = mkOption {
        type = types.lines;
        default = "";
        example = "You are the hive's librarian: keep /shared in order.";
        description = "Text that is added to the agent's system prompt.";
      };

      model = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "opus";
        description = ''
          The agent's model where neither the operator nor {option}`services.hyperhive.agentDefaults.model` of the
          host names one.
        '';
      };

      mcpServers = mkOption {
        type = types.attrsOf json.type;
        default = { };
        example = lib.literalExpression ''{ github.command = lib.getExe pkgs.github-mcp-server; }'';
        description = ''
          MCP servers for this agent, as under `mcpServers` in Claude Code's files. They lie in the Nix store,
          readable by all: no secrets here.
        '';
      };

      environment = mkOption {
        type = types.attrsOf types.str;
        default = { };
        example = {
          HTTPS_PROXY = "http://127.0.0.1:3128";
        };
        description = ''
          Environment variables of the harness, of Claude and of its shell. They lie in the Nix store, readable by
          all: a secret belongs into the file that the host's setting `environment_file` names.
        '';
      };
    };
  };

  config = mkMerge [
    (mkIf cfg.enable host)
    (mkIf harness.enable container)
  ];
}
