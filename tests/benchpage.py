"""What the pages and the daemon's streams are like when there is a lot: the second half of `make bench`.

Everything goes through real doors: requests and messages through agents' sockets, events by the reports of a
harness, pages in a real Chromium. Only an agent's long past is put where its harness would have written it.
"""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from itertools import count, islice
from pathlib import Path
from typing import Any

import psutil
from browserbox import CHROMIUM, QUIET, row_of
from hive import Hive, Line, listens, wait_for
from playwright.sync_api import Browser, Page, sync_playwright
from test_page_requests import propose_long

AGENTS, REQUESTS, MESSAGES = 30, 100, 10_000
PAST, DAY, STREAMS = 100_000, 200_000, 500
OPENINGS, EVENTS, REQUESTS_TIMED = 11, 40, 150
MANY = {"pending_approvals": 1000, "messages_per_minute": 0, "ping_pong": 0, "unread": 10**6}
MIB = 1 << 20

CONFIG = """\
{ pkgs, ... }:
{
  # What it needs for its reports.
  environment.systemPackages = [
    pkgs.ripgrep
    pkgs.pandoc
  ];
  services.hyperhive.harness.model = "sonnet";
}
"""

# Tells when what a selector names is first on the screen, with so many of its kind: `painted`, in ms since the
# navigation began.
WHEN_PAINTED = """
(selector, number) => {
  window.painted = new Promise((resolve, reject) => {
    setTimeout(() => reject(new Error(`${selector} is not painted`)), 60000);
    // It is told while a frame is being made; the next task comes when that frame is painted.
    const look = (_, watch) => {
      if (document.querySelectorAll(selector).length < number) return;
      watch.disconnect();
      setTimeout(() => resolve(performance.now()));
    };
    const watch = new MutationObserver(look);
    watch.observe(document, { childList: true, subtree: true });
    look(null, watch);
  });
}
"""
# Scrolls to the end of the page, a screen and a half each frame: what each frame took, in ms.
SCROLL = """
() => new Promise((resolve) => {
  const frames = [];
  let last = performance.now();
  const go = () => {
    const now = performance.now();
    frames.push(now - last);
    last = now;
    if (scrollY + innerHeight >= document.documentElement.scrollHeight - 2) return resolve(frames);
    scrollBy(0, 1500);
    requestAnimationFrame(go);
  };
  requestAnimationFrame(go);
})
"""
# Sends a message and waits until the page shows it: ms.
SEND_AND_SEE = """
async ([token, body]) => {
  const shown = new Promise((resolve) => {
    const watch = new MutationObserver(() => {
      if (!document.querySelector(".flow").textContent.includes(body)) return;
      watch.disconnect();
      resolve();
    });
    watch.observe(document.body, { childList: true, subtree: true, characterData: true });
  });
  const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
  const began = performance.now();
  fetch("/api/messages", { method: "POST", headers, body: JSON.stringify({ to: "a1", body }) });
  await shown;
  return performance.now() - began;
}
"""
READER = """
import selectors, socket, sys
port, token, count = sys.argv[1:]
selector = selectors.DefaultSelector()
for _ in range(int(count)):
    one = socket.create_connection(("127.0.0.1", int(port)))
    lines = ("GET /api/stream HTTP/1.1", "Host: localhost", f"Authorization: Bearer {token}", "", "")
    one.sendall("\\r\\n".join(lines).encode())
    selector.register(one, selectors.EVENT_READ, bytearray())
waiting = int(count)
while waiting:
    for key, _ in selector.select():
        begun = b"event: snapshot" in key.data
        key.data.extend(key.fileobj.recv(1 << 18))
        waiting -= not begun and b"event: snapshot" in key.data
print("open", flush=True)
while True:
    for key, _ in selector.select():
        key.fileobj.recv(1 << 18)
"""
# When, by the clock that all processes share, the page shows an event: s since 1970.
SEEN_AT = """
(id) => new Promise((resolve) => {
  const watch = new MutationObserver(() => {
    if (!document.querySelector(`[data-event~="${id}"]`)) return;
    watch.disconnect();
    resolve((performance.timeOrigin + performance.now()) / 1000);
  });
  watch.observe(document.body, { childList: true, subtree: true });
})
"""


