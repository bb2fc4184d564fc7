"""A browser for tests of the pages, with a note of all that must not happen in it: see `Tab`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from hive import Hive, listens, wait_for
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]

expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield running
        running.close()


def origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


class Tab:
    """A page with a note of everything that must not happen; `expected` are the complaints a test provokes."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.origin, self.complaints, self.expected = origin_of(url), list[str](), list[str]()
        self.context = browser.new_context(**{"viewport": {"width": 1380, "height": 900}, **options})
        self.page: Page = self.context.new_page()
        self.page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => console.error('policy: ' + event.blockedURI))"
        )
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        self.page.on("request", self._request)
        self.page.on("dialog", lambda dialog: (self.complaints.append("a dialog opened"), dialog.dismiss()))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _request(self, request: Request) -> None:
        if origin_of(request.url) != self.origin and not request.url.startswith(("data:", "blob:")):
            self.complaints.append(f"a request to {request.url}")

    def close(self) -> None:
        self.context.close()
        left = [text for text in self.complaints if not any(re.search(words, text) for words in self.expected)]
        assert left == [], left

    def go(self, view: str) -> None:
        """Returns when the page has entered it: what the view before shows is not taken for it."""
        self.page.evaluate(
            """view => new Promise((resolve) => {
              if (location.hash === `#/${view}`) return resolve();
              addEventListener("hashchange", () => requestAnimationFrame(() => resolve()), { once: true });
              location.hash = `#/${view}`;
            })""",
            view,
        )


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    tabs: list[Tab] = []

    def open_it(url: str, **options: Any) -> Tab:
        tab = Tab(browser, url, **options)
        tabs.append(tab)
        tab.page.goto(url)
        return tab

    yield open_it
    for tab in tabs:
        tab.close()


def wait_beside(tab: Tab, look: Callable[[], Any], what: str) -> Any:
    """As `wait_for`, while what the page asks for goes on being routed."""
    return wait_for(lambda: tab.page.evaluate("true") and look(), what)


# ── what tests of the pages do with a hive ──


def spawn(hive: Hive, name: str) -> None:
    answer = hive.api("POST", "/api/agents", {"name": name})
    assert answer.status == 200, answer.body
    wait_for(lambda: row_of(hive, name)["state"] == "idle" and settled(hive), f"{name} to be idle")
    wait_for(lambda: listens(urlsplit(row_of(hive, name)["url"]).port or 0), f"the page of {name}")


def settled(hive: Hive) -> bool:
    """No deploy is under way: an agent can be idle before its own is over."""
    deploys = hive.api("GET", "/api/deploys").body["deploys"]
    return not any(row["phase"] in ("queued", "building", "switching") for row in deploys)


def row_of(hive: Hive, name: str) -> dict[str, Any]:
    row: dict[str, Any] = hive.api("GET", f"/api/agents/{name}").body["agent"]
    return row


def rehearse(*steps: dict[str, Any]) -> str:
    return f"rehearse: {json.dumps(steps)}"


def card(tab: Tab, words: str) -> Locator:
    return tab.page.locator("article.card").filter(has_text=words)
