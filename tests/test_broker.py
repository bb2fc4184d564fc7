"""The broker: mail between agents, operator and system, as agents and operator see it at their sockets."""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hive import Hive, Line, wait_for
from hypothesis import given
from hypothesis import strategies as st

import hyperhive

BODY_MAX = 64 * 1024


def lease(line: Line, **fields: Any) -> list[dict[str, Any]]:
    """The mail that is there, or that comes within ten seconds."""
    answer = line.ask("lease", **{"max": 100, "wait_s": 10} | fields)
    return list(answer["messages"])


def bodies(messages: list[dict[str, Any]]) -> list[str]:
    return [message["body"] for message in messages]


def empty(hive: Hive, name: str, line: Line) -> Line:
    """Also of what an earlier test had leased, which comes back in a moment."""

    def is_empty() -> bool:
        while mail := lease(line, wait_s=0):
            line.ask("ack", ids=[message["id"] for message in mail])
        return not agent_row(hive, name)["unread"]

    wait_for(is_empty, f"{name}'s mail to be back")
    return line


def send(line: Line, to: str, *texts: str, **fields: Any) -> list[int]:
    answers = [line.ask("send", to=to, body=text, **fields) for text in texts]
    assert all(answer["ok"] for answer in answers), answers
    return [answer["id"] for answer in answers]


def told(hive: Hive, kind: str) -> list[dict[str, Any]]:
    """What the system told the operator."""
    return [row for row in hive.ask(cmd="inbox", max=1000)["messages"] if row.get("kind") == kind]


def message(hive: Hive, number: int) -> dict[str, Any]:
    """A message as the operator sees it, with its state."""
    found = hive.api("GET", f"/api/messages?before={number + 1}&max=1").body["messages"]
    return dict(found[0])


def question(hive: Hive, number: int) -> dict[str, Any]:
    rows = hive.api("GET", "/api/questions").body["questions"]
    return next(dict(row) for row in rows if row["id"] == number)


def agent_row(hive: Hive, name: str) -> dict[str, Any]:
    return next(dict(row) for row in hive.ask(cmd="agents", kept=True)["agents"] if row["name"] == name)


def in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.fixture
def alice(crew: Hive) -> Iterator[Line]:
    """alice's socket, and nothing in her inbox."""
    with crew.agent("alice") as line:
        yield empty(crew, "alice", line)


@pytest.fixture
def bob(crew: Hive) -> Iterator[Line]:
    with crew.agent("bob") as line:
        yield empty(crew, "bob", line)


# ── sending ──


def test_a_message_arrives_as_it_was_sent(crew: Hive, alice: Line, bob: Line) -> None:
    text = 'two lines\nwith "quotes", \\ and \u202e\x00\x1b[31m🐝'
    (first,) = send(alice, "bob", text)
    (got,) = lease(bob)
    assert datetime.fromisoformat(got.pop("at")).tzinfo is not None
    assert got == {"id": first, "from": "alice", "to": "bob", "body": text, "attempts": 1}
    (second,) = send(bob, "alice", "an answer", in_reply_to=first)
    (got,) = lease(alice)
    assert (got["id"], got["in_reply_to"]) == (second, first)
    (third,) = send(alice, "bob", "thanks", in_reply_to=second)
    for of in (first, second, third):
        rows = crew.api("GET", f"/api/messages/{of}/thread").body["messages"]
        assert [row["id"] for row in rows] == [first, second, third]


