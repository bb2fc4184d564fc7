"""Every view with much in it, in a real browser: at each size and scheme nothing is cut off and axe finds nothing, and
what agents wrote stays text. Pictures are kept for people to look at, in the folder that HYPERHIVE_SCREENSHOTS names.
"""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import browserbox
import pytest
from browserbox import Tab, card
from hive import ROOT, Hive
from playwright.sync_api import expect
from test_page_requests import FIRST, SECOND, check, propose
from test_page_views import spend

browser, open_tab = browserbox.browser, browserbox.open_tab  # fixtures

AXE = ROOT / "tests" / "node_modules" / "axe-core" / "axe.min.js"
PICTURES = Path(os.environ.get("HYPERHIVE_SCREENSHOTS", ROOT / "tests" / "output"))
HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b> \x1b[31mred\x1b[0m"
    " \x1b]8;;https://evil.test\x07link\x1b]8;;\x07 \u202egnp.exe\u202c \u2066isolated\u2069 a\x00b\u200b"
    " \U0001f41d\ufe0f javascript:alert(3) [click](javascript:alert(4)) https://example.org/a?b=1&c=2 "
)
SOLID = "w" * 60_000  # and no space
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069]")
VIEWS = {
    "call": "call",
    "requests": "approvals",
    "request": "approvals/1",
    "agents": "agents",
    "agent": "agents/alice",
    "flow": "flow",
    "deploys": "deploys",
    "usage": "usage",
    "system": "system",
    "search": "search",
    "more": "more",
}
SHAPES = {
    "desktop": {"viewport": {"width": 1380, "height": 900}},
    "zoomed": {"viewport": {"width": 640, "height": 450}, "device_scale_factor": 2, "reduced_motion": "reduce"},
    "tablet": {"viewport": {"width": 820, "height": 1100}},
    "phone": {"viewport": {"width": 360, "height": 780}, "device_scale_factor": 2, "has_touch": True},
}


@pytest.fixture(scope="module")
def team() -> Iterator[Hive]:
    """One hive for the module, whose stopped agents have said, asked and proposed all kinds of things."""
    limits = {"messages_per_minute": 0, "pending_approvals": 1000, "wrong_tokens_per_minute": 10_000, "ping_pong": 0}
    with tempfile.TemporaryDirectory(prefix="hh-", dir="/tmp") as place, Hive(Path(place), limits=limits) as hive:
        hive.spawn("manager", "alice", "bob", "carol")
        fill(hive, Path(place))
        yield hive


def fill(hive: Hive, folder: Path) -> None:
    odd = {"agent.nix": SECOND, "<b>odd.nix": "{ }\n", "javascript:alert(5).md": HOSTILE.replace("\0", "") + "\n"}
    number = propose(hive, folder, odd, "Renders the logo set and has no `rsvg-convert`. " + HOSTILE)
    packages = [
        {"name": "librsvg", "to": "2.60.0", "bytes": 4_300_000},
        {"name": "<i>git</i>\u202e", "from": "2.50", "to": "2.51", "bytes": -2048},
    ]
    verdict = {"state": "ok", "evaluates": True, "builds": True, "seconds": 8.2, "packages": packages}
    check(hive, number, verdict, ("building…", HOSTILE))
    refused = propose(hive, folder, {"agent.nix": SECOND}, HOSTILE)
    assert hive.api("POST", f"/api/approvals/{refused}/deny", {"note": HOSTILE}).status == 200
    with hive.agent("manager") as manager, hive.agent("alice") as alice, hive.agent("bob") as bob:
        spawn = {"name": "dora", "description": HOSTILE + SOLID[:3000], "config": FIRST}
        assert (answer := manager.ask("request_spawn", **spawn))["ok"], answer
        fields = {"to": "alice", "body": HOSTILE, "first": "2099-01-01T00:00:00Z", "every_s": 86400}
        manager.ask("request_schedule", **fields)
        manager.ask("set_status", text=HOSTILE[:190])
        alice.ask("ask", question=HOSTILE, options=["<b>bold</b>", "\u202eno", "x" * 90])
        alice.ask("ask", question="Which ones?", options=["red", "green"], multi=True)
        alice.ask("send", to="bob", body=HOSTILE)
        alice.ask("send", to="operator", body=SOLID)
        alice.ask("send", to="operator", body=f"```\n{'code ' * 60}\n```\nDone: `report.md`.")
        bob.ask("send", to="*", body="I am here.")
        kinds: list[tuple[str, dict[str, Any]]] = [
            ("text", {"text": HOSTILE}), ("thinking", {"text": HOSTILE}), ("note", {"text": HOSTILE}),
            ("tool_call", {"tool_use_id": "t", "name": "Bash", "input": {"command": HOSTILE}}),
            ("tool_result", {"tool_use_id": "t", "output": HOSTILE + SOLID[:5000], "is_error": True}),
            ("text", {"text": SOLID}),
        ]  # fmt: skip
        event = {"at": "2026-01-01T00:00:00Z", "turn": 50}
        rows = [event | {"id": 500 + n, "kind": kind, "data": data} for n, (kind, data) in enumerate(kinds)]
        assert alice.ask("report", events=rows)["ok"]
    schedule = {"to": "bob", "body": HOSTILE, "first": "2099-01-01T00:00:00Z", "every_s": 3600}
    assert hive.api("POST", "/api/schedules", schedule).status == 200
    with closing(sqlite3.connect(hive.state / "hive.sqlite")) as database, database:
        deploy = database.execute("SELECT max(id) FROM deploys").fetchone()[0]
        database.execute("UPDATE deploys SET error = ? WHERE id = ?", (HOSTILE + SOLID[:3000], deploy))
        spend(database)
        lines = [(deploy, number, line) for number, line in enumerate((HOSTILE, SOLID[:3000]), 1_000_000)]
        database.executemany("INSERT INTO deploy_log (deploy, n, line) VALUES (?, ?, ?)", lines)


