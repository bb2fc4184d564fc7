"""A stand-in for the parts of systemd that deal with container@ units, on machines where systemd does not run.

    systemd.py systemctl  start|stop|reload|show|daemon-reload …
    systemd.py machinectl show|terminate NAME …
    systemd.py journalctl --unit UNIT …

Each unit that was started has a folder in UNITS, and a process of its own that watches over it. It reads the conf file
as systemd reads an EnvironmentFile, runs `start-container`, waits for READY=1 for a minute, and honours of drop-ins
(in UNIT_DIR, as they were at the last daemon-reload) the line `Restart=no`.
"""

import fcntl
import fnmatch
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
UNITS = Path(os.environ.get("UNITS", "/nonexistent"))
UNIT_DIR = Path(os.environ.get("UNIT_DIR", "/nonexistent"))
ETC = Path(os.environ.get("NIXOS_ETC", "/etc/nixos-containers"))
VAR = Path(os.environ.get("NIXOS_VAR", "/var/lib/nixos-containers"))

PASSED = ("PATH", "UNITS", "UNIT_DIR", "NIXOS_ETC", "NIXOS_VAR", "NIX_STORE_DIR", "NIX_STATE_DIR")
START_S, STOP_S, RESTART_S = 60.0, 20.0, 0.1


def environment_file(text: str) -> dict[str, str]:
    """systemd's `parse_env_file`, state by state."""
    values: dict[str, str] = {}
    state, key, value, spaces = "before key", "", "", 0
    for char in text:
        newline = char in "\n\r"
        if state == "before key":
            if char in "#;":
                state = "comment"
            elif char not in " \t\n\r":
                state, key = "key", char
        elif state == "comment":
            if newline:
                state = "before key"
        elif state == "key":
            if newline:
                state = "before key"
            elif char == "=":
                state, key, value = "before value", key.rstrip(" \t"), ""
            else:
                key += char
        elif state == "before value":
            if newline:
                state, values[key] = "before key", value
            elif char in "'\"":
                state = char
            elif char == "\\":
                state = "value escape"
            elif char not in " \t":
                state, value, spaces = "value", value + char, 0
        elif state == "value":
            if newline:
                state, values[key] = "before key", value[: len(value) - spaces]
            elif char == "\\":
                state, spaces = "value escape", 0
            else:
                value, spaces = value + char, spaces + 1 if char in " \t" else 0
        elif state == "value escape":
            state, value, spaces = "value", value if newline else value + char, 0
        elif state == "'":
            if char == "'":
                state = "before value"
            else:
                value += char
        elif state == '"':
            if char == '"':
                state = "before value"
            elif char == "\\":
                state = "quoted escape"
            else:
                value += char
        elif state == "quoted escape":
            state = '"'
            value += char if char in '"\\`$' else "" if char == "\n" else "\\" + char
    if state not in ("before key", "comment", "key"):  # the last line has no end, or a quote none
        values[key] = value[: len(value) - spaces] if state == "value" else value
    return {key: value for key, value in values.items() if key.isidentifier() and key.isascii()}


# ── what is known of a unit ──


def folder_of(unit: str) -> Path:
    return UNITS / (unit if unit.endswith(".service") else f"{unit}.service")


def instance(folder: Path) -> str:
    return folder.name.removeprefix("container@").removesuffix(".service")


