"""What a person reads when an agent is in trouble: the sentence of each kind of failure, on the page of a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import browserbox
import pytest
from browserbox import Tab, rehearse, row_of
from conftest import CLAUDE
from fakes.messages_api import Api
from hive import Hive, wait_for
from playwright.sync_api import expect
from test_claude import ANSWERS

from harness import REMEDIES, Failure, Wait

browser, open_tab = browserbox.browser, browserbox.open_tab  # fixtures

STEPS: dict[Failure, dict[str, object]] = {failure: {"fail": failure} for failure in REMEDIES}
STEPS |= {Failure.DIED: {"die": True}, Failure.GARBAGE: {"garbage": True}, Failure.STALLED: {"hang": True}}
del STEPS[Failure.CANNOT_START]  # that is not of a turn: below


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERHIVE_REHEARSAL_SPEED", "0")
    monkeypatch.setenv("HYPERHIVE_BACKOFF_S", "600")


def test_each_failure_is_told_in_a_sentence(folder: Path, open_tab: Callable[..., Tab]) -> None:
    agents = {f"agent-{number}": failure for number, failure in enumerate(STEPS)}
    with Hive(folder, stall_s=30) as hive:
        hive.spawn(*agents, running=True)
        for name, failure in agents.items():
            hive.ask(cmd="send", to=name, body=rehearse(STEPS[failure]))
        tab = open_tab(f"{hive.url}/#token={hive.token}")
        for name, failure in agents.items():
            tab.go(f"agents/{name}")
            expect(tab.page.locator(".agent-heading")).to_contain_text(name)
            expect(tab.page.get_by_role("main")).to_contain_text(REMEDIES[failure].reason, timeout=120_000)
        tab.expected = ["ERR_"]  # the hive of this test goes before its page


def test_a_claude_that_cannot_be_started_is_told_in_a_sentence(folder: Path, open_tab: Callable[..., Tab]) -> None:
    command = folder / "claude-to-come"
    with Hive(folder) as hive:
        hive.stop()
        hive.configure(rehearsal=False, claude=str(command))
        hive.start().spawn("alice", running=True).ask(cmd="send", to="alice", body="hello")
        tab = open_tab(f"{hive.url}/#token={hive.token}")
        tab.go("agents/alice")
        expect(tab.page.get_by_role("main")).to_contain_text(REMEDIES[Failure.CANNOT_START].reason)
        expect(tab.page.get_by_role("main")).to_contain_text(str(command))
        tab.expected = ["ERR_"]


@pytest.mark.needs("claude")
def test_what_the_service_answers_is_told_on_both_pages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, open_tab: Callable[..., Tab]
) -> None:
    monkeypatch.setenv("HYPERHIVE_BACKOFF_S", "2")
    api = Api().start()
    settings = {"ANTHROPIC_API_KEY": "dummy", "ANTHROPIC_BASE_URL": api.url, "CLAUDE_CODE_MAX_RETRIES": "1"}
    (folder / "environment").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    try:
        with Hive(folder, environment_file=str(folder / "environment")) as hive:
            hive.stop()
            hive.configure(rehearsal=False, claude=str(CLAUDE))
            hive.start().spawn("alice", running=True)
            tabs = [open_tab(f"{hive.url}/#token={hive.token}"), open_tab(row_of(hive, "alice")["url"])]
            tabs[0].go("agents/alice")
            for name, (failure, answer) in ANSWERS.items():
                api.fail(*answer)
                number = hive.ask(cmd="send", to="alice", body=f"hello from case {name}")["id"]
                for tab in tabs:
                    turn = tab.page.locator("section.turn").filter(has_text=f"hello from case {name}").last
                    expect(turn).to_contain_text(REMEDIES[failure].reason, timeout=60_000)
                api.work()
                if failure is Failure.MODEL:
                    assert hive.api("POST", "/api/agents/alice/model", {"model": "another-1"}).status == 200
                elif REMEDIES[failure].wait is Wait.OPERATOR:
                    wait_for(lambda: row_of(hive, "alice")["state"] in ("needs_login", "failed"), "the host to know")
                    tabs[1].page.get_by_role("button", name="Resume").first.click()
                wait_for(lambda number=number: state_of(hive, number) == "acked", "it to be read", timeout_s=90)
            for tab in tabs:
                tab.expected = ["ERR_"]
    finally:
        api.stop()


def state_of(hive: Hive, number: int) -> str:
    messages = hive.api("GET", "/api/messages?with=alice").body["messages"]
    return next(str(message["state"]) for message in messages if message["id"] == number)