@pytest.mark.parametrize(
    ("fields", "code", "word"),
    [
        ({"to": "nobody"}, "unknown_agent", "nobody"),
        ({"to": "bob@mars"}, "not_found", "no such hive"),
        ({"to": "Bob"}, "bad_name", "Bob"),
        ({"to": "system"}, "bad_name", "reserved"),
        ({"body": "x" * (BODY_MAX + 1)}, "too_large", str(BODY_MAX)),
        ({"body": "ä" * (BODY_MAX // 2 + 1)}, "too_large", str(BODY_MAX)),
        ({"body": " \n"}, "bad_request", "empty"),
        ({"in_reply_to": 10**9}, "not_found", "seen"),
        ({"client_id": "x" * 65}, "too_large", "64"),
        ({"via": "page"}, "bad_request", "page"),
    ],
)
def test_what_can_not_be_sent_is_refused_with_the_reason(
    alice: Line, bob: Line, fields: dict[str, Any], code: str, word: str
) -> None:
    answer = alice.ask("send", **{"to": "bob", "body": "hello"} | fields)
    assert (answer["ok"], answer["code"]) == (False, code) and word in answer["error"]
    assert lease(bob, wait_s=0) == []


def test_mail_of_others_can_not_be_replied_to(crew: Hive, alice: Line, bob: Line) -> None:
    (private,) = send(alice, "operator", "between us")
    assert bob.ask("send", to="alice", body="I saw that", in_reply_to=private)["code"] == "not_found"
    assert crew.ask(cmd="send", to="bob", body="look", in_reply_to=private)["ok"]


def test_the_longest_body_passes(alice: Line, bob: Line) -> None:
    text = "ä" * (BODY_MAX // 2)
    send(alice, "bob", text)
    assert bodies(lease(bob)) == [text]


def test_what_was_typed_at_the_own_page_says_so(alice: Line) -> None:
    send(alice, "alice", "typed", via="page")
    assert [row["via"] for row in lease(alice)] == ["page"]


def test_a_full_inbox_refuses_until_something_is_done(folder: Path) -> None:
    with Hive(folder, limits={"unread": 3}) as hive:
        hive.spawn("alice", "bob", "carol")
        with hive.agent("alice") as alice, hive.agent("bob") as bob, hive.agent("carol") as carol:
            send(alice, "bob", "1", "2", "3")
            for to in ("bob", "*"):
                refused = alice.ask("send", to=to, body="4")
                assert refused["code"] == "inbox_full" and "bob" in refused["error"]
            assert lease(carol, wait_s=0) == []  # not even half of a broadcast
            mail = lease(bob)
            assert alice.ask("send", to="bob", body="4")["code"] == "inbox_full"  # given is not done
            bob.ask("ack", ids=[mail[0]["id"]])
            send(alice, "bob", "4")


def test_a_sender_has_a_burst_and_then_a_rate(folder: Path) -> None:
    with Hive(folder, limits={"messages_per_minute": 60, "message_burst": 3}) as hive:
        hive.spawn("alice", "bob")
        with hive.agent("alice") as alice, hive.agent("bob") as bob:
            send(alice, "bob", "1", "2", "3")
            refused = [alice.ask("send", to="bob", body="more") for _ in range(30)]
            assert any(answer.get("code") == "too_fast" and "try again in" in answer["hint"] for answer in refused)
            send(bob, "alice", "bob has his own", "allowance")
            assert all(hive.ask(cmd="send", to="bob", body="so has the operator")["ok"] for _ in range(20))
            wait_for(lambda: alice.ask("send", to="bob", body="later")["ok"], "the next second")


def test_a_broadcast_is_a_copy_for_each_other(folder: Path) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice")
        with hive.agent("alice") as alice:
            assert alice.ask("send", to="*", body="anybody?")["code"] == "not_found"
            hive.spawn("bob", "carol")
            answer = alice.ask("send", to="*", body="hello all")
            assert lease(alice, wait_s=0) == []
        with hive.agent("bob") as bob, hive.agent("carol") as carol:
            got = [*lease(bob), *lease(carol)]
        assert [row["id"] for row in got] == answer["ids"] and answer["id"] == answer["ids"][0]
        assert all(row["broadcast"] and row["body"] == "hello all" and row["from"] == "alice" for row in got)


def test_a_client_id_makes_a_retry_harmless_also_after_a_restart(folder: Path) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice", "bob", "carol")

        def all_ids() -> list[Any]:
            with hive.agent("alice") as alice, hive.agent("carol") as carol:
                one = alice.ask("send", to="bob", body="hello", client_id="1")["id"]
                copies = alice.ask("send", to="*", body="hello", client_id="2")["ids"]
                other = carol.ask("send", to="bob", body="hello", client_id="1")["id"]
            return [one, *copies, other]

        first = all_ids()
        assert len(set(first)) == 4
        assert all_ids() == first
        hive.stop()
        hive.start()
        assert all_ids() == first
        with hive.agent("bob") as bob:
            assert len(lease(bob)) == 3


def test_ping_pong_pauses_both_and_the_operator_is_told(folder: Path) -> None:
    with Hive(folder, limits={"ping_pong": 4}) as hive:
        hive.spawn("alice", "bob")
        with hive.agent("alice") as alice, hive.agent("bob") as bob:

            def exchange(times: int) -> None:
                for _ in range(times):
                    send(alice, "bob", "thanks")
                    send(bob, "alice", "thanks for the thanks")

            exchange(2)
            assert hive.ask(cmd="send", to="alice", body="go on")["ok"]
            exchange(2)  # the operator's word began the count anew
            assert not agent_row(hive, "alice")["paused"] and not told(hive, "paused")
            send(alice, "bob", "thanks again")
            assert agent_row(hive, "alice")["paused"] and agent_row(hive, "bob")["paused"]
            (notice,) = told(hive, "paused")
            assert notice["data"]["agents"] == ["alice", "bob"] and "alice and bob" in notice["body"]
            assert lease(alice, wait_s=0) == lease(bob, wait_s=0) == []
            for name in ("alice", "bob"):
                assert hive.ask(cmd="set_paused", name=name, paused=False)["ok"]
            exchange(2)  # so did resuming them
            assert not agent_row(hive, "alice")["paused"]
            send(alice, "bob", "thanks, still")
            assert agent_row(hive, "alice")["paused"] and len(told(hive, "paused")) == 2


def test_much_mail_for_a_destroyed_agent_is_no_ping_pong(folder: Path) -> None:
    with Hive(folder, limits={"ping_pong": 4}) as hive:
        hive.spawn("alice", "bob").ask(cmd="destroy", name="bob")
        with hive.agent("alice") as alice:
            send(alice, "bob", *"abcdef")
        assert not agent_row(hive, "alice")["paused"] and not told(hive, "paused")


def test_an_agents_resume_is_no_word_of_the_operator_whatever_its_name(folder: Path) -> None:
    with Hive(folder, limits={"ping_pong": 4}) as hive:
        hive.spawn("alice", "operators")
        with hive.agent("alice") as alice, hive.agent("operators") as namesake:
            send(alice, "operators", *"abcd")
            for do in ("pause", "resume"):
                assert namesake.ask("page_control", do=do)["ok"]
            send(alice, "operators", "e")
        assert agent_row(hive, "operators")["paused"]


def test_questions_are_mail_to_every_limit(folder: Path) -> None:
    """Those of a sender, those of an inbox, and that of two who only answer each other."""
    with Hive(folder, limits={"messages_per_minute": 1, "message_burst": 3, "unread": 2}) as hive:
        hive.spawn("alice", "bob")
        with hive.agent("alice") as alice, hive.agent("bob") as bob:
            one, two = (alice.ask("ask", question="And?", to="bob")["id"] for _ in "12")
            full = alice.ask("ask", question="And?", to="bob")
            assert full["code"] == "inbox_full" and "bob" in full["error"]
            assert bob.ask("answer", id=one, text="so")["ok"]
            send(bob, "alice", "that was all")
            assert bob.ask("answer", id=two, text="so")["code"] == "inbox_full"
            empty(hive, "alice", alice)
            send(bob, "alice", "no, one more thing")
            assert bob.ask("answer", id=two, text="so")["code"] == "too_fast"
            assert alice.ask("ask", question="And?")["ok"]
            assert alice.ask("ask", question="And?")["code"] == "too_fast"
            assert hive.ask(cmd="answer", id=two, text="the operator has no such limit")["ok"]


def test_who_only_ask_and_answer_each_other_are_paused(folder: Path) -> None:
    with Hive(folder, limits={"ping_pong": 4}) as hive:
        hive.spawn("alice", "bob")
        with hive.agent("alice") as alice, hive.agent("bob") as bob:

            def exchange(times: int) -> None:
                for _ in range(times):
                    number = alice.ask("ask", question="And?", to="bob")["id"]
                    assert bob.ask("answer", id=number, text="so")["ok"]

            exchange(2)
            assert hive.ask(cmd="send", to="alice", body="go on")["ok"]
            exchange(2)
            assert not agent_row(hive, "alice")["paused"] and not told(hive, "paused")
            alice.ask("ask", question="And then?", to="bob")
            assert agent_row(hive, "alice")["paused"] and agent_row(hive, "bob")["paused"]
            assert told(hive, "paused")[0]["data"]["agents"] == ["alice", "bob"]


# ── leasing ──


def test_a_lease_gives_in_order_and_no_more_than_asked(alice: Line, bob: Line) -> None:
    send(alice, "bob", *"abcde")
    assert [bodies(lease(bob, max=2)) for _ in range(3)] == [["a", "b"], ["c", "d"], ["e"]]
    assert lease(bob, wait_s=0) == []


def test_inbox_is_a_look(alice: Line, bob: Line) -> None:
    send(alice, "bob", "hello")
    assert bodies(bob.ask("inbox")["messages"]) == bodies(bob.ask("inbox")["messages"]) == ["hello"]
    assert bodies(lease(bob)) == ["hello"]
    assert bob.ask("inbox")["messages"] == []  # it is in hand


def test_a_waiting_lease_is_woken(alice: Line, bob: Line) -> None:
    bob.write(b'{"cmd":"lease","wait_s":300}\n')
    send(alice, "bob", "wake up")
    assert bodies((bob.read() or {})["messages"]) == ["wake up"]


def test_a_wait_ends_empty(bob: Line) -> None:
    answer = bob.ask("lease", wait_s=0.3)
    assert (answer["messages"], answer["control"]) == ([], [])


def test_another_request_ends_the_wait_and_answers_stay_in_order(bob: Line) -> None:
    bob.write(b'{"cmd":"lease","wait_s":300}\n{"cmd":"inbox"}\n{"cmd":"list_agents"}\n')
    first, second, third = (bob.read() or {} for _ in range(3))
    assert (first["messages"], first["control"]) == ([], []) and "control" not in second and "agents" in third


def test_each_lease_has_one_answer_however_it_ends(crew: Hive, bob: Line) -> None:
    """Mail, the end of the wait and the next request come at the same moment, again and again."""
    count, got = 300, list[str]()
    with crew.agent("alice") as alice:
        sender = threading.Thread(target=send, args=(alice, "bob", *map(str, range(count))))
        sender.start()
        while len(got) < count:
            for wait in ("0", "0.001", "300"):
                bob.write(b'{"cmd":"lease","wait_s":%s}\n{"cmd":"list_agents"}\n' % wait.encode())
                leased, listed = bob.read() or {}, bob.read() or {}
                assert "messages" in leased and "agents" in listed
                got += bodies(leased["messages"])
        sender.join()
    assert got == [str(number) for number in range(count)]


def test_a_connection_that_closes_gives_its_lease_back_at_once(crew: Hive, alice: Line, bob: Line) -> None:
    ids = send(alice, "bob", "one", "two", "three")
    with crew.agent("bob") as first:
        assert all("redelivered" not in row for row in lease(first))
        assert first.ask("ack", ids=ids[:1]) == {"version": 1, "ok": True, "acked": 1}
        assert lease(bob, wait_s=0) == []
    again = lease(bob)
    assert [(row["id"], row["redelivered"], row["attempts"]) for row in again] == [(n, True, 2) for n in ids[1:]]


def test_only_blame_counts_as_an_attempt(alice: Line, bob: Line) -> None:
    (number,) = send(alice, "bob", "try")

    def next_attempt(**nack: Any) -> int:
        assert bob.ask("nack", ids=[number], **nack)["returned"] == 1
        (row,) = lease(bob)
        assert row["redelivered"] is True
        return int(row["attempts"])

    assert len(lease(bob)) == 1
    assert [next_attempt(blameless=True, reason="a limit") for _ in range(7)] == [1] * 7
    assert [next_attempt(reason="it failed") for _ in range(4)] == [2, 3, 4, 5]


def test_after_five_attempts_mail_is_dead_and_the_operator_is_told(crew: Hive, alice: Line, bob: Line) -> None:
    number, following = send(alice, "bob", "poison", "medicine")
    for _ in range(5):
        with crew.agent("bob") as line:
            assert lease(line, max=1)[0]["id"] == number
        wait_for(lambda: message(crew, number)["state"] != "leased", "it to go back")
    assert [row["id"] for row in lease(bob)] == [following]
    assert message(crew, number)["state"] == "dead"
    notice = next(row for row in told(crew, "dead_letter") if row["data"]["message"] == number)
    assert notice["data"]["agent"] == "bob" and "poison" in notice["body"]
    again = [crew.api("POST", f"/api/messages/{of}/give_again", {}).status for of in (number, number, 10**9)]
    assert again == [200, 409, 404]
    assert [(row["id"], row["attempts"]) for row in lease(bob)] == [(number, 1)]


def test_nobody_acknowledges_or_returns_for_another(crew: Hive, alice: Line, bob: Line) -> None:
    (number,) = send(alice, "bob", "for bob")
    lease(bob)
    assert alice.ask("ack", ids=[number])["acked"] == 0
    assert alice.ask("nack", ids=[number])["returned"] == 0
    with crew.agent("bob") as other:  # the lease is that of the connection
        assert other.ask("nack", ids=[number])["returned"] == 0
    assert message(crew, number)["state"] == "leased"
    assert [bob.ask("ack", ids=[number])["acked"] for _ in range(2)] == [1, 0]


def test_two_leases_of_one_agent_never_get_the_same(crew: Hive, alice: Line) -> None:
    got: list[list[int]] = [[], [], [], []]

    def take(mine: list[int]) -> None:
        with crew.agent("bob") as line:
            while not mine or mine[-1] != -1:
                for row in lease(line, max=3):
                    mine.append(-1 if row["body"] == "the end" else row["id"])
                    line.ask("ack", ids=[row["id"]])

    takers = [threading.Thread(target=take, args=(mine,)) for mine in got]
    for taker in takers:
        taker.start()
    sent = send(alice, "bob", *["work"] * 200)
    for taker in takers:
        while taker.is_alive():
            send(alice, "bob", "the end")
            taker.join(0.2)
    assert sorted(number for mine in got for number in mine if number != -1) == sent


def test_a_large_lease_arrives_whole_at_a_slow_reader(crew: Hive, alice: Line, bob: Line) -> None:
    """Control characters are six bytes each on the wire: more than any socket buffer takes at once."""
    texts = [chr(1 + number % 8) * BODY_MAX for number in range(100)]
    ids = send(alice, "bob", *texts)
    got: list[int] = []
    while len(got) < len(ids):
        bob.write(b'{"cmd":"lease","max":100}\n{"cmd":"lease","max":100}\n{"cmd":"list_agents"}\n')
        for key in ("messages", "messages", "agents"):
            line = b""
            while not line.endswith(b"\n"):
                line += bob.file.readline(10_000)
            answer = json.loads(line)
            assert key in answer
            for row in answer.get("messages", []):
                assert row["body"] == texts[len(got)]
                got.append(row["id"])
    assert got == ids


# ── pausing, and control items ──


def test_a_paused_agent_gets_control_items_but_no_mail(folder: Path) -> None:
    with Hive(folder) as hive, hive.spawn("alice", "bob").agent("bob") as bob, hive.agent("alice") as alice:
        bob.write(b'{"cmd":"lease","wait_s":300}\n')
        hive.ask(cmd="set_paused", name="bob", paused=True)
        assert (bob.read() or {})["control"] == [{"do": "pause"}]
        send(alice, "bob", "for later")
        assert lease(bob, wait_s=0.3) == []
        bob.write(b'{"cmd":"lease","wait_s":300}\n')
        hive.ask(cmd="set_paused", name="bob", paused=False)
        answer = bob.read() or {}
        assert answer["control"] == [{"do": "resume"}] or bodies(answer["messages"]) == ["for later"]
        rest = bob.ask("lease", wait_s=0)
        assert bodies(answer["messages"] + rest["messages"]) == ["for later"]
        assert answer["control"] + rest["control"] == [{"do": "resume"}]


def test_a_control_item_goes_to_one_of_two_leases(folder: Path) -> None:
    with Hive(folder) as hive, hive.spawn("bob").agent("bob") as one, hive.agent("bob") as other:
        for line in (one, other):
            line.write(b'{"cmd":"lease","wait_s":300}\n')
        assert hive.ask(cmd="set_paused", name="bob", paused=True)["ok"]
        for line in (one, other):
            line.write(b'{"cmd":"inbox"}\n')  # ends a wait
        answers = [one.read() or {}, other.read() or {}]
        assert [item for answer in answers for item in answer["control"]] == [{"do": "pause"}]


def test_hello_says_what_lasts(folder: Path) -> None:
    with Hive(folder) as hive, hive.spawn("bob").agent("bob") as bob:
        hive.ask(cmd="set_paused", name="bob", paused=True)
        assert bob.ask("hello", harness_version="0", last_event=0)["paused"] is True
        assert bob.ask("lease", wait_s=0)["control"] == []


# Each takes the place of those before it, and of none after it.
PAUSES: list[tuple[str, Callable[[Hive, Line], Any]]] = [
    ("bob (page)", lambda hive, bob: bob.ask("page_control", do="pause")),
    ("system", lambda hive, bob: spend(bob, 1.5)),
    ("operator", lambda hive, bob: hive.ask(cmd="set_paused", name="bob", paused=True)),
]


def spend(line: Line, cost: float) -> Any:
    counts = dict.fromkeys(("input_tokens", "output_tokens", "cache_read_tokens", "cache_creation_tokens"), 1)
    return line.ask("report", usage={"turn": "t", "duration_ms": 1, "cost_usd": cost, **counts})


@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("second", range(3))
def test_of_two_pauses_the_firmer_holds(folder: Path, first: int, second: int) -> None:
    with Hive(folder, daily_budget_usd=1.0) as hive:
        hive.spawn("alice", "bob")
        with hive.agent("bob") as bob, hive.agent("alice") as alice:
            assert PAUSES[1][1](hive, alice)["ok"]
            for number in (first, second):
                assert PAUSES[number][1](hive, bob)["ok"]
            firmest = max(first, second)
            assert agent_row(hive, "bob")["paused_by"].startswith(PAUSES[firmest][0])
            assert bob.ask("page_control", do="resume").get("code") == ("forbidden" if firmest else None)
        hive.stop()
        with closing(sqlite3.connect(hive.state / "hive.sqlite")) as database, database:
            database.execute("UPDATE agents SET budget_day = '2020-01-31' WHERE budget_day NOT NULL")
        hive.start()
        wait_for(lambda: not agent_row(hive, "alice")["paused"], "the new day")
        assert agent_row(hive, "bob")["paused"] == (firmest == 2)


def test_an_agent_that_comes_back_has_no_pause_of_its_earlier_life(folder: Path) -> None:
    with Hive(folder, daily_budget_usd=1.0) as hive:
        with hive.spawn("bob").agent("bob") as bob:
            spend(bob, 1.5)
        hive.ask(cmd="destroy", name="bob")
        hive.spawn("bob")
        hive.stop()
        with closing(sqlite3.connect(hive.state / "hive.sqlite")) as database:
            (left,) = database.execute("SELECT paused, pause_reason, paused_by, budget_day FROM agents").fetchall()
        assert left == (0, None, None, None)


# ── questions ──


def test_the_operator_is_asked_and_answers(crew: Hive, alice: Line) -> None:
    number = alice.ask("ask", question="Red or blue?", options=["red", "blue"])["id"]
    (asked,) = (row for row in crew.ask(cmd="pending")["questions"] if row["id"] == number)
    assert (asked["from"], asked["to"], asked["options"]) == ("alice", "operator", ["red", "blue"])
    assert crew.ask(cmd="answer", id=number, text="green, if you must")["ok"]  # options are advice
    (answer,) = lease(alice)
    assert (answer["from"], answer["kind"]) == ("system", "question_answered")
    expected = {"question": number, "answer": "green, if you must", "by": "operator", "outcome": "answered"}
    assert answer["data"] == expected
    assert crew.ask(cmd="answer", id=number, text="no, red")["code"] == "conflict"


def test_only_the_one_asked_or_the_operator_answers(crew: Hive, alice: Line, bob: Line) -> None:
    one, two = (alice.ask("ask", question="Is it done?", to="bob", options=["yes"], multi=True)["id"] for _ in "12")
    asked = lease(bob)[0]
    assert (asked["from"], asked["kind"]) == ("system", "question_asked")
    assert asked["data"] == {"question": one, "from": "alice", "options": ["yes"], "multi": True}
    with crew.agent("manager") as manager:
        assert manager.ask("answer", id=one, text="yes")["code"] == "forbidden"
    assert alice.ask("answer", id=one, text="yes")["code"] == "forbidden"
    assert sorted(row["id"] for row in bob.ask("open_threads")["to_answer"]) == [one, two]
    assert bob.ask("answer", id=one, text="almost")["ok"] and crew.ask(cmd="answer", id=two, text="yes")["ok"]
    answers = [row["data"] for row in [*lease(alice, max=1), *lease(alice, max=1)]]
    assert [(data["by"], data["answer"]) for data in answers] == [("bob", "almost"), ("operator", "yes")]


def test_a_question_expires(crew: Hive, alice: Line) -> None:
    number = alice.ask("ask", question="Anybody?", ttl_s=1)["id"]
    (answer,) = lease(alice)
    assert answer["data"] == {"question": number, "answer": "[expired]", "by": "system", "outcome": "expired"}
    assert question(crew, number)["status"] == "expired"
    assert crew.ask(cmd="answer", id=number, text="too late")["code"] == "conflict"


def test_a_question_is_cancelled_by_who_asked_or_by_the_operator(crew: Hive, alice: Line, bob: Line) -> None:
    mine, theirs = (alice.ask("ask", question="Hm?", to="bob")["id"] for _ in "12")
    assert bob.ask("cancel", question=mine)["code"] == "forbidden"
    assert alice.ask("cancel", question=mine)["ok"]
    assert crew.api("POST", f"/api/questions/{theirs}/cancel", {}).status == 200
    assert [question(crew, number)["status"] for number in (mine, theirs)] == ["cancelled", "cancelled"]
    (news,) = lease(alice)  # of what she did herself there is no news
    assert (news["data"]["question"], news["data"]["answer"]) == (theirs, "[cancelled]")


def test_a_question_that_is_over_waits_for_nobody(crew: Hive, alice: Line, bob: Line) -> None:
    cancelled, answered, waits = (alice.ask("ask", question="Hm?", to="bob")["id"] for _ in "123")
    expires = alice.ask("ask", question="Hm?", to="bob", ttl_s=1)["id"]
    assert alice.ask("cancel", question=cancelled)["ok"] and bob.ask("answer", id=answered, text="so")["ok"]
    wait_for(lambda: question(crew, expires)["status"] == "expired", "the question to expire")
    assert [row["data"]["question"] for row in lease(bob)] == [waits]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"to": "nobody"}, "unknown_agent"),
        ({"to": "alice"}, "bad_request"),
        ({"to": "*"}, "bad_request"),
        ({"options": [str(number) for number in range(11)]}, "bad_request"),
        ({"options": [""]}, "bad_request"),
    ],
)
def test_questions_that_can_not_be_asked(alice: Line, fields: dict[str, Any], code: str) -> None:
    assert alice.ask("ask", question="Well?", **fields)["code"] == code


