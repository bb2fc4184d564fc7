"""Writing to agents in a real browser: files that go along, and messages that the hive writes later by itself."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import browserbox
import pytest
from browserbox import Tab, row_of, spawn, wait_beside
from hive import Hive, wait_for
from playwright.sync_api import Locator, Route, expect

browser, open_tab = browserbox.browser, browserbox.open_tab  # fixtures

PASTE = """(field, [name, type]) => {
  const clipboardData = new DataTransfer();
  clipboardData.items.add(new File(["a picture"], name, { type }));
  field.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
}"""
DROP = """(composer) => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File(["one"], "one.txt"));
  dataTransfer.items.add(new File(["two"], "two.txt"));
  for (const kind of ["dragover", "drop"])
    composer.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def team() -> Iterator[Hive]:
    """One hive for the module: three agents are deployed and stopped, and a file may have 2,000 bytes."""
    with (
        tempfile.TemporaryDirectory(prefix="hh-", dir="/tmp") as place,
        Hive(Path(place), limits={"attachment_bytes": 2000}) as hive,
    ):
        yield hive.spawn("alice", "bob", "carol")


@pytest.fixture
def tab(team: Hive, open_tab: Callable[..., Tab]) -> Tab:
    return open_tab(f"{team.url}/#token={team.token}")


def last_body(hive: Hive) -> str:
    return str(hive.api("GET", "/api/messages").body["messages"][-1]["body"])


def names_of_files(hive: Hive) -> set[str]:
    return {row["name"] for row in hive.api("GET", "/api/files").body["files"]}


def chips(tab: Tab) -> Locator:
    return tab.page.get_by_role("list", name="Attached files").get_by_role("listitem")


def test_files_go_along_with_a_message(team: Hive, tab: Tab, tmp_path: Path) -> None:
    report = tmp_path / "quarterly report.md"
    report.write_text("x" * 1536)
    tab.go("flow")
    tab.page.get_by_label("Message", exact=True).fill("Read this.")
    with tab.page.expect_file_chooser() as chooser:
        tab.page.get_by_role("button", name="Attach").click()
    chooser.value.set_files(report)
    expect(chips(tab)).to_contain_text("quarterly-report.md")
    expect(chips(tab)).to_contain_text("2 KiB")
    slow: list[Route] = []
    tab.page.route(re.compile("name=image"), lambda route: slow.append(route), times=1)
    tab.page.get_by_label("Message", exact=True).evaluate(PASTE, ["image.png", "image/png"])
    expect(chips(tab)).to_have_count(2)
    wait_beside(tab, lambda: slow, "it to be handed over")
    tab.page.locator(".composer").evaluate(DROP)
    expect(chips(tab)).to_have_count(4)
    expect(chips(tab).get_by_role("status")).to_have_count(1)  # all others have arrived
    slow[0].continue_()
    expect(chips(tab).get_by_role("status")).to_have_count(0)
    chips(tab).filter(has_text="one.txt").get_by_role("button", name="Remove one.txt").click()
    expect(chips(tab)).to_have_count(3)
    assert names_of_files(team) == {"quarterly-report.md", "image.png", "two.txt"}
    tab.page.reload()  # what was handed over belongs to the draft
    expect(chips(tab)).to_have_count(3)
    tab.page.get_by_role("button", name="Send").click()
    expect(chips(tab)).to_have_count(0)
    folder = team.state / "operator"
    lines = [("quarterly-report.md", "2 KiB"), ("image.png", "9 bytes"), ("two.txt", "3 bytes")]
    wait_for(lambda: "Read this." in last_body(team), "the message")
    body, *attached = last_body(team).splitlines()
    assert (body, attached[1:]) == ("Read this.", [f"Attached: {folder / name} ({size})" for name, size in lines])


