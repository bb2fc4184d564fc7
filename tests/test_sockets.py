"""Sockets: the operator's `host.sock`, as desktop clients speak it, and the agents' own, as hostile as can be."""

import copy
import grp
import itertools
import json
import os
import re
import resource
import shutil
import socket
import stat
import subprocess
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hive import HYPERHIVE, Hive, Line, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hyperhive

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")

STATUS_ROW = {"name", "running", "failed", "needs_update", "needs_login", "pending_reminders", "paused", "url"}
STATUS_ROW_OPTIONAL = {"deployed_sha", "parent", "active_model", "status_text", "status_set_at"}
APPROVAL_ROW = {"id", "agent", "kind", "requested_at", "status"}
APPROVAL_ROW_OPTIONAL = {
    "commit_ref", "fetched_sha", "resolved_at", "note", "description", "phase", "precheck",
    "base_sha", "requested_by", "resolved_by", "error", "deploy_id", "schedule", "digest",
}  # fmt: skip


def is_failure(answer: dict[str, Any] | None) -> bool:
    """An answer of the one error shape: a sentence, a word, and sometimes what to do."""
    return (
        answer is not None
        and {"version", "ok", "error", "code"} <= answer.keys() <= {"version", "ok", "error", "code", "hint"}
        and answer["version"] == 1
        and answer["ok"] is False
        and all(isinstance(answer[key], str) and answer[key] for key in answer.keys() - {"version", "ok"})
        and re.fullmatch(r"[a-z_]+", answer["code"]) is not None
    )


def nulls_in(value: Any) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return value is None or any(map(nulls_in, children))


NUMBERS = itertools.count(1)


def numbered(prefix: str) -> str:
    """A name that no other test here uses."""
    return f"{prefix}{next(NUMBERS)}"


def a_request(hive: Hive, **fields: Any) -> int:
    with hive.agent("manager") as manager:
        asked = manager.ask("request_spawn", name=numbered("r"), description="to be decided", **fields)
        return int(asked["id"])


# ── host.sock ──


def test_each_verb_answers_with_its_key(crew: Hive, folder: Path) -> None:
    with crew.agent("alice") as alice:
        question = alice.ask("ask", question="Which one?")["id"]
    plain, name = {"version", "ok"}, numbered("x")
    once: list[tuple[dict[str, Any], set[str]]] = [
        ({"cmd": "list"}, {"agents"}),
        ({"cmd": "agent_status"}, {"agent_statuses"}),
        ({"cmd": "agents"}, {"agents", "containers"}),
        ({"cmd": "urls"}, {"urls"}),
        ({"cmd": "pending"}, {"approvals", "questions", "attention"}),
        ({"cmd": "show", "id": a_request(crew)}, {"approval"}),
        ({"cmd": "approve", "id": a_request(crew)}, set()),
        ({"cmd": "deny", "id": a_request(crew), "note": "no"}, set()),
        ({"cmd": "set_paused", "name": "bob", "paused": True}, set()),
        ({"cmd": "pause_all", "paused": False}, set()),
        ({"cmd": "start", "scope": {"agent_names": ["bob"]}}, set()),
        ({"cmd": "restart", "name": "bob"}, set()),
        ({"cmd": "kill", "name": "bob"}, set()),
        ({"cmd": "stop", "scope": {"agent_names": ["bob"]}, "graceful": True}, set()),
        ({"cmd": "spawn", "name": name}, {"deploy"}),
        ({"cmd": "request_spawn", "name": numbered("x")}, {"id"}),
        ({"cmd": "rebuild", "name": "bob"}, {"deploy"}),
        ({"cmd": "send", "to": "bob", "body": "hello"}, {"id"}),
        ({"cmd": "inbox"}, {"messages"}),
        ({"cmd": "answer", "id": question, "text": "that one"}, set()),
        ({"cmd": "logs", "name": "bob"}, {"lines", "cursor"}),
        ({"cmd": "events"}, {"events"}),
        ({"cmd": "deploys"}, {"deploys"}),
        ({"cmd": "schedules"}, {"schedules"}),
        ({"cmd": "usage"}, {"usage"}),
        ({"cmd": "backup", "path": str(folder / "copy.sqlite")}, {"path"}),
        ({"cmd": "token"}, {"token"}),
    ]
    for request, keys in once:
        answer = crew.ask(**request)
        assert answer["ok"] is True and answer["version"] == 1, (request, answer)
        assert answer.keys() == keys | plain, request
        assert not nulls_in(answer), request
    wait_for(lambda: crew.ask(cmd="attach", name=name).keys() == {"argv", "env"} | plain, f"{name} to be connected")
    wait_for(lambda: crew.ask(cmd="destroy", name=name, purge=True)["ok"], f"{name} to be deployed and destroyed")
    assert crew.ask(cmd="rollback", name="alice")["code"] == "not_found"  # nothing earlier to go back to
    tried = {request["cmd"] for request, _ in once} | {"attach", "destroy", "rollback", "subscribe_agent_status"}
    assert tried == hyperhive.HOST_VERBS.keys()
    ended = ("deployed", "failed")
    wait_for(lambda: all(row["phase"] in ended for row in crew.ask(cmd="deploys")["deploys"]), "the deploys to end")
    assert crew.ask(cmd="stop", scope={"agent_names": crew.ask(cmd="list")["agents"]})["ok"]


