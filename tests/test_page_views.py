"""What stands around the work in a real browser: flow, search, usage, notifications, keys, and that all can use it."""

from __future__ import annotations

import itertools
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import browserbox
import pytest
from browserbox import Tab, wait_beside
from fakes.receiver import Receiver
from hive import ROOT, Hive, wait_for
from playwright.sync_api import Route, expect

browser, open_tab = browserbox.browser, browserbox.open_tab  # fixtures

AXE = ROOT / "tests" / "node_modules" / "axe-core" / "axe.min.js"
NAMES = ("manager", "alice", "bob", "carol")
VIEWS = ("call", "approvals", "approvals/1", "agents", "agents/alice", "flow", "deploys", "usage", "system", "search")


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as it:
        yield it


@pytest.fixture(scope="module")
def team(receiver: Receiver) -> Iterator[Hive]:
    """One hive for the module: stopped agents that have talked, asked, spent, and want things."""
    with (
        tempfile.TemporaryDirectory(prefix="hh-", dir="/tmp") as place,
        Hive(Path(place), notify_url=receiver.url, hive_daily_budget_usd=2) as hive,
    ):
        hive.spawn(*NAMES)
        long = "He counts what the others have left behind, and writes it down for whoever asks."
        deploy = hive.api("POST", "/api/agents", {"name": "dave", "description": long}).body["deploy_id"]
        wait_for(lambda: hive.phase(deploy) == "deployed", "the deploy of dave")
        assert hive.api("POST", "/api/agents/dave/stop", {}).status == 200
        with hive.agent("alice") as alice, hive.agent("manager") as manager:
            alice.ask("send", to="bob", body="Where is the quarterly report?")
            alice.ask("send", to="operator", body="Done: `report.md`.")
            alice.ask("ask", question="Shall I go on?", options=["Yes", "No"])
            manager.ask("request_spawn", name="dora", description="She writes reports.", config="{ }\n")
            text = {"id": 1, "at": "2026-01-01T00:00:00Z", "turn": 1, "kind": "text", "data": {"text": "I look."}}
            alice.ask("report", events=[text])
        with closing(sqlite3.connect(hive.state / "hive.sqlite")) as database, database:
            spend(database)
        yield hive


def spend(database: sqlite3.Connection) -> None:
    """Three agents' turns of the last days, where the broker would have written them."""
    columns = [row[1] for row in database.execute("PRAGMA table_info(usage)")]
    known = {"model": "sonnet", "input_tokens": 900, "output_tokens": 80, "duration_ms": 5000}
    for n, name in enumerate(NAMES[:3]):
        for back in range(4):
            day = time.strftime("%Y-%m-%d", time.localtime(time.time() - back * 86_400))
            row = known | {"agent": name, "day": day, "turn": f"{name}{back}", "cost_usd": 0.3 * (n + 1), "at": 1}
            row |= {"cache_read_tokens": 0, "cache_creation_tokens": 0}
            row = {key: value for key, value in row.items() if key in columns}
            marks = ", ".join("?" for _ in row)
            database.execute(f"INSERT INTO usage ({', '.join(row)}) VALUES ({marks})", [*row.values()])


@pytest.fixture
def tab(team: Hive, open_tab: Callable[..., Tab]) -> Tab:
    return open_tab(f"{team.url}/#token={team.token}")


def modules_of(first: str) -> set[str]:
    """That module of the pages and all that it needs before it can run."""
    needed, left = set[str](), [first]
    while left:
        needed.add(name := left.pop())
        left += set(re.findall(r'(?:from|^import) "\./(\w+\.js)"', source(name), re.MULTILINE)) - needed
    return needed


def source(name: str) -> str:
    return (ROOT / "static" / name).read_text()


@pytest.mark.parametrize(("page", "first"), [("index.html", "app.js"), ("agent.html", "agentpage.js")])
def test_a_page_names_all_its_modules_at_once(page: str, first: str) -> None:
    """So the browser asks for them together, and not for one after it has read the other."""
    named = re.findall(r'"modulepreload" href="/static/(\w+\.js)"', source(page))
    assert named == sorted(modules_of(first) - {first})


def test_the_later_views_name_all_their_modules_at_once() -> None:
    named = set(re.findall(r'"\./(\w+\.js)"', source("views.js")))
    assert named == modules_of("views.js") - modules_of("app.js") - {"views.js"}


