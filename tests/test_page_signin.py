"""Signing an agent in through a page: with the rehearsal, and with the real claude as far as it goes.

Each story is told twice: on the card of Your call, and on the agent's own page.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browserbox
import pytest
from browserbox import Tab, card, rehearse, row_of, spawn, wait_beside
from conftest import CLAUDE
from fakes.messages_api import Api
from hive import Hive, listens, wait_for
from playwright.sync_api import Locator, Route, expect

browser, open_tab = browserbox.browser, browserbox.open_tab  # fixtures

# Without a network: where a proxy is named, nothing listens.
SIGNED_OUT = {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "CLAUDE_CODE_MAX_RETRIES": "1"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERHIVE_REHEARSAL_SPEED", "0")


@pytest.fixture
def hive(folder: Path) -> Iterator[Hive]:
    with Hive(folder) as running:
        spawn(running, "manager")
        spawn(running, "alice")
        yield running


@pytest.fixture(params=["your call", "own page"])
def opened(request: pytest.FixtureRequest, open_tab: Callable[..., Tab]) -> Callable[[Hive], Tab]:
    """Opens the place from which alice is signed in."""

    def open_place(hive: Hive) -> Tab:
        url = f"{hive.url}/#token={hive.token}"
        if request.param == "own page":
            url = row_of(hive, "alice")["url"]
            wait_for(lambda: listens(row_of(hive, "alice")["port"]), "her page")
        tab = open_tab(url)
        tab.expected = ["ERR_"]  # the hive of a test goes before its pages
        return tab

    return open_place


def panel(tab: Tab) -> Locator:
    return tab.page.locator(".signin")


def begin(tab: Tab, address: str) -> None:
    """Press the button and wait for the address, which opens nothing by itself."""
    panel(tab).get_by_role("button", name="Sign alice in").click()
    link = panel(tab).get_by_role("link", name=address)
    expect(link).to_be_visible()
    assert link.get_attribute("rel") == "noopener noreferrer" and link.get_attribute("target") == "_blank"


def give(tab: Tab, code: str) -> None:
    panel(tab).get_by_label("Code for alice").fill(code)
    panel(tab).get_by_role("button", name="Finish").click()


def told(hive: Hive, kind: str) -> list[str]:
    messages = hive.api("GET", "/api/messages?max=1000").body["messages"]
    return [one["body"] for one in messages if one.get("kind") == kind and one["to"] == "manager"]


def texts(hive: Hive) -> list[str]:
    return [event["data"].get("text", "") for event in hive.api("GET", "/api/agents/alice").body["events"]]


def worries(hive: Hive) -> list[str]:
    return [worry["key"] for worry in hive.api("GET", "/api/state").body["attention"]]


def signed_out(hive: Hive, *steps: dict[str, Any]) -> None:
    """Mail at which alice's Claude says that it is signed out."""
    hive.cli("send", "alice", rehearse({"fail": "authentication_failed"}, *steps))
    wait_for(lambda: row_of(hive, "alice")["state"] == "needs_login", "alice to be signed out")


REHEARSED = "https://rehearsal.invalid/sign-in"


def test_a_sign_in_with_every_way_to_fail_first(hive: Hive, opened: Callable[[Hive], Tab]) -> None:
    signed_out(hive, {"text": "Signed in at last."})
    tab = opened(hive)
    begin(tab, REHEARSED)
    held: list[Route] = []
    tab.page.route(re.compile("/login_finish$"), lambda route: held.append(route), times=1)
    give(tab, "half-of-a-code")
    wait_beside(tab, lambda: held, "the code to be given")
    answer = held[0].fetch()
    expect(panel(tab)).to_contain_text("not the whole code")
    panel(tab).get_by_label("Code for alice").fill("wrong#state")
    held[0].fulfill(response=answer)  # it is of the code before
    panel(tab).get_by_role("button", name="Finish").click()
    expect(panel(tab)).to_contain_text(re.compile("^Login failed"))
    expect(panel(tab).get_by_role("button", name="Sign alice in")).to_have_text("Try again")
    begin(tab, REHEARSED)
    panel(tab).get_by_role("button", name="Cancel").click()
    expect(panel(tab)).to_contain_text("Cancelled.")
    wait_for(lambda: worries(hive) == ["needs_login-alice"], "the end of it")
    begin(tab, REHEARSED)
    give(tab, "right#state")
    expect(panel(tab)).to_have_count(0)
    wait_for(lambda: "Signed in at last." in texts(hive), "the mail that had waited to be read")
    wait_for(lambda: row_of(hive, "alice")["state"] == "idle", "alice to be idle")
    wait_for(lambda: told(hive, "logged_in"), "word of it")
    assert row_of(hive, "alice")["signed_in_until"] and not worries(hive)
    assert len(told(hive, "needs_login")) == len(told(hive, "logged_in")) == 1