# ── a hive with a lot in it ──


@contextmanager
def full_hive(folder: Path) -> Iterator[Hive]:
    """Thirty agents, a hundred requests that wait, ten thousand messages. The agents are stopped: we speak for them."""
    with Hive(folder, limits=MANY, precheck="off") as hive:
        names = [f"a{number}" for number in range(1, AGENTS)]
        hive.spawn("manager", *names)
        with ExitStack() as stack:
            manager = stack.enter_context(hive.agent("manager"))
            why = "It takes the weekly reports off `a1`, which has more to do than it can."
            wanted = (manager.ask("request_spawn", name=f"n{n}", description=why, config=CONFIG) for n in count())
            list(islice((answer for answer in wanted if answer["ok"]), REQUESTS))  # some names' ports are taken
            lines = [stack.enter_context(hive.agent(name)) for name in names]
            for number in range(MESSAGES):
                sender, to = number % len(names), names[(number + 1) % len(names)]
                lines[sender].ask("send", to=to, body=f"Report {number} is in /shared. Could you look it through?")
        yield hive


def a_past(events: int, *, first_turn: int = 1) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Turns of twenty events: mail, thinking, tools with their results, a text."""
    for number in range(events):
        turn, step = first_turn + number // 20, number % 20
        if step == 0:
            mail = {"id": turn, "from": "a2", "to": "a1", "body": f"Request {turn}.", "at": "2026-01-01T00:00:00Z"}
            yield turn, "turn_start", {"messages": [mail]}
        elif step == 1:
            yield turn, "thinking", {"text": "Which of them are used,\nand by what?"}
        elif step == 18:
            yield turn, "text", {"text": f"Fourteen are done. The rest follows in turn {turn + 1}."}
        elif step == 19:
            sums = {"duration_ms": 8000, "tools": 8, "tokens": 20_000, "cost_usd": 0.06}
            yield turn, "turn_end", {"outcome": "done", **sums}
        elif step % 2:
            output = "\n".join(f"static/icons/{n}.svg: 20 x 20" for n in range(12))
            yield turn, "tool_result", {"tool_use_id": f"{turn}-{step - 1}", "output": output, "is_error": False}
        else:
            command = {"command": f"rg -n icons/ static | sort | uniq -c | head -{number}"}
            yield turn, "tool_call", {"tool_use_id": f"{turn}-{step}", "name": "Bash", "input": command}


@contextmanager
def long_past(hive: Hive, name: str) -> Iterator[str]:
    """That agent, running, with a hundred thousand events behind it; the address of its own page."""
    store = hive.state / "agents" / name / "state" / "hyperhive-events.sqlite"
    now_ms = int(time.time() * 1000)
    rows = ((now_ms, turn, kind, json.dumps(data)) for turn, kind, data in a_past(PAST))
    with closing(sqlite3.connect(store)) as database, database:
        database.executemany("INSERT INTO events(at_ms, turn, kind, json) VALUES(?, ?, ?, ?)", rows)
        last = database.execute("SELECT max(id) FROM events").fetchone()[0]
    hive.api("POST", f"/api/agents/{name}/pause", {})  # it would begin to work through its mail
    hive.api("POST", f"/api/agents/{name}/start", {})

    def is_told() -> bool:
        events = hive.api("GET", f"/api/agents/{name}/events?max=1").body["events"]
        return bool(events and events[-1]["id"] >= last and listens(row_of(hive, name)["port"]))

    wait_for(is_told, f"the past of {name} at the host", timeout_s=60)
    yield row_of(hive, name)["url"]
    hive.api("POST", f"/api/agents/{name}/stop", {})


# ── pages ──


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@contextmanager
def tab(browser: Browser, url: str) -> Iterator[Page]:
    """A visitor who comes for the first time but has the token: nothing is in the cache.

    A new window starts pages of Chromium's own, which take the processors from ours for some 0.3 s. People open
    pages in windows that are there, so this one has come to rest before anything is opened in it.
    """
    origin, _, token = url.partition("/#token=")
    stored = {"origin": origin, "localStorage": [{"name": "hyperhive-token", "value": token}]}
    context = browser.new_context(
        viewport={"width": 1380, "height": 900},
        storage_state={"cookies": [], "origins": [stored]},  # type: ignore[typeddict-item]
    )
    page = context.new_page()
    page.wait_for_timeout(1000)
    yield page
    context.close()


def opening(browser: Browser, url: str, view: str, selector: str, number: int) -> float:
    """Seconds from the beginning of the navigation until what the selector names is painted."""
    with tab(browser, url) as page:
        page.add_init_script(f"({WHEN_PAINTED})({json.dumps(selector)}, {number})")
        page.goto(url.partition("#")[0] + view)
        painted: float = page.evaluate("painted")
    return painted / 1000


def openings(browser: Browser, url: str, view: str, selector: str, number: int = 1) -> list[float]:
    return [opening(browser, url, view, selector, number) for _ in range(OPENINGS)]


def bare_openings(browser: Browser, hive: Hive) -> list[float]:
    """The reference: the same browser opens an answer of one line."""
    return openings(browser, f"{hive.url}/#token=x", "healthz", "pre")


def first_paints(browser: Browser, hive: Hive) -> list[float]:
    """Useful is what a person can read: the first screen of what waits, with all that stands beside it."""
    return openings(browser, link(hive), "", "article.card")


def whole_paints(browser: Browser, hive: Hive) -> list[float]:
    return openings(browser, link(hive), "", "article.card", REQUESTS)


def transcripts(browser: Browser, url: str, view: str) -> list[float]:
    return openings(browser, url, view, ".transcript .turn.open .step")


def link(hive: Hive) -> str:
    return f"{hive.url}/#token={hive.token}"


def messages_seen(browser: Browser, hive: Hive) -> list[float]:
    """From the POST in a page until its Flow shows the message."""
    with tab(browser, link(hive)) as page:
        page.goto(f"{hive.url}/#/flow")
        page.wait_for_selector(".message")
        bodies = [f"A message to be seen, {number}." for number in range(EVENTS)]
        return [page.evaluate(SEND_AND_SEE, [hive.token, body]) / 1000 for body in bodies]


def events_seen(browser: Browser, hive: Hive, name: str) -> list[float]:
    """From the report on an agent's socket until its view on the dashboard shows the event."""
    times = []
    with tab(browser, link(hive)) as page, hive.agent(name) as agent:
        page.goto(f"{hive.url}/#/agents/{name}")
        page.wait_for_selector(".transcript")
        page.wait_for_timeout(1000)
        for number in range(1, EVENTS + 1):
            page.evaluate(f"window.seen = ({SEEN_AT})({number}); 0")
            began = time.time()
            report(agent, number, [(1, "text", {"text": f"Step {number} is done."})])
            times.append(page.evaluate("seen") - began)
    return times


