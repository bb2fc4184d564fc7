"""Requests in a real browser: all that is shown before the decision, the decision itself, and what follows."""

from __future__ import annotations

import base64
import json
import os
import re
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import browserbox
import pytest
from browserbox import Tab, card
from hive import Hive, wait_for
from nixos import NixosHive
from playwright.sync_api import Route, expect

browser, open_tab = browserbox.browser, browserbox.open_tab  # fixtures

FIRST = "{ pkgs, ... }:\n{\n  environment.systemPackages = [ pkgs.git ];\n}\n"
SECOND = FIRST.replace("pkgs.git", "pkgs.git pkgs.librsvg").replace("}\n", '  # it draws\n  users.motd = "hi";\n}\n', 2)

# A page that hears no more of the hive, but can still press a button.
DEAF = """() => {
  const known = window.fetch;
  window.fetch = (path, ...more) =>
    /stream|approvals.[0-9]+$/.test(path) ? new Promise(() => {}) : known(path, ...more);
}"""


@pytest.fixture(scope="module")
def team() -> Iterator[Hive]:
    """One hive for the module: manager and alice are deployed and stopped, so that tests can speak as them."""
    limits = {"messages_per_minute": 0, "pending_approvals": 1000, "wrong_tokens_per_minute": 10_000}
    with (
        tempfile.TemporaryDirectory(prefix="hh-", dir="/tmp") as place,
        Hive(Path(place), undo_s=0.0, limits=limits) as hive,
    ):
        yield hive.spawn("manager", "alice")


@pytest.fixture
def tab(team: Hive, open_tab: Callable[..., Tab]) -> Tab:
    return open_tab(f"{team.url}/#token={team.token}")


