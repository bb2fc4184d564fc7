"""Whoever is killed, whenever: mail is neither lost nor doubled, the session goes on, and nothing is left running."""

import json
import os
import random
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import psutil
import pytest
from conftest import CLAUDE
from fakes.harness import rehearse
from fakes.messages_api import Api
from hive import Hive, end, is_alive, processes_of, wait_for

LIMITS = {"crashes": 10_000, "attempts": 10_000, "messages_per_minute": 0}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERHIVE_REHEARSAL_SPEED", "0")
    monkeypatch.setenv("HYPERHIVE_BACKOFF_S", "0.05")


@pytest.fixture
def seed() -> int:
    """Of all that happens by chance in a test; shown when it fails."""
    number = random.randrange(10**6)
    print(f"seed {number}")
    return number


class Trial:
    """A hive with one agent, mail for it, and blows."""

    def __init__(self, hive: Hive, seed: int) -> None:
        self.hive, self.chance = hive, random.Random(seed)
        self.sent: list[int] = []
        self.state = hive.state / "agents/alice/state"

    def send(self, body: str) -> None:
        self.sent.append(self.hive.ask(cmd="send", to="alice", body=body)["id"])

    def settled(self) -> bool:
        messages = self.hive.api("GET", "/api/messages?with=alice&max=1000").body["messages"]
        states = {message["id"]: message["state"] for message in messages}
        return all(states[one] == "acked" for one in self.sent)

    def turns(self) -> int:
        with closing(sqlite3.connect(f"file:{self.state / 'hyperhive-events.sqlite'}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT count(DISTINCT turn) FROM events WHERE kind = 'turn_start'").fetchone()[0])

    def session(self) -> str:
        return str(json.loads((self.state / "session.json").read_text())["session"])

    def strike(self) -> str:
        """One of the three gets one of two signals; a daemon is there again at once. Says who got which."""
        how = self.chance.choice([SIGTERM, SIGKILL])
        who = self.chance.choice(["harness", "claude", "claude", "daemon"])
        if who == "daemon":
            (self.hive.kill if how == SIGKILL else self.hive.stop)()
            self.hive.start()
        for process in {"harness": self.harness, "claude": self.claude, "daemon": list}[who]():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(how)
        return f"{how.name} {who}"

    def harness(self) -> list[psutil.Process]:
        note = self.hive.run / "processes/alice.json"
        with suppress(FileNotFoundError, psutil.NoSuchProcess):
            return [psutil.Process(json.loads(note.read_text())["pid"])]
        return []

    def claude(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):  # a harness that was struck may end while we look
            return [one for harness in self.harness() for one in harness.children()]
        return []


def survive(trial: Trial, order: Callable[[int], str], turns: int) -> str:
    """So many turns under blows, at random moments, until all of the mail is done. Returns the session, the first."""
    trial.send(order(0))
    wait_for(trial.settled, "the first turn", timeout_s=30)
    session, struck = trial.session(), Counter[str]()
    while trial.turns() < turns:
        trial.send(order(len(trial.sent)))
        time.sleep(trial.chance.random() * 0.5)  # into the turn, into its tool, or into the turn after it
        if trial.chance.random() < 0.25:
            struck[trial.strike()] += 1
        if trial.chance.random() < 0.5:
            wait_for(trial.settled, "the mail so far", timeout_s=60)
    wait_for(trial.settled, "all of the mail", timeout_s=60)
    print(f"{trial.turns()} turns, {len(trial.sent)} messages, {dict(struck)}")
    assert trial.session() == session
    trial.hive.stop()
    wait_for(lambda: not processes_of(trial.hive.folder), "the end of all of it")
    return session


def numbers_in(texts: list[str]) -> Counter[int]:
    return Counter(int(number) for text in texts for number in re.findall(r"^\[message (\d+) from", text, re.MULTILINE))


@pytest.mark.timeout(400)
def test_a_hundred_turns_under_blows(folder: Path, seed: int) -> None:
    with Hive(folder, limits=LIMITS) as hive:
        trial = Trial(hive.spawn("alice", running=True), seed)
        done = folder / "done"

        def order(number: int) -> str:
            return rehearse({"tool": "Bash", "input": {"command": f"sleep 0.2; echo {number} >> {done}"}})

        session = survive(trial, order, 100)
        (transcript,) = (hive.state / "agents/alice/claude/projects/rehearsal").iterdir()
        assert transcript.stem == session
        said = [json.loads(line)["message"]["content"] for line in transcript.read_text().splitlines()]
        assert numbers_in(said) == Counter(trial.sent)
        assert set(map(int, done.read_text().split())) == set(range(len(trial.sent)))
        hive.start()