def report(agent: Line, first: int, events: list[tuple[int, str, dict[str, Any]]]) -> None:
    rows = [
        {"id": first + number, "at": "2026-01-01T00:00:00Z", "turn": turn, "kind": kind, "data": data}
        for number, (turn, kind, data) in enumerate(events)
    ]
    assert agent.ask("report", events=rows)["ok"]


def heap_after_a_day(browser: Browser, hive: Hive, name: str) -> tuple[float, float]:
    """MiB of a tab's heap, cleaned: when it was just opened, and after all events of a long day came to it."""
    batch = 1000
    events = list(a_past(DAY))
    with tab(browser, link(hive)) as page, hive.agent(name) as agent:
        page.goto(f"{hive.url}/#/agents/{name}")
        page.wait_for_selector(".transcript")
        debugger = page.context.new_cdp_session(page)
        before = heap(debugger)
        for first in range(0, DAY, batch):
            report(agent, first + 1, events[first : first + batch])
            agent.ask("set_status", text=f"{first} of {DAY}")
            agent.ask("send", to="operator", body=f"{first} of {DAY} are done.")
            page.wait_for_selector(f'[data-event~="{first + batch - 1}"]', state="attached")
        return before, heap(debugger)


def heap(debugger: Any) -> float:
    debugger.send("HeapProfiler.collectGarbage")
    return float(debugger.send("Runtime.getHeapUsage")["usedSize"]) / MIB