def propose(hive: Hive, folder: Path, files: dict[str, str], description: str = "She draws.") -> int:
    """The manager asks for these files as alice's config."""
    env = {
        **os.environ,
        **{f"GIT_{who}_{what}": "m@n" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    source = folder / "source"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=source, env=env, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    with hive.agent("manager") as manager:
        known = manager.ask("checkout_config", agent="alice")
        if not source.exists():
            source.mkdir()
            git("init", "-q", "-b", "main")
        (source / "bundle").write_bytes(base64.b64decode(known["bundle"]))
        git("fetch", "-q", "bundle", "refs/heads/main")
        git("reset", "-q", "--hard", known["sha"])
        for path, text in files.items():
            (source / path).write_text(text)
        git("add", *files)
        git("commit", "-q", "-m", "a change")
        git("bundle", "create", "-q", "new", "main")
        bundle = base64.b64encode((source / "new").read_bytes()).decode()
        answer = manager.ask(
            "request_apply_commit", agent="alice", sha=git("rev-parse", "HEAD"), description=description, bundle=bundle
        )
        assert answer["ok"], answer
        number: int = answer["id"]
        return number


def propose_long(hive: Hive, folder: Path) -> int:
    """Over 10,000 lines in 40 files, and their last words in a text that begins far above."""
    lines = "".join(f'  option{n} = {{ enable = true; port = {n}; text = "line {n}"; }};\n' for n in range(250))
    files = {f"part{n}.nix": f"{{ ... }}: {{\n{lines}}}\n" for n in range(39)}
    text = "{ text = ''\n" + "".join(f"  line {n}\n" for n in range(300)) + "  the end\n''; }\n"
    return propose(hive, folder, {"agent.nix": SECOND, **files, "zoo.nix": text})


def request_of(hive: Hive, number: int) -> dict[str, Any]:
    row: dict[str, Any] = hive.api("GET", f"/api/approvals/{number}").body["approval"]
    return row


def check(hive: Hive, number: int, verdict: dict[str, Any], log: tuple[str, ...] = ()) -> None:
    """Write the verdict of a pre-check where the host would have, had it containers to build for."""
    with closing(sqlite3.connect(hive.state / "hive.sqlite")) as database, database:
        database.execute("UPDATE approvals SET precheck = ? WHERE id = ?", (json.dumps(verdict), number))
        rows = [(number, n, line) for n, line in enumerate(log, 1)]
        database.executemany("INSERT INTO precheck_log (approval, n, line) VALUES (?, ?, ?)", rows)


def deploys_of(hive: Hive) -> set[tuple[str, str]]:
    return {(row["kind"], row["phase"]) for row in hive.api("GET", "/api/deploys").body["deploys"]}


def deny_all(hive: Hive) -> None:
    for row in hive.api("GET", "/api/approvals?status=pending").body["approvals"]:
        assert hive.api("POST", f"/api/approvals/{row['id']}/deny", {}).status == 200


@pytest.fixture(autouse=True)
def nothing_waits(team: Hive) -> Iterator[None]:
    yield
    deny_all(team)


def test_the_verdict_the_packages_and_the_words_before_the_decision(team: Hive, folder: Path, tab: Tab) -> None:
    number = propose(team, folder, {"agent.nix": SECOND})
    packages = [
        {"name": "librsvg", "to": "2.60.0", "bytes": 4_300_000},
        {"name": "git", "from": "2.50", "to": "2.51", "bytes": -2048},
    ]
    verdict = {"state": "ok", "evaluates": True, "builds": True, "seconds": 8.2, "packages": packages}
    check(team, number, verdict, ("building…", "built."))
    tab.page.reload()
    request = card(tab, "to change alice")
    line = request.get_by_role("status", name="Pre-check")
    expect(line).to_contain_text("✓ evaluates")
    expect(line).to_contain_text("✓ builds in 8.2 s")
    expect(line).to_contain_text("packages: 1 new, 1 changed")
    expect(line).to_contain_text("+4.1 MiB")
    rows = request.get_by_role("table", name="Packages that change").locator("tr")
    expect(rows).to_have_text(["librsvg–2.60.0+4.1 MiB", "git2.502.51−0.002 MiB"])
    line.get_by_role("button", name="Log of the pre-check").click()
    expect(request.get_by_role("log")).to_have_text("building…\nbuilt.")
    expect(request).to_contain_text("Touches programs that its shell finds, users and their rights")
    expect(request.locator(".nix-string")).to_have_text(['"hi"'])
    expect(request.locator(".added .nix-comment")).to_have_text(["# it draws"])


def test_an_error_is_marked_in_the_diff(team: Hive, folder: Path, tab: Tab) -> None:
    number = propose(team, folder, {"agent.nix": SECOND.replace('"hi";', '"hi"')})
    verdict = {"state": "failed", "error": "syntax error, unexpected '}'\nmore", "at": {"path": "agent.nix", "line": 6}}
    check(team, number, verdict)
    tab.page.reload()
    request = card(tab, "to change alice")
    expect(request.get_by_role("status", name="Pre-check")).to_contain_text("✗ does not evaluate")
    marked = request.locator(".diff .marked")
    expect(marked).to_have_count(1)
    expect(marked).to_contain_text("}")
    expect(marked).to_contain_text("↑ syntax error, unexpected '}'")
    expect(request.get_by_role("button", name=f"Approve request {number}")).to_be_enabled()


@pytest.mark.needs("nix", "systemd-nspawn")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for containers")
@pytest.mark.timeout(400)
def test_the_verdict_comes_while_the_request_is_open(folder: Path, open_tab: Callable[..., Tab]) -> None:
    with NixosHive(folder, precheck="build") as hive:
        hive.spawn("manager")
        tab = open_tab(f"{hive.url}/#token={hive.token}")
        tab.expected = ["ERR_"]  # the hive of this test goes before its page
        wrong = hive.propose("alice", "{ pkgs, ... }:\n{\n  networking.hostName = ;\n}\n")
        tab.go(f"approvals/{wrong}")
        request = card(tab, "a new agent, alice")
        verdict = request.get_by_role("status", name="Pre-check")
        expect(verdict).to_contain_text("✗ does not evaluate", timeout=100_000)
        expect(verdict).to_contain_text("agent.nix:3")
        marked = request.locator(".diff .marked")
        expect(marked).to_contain_text("+   networking.hostName = ;")
        expect(marked).to_contain_text("syntax error, unexpected ';'")
        request.get_by_role("button", name="Log of the pre-check").click()
        expect(request.get_by_role("log")).to_contain_text("syntax error")
        request.get_by_role("button", name=f"Edit request {wrong}").click()
        request.get_by_label("Text of agent.nix").fill("{ }\n")
        request.get_by_role("button", name="Save the edit").click()
        expect(request).to_contain_text("edited by you")
        expect(verdict).to_contain_text("✓ evaluates", timeout=100_000)
        expect(verdict).to_contain_text("✓ builds", timeout=100_000)
        expect(request.get_by_role("log")).not_to_contain_text("syntax error")
        expect(request.locator(".diff .marked")).to_have_count(0)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ({"state": "waiting"}, "Pre-check: waits for its turn"),
        ({"state": "running"}, "Pre-check: under way…"),
        ({"state": "running", "evaluates": True}, "✓ evaluatesPre-check: under way…"),
        ({"state": "ok", "evaluates": True, "builds": True, "packages": []}, "✓ evaluates✓ buildsno package changes"),
        ({"state": "failed", "evaluates": True, "error": "exit code 7"}, "✓ evaluates✗ does not buildexit code 7"),
        ({"state": "timed_out", "error": "it did not end"}, "✗ the pre-check took too long and was given up"),
        ({"state": "off"}, "Pre-checks are switched off"),
    ],
)
def test_each_state_of_a_pre_check_is_told(
    team: Hive, folder: Path, tab: Tab, verdict: dict[str, Any], words: str
) -> None:
    number = propose(team, folder, {"agent.nix": SECOND})
    check(team, number, verdict)
    tab.page.reload()
    request = card(tab, "to change alice")
    expect(request.get_by_role("status", name="Pre-check")).to_contain_text(words)
    expect(request.get_by_role("button", name=f"Approve request {number}")).to_be_enabled()


