#!/usr/bin/env python3
"""A host in a box: Debian with systemd as its first process, Nix, and the hive as module.nix makes it a service.

    with Box() as box:
        box.run("systemctl", "restart", "hyperhive")
        box.ask(cmd="list")                             # host.sock
        box.reboot()

Run as a program, it boots a box and gives a shell in it: `sudo .venv/bin/python tests/hostbox.py`.

The box is a systemd-nspawn container with a network of its own (loopback alone), whose /usr is that of a Debian made
once by debootstrap and kept in CACHE; all else is the box's own and goes with it. What is NixOS about it comes from
tests/nix: Nix builds a system out of a flake that imports ours, and its units are what systemd runs. `nixos-container`
and the start script of containers are those of tests/fakes, here with a real systemd below them.
"""

import fcntl
import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import psutil
from hive import ROOT, Line, end, wait_for

CACHE = Path("/var/cache/hyperhive-hostbox")
SUITE = "trixie"
PACKAGES = [
    *("systemd-sysv", "systemd-container", "dbus", "git", "curl", "python3-bottle", "python3-waitress"),
    *("nix-bin", "nix-setup-systemd", "libdbi-perl"),  # this one nix-bin needs, but debootstrap does not see it
]
# Of what was installed only /usr is shared: it is never written to. The rest a box has a copy of.
LEFT_OUT = ("boot", "var/cache", "var/lib/apt", "var/lib/dpkg", "var/log")
MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "console-getty.service", "systemd-modules-load.service")

FAKES = ROOT / "tests/fakes"
HYPERHIVE = ("flake.nix", "module.nix", "pyproject.toml", "hyperhive.py", "harness.py", "static")

NIX_CONF = """\
experimental-features = nix-command flakes
flake-registry =
sandbox = false
substituters =
"""

# The configuration of the machine, as a user writes it.
FLAKE = """\
{
  inputs = {
    nixpkgs.url = "path:/opt/nixpkgs";
    hyperhive.url = "path:/opt/hyperhive";
    hyperhive.inputs = { nixpkgs.follows = "nixpkgs"; nixpkgs-unstable.follows = "nixpkgs"; };
  };
  outputs = { nixpkgs, hyperhive, ... }: {
    nixosConfigurations.box = nixpkgs.lib.nixosSystem {
      modules = [
        hyperhive.nixosModules.default
        {
          networking.hostName = "box";
          environment.systemPackages = [ "/opt/nixos-container" ];
          services.hyperhive = {
            enable = true;
            settings = {
              nixpkgs = "/opt/nixpkgs";
              nixpkgs_unstable = "path:/opt/nixpkgs";
              undo_s = 0;
            };
          };
        }
      ];
    };
  };
}
"""

# What a user does with `nix flake update` and `nixos-rebuild switch`, as far as it concerns us.
SWITCH = """\
set -eu
nix flake update --flake /etc/nixos
system=$(nix build --no-link --print-out-paths /etc/nixos#nixosConfigurations.box.config.system.build.toplevel)
nix-env -p /nix/var/nix/profiles/system --set "$system"
ln -sfn /nix/var/nix/profiles/system /run/current-system
systemctl daemon-reload
systemctl restart hyperhive
"""

CONTAINER_UNIT = """\
[Unit]
Description=Container '%i'

[Service]
Type=notify
Environment=root=/var/lib/nixos-containers/%i INSTANCE=%i
Environment="NSPAWN_FLAGS=--bind-ro=/nix/var/nix/db --bind-ro=/nix/var/nix/daemon-socket"
EnvironmentFile=-/etc/nixos-containers/%i.conf
ExecStart=/opt/nixos-container/start-container
SyslogIdentifier=container %i
Restart=on-failure
RestartForceExitStatus=133
SuccessExitStatus=133
TimeoutStartSec=1min
KillMode=mixed
KillSignal=TERM
Slice=machine.slice
Delegate=yes
DevicePolicy=closed
"""

# A command with processes and mounts of its own, which go with it; and it goes with the process that began it.
ALONE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
# With this status nspawn says that the box wants to boot again.
RUNNER = (*ALONE, "sh", "-uc", 'echo 0 > "$0/cgroup.procs"; while "$@"; [ $? = 133 ]; do :; done')

# Files of the box: a text, or what a link points at.
FILES = {
    "etc/hostname": "box\n",
    "etc/nix/nix.conf": NIX_CONF,
    "etc/nixos/flake.nix": FLAKE,
    "etc/systemd/system/container@.service": CONTAINER_UNIT,
    "etc/tmpfiles.d/nixos.conf": "L+ /run/current-system - - - - /nix/var/nix/profiles/system\n",
}
SERVICE = "/nix/var/nix/profiles/system/etc/systemd/system/hyperhive.service"
LINKS = {
    "etc/systemd/system/hyperhive.service": SERVICE,
    "etc/systemd/system/multi-user.target.wants/hyperhive.service": SERVICE,
    **{f"etc/systemd/system/{unit}": "/dev/null" for unit in MASKED},
}


# ── the root, made once ──


