"""Turns between the daemon and real harnesses: budgets, pauses, the keyboard, history, and what the manager hears."""

import base64
import http.client
import json
import os
import signal
import sqlite3
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes.harness import rehearse
from hive import HYPERHIVE, Answer, Hive, is_alive, listens, processes_of, wait_for

import harness


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERHIVE_REHEARSAL_SPEED", "0")
    monkeypatch.setenv("HYPERHIVE_BACKOFF_S", "0.2")


@contextmanager
def crewed(folder: Path, *names: str, **settings: Any) -> Iterator[Hive]:
    with Hive(folder, **settings) as hive:
        yield hive.spawn(*names, running=True)


def row(hive: Hive, name: str = "alice") -> dict[str, Any]:
    return dict(hive.api("GET", f"/api/agents/{name}").body["agent"])


def turn(hive: Hive, *steps: Any, to: str = "alice") -> None:
    """Mail that makes one turn, and wait for its end."""
    message = hive.ask(cmd="send", to=to, body=rehearse(*steps))["id"]
    wait_for(lambda: acked(hive, message), f"message {message} to be acknowledged")


def acked(hive: Hive, message: int) -> bool:
    messages = hive.api("GET", "/api/messages?max=1000").body["messages"]
    return {one["id"]: one["state"] for one in messages}.get(message) == "acked"


def told(hive: Hive, kind: str, to: str = "operator") -> list[str]:
    messages = hive.api("GET", "/api/messages?max=1000").body["messages"]
    return [one["body"] for one in messages if one.get("kind") == kind and one["to"] == to]


def audited(hive: Hive, what: str) -> list[tuple[str, str]]:
    rows = hive.api("GET", "/api/audit?max=1000").body["audit"]
    return [(one["who"], one["subject"]) for one in reversed(rows) if one["what"] == what]


def at_page(hive: Hive, method: str, path: str, body: Any = None, name: str = "alice") -> Answer:
    """A request to an agent's own page, with its own token."""
    url = urllib.parse.urlsplit(row(hive, name)["url"])
    wait_for(lambda: listens(url.port or 0), f"the page of {name}")
    headers = {"Authorization": "Bearer " + url.fragment.removeprefix("token="), "Content-Type": "application/json"}
    with closing(http.client.HTTPConnection(url.netloc, timeout=20)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, json.loads(answer.read()))


# ── budgets ──


def test_a_budget_tells_at_eighty_percent_and_pauses_at_its_end(folder: Path) -> None:
    with crewed(folder, "alice", "bob", daily_budget_usd=1.0) as hive:
        turn(hive, {"cost": 0.5})
        assert not told(hive, "budget_near")
        wait_for(lambda: at_page(hive, "GET", "/api/state").body["agent"]["cost_today_usd"] == 0.5, "the sum")
        assert at_page(hive, "GET", "/api/state").body["agent"]["daily_budget_usd"] == 1.0
        turn(hive, {"cost": 0.35})
        wait_for(lambda: told(hive, "budget_near"), "the warning")
        turn(hive, {"cost": 0.05})
        turn(hive, {"cost": 0.2})
        wait_for(lambda: row(hive)["paused"], "the pause")
        assert len(told(hive, "budget_near")) == len(told(hive, "budget_reached")) == 1
        alice = row(hive)
        assert alice["state"] == "paused" and "its budget is $1.00" in alice["state_reason"]
        assert alice["paused_by"] == "system" and not row(hive, "bob")["paused"]
        assert audited(hive, "pause") == [("system", "alice")]
        assert "budget" in [worry["kind"] for worry in hive.api("GET", "/api/state").body["attention"]]


def test_a_resume_by_hand_grants_as_much_again(folder: Path) -> None:
    with crewed(folder, "alice", daily_budget_usd=1.0) as hive:
        turn(hive, {"cost": 1.5})
        wait_for(lambda: row(hive)["paused"], "the pause")
        hive.ask(cmd="set_paused", name="alice", paused=False)
        turn(hive, {"cost": 0.25})
        assert not row(hive)["paused"]
        wait_for(lambda: "state_reason" not in row(hive), "the reason to be gone")
        turn(hive, {"cost": 0.5})
        wait_for(lambda: row(hive)["paused"], "the second pause")