def test_a_change_that_is_shown_against_another_config_than_at_first_says_so(
    team: Hive, folder: Path, tab: Tab
) -> None:
    older = propose(team, folder, {"agent.nix": SECOND.replace("hi", "older")})
    newer = propose(team, folder, {"agent.nix": SECOND.replace("hi", "newer")})
    request = tab.page.locator(f'[data-card="approval-{older}"]')
    expect(request.locator(".diff")).to_be_visible()
    expect(request).not_to_contain_text("Another config was deployed")
    assert team.api("POST", f"/api/approvals/{newer}/approve", {}).status == 200
    expect(request).to_contain_text("Another config was deployed since this was asked.")
    expect(request.locator(".diff .removed")).to_contain_text("newer")
    wait_for(lambda: request_of(team, newer).get("phase") == "deployed", "the deploy")


def test_old_and_new_side_by_side_where_there_is_room(team: Hive, folder: Path, tab: Tab) -> None:
    propose(team, folder, {"agent.nix": SECOND})
    request = card(tab, "to change alice")
    expect(request.locator(".pair")).to_have_count(0)
    request.get_by_role("button", name="Side by side").click()
    expect(request.locator(".pair").first).to_be_visible()
    text = request.locator(".diff").inner_text()
    tab.page.reload()
    expect(request.locator(".pair").first).to_be_visible()  # remembered
    assert request.locator(".diff").inner_text() == text
    tab.page.set_viewport_size({"width": 800, "height": 900})
    expect(request.locator(".pair")).to_have_count(0)
    expect(request.get_by_role("button", name="Side by side")).to_have_count(0)


