"""The story of the demo from its first line to its end, and the same with the real claude command."""

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import CLAUDE
from fakes.messages_api import Api
from hive import HYPERHIVE, Hive, is_alive, originals, processes_of, wait_for

ALICES_QUESTION = "What shall my first report be about?"


class Demo(Hive):
    """`hyperhive.py demo`, with ports that no other test uses, and a rehearsal that does not take its time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.configure(manager_autostart=True, rehearsal=False, claude="/nowhere/claude")  # what demo sets by itself
        self.said: list[str] = []

    def begin(self) -> list[str]:
        """Start it; the lines that it prints."""
        command = [*HYPERHIVE, "demo", "--dir", str(self.folder), "--port", str(self.port), "--no-browser"]
        with self.log.open("a") as log:
            self.daemon = process = subprocess.Popen(  # type: ignore[assignment]
                [*command, "--config", str(self.config)], stdout=subprocess.PIPE, stderr=log, text=True
            )
        lines = []
        assert process.stdout
        with process.stdout as stdout:
            while "Ctrl-C" not in (line := stdout.readline()):
                assert line, f"it ended with status {process.wait()}: {self.log.read_text()}"
                lines.append(line.strip())
        return lines

    def end(self, how: signal.Signals) -> None:
        """Its status is 0, and nothing of it is left."""
        daemon = self._gone()
        children = processes_of(self.folder)
        daemon.send_signal(how)
        assert daemon.wait(timeout=30) == 0, self.log.read_text()
        wait_for(lambda: not any(map(is_alive, children)) and not processes_of(self.folder), "the end of every child")
        assert not [path for path in self.run.rglob("*") if path.is_socket()]
        assert "Traceback" not in self.log.read_text()

    def state_of(self, name: str) -> str:
        rows = {row["name"]: row for row in self.ask(cmd="agents")["agents"]}
        return str(rows[name]["state"]) if name in rows else ""


@pytest.fixture
def demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Demo]:
    monkeypatch.setenv("HYPERHIVE_REHEARSAL_SPEED", "0")
    running = Demo(folder)
    yield running
    running.close()


def test_the_story_by_the_command_line_alone(demo: Demo) -> None:
    lines = demo.begin()
    assert f"{demo.url}/#token={demo.token}" in lines
    assert any("rehearsal" in line for line in lines)
    pending, approve = (shlex.split(line) for line in lines if " --dir " in line)

    def run(command: list[str]) -> str:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran
        return ran.stdout

    def verb(*args: str) -> str:
        return run([*HYPERHIVE, "--dir", str(demo.folder), *args])

    wait_for(lambda: "alice" in run(pending), "the manager's request")
    assert "spawn" in run(pending)
    shown = verb("show", "1")
    assert "+" in shown and "pkgs.ripgrep" in shown and re.search(r"requested by +manager", shown)
    assert "approved 1" in run([*approve, "--wait"])
    wait_for(lambda: ALICES_QUESTION in verb("pending"), "alice's question")
    assert re.search(r"^manager .*\n^alice ", verb("list"), re.MULTILINE)
    number = re.search(rf"^(\d+) +alice .*{re.escape(ALICES_QUESTION)}", verb("pending"), re.MULTILINE)
    assert number
    verb("answer", number[1], "The shared folder")
    wait_for(lambda: "My report, as you chose (The shared folder)" in verb("inbox", "--keep"), "the report")
    assert "hello-from-alice.txt" in verb("inbox")
    wait_for(lambda: "done with the first report" in verb("list"), "alice's status")
    assert "nothing waits for you" in verb("status")
    demo.end(signal.SIGTERM)


def test_the_story_by_http_alone(demo: Demo) -> None:
    demo.begin()

    def state(key: str) -> Any:
        return demo.api("GET", "/api/state").body[key]

    (request,) = wait_for(lambda: state("approvals"), "the manager's request")
    assert (request["agent"], request["requested_by"], request["kind"]) == ("alice", "manager", "spawn")
    full = demo.api("GET", f"/api/approvals/{request['id']}").body["approval"]
    assert "+" in full["diff"] and [file["path"] for file in full["files"]] == ["agent.nix"]
    assert demo.api("POST", f"/api/approvals/{request['id']}/approve", {"digest": full["digest"]}).status == 200
    (question,) = wait_for(lambda: state("questions"), "alice's question")
    assert (question["from"], question["question"]) == ("alice", ALICES_QUESTION)
    assert {row["kind"] for row in state("attention")} == {"question"}
    answer = {"text": question["options"][1]}
    assert demo.api("POST", f"/api/questions/{question['id']}/answer", answer).status == 200

    def report() -> list[dict[str, Any]]:
        letters = demo.api("GET", "/api/messages?with=operator").body["messages"]
        return [row for row in letters if row["from"] == "alice" and "My report" in row["body"]]

    (letter,) = wait_for(report, "the report")
    assert "hello-from-alice.txt" in letter["body"]
    assert demo.api("POST", "/api/messages/read", {"ids": [letter["id"]]}).body == {"read": 1}
    wait_for(lambda: {row["state"] for row in state("agents")} == {"idle"}, "everybody to rest")
    assert state("hive")["rehearsal"] is True and state("attention") == []
    events = demo.api("GET", "/api/agents/alice").body["events"]
    assert {"turn_start", "text", "thinking", "tool_call", "tool_result", "turn_end"} <= {row["kind"] for row in events}
    demo.end(signal.SIGINT)


def test_ended_in_the_middle_and_begun_again(demo: Demo) -> None:
    """At any moment, also while a tool runs; then the story goes on where it was, and nothing of it happens twice."""
    demo.begin()
    wait_for(lambda: demo.ask(cmd="pending")["approvals"], "the manager's request")
    demo.ask(cmd="approve", id=1)
    wait_for(lambda: demo.ask(cmd="pending")["questions"], "alice's question")
    steps = [{"tool": "Bash", "input": {"command": "touch $HYPERHIVE_STATE/began; sleep 300"}}]
    demo.ask(cmd="send", to="manager", body=f"rehearse: {json.dumps(steps)}")
    wait_for((demo.state / "agents/manager/state/began").exists, "the manager's tool")
    wait_for(lambda: processes_of(demo.folder, "sleep"), "its next command")
    demo.end(signal.SIGINT)
    (demo.state / "agents/manager/state/began").unlink()
    again = "\n".join(demo.begin())
    assert "goes on where it was" in again and again.rstrip().endswith(" status") and "Soon" not in again
    wait_for((demo.state / "agents/manager/state/began").exists, "the manager's tool, once more")
    demo.end(signal.SIGTERM)
    demo.begin()
    assert [row["agent"] for row in demo.ask(cmd="deploys")["deploys"]] == ["alice", "manager"]
    (question,) = demo.ask(cmd="pending")["questions"]
    demo.ask(cmd="answer", id=question["id"], text="This machine")
    wait_for(lambda: "(This machine)" in json.dumps(demo.ask(cmd="inbox")), "the report")
    assert demo.ask(cmd="pending")["approvals"] == []
    assert json.dumps(demo.ask(cmd="inbox")).count("I asked for an agent called alice") == 1
    demo.end(signal.SIGTERM)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_ended_right_after_its_first_words(demo: Demo, how: signal.Signals) -> None:
    demo.begin()
    demo.end(how)


# ── the real one ──


def script(*steps: Any) -> str:
    return f"SCRIPT:{json.dumps(steps)}"


def calls(tool: str, **arguments: Any) -> dict[str, Any]:
    return {"text": f"I call {tool}.", "tools": [{"name": f"mcp__hive__{tool}", "input": arguments}]}


@contextmanager
def real_hive(folder: Path) -> Iterator[tuple[Hive, Api]]:
    api = Api().start()
    environment = folder / "environment"
    environment.write_text(f"ANTHROPIC_BASE_URL={api.url}\nANTHROPIC_API_KEY=dummy\nCLAUDE_CODE_MAX_RETRIES=1\n")
    try:
        with Hive(folder, environment_file=str(environment)) as hive:
            hive.stop()
            hive.configure(claude=str(CLAUDE), rehearsal=False)
            yield hive.start(), api
    finally:
        api.stop()


def claude_of(hive: Hive, name: str) -> psutil.Process:
    """The agent's Claude, and its session."""

    def is_one(process: psutil.Process) -> bool:
        return process.environ().get("HYPERHIVE_NAME") == name and bool(session_of(process))

    def look() -> psutil.Process | None:
        found = originals(hive.folder, is_one)
        return found[0] if len(found) == 1 else None

    found: psutil.Process = wait_for(look, "its Claude")
    return found