def test_a_row_of_agent_status(crew: Hive) -> None:
    rows = {row["name"]: row for row in crew.ask(cmd="agent_status")["agent_statuses"]}
    assert crew.ask(cmd="list")["agents"] == sorted(rows)
    for row in rows.values():
        assert row.keys() >= STATUS_ROW and row.keys() <= STATUS_ROW | STATUS_ROW_OPTIONAL
        assert all(isinstance(row[key], bool) for key in ("running", "failed", "needs_update", "needs_login", "paused"))
        assert isinstance(row["pending_reminders"], int) and not isinstance(row["pending_reminders"], bool)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/#token=[\w-]{40,}", row["url"])
    assert re.fullmatch(r"[0-9a-f]{12}", rows["alice"]["deployed_sha"])
    assert "parent" not in rows["alice"]  # the operator's own


def test_status_text_is_there_while_the_agent_runs(crew: Hive) -> None:
    def row() -> dict[str, Any]:
        return next(row for row in crew.ask(cmd="agent_status")["agent_statuses"] if row["name"] == "alice")

    crew.ask(cmd="start", scope={"agent_names": ["alice"]})
    with crew.agent("alice") as alice:
        alice.ask("set_status", text="thinking")
        alice.ask("remind", body="later", delay_s=3600)
    assert row()["status_text"] == "thinking" and TIME.fullmatch(row()["status_set_at"])
    assert row()["pending_reminders"] == 1
    crew.ask(cmd="stop", scope={"agent_names": ["alice"]})
    assert not row().keys() & {"status_text", "status_set_at"}


def test_a_row_of_approvals(crew: Hive) -> None:
    waiting = a_request(crew, config="{ }")
    decided = a_request(crew)
    crew.ask(cmd="deny", id=decided, note="not now")
    (row,) = (row for row in crew.ask(cmd="pending")["approvals"] if row["id"] == waiting)
    assert row.keys() >= APPROVAL_ROW and row.keys() <= APPROVAL_ROW | APPROVAL_ROW_OPTIONAL
    assert (row["kind"], row["status"]) == ("spawn", "pending") and isinstance(row["id"], int)
    assert TIME.fullmatch(row["requested_at"]) and not row.keys() & {"resolved_at", "note", "phase", "fetched_sha"}
    shown = crew.ask(cmd="show", id=decided)["approval"]
    assert shown["note"] == "not now" and TIME.fullmatch(shown["resolved_at"])


@pytest.mark.parametrize("path", ["copy.sqlite", "", "/tmp/copy\0.sqlite"])
def test_a_backup_wants_a_whole_path(crew: Hive, path: str) -> None:
    assert crew.ask(cmd="backup", path=path)["code"] == "bad_request"