def test_a_sign_in_that_nobody_finishes_ends_by_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[[Hive], Tab]
) -> None:
    monkeypatch.setenv("HYPERHIVE_LOGIN_S", "8")
    with Hive(folder) as hive:
        spawn(hive, "alice")
        signed_out(hive)
        tab = opened(hive)
        begin(tab, REHEARSED)
        expect(panel(tab)).to_contain_text("Nobody finished the sign-in in time.", timeout=40_000)
        expect(panel(tab).get_by_role("button", name="Sign alice in")).to_have_text("Try again")
        wait_for(lambda: row_of(hive, "alice")["state"] == "needs_login", "the end of it")


@pytest.mark.needs("claude")
def test_the_real_claude_as_far_as_it_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[[Hive], Tab]
) -> None:
    monkeypatch.setenv("HYPERHIVE_LOGIN_S", "40")
    api = Api().start()
    settings = {**SIGNED_OUT, "ANTHROPIC_BASE_URL": api.url}
    (folder / "environment").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    try:
        with Hive(folder, environment_file=str(folder / "environment")) as hive:
            hive.stop()
            hive.configure(claude=str(CLAUDE), rehearsal=False)
            hive.start()
            spawn(hive, "alice")
            hive.cli("send", "alice", "hello")
            tab = opened(hive)
            expect(tab.page.get_by_text("Claude is not signed in.").first).to_be_visible()
            begin(tab, "https://claude")
            give(tab, "half-of-a-code")
            expect(panel(tab)).to_contain_text("not the whole code")
            give(tab, "made-up#state")
            expect(panel(tab)).to_contain_text(re.compile("^Login failed"), timeout=60_000)
            begin(tab, "https://claude")
            panel(tab).get_by_role("button", name="Cancel").click()
            expect(panel(tab)).to_contain_text("Cancelled.")
            begin(tab, "https://claude")
            expect(panel(tab)).to_contain_text("Nobody finished the sign-in in time.", timeout=80_000)
            wait_for(lambda: row_of(hive, "alice")["state"] == "needs_login", "the end of it")
            assert not api.requests
    finally:
        api.stop()


def test_the_end_of_a_sign_in_is_shown_before_it_comes(hive: Hive, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(f"{hive.url}/#token={hive.token}")
    tab.expected = ["ERR_"]
    file = hive.state / "agents/alice/claude/.credentials.json"
    soon = time.time() + 3 * 86_400 + 40  # in a moment three days are left, though then nothing happens here
    file.write_text(json.dumps({"claudeAiOauth": {"accessToken": "made-up", "expiresAt": int(soon * 1000)}}))
    hive.cli("send", "alice", rehearse({"text": "one"}))
    wait_for(lambda: "signed_in_until" in row_of(hive, "alice"), "the time")
    assert not worries(hive)
    notice = card(tab, "alice's sign-in ends soon")
    expect(notice).to_contain_text("sign in again before that", timeout=90_000)
    begin(tab, REHEARSED)
    give(tab, "right#state")
    expect(notice).to_have_count(0)
    tab.go("agents/alice")
    expect(tab.page.locator(".fact").filter(has_text="signed in")).to_contain_text(re.compile("until .*(29|30) d"))
