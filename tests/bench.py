"""`make bench`: how long a message takes to reach a Claude, and how the pages are when there is a lot (benchpage.py).

A table for people; it asserts nothing about times. Numbers of one machine say little about another, so each stands
beside a reference that was measured in the same run: a bare round trip over a unix socket, a bare start of Python,
a browser that opens one line. A machine that is busy with other things makes all of them worse.
"""

import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import benchpage
from browserbox import CHROMIUM
from conftest import CLAUDE
from fakes.messages_api import Api
from hive import Hive, wait_for

WARM, COLD, WARM_REAL, COLD_REAL = 200, 10, 30, 4
# The least that a harness takes for Claude. It notes when it reads a line, by the clock that all processes share.
STAND_IN = """
import json, sys, time
for line in sys.stdin:
    at, message = time.monotonic(), json.loads(line)
    if message["type"] == "user":
        with open(sys.argv[1], "a") as file:
            print(at, file=file)
        session = {"session_id": "00000000-0000-4000-8000-000000000000"}
        result = {"type": "result", "subtype": "success", "is_error": False, "total_cost_usd": 0}
        for answer in ({"type": "system", "subtype": "init"}, {**message, "isReplay": True}, result):
            print(json.dumps({**answer, **session}), flush=True)
"""


def main() -> None:
    line("", "median", "p99", "aim", "")
    trip, start = round_trips(500), python_starts(12)
    tell("a round trip over a unix socket", trip)
    tell("a start of Python", start)
    with tempfile.TemporaryDirectory(prefix="hh-", dir="/tmp") as place:
        os.environ["HYPERHIVE_TEST_MARK"] = place
        tell("message → line to a warm Claude", stand_in(Path(place) / "a", WARM, warm_s=60), trip)
        tell("message → line to a cold one", stand_in(Path(place) / "b", COLD, warm_s=0.05), start)
        if CLAUDE.exists():
            tell("message → request of a warm real one", real(Path(place) / "c", WARM_REAL, warm_s=60), trip)
            tell("message → request of a cold real one", real(Path(place) / "d", COLD_REAL, warm_s=0.05), start)
        if CHROMIUM:
            benchpage.figures(Path(place) / "e", tell, line)


def tell(what: str, seconds: list[float], reference: list[float] | None = None, aim_s: float | None = None) -> None:
    p50, p99 = statistics.median(seconds), sorted(seconds)[int(len(seconds) * 0.99)]
    ratio = f"{p50 / statistics.median(reference):.1f} times its reference" if reference else "(reference)"
    line(what, f"{p50 * 1000:.2f} ms", f"{p99 * 1000:.2f} ms", f"{aim_s * 1000:.0f} ms" if aim_s else "", ratio)


def line(*cells: str) -> None:
    print("{:46} {:>11} {:>11} {:>9}   {}".format(*cells), flush=True)


# ── references ──


def round_trips(count: int) -> list[float]:
    here, there = socket.socketpair()

    def echo() -> None:
        while data := there.recv(4096):
            there.sendall(data)

    threading.Thread(target=echo, daemon=True).start()
    with here:
        return [timed(lambda: (here.sendall(b"x" * 200), here.recv(4096))) for _ in range(count)]


def python_starts(count: int) -> list[float]:
    return [timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)) for _ in range(count)]


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


# ── a message's way ──


@contextmanager
def one_agent(folder: Path, **settings: Any) -> Iterator[Hive]:
    folder.mkdir()
    with Hive(folder, limits={"messages_per_minute": 0}) as hive:
        hive.stop()
        hive.configure(rehearsal=False, **settings)
        yield hive.start().spawn("alice", running=True)


def journeys(hive: Hive, count: int, arrivals: Callable[[], list[float]], *, idle_s: float) -> list[float]:
    """Seconds from before the send to each arrival; the first message only warms up."""
    times = []
    for number in range(count + 1):
        known, began = len(arrivals()), time.monotonic()
        hive.ask(cmd="send", to="alice", body=f"message {number}")
        arrived = wait_for(lambda known=known: arrivals()[known:], "the message", timeout_s=30)[0]
        times.append(arrived - began)
        wait_for(lambda: is_idle(hive), "the end of the turn", timeout_s=30)
        time.sleep(idle_s)
    return times[1:]


def is_idle(hive: Hive) -> bool:
    row = hive.ask(cmd="agents")["agents"][0]
    return bool(row["state"] == "idle" and not row["unread"])


def stand_in(folder: Path, count: int, *, warm_s: float) -> list[float]:
    script, notes = folder.with_suffix(".py"), folder.with_suffix(".notes")
    script.write_text(STAND_IN)
    notes.touch()
    command = shlex.join([sys.executable, str(script), str(notes)])
    with one_agent(folder, claude=command, warm_s=warm_s) as hive:
        return journeys(
            hive, count, lambda: list(map(float, notes.read_text().split())), idle_s=0.4 if warm_s < 1 else 0
        )


def real(folder: Path, count: int, *, warm_s: float) -> list[float]:
    api = Api().start()
    settings = {"ANTHROPIC_API_KEY": "dummy", "ANTHROPIC_BASE_URL": api.url}
    environment = folder.with_suffix(".env")
    environment.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    try:
        with one_agent(folder, claude=str(CLAUDE), warm_s=warm_s, environment_file=str(environment)) as hive:
            return journeys(hive, count, lambda: list(api.arrivals), idle_s=1 if warm_s < 1 else 0)
    finally:
        api.stop()


if __name__ == "__main__":
    main()