@pytest.mark.parametrize("verb", ["start", "stop"])
def test_an_empty_scope_is_refused_and_never_everything(crew: Hive, verb: str) -> None:
    def running() -> list[tuple[str, bool]]:
        return [(row["name"], row["running"]) for row in crew.ask(cmd="agent_status")["agent_statuses"]]

    before = running()
    for request in ({}, {"scope": {}}, {"scope": {"agent_names": []}}, {"scope": None}, {"scope": []}):
        answer = crew.ask(cmd=verb, **request)
        assert is_failure(answer) and answer["code"] == "bad_request", request
    assert is_failure(crew.ask(cmd=verb, scope={"agent_names": ["alice", "nobody"]}))
    assert running() == before


def test_unknown_keys_are_ignored_and_unknown_commands_refused(crew: Hive) -> None:
    assert crew.ask(cmd="list", newer="client")["ok"]
    assert crew.ask(cmd="send", to="bob", body="hi", colour="red")["ok"]
    for verb in ("lease", "hello", "", "LIST", 7, None, ["list"], {"list": 1}):
        answer = crew.ask(cmd=verb)
        assert is_failure(answer) and answer["code"] == "unknown_verb" and "agent_status" in answer["hint"]


def test_answers_come_in_order_on_one_connection(crew: Hive) -> None:
    with Line(crew.run / "host.sock") as line:
        line.write(b'{"cmd":"list"}\n{"cmd":"urls"}\n{"cmd":"no"}\n{"cmd":"usage"}\n')
        answers = [line.read() or {} for _ in range(4)]
    assert ["agents" in answers[0], "urls" in answers[1], is_failure(answers[2]), "usage" in answers[3]] == [True] * 4


def told_of(line: Line, name: str) -> dict[str, Any]:
    """The next change of this agent: what an earlier test began with another may end only now."""
    while True:
        change = line.read()
        assert change is not None and change["ok"] and change["version"] == 1
        (row,) = change["agent_statuses"]
        if row["name"] == name:
            return dict(row)


def test_subscribe_tells_all_rows_then_each_that_changes(crew: Hive) -> None:
    with Line(crew.run / "host.sock") as line:
        first = line.ask("subscribe_agent_status")
        assert first == crew.ask(cmd="agent_status")
        for paused in (True, False):
            crew.ask(cmd="set_paused", name="bob", paused=paused)
            row = told_of(line, "bob")
            assert row["paused"] is paused and row.keys() <= STATUS_ROW | STATUS_ROW_OPTIONAL


def test_a_subscriber_is_told_what_an_earlier_one_knew(crew: Hive) -> None:
    """Each begins with the rows as they are, so that the same change is news to the second one as well."""
    for _ in range(2):
        with Line(crew.run / "host.sock") as line:
            line.ask("subscribe_agent_status")
            crew.ask(cmd="set_paused", name="bob", paused=True)
            assert told_of(line, "bob")["paused"] is True
        wait_for(lambda: crew.ask(cmd="set_paused", name="bob", paused=False)["ok"], "bob to go on")


def test_subscribers_may_vanish(crew: Hive) -> None:
    with Line(crew.run / "host.sock") as stays, ExitStack() as others:
        stays.ask("subscribe_agent_status")
        for _ in range(40):  # more than the connections that a socket takes: streams are not counted
            others.enter_context(Line(crew.run / "host.sock")).ask("subscribe_agent_status")
        others.close()
        crew.ask(cmd="set_paused", name="alice", paused=True)
        assert told_of(stays, "alice")["paused"] is True
        crew.ask(cmd="set_paused", name="alice", paused=False)
        assert told_of(stays, "alice")["paused"] is False


# ── agents' sockets ──


