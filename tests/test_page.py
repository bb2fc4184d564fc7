"""The dashboard and an agent's own page in a real browser, against the real daemon and its harnesses.

Every test also fails on an error in the browser's console, on a request that leaves the page's origin, and on
anything that the content security policy had to stop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import browserbox
import pytest
from browserbox import Tab, card, rehearse, row_of, settled, spawn
from hive import Hive, Line, wait_for
from playwright.sync_api import expect

browser, open_tab = browserbox.browser, browserbox.open_tab  # fixtures

CONFIG = "{ pkgs, ... }:\n{\n  environment.systemPackages = [ pkgs.ripgrep ];\n}\n"


@pytest.fixture
def hive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hive]:
    """A running hive without agents, in which an approval can be undone for a moment only."""
    monkeypatch.setenv("HYPERHIVE_REHEARSAL_SPEED", "0.2")
    with Hive(folder, undo_s=1.0) as running:
        yield running


@pytest.fixture
def tab(hive: Hive, open_tab: Callable[..., Tab]) -> Tab:
    """The dashboard of a hive without agents, opened by its link."""
    return open_tab(f"{hive.url}/#token={hive.token}")


def request_alice(manager: Line, description: str = "She writes reports.", name: str = "alice") -> int:
    answer = manager.ask("request_spawn", name=name, description=description, config=CONFIG)
    assert answer["ok"], answer
    number: int = answer["id"]
    return number


# ── the token ──


def test_the_token_comes_with_the_link_and_leaves_the_address_at_once(hive: Hive, tab: Tab) -> None:
    expect(tab.page.get_by_text("there is no manager yet")).to_be_visible()
    assert tab.page.url == f"{hive.url}/"
    assert tab.page.evaluate("history.length") <= 2
    tab.page.reload()
    expect(tab.page.get_by_text("there is no manager yet")).to_be_visible()


def test_without_a_token_there_is_one_field_that_says_when_it_is_wrong(
    hive: Hive, open_tab: Callable[..., Tab]
) -> None:
    tab = open_tab(f"{hive.url}/")
    tab.expected = ["401"]
    field = tab.page.get_by_label("Paste the token")
    field.fill("wrong")
    field.press("Enter")
    expect(tab.page.get_by_role("alert")).to_contain_text("not valid")
    field.fill(hive.token)
    tab.page.get_by_role("button", name="Open").click()
    expect(tab.page.get_by_text("there is no manager yet")).to_be_visible()


def test_a_token_that_was_changed_asks_for_the_new_one(hive: Hive, tab: Tab) -> None:
    tab.expected = ["401", "ERR_INCOMPLETE"]
    expect(tab.page.get_by_text("there is no manager yet")).to_be_visible()
    assert hive.cli("token", "--rotate").returncode == 0
    tab.go("usage")
    tab.page.get_by_label("Paste the token").fill(f"{hive.url}/#token={hive.token}")
    tab.page.keyboard.press("Enter")
    expect(tab.page.get_by_text("No turn has been counted yet.")).to_be_visible()


# ── requests ──


def test_an_empty_hive_explains_itself_in_three_steps(hive: Hive, tab: Tab) -> None:
    welcome = tab.page.get_by_role("article", name="Welcome")
    step = welcome.locator("ol.welcome > [aria-current=step]")
    expect(tab.page).to_have_title("(1) hyperhive")
    expect(welcome.get_by_role("listitem")).to_have_count(3)
    expect(step).to_contain_text("Start the manager")
    step.get_by_role("button", name="Start the manager").click()
    expect(step).to_contain_text("Ask it for something")  # a rehearsal is signed in
    expect(tab.page).to_have_title("hyperhive")
    expect(tab.page.get_by_role("complementary").get_by_role("link", name="manager")).to_be_visible()
    wait_for(lambda: settled(hive), "the deploy to end")
    assert hive.cli("stop", "manager").returncode == 0
    expect(welcome.get_by_role("heading", name="the manager is stopped")).to_be_visible()
    expect(step.get_by_role("button", name="Start the manager")).to_be_enabled()
    step.get_by_role("button", name="Start the manager").click()
    step.get_by_label("Write to manager").fill("Please look after the backups.")
    step.get_by_role("button", name="Send to manager").click()
    expect(welcome).to_have_count(0)
    expect(tab.page.get_by_role("complementary")).to_contain_text("Please look after the backups.")


def test_the_managers_sign_in_is_the_first_card(hive: Hive, tab: Tab) -> None:
    spawn(hive, "manager")
    with hive.agent("manager") as manager:
        assert manager.ask("remind", body=rehearse({"fail": "authentication_failed"}), delay_s=1)["ok"]
    welcome = tab.page.locator("article.card").first
    expect(tab.page).to_have_title("(1) hyperhive")
    expect(welcome.locator("ol.welcome > [aria-current=step]")).to_contain_text("Sign it in")
    welcome.get_by_role("button", name="Sign manager in").click()
    welcome.get_by_label("Code for manager").fill("right#state")
    welcome.get_by_role("button", name="Finish").click()
    expect(welcome.locator("ol.welcome > [aria-current=step]")).to_contain_text("Ask it for something")


def test_a_manager_that_cannot_work_is_not_called_ready(hive: Hive, tab: Tab) -> None:
    spawn(hive, "manager")
    welcome = tab.page.get_by_role("article", name="Welcome")
    step = welcome.locator("ol.welcome > [aria-current=step]")
    expect(step).to_contain_text("Ask it for something")
    assert hive.cli("pause", "manager").returncode == 0
    expect(welcome.get_by_role("heading")).to_have_text("the manager is paused")
    expect(step).to_contain_text("Paused by you.")
    assert hive.cli("resume", "manager").returncode == 0
    expect(step).to_contain_text("Ask it for something")


def test_a_request_is_read_and_approved_with_a_click(hive: Hive, tab: Tab) -> None:
    spawn(hive, "manager")
    with hive.agent("manager") as manager:
        number = request_alice(manager)
    request = card(tab, "a new agent, alice")
    expect(request.get_by_text("She writes reports.")).to_be_visible()
    expect(request.locator(".diff .added")).to_have_count(4)
    expect(request.locator(".diff")).to_contain_text("pkgs.ripgrep")
    request.get_by_role("button", name=f"Approve request {number}").click()
    expect(tab.page.get_by_text("Nothing waits for you")).to_be_visible()
    expect(tab.page.get_by_role("complementary").get_by_role("link", name="alice")).to_be_visible()
    wait_for(lambda: row_of(hive, "alice")["state"] == "idle" and settled(hive), "alice to be idle")
    tab.go("deploys")
    history = tab.page.get_by_role("main").locator(".row").filter(has_text="alice")
    expect(history).to_contain_text("✓ deployed")
    history.get_by_role("button", name="Log").click()
    expect(history.get_by_role("log")).not_to_have_text("No line yet.")
    tab.go(f"approvals/{number}")
    expect(card(tab, "a new agent, alice")).to_contain_text("Approved by you")


def test_an_approval_is_undone_while_there_is_time(folder: Path, open_tab: Callable[..., Tab]) -> None:
    with Hive(folder, undo_s=60.0) as hive:
        spawn(hive, "manager")
        with hive.agent("manager") as manager:
            number = request_alice(manager)
        tab = open_tab(f"{hive.url}/#token={hive.token}")
        tab.page.get_by_role("button", name=f"Approve request {number}").click()
        tab.page.get_by_role("button", name=f"Undo the approval of request {number}").click()
        expect(tab.page.get_by_role("button", name=f"Approve request {number}")).to_be_enabled()
        assert hive.api("GET", f"/api/approvals/{number}").body["approval"]["status"] == "pending"
        tab.expected = ["ERR_"]  # the hive of this test goes before its page


def test_a_request_is_denied_with_a_note(hive: Hive, tab: Tab) -> None:
    spawn(hive, "manager")
    with hive.agent("manager") as manager:
        number = request_alice(manager)
    tab.page.get_by_label("Note to manager").fill("Not today.")
    tab.page.get_by_role("button", name=f"Deny request {number}").click()
    expect(tab.page.get_by_text("Nothing waits for you")).to_be_visible()
    row = hive.api("GET", f"/api/approvals/{number}").body["approval"]
    assert (row["status"], row["note"]) == ("denied", "Not today.")
    tab.page.get_by_role("link", name="All requests").click()
    expect(tab.page.get_by_role("main").locator("a.row")).to_contain_text("denied")


TWICE_D = """() => {
  for (const key of ["d", "d"]) document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
}"""


def test_a_key_decides_the_marked_request_and_only_that(hive: Hive, tab: Tab) -> None:
    spawn(hive, "manager")
    with hive.agent("manager") as manager:
        first, second = request_alice(manager), request_alice(manager, name="bob")
    expect(card(tab, "agent, bob").locator(".diff")).to_be_visible()
    expect(card(tab, "agent, alice").locator("[aria-keyshortcuts]")).to_have_text(["Deny", "Approve"])
    note = tab.page.get_by_label("Note to manager").first
    note.press("a")  # typed, not pressed
    expect(note).to_have_value("a")
    note.press("Escape")
    tab.page.wait_for_timeout(1000)  # keys rest for a moment when the mark moves by itself
    tab.page.evaluate(TWICE_D)  # a second press that was meant for the same request
    expect(card(tab, "agent, alice")).to_have_count(0)
    expect(card(tab, "agent, bob").locator("[aria-keyshortcuts]")).to_have_text(["Deny", "Approve"])
    states = [hive.api("GET", f"/api/approvals/{number}").body["approval"]["status"] for number in (first, second)]
    assert states == ["denied", "pending"]
    tab.page.wait_for_timeout(1000)
    tab.page.keyboard.press("a")
    expect(tab.page.get_by_text("Nothing waits for you")).to_be_visible()
    assert hive.api("GET", f"/api/approvals/{second}").body["approval"]["status"] == "approved"
    wait_for(lambda: row_of(hive, "bob")["state"] == "idle", "bob to be idle")


def test_a_refusal_is_shown_where_the_button_is(hive: Hive, tab: Tab) -> None:
    tab.expected = ["40[049]"]
    spawn(hive, "manager")
    tab.go("agents")
    tab.page.get_by_role("button", name="Manage manager").click()
    back = tab.page.get_by_role("button", name="Roll back manager")
    back.click()
    tab.page.get_by_role("button", name="Keep").click()
    back.click()
    tab.page.get_by_role("button", name="Roll manager back").click()
    expect(tab.page.get_by_role("alert")).not_to_be_empty()
    expect(back).to_be_enabled()


# ── questions ──


def test_questions_are_answered_by_option_and_in_own_words(hive: Hive, tab: Tab) -> None:
    spawn(hive, "alice")
    with hive.agent("alice") as alice:
        asked = [
            alice.ask("ask", question="Merge it?\nThe test is missing.", options=["Yes", "Wait for bob"])["id"],
            alice.ask("ask", question="What shall it be called?")["id"],
            alice.ask("ask", question="Which ones?", options=["red", "green", "blue"], multi=True)["id"],
        ]
    merge = card(tab, "Merge it?")
    expect(merge).to_contain_text("The test is missing.")
    merge.get_by_role("button", name="Wait for bob").click()
    expect(merge).to_have_count(0)
    called = card(tab, "What shall it be called?").get_by_label("Answer to alice")
    called.fill("hyperhive")
    called.press("Enter")
    expect(called).to_have_count(0)
    which = card(tab, "Which ones?")
    which.get_by_role("button", name="red").click()
    which.get_by_role("button", name="blue").click()
    which.get_by_label("Answer to alice").fill("and honey")
    which.get_by_role("button", name="Send").click()
    expect(which).to_have_count(0)
    rows = {row["id"]: row.get("answer") for row in hive.api("GET", "/api/questions").body["questions"]}
    assert [rows[number] for number in asked] == ["Wait for bob", "hyperhive", "red, blue, and honey"]


# ── live ──


def test_what_is_typed_survives_what_comes_in(hive: Hive, tab: Tab) -> None:
    spawn(hive, "manager")
    spawn(hive, "alice")
    with hive.agent("manager") as manager:
        request_alice(manager, name="bob")
        note = tab.page.get_by_label("Note to manager")
        note.fill("half a tho")
        note.evaluate("field => field.setSelectionRange(2, 4)")
        for number in range(3):
            manager.ask("send", to="operator", body=f"news {number}")
            expect(tab.page.get_by_role("complementary")).to_contain_text(f"news {number}")
        request_alice(manager, name="carol")
    expect(card(tab, "agent, carol")).to_be_visible()
    with hive.agent("alice") as alice:
        alice.ask("ask", question="And this?")
    expect(card(tab, "And this?")).to_be_visible()
    expect(note.first).to_have_value("half a tho")
    expect(note.first).to_be_focused()
    assert note.first.evaluate("field => [field.selectionStart, field.selectionEnd]") == [2, 4]
    tab.go("agents")
    expect(tab.page.get_by_role("heading", name="Agents", exact=True)).to_be_visible()
    tab.go("call")
    expect(note.first).to_have_value("half a tho")
    tab.page.reload()
    expect(note.first).to_have_value("half a tho")


def test_flow_shows_messages_as_they_come_and_writes_to_one_or_all(hive: Hive, tab: Tab) -> None:
    for name in ("alice", "bob"):
        spawn(hive, name)
    tab.go("flow")
    messages = tab.page.locator("article.message")
    tab.page.get_by_label("To", exact=True).select_option("bob")
    tab.page.get_by_label("Message", exact=True).fill("Good morning, bob.")
    tab.page.get_by_role("button", name="Send").click()
    expect(messages.filter(has_text="Good morning, bob.")).to_contain_text("you → bob")
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("")
    tab.page.get_by_label("To", exact=True).select_option("*")
    tab.page.get_by_label("Message", exact=True).fill("Good evening, all.")
    tab.page.get_by_label("Message", exact=True).press("Control+Enter")
    expect(messages.filter(has_text="Good evening, all.")).to_have_count(1)
    expect(messages.filter(has_text="Good evening, all.")).to_contain_text("you → all")
    with hive.agent("alice") as alice:
        first = alice.ask("send", to="operator", body="Where is the report?")["id"]
    expect(messages.filter(has_text="Where is the report?")).to_be_visible()
    wait_for(lambda: state_of(hive, first) == "acked", "the message to count as read")
    tab.page.get_by_role("link", name=f"#{first}", exact=True).click()
    tab.page.get_by_label("Reply to alice").fill("In the shared folder.")
    tab.page.get_by_role("button", name="Send").click()
    reply = messages.filter(has_text="In the shared folder.")
    expect(reply).to_contain_text(f"in reply to #{first}")
    expect(messages).to_have_count(2)  # the thread, and nothing else


def test_copies_of_one_message_are_shown_once_in_whatever_order_they_come(hive: Hive, tab: Tab) -> None:
    for name in ("alice", "bob"):
        spawn(hive, name)
    tab.go("flow")
    tab.expected.append("404")  # the host knows nothing of what is made up here
    expect(tab.page.get_by_text("No message yet. What agents")).to_be_visible()
    copy = {"from": "operator", "at": "2026-01-01T00:00:00Z", "body": "To all of you.", "broadcast": True}
    rows = [
        copy | {"id": 4, "to": "bob", "state": "acked"},
        copy | {"id": 3, "to": "erin", "state": "queued", "body": "To her alone.", "broadcast": False},
        copy | {"id": 5, "to": "operator", "from": "bob", "state": "acked", "in_reply_to": 4, "broadcast": False},
        copy | {"id": 2, "to": "alice", "state": "queued"},
    ]
    tab.page.evaluate(
        "async rows => { const { take } = await import('/static/store.js');"
        " rows.forEach(row => take('change', { kind: 'message', row })); }",
        rows,
    )
    messages = tab.page.locator("article.message")
    expect(messages.locator(".meta > a:first-child")).to_have_text(["#2", "#3", "#5"])
    expect(messages.first).to_contain_text("you → all")
    expect(messages.first).to_contain_text("1 waiting")
    messages.first.get_by_role("link", name="#2").click()
    expect(messages.locator(".meta > a:first-child")).to_have_text(["#2", "#5"])  # bob answered his copy


def state_of(hive: Hive, number: int) -> str:
    rows = hive.api("GET", "/api/messages").body["messages"]
    return next(str(row["state"]) for row in rows if row["id"] == number)


def test_a_lost_daemon_is_told_and_its_return_brings_what_was_missed(hive: Hive, tab: Tab) -> None:
    tab.expected = ["ERR_", "Failed to load"]
    spawn(hive, "alice")
    tab.go("flow")
    tab.page.get_by_label("Message", exact=True).fill("half a tho")
    hive.stop()
    expect(tab.page.get_by_text("Disconnected since")).to_be_visible()
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("half a tho")
    hive.start()
    hive.cli("send", "alice", "sent while nobody looked")
    expect(tab.page.get_by_text("Disconnected since")).to_have_count(0)
    expect(tab.page.locator("article.message").filter(has_text="sent while nobody looked")).to_be_visible()
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("half a tho")
    wait_for(lambda: row_of(hive, "alice")["state"] == "idle", "alice to be idle again")


# ── agents ──


def test_the_levers_of_an_agent(hive: Hive, tab: Tab) -> None:
    spawn(hive, "alice")
    tab.go("agents")
    row = tab.page.get_by_role("main").locator(".row.agent").filter(has_text="alice")
    row.get_by_role("button", name="Manage alice").click()
    row.get_by_role("button", name="Pause alice").click()
    expect(row.locator(".agent-top")).to_contain_text("paused")
    row.get_by_role("button", name="Resume alice").click()
    expect(row.locator(".agent-top")).to_contain_text("idle")
    row.get_by_role("button", name="Stop alice").click()
    expect(row.locator(".agent-top")).to_contain_text("stopped")
    row.get_by_role("button", name="Start alice").click()
    expect(row.locator(".agent-top")).to_contain_text("idle")
    row.get_by_role("button", name="Destroy…").click()
    destroy = row.get_by_role("button", name="Destroy", exact=True)
    expect(destroy).to_be_disabled()
    row.get_by_label("Type alice to confirm").fill("alic")
    expect(destroy).to_be_disabled()
    row.get_by_label("Type alice to confirm").fill("alice")
    destroy.click()
    kept = tab.page.locator(".row.kept").filter(has_text="alice")
    expect(kept).to_contain_text("destroyed, state kept")
    kept.get_by_role("button", name="Revive").click()
    expect(kept).to_have_count(0)
    expect(row.locator(".agent-top")).to_contain_text("idle")


def test_all_are_paused_and_resumed_at_once(hive: Hive, tab: Tab) -> None:
    for name in ("alice", "bob"):
        spawn(hive, name)
    tab.page.get_by_role("button", name="Pause all").click()
    expect(tab.page.get_by_role("button", name="Resume all")).to_be_enabled()
    assert [row_of(hive, name)["paused"] for name in ("alice", "bob")] == [True, True]
    tab.page.get_by_role("button", name="Resume all").click()
    expect(tab.page.get_by_role("button", name="Pause all")).to_be_enabled()
    assert [row_of(hive, name)["paused"] for name in ("alice", "bob")] == [False, False]


def test_an_agent_is_made_on_the_page_and_a_bad_name_is_explained(hive: Hive, tab: Tab) -> None:
    tab.expected = ["400"]
    tab.go("agents")
    tab.page.get_by_label("Name of a new agent").fill("Alice")
    tab.page.get_by_role("button", name="Create the agent").click()
    expect(tab.page.get_by_role("alert")).to_contain_text("Alice")
    tab.page.get_by_label("Name of a new agent").fill("alice")
    tab.page.get_by_label("What it is for").fill("reports")
    tab.page.get_by_role("button", name="Create the agent").click()
    expect(tab.page.get_by_role("main").get_by_role("link", name="alice")).to_be_visible()
    wait_for(lambda: row_of(hive, "alice")["state"] == "idle", "alice to be idle")


# ── one agent, on the dashboard and on its own page ──


def check_agent_view(tab: Tab) -> None:
    """A turn as it happens: text, thinking, a tool with its result, a message into it, and its interruption."""
    page = tab.page
    steps = [
        {"thinking": "a first thought\nand a second"},
        {"tool": "Bash", "input": {"command": "seq 1 40"}},
        {"text": "Counted to forty."},
        {"tool": "Bash", "input": {"command": "sleep 60"}},
    ]
    page.get_by_label("Write to alice").fill(rehearse(*steps))
    page.get_by_role("button", name="Send to alice").click()
    expect(page.get_by_label("Write to alice")).to_have_value("")
    turn = page.locator("section.turn").filter(has_text="Counted to forty.").last
    expect(turn.locator(".prose").filter(has_text=re.compile("^Counted to forty.$"))).to_be_visible()
    expect(turn.locator(".step").filter(has_text="from you").first).to_contain_text("rehearse")
    turn.get_by_role("button", name="2 lines, unfold").click()
    expect(turn.locator(".thinking").get_by_text("and a second")).to_be_visible()
    expect(turn.locator(".tool").first).not_to_contain_text("39")
    turn.get_by_role("button", name="all 40 lines").click()
    expect(turn.locator(".tool").first).to_contain_text("39")
    expect(page.get_by_role("button", name="Interrupt", exact=True)).to_be_enabled()
    page.get_by_role("button", name="Interrupt", exact=True).click()
    expect(turn).to_contain_text("Interrupted")
    expect(page.get_by_role("button", name="Interrupt", exact=True)).to_be_disabled()
    turn.locator(".turn-line").click()
    expect(turn.locator(".steps")).to_have_count(0)
    expect(turn).to_contain_text("2 tools")


def test_an_agent_on_the_dashboard(hive: Hive, tab: Tab) -> None:
    spawn(hive, "alice")
    tab.go("agents/alice")
    check_agent_view(tab)
    tab.page.reload()
    expect(tab.page.locator("section.turn").filter(has_text="Counted to forty.")).to_be_visible()


def test_an_agent_on_its_own_page(hive: Hive, open_tab: Callable[..., Tab]) -> None:
    spawn(hive, "alice")
    url = row_of(hive, "alice")["url"]
    tab = open_tab(url)
    expect(tab.page.get_by_role("heading", name="alice").first).to_be_visible()
    assert "#" not in tab.page.url
    expect(tab.page.get_by_text("Rehearsal: a scripted stand-in")).to_be_visible()
    check_agent_view(tab)
    with hive.agent("alice") as alice:
        alice.ask("ask", question="Is anybody there?")
    hive.cli("send", "alice", rehearse({"text": "Now there is something to look up."}))
    expect(tab.page.get_by_role("complementary")).to_contain_text("Is anybody there?")


def test_the_page_of_an_agent_wants_its_own_token(hive: Hive, open_tab: Callable[..., Tab]) -> None:
    spawn(hive, "alice")
    tab = open_tab(row_of(hive, "alice")["url"].partition("#")[0] + f"#token={hive.token}")
    tab.expected = ["401"]
    expect(tab.page.get_by_label("Paste the token")).to_be_visible()
    expect(tab.page.get_by_role("alert")).to_contain_text("not valid")


def test_earlier_turns_are_fetched_on_demand(hive: Hive, open_tab: Callable[..., Tab]) -> None:
    spawn(hive, "alice")
    steps = [{"text": f"line {number}"} for number in range(330)]
    with hive.agent("alice") as alice:
        events = [
            {"id": 1000 + number, "at": "2026-01-01T00:00:00Z", "turn": 70 + number // 10, "kind": "text", "data": step}
            for number, step in enumerate(steps)
        ]
        assert alice.ask("report", events=events)["ok"]
    tab = open_tab(f"{hive.url}/#token={hive.token}")
    tab.go("agents/alice")
    expect(tab.page.locator("section.turn")).to_have_count(30)
    tab.page.get_by_role("button", name="Earlier…").click()
    expect(tab.page.locator("section.turn").first).to_contain_text("Turn 70")
    expect(tab.page.locator("section.turn")).to_have_count(33)


# ── shapes of screen ──


def test_on_a_phone_tabs_lie_at_the_bottom_and_state_unfolds(hive: Hive, open_tab: Callable[..., Tab]) -> None:
    spawn(hive, "alice")
    tab = open_tab(f"{hive.url}/#token={hive.token}", viewport={"width": 390, "height": 780})
    tabs = tab.page.get_by_role("navigation", name="Views")
    expect(tabs.get_by_role("link")).to_have_count(5)
    box = tabs.bounding_box()
    assert box and box["y"] > 700
    tabs.get_by_role("link", name="Agents").click()
    tab.page.get_by_role("main").get_by_role("link", name="alice").click()
    tab.page.get_by_role("button", name="State", exact=True).click()
    expect(tab.page.get_by_role("button", name="Pause alice")).to_be_visible()


def test_mail_that_was_set_aside_is_given_again(hive: Hive, tab: Tab) -> None:
    hive.spawn("bob")
    number = hive.ask(cmd="send", to="bob", body="The stone in the shoe.")["id"]
    for attempt in range(1, 6):
        with hive.agent("bob") as bob:
            assert bob.ask("lease", wait_s=20)["messages"][0]["attempts"] == attempt
    tab.go("call")
    card = tab.page.locator("article.card").filter(has_text="The stone in the shoe.")
    expect(card.get_by_role("link", name=f"Look at #{number}")).to_have_attribute("href", f"#/flow/thread/{number}")
    card.get_by_role("button", name="Give it again").click()
    expect(card).to_have_count(0)
    with hive.agent("bob") as bob:
        messages = bob.ask("lease", wait_s=20)["messages"]
        assert [(row["id"], row["attempts"]) for row in messages] == [(number, 1)]
        assert bob.ask("ack", ids=[number])["acked"] == 1


def test_a_link_leads_to_the_very_thing(hive: Hive, open_tab: Callable[..., Tab]) -> None:
    hive.spawn("alice", "bob")
    for name in ("alice", "bob"):
        with hive.agent(name) as agent:
            last = [agent.ask("ask", question=f"Is this the {number} of {name}?")["id"] for number in range(8)][-1]
    tab = open_tab(f"{hive.url}/#token={hive.token}")
    expect(tab.page.get_by_role("heading", name="17 things wait for you")).to_be_visible()
    tab.page.goto(f"{hive.url}/#/call/question-{last}")
    tab.page.reload()
    marked = tab.page.locator("article.card.marked")
    expect(marked).to_contain_text("Is this the 7 of bob?")
    expect(marked).to_be_in_viewport()
    tab.go("call/question-1")
    expect(marked).to_contain_text("Is this the 0 of alice?")
    expect(marked).to_be_in_viewport()


def test_a_thread_is_whole_however_old_and_earlier_leaves_no_hole(crew: Hive, open_tab: Callable[..., Tab]) -> None:
    with crew.agent("alice") as alice, crew.agent("bob") as bob:
        first = alice.ask("send", to="bob", body="How long is a piece of string?")["id"]
        for number in range(250):
            bob.ask("send", to="operator", body=f"line {number}")
        second = crew.ask(cmd="send", to="alice", body="Twice half of it.", in_reply_to=first)["id"]
        for number in range(150):
            bob.ask("send", to="operator", body=f"row {number}")
    tab = open_tab(f"{crew.url}/#token={crew.token}")
    tab.expected.append("404")
    messages = tab.page.locator("article.message")
    for number in (first, second):
        tab.page.goto(f"{crew.url}/#/flow/thread/{number}")
        tab.page.reload()
        expect(messages).to_have_count(2)
        expect(messages.first).to_contain_text("How long is a piece of string?")
    tab.go("flow/thread/999999")
    expect(tab.page.get_by_text("There is no message #999999.")).to_be_visible()
    tab.go("flow")
    tab.page.get_by_label("with").select_option("alice")
    expect(messages).to_have_count(0)
    tab.page.get_by_role("button", name="Earlier…").click()
    expect(messages).to_have_count(2)
    tab.page.get_by_label("with").select_option("")
    expect(messages).to_have_count(len(crew.api("GET", "/api/messages?max=1000").body["messages"]))
    expect(tab.page.get_by_role("button", name="Earlier…")).to_have_count(0)
