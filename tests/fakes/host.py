"""A small host for one agent: the agent socket's wire format, leases and all, steered by a test.

Mail is kept as the real host keeps it: a lease belongs to its connection, what a closed connection had leased goes
back, and is to blame unless it is the host that goes; an acknowledged message never comes again. Everything that the
agent reports or asks is recorded.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Host:
    def __init__(self, path: Path, page_port: int, **settings: Any) -> None:
        self.path, self.page_port = path, page_port
        self.settings = {"warm_s": 60, "stall_s": 60, **settings}
        self.manager = False
        self.model: str | None = None
        self.paused = False
        self.mail: dict[int, Json] = {}  # id -> {"message", "state", "connection", "blamed"}
        self.controls: deque[Json] = deque()
        self.calls: list[Json] = []  # every request but lease, as it came
        self.events: dict[int, Json] = {}
        self.partials: list[str] = []
        self.states: list[Json] = []
        self.usages: dict[str, Json] = {}
        self.answers: dict[str, Callable[[Json], Json]] = {}  # a verb's own answer; {"ok": False, ...} refuses
        self.lose_acks = self.leaving = False
        self._news = threading.Condition()
        self._last_id = 0
        self._connections: set[Connection] = set()
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []

    # Life

    def start(self) -> None:
        self.leaving = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(32)
        self._run(lambda listener=self._listener: self._accept(listener))

    def stop(self) -> None:
        """As when the daemon is killed: every connection breaks, every lease goes back."""
        self.leaving = True
        if self._listener:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._threads[0].join()  # that accepts: now all connections are known
            self.path.unlink(missing_ok=True)
        for connection in list(self._connections):
            connection.close()
        for thread in self._threads:
            thread.join()

    def _run(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            connection = Connection(self, peer)
            self._connections.add(connection)
            self._run(connection.read)
            self._run(connection.serve)

    # For tests

    def put(self, body: str, sender: str = "operator", **more: Any) -> int:
        with self._news:
            self._last_id += 1
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            message = {
                "id": self._last_id,
                "from": sender,
                "to": "alice",
                "body": body,
                "at": at,
                "attempts": 0,
                **more,
            }
            self.mail[self._last_id] = {"message": message, "state": "queued", "connection": None, "blamed": 0}
            self._news.notify_all()
            return self._last_id

    def control(self, do: str, **more: Any) -> None:
        with self._news:
            self.controls.append({"do": do, **more})
            self._news.notify_all()

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
        with self._news:
            if not self._news.wait_for(condition, timeout_s):
                raise AssertionError(f"waited {timeout_s} s for {what}; calls: {self.calls[-5:]}; {self.kinds()[-30:]}")
            return condition()

    def wait_acked(self, *ids: int) -> None:
        self.wait(lambda: all(self.mail[one]["state"] == "acked" for one in ids), f"{ids} to be acknowledged")

    def wait_state(self, state: str) -> Json:
        self.wait(lambda: self.states and self.states[-1]["state"] == state, f"state {state}")
        return self.states[-1]

    def wait_event(self, kind: str, count: int = 1, **data: Any) -> Json:
        found = self.wait(lambda: len(self.of(kind, **data)) >= count, f"{count} events {kind} {data}")
        assert found
        return self.of(kind, **data)[count - 1]

    def wait_text(self, part: str) -> None:
        """Until the agent has said something with this in it."""
        self.wait(lambda: any(part in event["text"] for event in self.of("text")), f"the text {part!r}")

    def of(self, kind: str, **data: Any) -> list[Json]:
        events = [self.events[key]["data"] for key in sorted(self.events) if self.events[key]["kind"] == kind]
        return [event for event in events if all(event.get(key) == value for key, value in data.items())]

    def kinds(self) -> list[str]:
        return [self.events[key]["kind"] for key in sorted(self.events)]

    def called(self, verb: str) -> list[Json]:
        return [call for call in self.calls if call["cmd"] == verb]

    # Verbs

    def handle(self, connection: Connection, request: Json) -> Json | None:
        verb = request["cmd"]
        if verb == "lease":
            return connection.lease(request)
        with self._news:
            self.calls.append(request)
            self._news.notify_all()
            if verb in self.answers:
                return self.answers[verb](request)
            verb_method = getattr(self, f"do_{verb}", None)
            return verb_method(connection, request) if verb_method else {}

    def do_hello(self, connection: Connection, request: Json) -> Json:
        page = {"host": "127.0.0.1", "port": self.page_port, "hosts": ["hive.example"]}
        agents = [{"name": "manager", "description": "runs the swarm"}, {"name": "alice"}]
        more = {"model": self.model} if self.model else {}
        about = {"name": "alice", "manager": self.manager, "paused": self.paused, "manager_name": "manager"}
        return {
            **about,
            "page": page,
            "settings": self.settings,
            "agents": agents,
            "last_event": max(self.events, default=0),
            **more,
        }

    def do_ack(self, connection: Connection, request: Json) -> Json | None:
        if self.lose_acks:
            self.leaving = True  # it is the host that goes: nobody is to blame
            connection.close()
            return None
        mine = [self.mail[one] for one in request["ids"] if self.mail[one]["connection"] is connection]
        for entry in mine:
            entry.update(state="acked", connection=None)
        return {"acked": len(mine)}

    def do_nack(self, connection: Connection, request: Json) -> Json:
        for one in request["ids"]:
            self.give_back(self.mail[one], blame=not request.get("blameless"))
        return {"returned": len(request["ids"])}

    def give_back(self, entry: Json, *, blame: bool) -> None:
        entry["message"]["redelivered"] = True
        entry["blamed"] += blame
        entry["message"]["attempts"] -= not blame
        entry.update(state="dead" if entry["blamed"] >= 5 else "queued", connection=None)

    def do_send(self, connection: Connection, request: Json) -> Json:
        return {"id": 1000 + len(self.called("send"))}

    def do_ask(self, connection: Connection, request: Json) -> Json:
        return {"id": 1}

    def do_open_threads(self, connection: Connection, request: Json) -> Json:
        return {"asked": [], "to_answer": [], "reminders": []}

    def do_list_agents(self, connection: Connection, request: Json) -> Json:
        return {"agents": [{"name": "manager", "state": "idle"}]}

    def do_report(self, connection: Connection, request: Json) -> Json:
        for event in request.get("events", []):
            if event["id"]:
                self.events[event["id"]] = event
            elif event["kind"] == "partial":
                self.partials.append(event["data"]["text"])
        if "state" in request:
            self.states.append(request["state"])
        if "usage" in request:
            self.usages[request["usage"]["turn"]] = request["usage"]
        return {}


class Connection:
    def __init__(self, host: Host, peer: socket.socket) -> None:
        self.host, self.peer = host, peer
        self.requests: deque[Json | None] = deque()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.peer.shutdown(socket.SHUT_RDWR)

    def read(self) -> None:
        with contextlib.suppress(OSError), self.peer.makefile("rb") as lines:
            for line in lines:
                self._push(json.loads(line))
        self._push(None)

    def _push(self, request: Json | None) -> None:
        with self.host._news:
            self.requests.append(request)
            self.host._news.notify_all()

    def serve(self) -> None:
        while (request := self._next()) is not None:
            answer = self.host.handle(self, request)
            if answer is None:
                continue
            with contextlib.suppress(OSError):
                self.peer.sendall(json.dumps({"version": 1, "ok": True, **answer}).encode() + b"\n")
        with self.host._news:
            for entry in self.host.mail.values():
                if entry["connection"] is self:
                    self.host.give_back(entry, blame=not self.host.leaving)
            self.host._connections.discard(self)
            self.peer.close()
            self.host._news.notify_all()

    def _next(self) -> Json | None:
        with self.host._news:
            self.host._news.wait_for(lambda: self.requests)
            return self.requests.popleft()

    def lease(self, request: Json) -> Json:
        with self.host._news:
            self.host._news.wait_for(
                lambda: self._queued() or self.host.controls or self.requests, request.get("wait_s", 30)
            )
            batch = [] if self.requests else self._queued()[: request.get("max", 16)]
            control = [] if self.requests else [self.host.controls.popleft() for _ in range(len(self.host.controls))]
            for entry in batch:
                entry.update(state="leased", connection=self)
                entry["message"]["attempts"] += 1
            return {"messages": [entry["message"] for entry in batch], "control": control}

    def _queued(self) -> list[Json]:
        return [entry for entry in self.host.mail.values() if entry["state"] == "queued" and not self.host.paused]
