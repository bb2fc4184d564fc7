"""Durability: what was answered survives `kill -9`, of the daemon and of a harness, at any moment."""

import json
import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hive import Hive, Line, wait_for

KILLS = 60
SEED = int(os.environ.get("SEED", "7"))


def message(hive: Hive, number: int) -> dict[str, Any]:
    return dict(hive.api("GET", f"/api/messages?before={number + 1}&max=1").body["messages"][0])


class Client(threading.Thread):
    """One who speaks at an agent's socket, connects again when that breaks, and asks again what was not answered."""

    def __init__(self, hive: Hive, name: str, seed: int) -> None:
        super().__init__(name=f"{type(self).__name__}-{name}")
        self.hive, self.agent, self.chance = hive, name, random.Random(seed)
        self.over = threading.Event()
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.over.is_set():
                with suppress(OSError, ConnectionError), self.hive.agent(self.agent) as line:
                    self.work(line)
                time.sleep(0.01)
        except BaseException as problem:
            self.problem = problem

    def work(self, line: Line) -> None:
        raise NotImplementedError

    @staticmethod
    def ask(line: Line, cmd: str, **fields: Any) -> dict[str, Any]:
        line.write(json.dumps({"cmd": cmd, **fields}).encode() + b"\n")
        answer = line.read()
        if answer is None:
            raise ConnectionResetError
        assert answer["ok"], answer
        return answer


class Sender(Client):
    """Sends numbered texts, each until it is answered."""

    def __init__(self, hive: Hive, name: str, to: str, seed: int) -> None:
        super().__init__(hive, name, seed)
        self.to, self.texts = to, dict[str, int]()

    def work(self, line: Line) -> None:
        while not self.over.is_set():
            text = f"{self.agent}-{self.ident}-{len(self.texts)}"
            self.texts[text] = self.ask(line, "send", to=self.to, body=text, client_id=text)["id"]
            time.sleep(self.chance.random() * 0.02)


class Receiver(Client):
    """Takes mail and acknowledges it, or gives some of it back."""

    def __init__(self, hive: Hive, name: str, seed: int) -> None:
        super().__init__(hive, name, seed)
        self.seen = dict[int, str]()
        self.done = set[int]()  # acknowledged, and that was answered

    def work(self, line: Line) -> None:
        while not self.over.is_set():
            mail = self.ask(line, "lease", max=self.chance.randint(1, 20), wait_s=0.5)["messages"]
            assert self.done.isdisjoint(row["id"] for row in mail), "what was acknowledged came again"
            self.seen.update({row["id"]: row["body"] for row in mail})
            kept = [row for row in mail if self.chance.random() > 0.1]
            returned = [row["id"] for row in mail if row not in kept]
            self.ask(line, "ack", ids=[row["id"] for row in kept])
            self.done.update(row["id"] for row in kept)
            self.ask(line, "nack", ids=returned, blameless=True)


def finish(clients: list[Any]) -> None:
    for client in clients:
        client.over.set()
    for client in clients:
        client.join()
    assert [client.problem for client in clients if client.problem] == []


@pytest.mark.timeout(400)
def test_kill_9_of_the_daemon_loses_nothing_and_repeats_nothing(folder: Path) -> None:
    print(f"SEED={SEED}")
    chance = random.Random(SEED)
    with Hive(folder, limits={"messages_per_minute": 0, "ping_pong": 0, "unread": 10**6}) as hive:
        hive.spawn("alice", "bob")
        routes = [("alice", "bob"), ("alice", "bob"), ("bob", "alice")]
        senders = [Sender(hive, one, other, SEED + n) for n, (one, other) in enumerate(routes)]
        receivers = [Receiver(hive, name, SEED + 10 + n) for n, name in enumerate(["bob", "bob", "alice"])]
        receivers[1].done = receivers[0].done  # what one of bob's has acknowledged must not come to the other, either
        try:
            for client in (*senders, *receivers):
                client.start()
            for _ in range(KILLS):
                # Counted from the first instruction, so that some die while they open, recover or begin to listen.
                time.sleep(chance.uniform(0.05, 1.0))
                hive.kill()
                hive.start(ready=False)
            wait_for(hive.is_ready, "the last daemon")
            wait_for(lambda: sum(len(sender.texts) for sender in senders) > 10 * KILLS, "many messages", timeout_s=200)
            finish(senders)
            wait_for(lambda: not any(row["unread"] for row in hive.ask(cmd="agents")["agents"]), "an end of the mail")
        finally:
            finish([*senders, *receivers])
        assert not [row for row in hive.ask(cmd="inbox")["messages"] if row["kind"] == "dead_letter"]
    sent = {number: text for sender in senders for text, number in sender.texts.items()}
    assert len(sent) == sum(len(sender.texts) for sender in senders)
    assert receivers[0].seen | receivers[1].seen | receivers[2].seen == sent
    assert all(text.startswith("bob-") for text in receivers[2].seen.values())


def test_a_turn_outlives_the_daemon(folder: Path) -> None:
    steps = [{"sleep": 2}, {"tool": "send", "input": {"to": "operator", "body": "done"}}]
    with Hive(folder) as hive:
        hive.spawn("alice", running=True)
        harness = harness_of(hive, "alice")
        number = hive.ask(cmd="send", to="alice", body=f"rehearse: {json.dumps(steps)}")["id"]
        wait_for(lambda: message(hive, number)["state"] == "leased", "the turn to begin")
        hive.kill()
        hive.start()
        wait_for(lambda: message(hive, number)["state"] == "acked", "the turn to end", timeout_s=30)
        assert harness_of(hive, "alice") == harness
        assert [row["body"] for row in hive.ask(cmd="inbox")["messages"]] == ["done"]


def test_kill_9_of_a_harness_in_a_turn_gives_its_mail_again(folder: Path) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice", running=True)
        number = hive.ask(cmd="send", to="alice", body='rehearse: [{"sleep": 60}]')["id"]
        wait_for(lambda: message(hive, number)["state"] == "leased", "the turn to begin")
        first = harness_of(hive, "alice")
        first.send_signal(signal.SIGKILL)
        wait_for(lambda: message(hive, number)["attempts"] == 2, "the mail to be given again", timeout_s=30)
        assert message(hive, number)["redelivered"] is True
        assert harness_of(hive, "alice") != first
        (news,) = (row for row in hive.ask(cmd="inbox")["messages"] if row["kind"] == "container_crash")
        assert news["data"] == {"agent": "alice"}


def test_a_harness_that_hangs_is_told_once(folder: Path) -> None:
    with Hive(folder, silent_s=8) as hive:
        hive.spawn("alice", running=True)

        def told() -> list[str]:
            return [row["text"] for row in hive.api("GET", "/api/state").body["attention"] if row["kind"] == "silent"]

        harness = harness_of(hive, "alice")
        harness.suspend()
        number = hive.ask(cmd="send", to="alice", body="are you there?")["id"]  # ends its wait for mail
        (text,) = wait_for(told, "the word that it hangs", timeout_s=90)
        assert text.startswith("alice runs, but nothing was heard of its harness for 8 s.")
        time.sleep(1)
        assert told() == [text]
        harness.resume()
        wait_for(lambda: message(hive, number)["state"] == "acked", "the mail to be read")


def harness_of(hive: Hive, name: str) -> psutil.Process:
    return psutil.Process(json.loads((hive.run / "processes" / f"{name}.json").read_text())["pid"])