def test_the_socket_says_who_speaks(crew: Hive) -> None:
    with crew.agent("alice") as alice, crew.agent("bob") as bob:
        assert alice.ask("hello", harness_version="0", last_event=0)["name"] == "alice"
        for forged in ("from", "sender", "name", "agent"):
            answer = bob.ask("send", to="operator", body="it is me, alice", **{forged: "alice"})
            assert is_failure(answer) and answer["code"] == "bad_request" and forged in answer["error"]
        sent = bob.ask("send", to="alice", body="hello from bob")["id"]
        (message,) = (row for row in alice.ask("inbox", max=100)["messages"] if row["id"] == sent)
        assert message["from"] == "bob" and not nulls_in(message)
        # What is alice's is not bob's: her mail, her reminders, her questions.
        assert bob.ask("ack", ids=[sent])["acked"] == 0
        reminder = alice.ask("remind", body="mine", delay_s=3600)["id"]
        assert bob.ask("cancel", reminder=reminder)["code"] == "not_found"
        question = alice.ask("ask", question="May I?")["id"]
        assert bob.ask("answer", id=question, text="yes")["code"] == "forbidden"
        assert bob.ask("cancel", question=question)["code"] == "forbidden"
        assert alice.ask("cancel", reminder=reminder)["ok"] and alice.ask("cancel", question=question)["ok"]


@pytest.mark.parametrize("verb", hyperhive.MANAGER_VERBS)
def test_the_managers_verbs_are_the_managers(crew: Hive, verb: str) -> None:
    with crew.agent("alice") as alice, crew.agent("manager") as manager:
        answer = alice.ask(verb, name="bob", agent="bob", id=1)
        assert is_failure(answer) and answer["code"] == "forbidden"
        assert manager.ask(verb, surprise=1)["code"] != "forbidden"


@pytest.mark.parametrize("verb", ["start_agent", "stop_agent", "restart_agent"])
def test_the_manager_does_not_handle_itself(crew: Hive, verb: str) -> None:
    with crew.agent("manager") as manager:
        assert manager.ask(verb, name="manager")["code"] == "forbidden"


@pytest.mark.parametrize("verb", ["approve", "deny", "destroy", "spawn", "token", "pause_all", "backup"])
def test_the_operators_verbs_are_at_no_agents_socket(crew: Hive, verb: str) -> None:
    with crew.agent("manager") as manager:
        assert manager.ask(verb, id=1, name="bob")["code"] == "unknown_verb"


@pytest.mark.parametrize("verb", [*hyperhive.AGENT_VERBS, *hyperhive.MANAGER_VERBS])
def test_unknown_keys_are_refused(crew: Hive, verb: str) -> None:
    with crew.agent("manager") as manager:
        answer = manager.ask(verb, **(WELL_FORMED[verb] | {"surprise": 1}))
        assert is_failure(answer) and answer["code"] == "bad_request" and "'surprise'" in answer["error"]


