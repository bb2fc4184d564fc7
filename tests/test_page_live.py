"""A page that stays open in a real browser: what is read, what follows, what an outage leaves, and where one was."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import browserbox
import pytest
from browserbox import Tab, card, wait_beside
from hive import Hive, wait_for
from playwright.sync_api import APIResponse, Route, expect

browser, open_tab = browserbox.browser, browserbox.open_tab  # fixtures

UNREACHABLE = "The hive can't be reached."
TAKE = "async change => { const { take } = await import('/static/store.js'); take('change', change); }"


@pytest.fixture
def tab(crew: Hive, open_tab: Callable[..., Tab]) -> Tab:
    return open_tab(f"{crew.url}/#token={crew.token}")


def is_read(hive: Hive, number: int) -> bool:
    rows = hive.api("GET", "/api/messages?max=1000").body["messages"]
    return any(row["id"] == number and row["state"] == "acked" for row in rows)


def test_only_what_is_on_the_screen_counts_as_read(crew: Hive, tab: Tab) -> None:
    with crew.agent("alice") as alice, crew.agent("bob") as bob:
        first = alice.ask("send", to="operator", body="This is alice.")["id"]
        other = bob.ask("send", to="operator", body="This is bob.")["id"]
        tab.go(f"flow/thread/{first}")
        wait_for(lambda: is_read(crew, first), "alice's message to be read")
        late = alice.ask("send", to="operator", body="And one thing more.", in_reply_to=first)["id"]
        wait_for(lambda: is_read(crew, late), "what came a moment later to be read, too")
    assert not is_read(crew, other)
    tab.go("flow")
    wait_for(lambda: is_read(crew, other), "bob's message to be read")


def test_a_row_is_new_once(crew: Hive, tab: Tab) -> None:
    tab.go("flow")
    with crew.agent("alice") as alice:
        number = alice.ask("send", to="bob", body="Only just written.")["id"]
    row = tab.page.locator(f"#message-{number}")
    expect(row).to_be_visible()
    is_new = f"async () => (await import('/static/store.js')).is_new('message', {number})"
    wait_for(lambda: not tab.page.evaluate(is_new), "it to be old")
    tab.go("agents")
    tab.go("flow")
    expect(row).not_to_have_class(re.compile("new"))


def test_a_thread_that_cannot_be_asked_for_is_not_called_missing(crew: Hive, tab: Tab) -> None:
    tab.expected = ["ERR_FAILED"]
    number = crew.ask(cmd="send", to="alice", body="An old thread.")["id"]
    expect(tab.page.get_by_role("heading", name=re.compile("for you"))).to_be_visible()
    tab.page.route(re.compile("/thread$"), lambda route: route.abort())
    tab.go(f"flow/thread/{number + 1}")
    expect(tab.page.get_by_role("alert")).to_have_text(UNREACHABLE)
    expect(tab.page.get_by_text("There is no message")).to_have_count(0)


def go_and_hold(tab: Tab, view: str, path: str) -> Callable[[], None]:
    """The view asks for `path`; the first answer is made now and comes when what is returned here is called."""
    held: list[tuple[Route, APIResponse]] = []

    def hold(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append((route, route.fetch()))

    def release() -> None:
        [(route, response)] = held
        route.fulfill(response=response)

    tab.page.route(re.compile(f"{path}$"), hold)
    tab.go(view)
    wait_beside(tab, lambda: held, "the answer to be made")
    return release


def test_the_list_of_requests_follows(crew: Hive, tab: Tab) -> None:
    expect(tab.page.get_by_role("heading", name=re.compile("for you"))).to_be_visible()
    release = go_and_hold(tab, "approvals", "/api/approvals")
    rows = tab.page.get_by_role("main").locator("a.row")
    with crew.agent("manager") as manager:
        number = manager.ask("request_spawn", name="dora", description="She paints.")["id"]
    expect(tab.page.get_by_label("1 waiting for you")).to_be_visible()
    release()  # it knows of no request
    expect(rows.first).to_contain_text(f"#{number}")
    expect(rows.first).to_contain_text("pending")
    assert crew.api("POST", f"/api/approvals/{number}/deny", {}).status == 200
    expect(rows.first).to_contain_text("denied")


def test_what_was_asked_of_a_request_before_it_was_decided_is_asked_again(crew: Hive, tab: Tab) -> None:
    tab.go("agents")  # the call view would have asked for it
    with crew.agent("manager") as manager:
        number = manager.ask("request_spawn", name="elsa", description="She sings.")["id"]
    expect(tab.page.get_by_label("1 waiting for you")).to_be_visible()
    release = go_and_hold(tab, f"approvals/{number}", f"/api/approvals/{number}")
    assert crew.api("POST", f"/api/approvals/{number}/deny", {}).status == 200
    expect(tab.page.get_by_text("Loading…")).to_be_visible()
    release()  # it says "pending"
    expect(tab.page.get_by_role("main")).to_contain_text("Denied by you")


def test_a_schedule_that_was_written_goes_from_the_list(crew: Hive, tab: Tab) -> None:
    first = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 10))
    body = {"to": "alice", "body": "Now, once.", "first": first}
    assert crew.api("POST", "/api/schedules", body).status == 200
    tab.go("system")
    row = tab.page.get_by_role("main").locator(".row").filter(has_text="Now, once.")
    expect(row).to_be_visible()
    expect(row).to_have_count(0, timeout=30_000)


def test_the_last_news_of_the_usage_is_not_dropped(tab: Tab) -> None:
    tab.go("usage")
    expect(tab.page.get_by_text("No turn has been counted yet.")).to_be_visible()
    with tab.page.expect_request(re.compile("/api/usage"), timeout=30_000):
        tab.page.evaluate(TAKE, {"kind": "usage", "today_usd": 1})


def test_lines_of_a_log_are_told_apart_by_their_numbers(crew: Hive, tab: Tab) -> None:
    tab.go("deploys")
    row = tab.page.get_by_role("main").locator(".row").filter(has_text="alice").first
    number = crew.api("GET", "/api/deploys?agent=alice&max=1").body["deploys"][0]["id"]
    known = crew.api("GET", f"/api/deploys/{number}").body["deploy"]["log"]
    held: list[Route] = []
    tab.page.route(re.compile(f"/api/deploys/{number}$"), lambda route: held.append(route))
    row.get_by_role("button", name="Log").click()
    log = row.get_by_role("log")
    expect(log).to_have_text("No line yet.")
    for first, lines in ((len(known), [known[-1], "a new line"]), (len(known) + 1, ["a new line", "the last"])):
        tab.page.evaluate(TAKE, {"kind": "deploy_log", "id": number, "first": first, "lines": lines})
    expect(log).to_contain_text("the last")
    wait_beside(tab, lambda: held, "the log to be asked for")
    held[0].continue_()
    expect(log).to_have_text("\n".join([*known, "a new line", "the last"]))


def test_what_failed_while_the_hive_was_away_is_asked_for_again(hive: Hive, open_tab: Callable[..., Tab]) -> None:
    hive.spawn("alice")
    tab = open_tab(f"{hive.url}/#token={hive.token}")
    tab.expected = ["ERR_", "Failed to load"]
    tab.go("usage")
    expect(tab.page.get_by_text("No turn has been counted yet.")).to_be_visible()  # so all of the page is here
    tab.go("agents")
    tab.page.get_by_role("button", name="Manage alice").click()
    hive.stop()
    expect(tab.page.get_by_text("Disconnected since")).to_be_visible()
    tab.page.get_by_role("button", name="Pause alice").click()
    expect(tab.page.get_by_role("alert")).to_contain_text(UNREACHABLE)
    for view in ("approvals", "usage", "system"):
        tab.go(view)
        expect(tab.page.get_by_role("alert").first).to_contain_text(UNREACHABLE)
    hive.start()
    expect(tab.page.get_by_role("table").first).to_be_visible()  # the audit
    for view in ("system", "usage", "approvals", "agents"):
        tab.go(view)
        expect(tab.page.get_by_role("alert")).to_have_count(0)


def test_a_part_of_the_page_that_is_missing_comes_when_the_hive_is_back(
    hive: Hive, open_tab: Callable[..., Tab]
) -> None:
    tab = open_tab(f"{hive.url}/#token={hive.token}")
    tab.expected = ["ERR_"]
    tab.page.route("**/static/views.js", lambda route: route.abort())
    tab.page.reload()
    tab.go("usage")
    expect(tab.page.get_by_role("alert")).to_have_text("This part of the page could not be loaded.")
    hive.stop()
    expect(tab.page.get_by_text("Disconnected since")).to_be_visible()
    tab.page.unroute("**/static/views.js")
    hive.start()
    expect(tab.page.get_by_text("No turn has been counted yet.")).to_be_visible()


def test_back_leads_to_where_one_was(crew: Hive, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(f"{crew.url}/#token={crew.token}", viewport={"width": 1380, "height": 200})
    tab.go("agents")
    expect(tab.page.get_by_role("main").get_by_role("heading", name="Agents")).to_be_visible()
    tab.page.evaluate("scrollTo(0, 90)")
    expect(tab.page.get_by_role("main").get_by_role("link", name="bob")).to_be_visible()
    tab.page.get_by_role("main").get_by_role("link", name="bob").evaluate("link => link.click()")
    expect(tab.page.get_by_label("Write to bob")).to_be_visible()
    tab.page.go_back()
    expect(tab.page.get_by_role("button", name="Manage bob")).to_be_visible()
    wait_for(lambda: tab.page.evaluate("scrollY") == 90, "the place that was left")


def test_a_choice_by_the_keyboard_keeps_the_focus(tab: Tab) -> None:
    tab.go("flow")
    to = tab.page.get_by_label("To", exact=True)
    to.focus()
    for name in ("alice", "bob"):
        tab.page.keyboard.press("ArrowDown")
        expect(to).to_have_value(name)
        expect(to).to_be_focused()


def test_deploys_are_paged_back(crew: Hive, open_tab: Callable[..., Tab]) -> None:
    with closing(sqlite3.connect(crew.state / "hive.sqlite")) as database, database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(deploys)") if row[1] != "id"]
        names = ", ".join(columns)
        for _ in range(60):
            database.execute(f"INSERT INTO deploys ({names}) SELECT {names} FROM deploys WHERE agent = 'bob' LIMIT 1")
    deploys = crew.api("GET", "/api/deploys?max=1000").body["deploys"]
    page = crew.api("GET", f"/api/deploys?max=7&before={deploys[9]['id']}").body["deploys"]
    assert page == deploys[10:17]
    tab = open_tab(f"{crew.url}/#token={crew.token}")
    tab.go("deploys")
    rows = tab.page.get_by_role("main").locator(".row")
    expect(rows).to_have_count(20)
    earlier = tab.page.get_by_role("button", name="Earlier…")
    earlier.click()
    expect(rows).to_have_count(len(deploys))
    expect(earlier).to_have_count(0)


def test_a_question_is_cancelled_after_it_was_asked_once(crew: Hive, tab: Tab) -> None:
    with crew.agent("alice") as alice:
        number = alice.ask("ask", question="Is anybody there?")["id"]
    asked = card(tab, "Is anybody there?")
    asked.get_by_role("button", name=f"Cancel question {number}").click()
    asked.get_by_role("button", name="Keep").click()
    asked.get_by_role("button", name=f"Cancel question {number}").click()
    asked.get_by_role("button", name="Cancel the question").click()
    expect(asked).to_have_count(0)
    rows = {row["id"]: row["status"] for row in crew.api("GET", "/api/questions").body["questions"]}
    assert rows[number] == "cancelled"


def test_silence_and_a_crash_are_called_by_their_names(tab: Tab) -> None:
    def worry(kind: str, number: int) -> dict[str, Any]:
        row = {"key": f"message-{number}", "id": number, "kind": kind, "agent": "bob"}
        return row | {"text": "It runs.", "since": "2026-01-01T00:00:00Z"}

    expect(tab.page.get_by_role("heading", name=re.compile("for you"))).to_be_visible()
    tab.page.evaluate(TAKE, {"kind": "attention", "rows": [worry("silent", 1), worry("crashed", 2)]})
    expect(card(tab, "bob is silent")).to_contain_text("Silence")
    expect(card(tab, "bob crashed").get_by_role("button", name="Start bob")).to_be_visible()


def test_a_destroyed_agent_leads_nowhere_and_is_wiped_whatever_was_ticked(
    hive: Hive, open_tab: Callable[..., Tab]
) -> None:
    hive.spawn("carol")
    tab = open_tab(f"{hive.url}/#token={hive.token}")
    tab.expected = ["ERR_"]
    tab.go("agents")
    row = tab.page.get_by_role("main").locator(".row.agent").filter(has_text="carol")
    wipe = row.get_by_label("wipe everything it has, too")
    row.get_by_role("button", name="Manage carol").click()
    row.get_by_role("button", name="Destroy…").click()
    wipe.check()
    wipe.uncheck()
    row.get_by_label("Type carol to confirm").fill("carol")
    held: list[Route] = []
    tab.page.route(re.compile("/destroy$"), lambda route: held.append(route))
    row.get_by_role("button", name="Destroy", exact=True).click()
    wait_beside(tab, lambda: held, "the button to be pressed")
    answer = held[0].fetch()
    expect(row).to_contain_text("destroyed, state kept")
    expect(row.get_by_role("link", name="carol")).to_have_count(0)
    row.get_by_role("button", name="Destroy…").click()
    row.get_by_label("Type carol to confirm").fill("car")
    with tab.page.expect_response(re.compile("/destroy$")):
        held[0].fulfill(response=answer)  # it is of the first, and closes nothing now
    expect(row.get_by_label("Type carol to confirm")).to_have_value("car")
    expect(wipe).to_be_checked()
    expect(wipe).to_be_disabled()
    expect(row.get_by_role("button", name="Destroy and wipe")).to_be_visible()
    tab.go("deploys")
    expect(tab.page.get_by_role("main").locator(".row")).to_contain_text("carol")
    expect(tab.page.get_by_role("main").get_by_role("link", name="carol")).to_have_count(0)


def test_what_needs_a_running_agent_waits_for_one(tab: Tab) -> None:
    tab.go("agents/bob")
    for name in ("Compact", "New session"):
        expect(tab.page.get_by_role("button", name=name)).to_be_disabled()


def test_what_is_typed_on_when_its_field_has_gone_decides_nothing(crew: Hive, tab: Tab) -> None:
    with crew.agent("manager") as manager, crew.agent("alice") as alice:
        asked = alice.ask("ask", question="Shall I stop?")["id"]
        number = manager.ask("request_spawn", name="frida", description="She writes.")["id"]
        card(tab, "a new agent, frida").locator(".diff").wait_for()
        field = card(tab, "Shall I stop?").get_by_role("textbox")
        field.press_sequentially("No, I ")
        assert crew.api("POST", f"/api/questions/{asked}/cancel", {}).status == 200
        expect(field).to_have_count(0)
        tab.page.keyboard.type("added a dead end and", delay=100)  # of each second letter a card would take one
        assert crew.api("GET", f"/api/approvals/{number}").body["approval"]["status"] == "pending"
        assert crew.api("POST", f"/api/approvals/{number}/deny", {}).status == 200


def test_a_reply_goes_to_whom_it_was_begun_for(crew: Hive, tab: Tab) -> None:
    with crew.agent("alice") as alice, crew.agent("bob") as bob:
        first = alice.ask("send", to="operator", body="May I go on?")["id"]
        question = alice.ask("send", to="bob", body="Is it done?", in_reply_to=first)["id"]
        assert any(row["id"] == question for row in bob.ask("inbox", max=100)["messages"])
        tab.go(f"flow/thread/{first}")
        to = tab.page.get_by_label("To", exact=True)
        expect(to).to_have_value("alice")
        tab.page.get_by_label("Reply to alice").fill("Yes, do it")
        assert bob.ask("send", to="alice", body="It is.", in_reply_to=question)["ok"]
        expect(tab.page.get_by_role("main")).to_contain_text("It is.")
        expect(to).to_have_value("alice")
        tab.page.get_by_role("button", name="Send").click()
        expect(tab.page.get_by_label("Reply to alice")).to_have_value("")
    (sent,) = (row for row in crew.api("GET", "/api/messages").body["messages"] if row["body"] == "Yes, do it")
    assert sent["to"] == "alice"


def test_a_namesake_has_a_transcript_of_its_own(hive: Hive, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(f"{hive.url}/#token={hive.token}")
    tab.expected = ["ERR_"]
    main = tab.page.get_by_role("main")
    for words in ("the first", "the second"):
        hive.spawn("carol")
        with hive.agent("carol") as carol:
            carol.ask("hello", harness_version="0", last_event=0)
            event = {"at": "2026-01-01T00:00:00Z", "turn": 1, "kind": "text", "data": {"text": f"This is {words}."}}
            assert carol.ask("report", events=[{"id": 1, **event}])["ok"]
        tab.go("agents/carol")
        expect(main).to_contain_text(f"This is {words}.")
        tab.go("agents")
        hive.ask(cmd="destroy", name="carol", purge=True)
        expect(main.get_by_role("link", name="carol")).to_have_count(0)
    assert "the first" not in main.inner_text()


def test_an_answer_to_the_token_before_shuts_nobody_out(hive: Hive, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(f"{hive.url}/#token={hive.token}")
    tab.expected = ["ERR_", "401"]
    expect(tab.page.get_by_role("heading", name=re.compile("for you"))).to_be_visible()
    held: list[Route] = []
    tab.page.route(re.compile("/api/audit"), lambda route: held.append(route), times=1)
    tab.go("system")
    wait_beside(tab, lambda: held, "the audit to be asked for")
    assert hive.cli("token", "--rotate").returncode == 0
    tab.page.evaluate("token => { location.hash = `#token=${token}`; }", hive.token)
    expect(tab.page.get_by_role("heading", name=re.compile("for you"))).to_be_visible()
    with tab.page.expect_response(re.compile("/api/audit")):
        held[0].continue_()
    tab.go("agents")
    expect(tab.page.get_by_role("heading", name="Agents").first).to_be_visible()
