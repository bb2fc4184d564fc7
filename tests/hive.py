"""The real daemon as a process, and clients for each of its doors, for tests of any part.

    with Hive(folder) as hive:
        hive.ask(cmd="list")                                   # host.sock: connect, one line, one answer
        hive.api("GET", "/api/state").body["agents"]           # the dashboard's JSON, with the operator's token
        hive.cli("send", "alice", "hello")                     # the command line
        with hive.agent("alice") as alice:                     # an agent's socket, which stays open
            alice.ask("lease", wait_s=0)

A test that wants no more than a running hive takes the fixture `hive`. A hive outlives `stop()` and `kill()`:
`start()` runs the daemon again on the same folder.
"""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import contract
import psutil

ROOT = Path(__file__).resolve().parent.parent
HYPERHIVE = [sys.executable, str(ROOT / "hyperhive.py")]
REHEARSAL = f"'{sys.executable}' '{ROOT / 'harness.py'}' rehearsal"
AGENT_PORTS = 900  # an agent's port is agent_port_base plus a number below this, taken from its name


def wait_for(look: Callable[[], Any], what: str, *, timeout_s: float = 60) -> Any:
    """The first true answer of `look`, which is asked twenty times a second."""
    deadline = time.monotonic() + timeout_s
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.05)
    return seen


def holds_port(connection: Any) -> bool:
    """One that waits out its time does not: all that listens here reuses addresses."""
    return bool(connection.status != psutil.CONN_TIME_WAIT)


def free_ports(count: int = 1) -> int:
    """The first of `count` neighbouring ports that nothing uses.

    They lie below the range from which the kernel gives ports to outgoing connections, and are drawn by chance, so that
    two runs on one machine seldom meet. Each process of one run has a share of its own: a port may be bound much later.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = 20_000 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        used = {connection.laddr.port for connection in psutil.net_connections("tcp") if holds_port(connection)}
        first = random.randrange(12_000 + worker * share, 12_000 + (worker + 1) * share - count)
        if used.isdisjoint(range(first, first + count)):
            return first


def listens(port: int) -> bool:
    """Whether somebody takes connections there: an agent's page comes up after its harness's hello."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except ConnectionRefusedError:
        return False
    return True


def processes_of(folder: Path, program: str = "") -> list[psutil.Process]:
    """The living processes, children or not, whose environment names `folder`: a daemon's and its agents' do.

    A folder's name is a test's own, so this finds what was started for the test and has left its parent.
    """
    others = (process for process in psutil.process_iter() if process.pid != os.getpid())
    return [process for process in others if mentions(process, folder) and (not program or runs(process, program))]


def originals(folder: Path, is_one: Callable[[psutil.Process], Any]) -> list[psutil.Process]:
    """Those of `processes_of(folder)` that `is_one` names.

    A child of one is still its copy for a moment, before it becomes another program: it does not count.
    """
    parents = {}
    for process in processes_of(folder):
        with suppress(psutil.NoSuchProcess):
            if is_one(process):
                parents[process.pid] = process, process.ppid()
    return [process for process, parent in parents.values() if parent not in parents]


def runs(process: psutil.Process, program: str) -> bool:
    try:
        return process.name() == program
    except psutil.NoSuchProcess:
        return False