# One request of each verb with every field that it may have.
WELL_FORMED: dict[str, dict[str, Any]] = {
    "hello": {"harness_version": "0", "last_event": 0, "model": "a model", "session": "a session"},
    "lease": {"max": 1, "wait_s": 0},
    "ack": {"ids": []},
    "nack": {"ids": [], "blameless": True, "reason": "because"},
    "send": {"to": "alice", "body": "hello", "in_reply_to": 1, "client_id": "once"},
    "inbox": {"max": 1},
    "ask": {"question": "Which?", "options": ["a", "b"], "multi": True, "to": "operator", "ttl_s": 60},
    "answer": {"id": 1, "text": "this"},
    "remind": {"body": "think", "at": "2030-01-31T08:00:00Z"},
    "cancel": {"question": 1},
    "open_threads": {},
    "set_status": {"text": "busy"},
    "report": {},
    "list_agents": {},
    "page_control": {"do": "pause"},
    "checkout_config": {"agent": "alice"},
    "request_spawn": {"name": "carol", "description": "helps", "config": "{ }"},
    "request_apply_commit": {"agent": "alice", "sha": "0" * 40, "description": "better", "bundle": "QUJD"},
    "request_update_inputs": {"agent": "alice", "description": "newer"},
    "request_schedule": {
        "to": "alice", "body": "look", "first": "2030-01-31T08:00:00Z", "every_s": 60, "description": "why",
    },
    "cancel_request": {"id": 1},
    "list_approvals": {"status": "pending"},
    "start_agent": {"name": "nobody"},
    "stop_agent": {"name": "nobody"},
    "restart_agent": {"name": "nobody"},
    "get_logs": {"name": "alice", "lines": 1},
}  # fmt: skip
EVENT = {"id": 1, "at": "2030-01-31T08:00:00Z", "turn": 1, "kind": "text", "data": {"text": "hello"}}
USAGE = {
    "turn": "a turn", "model": "a model", "input_tokens": 1, "output_tokens": 1, "cache_read_tokens": 1,
    "cache_creation_tokens": 1, "cost_usd": 0.1, "duration_ms": 1, "context_tokens": 1, "context_window": 1,
}  # fmt: skip
STATE = {
    "state": "idle", "reason": "none", "until": "2030-01-31T08:00:00Z", "model": "a model", "session": "a session",
    "context_tokens": 1, "context_window": 1, "signed_in_until": "2030-01-31T08:00:00Z",
    "login": {"phase": "failed", "url": "about:blank", "error": "no"},
}  # fmt: skip
ODD = ["alice", "operator", "*", "a@b", "\0", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", 2**53, 2**63]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(0, 1e300) | st.text(max_size=20) | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request with up to two values that may be anything, also inside a report."""
    verb = draw(st.sampled_from(sorted(WELL_FORMED)))
    request = copy.deepcopy(WELL_FORMED[verb])
    spoilt = request
    if verb == "report":
        request = copy.deepcopy({"events": [EVENT], "usage": USAGE, "state": STATE})
        spoilt = draw(st.sampled_from([request, request["events"][0], request["usage"], request["state"]]))
    for key in draw(st.sets(st.sampled_from(sorted(spoilt)), max_size=2)) if spoilt else ():
        spoilt[key] = draw(VALUES)
    return {"cmd": verb, **request}


def test_any_value_is_taken_or_refused_and_spoils_nothing(folder: Path) -> None:
    """One answer a request, in order (also after a lease that would wait), never an error of ours; and then every
    view still works: nothing was stored that can't be shown."""
    with (
        Hive(folder, limits={"messages_per_minute": 0}) as hive,
        hive.spawn("manager", "alice").agent("manager") as line,
    ):

        @settings(max_examples=500, suppress_health_check=list(HealthCheck))
        @given(requests())
        def fuzz(request: dict[str, Any]) -> None:
            line.write(json.dumps(request).encode() + b'\n{"cmd":"list_agents"}\n')
            answer, after = line.read(), line.read()
            assert (answer or {})["ok"] or (is_failure(answer) and answer["code"] not in ("internal", "storage")), (
                answer
            )
            assert after and "agents" in after, after

        fuzz()
        for verb in ("open_threads", "list_approvals", "inbox", "list_agents"):
            assert line.ask(verb)["ok"]
        for verb in ("agents", "agent_status", "pending", "inbox", "events", "deploys", "schedules", "usage"):
            assert hive.ask(cmd=verb)["ok"]
        for path in ("state", "agents/alice", "agents/manager", "approvals", "questions", "messages", "audit"):
            assert hive.api("GET", f"/api/{path}").status == 200


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{", b"nonsense", b"[]", b'"text"', b"7", b"null", b"\xff\xfe\x00", bytes(range(128, 256)), b"\x00" * 100,
        b'{"cmd":"set_status","text":"\\ud800"}', b'{"cmd":"set_status","text":"\xed\xa0\x80"}',
        b'{"cmd":"remind","body":"x","delay_s":NaN}', b'{"cmd":"remind","body":"x","delay_s":Infinity}',
        b'{"cmd":"remind","body":"x","delay_s":1e999}', b'{"cmd":"list_agents","x":' + b"9" * 5000 + b"}",
        *('{"cmd":"list_agents"}'.encode(encoding) for encoding in ("utf-8-sig", "utf-16-le", "utf-32-be")),
        *(b'{"cmd":"list_agents","x":' + b"[" * deep + b"]" * deep + b"}" for deep in (500, 980, 1000, 5000, 100_000)),
    ],
    ids=lambda line: repr(line[:30]),
)  # fmt: skip
def test_a_malformed_line_is_answered_and_ends_the_connection(crew: Hive, line: bytes) -> None:
    for path in (crew.run / "host.sock", crew.run / "agents/alice/hive.sock"):
        with Line(path) as connection:
            connection.write(line + b'\n{"cmd":"list_agents"}\n')
            answer = connection.read()
            assert is_failure(answer) and answer["code"] == "bad_request"
            with suppress(ConnectionResetError):  # what it had not read yet goes with the connection
                assert connection.read() is None


