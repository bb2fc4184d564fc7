"""A hive with `nixos` containers on a machine without NixOS: real Nix, real systemd-nspawn, and what tests/fakes has
of `nixos-container` and systemd. All of it lies in the test's own folder, the Nix store, too.

    with NixosHive(folder) as hive:
        hive.deploy("alice")                        # the operator spawns it; the deploy, when it is over
        hive.propose("alice", CONFIG)               # the manager asks for it; the request's number
        hive.change("alice", CONFIG)                # and the operator says yes; the deploy, when it is over
        hive.program("nixos-container", "status", "h-alice")
"""

import base64
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from hive import ROOT, Hive, end, processes_of, wait_for

FAKES = ROOT / "tests/fakes"
FLAKE = ("flake.nix", "module.nix", "pyproject.toml", "hyperhive.py", "harness.py", "static")
NIX_CONF = "sandbox = false\nbuild-users-group =\nsubstituters =\nflake-registry =\n"


class NixosHive(Hive):
    containers = "nixos"

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.nixos = folder / "nixos"
        self.etc, self.units = self.nixos / "etc", self.nixos / "units"
        self.source = self.nixos / "hyperhive"
        super().__init__(
            folder,
            **{
                "conf_dir": str(self.etc),
                "unit_dir": str(self.nixos / "run"),
                "container_dirs": [
                    str(self.nixos / place)
                    for place in ("var", "nix/state/profiles/per-container", "nix/state/gcroots/per-container")
                ],
                "source": str(self.source),
                "nixpkgs": str(self.nixos / "nixpkgs"),
                "nixpkgs_unstable": f"path:{self.nixos / 'nixpkgs'}",
                "precheck": "off",  # a second build of everything
                **settings,
            },
        )
        for name in ("etc", "units", "run", "bin", "nix"):
            (self.nixos / name).mkdir(parents=True)
        self._lay_out_sources()
        self._write_programs()
        self.environment = {"PATH": f"{self.nixos / 'bin'}:{os.environ['PATH']}"}

    def _lay_out_sources(self) -> None:
        """Flakes of their own: a flake is copied as a whole, and the repository has more than it needs."""
        self.source.mkdir()
        for name in FLAKE:
            here, there = ROOT / name, self.source / name
            shutil.copytree(here, there) if here.is_dir() else shutil.copy(here, there)
        nixpkgs = self.nixos / "nixpkgs"
        shutil.copytree(ROOT / "tests/nix", nixpkgs / "nix")
        shutil.copy(FAKES / "nixpkgs.nix", nixpkgs / "flake.nix")
        shutil.copy(FAKES / "init.py", nixpkgs)
        (nixpkgs / "default.nix").write_text("import ./nix\n")

    def _write_programs(self) -> None:
        (self.nixos / "nix/nix.conf").write_text(NIX_CONF)
        variables = {
            "HOME": self.nixos / "home",  # Nix keeps a cache there, which names paths of the store
            "NIXOS_ETC": self.etc,
            "NIXOS_VAR": self.nixos / "var",
            "NIXOS_LOCK": self.nixos / "lock",
            "NIXOS_DIE": self.nixos / "die",
            "UNITS": self.units,
            "UNIT_DIR": self.nixos / "run",
            "NIX_STORE_DIR": self.nixos / "store",
            "NIX_CONF_DIR": self.nixos / "nix",
            **{f"NIX_{kind}_DIR": self.nixos / "nix" / kind.lower() for kind in ("STATE", "LOG", "LOCALSTATE")},
        }
        systemd = shlex.join([sys.executable, str(FAKES / "systemd.py")])
        programs = {
            "nixos-container": shlex.join([sys.executable, str(FAKES / "nixos-container")]),
            **{name: f"{systemd} {name}" for name in ("systemctl", "machinectl", "journalctl")},
            **{name: str(shutil.which(name)) for name in ("nix", "nix-env")},
        }
        exports = "".join(f"export {key}={shlex.quote(str(value))}\n" for key, value in variables.items())
        for name, command in programs.items():
            path = self.nixos / "bin" / name
            path.write_text(f'#!/bin/sh\n{exports}exec {command} "$@"\n')
            path.chmod(0o755)

    # ── acting ──

    def program(self, *argv: str, accept: Iterable[int] = (0,)) -> str:
        """One of these programs, as a person at the machine would run it."""
        environment = {**os.environ, **self.environment}
        ran = subprocess.run(argv, env=environment, cwd=self.nixos, capture_output=True, text=True, timeout=100)
        assert ran.returncode in accept, ran.stdout + ran.stderr
        return ran.stdout

    def deploy(self, name: str, verb: str = "spawn") -> dict[str, Any]:
        """Spawn, rebuild or roll back an agent, and the deploy when it is over."""
        answer = self.ask(cmd=verb, name=name)
        assert answer["ok"], answer
        return self.deployed(answer["deploy"])

    def spawn(self, *names: str, running: bool = True) -> Self:
        assert running, "in a container there is nobody whose place a test could take"
        for name in names:
            assert (row := self.deploy(name))["phase"] == "deployed", row
        return self

    def propose(self, name: str, config: str) -> int:
        """The manager asks for this config, of a new agent or of one that is there; the request's number."""
        if not any(row["name"] == "manager" for row in self.ask(cmd="agents")["agents"]):
            self.spawn("manager")
        with self.agent("manager") as manager:
            known = manager.ask("checkout_config", agent=name)
            if not known["ok"]:
                asked = manager.ask("request_spawn", name=name, description="a try", config=config)
            else:
                sha, bundle = self._commit(base64.b64decode(known["bundle"]), config)
                asked = manager.ask("request_apply_commit", agent=name, sha=sha, description="a try", bundle=bundle)
        assert asked["ok"], asked
        return int(asked["id"])

    def approve(self, approval: int) -> dict[str, Any]:
        """The deploy that follows, when it is over."""
        answer = self.ask(cmd="approve", id=approval)
        assert answer["ok"], answer
        return self.deployed(self.ask(cmd="show", id=approval)["approval"]["deploy_id"])

    def change(self, name: str, config: str) -> dict[str, Any]:
        return self.approve(self.propose(name, config))

    def _commit(self, bundle: bytes, config: str) -> tuple[str, str]:
        """A commit on top of what is in the bundle, as its number and a bundle in turn."""
        folder = Path(tempfile.mkdtemp(dir=self.nixos))
        (folder / "bundle").write_bytes(bundle)

        def git(*words: str) -> str:
            name = ["-c", "user.name=manager", "-c", "user.email=manager@hive"]
            return self.program("git", "-C", str(folder / "config"), *name, *words)

        self.program("git", "clone", "--quiet", "--branch", "main", str(folder / "bundle"), str(folder / "config"))
        (folder / "config/agent.nix").write_text(config)
        git("commit", "--quiet", "--all", "--message", "a try")
        git("bundle", "create", "--quiet", str(folder / "new"), "main")
        return git("rev-parse", "main").strip(), base64.b64encode((folder / "new").read_bytes()).decode()

    def deployed(self, deploy: int, *, timeout_s: float = 150) -> dict[str, Any]:
        def over() -> Any:
            row = self.ask(cmd="deploys", id=deploy)["deploys"][0]
            return row if row["phase"] in ("deployed", "failed") else None

        return wait_for(over, f"the end of deploy {deploy}", timeout_s=timeout_s)

    def conf(self, name: str) -> Path:
        return self.etc / f"h-{name}.conf"

    def leader(self, name: str) -> int:
        """The first process of a container, as this machine counts."""
        return int(self.program("machinectl", "show", f"h-{name}", "-p", "Leader").partition("=")[2])

    def close(self) -> None:
        """The daemon leaves its containers running: they are ended here."""
        super().close()
        units = sorted(self.units.glob("container@*.service"))
        environment = {**os.environ, **self.environment}
        stops = [subprocess.Popen(["systemctl", "stop", unit.name], env=environment) for unit in units]
        assert [stop.wait() for stop in stops] == [0] * len(stops)
        end(processes_of(self.nixos))
