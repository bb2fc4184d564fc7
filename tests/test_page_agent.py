"""One agent in a real browser, while it writes, waits, signs in, and when it has written a lot."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import browserbox
import pytest
from browserbox import Tab, rehearse, row_of, spawn
from hive import HYPERHIVE, Hive, listens, wait_for
from playwright.sync_api import Route, expect

browser, open_tab = browserbox.browser, browserbox.open_tab  # fixtures

MANY = 100_000
DOT = (  # a picture of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def team() -> Iterator[Hive]:
    """One hive with a running alice for the module; its rehearsal writes as fast as a person reads."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="hh-", dir="/tmp") as place:
        patch.setenv("HYPERHIVE_REHEARSAL_SPEED", "1")
        with Hive(Path(place)) as hive:
            spawn(hive, "alice")
            yield hive.spawn("bob")  # stopped: a test speaks in its place


@pytest.fixture(params=["dashboard", "own page"])
def tab(request: pytest.FixtureRequest, team: Hive, open_tab: Callable[..., Tab]) -> Tab:
    """Alice on the dashboard, and on her own page."""
    if request.param == "own page":
        return open_tab(row_of(team, "alice")["url"])
    tab = open_tab(f"{team.url}/#token={team.token}")
    tab.go("agents/alice")
    return tab


def test_text_is_shown_while_it_is_written(team: Hive, tab: Tab) -> None:
    words = " ".join(f"word{number}" for number in range(200))
    team.cli("send", "alice", rehearse({"text": words}))
    writing = tab.page.locator(".live-text")
    expect(writing).to_contain_text("word5")
    expect(writing.locator(".cursor")).to_be_visible()
    expect(writing).not_to_contain_text("word199")
    turn = tab.page.locator("section.turn").last
    expect(turn.locator(".prose").last).to_contain_text("word199", timeout=60_000)
    expect(writing).to_have_count(0)
    expect(turn.locator(".turn-line")).not_to_contain_text("running")
    assert turn.locator(".step").filter(has_text="word199").count() == 2  # the mail that asked for it, and the text


def test_it_is_paused_and_given_another_model(team: Hive, tab: Tab) -> None:
    side = tab.page.get_by_role("complementary")
    side.get_by_role("button", name="Pause alice").click()
    expect(tab.page.locator(".agent-heading")).to_contain_text("paused")
    expect(tab.page.locator(".reason-line")).to_have_text(re.compile(r"Paused (by you|at its own page)\."))
    side.get_by_role("button", name="Resume alice").click()
    expect(tab.page.locator(".agent-heading")).to_contain_text("idle")
    side.get_by_role("button", name="Model").click()
    side.get_by_label("Model for alice").fill("opus")
    side.get_by_role("button", name="Set model").click()
    expect(side.get_by_label("Model for alice")).to_have_count(0)
    expect(side.locator(".fact").filter(has_text="context")).to_contain_text("% of")


def test_its_conversation_is_compacted_and_begun_anew_on_a_phone(team: Hive, open_tab: Callable[..., Tab]) -> None:
    team.cli("send", "alice", rehearse({"text": "There is something to compact."}))
    wait_for(lambda: row_of(team, "alice")["state"] == "idle", "the turn to end")
    phone = {"viewport": {"width": 360, "height": 780}, "device_scale_factor": 2, "has_touch": True}
    tab = open_tab(row_of(team, "alice")["url"], **phone)
    main = tab.page.get_by_role("main")
    tab.page.get_by_role("button", name="State").click()
    tab.page.get_by_role("button", name="Compact").click()
    expect(main).to_contain_text("compacted")
    tab.page.get_by_role("button", name="New session").click()
    tab.page.get_by_role("button", name="Begin a new session").click()
    expect(main).to_contain_text("A new session was asked for.")
    assert tab.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_its_notes_are_shown_when_they_are_asked_for(team: Hive, tab: Tab) -> None:
    notes = team.state / "agents/alice/state/notes.md"
    kept = notes.read_text() if notes.exists() else None
    notes.unlink(missing_ok=True)
    os.mkfifo(notes)  # nobody would ever write into it
    side = tab.page.get_by_role("complementary")
    side.get_by_role("button", name="Show the notes of alice").click()
    expect(side).to_contain_text("It has written none yet.")
    notes.unlink()
    notes.write_text("The backups are checked on <b>Mondays</b>.")
    side.get_by_role("button", name="Show the notes of alice").click()
    expect(side).to_contain_text("The backups are checked on <b>Mondays</b>.")
    notes.write_text(kept or "")


