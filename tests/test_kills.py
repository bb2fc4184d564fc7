"""Whoever is killed, whenever: mail is neither lost nor doubled, the session goes on, and nothing is left running."""

import json
import random
import re
import sqlite3
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
from hive import Hive, processes_of, wait_for

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
        with closing(sqlite3.connect(self.state / "hyperhive-events.sqlite")) as db:
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
        return [one for harness in self.harness() for one in harness.children()]


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
    assert not processes_of(trial.hive.folder)
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