def test_open_questions_have_a_limit(folder: Path) -> None:
    with Hive(folder, limits={"questions": 2}) as hive, hive.spawn("alice").agent("alice") as alice:
        first, _ = (alice.ask("ask", question="And?")["id"] for _ in "12")
        assert alice.ask("ask", question="And?")["code"] == "too_many"
        hive.ask(cmd="answer", id=first, text="then")
        assert alice.ask("ask", question="And?")["ok"]


# ── reminders and schedules ──


def test_reminders_come_when_they_are_due(crew: Hive, alice: Line) -> None:
    late = alice.ask("remind", body="much later", at=in_seconds(3600))["id"]
    assert agent_row(crew, "alice")["pending_reminders"] == 1
    soon = alice.ask("remind", body="soon", delay_s=0.3)["id"]
    (reminder,) = lease(alice)
    assert (reminder["from"], reminder["kind"], reminder["body"]) == ("system", "reminder", "soon")
    assert reminder["data"] == {"reminder": soon}
    assert [row["id"] for row in alice.ask("open_threads")["reminders"]] == [late]
    assert alice.ask("cancel", reminder=late)["ok"] and alice.ask("cancel", reminder=late)["code"] == "not_found"
    assert agent_row(crew, "alice")["pending_reminders"] == 0


