"""A harness as a process, beside a `Host`: what the tests of the harness share."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from fakes.host import Host
from hive import ROOT, free_ports

HARNESS = [sys.executable, str(ROOT / "harness.py")]
TOKEN = "the-page-token"
GO = "until test -e go; do sleep 0.1; done"  # a tool that ends when this file is in the agent's folder


def rehearse(*steps: Any) -> str:
    """A message body that makes the rehearsal do these steps."""
    return "rehearse: " + json.dumps(steps)


class Harness:
    def __init__(self, folder: Path, *, claude: str = shlex.join([*HARNESS, "rehearsal"]), **settings: Any) -> None:
        self.folder, self.port = folder, free_ports()
        self.host = Host(folder / "hive.sock", self.port, **settings)
        self.state, self.shared, self.log = folder / "state", folder / "shared", folder / "harness.log"
        for path in (self.state, self.shared, folder / "home"):
            path.mkdir(exist_ok=True)
        (folder / "ui-token").write_text(TOKEN)
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder / "home"),
            "CLAUDE_CONFIG_DIR": str(folder / "claude"),
            "HYPERHIVE_TEST_MARK": os.environ["HYPERHIVE_TEST_MARK"],
            "HYPERHIVE_SOCKET": str(self.host.path),
            "HYPERHIVE_STATE": str(self.state),
            "HYPERHIVE_SHARED": str(self.shared),
            "HYPERHIVE_OPERATOR": str(folder / "operator"),
            "HYPERHIVE_CLAUDE": claude,
            "HYPERHIVE_REHEARSAL": "1",
            "HYPERHIVE_REHEARSAL_SPEED": "0",
            "HYPERHIVE_BACKOFF_S": "0.1",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Harness:
        with self.log.open("ab") as log:
            argv = [*HARNESS, "run"]
            self.process = subprocess.Popen(argv, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self

    def stop(self) -> int:
        """SIGTERM; its exit status, which must come within twenty seconds."""
        return self.end(signal.SIGTERM)

    def end(self, how: signal.Signals) -> int:
        assert self.process
        process, self.process = self.process, None
        process.send_signal(how)
        try:
            return process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def __enter__(self) -> Harness:
        self.host.start()
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.stop()
        self.host.stop()

    def claude_pid(self) -> int:
        """The pid of the youngest Claude, as the harness noted it."""
        notes = [event["text"] for event in self.host.of("note") if "(process " in event["text"]]
        return int(notes[-1].partition("(process ")[2].partition(")")[0])

    def turn(self, *steps: Any, sender: str = "operator") -> int:
        """Mail that makes one turn, and wait until it is done and reported."""
        before = len(self.host.of("turn_end", outcome="done"))
        message = self.host.put(rehearse(*steps), sender)
        self.host.wait_acked(message)
        self.host.wait_event("turn_end", before + 1, outcome="done")
        return message

    def tool(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """A tool called by Claude in a turn: the event of its result."""
        self.turn({"tool": name, "input": arguments})
        return self.host.of("tool_result")[-1]

    def http(self, method: str, path: str, body: Any = None, *, token: str | None = TOKEN, **headers: str) -> Any:
        """(status, headers, parsed body or text) of one request to the page."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            more["Authorization"] = f"Bearer {token}"
        content = None if body is None else json.dumps(body) if not isinstance(body, str) else body
        if content is not None:
            more.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, content, more)
            answer = connection.getresponse()
            text = answer.read().decode()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, answer.headers, json.loads(text) if is_json else text
        finally:
            connection.close()
