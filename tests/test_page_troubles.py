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

SAID = (Failure.SIGN_IN, Failure.LIMIT, Failure.OVERLOAD, Failure.UNREACHABLE, Failure.BILLING, Failure.MODEL)
STEPS = {failure: {"fail": failure} for failure in (*SAID, Failure.OTHER)}
STEPS |= {Failure.DIED: {"die": True}, Failure.GARBAGE: {"garbage": True}}


def test_each_failure_is_told_in_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, open_tab: Callable[..., Tab]
) -> None:
    monkeypatch.setenv("HYPERHIVE_REHEARSAL_SPEED", "0")
    monkeypatch.setenv("HYPERHIVE_BACKOFF_S", "600")
    agents = {f"agent-{number}": failure for number, failure in enumerate(STEPS)}
    with Hive(folder) as hive:
        hive.spawn(*agents, running=True)
        for name, failure in agents.items():
            hive.ask(cmd="send", to=name, body=rehearse(STEPS[failure]))
        tab = open_tab(f"{hive.url}/#token={hive.token}")
        for name, failure in agents.items():
            tab.go(f"agents/{name}")
            expect(tab.page.locator(".agent-heading")).to_contain_text(name)
            expect(tab.page.get_by_role("main")).to_contain_text(REMEDIES[failure].reason)
        tab.expected = ["ERR_"]  # the hive of this test goes before its page