def test_a_line_has_a_longest(crew: Hive) -> None:
    limits = hyperhive.Limits()
    for name, limit in (("alice", limits.line_bytes), ("manager", limits.bundle_line_bytes)):
        fits = b'{"cmd":"set_status","text":"' + b"x" * (limit - 30) + b'"}'
        with crew.agent(name) as line:
            line.write(fits + b"\n")
            assert (line.read() or {})["code"] == "too_large"  # the text is, the line was not
            assert line.ask("list_agents")["ok"]
        for end in (b"\n", b""):
            with crew.agent(name) as line:
                with suppress(ConnectionError):
                    line.write(fits + b"x" * 1_000_000 + end)
                answer = line.read()
                assert is_failure(answer) and answer["code"] == "too_large" and str(limit) in answer["error"]
                with suppress(ConnectionResetError):
                    assert line.read() is None


@pytest.mark.parametrize(
    "at", ["9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00", "1969-12-31T23:59:59Z", "soon"]
)
def test_a_moment_that_could_not_be_shown_is_refused(crew: Hive, at: str) -> None:
    with crew.agent("alice") as alice:
        for verb, fields in (
            ("remind", {"body": "x", "at": at}),
            ("report", {"state": {"state": "idle", "until": at}}),
        ):
            answer = alice.ask(verb, **fields)
            assert is_failure(answer) and answer["code"] == "bad_request"
        assert alice.ask("open_threads")["ok"]


def test_half_a_line_is_no_request(crew: Hive) -> None:
    with crew.agent("alice") as line:
        line.write(b'{"cmd":"set_status","text":"half"}')
        line.socket.shutdown(socket.SHUT_WR)
        assert line.read() is None
    assert "half" not in json.dumps(crew.ask(cmd="agents"))


def test_a_line_may_come_byte_by_byte(crew: Hive) -> None:
    with crew.agent("alice") as line:
        for byte in b'{"cmd":"list_agents"}\n':
            line.write(bytes([byte]))
        assert (line.read() or {})["ok"]


def test_a_reader_that_does_not_read_holds_up_nobody(crew: Hive) -> None:
    with crew.agent("alice") as deaf:
        deaf.socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                deaf.socket.send(b'{"cmd":"list_agents"}\n' * 1000)
        with crew.agent("alice") as other:
            assert other.ask("list_agents")["ok"]
        assert crew.ask(cmd="list")["ok"]


def test_no_more_than_32_connections(crew: Hive) -> None:
    with ExitStack() as stack:
        lines = [stack.enter_context(crew.agent("manager")) for _ in range(32)]
        assert all(line.ask("list_agents")["ok"] for line in lines)
        with crew.agent("manager") as one_more:
            refused = one_more.read()
            assert is_failure(refused) and refused["code"] == "too_many" and one_more.read() is None
        with crew.agent("alice") as other:
            assert other.ask("list_agents")["ok"]
        lines[0].close()
        wait_for(lambda: is_taken(crew), "a place that is free again")


def is_taken(hive: Hive) -> bool:
    with hive.agent("manager") as line:
        try:
            return bool(line.ask("list_agents")["ok"])
        except OSError:
            return False


