"""module.nix and flake.nix, evaluated by Nix with the stand-in for nixpkgs of tests/nix; nothing is built.

The stand-in's module system says no where the real one does. To hear the real one, give unit.nix its `lib`:
`nix-instantiate --eval --strict tests/nix/unit.nix --arg config '{ }' --arg lib 'import <nixpkgs/lib>'`.
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hive import ROOT

import hyperhive

pytestmark = pytest.mark.needs("nix-instantiate")

NIX = ROOT / "tests/nix"
# What the flake is made of; the rest of the repository would only be copied into the store for nothing.
FLAKE = ["flake.nix", "module.nix", "pyproject.toml", "hyperhive.py", "harness.py", "static", "tests/nix"]

# In terms of which the tests below speak: a host, a container, and what becomes of each.
WORDS = f"""
let
  nixos = import {NIX}/nixos.nix;
  system = modules: nixos {{ }} {{ modules = [ {ROOT}/module.nix ] ++ modules; }};
  host = options: system [ {{ services.hyperhive = {{ enable = true; }} // options; }} ];
  container = options: system [ {{ services.hyperhive.harness = {{ enable = true; }} // options; }} ];
  built = system: system.config.system.build.toplevel.drvPath;
in
"""


class Nix(NamedTuple):
    """Nix with a store of its own, which goes with the test."""

    folder: Path

    def run(self, *args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder / "home"),
            "NIX_CONFIG": "experimental-features = nix-command flakes",
            **{f"NIX_{kind}_DIR": str(self.folder / kind.lower()) for kind in ("STORE", "STATE", "LOG", "CONF")},
        }
        return subprocess.run(args, env=environment, cwd=cwd, capture_output=True, text=True, timeout=100)

    def value(self, expression: str, *args: str | Path) -> Any:
        ran = self.run("nix-instantiate", "--eval", "--strict", "--json", *args, "--expr", WORDS + expression)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    def error(self, expression: str) -> str:
        ran = self.run("nix-instantiate", "--eval", "--strict", "--expr", WORDS + expression)
        assert ran.returncode != 0, ran.stdout
        return ran.stderr

    def unit(self, config: str, **arguments: str) -> "Unit":
        named = [part for name, value in arguments.items() for part in ("--arg", name, value)]
        ran = self.run(
            "nix-instantiate", "--eval", "--strict", "--json", NIX / "unit.nix", "--arg", "config", config, *named
        )
        assert ran.returncode == 0, ran.stderr
        return Unit(**json.loads(ran.stdout))

    def flake(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command of the new `nix` about our flake, with the stand-in in the place of both its inputs."""
        instead = [
            part
            for name in ("nixpkgs", "nixpkgs-unstable")
            for part in ("--override-input", name, f"path:{self.folder}/hyperhive/tests/nix")
        ]
        return self.run("nix", *command, "--no-write-lock-file", *instead, cwd=cwd)


class Unit(NamedTuple):
    unit: str
    files: dict[str, str]

    def all(self, key: str) -> list[str]:
        return re.findall(rf"^{key}=(.*)$", self.unit, re.MULTILINE)

    def one(self, key: str) -> str:
        (value,) = self.all(key)
        return value

    @property
    def environment(self) -> dict[str, str]:
        return dict(json.loads(line).split("=", 1) for line in self.all("Environment"))


@pytest.fixture
def nix(folder: Path) -> Iterator[Nix]:
    yield Nix(folder)
    for path in (folder / "store").rglob("*"):  # what is in a store can't be removed by who is not root
        if path.is_dir():
            path.chmod(stat.S_IRWXU)


@pytest.fixture
def copy(folder: Path) -> Path:
    """hyperhive's folder, as a user copies it."""
    place = folder / "hyperhive"
    for name in FLAKE:
        source, target = ROOT / name, place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return place


PARSED = ["flake.nix", "module.nix", "static/agent.nix", *(f"tests/nix/{it.name}" for it in sorted(NIX.glob("*.nix")))]


@pytest.mark.parametrize("file", PARSED)
def test_parses(nix: Nix, file: str) -> None:
    assert nix.run("nix-instantiate", "--parse", ROOT / file).stderr == ""


# ── the host ──


def test_the_hosts_unit(nix: Nix) -> None:
    unit = nix.unit("{ }", programs='{ hyperhive = "/opt/hyperhive"; git = "/opt/git"; }')
    expected = {
        "Type": "notify",
        "NotifyAccess": "main",
        "ExecStart": "/opt/hyperhive/bin/hyperhive serve",
        "Restart": "on-failure",
        "KillMode": "mixed",
        "StateDirectory": "hyperhive",
        "StateDirectoryMode": "0700",
        "RuntimeDirectory": "hyperhive",
        "RuntimeDirectoryMode": "0751",
        "RuntimeDirectoryPreserve": "yes",
        "LimitNOFILE": str(hyperhive.OPEN_FILES),
        "NoNewPrivileges": "true",
        "WantedBy": "multi-user.target",
    }
    assert {key: unit.one(key) for key in expected} == expected
    assert int(unit.one("WatchdogSec")) > 0
    assert unit.environment["HYPERHIVE_GIT"] == "/opt/git/bin/git"
    assert unit.environment["PATH"].split(":")[:2] == ["/opt/git/bin", "/run/current-system/sw/bin"]


SETTINGS = """{
  services.hyperhive = {
    dashboardPort = 7001;
    listenAddress = "0.0.0.0";
    domains = [ "hive.example.org" ];
    publicUrl = "https://hive.example.org";
    precheck = "eval";
    notifyUrl = "https://ntfy.example.org/hive";
    agentDefaults = {
      memoryMax = "512M"; cpuQuota = "50%"; tasksMax = 99; privateUsers = "no";
      model = "sonnet"; dailyBudgetUsd = 2.5; warmSeconds = 7;
    };
    settings = { manager_autostart = false; limits.unread = 12; };
  };
}"""


def test_the_options_become_settings(nix: Nix) -> None:
    unit = nix.unit(SETTINGS)
    text = unit.files["/etc/hyperhive.toml"]
    assert unit.files[unit.environment["HYPERHIVE_CONFIG"]] == text
    table = tomllib.loads(text)
    assert table.pop("source").startswith(f"{nix.folder}/store/")
    assert table == {
        "containers": "nixos",
        "nixpkgs": str(NIX),
        "port": 7001,
        "listen_address": "0.0.0.0",
        "domains": ["hive.example.org"],
        "public_url": "https://hive.example.org",
        "precheck": "eval",
        "notify_url": "https://ntfy.example.org/hive",
        "memory_max": "512M",
        "cpu_quota": "50%",
        "tasks_max": 99,
        "private_users": "no",
        "model": "sonnet",
        "daily_budget_usd": 2.5,
        "warm_s": 7,
        "manager_autostart": False,
        "limits": {"unread": 12},
    }


@pytest.mark.parametrize("settings", [SETTINGS, "{ }"], ids=["all", "default"])
def test_the_daemon_takes_the_settings(nix: Nix, folder: Path, settings: str) -> None:
    (folder / "settings.toml").write_text(nix.unit(settings).files["/etc/hyperhive.toml"])
    config = hyperhive.load_config(str(folder / "settings.toml"))
    assert config.containers == "nixos"


def test_the_rest_of_the_host(nix: Nix) -> None:
    wanted = nix.value("""
      let config = (host { adminUsers = [ "alice" ]; }).config; in {
        inherit (config.boot) enableContainers isNspawnContainer;
        admins = config.users.groups.hive-admin.members;
        features = config.nix.settings.experimental-features;
        commands = map (package: package.name) config.environment.systemPackages;
        containers = config.systemd.services ? hyperhive-harness;
        nothing = (system [ ]).config.systemd.services;
      }
    """)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert wanted == {
        "enableContainers": True,
        "isNspawnContainer": False,
        "admins": ["alice"],
        "features": ["nix-command", "flakes"],
        "commands": [f"hyperhive-{version}"],
        "containers": False,
        "nothing": {},
    }


def test_nixpkgs_of_a_host_that_is_a_flake_is_the_flakes(nix: Nix) -> None:
    expression = '{ services.hyperhive.enable = true; nixpkgs.flake.source = "/nix/store/x-source"; }'
    assert nix.value(f"(system [ {expression} ]).config.services.hyperhive.settings.nixpkgs") == "/nix/store/x-source"


# ── a container ──


def test_the_harness_unit(nix: Nix, folder: Path) -> None:
    unit = nix.unit(
        r"""{
          services.hyperhive.harness = {
            name = "alice";
            model = "opus";
            extraPrompt = "Say \"50% of $HOME\",\nand \\n.";
            environment.HTTPS_PROXY = "http://127.0.0.1:3128";
            mcpServers.files.command = "/bin/files";
          };
        }""",
        service='"hyperhive-harness"',
        programs='{ hyperhive = "/opt/hyperhive"; claude-code = "/opt"; }',
    )
    assert unit.one("ExecStart") == "/opt/hyperhive/bin/hyperhive-harness run"
    assert unit.one("WorkingDirectory") == "/state"
    assert unit.one("KillMode") == "mixed"
    environment = unit.environment
    assert environment.pop("PATH").startswith("/run/current-system/sw/bin:")
    servers = unit.files[environment.pop("HYPERHIVE_MCP_SERVERS")]
    assert json.loads(servers) == {"mcpServers": {"files": {"command": "/bin/files"}}}
    assert environment == {
        "ANTHROPIC_MODEL": "opus",
        "CLAUDE_CONFIG_DIR": "/root/.claude",
        "HOME": "/root",
        "HYPERHIVE_CLAUDE": "/opt/bin/claude-code",
        "LANG": "C.UTF-8",
    }
    # As a shell reads it: of what it would expand in double quotes, systemd takes $ and ` as they are.
    assert unit.files[unit.one("EnvironmentFile")] == (
        'HTTPS_PROXY="http://127.0.0.1:3128"\nHYPERHIVE_EXTRA_PROMPT="Say \\"50% of $HOME\\",\nand \\\\n."\n'
    )


def test_without_settings_the_harness_has_none(nix: Nix) -> None:
    unit = nix.unit("{ }", service='"hyperhive-harness"', programs='{ claude-code = "/opt"; }')
    assert unit.environment["HYPERHIVE_CLAUDE"] == "/opt/bin/claude-code"
    assert {"ANTHROPIC_MODEL", "HYPERHIVE_MCP_SERVERS"}.isdisjoint(unit.environment)


@pytest.mark.parametrize("new", [True, False], ids=["25.11", "older"])
def test_a_container_is_one_on_this_release(nix: Nix, new: bool) -> None:
    release = f"{{ isNspawnContainer = {json.dumps(new)}; }}"
    config = nix.value(f"""
      let
        modules = [ {ROOT}/module.nix {{ services.hyperhive.harness = {{ enable = true; name = "alice"; }}; }} ];
        system = nixos {release} {{ inherit modules; }};
      in {{ inherit (system.config) boot networking; built = built system; }}
    """)
    assert config["boot"] == {
        "enableContainers": True,
        **({"isNspawnContainer": True, "isContainer": False} if new else {"isContainer": True}),
    }
    assert config["networking"] == {"firewall": {"enable": False}, "hostName": "alice", "useDHCP": False}


def test_of_what_is_unfree_only_claude_code_is_allowed(nix: Nix) -> None:
    names = '[ "claude-code" "claude-code-bin" "claude" "unrar" ]'
    allowed = f"map (pname: (container {{ }}).config.nixpkgs.config.allowUnfreePredicate {{ inherit pname; }}) {names}"
    assert nix.value(allowed) == [True, False, False, False]
    unrar = "{ pkgs, ... }: { services.hyperhive.harness.enable = true; environment.systemPackages = [ pkgs.unrar ]; }"
    assert "Package ‘unrar-1’ has an unfree license" in nix.error(f"built (system [ ({unrar}) ])")
    assert "Package ‘claude-code-1’ has an unfree license" in nix.error("(host { }).pkgs.claude-code.drvPath")


def test_the_overlay_takes_claude_code_from_unstable_and_allows_nothing_else(nix: Nix, folder: Path) -> None:
    """In the place of unstable stands one that answers which names its caller allows."""
    names = '[ "claude-code" "claude-code-bin" "unrar" ]'
    (folder / "unstable").mkdir()
    (folder / "unstable/default.nix").write_text(
        f"{{ system, config }}: {{ claude-code = {{ inherit system; "
        f"allowed = map (pname: config.allowUnfreePredicate {{ inherit pname; }}) {names}; }}; unrar = 1; }}"
    )
    overlaid = nix.value(f"""
      let
        nixpkgs = (import {NIX}/flake.nix).outputs {{ self = null; }};
        flake = (import {ROOT}/flake.nix).outputs {{
          self = flake; inherit nixpkgs; nixpkgs-unstable.outPath = {folder}/unstable;
        }};
      in flake.overlays.claude-unstable nixpkgs.legacyPackages.aarch64-linux {{ }}
    """)
    assert overlaid == {"claude-code": {"system": "aarch64-linux", "allowed": [True, False, False]}}


# ── options ──


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("dashbordPort = 7001;", "`services.hyperhive.dashbordPort' does not exist"),
        ('dashboardPort = "7001";', "`services.hyperhive.dashboardPort' is not of type"),
        ("dashboardPort = 70000;", "`services.hyperhive.dashboardPort' is not of type"),
        ("dashboardPort = 8000;", "services.hyperhive.dashboardPort is 8000, but"),
        ("dashboardPort = 8999;", "services.hyperhive.dashboardPort is 8999, but"),
        ('domains = "a";', "`services.hyperhive.domains' is not of type"),
        ("adminUsers = [ 1 ];", "`services.hyperhive.adminUsers."),
        ('precheck = "always";', "`services.hyperhive.precheck' is not of type"),
        ('publicUrl = "https://example.org/hive";', "`services.hyperhive.publicUrl' is not of type"),
        ('notifyUrl = "ntfy.example.org";', "`services.hyperhive.notifyUrl' is not of type"),
        ('agentDefaults.memoryMax = "lots";', "`services.hyperhive.agentDefaults.memoryMax' is not of type"),
        ('agentDefaults.cpuQuota = "2";', "`services.hyperhive.agentDefaults.cpuQuota' is not of type"),
        ("agentDefaults.tasksMax = 0;", "`services.hyperhive.agentDefaults.tasksMax' is not of type"),
        ("agentDefaults.privateUsers = true;", "`services.hyperhive.agentDefaults.privateUsers' is not of type"),
        ("agentDefaults.dailyBudgetUsd = -1;", "`services.hyperhive.agentDefaults.dailyBudgetUsd' is not of type"),
        ("settings.limits.unread = null;", "`services.hyperhive.settings.limits.unread' is not of type"),
        ("settings.port = 7001;", "`services.hyperhive.settings.port' has conflicting definition values"),
        ('settings.state_dir = "/srv";', "services.hyperhive.settings.state_dir and"),
        ("harness.enable = true;", "services.hyperhive.harness.enable belongs into an agent's container"),
    ],
)
def test_a_wrong_option_of_the_host_is_named(nix: Nix, options: str, message: str) -> None:
    assert message in nix.error(f"built (host {{ {options} }})")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('name = "Alice";', "`services.hyperhive.harness.name' is not of type"),
        ('name = "a--b";', "`services.hyperhive.harness.name' is not of type"),
        ('name = "tencharact";', 'services.hyperhive.harness.name "tencharact" is longer than 9'),
        ("environment.A = 1;", "`services.hyperhive.harness.environment.A' is not of type"),
        ('environment."A B" = "1";', 'services.hyperhive.harness.environment: "A B" is no name'),
        ('environment.CLAUDE_CODE_X = "1";', 'services.hyperhive.harness.environment: "CLAUDE_CODE_X"'),
        ('mcpServers.hive.command = "x";', "services.hyperhive.harness.mcpServers.hive"),
    ],
)
def test_a_wrong_option_of_a_container_is_named(nix: Nix, options: str, message: str) -> None:
    assert message in nix.error(f"built (container {{ {options} }})")


def test_a_unit_can_be_changed_from_outside(nix: Nix) -> None:
    off = "{ lib, ... }: { systemd.services.hyperhive.environment.NIX_REMOTE = lib.mkForce null; }"
    assert "NIX_REMOTE" in nix.unit("{ }").environment
    assert "NIX_REMOTE" not in nix.unit(off).environment


def test_a_default_gives_way_and_force_wins(nix: Nix) -> None:
    """The stand-in keeps to NixOS's priorities, or what is tested above would be worth nothing."""
    settings = """{ lib, ... }: {
      services.hyperhive = { enable = true; settings = { containers = "process"; port = lib.mkForce 7002; }; };
    }"""
    seen = nix.value(f"(system [ ({settings}) ]).config.services.hyperhive.settings")
    assert (seen["containers"], seen["port"]) == ("process", 7002)


def test_every_option_has_type_default_example_and_description(nix: Nix) -> None:
    options = nix.value("""
      let
        flat = path: tree:
          if tree._type or "" == "option" then
            [ { inherit path; has = builtins.attrNames tree; inherit (tree) description; } ]
          else
            builtins.concatLists (map (name: flat (path + "." + name) tree.${name}) (builtins.attrNames tree));
      in flat "services.hyperhive" (system [ ]).options.services.hyperhive
    """)
    assert len(options) == 23
    for option in options:
        assert {"type", "default", "example", "description"} <= set(option["has"]), option["path"]
        assert option["description"].strip().endswith("."), option["path"]


# ── without the flake, and with it ──


def test_a_copied_folder_is_enough(nix: Nix, copy: Path) -> None:
    """No flake, no git. What is built from the folder changes with what runs, and with nothing else."""
    (copy / "README.md").write_text("not part of it")
    (copy / "static/__pycache__").mkdir()
    config = copy.parent / "configuration.nix"
    config.write_text("{ imports = [ ./hyperhive/module.nix ]; services.hyperhive.enable = true; }")
    system = f"nixos {{ }} {{ modules = [ {config} ]; }}"
    seen = nix.value(f"let it = {system}; in {{ built = built it; inherit (it.config.services.hyperhive) settings; }}")
    assert seen["built"].startswith(f"{nix.folder}/store/")
    source = nix.value(f"({system}).config.services.hyperhive.settings.source", "--read-write-mode")
    assert source == seen["settings"]["source"]
    assert {path.name for path in Path(source).iterdir()} == {*FLAKE} - {"tests/nix"}
    assert "__pycache__" not in {path.name for path in Path(source, "static").iterdir()}


def test_the_package_runs(nix: Nix, copy: Path, folder: Path) -> None:
    """Its install script, run by hand: from a folder with a module of the same name, and with the bytecode kept."""
    script = nix.value(f"""
      (system [
        {{ nixpkgs.overlays = [ (_: _: {{ python3.withPackages = _: "{sys.prefix}"; }}) ]; }}
      ]).config.services.hyperhive.package.installPhase
    """)
    shim = (NIX / "stdenv.sh").read_text()
    out = folder / "out"
    subprocess.run(["bash", "-euc", shim + script], cwd=copy, env={**os.environ, "out": str(out)}, check=True)
    assert len(list(out.rglob("*.pyc"))) == 2
    (out / "lib/hyperhive/hyperhive.py").write_text("the bytecode is not asked whether this changed")
    (folder / "hyperhive.py").write_text("raise SystemExit('the wrong hyperhive')")
    for program in ("hyperhive", "hyperhive-harness"):
        ran = subprocess.run([out / "bin" / program, "--version"], cwd=folder, capture_output=True, text=True)
        assert ran.returncode == 0 and hyperhive.VERSION in ran.stdout, ran.stderr


@pytest.mark.needs("nix")
def test_the_flake_checks(nix: Nix, copy: Path) -> None:
    ran = nix.flake("flake", "check", "--no-build", f"path:{copy}")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.needs("nix")
def test_a_config_becomes_a_container_by_mkagent(nix: Nix, copy: Path, folder: Path) -> None:
    """A flake as a deploy makes it: hyperhive and nixpkgs are inputs, the agent's config is a folder."""
    (folder / "config").mkdir()
    (folder / "config/agent.nix").write_text((ROOT / "static/agent.nix").read_text().replace("ripgrep", "ruff"))
    (folder / "deploy").mkdir()
    (folder / "deploy/flake.nix").write_text(f"""{{
      inputs = {{
        nixpkgs.url = "path:{copy}/tests/nix";
        hyperhive.url = "path:{copy}";
        hyperhive.inputs = {{ nixpkgs.follows = "nixpkgs"; nixpkgs-unstable.follows = "nixpkgs"; }};
        agent = {{ url = "path:{folder}/config"; flake = false; }};
      }};
      outputs = {{ hyperhive, agent, ... }}: {{
        nixosConfigurations.container = hyperhive.lib.mkAgent {{
          name = "alice"; system = "x86_64-linux"; config = agent + "/agent.nix";
        }};
      }};
    }}""")
    container = f"path:{folder}/deploy#nixosConfigurations.container.config"
    ran = nix.run("nix", "eval", "--json", "--no-write-lock-file", f"{container}.environment.systemPackages")
    assert ran.returncode == 0, ran.stderr
    assert re.findall(r"store/\w+-([a-z-]+)", ran.stdout) == ["hyperhive-", "claude-code-", "git-", "git-", "ruff-"]
    ran = nix.run("nix", "eval", "--raw", "--no-write-lock-file", f"{container}.system.build.toplevel.name")
    assert ran.stdout == "nixos-system-alice", ran.stderr


@pytest.mark.needs("nix")
def test_the_template_is_the_hives(nix: Nix, copy: Path) -> None:
    """`nix flake init --template` copies this folder."""
    ran = nix.flake("eval", "--raw", f"path:{copy}#templates.default.path")
    assert ran.returncode == 0, ran.stderr
    files = {path.name: path.read_text() for path in Path(ran.stdout).iterdir()}
    assert files == {"agent.nix": hyperhive.agent_template()}