def test_the_budget_of_the_hive_pauses_everyone_and_a_new_day_resumes_them(folder: Path) -> None:
    with crewed(folder, "alice", "bob", hive_daily_budget_usd=1.0) as hive:
        hive.ask(cmd="set_paused", name="bob", paused=True)
        turn(hive, {"cost": 2})
        wait_for(lambda: row(hive)["paused"], "the pause")
        assert hive.api("GET", "/api/state").body["usage"] == {"today_usd": 2.0, "budget_usd": 1.0}
        assert told(hive, "budget_reached")[0].startswith("The hive has spent $2.00 today")
        hive.stop()
        with closing(sqlite3.connect(hive.state / "hive.sqlite")) as db, db:
            db.execute("UPDATE agents SET budget_day = '2020-01-31' WHERE budget_day IS NOT NULL")
        hive.start()
        wait_for(lambda: not row(hive)["paused"], "the new day")
        assert row(hive, "bob")["paused"]  # by the operator: no day ends that


# ── pauses, models and troubles ──


def test_an_agents_page_pauses_and_lets_go_only_what_it_paused(folder: Path) -> None:
    with crewed(folder, "alice") as hive:
        assert at_page(hive, "POST", "/api/pause", {}).status == 200
        wait_for(lambda: row(hive)["state"] == "paused", "the pause")
        wait_for(lambda: at_page(hive, "GET", "/api/state").body["agent"]["paused"], "the page to hear of it")
        assert at_page(hive, "POST", "/api/resume", {}).status == 200
        wait_for(lambda: row(hive)["state"] == "idle", "the resume")
        hive.ask(cmd="set_paused", name="alice", paused=True)
        refused = at_page(hive, "POST", "/api/resume", {})
        assert refused.status == 403 and refused.body["code"] == "forbidden" and "dashboard" in refused.body["hint"]
        assert ("alice (page)", "alice") in audited(hive, "pause") + audited(hive, "resume")


def test_a_model_chosen_at_the_page_survives_a_restart(folder: Path) -> None:
    with crewed(folder, "alice") as hive:
        turn(hive, {"text": "one"})
        assert at_page(hive, "POST", "/api/model", {"model": "other-1"}).status == 200
        turn(hive, {"text": "two"})
        wait_for(lambda: row(hive).get("active_model") == "rehearsal (other-1)", "the model")
        hive.ask(cmd="restart", name="alice")
        turn(hive, {"text": "three"})
        # The host may still tell what it heard before, the new harness can't.
        assert at_page(hive, "GET", "/api/state").body["agent"]["active_model"] == "rehearsal (other-1)"
        wait_for(lambda: row(hive).get("active_model") == "rehearsal (other-1)", "the model after a restart")
        assert audited(hive, "set_model") == [("alice (page)", "alice")]


def test_the_manager_is_told_of_a_trouble_once(folder: Path) -> None:
    with crewed(folder, "manager", "alice") as hive:
        message = hive.ask(cmd="send", to="alice", body=rehearse({"fail": "server_error"}))["id"]
        wait_for(lambda: [who for who, _ in audited(hive, "state_rate_limited")].count("alice") >= 3, "three tries")
        assert len(told(hive, "rate_limited", "manager")) == 1
        hive.ask(cmd="set_paused", name="alice", paused=True)
        wait_for(lambda: row(hive)["state"] == "paused", "the pause", timeout_s=30)
        with closing(sqlite3.connect(hive.state / "hive.sqlite")) as db, db:
            db.execute("UPDATE messages SET state = 'acked' WHERE id = ?", (message,))
        hive.ask(cmd="set_paused", name="alice", paused=False)
        turn(hive, {"text": "well again"})
        hive.ask(cmd="send", to="alice", body=rehearse({"fail": "rate_limit", "resets_in_s": 3600}))
        wait_for(lambda: len(told(hive, "rate_limited", "manager")) == 2, "word of the next trouble")