def prepared_root() -> Path:
    """A folder with `usr` and `base`. It is made as a whole or not at all; one made by another recipe goes."""
    recipe = hashlib.sha256(repr((SUITE, PACKAGES, LEFT_OUT)).encode()).hexdigest()[:12]
    whole = CACHE / f"{SUITE}-{recipe}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_leftovers(but=whole)
        if not whole.exists():
            root = whole.with_suffix(".new")
            debootstrap(root / "base")
            (root / "base/usr").rename(root / "usr")
            (root / "base/usr").mkdir()
            for path in LEFT_OUT:
                shutil.rmtree(root / "base" / path)
                (root / "base" / path).mkdir()
            root.rename(whole)
    return whole


def remove_leftovers(*, but: Path) -> None:
    """What broke off, or whose maker has gone without tidying up: a box is named after its process."""
    for path in CACHE.iterdir():
        owner = path.name.rpartition("-")[2]
        is_used = path.name.startswith("box-") and owner.isdecimal() and psutil.pid_exists(int(owner))
        if path.is_dir() and path != but and not is_used:
            remove_traces(path.name)
            shutil.rmtree(path)


def debootstrap(target: Path) -> None:
    target.mkdir(parents=True)
    ran = subprocess.run(
        [*ALONE, "debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(target)],
        env=outer_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if ran.returncode != 0:
        raise RuntimeError(f"debootstrap failed with status {ran.returncode}:\n{ran.stdout[-4000:]}")


def outer_environment(**more: str) -> dict[str, str]:
    proxies = {key: value for key, value in os.environ.items() if key.endswith("_proxy")}
    return {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8", **proxies, **more}


# ── a box ──


class Box:
    """A running box; `close` leaves nothing of it."""

    def __init__(self) -> None:
        self._closers = ExitStack()
        self._runner: subprocess.Popen[bytes] | None = None
        self.leader = 0  # the box's first process, as this machine counts
        try:
            self._begin(prepared_root())
        except BaseException:
            self.close()
            raise

    def _begin(self, prepared: Path) -> None:
        self._usr, folder = prepared / "usr", CACHE / f"box-{os.getpid()}"
        self.root, self._console = folder / "root", folder / "console.log"
        self._closers.callback(shutil.rmtree, folder)
        folder.mkdir()
        subprocess.run(["cp", "-a", prepared / "base", self.root], check=True)
        lay_out(self.root)
        self._closers.callback(remove_traces, folder.name)
        self._group = control_group(folder.name)
        self._group.mkdir()
        self._closers.callback(self._end)
        self._boot()
        self.switch()

    def _boot(self) -> None:
        command = [
            *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", "--console=read-only"),
            *("--capability=all", "--system-call-filter=@known", "--private-network", "--link-journal=no"),
            *(f"--machine={self._console.parent.name}", f"--directory={self.root}", f"--bind-ro={self._usr}:/usr"),
        ]
        with self._console.open("ab") as console:
            self._runner = subprocess.Popen(
                [*RUNNER, str(self._group), *command],
                env=outer_environment(SYSTEMD_NSPAWN_UNIFIED_HIERARCHY="1"),
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
            )  # fmt: skip
        self._booted()

    def _booted(self) -> None:
        before = self.leader
        self.leader = self.wait_for(lambda: self._find_leader(but=before), "the first process", timeout_s=60)
        self.wait_for(lambda: self.try_run("systemctl", "is-active", "multi-user.target"), "the boot", timeout_s=60)

    def _find_leader(self, *, but: int = 0) -> int:
        """The process that is pid 1 in the box, and in no box in the box."""
        assert self._runner is not None and self._runner.poll() is None, self._console.read_text()
        for process in psutil.Process(self._runner.pid).children(recursive=True):
            with suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                if process.pid != but and re.search(r"^NSpid:\t\d+\t\d+\t1$", status, re.MULTILINE):
                    return process.pid
        return 0

    def _end(self) -> None:
        """The runner takes nspawn with it, and that the box."""
        if self._runner is not None:
            below = psutil.Process(self._runner.pid).children(recursive=True)
            self._runner.kill()
            self._runner.wait()
            end(below)

    def close(self) -> None:
        self._closers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── from outside ──

    def path(self, inside: str) -> Path:
        """A file as the box sees it, for this process."""
        return Path(f"/proc/{self.leader}/root{inside}")

    def run(self, *argv: str, stdin: str = "") -> str:
        """A program in the box, to its end; what it printed. It must succeed."""
        ran = self._run(argv, stdin)
        assert ran.returncode == 0, f"{argv} failed with status {ran.returncode}:\n{ran.stdout}{ran.stderr}"
        return ran.stdout

    def try_run(self, *argv: str) -> bool:
        return self._run(argv).returncode == 0

    def _run(self, argv: tuple[str, ...], stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.entering(*argv), input=stdin, capture_output=True, text=True, timeout=180)

    def entering(self, *argv: str) -> list[str]:
        """The command, so that it runs in the box."""
        enter = ["nsenter", "--target", str(self.leader), "--all", "--wdns=/root", "--", "env", "-i"]
        enter += ["PATH=/run/current-system/sw/bin:/usr/sbin:/usr/bin", "HOME=/root", "LC_ALL=C.UTF-8", "TERM=xterm"]
        return [*enter, *argv]

    def wait_for(self, look: Any, what: str, *, timeout_s: float = 60) -> Any:
        """As `hive.wait_for`, and what the box has to say when it is in vain."""
        try:
            return wait_for(look, what, timeout_s=timeout_s)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.last_words()}") from None

    def last_words(self) -> str:
        journal = self._run(("journalctl", "--no-pager", "--lines=60")).stdout if self.leader else ""
        return f"the console:\n{self._console.read_text()[-2000:]}\nthe journal:\n{journal}"

    # ── the machine ──

    def switch(self) -> None:
        """Build the system from /etc/nixos and what lies in /opt now, and run it."""
        self.run("sh", "-c", SWITCH)

    def drop_in(self, text: str) -> None:
        """Lines for the service of the hive, over those of the module; none, and they are the module's again."""
        folder = self.root / "etc/systemd/system/hyperhive.service.d"
        if text:
            folder.mkdir(exist_ok=True)
            (folder / "test.conf").write_text(f"[Service]\n{text}\n")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        self.run("systemctl", "daemon-reload")

    def reboot(self) -> None:
        self.run("systemctl", "--no-block", "reboot")
        self._booted()

    def unit(self, unit: str, *names: str) -> dict[str, str]:
        shown = self.run("systemctl", "show", unit, "--property", ",".join(names))
        return dict(line.split("=", 1) for line in shown.splitlines())

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit", unit)

    # ── the hive ──

    def ask(self, **request: Any) -> dict[str, Any]:
        with Line(self.path("/run/hyperhive/host.sock")) as line:
            return line.ask(**request)

    def read(self, path: str) -> Any:
        """What the dashboard answers to a GET."""
        token = (self.root / "var/lib/hyperhive/operator.token").read_text().strip()
        bearer = f"Authorization: Bearer {token}"
        return json.loads(self.run("curl", "--silent", "--fail", "--header", bearer, f"http://127.0.0.1:7000{path}"))


def commands(below: int) -> dict[psutil.Process, str]:
    """What runs below a process, with its command line."""
    found = {}
    for process in psutil.Process(below).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[process] = shlex.join(process.cmdline())
    return found


class Terminal:
    """A terminal, and a command of the box that a person runs at it."""

    def __init__(self, box: Box, *argv: str) -> None:
        self._box = box
        self._end, other = pty.openpty()
        try:
            command = ["setsid", "--ctty", *box.entering(*argv)]
            self.command = subprocess.Popen(command, stdin=other, stdout=other, stderr=other)
        finally:
            os.close(other)
        os.set_blocking(self._end, False)
        self._shown = ""

    def wait_for(self, words: str) -> str:
        """All that was shown, once these words are in it."""

        def look() -> bool:
            with suppress(BlockingIOError):
                self._shown += os.read(self._end, 65536).decode(errors="replace")
            return words in self._shown

        self._box.wait_for(look, f"{words!r} on the terminal")
        return self._shown

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def hang_up(self) -> None:
        if self._end >= 0:
            os.close(self._end)
            self._end = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whoever is left without a terminal ends; if not, it is ended."""
        self.hang_up()
        processes = [psutil.Process(self.command.pid)] if self.command.poll() is None else []
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                processes += process.children(recursive=True)
        end(processes)
        self.command.wait()


def lay_out(root: Path) -> None:
    for name in HYPERHIVE:
        copy(ROOT / name, root / "opt/hyperhive" / name)
    copy(ROOT / "tests/nix", root / "opt/nixpkgs")
    copy(FAKES / "nixos-container", root / "opt/nixos-container/bin/nixos-container")
    copy(FAKES / "start-container", root / "opt/nixos-container/start-container")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, target in LINKS.items():
        (root / name).symlink_to(target)
    # A link into /usr, which is not there yet when nspawn looks whether this is a system.
    (root / "etc/os-release").unlink()
    (root / "etc/os-release").write_text("ID=debian\n")


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def control_group(box: str) -> Path:
    """One beside those of other systemd-nspawns: each takes what is below its own for itself."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mount = next(Path(fields[4]) for fields in mounts if "cgroup2" in fields[fields.index("-") :])
    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return mount / own.lstrip("/") / f"hyperhive-{box}"


def remove_traces(box: str) -> None:
    """What nspawn leaves behind: control groups and, where /run is no tmpfs, an empty folder."""
    for folder, _, _ in os.walk(control_group(box), topdown=False):
        wait_for(lambda folder=folder: remove_folder(Path(folder)), f"the end of what ran in {folder}")
    remove_folder(Path("/run/systemd/nspawn/propagate") / box)


def remove_folder(path: Path) -> bool:
    """Whether it is gone, which it can be if it is empty."""
    with suppress(OSError):
        path.rmdir()
    return not path.exists()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with Box() as box:
        print("This is a box. It goes when you leave; `hyperhive list` is a beginning.", file=sys.stderr)
        return subprocess.run(box.entering("env", "PS1=box# ", "bash", "--norc")).returncode


if __name__ == "__main__":
    sys.exit(main())