def test_your_call_does_not_wait_for_the_other_views(tab: Tab) -> None:
    held = list[Route]()
    tab.page.route("**/static/views.js", lambda route: held.append(route))
    tab.page.reload()
    expect(tab.page.get_by_role("button", name="Approve request 1")).to_be_visible()
    wait_beside(tab, lambda: held, "the other views to be asked for")
    tab.go("usage")
    expect(tab.page.get_by_text("Loading…")).to_be_visible()
    held.pop().continue_()
    expect(tab.page.locator(".chart").first).to_be_visible()


def test_views_that_can_not_be_loaded_say_so(tab: Tab) -> None:
    tab.expected = ["ERR_FAILED"]
    tab.page.route("**/static/graph.js", lambda route: route.abort())
    tab.page.reload()
    tab.go("flow")
    expect(tab.page.get_by_role("alert")).to_have_text("This part of the page could not be loaded.")
    tab.go("call")
    expect(tab.page.get_by_role("button", name="Approve request 1")).to_be_visible()
    tab.go("flow")
    tab.page.unroute("**/static/graph.js")
    tab.page.get_by_role("button", name="Load the page again").click()
    expect(tab.page.locator("article.message").first).to_be_visible()


def test_what_is_open_in_one_transcript_is_not_in_another(team: Hive, tab: Tab) -> None:
    thought = {"id": 9, "at": "2026-01-01T00:00:00Z", "turn": 2, "kind": "thinking", "data": {"text": "One,\ntwo."}}
    names = ("bob", "carol")
    for name in names:
        with team.agent(name) as agent:
            assert agent.ask("report", events=[thought])["ok"]
    folded = tab.page.get_by_role("button", name="2 lines, unfold")
    for name in names:
        tab.go(f"agents/{name}")
        folded.click()
        expect(tab.page.get_by_text("two.")).to_be_visible()
    tab.go("agents/bob")
    expect(tab.page.get_by_text("two.")).to_be_visible()  # as it was left


def test_who_talks_to_whom_is_drawn(tab: Tab) -> None:
    tab.go("flow")
    tab.page.get_by_role("button", name="Who talks to whom").click()
    graph = tab.page.locator("svg.graph")
    expect(graph).to_have_attribute("aria-label", re.compile("alice and bob: 1 message"))
    expect(graph.locator("text")).to_have_text(["alice", "bob", "you"])
    tab.page.set_viewport_size({"width": 390, "height": 740})
    names = [f"agent-{number}" for number in range(30)]
    for number, (one, other) in enumerate(itertools.pairwise(names)):
        row = {"from": one, "to": other, "at": "2026-01-01T00:00:00Z", "body": "", "state": "acked"}
        tab.page.evaluate(
            "async row => (await import('/static/store.js')).take('change', { kind: 'message', row })",
            row | {"id": 10_000 + number},
        )
    expect(graph.locator("text")).to_have_count(33)
    boxes = "[...document.querySelectorAll('svg.graph rect')].map((name) => name.getBoundingClientRect())"
    places = tab.page.evaluate(f"{boxes}.map(({{ x, y, right, bottom }}) => [x, y, right, bottom])")
    assert min(bottom - y for _, y, _, bottom in places) > 20  # a name can be read
    for (x, y, right, bottom), other in itertools.combinations(places, 2):
        assert right <= other[0] or other[2] <= x or bottom <= other[1] or other[3] <= y, "two names overlap"
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_message_to_several(team: Hive, tab: Tab) -> None:
    tab.go("flow")
    tab.page.get_by_label("To", exact=True).select_option("several")
    recipients = tab.page.get_by_role("group", name="Recipients")
    recipients.get_by_role("button", name="bob").click()
    recipients.get_by_role("button", name="carol").click()
    tab.page.get_by_label("Message", exact=True).fill("To the two of you.")
    tab.page.get_by_role("button", name="Send").click()
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("")
    rows = team.api("GET", "/api/messages").body["messages"]
    assert [row["to"] for row in rows if row["body"] == "To the two of you."] == ["bob", "carol"]