def lives(pid: int) -> bool:
    """One that has ended may wait for seconds to be reaped by a first process that is in no hurry."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def look(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / "state").read_text())
    except FileNotFoundError:
        return {"ActiveState": "inactive", "SubState": "dead", "Result": "success", "MainPID": 0, "watcher": 0}
    if state["ActiveState"] not in ("inactive", "failed") and not lives(state["watcher"]):
        state |= {"ActiveState": "failed", "SubState": "failed", "Result": "signal", "MainPID": 0}
    return state


def note(folder: Path, active: str, sub: str, result: str = "success", pid: int = 0) -> None:
    state = {"ActiveState": active, "SubState": sub, "Result": result, "MainPID": pid, "watcher": os.getpid()}
    new = folder / "state.new"
    new.write_text(json.dumps(state))
    new.replace(folder / "state")


@contextmanager
def job(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "job").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ── systemctl ──


def start(unit: str) -> int:
    folder = folder_of(unit)
    with job(folder):
        if look(folder)["ActiveState"] == "active":
            return 0
        watcher = subprocess.Popen(
            [sys.executable, __file__, "watch", str(folder)],
            env={key: os.environ[key] for key in PASSED if key in os.environ},  # nothing of the caller's
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(folder / "watch.log").open("ab"),
            cwd="/", start_new_session=True,
        )  # fmt: skip
        while lives(watcher.pid) and look(folder)["watcher"] != watcher.pid:
            time.sleep(0.01)
        while (state := look(folder))["ActiveState"] == "activating":
            time.sleep(0.01)
    if state["ActiveState"] == "active":
        return 0
    print(f'Job for {folder.name} failed. See "journalctl -xeu {folder.name}" for details.', file=sys.stderr)
    return 1


def stop(unit: str) -> int:
    folder = folder_of(unit)
    with job(folder):
        state = look(folder)
        if state["ActiveState"] not in ("inactive", "failed"):
            os.kill(state["watcher"], signal.SIGTERM)
            while lives(state["watcher"]):
                time.sleep(0.01)
    return 0


def show(patterns: list[str], properties: list[str]) -> int:
    """Of a pattern only what is loaded is shown: what runs, and what has failed."""
    blocks = []
    for pattern in patterns:
        wanted = folder_of(pattern)
        found = sorted(UNITS.glob("container@*")) if set(pattern) & set("*?[") else [wanted]
        for folder in found:
            state = look(folder) | {"Id": folder.name}
            if folder != wanted and (state["ActiveState"] == "inactive" or not fnmatch.fnmatch(folder.name, pattern)):
                continue
            blocks.append("".join(f"{key}={state[key]}\n" for key in properties or state if key in state))
    print("\n".join(blocks), end="")
    return 0


def daemon_reload() -> int:
    for path in UNIT_DIR.glob("container@*.service.d/*.conf"):
        folder = UNITS / path.parent.name.removesuffix(".d")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "drop-in")
    return 0


def systemctl(verb: str, *rest: str) -> int:
    if verb == "daemon-reload":
        return daemon_reload()
    if verb == "show":
        options = list(rest)
        properties = options[options.index("-p") + 1].split(",") if "-p" in options else []
        return show([word for word in options if word.startswith("container@")], properties)
    if verb == "reload":
        folder = folder_of(rest[0])
        (folder / "reloaded").touch()
        return 0 if look(folder)["ActiveState"] == "active" else 1
    return {"start": start, "stop": stop}[verb](rest[0])


# ── the process that watches over a unit ──


class Watcher:
    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, instance(folder)
        self.main: subprocess.Popen[bytes] | None = None
        self.stopping = False
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, *_: object) -> None:
        self.stopping = True
        if self.main is not None and self.main.poll() is None:
            self.main.terminate()

    def run(self) -> None:
        drop_in = self.folder / "drop-in"
        restart = not (drop_in.exists() and "Restart=no" in drop_in.read_text().split())
        while True:
            note(self.folder, "activating", "start")
            result = self.run_once()
            if self.stopping:
                result = "success" if result != "timeout" else result
            if result == "success" or self.stopping or not restart:
                break
            note(self.folder, "activating", "auto-restart", result)
            time.sleep(RESTART_S)
        failed = result != "success"
        note(self.folder, "failed" if failed else "inactive", "failed" if failed else "dead", result)

    def run_once(self) -> str:
        path = self.folder / "notify"
        path.unlink(missing_ok=True)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
            (self.folder / "console.log").open("ab") as log,
        ):
            notify.bind(str(path))
            notify.settimeout(0.05)
            self.main = subprocess.Popen(
                [str(HERE / "start-container")], env=self.environment(path),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            try:
                if not self.await_ready(notify):
                    return "timeout"
                if self.main.poll() is None:
                    note(self.folder, "active", "running", pid=self.main.pid)
                self.await_end()
            finally:
                path.unlink(missing_ok=True)
                with suppress(ProcessLookupError):
                    os.killpg(self.main.pid, signal.SIGKILL)
                self.main.wait()
        status = self.main.returncode
        return "success" if status == 0 else "exit-code" if status > 0 else "signal"

    def environment(self, notify: Path) -> dict[str, str]:
        conf = ETC / f"{self.name}.conf"
        values = environment_file(conf.read_bytes().decode()) if conf.exists() else {}
        passed = {key: os.environ[key] for key in PASSED if key in os.environ}
        own = {"root": str(VAR / self.name), "INSTANCE": self.name, "NOTIFY_SOCKET": str(notify)}
        return {**passed, "NSPAWN_FLAGS": "--register=no", **own, **values}

    def await_ready(self, notify: socket.socket) -> bool:
        assert self.main is not None
        deadline = time.monotonic() + START_S
        while self.main.poll() is None:
            with suppress(TimeoutError):
                if b"READY=1" in notify.recv(4096):
                    return True
            if time.monotonic() > deadline:
                return False
        return True  # it ended, which is for others to judge

    def await_end(self) -> None:
        assert self.main is not None
        deadline = None
        while self.main.poll() is None:
            time.sleep(0.02)
            if self.stopping:
                deadline = deadline or time.monotonic() + STOP_S
                if time.monotonic() > deadline:
                    return


# ── machinectl and journalctl ──


def leader(name: str) -> int:
    pid = look(folder_of(f"container@{name}"))["MainPID"]
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if pid else []
    for child in map(int, children):
        numbers = Path(f"/proc/{child}/status").read_text().partition("NSpid:")[2].splitlines()[0].split()
        if len(numbers) > 1:  # one here, and one in its own namespace
            return child
    return 0


def machinectl(verb: str, name: str, *_: str) -> int:
    pid = leader(name)
    if not pid:
        print(f"Could not get machine: No machine '{name}' known", file=sys.stderr)
        return 1
    if verb == "show":
        print(f"Leader={pid}")
    else:
        os.kill(pid, signal.SIGKILL)
    return 0


def journalctl(*options: str) -> int:
    given = dict(word.removeprefix("--").split("=", 1) for word in options if word.startswith("--") and "=" in word)
    log = folder_of(options[options.index("--unit") + 1]) / "console.log"
    data = log.read_bytes() if log.exists() else b""
    after = given.get("after-cursor", "i=0")
    if not after.startswith("i=") or not after[2:].isdigit():
        print(f"Failed to seek to cursor: Invalid argument: {after}", file=sys.stderr)
        return 1
    lines = data[int(after[2:]) :].decode(errors="replace").splitlines()
    for line in lines[-int(given["lines"]) :]:
        print(line)
    if lines:
        print(f"-- cursor: i={len(data)}")
    return 0


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "watch":
        Watcher(Path(words[0])).run()
        sys.exit(0)
    sys.exit({"systemctl": systemctl, "machinectl": machinectl, "journalctl": journalctl}[command](*words))