@pytest.mark.needs("claude")
@pytest.mark.timeout(400)
def test_a_hundred_turns_of_the_real_claude_under_blows(folder: Path, seed: int) -> None:
    api = Api().start()
    settings = {"ANTHROPIC_API_KEY": "dummy", "ANTHROPIC_BASE_URL": api.url, "CLAUDE_CODE_MAX_RETRIES": "1"}
    (folder / "environment").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    try:
        with Hive(folder, limits=LIMITS, environment_file=str(folder / "environment")) as hive:
            hive.stop()
            hive.configure(claude=str(CLAUDE), rehearsal=False)
            trial = Trial(hive.start().spawn("alice", running=True), seed)
            session = survive(trial, order, 100)
            hive.start()
            trial.send("And that was all.")
            wait_for(trial.settled, "a last turn", timeout_s=30)
            (transcript,) = hive.state.glob("agents/alice/claude/projects/*/*.jsonl")
            assert transcript.stem == session
            assert numbers_in(heard(api)) == Counter(trial.sent)
    finally:
        api.stop()


def order(number: int) -> str:
    bash: dict[str, Any] = {"command": f"sleep 0.3; echo {number}", "description": "A command"}
    return "SCRIPT:" + json.dumps([{"tools": [{"name": "Bash", "input": bash}]}, {"text": "Done."}])


def heard(api: Api) -> list[str]:
    """All that the model was told in its last request: the conversation as it stands. Mail of a turn is `system`."""
    contents = [message["content"] for message in api.requests[-1]["messages"] if message["role"] != "assistant"]
    return [text for content in contents for text in plain(content)]


def plain(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


# ── in the middle of what the operator wants ──


def is_audited(hive: Hive, what: str) -> bool:
    return any(row["what"] == what for row in hive.api("GET", "/api/audit").body["audit"])


def killed_during(hive: Hive, agent: str, **request: Any) -> None:
    """The daemon, while it waits for the end of a harness that does not hear."""
    (harness,) = Trial(hive, 0).harness()
    harness.suspend()

    def ask() -> None:
        with suppress(AssertionError, OSError):
            hive.ask(**request, name=agent)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: is_audited(hive, request["cmd"]), f"the {request['cmd']} to begin")
    hive.kill()
    asking.join()
    hive.start()


def state_of(hive: Hive, name: str) -> str:
    return next((row["state"] for row in hive.ask(cmd="agents")["agents"] if row["name"] == name), "")


def test_a_restart_that_the_daemon_did_not_live_to_end_leaves_no_agent_behind(folder: Path) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice", running=True)
        killed_during(hive, "alice", cmd="restart")
        end(Trial(hive, 0).harness())
        wait_for(lambda: state_of(hive, "alice") == "idle", "alice to run again")


def test_what_was_being_destroyed_goes_with_the_next_daemon(folder: Path) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice", running=True)
        (harness,) = Trial(hive, 0).harness()
        killed_during(hive, "alice", cmd="destroy", purge=False)
        wait_for(lambda: not is_alive(harness), "the end of the harness", timeout_s=60)
        wait_for(lambda: not hive.ask(cmd="destroy", name="alice")["ok"], "the end of all of it")
        assert hive.ask(cmd="destroy", name="alice")["code"] == "unknown_agent"


# ── deploys in trouble ──


def deployed(hive: Hive, deploy: int) -> dict[str, Any]:
    def over() -> Any:
        row = hive.ask(cmd="deploys", id=deploy)["deploys"][0]
        return row if row["phase"] in ("deployed", "failed") else None

    row: dict[str, Any] = wait_for(over, f"the end of deploy {deploy}", timeout_s=60)
    return row


def test_a_failure_that_could_not_be_stored_is_stored_later(folder: Path) -> None:
    """While it is not, the agent could be neither started nor destroyed."""
    key = folder / "environment"
    key.write_text("")
    with Hive(folder, environment_file=str(key)) as hive:
        hive.spawn("alice", running=True)
        key.unlink()
        os.mkfifo(key)
        deploy = hive.ask(cmd="rebuild", name="alice")["deploy"]
        with key.open("wb") as pipe, closing(sqlite3.connect(hive.state / "hive.sqlite")) as database:
            database.execute("BEGIN IMMEDIATE")  # as if the disk were full
            pipe.write(b"\xff")
            pipe.close()
            wait_for(lambda: "trying it again" in hive.log.read_text(), "a try in vain", timeout_s=60)
        assert "environment can't be passed on" in deployed(hive, deploy)["error"]
        key.unlink()
        key.write_text("")
        assert hive.ask(cmd="restart", name="alice")["ok"]


def test_a_commit_that_can_not_be_marked_is_switched_back_and_a_killed_gits_lock_goes(folder: Path) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice", running=True)
        lock = hive.state / "applied/alice/refs/heads/main.lock"
        lock.touch()
        row = deployed(hive, hive.ask(cmd="rebuild", name="alice")["deploy"])
        assert row["phase"] == "failed" and "main.lock" in row["error"]
        assert any("falling back" in line for line in row["log"])
        wait_for(lambda: state_of(hive, "alice") == "idle", "what ran before")
        hive.kill()
        hive.start()
        assert deployed(hive, hive.ask(cmd="rebuild", name="alice")["deploy"])["phase"] == "deployed"