@pytest.mark.parametrize("when", [{}, {"delay_s": 1, "at": "2030-01-31T08:00:00Z"}, {"at": "2030-01-31T08:00:00"}])
def test_a_reminder_has_one_time(alice: Line, when: dict[str, Any]) -> None:
    assert alice.ask("remind", body="when?", **when)["code"] == "bad_request"


def test_reminders_have_a_limit(folder: Path) -> None:
    with Hive(folder, limits={"reminders": 2}) as hive, hive.spawn("alice").agent("alice") as alice:
        first, _ = (alice.ask("remind", body="x", delay_s=3600)["id"] for _ in "12")
        assert alice.ask("remind", body="x", delay_s=3600)["code"] == "too_many"
        alice.ask("cancel", reminder=first)
        assert alice.ask("remind", body="x", delay_s=3600)["ok"]


def test_what_came_due_while_the_daemon_was_down_fires_once(folder: Path) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice")
        with hive.agent("alice") as alice:
            alice.ask("remind", body="reminder", delay_s=1)
            alice.ask("ask", question="In time?", ttl_s=1)
        schedule = {"to": "alice", "body": "schedule", "first": in_seconds(1), "every_s": 60}
        assert hive.api("POST", "/api/schedules", schedule).status == 200
        hive.stop()
        wait_for(lambda: in_seconds(0) > schedule["first"], "the moment when all is due")
        hive.start()
        missed = {**schedule, "body": "missed", "first": in_seconds(-150)}  # as if down for three times of it
        assert hive.api("POST", "/api/schedules", missed).status == 200
        with hive.agent("alice") as alice:
            mail: list[dict[str, Any]] = []
            wait_for(lambda: mail.extend(lease(alice, wait_s=0.2)) or len(mail) >= 4, "what was due")
            assert lease(alice, wait_s=1) == []
        assert sorted(row["body"].split()[0] for row in mail) == ["Question", "missed", "reminder", "schedule"]
        later = {row["body"]: row["next"] for row in hive.ask(cmd="schedules")["schedules"]}
        assert set(later) == {"missed", "schedule"}
        assert all(datetime.fromisoformat(at) > datetime.now(UTC) for at in later.values())