def test_a_file_that_is_too_large_says_so_and_the_text_stays(team: Hive, tab: Tab) -> None:
    tab.go("agents/alice")
    field = tab.page.get_by_label("Write to alice")
    field.fill("half a tho")
    large = {"name": "large.bin", "mimeType": "application/octet-stream", "buffer": b"x" * 2001}
    tab.page.locator("input[type=file]").set_input_files([large])  # type: ignore[list-item]
    expect(chips(tab).get_by_role("alert")).to_contain_text("a file may have at most 2 KiB")
    expect(field).to_have_value("half a tho")
    tab.page.get_by_role("button", name="Remove large.bin").click()
    expect(chips(tab)).to_have_count(0)
    expect(field).to_have_value("half a tho")


def test_what_the_hive_refuses_is_said_at_the_file(team: Hive, tab: Tab) -> None:
    tab.expected = ["413"]
    tab.page.route(
        re.compile("/api/files$"), lambda route: route.fulfill(json={"files": [], "max_bytes": 9_000_000})
    )  # the page believes that there is room
    tab.go("flow")
    large = {"name": "large.bin", "mimeType": "application/octet-stream", "buffer": b"x" * 2001}
    tab.page.locator("input[type=file]").set_input_files([large])  # type: ignore[list-item]
    expect(chips(tab).get_by_role("alert")).not_to_be_empty()
    expect(tab.page.get_by_role("button", name="Send")).to_be_enabled()


def test_attached_files_are_listed_and_deleted_after_a_question(team: Hive, tab: Tab) -> None:
    tab.go("flow")
    held: list[Route] = []
    tab.page.route(re.compile("/api/files\\?name="), lambda route: held.append(route))
    small = {"name": "old.txt", "mimeType": "text/plain", "buffer": b"x"}
    with tab.page.expect_request(re.compile(r"/api/files\?name=")):
        tab.page.locator("input[type=file]").set_input_files([small])  # type: ignore[list-item]
    expect(chips(tab)).to_contain_text("1 byte")
    tab.go("system")
    expect(tab.page.get_by_role("main")).to_contain_text("Attached files")
    row = tab.page.locator(".row").filter(has_text="/old.txt")
    expect(row).to_have_count(0)
    held[0].continue_()  # it is there only after the list was asked for
    row.get_by_role("button", name="Delete the file old.txt").click()
    row.get_by_role("button", name="Keep").click()
    row.get_by_role("button", name="Delete the file old.txt").click()
    row.get_by_role("button", name="Delete old.txt", exact=True).click()
    expect(row).to_have_count(0)
    assert "old.txt" not in names_of_files(team)


def test_a_file_that_comes_while_a_message_goes_waits_for_the_next(team: Hive, tab: Tab) -> None:
    tab.go("flow")
    held: list[Route] = []
    tab.page.route(re.compile("/api/messages$"), lambda route: held.append(route))
    tab.page.get_by_label("Message", exact=True).fill("Without it.")
    with tab.page.expect_request(re.compile("/api/messages$")):
        tab.page.get_by_role("button", name="Send").click()
    small = {"name": "late.txt", "mimeType": "text/plain", "buffer": b"x"}
    tab.page.locator("input[type=file]").set_input_files([small])  # type: ignore[list-item]
    expect(chips(tab)).to_contain_text("1 byte")
    wait_for(lambda: "late.txt" in names_of_files(team), "the file")
    expect(chips(tab)).not_to_contain_text("%")
    held[0].continue_()
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("")
    expect(chips(tab)).to_contain_text("late.txt")
    assert last_body(team) == "Without it."


def recipients_of(hive: Hive, body: str) -> list[str]:
    rows = hive.api("GET", "/api/messages?max=1000").body["messages"]
    return [row["to"] for row in rows if row["body"] == body]