def test_a_proposal_is_edited_and_then_approved(team: Hive, folder: Path, tab: Tab) -> None:
    number = propose(team, folder, {"agent.nix": SECOND})
    proposed = request_of(team, number)["fetched_sha"]
    request = card(tab, "to change alice")
    request.get_by_role("button", name=f"Edit request {number}").click()
    approve = request.get_by_role("button", name=f"Approve request {number}")
    expect(approve).to_be_disabled()  # what is typed is not what would be deployed
    request.get_by_label("Text of agent.nix").fill(SECOND.replace('"hi"', '"bettered"'))
    request.get_by_role("button", name="Save the edit").click()
    expect(request.locator(".diff")).to_contain_text("bettered")
    expect(request).to_contain_text(f"edited by you; proposed was {proposed[:7]}")
    approve.click()
    wait_for(lambda: request_of(team, number).get("phase") == "deployed", "the deploy")
    row = request_of(team, number)
    assert row["proposed_sha"] == proposed != row["fetched_sha"]
    tab.go("deploys")
    newest = tab.page.get_by_role("main").locator(".row").filter(has_text=f"#{number}")
    expect(newest).to_contain_text(row["fetched_sha"][:7])
    tab.page.get_by_role("button", name="Compare", exact=True).click()
    expect(tab.page.locator(".diff .added").filter(has_text="bettered")).to_be_visible()
    newest.get_by_role("button", name="Roll alice back to what ran before").click()
    newest.get_by_role("button", name="Roll alice back", exact=True).click()
    wait_for(lambda: ("rollback", "deployed") in deploys_of(team), "the roll-back to end")
    rolled_back = tab.page.get_by_role("main").locator(".row").filter(has_text="roll back").first
    expect(rolled_back).to_contain_text("✓ deployed")
    tab.go(f"approvals/{number}")
    expect(card(tab, "to change alice")).to_contain_text("Approved by you")


def test_an_overtaken_request_is_marked_and_the_others_are_approved_together(
    team: Hive, folder: Path, tab: Tab
) -> None:
    older = propose(team, folder, {"agent.nix": SECOND.replace("hi", "overtaken")})
    newer = propose(team, folder, {"agent.nix": SECOND.replace("hi", "overtakes")})
    with team.agent("manager") as manager:
        fields = {"to": "alice", "body": "Look again.", "first": "2099-01-01T00:00:00Z"}
        schedule = manager.ask("request_schedule", **fields)["id"]
    overtaken = tab.page.locator(f'[data-card="approval-{older}"]')
    expect(overtaken).to_contain_text(f"A newer request for the same agent waits: #{newer}")
    tab.page.get_by_role("button", name="Approve all 2 for alice").click()
    expect(tab.page.locator("[data-card^=approval-]")).to_have_count(1)
    statuses = {number: request_of(team, number)["status"] for number in (older, newer, schedule)}
    assert statuses == {older: "pending", newer: "approved", schedule: "approved"}
    wait_for(lambda: request_of(team, newer).get("phase") == "deployed", "the deploy")


def test_a_file_that_becomes_executable_says_so(team: Hive, folder: Path, tab: Tab) -> None:
    (folder / "source").mkdir()
    subprocess.run(["git", "init", "-q", "-b", "main", folder / "source"], check=True)
    tool = folder / "source/tool.sh"
    tool.touch(mode=0o755)
    tab.go(f"approvals/{propose(team, folder, {'agent.nix': SECOND, 'tool.sh': 'exit 0'})}")
    expect(card(tab, "to change alice").get_by_role("button", name="tool.sh")).to_contain_text("new, executable")


def test_what_follows_a_carriage_return_does_not_look_like_a_comment(team: Hive, folder: Path, tab: Tab) -> None:
    number = propose(team, folder, {"agent.nix": SECOND.replace("# it draws", "# it draws\r  users.users.x = { };")})
    tab.go(f"approvals/{number}")
    request = card(tab, "to change alice")
    expect(request.locator(".added .nix-comment")).to_have_text(["# it draws"])
    expect(request.locator(".added").filter(has_text="users.users.x")).to_contain_text("# it draws␍  users.users.x")
    expect(request).to_contain_text("users and their rights")