def test_a_schedule_writes_to_one_or_to_all_until_it_is_cancelled(folder: Path) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice", "bob")
        assert hive.api("POST", "/api/schedules", {"to": "*", "body": "stand up", "first": in_seconds(0)}).status == 200
        with hive.agent("alice") as alice, hive.agent("bob") as bob:
            got = [*lease(alice), *lease(bob)]
        assert [(row["kind"], row["body"]) for row in got] == [("schedule", "stand up")] * 2
        later = {"to": "alice", "body": "later", "first": in_seconds(3600), "every_s": 3600}
        number = hive.api("POST", "/api/schedules", later).body["id"]
        assert [row["id"] for row in hive.ask(cmd="schedules")["schedules"] if "next" in row] == [number]
        assert [hive.api("POST", f"/api/schedules/{number}/cancel", {}).status for _ in range(2)] == [200, 404]
        assert all("next" not in row for row in hive.ask(cmd="schedules")["schedules"])


# ── agents that go and come ──


def test_mail_for_a_destroyed_agent_waits_for_its_return(folder: Path) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice", "bob")
        with hive.agent("alice") as alice:
            (before,) = send(alice, "bob", "before")
            assert hive.ask(cmd="destroy", name="bob")["ok"]
            (after,) = send(alice, "bob", "after")
            assert alice.ask("send", to="*", body="who is there?")["code"] == "not_found"
        assert [message(hive, number)["state"] for number in (before, after)] == ["queued", "queued"]
        hive.spawn("bob", running=True)
        wait_for(lambda: message(hive, after)["state"] == "acked", "bob to read his mail")
        assert message(hive, before)["state"] == "acked"