def test_a_message_goes_to_whom_the_field_names(team: Hive, tab: Tab) -> None:
    with team.agent("alice") as alice:
        first = alice.ask("send", to="operator", body="Where is bob?")["id"]
    tab.go(f"flow/thread/{first}")
    to, field = tab.page.get_by_label("To", exact=True), tab.page.locator(".composer textarea")
    expect(to).to_have_value("alice")
    to.select_option("bob")
    field.fill("For bob alone.")
    tab.page.get_by_role("button", name="Send").click()
    expect(field).to_have_value("")
    to.select_option("*")
    field.fill("For everyone.")
    tab.page.get_by_role("button", name="Send").click()
    expect(field).to_have_value("")
    assert recipients_of(team, "For bob alone.") == ["bob"]
    assert sorted(recipients_of(team, "For everyone.")) == ["alice", "bob", "carol"]
    tab.go("flow")
    expect(to).to_have_value("alice")  # what was chosen in a thread is the thread's
    tab.page.evaluate("sessionStorage.setItem('drafts', JSON.stringify({ 'flow:to': 'gone' }))")
    tab.page.reload()
    expect(to).to_have_value("alice")
    field.fill("Who is gone gets nothing.")
    tab.page.get_by_role("button", name="Send").click()
    expect(field).to_have_value("")
    assert recipients_of(team, "Who is gone gets nothing.") == ["alice"]


def test_who_got_a_message_gets_it_once_though_another_was_refused(team: Hive, tab: Tab) -> None:
    tab.expected = ["429"]
    tab.go("flow")
    refused: list[str] = []

    def refuse_once(route: Route) -> None:
        if refused or route.request.post_data_json["to"] != "carol":
            return route.continue_()
        refused.append("carol")
        return route.fulfill(status=429, json={"error": "Too many.", "code": "rate"})

    tab.page.route(re.compile("/api/messages$"), refuse_once)
    tab.page.get_by_label("To", exact=True).select_option("several")
    for name in ("bob", "carol"):
        tab.page.get_by_role("group", name="Recipients").get_by_role("button", name=name).click()
    field = tab.page.get_by_label("Message", exact=True)
    field.fill("Once for each of you.")
    tab.page.get_by_role("button", name="Send").click()
    expect(tab.page.get_by_role("alert")).to_contain_text("Too many.")
    tab.page.get_by_role("button", name="Send").click()
    expect(field).to_have_value("")
    assert recipients_of(team, "Once for each of you.") == ["bob", "carol"]


def test_the_page_of_an_agent_takes_no_files(folder: Path, open_tab: Callable[..., Tab]) -> None:
    with Hive(folder) as hive:
        spawn(hive, "alice")
        tab = open_tab(row_of(hive, "alice")["url"])
        tab.expected = ["ERR_"]  # the hive of this test goes before its page
        expect(tab.page.get_by_label("Write to alice")).to_be_visible()
        expect(tab.page.get_by_role("button", name="Attach")).to_have_count(0)


def test_a_schedule_is_made_and_cancelled(team: Hive, tab: Tab) -> None:
    tab.go("system")
    tab.page.get_by_role("button", name="New schedule").click()
    create = tab.page.get_by_role("button", name="Create the schedule")
    expect(create).to_be_disabled()
    tab.page.get_by_label("Recipient of the schedule").select_option("bob")
    tab.page.get_by_label("Text of the schedule").fill("Look at the inbox.")
    tab.page.get_by_label("First time, by your clock").fill("2099-01-31T08:30")
    tab.page.get_by_label("How often").select_option("hours")
    tab.page.get_by_label("Number").fill("2")
    tab.page.reload()  # half a form survives
    tab.page.get_by_role("button", name="New schedule").click()
    expect(tab.page.get_by_label("Text of the schedule")).to_have_value("Look at the inbox.")
    create.click()
    expect(create).to_have_count(0)
    row = tab.page.locator(".row").filter(has_text="Look at the inbox.")
    expect(row).to_contain_text("bob")
    expect(row).to_contain_text("every 2 h · next 31 Jan 2099")
    kept = team.api("GET", "/api/schedules").body["schedules"]
    assert [(one["to"], one["every_s"], one["body"]) for one in kept] == [("bob", 7200, "Look at the inbox.")]
    row.get_by_role("button", name=re.compile("Cancel schedule")).click()
    row.get_by_role("button", name="Cancel the schedule").click()
    expect(row).to_have_count(0)
    assert ["next" in one for one in team.api("GET", "/api/schedules").body["schedules"]] == [False]
