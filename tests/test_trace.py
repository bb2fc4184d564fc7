"""The rule that keeps the host safe, seen from the kernel: the daemon opens nothing that an agent can write."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes.harness import rehearse
from hive import Hive, wait_for

CALLS = "%file,%process,connect"
BORN = re.compile(r"^(?:clone|clone3|fork|vfork)\(.* = (\d+)", re.MULTILINE)
IS_A_HARNESS = re.compile(r'^execve\(.*harness\.py", "run"', re.MULTILINE)


@contextmanager
def strace(pid: int, notes: Path) -> Iterator[None]:
    """Each thread's system calls in a file of its own, `notes` with its id behind it."""
    command = ["strace", "-ff", "-y", "-qq", "-s", "400", "-e", f"trace={CALLS}", "-o", str(notes), "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text(), "strace to begin")
        yield
    finally:
        tracer.terminate()
        tracer.wait()


def below_a_harness(calls: dict[int, str]) -> set[int]:
    """The threads of harnesses, of Claude and of its tools."""
    waiting = [thread for thread, text in calls.items() if IS_A_HARNESS.search(text)]
    found: set[int] = set()
    while waiting:
        thread = waiting.pop()
        found.add(thread)
        waiting += [int(born) for born in BORN.findall(calls.get(thread, ""))]
    return found


def tell_the_story(hive: Hive) -> None:
    """A spawn that the manager asks for, work in every folder, a question, a restart, a crash, a stop."""
    hive.spawn("manager", running=True)
    spawn = {"name": "alice", "description": "She writes.", "config": "{ }\n"}
    hive.ask(cmd="send", to="manager", body=rehearse({"tool": "request_spawn", "input": spawn}))
    wait_for(lambda: hive.ask(cmd="pending")["approvals"], "the request")
    hive.ask(cmd="approve", id=1)
    wait_for(lambda: hive.ask(cmd="show", id=1)["approval"].get("phase") == "deployed", "alice")
    work = 'echo note >> "$HYPERHIVE_STATE/notes.md"; ln -sf /etc/shadow "$HYPERHIVE_SHARED/link"'
    question = {"question": "Shall I?", "options": ["yes", "no"]}
    steps = [{"tool": "Bash", "input": {"command": work}}, {"tool": "ask", "input": question}]
    hive.ask(cmd="send", to="alice", body=rehearse(*steps))
    wait_for(lambda: hive.ask(cmd="pending")["questions"], "the question")
    hive.ask(cmd="answer", id=1, text="yes")
    for path in ("/api/state", "/api/agents/alice", "/api/approvals/1", "/api/audit", "/metrics"):
        assert hive.api("GET", path).status == 200
    for request in ({"cmd": "logs"}, {"cmd": "events"}, {"cmd": "set_paused", "paused": True}, {"cmd": "restart"}):
        assert hive.ask(**request, name="alice")["ok"]
    hive.ask(cmd="rebuild", name="alice")
    wait_for(lambda: hive.ask(cmd="deploys", name="alice")["deploys"][0]["phase"] == "deployed", "the rebuild")
    assert hive.ask(cmd="stop", scope={"agent_names": ["alice"]})["ok"]
    assert hive.ask(cmd="destroy", name="alice", purge=False)["ok"]


@pytest.mark.needs("strace", "git")
def test_the_daemon_opens_nothing_below_what_an_agent_can_write(folder: Path) -> None:
    hive = Hive(folder)
    with hive:
        assert hive.daemon
        with strace(hive.daemon.pid, folder / "calls"):
            tell_the_story(hive)
    calls = {int(path.suffix[1:]): path.read_text(errors="replace") for path in folder.glob("calls.*")}
    agents = below_a_harness(calls)
    theirs = re.compile(rf"{re.escape(str(hive.state))}/(?:agents/[^/\"]+/(?:state|claude)|shared)/[^\"]")
    assert any(theirs.search(calls.get(thread, "")) for thread in agents), "the agents' own calls show that this sees"
    ours = [line for thread in calls.keys() - agents for line in calls[thread].splitlines()]
    assert any("hive.sqlite" in line for line in ours) and any("git" in line for line in ours)
    assert [line for line in ours if theirs.search(line)] == []


def test_a_purge_deletes_whatever_an_agent_left_and_follows_no_link(folder: Path) -> None:
    with Hive(folder) as hive:
        state = hive.spawn("alice").state / "agents/alice/state"
        (folder / "elsewhere").mkdir()
        (folder / "elsewhere/file").touch()
        inner = os.open(state, os.O_RDONLY)
        for _ in range(1500):  # deeper than Python recurses
            os.symlink(folder / "elsewhere", "link", dir_fd=inner)
            os.mkfifo("pipe", dir_fd=inner)
            os.mkdir("d", dir_fd=inner)
            outer, inner = inner, os.open("d", os.O_RDONLY, dir_fd=inner)
            os.close(outer)
        os.close(inner)
        answer = hive.ask(cmd="destroy", name="alice", purge=True)
        assert answer["ok"], answer
        assert not (hive.state / "agents/alice").exists() and (folder / "elsewhere/file").exists()