def test_a_resume_ends_the_wait_of_an_agent_that_is_not_paused(folder: Path) -> None:
    with crewed(folder, "alice", wait_for_limit=False) as hive:
        hive.ask(cmd="send", to="alice", body=rehearse({"fail": "rate_limit", "resets_in_s": 0.5}))
        wait_for(lambda: row(hive)["state"] == "rate_limited", "the limit")
        time.sleep(2)
        assert row(hive)["state"] == "rate_limited" and "until" not in row(hive)
        assert "It resets at 2" in row(hive)["state_reason"]
        since = row(hive)["state_since"]
        hive.ask(cmd="set_paused", name="alice", paused=False)
        wait_for(lambda: row(hive)["state_since"] != since, "another try")


def test_the_end_of_a_sign_in_is_told_before_it_comes(folder: Path) -> None:
    with crewed(folder, "alice") as hive:
        file = hive.state / "agents/alice/claude/.credentials.json"
        soon = int(time.time() + 3600) * 1000
        file.write_text(json.dumps({"claudeAiOauth": {"accessToken": "secret-1", "expiresAt": soon}}))
        turn(hive, {"text": "one"})
        wait_for(lambda: "signed_in_until" in row(hive), "the time")
        worries = [worry["key"] for worry in hive.api("GET", "/api/state").body["attention"]]
        assert "sign_in_ends-alice" in worries
        tokens = {"accessToken": "secret-1", "refreshToken": "secret-2", "expiresAt": soon}
        file.write_text(json.dumps({"claudeAiOauth": tokens}))
        turn(hive, {"text": "two"})
        wait_for(lambda: row(hive).get("signed_in_renews"), "word that it renews itself")
        worries = [worry["key"] for worry in hive.api("GET", "/api/state").body["attention"]]
        assert "sign_in_ends-alice" not in worries
    for path in (hive.state / "hive.sqlite", hive.state / "agents/alice/state/hyperhive-events.sqlite", hive.log):
        assert b"secret-" not in path.read_bytes()


# ── the transcript ──


@contextmanager
def following(hive: Hive, name: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The changes on the live stream of an agent's view."""
    connection = http.client.HTTPConnection("127.0.0.1", hive.port, timeout=30)
    with closing(connection):
        connection.request("GET", f"/api/stream?agent={name}", headers={"Authorization": f"Bearer {hive.token}"})
        with connection.getresponse() as answer:
            yield (json.loads(line[6:]) for line in answer if line.startswith(b"data: "))


def test_text_reaches_the_dashboard_while_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERHIVE_REHEARSAL_SPEED", "0.5")
    with crewed(folder, "alice") as hive, following(hive, "alice") as changes:
        next(changes)  # the snapshot
        hive.ask(cmd="send", to="alice", body=rehearse({"text": "one two three " + "and so on " * 600}))
        events = (event for change in changes for event in change.get("events", []))
        partial = next(event for event in events if event["kind"] == "partial")
        assert partial["id"] == 0 and "one two three".startswith(partial["data"]["text"][:7])
    assert "partial" not in {event["kind"] for event in stored_events(hive)}


def stored_events(hive: Hive) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(hive.state / "hive.sqlite")) as db:
        return [{"id": id, "kind": kind} for id, kind in db.execute("SELECT id, kind FROM events ORDER BY id")]


def test_a_hundred_thousand_events_are_paged_through_from_the_dashboard(folder: Path) -> None:
    many, said = 100_000, "x" * 1500
    with crewed(folder, "alice") as hive:
        hive.ask(cmd="stop", scope={"agent_names": ["alice"]})
        with closing(sqlite3.connect(hive.state / "agents/alice/state/hyperhive-events.sqlite")) as db, db:
            event = (int(time.time() * 1000), 1, "text", json.dumps({"text": said}))
            db.executemany("INSERT INTO events(at_ms, turn, kind, json) VALUES(?, ?, ?, ?)", [event] * many)
        hive.ask(cmd="start", scope={"agent_names": ["alice"]})
        wait_for(lambda: any(one["id"] >= many for one in stored_events(hive)), "the newest events", timeout_s=30)
        kept = stored_events(hive)
        assert len(kept) <= 2000 and kept[0]["id"] > many - 2000
        with following(hive, "alice") as changes:
            next(changes)
            before = kept[0]["id"]
            for page in range(3):
                answer = hive.api("GET", f"/api/agents/alice/events?before={before}&max=1000").body
                assert answer == {"events": [], "rest": {"before": before, "asked": True}}
                got, _ = history(changes, before)
                assert got == list(range(before - 1000, before)), page
                before = got[0]
        opened = at_page(hive, "GET", "/api/state").body
        assert len(opened["events"]) == 300
        older = at_page(hive, "GET", "/api/events?before=50000&max=1000").body["events"]
        assert [event["id"] for event in older] == list(range(49_000, 50_000))