# ── streams ──


@contextmanager
def open_streams(hive: Hive) -> Iterator[None]:
    """Five hundred streams, read by a process of their own, as browsers would."""
    argv = [sys.executable, "-c", READER, str(hive.port), hive.token, str(STREAMS)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as reader:
        assert reader.stdout and reader.stdout.readline()
        try:
            yield
        finally:
            reader.kill()


@contextmanager
def some_traffic(hive: Hive) -> Iterator[None]:
    """A message a second, of which every stream is told."""
    over = threading.Event()

    def talk() -> None:
        with hive.agent("a1") as agent:
            while not over.wait(1):
                agent.ask("send", to="a2", body="Are you there?")

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        yield
    finally:
        over.set()
        talker.join()


def answers(hive: Hive, path: str) -> list[float]:
    """Seconds that a GET takes on one connection."""
    times = []
    with closing(HTTPConnection("127.0.0.1", hive.port, timeout=30)) as connection:
        for _ in range(REQUESTS_TIMED):
            began = time.monotonic()
            connection.request("GET", path, headers={"Authorization": f"Bearer {hive.token}"})
            connection.getresponse().read()
            times.append(time.monotonic() - began)
            time.sleep(0.01)
    return times


def threads(hive: Hive) -> int:
    assert hive.daemon
    return psutil.Process(hive.daemon.pid).num_threads()


def answers_beside_streams(hive: Hive, path: str) -> tuple[list[float], list[float], int]:
    """Without streams, with five hundred, and how many threads more the daemon has then."""
    with some_traffic(hive):
        alone, before = answers(hive, path), threads(hive)
        with open_streams(hive):
            beside, more = answers(hive, path), threads(hive) - before
    return alone, beside, more


def long_diff(browser: Browser, folder: Path) -> tuple[list[float], list[float]]:
    """A request of 40 files and 10,000 lines: how long it takes to open, and each frame of a scroll through it."""
    folder.mkdir()
    with Hive(folder, limits=MANY) as hive:
        hive.spawn("manager", "alice")
        view = f"#/approvals/{propose_long(hive, folder)}"
        opened = openings(browser, link(hive), view, ".changes > .file", 41)
        with tab(browser, link(hive)) as page:
            page.goto(f"{hive.url}/{view}")
            page.wait_for_selector(".coloured")
            frames: list[float] = page.evaluate(SCROLL)
    return opened, [frame / 1000 for frame in frames]


# ── all of it ──


def figures(folder: Path, tell: Callable[..., None], line: Callable[..., None]) -> None:
    """`tell(what, seconds, reference, aim)` and `line(cells)` print one figure after the other."""
    folder.mkdir()
    with full_hive(folder) as hive:
        for path in ("/api/state", "/api/agents"):
            alone, beside, more = answers_beside_streams(hive, path)
            tell(f"GET {path}, a message a second", alone)
            tell(f"… and {STREAMS} streams, which take {more} threads", beside, alone)
        with chromium() as browser:
            opened, frames = long_diff(browser, folder / "diff")
            bare = bare_openings(browser, hive)
            tell("a browser opens an answer of one line", bare)
            tell("Your call: the first screen is painted", first_paints(browser, hive), bare, 0.3)
            tell(f"… all {REQUESTS} requests", whole_paints(browser, hive), bare)
            tell("a request of 10,000 lines", opened, bare, 1)
            tell("… a frame while it is scrolled", frames)
            tell("message → Flow", messages_seen(browser, hive), bare, 0.05)
            tell("event → transcript", events_seen(browser, hive, "a3"), bare, 0.05)
            with long_past(hive, "a4") as own:
                tell(f"{PAST} events: open on the dashboard", transcripts(browser, link(hive), "#/agents/a4"), bare, 1)
                tell("… on the agent's own page", transcripts(browser, own, ""), bare, 1)
            before, after = heap_after_a_day(browser, hive, "a5")
            line(f"{DAY} events in one tab: its heap", f"{after:.1f} MiB", "", "100 MiB", f"{before:.1f} MiB before")