@pytest.fixture
def screen(team: Hive, open_tab: Callable[..., Tab], request: pytest.FixtureRequest) -> Tab:
    """The dashboard in one of the shapes and schemes, named by the test's parameters."""
    shape, scheme = request.param
    tab = open_tab(f"{team.url}/#token={team.token}", color_scheme=scheme, **SHAPES[shape])
    expect(tab.page.locator("article.card").first).to_be_visible()
    return tab


def open_up(tab: Tab, name: str) -> None:
    """Go to a view and unfold what it has."""
    tab.go(VIEWS[name])
    page, main = tab.page, tab.page.get_by_role("main")
    if name == "request":
        expect(main.locator(".coloured").first).to_be_visible()
        main.get_by_role("button", name="Log of the pre-check").click()
        main.get_by_role("button", name="Edit request").click()
        expect(page.get_by_label("Text of agent.nix")).to_be_visible()
    if name == "agents":
        main.get_by_role("button", name="Manage alice").click()
    if name == "agent":
        expect(main.locator("section.turn").first).to_be_visible()
    if name == "flow":
        main.get_by_role("button", name="Who talks to whom").click()
        note = {"name": "a long name of a note.txt", "mimeType": "text/plain", "buffer": b"x" * 5000}
        page.locator("input[type=file]").set_input_files([note])  # type: ignore[list-item]
        expect(page.get_by_role("list", name="Attached files").get_by_role("listitem")).to_contain_text("5 KiB")
    if name == "deploys":
        main.get_by_role("button", name="Log", exact=True).first.click()
    if name == "system":
        main.get_by_role("button", name="New schedule").click()
        main.get_by_role("button", name="Look for faults").click()
        expect(main.locator(".row").filter(has_text="token file")).to_be_visible()
        main.get_by_role("button", name="The last").click()
        main.get_by_role("button", name="connection").click()
        expect(page.get_by_label("Text of the schedule")).to_be_visible()
        expect(main.locator(".audit")).to_be_visible()
    if name == "usage":
        main.get_by_role("button", name="Tokens").click()
        main.get_by_role("button", name="The same as a table").click()
    if name == "search":
        page.get_by_role("searchbox").fill("a")
    page.wait_for_timeout(300)


# What reaches out of the page to the right, unless it lies in something that scrolls or cuts by intention.
CUT_OFF = """() => [...document.querySelectorAll("main *, aside *, header *")]
  .filter((dom) => dom.getClientRects().length && dom.getBoundingClientRect().right > innerWidth + 1)
  .filter((dom) => !dom.closest("pre, .scroll, svg, .second, .gist, .tool-head code, .brief"))
  .map((dom) => `${dom.tagName}.${dom.className} ${dom.textContent.slice(0, 60)}`).slice(0, 5)"""


@pytest.mark.parametrize("screen", [(s, c) for s in SHAPES for c in ("light", "dark")], indirect=True, ids="-".join)
def test_each_view_is_whole_and_axe_finds_nothing(screen: Tab, request: pytest.FixtureRequest) -> None:
    PICTURES.mkdir(exist_ok=True)
    shape = request.node.callspec.id
    screen.page.evaluate(AXE.read_text())
    for name in VIEWS:
        open_up(screen, name)
        picture = screen.page.screenshot(full_page=name not in ("agent", "flow"))
        (PICTURES / f"{name}-{shape}.png").write_bytes(picture)
        assert screen.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
        assert screen.page.evaluate(CUT_OFF) == [], name
        found = screen.page.evaluate("axe.run().then(({ violations }) => violations)")
        told = [f"{row['id']}: {node['html'][:150]} {node['failureSummary']}" for row in found for node in row["nodes"]]
        assert told == [], (name, told)


@pytest.mark.parametrize("screen", [("desktop", "light")], indirect=True, ids="-".join)
def test_hostile_text_changes_nothing_in_a_view_but_text(screen: Tab) -> None:
    page = screen.page
    for name in VIEWS:
        open_up(screen, name)
        assert page.locator("main script, main img, main i:has-text('git'), main b:has-text('bold')").count() == 0, name
        text = page.locator("body").inner_text()
        assert not UNSEEN.search(text), (name, UNSEEN.search(text))
        for link in page.locator("a").all():
            address = link.get_attribute("href") or ""
            assert address.startswith(("#/", "http://", "https://")), address
            if address.startswith("https://"):
                assert link.get_attribute("rel") == "noopener noreferrer" and link.text_content() == address
    screen.go("call")
    shown = card(screen, "to change alice")
    expect(shown).to_contain_text("<img src=x onerror=alert(1)>")
    expect(shown).to_contain_text("⟨U+202E⟩gnp.exe⟨U+202C⟩ ⟨U+2066⟩isolated⟨U+2069⟩ a␀b⟨U+200B⟩")
    expect(shown.locator(".path")).to_have_text(["<b>odd.nix", "agent.nix", "javascript:alert(5).md"])