def mentions(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(str(folder) in value for value in process.environ().values()) and is_alive(process)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def is_alive(process: psutil.Process) -> bool:
    """One that has ended and only waits to be reaped is not: in a container, pid 1 can take seconds to do that."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(processes: list[psutil.Process]) -> None:
    """Kill these and wait for it. psutil knows a process by pid and start, so a pid that was reused is safe."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait_for(lambda: not any(is_alive(process) for process in processes), f"the end of {processes}")


def toml(settings: dict[str, Any]) -> str:
    """TOML for plain values and one level of tables, for which JSON's notation of a value is TOML's as well."""
    tables = {name: table for name, table in settings.items() if isinstance(table, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if key not in tables]
    return "\n".join([*lines, *(f"\n[{name}]\n{toml(table)}" for name, table in tables.items()), ""])


class Line:
    """One connection to a unix socket on which JSON objects go both ways, one a line."""

    def __init__(self, path: Path, *, timeout_s: float = 30) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout_s)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self.file = self.socket.makefile("rwb")

    def write(self, line: bytes) -> None:
        self.file.write(line)
        self.file.flush()

    def read(self) -> dict[str, Any] | None:
        """The next answer; None when the other end has closed."""
        line = self.file.readline()
        return json.loads(line) if line else None

    def ask(self, cmd: str, **fields: Any) -> dict[str, Any]:
        self.write(json.dumps({"cmd": cmd, **fields}).encode() + b"\n")
        answer = self.read()
        assert answer is not None, f"the connection was closed instead of an answer to {cmd}"
        return answer

    def close(self) -> None:
        with suppress(BrokenPipeError):  # what was not sent yet, to a daemon that has hung up
            self.file.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: Any  # parsed where it is JSON, else text


class Hive:
    """One hive below `folder`, with `process` containers and Claude played by the rehearsal.

    `settings` are those of the config file; a table is a dict: `Hive(folder, limits={"unread": 3})`.
    The manager is not started by itself, so that a test has only the agents it asks for.
    """

    containers = "process"
    environment: dict[str, str] = {}  # noqa: RUF012 - of the daemon, over that of the test

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder / "hive"
        self.folder.mkdir(parents=True)
        self.state, self.run = self.folder / "state", self.folder / "run"
        self.port = free_ports(AGENT_PORTS + 2)  # and no agent's page has that of the dashboard or the manager
        self.config = self.folder / "config.toml"
        self.configure(
            claude=REHEARSAL,
            rehearsal=True,
            manager_autostart=False,
            manager_port=self.port + 1,
            agent_port_base=self.port + 2,
            **settings,
        )
        self.log = self.folder / "daemon.log"
        self.daemon: subprocess.Popen[bytes] | None = None

    def configure(self, **settings: Any) -> None:
        """Write the config file, which the next `start()` reads; what is not named keeps its value."""
        self.settings = {**getattr(self, "settings", {}), **settings}
        self.config.write_text(toml(self.settings))

    # ── life ──

    def start(self, *, ready: bool = True) -> Self:
        """Run the daemon, and unless told otherwise wait until it is `ready`."""
        assert self.daemon is None, "this hive runs already"
        options = ["--dir", self.folder, "--port", str(self.port), "--config", self.config]
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                [*HYPERHIVE, "serve", *options, "--containers", self.containers],
                env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            if ready:
                wait_for(self.is_ready, "the daemon to answer /healthz")
        except BaseException:
            self.kill()
            self.close()
            raise
        return self

    def is_ready(self) -> bool:
        if self.daemon is None or self.daemon.poll() is not None:
            raise RuntimeError(f"the daemon ended with status {self.daemon and self.daemon.returncode}")
        try:
            return self.api("GET", "/healthz", token=None).status == 200
        except OSError:
            return False

    def stop(self) -> None:
        """SIGTERM: a clean stop ends with status 0."""
        daemon = self._gone()
        daemon.send_signal(signal.SIGTERM)
        try:
            status = daemon.wait(timeout=30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
            raise
        assert status == 0, f"the daemon ended with status {status}; its log:\n{self.log.read_text()[-4000:]}"

    def kill(self) -> None:
        """SIGKILL: the daemon alone, as a crash would; its agents go on as they may."""
        daemon = self._gone()
        daemon.kill()
        daemon.wait()

    def _gone(self) -> subprocess.Popen[bytes]:
        assert self.daemon is not None, "this hive does not run"
        daemon, self.daemon = self.daemon, None
        return daemon

    def close(self) -> None:
        """End of the test: a clean stop, or, where the daemon was killed, an end to what it had no chance to end."""
        if self.daemon is not None:
            self.stop()
        else:
            end(processes_of(self.folder))
            for path in self.run.rglob("*.sock"):
                path.unlink()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── doors ──

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return (self.state / "operator.token").read_text().strip()

    def api(
        self, method: str, path: str, body: Any = None, *, token: str | None = "", headers: dict[str, str] | None = None
    ) -> Answer:
        """One HTTP request, with the operator's token unless another or None is given. Bytes go as they are."""
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        send = {} if body is None else {"Content-Type": kind}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        if token is not None:
            send["Authorization"] = f"Bearer {token or self.token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, data, {**send, **(headers or {})})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        content_type = response.headers.get_content_type()
        found = json.loads(text) if content_type == "application/json" and method != "HEAD" else text
        contract.check(method, path, response.status, content_type, found)
        return Answer(response.status, response.headers, found)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request on host.sock: `hive.ask(cmd="pending")`."""
        with Line(self.run / "host.sock") as line:
            return line.ask(**request)

    def spawn(self, *names: str, running: bool = False) -> Self:
        """Deploy these agents; unless `running`, stop them then: a test can speak at their sockets in their place."""
        answers = [self.ask(cmd="spawn", name=name) for name in names]
        assert all(answer["ok"] for answer in answers), answers
        deploys = [answer["deploy"] for answer in answers]
        patience_s = 30 + 10 * len(names)
        wait_for(lambda: all(self.phase(one) == "deployed" for one in deploys), f"{names}", timeout_s=patience_s)
        if not running:
            assert self.ask(cmd="stop", scope={"agent_names": names})["ok"]
        return self

    def phase(self, deploy: int) -> str:
        phase: str = self.ask(cmd="deploys", id=deploy)["deploys"][0]["phase"]
        assert phase != "failed", self.ask(cmd="deploys", id=deploy)
        return phase

    def agent(self, name: str) -> Line:
        """A connection to an agent's socket, as that agent."""
        return Line(self.run / "agents" / name / "hive.sock")

    def cli(self, *args: str, stdin: str = "", timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*HYPERHIVE, "--dir", str(self.folder), *args],
            input=stdin, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
