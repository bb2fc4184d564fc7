"""The wire between the two programs: what one writes, the other reads, in both directions."""

import ast
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hive import REHEARSAL, ROOT, Hive, Line, wait_for
from hypothesis import given
from hypothesis import strategies as st

import harness
import hyperhive

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
OBJECTS = st.dictionaries(
    TEXTS,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
        max_leaves=10,
    ),
    max_size=5,
)


@given(OBJECTS)
def test_a_line_of_one_is_a_line_of_the_other(value: dict[str, Any]) -> None:
    there, back = hyperhive.encode_line(value), harness.encode(value) + b"\n"
    assert there.count(b"\n") == back.count(b"\n") == 1
    assert harness.parse_json(there, "it").value == value == hyperhive.parse_object(back)


@pytest.mark.parametrize("code", hyperhive.STATUS_OF)
@pytest.mark.parametrize("hint", ["", "Try this."])
def test_a_refusal_arrives_as_it_was_meant(code: str, hint: str) -> None:
    line = hyperhive.encode_line(hyperhive.failed_answer(hyperhive.Refused(code, "It can't be done.", hint)))
    with pytest.raises(harness.Refused) as refused:
        harness.accepted(harness.parse_json(line, "the answer"))
    assert (refused.value.code, refused.value.message, refused.value.hint) == (code, "It can't be done.", hint or None)


def test_the_states_are_the_same_and_every_control_item_is_understood() -> None:
    assert {*harness.State, "offline"} == {*hyperhive.HarnessState}
    (handler,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "harness.py").read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "_on_control"
    )
    handled = {ast.literal_eval(node.value) for node in ast.walk(handler) if isinstance(node, ast.MatchValue)}
    assert handled >= {*hyperhive.Control}


def test_the_table_of_the_wire_has_every_verb() -> None:
    """A verb stands at the beginning of an agent's line; before the fields or the arrow in one of the operator's."""
    headings = r"(?m)^# (?:Agent sockets|and of the manager|host\.sock).*:\n"
    _, agents, manager, host = re.split(headings, (ROOT / "hyperhive.py").read_text())
    named = [re.findall(r"(?m)^#   ((?:\w+, )*\w+)", text) for text in (agents, manager)]
    lines = host.split("\n\n")[0].replace("#   ", "").splitlines()
    named += [[re.split(" [{→]", item)[0] for line in lines for item in line.split(" · ")]]
    tables = (hyperhive.AGENT_VERBS, hyperhive.MANAGER_VERBS, hyperhive.HOST_VERBS)
    assert [sorted(", ".join(found).split(", ")) for found in named] == [sorted(table) for table in tables]


# ── a real harness, a real daemon, and an ear between them ──


class Ear(threading.Thread):
    """Hands lines on between an agent's harness and the daemon, and keeps them."""

    def __init__(self, here: Path, there: Path) -> None:
        super().__init__(name="ear")
        self.here, self.there = here, there
        self.requests: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        self.partial: dict[socket.socket, bytes] = {}
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(here))
        self.listener.listen()
        self.closed, self.wake = socket.socketpair()
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.selector.register(self.closed, selectors.EVENT_READ, None)

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.closed:
                    return
                if key.fileobj is self.listener:
                    self.connect()
                elif key.fileobj.fileno() >= 0:  # type: ignore[union-attr]  # not closed just now, with its other end
                    self.pass_on(key.fileobj, *key.data)  # type: ignore[arg-type]

    def connect(self) -> None:
        near, _ = self.listener.accept()
        far = socket.socket(socket.AF_UNIX)
        far.connect(str(self.there))
        self.selector.register(near, selectors.EVENT_READ, (far, self.requests))
        self.selector.register(far, selectors.EVENT_READ, (near, self.answers))

    def pass_on(self, source: socket.socket, target: socket.socket, heard: list[dict[str, Any]]) -> None:
        data = b""
        with suppress(ConnectionResetError):
            data = source.recv(1 << 20)
        if not data:
            for end in (source, target):
                self.selector.unregister(end)
                end.close()
            return
        *lines, self.partial[source] = (self.partial.get(source, b"") + data).split(b"\n")
        heard += map(json.loads, lines)
        with suppress(BrokenPipeError):
            target.sendall(data)

    def close(self) -> None:
        self.wake.close()
        self.join()
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self.selector.close()
        self.here.unlink()


