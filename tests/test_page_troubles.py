"""What a person reads when an agent is in trouble: the sentence of each kind of failure, on the page of a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import browserbox
import pytest
from browserbox import Tab, rehearse
from hive import Hive
from playwright.sync_api import expect

from harness import REMEDIES, Failure

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
    with Hive(folder, stall_s=3) as hive:
        hive.spawn(*agents, running=True)
        for name, failure in agents.items():
            hive.ask(cmd="send", to=name, body=rehearse(STEPS[failure]))
        tab = open_tab(f"{hive.url}/#token={hive.token}")
        for name, failure in agents.items():
            tab.go(f"agents/{name}")
            expect(tab.page.locator(".agent-heading")).to_contain_text(name)
            expect(tab.page.get_by_role("main")).to_contain_text(REMEDIES[failure].reason)
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