def test_search_finds_messages_requests_and_the_audit(tab: Tab) -> None:
    expect(tab.page.get_by_role("heading", name=re.compile("for you"))).to_be_visible()
    tab.page.keyboard.press("/")
    tab.page.get_by_role("searchbox").fill("report")
    hits = tab.page.get_by_role("region", name="Hits").locator("a")
    expect(hits.filter(has_text="quarterly")).to_have_attribute("href", re.compile("#/flow/thread/"))
    expect(hits.filter(has_text="a new agent, dora")).to_have_attribute("href", "#/approvals/1")
    tab.page.get_by_role("searchbox").fill("spawn carol")
    expect(hits.filter(has_text="Audit").first).to_contain_text("carol")
    tab.page.get_by_role("searchbox").fill("no such word")
    expect(tab.page.get_by_text("Nothing here holds all of these words.")).to_be_visible()


def test_usage_is_drawn_by_day_and_agent(tab: Tab) -> None:
    tab.go("usage")
    bars = tab.page.get_by_role("list", name="Cost by day and agent").locator("li")
    expect(bars.last).to_have_attribute("title", re.compile(r"\$1\.80, bob \$|\$1\.80, alice \$"))
    expect(bars.last.locator("rect")).to_have_count(3)
    expect(tab.page.locator(".legend")).to_contain_text("manager")
    expect(tab.page.locator(".legend")).to_contain_text("budget $2.00")
    expect(tab.page.locator(".heading").first).to_contain_text("of $2.00 that all may spend")
    tab.page.get_by_role("button", name="The same as a table").click()
    today = tab.page.get_by_role("group", name="Usage by day").get_by_role("row").nth(1)
    expect(today).to_contain_text(re.compile(r"\$1\.80.*bob \$0\.90, alice \$0\.60, manager \$0\.30"))
    first = tab.page.get_by_role("group", name="Usage by agent").get_by_role("row").nth(1)
    expect(first).to_contain_text("bob$0.90$3.60")
    expect(first.get_by_role("img", name="50 %")).to_be_visible()
    tab.page.get_by_role("button", name="Tokens", exact=True).click()
    bars = tab.page.get_by_role("list", name="Tokens by day and agent").locator("li")
    expect(bars.last).to_have_attribute("title", re.compile(r": 3 k, bob "))
    expect(bars.last.locator("rect")).to_have_count(3)
    expect(tab.page.locator(".legend")).not_to_contain_text("budget")
    tab.go("system")
    expect(tab.page.locator(".facts")).to_contain_text("of $2.00 that all may spend")


def test_the_machine_its_faults_and_the_daemons_last_words(team: Hive, tab: Tab) -> None:
    tab.go("system")
    facts = tab.page.locator(".facts")
    expect(facts).to_contain_text(re.compile(r"Python 3\.\d+.*SQLite 3\..*bottle 0\..*waitress 3\."))
    expect(facts).to_contain_text(re.compile(rf"free of .* at {re.escape(str(team.state))}"))
    facts.get_by_role("button", name="connection").click()
    expect(facts).to_contain_text(str(team.run / "host.sock"))
    (team.state / "operator.token").chmod(0o644)
    tab.page.get_by_role("button", name="Look for faults").click()
    main = tab.page.get_by_role("main")
    expect(main.locator(".row").filter(has_text="token file")).to_contain_text("to mend")
    expect(main.locator(".row").filter(has_text="token file")).to_contain_text("chmod 600")
    (team.state / "operator.token").chmod(0o600)
    main.get_by_role("button", name="Look again").first.click()
    expect(main.locator(".row").filter(has_text="token file").locator(".ok")).to_be_visible()
    main.get_by_role("button", name="The last").click()
    expect(main.locator("pre.log")).to_contain_text("ready: http://")