# ── doors ──


def mode(path: Path) -> tuple[str, int]:
    status = path.stat()
    return f"{stat.S_IMODE(status.st_mode):o}", status.st_uid


def test_who_may_open_what(folder: Path) -> None:
    """Whatever umask the daemon was started with."""
    for umask in (0o000, 0o077):
        (folder / str(umask)).mkdir()
        old = os.umask(umask)
        try:
            hive = Hive(folder / str(umask)).start()
        finally:
            os.umask(old)
        with closing(hive):
            hive.spawn("alice")
            state, run, me = hive.state, hive.run, os.geteuid()
            assert {path: mode(path) for path in (run, state, run / "agents", run / "agents/alice")} == {
                run: ("751", me), state: ("700", me), run / "agents": ("700", me), run / "agents/alice": ("700", me),
            }  # fmt: skip
            has_group = hyperhive.group_id(hyperhive.Config().admin_group) is not None
            assert mode(run / "host.sock") == ("660" if has_group else "600", me)
            secret = [run / "agents/alice/hive.sock", run / "agents/alice/ui-token", state / "operator.token"]
            assert {mode(path) for path in [*secret, state / "hive.sqlite"]} == {("600", me)}
            own = [state / "applied", state / "agents/alice/claude", state / "agents/alice/state", state / "logs"]
            assert {mode(path) for path in own} == {("700", me)}
            assert (mode(state / "shared"), mode(state / "operator")) == (("770", me), ("755", me))


@pytest.mark.parametrize("may_give", [True, False])
def test_host_sock_is_the_admins_or_nobodys(folder: Path, monkeypatch: pytest.MonkeyPatch, may_give: bool) -> None:
    """Where it can't be given to the group of that name, no other group may open it."""
    own = {os.getegid(), *os.getgroups()}
    group = next(entry for entry in grp.getgrall() if entry.gr_gid not in own)
    if may_give and os.geteuid():
        pytest.skip("needs root, to give a file to a group")
    if not may_give and not os.geteuid():
        monkeypatch.setattr("hive.HYPERHIVE", ["setpriv", "--bounding-set=-chown", *HYPERHIVE])
    with Hive(folder, admin_group=group.gr_name) as hive:
        status = (hive.run / "host.sock").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid == group.gr_gid) == (0o660 if may_give else 0o600, may_give)
        assert ("we are no member" in hive.log.read_text()) is not may_give


def test_a_socket_comes_back_after_all_that_can_happen_to_it(hive: Hive) -> None:
    path = hive.spawn("alice").run / "agents/alice/hive.sock"

    def speaks() -> bool:
        with hive.agent("alice") as line:
            return line.ask("hello", harness_version="0", last_event=0)["name"] == "alice"

    assert speaks()
    path.unlink()
    hive.ask(cmd="start", scope={"agent_names": ["alice"]})
    assert speaks()
    shutil.rmtree(path.parent)
    hive.ask(cmd="restart", name="alice")
    assert speaks()
    hive.stop()
    assert not path.exists() and not (hive.run / "host.sock").exists()
    hive.start()
    assert speaks() and hive.ask(cmd="list")["agents"] == ["alice"]
    hive.kill()  # its socket files stay behind
    assert path.exists()
    hive.start()
    assert speaks()
    hive.ask(cmd="destroy", name="alice")
    assert not path.parent.exists()
    assert hive.spawn("alice") and speaks()


def test_open_connections_end_with_the_agent(hive: Hive) -> None:
    with hive.spawn("alice").agent("alice") as line:
        assert line.ask("list_agents")["ok"]
        line.write(b'{"cmd":"lease","wait_s":300}\n')
        hive.ask(cmd="destroy", name="alice")
        assert line.read() is None


