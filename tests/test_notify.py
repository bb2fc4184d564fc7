"""Notifications: what newly needs the operator is told to one address, once, and again where that fails."""

import json
import time
from pathlib import Path

import pytest
from fakes.receiver import Receiver, Told
from hive import Hive, free_ports, wait_for


def told(receiver: Receiver, words: str) -> Told:
    return wait_for(lambda: next((one for one in receiver.told if words in one.text), None), words)  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["ntfy", "json"])
def test_what_needs_the_operator_is_told_with_a_link_to_it(folder: Path, form: str) -> None:
    with Receiver() as receiver, Hive(folder, notify_url=receiver.url, notify_format=form) as hive:
        hive.spawn("manager", "alice")
        with hive.agent("alice") as alice, hive.agent("manager") as manager:
            question = alice.ask("ask", question="Tea or coffee? ☕")["id"]
            asked = told(receiver, "alice asks: Tea or coffee?")
            request = manager.ask("request_spawn", name="carol", description="a painter")["id"]
            requested = told(receiver, "manager asks: spawn carol")
            alice.ask("send", to="operator", body="No answer needed.")
        links = [f"{hive.url}/#/call/question-{question}", f"{hive.url}/#/approvals/{request}"]
        if form == "ntfy":
            assert [one.headers["Click"] for one in (asked, requested)] == links
            assert asked.headers["Title"] == "hyperhive: one thing waits for you"
            assert requested.headers["Title"] == "hyperhive: 2 wait for you" and "☕" in asked.text
        else:
            rows = [json.loads(one.text) for one in (asked, requested)]
            assert [row["link"] for row in rows] == links and [row["count"] for row in rows] == [1, 2]
        assert hive.token not in str(receiver.told)
        time.sleep(1.5)
        assert len(receiver.told) == 2  # once each, and what is only mail not at all
        hive.stop()
        hive.start()
        with hive.agent("alice") as alice:
            alice.ask("ask", question="And cake?")
        told(receiver, "And cake?")
        assert len(receiver.told) == 3  # what waited before was told before


def test_a_notification_that_is_refused_is_tried_again(folder: Path) -> None:
    with Receiver(refuse=2) as receiver, Hive(folder, notify_url=receiver.url) as hive:
        hive.spawn("alice")
        with hive.agent("alice") as alice:
            alice.ask("ask", question="Is anybody there?")
        told(receiver, "Is anybody there?")
        assert receiver.tries == 3
        assert hive.log.read_text().count("the notification was not delivered: HTTP Error 503") == 2


def test_an_answer_that_is_no_http_costs_nothing(folder: Path) -> None:
    with Receiver(garble=2) as receiver, Hive(folder, notify_url=receiver.url) as hive:
        hive.spawn("alice")
        assert hive.api("POST", "/api/notify/test", {}).status == 502
        with hive.agent("alice") as alice:
            for question in ("Tea?", "Cake?"):
                alice.ask("ask", question=question)
        for question in ("Tea?", "Cake?"):
            told(receiver, question)
        assert hive.api("POST", "/api/notify/test", {}).status == 200
        assert told(receiver, "This is a test").headers["Title"] == "hyperhive: a test"
        hive.stop()
        hive.configure(notify_url="http://127.0.0.1:1/a topic")
        hive.start()
        assert hive.api("POST", "/api/notify/test", {}).status == 502


def test_an_address_at_which_nobody_listens_stops_nothing(folder: Path) -> None:
    with Hive(folder, notify_url=f"http://127.0.0.1:{free_ports()}/") as hive:
        hive.spawn("alice")
        with hive.agent("alice") as alice:
            alice.ask("ask", question="Is anybody there?")
        wait_for(lambda: "the notification was not delivered" in hive.log.read_text(), "the word of it")
        answer = hive.api("POST", "/api/notify/test", {})
        assert answer.status == 502 and "Connection refused" in answer.body["error"]
        hive.stop()