def test_who_has_it_at_the_keyboard_is_told(team: Hive, tab: Tab) -> None:
    argv = [*HYPERHIVE, "--dir", str(team.folder), "attach", "alice"]
    with subprocess.Popen(argv, stdin=-1, stdout=subprocess.DEVNULL, stderr=-1) as command:
        expect(tab.page.locator(".reason-line")).to_contain_text("An interactive session has it.")
        command.communicate()
    expect(tab.page.locator(".reason-line")).to_have_count(0)
    expect(tab.page.locator(".agent-heading")).to_contain_text("idle")


def test_the_end_of_a_sign_in_is_shown_before_it_comes(team: Hive, tab: Tab) -> None:
    file = team.state / "agents/alice/claude/.credentials.json"
    until = int(time.time() + 26 * 3600) * 1000
    signed_in = tab.page.get_by_role("complementary").locator(".fact").filter(has_text="signed in")
    file.write_text(json.dumps({"claudeAiOauth": {"accessToken": "one", "expiresAt": until}}))
    team.cli("send", "alice", rehearse({"text": "one"}))
    expect(tab.page.locator(".reason-line")).to_contain_text("Its sign-in ends in 1 day and does not renew itself.")
    expect(signed_in).to_contain_text(re.compile(r"until .*\d\d:\d\d, in 1 day"))
    tokens = {"accessToken": "one", "refreshToken": "two", "expiresAt": until}
    file.write_text(json.dumps({"claudeAiOauth": tokens}))
    team.cli("send", "alice", rehearse({"text": "two"}))
    expect(signed_in).to_contain_text("renews itself")
    expect(tab.page.locator(".reason-line")).to_have_count(0)
    file.unlink()


def test_pictures_are_shown_where_a_tool_returned_them(team: Hive, tab: Tab) -> None:
    pictures = [{"media_type": "image/png", "data": DOT}, {"media_type": "image/tiff", "data": DOT}]
    team.cli("send", "alice", rehearse({"pictures": pictures}))
    tool = tab.page.locator("section.turn").last.locator(".tool").last
    picture = tool.get_by_role("img", name="Picture 1 of 1")
    expect(picture).to_be_visible()
    expect(picture).to_have_js_property("naturalWidth", 1)
    expect(tool).to_contain_text("1 more picture, not kept")