def test_what_was_sent_already_ends_with_the_agent(folder: Path) -> None:
    """Nothing of it is carried out after a purge: a namesake begins with nothing."""
    with Hive(folder, limits={"reminders": 10_000}) as hive, hive.spawn("alice").agent("alice") as line:
        line.write(b'{"cmd":"remind","body":"from an earlier life","delay_s":3600}\n' * 5000)
        assert (line.read() or {})["ok"]
        assert hive.ask(cmd="destroy", name="alice", purge=True)["ok"]
        with suppress(ConnectionResetError):
            while line.read() is not None:
                pass
        hive.spawn("alice")
        (row,) = hive.ask(cmd="agent_status")["agent_statuses"]
        assert row["pending_reminders"] == 0


def test_a_connection_that_can_not_go_on_says_why(folder: Path) -> None:
    class Stuck(hyperhive.Connection):
        def before_request(self) -> None:
            raise hyperhive.Refused("storage", "the disk is full")

    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(30)
        ours.sendall(b'{"cmd":"list"}\n' * 2)
        Stuck(theirs, 1000).serve()
        answers = b"".join(iter(lambda: ours.recv(4096), b"")).splitlines()
    (answer,) = map(json.loads, answers)
    assert is_failure(answer) and answer["code"] == "storage"


def test_a_connection_that_can_not_begin_is_closed_and_others_are_served(folder: Path) -> None:
    class Echo(hyperhive.Connection):
        def handle(self, request: dict[str, Any]) -> dict[str, Any]:
            return request

    waiting = [RuntimeError("can't start new thread")]

    def make(sock: socket.socket) -> hyperhive.Connection:
        if waiting:
            raise waiting.pop()
        return Echo(sock, 1000)

    with closing(hyperhive.Doors()) as doors:
        doors.open(folder / "door", make, most=1)
        with Line(folder / "door") as line:
            assert line.read() is None
        with Line(folder / "door") as line:
            assert line.ask("hello") == {"cmd": "hello"}


def test_idle_connections_leave_files_to_open(folder: Path) -> None:
    """As many as the dashboard takes, which asks nobody for a token before it has heard what they want."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hive = Hive(folder)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        hive.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with closing(hive), ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", hive.port), timeout=30))
        for number in range(5):
            assert hive.ask(cmd="backup", path=str(folder / f"copy{number}.sqlite"))["ok"]
        hive.spawn("alice")


def test_a_socket_path_that_is_too_long_is_refused_at_start(folder: Path) -> None:
    deep = folder / ("x" * 100)
    options = ["--state-dir", str(folder), "--runtime-dir", str(deep), "--containers", "process"]
    ran = subprocess.run([*HYPERHIVE, "serve", *options], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 2
    assert str(deep) in ran.stderr and "107 bytes" in ran.stderr and "shorter" in ran.stderr
    assert not deep.exists()


def test_a_longest_socket_path_works(folder: Path) -> None:
    room = (
        hyperhive.SOCKET_PATH_MAX
        - len(str(folder))
        - len("//hive/run/agents/")
        - hyperhive.NAME_MAX
        - len("/hive.sock")
    )
    with Hive(folder / ("x" * room)) as hive:
        assert len(os.fsencode(hive.run / "agents" / ("n" * 9) / "hive.sock")) == hyperhive.SOCKET_PATH_MAX
        with hive.spawn("ninechars").agent("ninechars") as line:
            assert line.ask("list_agents")["ok"]


def test_an_environment_file_that_can_not_be_read_closes_no_door(folder: Path) -> None:
    secret = folder / "environment"
    secret.write_text("KEY=secret\n")
    with Hive(folder, environment_file=str(secret)) as hive:
        passed = hive.spawn("alice").run / "agents/alice/environment"
        assert passed.read_text() == "KEY=secret\n"
        hive.stop()
        secret.unlink()
        hive.start()
        with hive.agent("alice") as alice:
            assert alice.ask("list_agents")["ok"]
        refused = hive.ask(cmd="restart", name="alice")
        assert refused["code"] == "storage" and f"{secret} can't be passed on" in refused["error"]
        hive.stop()
        hive.configure(environment_file="")
        hive.start()
        assert not passed.exists(), "what is not configured any more is not passed on any more"