def history(changes: Iterator[dict[str, Any]], before: int) -> tuple[list[int], dict[str, Any]]:
    """The ids of the events that were asked for, and what is told at their end.

    The stream may still bring some that were new a moment ago: those are not below `before`.
    """
    got: list[int] = []
    for event in (event for change in changes for event in change.get("events", [])):
        if event["kind"] == "history":
            return got, event["data"]
        if event["id"] < before:
            got.append(event["id"])
    raise AssertionError("the stream ended")


def test_words_are_found_at_the_host_and_beyond(folder: Path) -> None:
    said = ["a needle", "plain", 'the "Needle" of 100%', "no_thing", "é", *["hay"] * 2500, "Needle at last"]
    with crewed(folder, "alice") as hive:
        hive.ask(cmd="stop", scope={"agent_names": ["alice"]})
        with closing(sqlite3.connect(hive.state / "agents/alice/state/hyperhive-events.sqlite")) as db, db:
            first = db.execute("SELECT coalesce(max(id), 0) + 1 FROM events").fetchone()[0]
            texts = [json.dumps({"text": text}, ensure_ascii=False) for text in said]
            rows = [(int(time.time() * 1000), 1, "text", text) for text in texts]
            db.executemany("INSERT INTO events(at_ms, turn, kind, json) VALUES(?, ?, ?, ?)", rows)
        last = first + len(said) - 1
        hive.ask(cmd="start", scope={"agent_names": ["alice"]})
        wait_for(lambda: any(one["id"] >= last for one in stored_events(hive)), "the newest events", timeout_s=30)
        with following(hive, "alice") as changes:
            next(changes)
            for words, here, beyond in [
                ("needle", [last], [first, first + 2]),
                ('"needle" OF 100%', [], [first + 2]),
                ("no_t", [], [first + 3]),
                ("é", [], [first + 4]),
                ("nowhere", [], []),
            ]:
                find = f"max=100&find={urllib.parse.quote(words)}"
                answer = hive.api("GET", f"/api/agents/alice/events?{find}").body
                assert [event["id"] for event in answer["events"]] == here, words
                assert answer["rest"] == {"before": stored_events(hive)[0]["id"], "asked": True}
                got, end = history(changes, answer["rest"]["before"])
                assert (got, end["count"], end["find"]) == (beyond, len(beyond), words)
                own = at_page(hive, "GET", f"/api/events?{find}").body["events"]
                assert [event["id"] for event in own] == [*beyond, *here], words
        hive.ask(cmd="stop", scope={"agent_names": ["alice"]})
        answer = hive.api("GET", "/api/agents/alice/events?max=100&find=needle").body
        assert len(answer["events"]) == 1 and answer["rest"]["asked"] is False


def test_pictures_are_kept_while_they_are_small(folder: Path) -> None:
    small = base64.b64encode(os.urandom(600)).decode()
    with crewed(folder, "alice") as hive:
        turn(hive, {"pictures": [{"media_type": kind, "data": small} for kind in ("image/png", "image/tiff")]})
        events = at_page(hive, "GET", "/api/state").body["events"]
        result = next(event["data"] for event in events if event["kind"] == "tool_result")
        assert result["images"] == 2 and result["pictures"] == [{"type": "image/png", "data": small}]
    source = {"media_type": "image/png", "data": "A" * 100_000}
    images = [harness.Fields({"source": source}, "an image") for _ in range(3)]
    assert len(harness.small_pictures(images)) == 1


