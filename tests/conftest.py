"""What holds for every test: it leaves nothing behind, in CI it is not skipped, and a failure shows the logs."""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import hypothesis
import psutil
import pytest
from hive import ROOT, Hive, end, is_alive, processes_of

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

CLAUDE = ROOT / "tests/node_modules/.bin/claude"

# Programs that a CI machine can't have, so that there a test may be skipped for want of them. For want of any
# other the skip is a failure: an installation step is missing, and a green run would hide it.
NOT_IN_CI = ("nixos-container",)


# A shell makes what it runs in the background deaf to Ctrl-C, and nohup to the end of a terminal. What a test starts
# shall hear both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# On a busy machine an example takes as long as it takes, and none is kept for another run.
hypothesis.settings.register_profile("hive", deadline=None, database=None, derandomize=os.environ.get("CI") == "true")
hypothesis.settings.load_profile("hive")


# ── skips and reports ──


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for program in marker.args:
            if not (CLAUDE.exists() if program == "claude" else shutil.which(program)):
                pytest.skip(f"needs {program}, which is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = refuse_skip((yield))
    if report.failed and (place := item.funcargs.get("folder")):
        logs = sorted(place.rglob("*.log")) if place.exists() else []
        report.sections += [(f"the end of {log.relative_to(place)}", log.read_text()[-4000:]) for log in logs]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return refuse_skip((yield))


def refuse_skip(report: Report) -> Report:
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr
        if not reason.startswith(tuple(f"Skipped: needs {program}," for program in NOT_IN_CI)):
            report.outcome = "failed"
            report.longrepr = f"{reason}\nCI must be able to run this: see NOT_IN_CI in tests/conftest.py"
    return report


# ── nothing is left behind ──


@pytest.fixture(autouse=True)
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the test's own, with a path short enough for unix sockets (107 bytes), and the check at its end.

    A test that leaves a process, thread, socket file or mount fails, and what it left is ended. What a fixture
    of wider scope started before the test (a browser, say), and what that starts, is the fixture's own affair.
    """
    place = Path(tempfile.mkdtemp(prefix="hh-", dir="/tmp"))
    # Inherited by what the test starts: that is how a process that left its parent is found again.
    monkeypatch.setenv("HYPERHIVE_TEST_MARK", str(place))
    places = [place, *([request.getfixturevalue("tmp_path")] if "tmp_path" in request.fixturenames else [])]
    threads, children = set(threading.enumerate()), set(psutil.Process().children())
    yield place
    deadline = time.monotonic() + 3  # what was told to end may need a moment
    while (left := left_behind(place, places, threads, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for end_it in left.values():
        end_it()
    shutil.rmtree(place)
    if left:
        pytest.fail("left behind: " + ", ".join(left), pytrace=False)


@pytest.fixture
def hive(folder: Path) -> Iterator[Hive]:
    """A running hive without agents."""
    with Hive(folder) as running:
        yield running


@pytest.fixture(scope="module")
def crew() -> Iterator[Hive]:
    """One hive for a whole module: manager, alice and bob are deployed but stopped, so that tests can be them.

    A test here looks only at what it made itself. Nobody is too fast or too curious for this hive.
    """
    with tempfile.TemporaryDirectory(prefix="hh-", dir="/tmp") as place:
        limits = {"messages_per_minute": 0, "ping_pong": 0, "questions": 1000, "pending_approvals": 1000}
        limits |= {"wrong_tokens_per_minute": 10_000}
        with Hive(Path(place), limits=limits) as running:
            yield running.spawn("manager", "alice", "bob")


def left_behind(
    place: Path, places: list[Path], threads: set[threading.Thread], children: set[psutil.Process]
) -> dict[str, Callable[[], object]]:
    """What is there and was not before the test, each with the way to end it (a thread has none)."""
    new = {*processes_of(place), *descendants(set(psutil.Process().children()) - children)}
    return {
        **{f"process {describe(process)}": partial(end, [process]) for process in new},
        **{f"thread {thread.name}": thread.is_alive for thread in set(threading.enumerate()) - threads},
        **{f"mount {path}": partial(unmount, path) for path in mounts_below(places)},
        **{f"socket {path}": partial(path.unlink, missing_ok=True) for path in sockets_below(places)},
    }


def descendants(processes: set[psutil.Process]) -> Iterator[psutil.Process]:
    """These and all below them that live; one that ended and was not waited for has left nothing."""
    for process in filter(is_alive, processes):
        with suppress(psutil.NoSuchProcess):
            yield from filter(is_alive, [process, *process.children(recursive=True)])


def describe(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid} ({shlex.join(process.cmdline())[:200]})"
    return str(process.pid)


def mounts_below(places: list[Path]) -> list[str]:
    """Mount points in or on these places, the innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in reversed(points) if any(Path(point).is_relative_to(place) for place in places)]


def sockets_below(places: list[Path]) -> list[Path]:
    files = [Path(folder) / name for place in places for folder, _, names in os.walk(place) for name in names]
    return [file for file in files if file.is_socket()]


def unmount(path: str) -> None:
    """Raises where it fails, so that the folder is not removed through the mount."""
    subprocess.run(["umount", "--lazy", path], check=True)