def session_of(process: psutil.Process) -> str:
    options = [word for word in process.cmdline() if word.startswith(("--session-id=", "--resume="))]
    return options[0].partition("=")[2] if options else ""


def letters(hive: Hive, sender: str) -> list[str]:
    return [row["body"] for row in hive.ask(cmd="inbox")["messages"] if row["from"] == sender]


@pytest.mark.needs("claude")
def test_the_story_with_the_real_claude(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERHIVE_BACKOFF_S", "0.2")  # after a turn that met the process as it was being killed
    with real_hive(folder) as (hive, api):
        hive.spawn("manager", running=True)
        asks = calls("request_spawn", name="alice", description="She says hello.", config="{ ... }: { }\n")
        hive.ask(cmd="send", to="manager", body=script(asks, {"text": "I have asked."}))
        (request,) = wait_for(lambda: hive.ask(cmd="pending")["approvals"], "the manager's request", timeout_s=60)
        assert (request["agent"], request["description"]) == ("alice", "She says hello.")
        assert "+{ ... }: { }" in hive.ask(cmd="show", id=request["id"])["approval"]["diff"]
        hive.ask(cmd="approve", id=request["id"])
        wait_for(lambda: hive.ask(cmd="show", id=request["id"])["approval"]["phase"] == "deployed", "alice")

        def turn(text: str) -> psutil.Process:
            says = calls("send", to="operator", body=text)
            hive.ask(cmd="send", to="alice", body=f"Please say {text}. {script(says, {'text': 'Said.'})}")
            wait_for(lambda: text in letters(hive, "alice"), f"{text!r} in the inbox", timeout_s=60)
            wait_for(lambda: turns_done(hive, "alice") == len(letters(hive, "alice")), "the end of the turn")
            return claude_of(hive, "alice")

        first = turn("hello")
        assert turn("hello again") == first
        session = session_of(first)
        first.kill()
        wait_for(lambda: not is_alive(first), "the end of the first process")
        second = turn("still here")
        assert second != first and session_of(second) == session
        assert f"--resume={session}" in second.cmdline()
        assert "Please say hello again." in api.said(), "the conversation before"
        assert letters(hive, "alice") == ["hello", "hello again", "still here"]
        kinds = {row["kind"] for row in hive.api("GET", "/api/agents/alice").body["events"] if "kind" in row}
        assert {"text", "tool_call", "tool_result", "turn_end"} <= kinds
        spent = hive.api("GET", "/api/usage").body["usage"]
        assert all(row["cost_usd"] > 0 for row in spent) and {row["agent"] for row in spent} == {"manager", "alice"}


def turns_done(hive: Hive, name: str) -> int:
    events = hive.ask(cmd="events", name=name, max=2000)["events"]
    return sum(row["kind"] == "turn_end" and row["data"]["outcome"] == "done" for row in events)