def test_a_purge_closes_the_mail_and_a_namesake_begins_with_nothing(folder: Path) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice", "bob")
        with hive.agent("alice") as alice, hive.agent("bob") as bob:
            number, in_hand = send(alice, "bob", "waits", "is leased")
            assert len(lease(bob, max=1)) == 1
            asked = alice.ask("ask", question="Are you there?", to="bob")["id"]
            bob.ask("remind", body="from an earlier life", delay_s=0.5)
            (hive.state / "agents/bob/state/notes.md").write_text("remember")
            assert hive.ask(cmd="destroy", name="bob", purge=True)["ok"]
            assert lease(alice)[0]["data"]["outcome"] == "cancelled"
            assert question(hive, asked)["status"] == "cancelled"
            assert alice.ask("send", to="bob", body="still there?")["code"] == "unknown_agent"
        assert [message(hive, each)["state"] for each in (number, in_hand)] == ["closed", "closed"]
        assert not (hive.state / "agents/bob").exists() and not (hive.state / "applied/bob").exists()
        hive.spawn("bob")
        with hive.agent("bob") as bob:
            assert lease(bob, wait_s=1) == []
        assert hive.ask(cmd="rollback", name="bob")["code"] == "not_found"


def test_a_namesake_is_not_given_what_was_set_aside(folder: Path) -> None:
    with Hive(folder, limits={"attempts": 1}) as hive:
        hive.spawn("alice", "bob")
        with hive.agent("alice") as alice, hive.agent("bob") as bob:
            (number,) = send(alice, "bob", "poison")
            lease(bob)
            bob.ask("nack", ids=[number], reason="it failed")
        assert message(hive, number)["state"] == "dead"
        assert hive.ask(cmd="destroy", name="bob", purge=True)["ok"]
        hive.spawn("bob")
        assert message(hive, number)["state"] == "closed"
        assert hive.api("POST", f"/api/messages/{number}/give_again", {}).status == 409