def test_two_browsers_at_once_make_one_deploy_and_both_tell_it(
    team: Hive, folder: Path, tab: Tab, open_tab: Callable[..., Tab]
) -> None:
    number = propose(team, folder, {"agent.nix": SECOND.replace("hi", "of two browsers")})
    other = open_tab(f"{team.url}/#token={team.token}")
    name = f"Approve request {number}"
    for one in (tab, other):
        one.go(f"approvals/{number}")
        expect(one.page.get_by_role("button", name=name)).to_be_enabled()
    for one in (tab, other):
        one.page.evaluate(f"window.approve = document.querySelector(`button[aria-label='{name}']`)")
    at_ms = tab.page.evaluate("Date.now() + 500")
    for one in (tab, other):
        one.page.evaluate(f"setTimeout(() => window.approve.click(), {at_ms} - Date.now())")
    for one in (tab, other):
        expect(card(one, "to change alice")).to_contain_text("Approved by you")
        expect(card(one, "to change alice")).to_contain_text("deployed")
    wait_for(lambda: request_of(team, number).get("phase") == "deployed", "the deploy")
    deploys = team.api("GET", "/api/deploys?agent=alice").body["deploys"]
    assert len([row for row in deploys if row.get("approval_id") == number]) == 1


def test_a_page_left_open_through_a_restart_approves_only_what_it_showed(
    folder: Path, open_tab: Callable[..., Tab]
) -> None:
    with Hive(folder, undo_s=0.0) as hive:
        hive.spawn("manager", "alice")
        number = propose(hive, folder, {"agent.nix": SECOND})
        tab = open_tab(f"{hive.url}/#token={hive.token}")
        tab.expected = ["ERR_", "409", "Failed to load"]
        tab.go(f"approvals/{number}")
        expect(tab.page.get_by_role("button", name=f"Approve request {number}")).to_be_enabled()
        tab.page.evaluate(DEAF)
        hive.stop()
        hive.start()
        row, text = request_of(hive, number), SECOND.replace("hi", "something else")
        edit = {"path": "agent.nix", "text": text, "digest": row["digest"]}
        assert hive.api("POST", f"/api/approvals/{number}/edit", edit).status == 200
        tab.page.get_by_role("button", name=f"Approve request {number}").click()
        expect(tab.page.get_by_role("alert")).to_contain_text("is not what was shown any more")
        assert request_of(hive, number)["status"] == "pending"
        tab.page.reload()
        expect(card(tab, "to change alice").locator(".diff")).to_contain_text("something else")
        tab.page.locator("body").press("a")
        expect(card(tab, "to change alice")).to_contain_text("Approved by you")
        wait_for(lambda: request_of(hive, number).get("phase") == "deployed", "the deploy")


def test_what_is_not_shown_of_a_change_is_said_and_approved_with_a_press_more(
    team: Hive, folder: Path, tab: Tab
) -> None:
    number = propose(team, folder, {"agent.nix": SECOND})

    def cut(route: Route) -> None:
        shown = route.fetch().json()
        text = shown["approval"]["diff"] + "\n… (1234 bytes more)\n"
        shown["approval"] |= {"diff": text, "cut_bytes": 1234}
        route.fulfill(json=shown)

    tab.page.route(re.compile(f"/api/approvals/{number}$"), cut)
    tab.page.reload()
    request = card(tab, "to change alice")
    expect(request.get_by_role("note")).to_contain_text("1,234 bytes of this change are not shown here")
    expect(request.locator(".diff")).not_to_contain_text("bytes more")
    approve = request.get_by_role("button", name=f"Approve request {number}")
    approve.click()
    expect(approve).to_have_text("Approve unread")
    assert request_of(team, number)["status"] == "pending"
    tab.page.route(re.compile("/approve$"), lambda route: route.fulfill(json={}))  # other tests want it undecided
    with tab.page.expect_request(re.compile(f"/api/approvals/{number}/approve$")):
        approve.click()