# ── the keyboard ──


@contextmanager
def attached(hive: Hive, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The command line, with pipes where a person has a terminal; until the loop holds still."""
    argv = [*HYPERHIVE, "--dir", str(hive.folder), "attach", "alice", *options]
    with subprocess.Popen(argv, stdin=-1, stdout=-1, stderr=-1, text=True) as command:
        try:
            yield command
        finally:
            command.kill()


def interactive(hive: Hive) -> list[psutil.Process]:
    """The Claude at the keyboard: a rehearsal that is not driven by the stream."""
    found = []
    for process in processes_of(hive.folder):
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if "rehearsal" in words and "-p" not in words and "--append-system-prompt-file" in " ".join(words):
                found.append(process)
    return found


def test_somebody_at_the_keyboard_has_the_session_for_themselves(folder: Path) -> None:
    with crewed(folder, "alice") as hive:
        turn(hive, {"text": "one"})
        session = json.loads((hive.state / "agents/alice/state/session.json").read_text())["session"]
        with attached(hive) as command:
            assert command.stdin and command.stdout
            assert session in command.stdout.readline()
            assert [f"--resume={session}" in one.cmdline() for one in interactive(hive)] == [True]
            assert row(hive)["state"] == "paused" and row(hive)["attached"]
            assert "keyboard" in row(hive)["state_reason"]
            message = hive.ask(cmd="send", to="alice", body=rehearse({"text": "two"}))["id"]
            second = hive.cli("attach", "alice")
            assert second.returncode == 1 and "already" in second.stderr
            time.sleep(1)
            assert not acked(hive, message)
            command.stdin.close()
            assert command.wait(20) == 0
        wait_for(lambda: acked(hive, message), "the loop to go on")
        assert "attached" not in row(hive)
        assert json.loads((hive.state / "agents/alice/state/session.json").read_text())["session"] == session
        who = f"operator (host.sock, uid {os.getuid()})"
        assert audited(hive, "attach") == audited(hive, "detach") == [(who, "alice")]


@pytest.mark.parametrize("said", [True, False])
def test_a_session_that_began_at_the_keyboard_is_gone_on_with(folder: Path, said: bool) -> None:
    with crewed(folder, "alice") as hive:
        home = hive.state / "agents/alice"
        with attached(hive) as command:
            assert command.stdin and command.stdout and command.stdout.readline()
            session = json.loads((home / "state/session.json").read_text())["session"]
            assert [f"--session-id={session}" in one.cmdline() for one in interactive(hive)] == [True]
            if said:
                transcript = home / f"claude/projects/rehearsal/{session}.jsonl"
                transcript.parent.mkdir(parents=True)
                transcript.touch()
            command.stdin.close()
            assert command.wait(20) == 0
        turn(hive, {"text": "one"})
        after = json.loads((home / "state/session.json").read_text())["session"]
        assert (after == session) is said


def test_a_turn_is_waited_for_or_interrupted(folder: Path) -> None:
    with crewed(folder, "alice") as hive:
        hive.ask(cmd="send", to="alice", body=rehearse({"sleep": 300}))
        wait_for(lambda: row(hive)["state"] == "working", "the turn")
        with attached(hive) as command:
            time.sleep(1)
            assert command.poll() is None and not interactive(hive)
            command.kill()
        wait_for(lambda: "attached" not in row(hive), "the end of waiting")
        with attached(hive, "--now") as command:
            assert command.stdout and "rehearsal of session" in command.stdout.readline()


@pytest.mark.parametrize("who", ["command", "claude", "daemon"])
def test_the_loop_goes_on_however_the_keyboard_is_left(folder: Path, who: str) -> None:
    with crewed(folder, "alice") as hive:
        turn(hive, {"text": "one"})
        with attached(hive) as command:
            assert command.stdout and command.stdout.readline()
            (claude,) = interactive(hive)
            if who == "command":
                command.kill()
            elif who == "claude":
                claude.send_signal(signal.SIGKILL)
            else:
                hive.kill()
                hive.start()
            wait_for(lambda: not is_alive(claude), "the end of the Claude at the keyboard")
            turn(hive, {"text": "two"})