# ── names and ports ──


def by_shifts(text: str) -> int:
    """FNV-1a as it is often written: the prime 2^24 + 2^8 + 0x93 by shifts instead of a product."""
    value = 2166136261
    for byte in text.encode():
        value ^= byte
        value = sum(value << shift for shift in (0, 1, 4, 7, 8, 24)) % 2**32
    return value


@given(st.text())
def test_the_hash_of_names_is_fnv_1a(text: str) -> None:
    assert hyperhive.fnv1a32(text) == by_shifts(text)


@pytest.mark.parametrize(("text", "value"), [("", 0x811C9DC5), ("a", 0xE40C292C), ("foobar", 0xBF9CF968)])
def test_the_hash_of_names_is_as_published(text: str, value: int) -> None:
    assert hyperhive.fnv1a32(text) == value


def colliding(port_of: Callable[[str], int]) -> tuple[str, str]:
    """Two names whose pages would have the same port."""
    seen: dict[int, str] = {}
    for number in range(2000):
        name = f"a{number}"
        if port_of(name) in seen:
            return seen[port_of(name)], name
        seen[port_of(name)] = name
    raise AssertionError("two thousand names and nine hundred ports, but no two the same?")


def test_a_port_that_is_taken_is_found_before_anything_is_made(hive: Hive) -> None:
    def port_of(name: str) -> int:
        return int(hive.settings["agent_port_base"]) + by_shifts(name) % 900

    first, second = colliding(port_of)
    hive.spawn(first)
    assert agent_row(hive, first)["port"] == port_of(first)
    for kept in (False, True):
        if kept:
            hive.ask(cmd="destroy", name=first)
        for verb in ("spawn", "request_spawn"):
            refused = hive.ask(cmd=verb, name=second)
            assert refused["code"] == "port_taken" and f"'{first}'" in refused["error"]
    assert not (hive.state / "agents" / second).exists()
    proposed = refused["hint"].rpartition(": ")[2].split(", ")
    assert len(proposed) == 3
    hive.spawn(*proposed)