@contextmanager
def listened_to(hive: Hive, name: str, folder: Path) -> Iterator[Ear]:
    """A harness for `name`, as the daemon would start it, but with the ear's socket."""
    door = folder / "door"
    door.mkdir()
    shutil.copy(hive.run / "agents" / name / "ui-token", door)
    environment = {
        **os.environ,
        "HYPERHIVE_SOCKET": str(door / "hive.sock"),
        "HYPERHIVE_STATE": str(folder / "state"),
        "HYPERHIVE_SHARED": str(hive.state / "shared"),
        "HYPERHIVE_CLAUDE": REHEARSAL,
        "HYPERHIVE_REHEARSAL_SPEED": "0",
        "CLAUDE_CONFIG_DIR": str(folder / "claude"),
    }
    with (
        closing(Ear(door / "hive.sock", hive.run / "agents" / name / "hive.sock")) as ear,
        (folder / "it.log").open("w") as log,
    ):
        ear.start()
        with subprocess.Popen(
            [sys.executable, str(ROOT / "harness.py"), "run"], env=environment, stderr=log
        ) as process:
            try:
                yield ear
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=15) == 0


def rehearse(*steps: Any) -> str:
    return "rehearse: " + json.dumps(steps)


def all_tools(question: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each tool with all its fields, right ones; a tool that needs what another made comes after it."""
    yield "set_status", {"text": "trying everything"}
    yield "whoami", {}
    yield "list_agents", {}
    yield "inbox", {"max": 5}
    yield "send", {"to": "operator", "body": "hello"}
    yield "send", {"to": "*", "body": "hello all"}
    yield "ask", {"question": "Which?", "options": ["a", "b"], "multi": True, "to": "operator", "ttl_s": 60}
    yield "answer", {"id": question, "text": "this"}
    yield "remind", {"body": "look", "delay_s": 3600}
    yield "remind", {"body": "look", "at": "2030-01-31T08:00:00Z"}
    yield "cancel", {"reminder": 1}
    yield "cancel", {"question": 1}
    yield "open_threads", {}
    yield "checkout_config", {"agent": "alice"}
    change = 'cd "$HYPERHIVE_STATE/configs/alice" && echo "{ }" > agent.nix && git commit --quiet --all --message=less'
    yield "Bash", {"command": change}
    yield "request_apply_commit", {"agent": "alice", "sha": "HEAD", "description": "less"}
    yield "request_spawn", {"name": "carol", "description": "helps", "config": "{ }"}
    yield "request_update_inputs", {"agent": "alice", "description": "newer"}
    schedule = {"to": "alice", "body": "look", "first": "2030-01-31T08:00:00Z", "every_s": 60, "description": "why"}
    yield "request_schedule", schedule
    yield "list_approvals", {"status": "pending"}
    yield "cancel_request", {"id": 1}
    yield "start_agent", {"name": "bob"}
    yield "restart_agent", {"name": "bob"}
    yield "stop_agent", {"name": "bob"}
    yield "get_logs", {"name": "bob", "lines": 5}
    yield "request_next_turn", {"note": "and once more"}


def write_one_of_each_kind(hive: Hive) -> set[str]:
    """Mail for the manager of every kind that the daemon sends to an agent."""
    with hive.agent("manager") as manager, hive.agent("alice") as alice:
        request = [manager.ask("request_spawn", name=name, description="helps")["id"] for name in ("dan", "eve")]
        hive.ask(cmd="deny", id=request[0], note="not now")
        hive.ask(cmd="approve", id=request[1])
        alice.ask("ask", question="Which?", options=["a"], multi=True, to="manager")
        asked = [manager.ask("ask", question="Which?")["id"] for _ in range(2)]
        hive.ask(cmd="answer", id=asked[0], text="this")
        manager.ask("ask", question="Which?", ttl_s=1)
        hive.api("POST", f"/api/questions/{asked[1]}/cancel", {})
        manager.ask("remind", body="look", delay_s=0)
        hive.api("POST", "/api/schedules", {"to": "manager", "body": "look", "first": "2020-01-31T08:00:00Z"})
        alice.ask("send", to="*", body="to all")
        for state in ("needs_login", "idle", "rate_limited", "idle"):
            alice.ask("report", state={"state": state, "reason": "because", "until": "2030-01-31T08:00:00Z"})
        crash(hive, alice, "eve")
        first = hive.ask(cmd="send", to="manager", body="hello")["id"]
        hive.ask(cmd="send", to="manager", body="hello again", in_reply_to=first)
    kinds = {"approval_resolved", "deployed", "question_asked", "question_answered", "reminder", "schedule"}
    return kinds | {"needs_login", "logged_in", "rate_limited", "container_crash"}


def crash(hive: Hive, looks: Line, name: str) -> None:
    def runs() -> bool:
        rows = {row["name"]: row for row in hive.ask(cmd="agent_status")["agent_statuses"]}
        return name in rows and rows[name]["running"] and "deployed_sha" in rows[name]

    wait_for(runs, f"{name} to run")
    note = json.loads((hive.run / "processes" / f"{name}.json").read_text())
    os.kill(note["pid"], signal.SIGKILL)
    has_crashed = '"kind": "container_crash"'
    wait_for(lambda: has_crashed in json.dumps(hive.ask(cmd="inbox")), f"news of {name}'s crash")


def at_own_page(hive: Hive, name: str, path: str, body: dict[str, Any]) -> None:
    """What somebody with the link to an agent's page may ask for there."""
    url = urllib.parse.urlsplit(hive.api("GET", f"/api/agents/{name}").body["agent"]["url"])
    headers = {"Authorization": "Bearer " + url.fragment.removeprefix("token="), "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{url.netloc}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


@pytest.mark.needs("git")
def test_a_harness_makes_every_request_well_and_reads_every_message(hive: Hive, folder: Path) -> None:
    hive.spawn("manager", "alice", "bob")
    kinds = write_one_of_each_kind(hive)
    with listened_to(hive, "manager", folder) as ear:
        wait_for(lambda: "ack" in {request["cmd"] for request in ear.requests}, "a first turn", timeout_s=30)
        with hive.agent("bob") as bob:
            question = bob.ask("ask", question="Which?", to="manager")["id"]
        steps = [{"tool": name, "input": fields} for name, fields in all_tools(question)]
        hive.ask(cmd="send", to="manager", body=rehearse(*steps))
        wait_for(lambda: "get_logs" in {request["cmd"] for request in ear.requests}, "every tool", timeout_s=60)
        at_own_page(hive, "manager", "/api/model", {"model": "other"})
        hive.ask(cmd="send", to="manager", body=rehearse({"fail": "rate_limit", "resets_in_s": 3600}))
        wait_for(
            lambda: "nack" in {request["cmd"] for request in ear.requests}, "mail that is given back", timeout_s=30
        )
    requests, answers = ear.requests, ear.answers
    assert {request["cmd"] for request in requests} == hyperhive.AGENT_VERBS.keys() | hyperhive.MANAGER_VERBS.keys()
    assert ": null" not in json.dumps([requests, answers])  # optional fields are absent
    codes = {answer["code"]: answer for answer in answers if not answer["ok"]}
    assert not codes.keys() & {"bad_request", "unknown_verb", "bad_name", "too_large", "internal"}, codes
    assert {"usage", "state", "events"} <= {
        key for request in requests if request["cmd"] == "report" for key in request
    }
    events = {event["kind"] for request in requests for event in request.get("events", [])}
    assert {"turn_start", "text", "tool_call", "tool_result", "turn_end", "state", "note"} <= events
    messages = [message for answer in answers for message in answer.get("messages", [])]
    assert kinds <= {message.get("kind") for message in messages}
    assert "in_reply_to" in {key for message in messages for key in message}
    for message in messages:
        parsed = harness.parse_message(harness.Fields(message, "a message"))
        assert parsed.wire == message and f"message {message['id']} from {message['from']}, " in harness.heading(parsed)