def test_a_sign_in_through_the_page(team: Hive, tab: Tab) -> None:
    page = tab.page
    page.get_by_role("button", name="Sign in", exact=True).click()
    page.get_by_role("button", name="Close the sign-in").click()
    expect(page.get_by_role("button", name="Sign alice in")).to_have_count(0)
    page.get_by_role("button", name="Sign in", exact=True).click()
    page.get_by_role("button", name="Sign alice in").click()
    expect(page.get_by_role("link", name="https://rehearsal.invalid/sign-in")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Sign alice in").click()
    page.get_by_label("Code for alice").fill("right#state")
    page.get_by_role("button", name="Finish").click()
    expect(page.get_by_label("Code for alice")).to_have_count(0)
    expect(page.get_by_role("button", name="Sign alice in")).to_have_count(0)
    wait_for(lambda: row_of(team, "alice")["state"] == "idle", "alice to be idle")


def test_what_a_sub_agent_does_stands_below_its_call(team: Hive, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(f"{team.url}/#token={team.token}")
    tab.go("agents/bob")
    call = {"tool_use_id": "outer", "name": "Task", "input": {"description": "look it up"}}
    inner = {"tool_use_id": "inner", "name": "Bash", "input": {"command": "ls"}, "parent": "outer"}
    told = [
        ("tool_call", call),
        ("text", {"text": "I look.", "parent": "outer"}),
        ("tool_call", inner),
        (
            "tool_result",
            {"tool_use_id": "inner", "output": "a file", "is_error": False, "parent": "outer", "images": 2},
        ),
        ("tool_result", {"tool_use_id": "outer", "output": "found", "is_error": False}),
    ]
    events = [
        {"id": number, "at": "2026-01-01T00:00:00Z", "turn": 1, "kind": kind, "data": data}
        for number, (kind, data) in enumerate(told, 1)
    ]
    with team.agent("bob") as bob:
        assert bob.ask("report", events=events)["ok"]
    outer = tab.page.locator(".tool").filter(has_text="look it up").first
    expect(outer).not_to_contain_text("I look.")
    outer.get_by_role("button", name="sub-agent, 2 steps").click()
    expect(outer).to_contain_text("I look.")
    expect(outer.locator(".tool")).to_contain_text("2 pictures")


NASTY = (
    "<img src=x onerror=alert(1)><script>alert(2)</script> [x](javascript:alert(3)) javascript:alert(4)"
    " https://evil.invalid/\u202egnp.exe \x1b[31mred\x1b[0m \x1b]8;;https://evil.invalid\x07link\x1b]8;;\x07"
    " \u202eesrever\u2066 \x00\x07\x7f\u200b \ud83d\udc1d `</code>` ${1} {{1}}\n```\n<b>\n```\n"
)
LONG = "W" * (64 << 10)


def nasty_events() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every kind of event, with such texts wherever a text may stand, and calls that claim to be their own parents."""
    mail = {"id": 1, "from": "<b>bob</b>", "to": "bob", "body": NASTY + LONG, "at": NASTY, "via": NASTY}
    yield "turn_start", {"messages": [mail]}
    for kind in ("thinking", "text"):
        yield kind, {"text": NASTY + LONG}
    for name in ("Bash", "Edit", "Write", "Task", "mcp__hive__send", NASTY):
        keys = ("command", "file_path", "old_string", "new_string", "content", "description", "to", "body", NASTY)
        yield "tool_call", {"tool_use_id": name, "name": name, "input": dict.fromkeys(keys, NASTY), "parent": name}
        pictures = [
            {"type": "image/svg+xml", "data": DOT},
            {"type": "image/png", "data": '"><script>alert(5)</script>'},
            {"type": "text/html", "data": "PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg=="},
        ]
        output = {"tool_use_id": name, "output": NASTY + LONG, "is_error": name == "Bash", "parent": name}
        yield "tool_result", output | {"images": 3, "pictures": pictures}
    yield "tool_result", {"tool_use_id": "never called", "output": "diff --git a/x b/x\n@@ -1 +1 @@\n+" + NASTY}
    yield "compaction", {"pre_tokens": NASTY, "post_tokens": NASTY}
    yield "note", {"text": NASTY}
    yield "state", {"state": "failed", "reason": NASTY, "until": NASTY}
    yield NASTY[:39], {"text": NASTY}
    yield "turn_end", {"outcome": "failed", "reason": NASTY, "class": "constructor"}


@pytest.mark.parametrize("width", [1380, 360])
def test_what_an_agent_says_stays_text(team: Hive, open_tab: Callable[..., Tab], width: int) -> None:
    rows = [
        {"id": number, "at": "2026-01-01T00:00:00Z", "turn": width, "kind": kind, "data": data}
        for number, (kind, data) in enumerate(nasty_events(), 1000 * (2000 - width))
    ]
    with team.agent("bob") as bob:
        answer = bob.ask("report", events=rows)
        assert answer["ok"], answer
        usage = dict.fromkeys(("input_tokens", "output_tokens", "cache_read_tokens", "cache_creation_tokens"), 1)
        sums = {"turn": f"nasty{width}", "duration_ms": 1, "cost_usd": 0.1, "model": NASTY[:150]}
        assert bob.ask("report", usage=usage | sums)["ok"]
    with team.agent("alice") as alice:
        assert alice.ask("set_status", text=NASTY[:200])["ok"]
    tab = open_tab(f"{team.url}/#token={team.token}", viewport={"width": width, "height": 800})
    page = tab.page
    tab.go("agents/bob")
    turn = page.get_by_role("region", name=f"Turn {width}")
    expect(turn).to_contain_text("The turn failed: <img")
    page.evaluate(
        """async () => {
          for (let folded = [null]; folded.length; ) {
            folded = [...document.querySelectorAll(".transcript [aria-expanded=false]")];
            folded.forEach((button) => button.click());
            await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
          }
        }"""
    )
    expect(turn).to_contain_text("alert(2)</script> [x](javascript:alert(3))")
    harmless(tab)
    for view in ("agents", "usage"):
        tab.go(view)
        expect(page.locator(".heading").first).to_contain_text(view.capitalize())
        harmless(tab)
    with team.agent("alice") as alice:
        assert alice.ask("set_status", text="")["ok"]


def harmless(tab: Tab) -> None:
    """Nothing but text came of it; that no script ran and nothing was asked for elsewhere, the tab notes itself."""
    found = tab.page.evaluate(
        r"""() => ({
          foreign: [...document.querySelectorAll("main *")].map((dom) => dom.localName)
            .filter((name) => /^(script|iframe|object|embed|b|img|link|style|form)$/.test(name)),
          addresses: [...document.querySelectorAll("a[href]")].map((dom) => dom.protocol)
            .filter((name) => !/^https?:$/.test(name)),
          unsafe: [...document.querySelectorAll("a[target]")].filter((dom) => dom.rel !== "noopener noreferrer").length,
          unseen: /[\x00-\x08\x0b-\x1f\x7f\u200b\u202a-\u202e\u2066-\u2069]/.test(document.body.textContent),
          sideways: document.documentElement.scrollWidth - innerWidth,
        })"""
    )
    found["foreign"] = [name for name in found["foreign"] if name != "b"]  # a tool's name is bold
    assert found == {"foreign": [], "addresses": [], "unsafe": 0, "unseen": False, "sideways": 0}


def test_a_limit_says_when_it_goes_on_by_itself(team: Hive, tab: Tab) -> None:
    """The last but one here: the mail that fails so is kept, and tried again after each limit."""
    team.cli("send", "alice", rehearse({"fail": "rate_limit", "resets_in_s": 30}))
    heading = tab.page.locator(".agent-heading")
    expect(heading).to_contain_text("at its limit")
    expect(heading).to_contain_text(re.compile(r"goes on at .*\d\d:\d\d, in \d+ s"))
    turns = tab.page.locator("section.turn")
    known = turns.count()
    expect(turns.last).to_contain_text("The turn failed: A limit of the service is reached.")
    expect(turns.last).to_contain_text("Its mail waits until the limit resets, or until you resume it.")
    tab.page.get_by_role("button", name="Resume alice").click()
    wait_for(lambda: turns.count() > known, "another try", timeout_s=30)


def remember(hive: Hive, events: Iterable[tuple[int, str, dict[str, Any]]]) -> None:
    """Start alice with this past: turn, kind and data of each event, in her own store."""
    store = hive.state / "agents" / "alice" / "state" / "hyperhive-events.sqlite"
    now_ms = int(time.time() * 1000)
    with closing(sqlite3.connect(store)) as database, database:
        rows = ((now_ms, turn, kind, json.dumps(data)) for turn, kind, data in events)
        database.executemany("INSERT INTO events(at_ms, turn, kind, json) VALUES(?, ?, ?, ?)", rows)
    assert hive.api("POST", "/api/agents/alice/start", {}).status == 200
    wait_for(lambda: row_of(hive, "alice")["state"] == "idle", "alice to be idle")
    wait_for(lambda: listens(row_of(hive, "alice")["port"]), "her page")


def a_past() -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Five hundred turns of twenty events; three hold a needle: the second in its thinking, the 400th in a result."""
    for turn in range(1000, 1500):
        mail = {"id": turn, "from": "bob", "to": "alice", "body": f"request {turn}", "at": "2026-01-01T00:00:00Z"}
        yield turn, "turn_start", {"messages": [mail]}
        for step in range(8):
            call = f"{turn}-{step}"
            hidden = "needle" if (turn, step) == (1399, 3) else "straw"
            yield turn, "tool_call", {"tool_use_id": call, "name": "Bash", "input": {"command": f"look {call}"}}
            yield turn, "tool_result", {"tool_use_id": call, "output": "hay\n" * 40 + hidden, "is_error": False}
        yield turn, "thinking", {"text": "So.\nHm.\nA Needle?" if turn == 1001 else "So.\nHm.\nHay."}
        yield turn, "text", {"text": "The needle." if turn == 1499 else "Done."}
        yield turn, "turn_end", {"outcome": "done", "duration_ms": 5, "tools": 8, "tokens": 9, "cost_usd": 0.01}


def answer_late(route: Route) -> None:
    """After the stream has brought what this answer only promises."""
    answer = route.fetch()
    time.sleep(0.5)
    route.fulfill(response=answer)


@pytest.mark.parametrize("where", ["dashboard", "slow dashboard", "own page"])
def test_find_reaches_what_is_folded_and_what_is_not_loaded(
    folder: Path, open_tab: Callable[..., Tab], where: str
) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice")
        remember(hive, a_past())
        url = row_of(hive, "alice")["url"] if where == "own page" else f"{hive.url}/#token={hive.token}"
        tab = open_tab(url)
        page = tab.page
        if where != "own page":
            tab.go("agents/alice")
        if where == "slow dashboard":
            page.route(re.compile(r"/events\?"), answer_late)
        expect(page.get_by_role("region", name="Turn 1499")).to_be_visible()
        page.keyboard.press("Control+f")
        find = page.get_by_role("search")
        field = find.get_by_label("Find")
        expect(field).to_be_focused()
        page.keyboard.type("needle")
        expect(find.get_by_role("status")).to_have_text(re.compile(r"1 since .*\. Enter looks further back\."))
        for turn, place, words in [
            ("1499", "1 of 1 ", "The needle."),
            ("1399", "2 of 3 in all of it.", "needle"),
            ("1001", "3 of 3 in all of it.", "A Needle?"),
        ]:
            field.press("Enter")
            expect(find.get_by_role("status")).to_contain_text(place)
            hit = page.get_by_role("region", name=f"Turn {turn}")
            expect(hit.get_by_text(words).last).to_be_in_viewport()
            expect(hit.get_by_text(f"request {turn}")).to_have_count(1)  # nothing was folded away for it
        assert page.evaluate("[...CSS.highlights.get('find-here')].map(String)") == ["Needle"]
        expect(page.get_by_role("button", name=re.compile("events not loaded")).first).to_be_attached()
        expect(page.get_by_role("region", name="Turn 1300")).to_have_count(0)
        field.press("Enter")
        expect(find.get_by_role("status")).to_have_text("3 of 3 in all of it.")
        field.press("Shift+Enter")
        expect(find.get_by_role("status")).to_have_text("2 of 3 in all of it.")
        field.fill("nowhere")
        field.press("Enter")
        expect(find.get_by_role("status")).to_have_text("Nothing in all of it.")
        field.press("Escape")
        expect(find).to_have_count(0)
        tab.expected = ["ERR_"]  # the hive of this test goes before its page


def test_a_hundred_thousand_events_open_at_once_and_are_paged_back(
    folder: Path, open_tab: Callable[..., Tab], capsys: pytest.CaptureFixture[str]
) -> None:
    with Hive(folder) as hive:
        hive.spawn("alice")
        remember(hive, ((1000 + n // 20, "text", {"text": f"line {n}"}) for n in range(MANY)))
        tab = open_tab(row_of(hive, "alice")["url"])
        expect(tab.page.get_by_text(f"line {MANY - 1}", exact=True)).to_be_visible()
        took_ms = tab.page.evaluate(
            """() => new Promise((resolve) => {
              const look = () => document.querySelector("section.turn")
                ? resolve(performance.now() - performance.getEntriesByType("navigation")[0].startTime)
                : requestAnimationFrame(look);
              look();
            })"""
        )
        turns = tab.page.locator("section.turn")
        for _ in range(4):  # by the wheel, as a person would
            before = turns.count()
            tab.page.mouse.move(400, 400)
            for _ in range(40):
                tab.page.mouse.wheel(0, -3000)
                tab.page.wait_for_timeout(50)
                if turns.count() > before:
                    break
            wait_for(lambda: turns.count() > before, "earlier turns")  # noqa: B023 - called at once
        with capsys.disabled():
            print(f" [{MANY} events: {turns.count()} turns shown, first after at most {took_ms:.0f} ms]", end="")
        tab.expected = ["ERR_"]  # the hive of this test goes before its page