def test_rows_of_agents_stay_two_lines_and_keep_the_focus(team: Hive, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(f"{team.url}/#token={team.token}", viewport={"width": 360, "height": 740})
    tab.go("agents")
    rows = tab.page.get_by_role("main").locator(".row.agent")
    row = rows.filter(has_text="carol")
    one_line = row.locator(".second").evaluate("(line) => parseFloat(getComputedStyle(line).lineHeight)")
    with team.agent("alice") as alice:
        assert alice.ask("send", to="bob", body="one more")["ok"]
    words = rows.filter(has_text="dave").locator(".second")
    expect(words).to_have_text(re.compile("^He counts"))
    assert words.bounding_box()["height"] < 1.5 * one_line  # type: ignore[index]
    assert rows.filter(has_text="bob").bounding_box()["height"] < 66  # type: ignore[index]
    manage = row.get_by_role("button", name="Manage carol")
    manage.focus()
    team.ask(cmd="set_paused", name="carol", paused=True)
    expect(row).to_contain_text("Paused by you.")
    expect(manage).to_be_focused()
    tab.page.keyboard.press("Enter")
    row.get_by_role("button", name="Resume carol").press("Enter")
    expect(row).to_contain_text("stopped")
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_keys_are_listed_and_lead_to_the_views(tab: Tab) -> None:
    expect(tab.page.get_by_role("heading", name=re.compile("for you"))).to_be_visible()
    tab.page.keyboard.press("?")
    keys = tab.page.get_by_role("dialog", name="Keys")
    expect(keys).to_contain_text("approve or deny")
    tab.page.keyboard.press("Escape")
    expect(keys).to_have_count(0)
    tab.page.keyboard.press("g")
    tab.page.keyboard.press("d")
    expect(tab.page.get_by_role("heading", name="History")).to_be_visible()


def test_the_browser_tells_of_what_is_new_and_leads_to_it(team: Hive, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab("about:blank")
    tab.origin = team.url
    tab.page.add_init_script(
        """window.told = [];
        window.Notification = class {
          static permission = "default";
          static async requestPermission() { return (this.permission = "granted"); }
          constructor(title, more) { Object.assign(this, more); told.push(this); }
          close() {}
        };
        document.hasFocus = () => false;"""
    )
    tab.page.goto(f"{team.url}/#token={team.token}")
    expect(tab.page.get_by_role("heading", name=re.compile("for you"))).to_be_visible()
    assert tab.page.evaluate("Notification.permission") == "default"  # not asked for by itself
    tab.go("system")
    tab.page.get_by_role("button", name="Tell me in this browser").click()
    expect(tab.page.get_by_role("button", name="Stop telling me here")).to_be_visible()
    assert tab.page.evaluate("told.length") == 0  # what waited before is no news
    with team.agent("manager") as manager:
        number = manager.ask("request_spawn", name="erin", description="She paints.")["id"]
    wait_for(lambda: tab.page.evaluate("told.length") == 1, "the notification")
    tab.page.evaluate("told[0].onclick()")
    expect(tab.page).to_have_url(re.compile(f"#/approvals/{number}$"))


def test_a_browser_that_has_notifications_and_refuses_them_still_shows_the_page(
    team: Hive, open_tab: Callable[..., Tab]
) -> None:
    tab = open_tab("about:blank")
    tab.origin = team.url
    tab.page.add_init_script(
        """window.Notification = class {
          static permission = "granted";
          constructor() { throw new TypeError("Illegal constructor."); }
        };
        document.hasFocus = () => false;
        localStorage.setItem("hyperhive-notify", "yes");"""
    )
    tab.page.goto(f"{team.url}/#token={team.token}")
    expect(tab.page.get_by_role("heading", name=re.compile("for you"))).to_be_visible()
    with team.agent("manager") as manager:
        number = manager.ask("request_spawn", name="fay", description="She paints.")["id"]
    expect(tab.page.get_by_role("button", name=f"Approve request {number}")).to_be_visible()
    tab.go("system")
    expect(tab.page.get_by_role("button", name="Tell me in this browser")).to_be_disabled()


def test_a_notification_is_tried_out(tab: Tab, receiver: Receiver) -> None:
    tab.go("system")
    tab.page.get_by_role("button", name="Send a test to notify_url").click()
    expect(tab.page.get_by_text("The test was delivered.")).to_be_visible()
    assert any("This is a test" in told.text for told in receiver.told)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1380), ("dark", 390)])
def test_axe_finds_no_violation(team: Hive, open_tab: Callable[..., Tab], scheme: str, width: int) -> None:
    if not AXE.exists():
        pytest.skip("needs axe-core, which is not installed")
    viewport = {"width": width, "height": 900}
    tab = open_tab(f"{team.url}/#token={team.token}", color_scheme=scheme, viewport=viewport, reduced_motion="reduce")
    expect(tab.page.locator("diff-block .added").first).to_be_visible()
    tab.page.evaluate(AXE.read_text())
    for view in VIEWS:
        tab.go(view)
        tab.page.wait_for_timeout(300)
        if view == "flow":
            tab.page.get_by_role("button", name="Who talks to whom").click()
        if view == "agents":
            tab.page.get_by_role("button", name="Manage alice").click()
        found = tab.page.evaluate("axe.run().then(({ violations }) => violations)")
        told = [f"{row['id']}: {node['html'][:150]} {node['failureSummary']}" for row in found for node in row["nodes"]]
        assert told == [], view