def test_a_change_is_asked_for_once(team: Hive, folder: Path, open_tab: Callable[..., Tab]) -> None:
    number = propose(team, folder, {"agent.nix": SECOND})
    tab = open_tab(f"{team.url}/#token={team.token}")
    expect(card(tab, "to change alice").locator(".diff")).to_be_visible()
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    tab.page.goto(f"{team.url}/#/approvals/{number}")
    tab.page.reload()
    expect(card(tab, "to change alice").locator(".diff")).to_be_visible()
    assert asked.count(f"/api/approvals/{number}") == 1


def test_a_log_of_a_pre_check_grows_while_it_runs(team: Hive, folder: Path, tab: Tab) -> None:
    number = propose(team, folder, {"agent.nix": SECOND})
    check(team, number, {"state": "running"}, ("evaluating…",))
    tab.page.reload()
    request = card(tab, "to change alice")
    request.get_by_role("button", name="Log of the pre-check").click()
    expect(request.get_by_role("log")).to_have_text("evaluating…")
    with closing(sqlite3.connect(team.state / "hive.sqlite")) as database, database:
        database.execute("INSERT INTO precheck_log (approval, n, line) VALUES (?, 2, 'building…')", (number,))
    expect(request.get_by_role("log")).to_contain_text("building…")
    request.get_by_role("button", name="Hide the log of the pre-check").click()
    expect(request.get_by_role("log")).to_have_count(0)


def test_what_is_read_stays_through_an_outage_and_is_decided_only_afresh(
    folder: Path, open_tab: Callable[..., Tab]
) -> None:
    with Hive(folder, undo_s=0.0) as hive:
        hive.spawn("manager", "alice")
        number = propose_long(hive, folder)
        tab = open_tab(f"{hive.url}/#token={hive.token}")
        tab.expected = ["ERR_", "Failed to load"]
        tab.go(f"approvals/{number}")
        expect(tab.page.get_by_role("heading", name=f"Request #{number}")).to_be_visible()
        approve = tab.page.get_by_role("button", name=f"Approve request {number}")
        expect(approve).to_be_enabled()
        tab.page.evaluate("scrollTo(0, 9000)")
        held: list[Route] = []
        tab.page.route(re.compile(f"/api/approvals/{number}$"), lambda route: held.append(route))
        hive.stop()
        expect(tab.page.get_by_text("Disconnected since")).to_be_visible()
        with tab.page.expect_request(re.compile(f"/api/approvals/{number}$")):
            hive.start()
        expect(tab.page.get_by_text("Disconnected since")).to_have_count(0)
        expect(approve).to_be_disabled()
        expect(tab.page.locator(".changes > .file")).to_have_count(41)
        held[0].continue_()
        expect(approve).to_be_enabled()
        assert tab.page.evaluate("scrollY") > 8000


def test_ten_thousand_lines_are_all_there_but_only_those_near_are_coloured(team: Hive, folder: Path, tab: Tab) -> None:
    number = propose_long(team, folder)
    tab.go(f"approvals/{number}")
    expect(tab.page.locator(".changes > .file")).to_have_count(41)
    expect(tab.page.locator(".nix-number").first).to_be_visible()
    assert tab.page.locator(".nix-number").count() < 2_000
    texts = tab.page.evaluate("[...document.querySelectorAll('.diff')].map(({ textContent }) => textContent)")
    assert "".join(texts).count("\n+ ") > 10_000
    assert tab.page.evaluate("find('option249')"), "the browser's search finds what is far away"
    expect(tab.page.locator("diff-block").filter(has_text="option249").first).to_be_in_viewport()
    assert tab.page.evaluate("getSelection().toString()") == "option249"
    tab.page.locator("diff-block").last.scroll_into_view_if_needed()
    expect(tab.page.locator(".nix-string").filter(has_text="the end")).to_be_visible()
    expect(tab.page.get_by_role("button", name=f"Approve request {number}")).to_be_visible()
