"""The harness with the real claude command, against a stand-in of its service: what the rehearsal only plays."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import CLAUDE
from fakes.harness import Harness
from fakes.messages_api import Api
from hive import processes_of, wait_for

pytestmark = pytest.mark.needs("claude")


@pytest.fixture
def api() -> Iterator[Api]:
    running = Api().start()
    yield running
    running.stop()


@pytest.fixture
def harness(folder: Path, api: Api) -> Iterator[Harness]:
    with Harness(folder, claude=str(CLAUDE)) as running:
        yield running


@pytest.fixture(autouse=True)
def environment(folder: Path, api: Api) -> None:
    """What the host would lay beside the socket. Tries again once only, or a failing service takes minutes."""
    settings = {"ANTHROPIC_API_KEY": "dummy", "ANTHROPIC_BASE_URL": api.url, "CLAUDE_CODE_MAX_RETRIES": "1"}
    (folder / "environment").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))


def script(*steps: Any) -> str:
    return "SCRIPT:" + json.dumps(steps)


def shell(command: str) -> dict[str, Any]:
    return {"tools": [{"name": "Bash", "input": {"command": command, "description": "A command"}}]}


def test_a_turn_with_a_tool_of_ours(harness: Harness, api: Api) -> None:
    host = harness.host
    send = {"name": "mcp__hive__send", "input": {"to": "bob", "body": "hello from claude"}}
    message = host.put(script({"text": "I write to bob.", "tools": [send]}, {"text": "Written."}))
    host.wait_acked(message)
    assert host.called("send")[0]["body"] == "hello from claude"
    host.wait_text("Written.")
    end = host.wait_event("turn_end")
    assert end["outcome"] == "done" and end["tools"] == 1 and end["cost_usd"] > 0
    usage = host.wait(lambda: list(host.usages.values()), "the usage")[0]
    assert usage["input_tokens"] > 0 and usage["context_window"] >= 200_000 and usage["context_tokens"] > 0
    assert "You are alice" in json.dumps(api.requests[-1]["system"])
    offered = {tool["name"] for tool in api.requests[-1]["tools"]}
    assert {"mcp__hive__send", "mcp__hive__ask", "Bash"} <= offered and "SendMessage" not in offered
    assert "mcp__hive__request_spawn" not in offered


def test_two_turns_in_one_process_then_killed_and_resumed(harness: Harness, api: Api) -> None:
    host = harness.host
    for body in ("first", "second"):
        host.wait_acked(host.put(body))
        assert f"> {body}" in api.said()
    first = harness.claude_pid()
    assert [process.pid for process in processes_of(harness.folder) if process.pid == first]
    tool = host.put(script(shell("touch begun; sleep 300"), {"text": "Too late."}))
    wait_for((harness.state / "begun").exists, "the tool")
    session = json.loads((harness.state / "session.json").read_text())["session"]
    os.kill(first, signal.SIGKILL)
    host.wait_event("turn_end", outcome="failed")
    wait_for(lambda: not psutil.pid_exists(first), "the end of the process")
    host.wait_event("turn_start", 4)
    host.control("interrupt")
    host.wait_acked(tool)
    host.wait_acked(host.put("third"))
    assert "> first" in api.said() and "> third" in api.said()
    assert harness.claude_pid() != first
    assert json.loads((harness.state / "session.json").read_text())["session"] == session


def test_mail_sent_while_a_tool_runs_is_read_in_that_turn(harness: Harness, api: Api) -> None:
    host = harness.host
    first = host.put(script(shell("sleep 2"), {"text": "Both read."}))
    host.wait_event("tool_call")
    second = host.put("by the way", "bob")
    host.wait_acked(first, second)
    host.wait_text("Both read.")
    assert host.kinds().count("turn_start") == 1 and len(host.of("mail")) == 1
    assert "> by the way" in api.said()


@pytest.mark.parametrize(
    ("status", "kind", "failure"),
    [
        (401, "authentication_error", "authentication_failed"),
        (429, "rate_limit_error", "rate_limit"),
        (529, "overloaded_error", "server_error"),
        (404, "not_found_error", "model_not_found"),
    ],
)
def test_failures_of_the_service_are_told_apart(
    harness: Harness, api: Api, status: int, kind: str, failure: str
) -> None:
    host = harness.host
    api.fail(status, kind, "no")
    message = host.put("hello")
    assert host.wait_event("turn_end", outcome="failed")["class"] == failure
    host.wait(lambda: host.called("nack"), "the mail to come back")
    assert host.called("nack")[0]["blameless"]
    api.work()
    host.control("resume")
    host.wait_acked(message)
    assert host.mail[message]["blamed"] == 0


def test_an_unknown_session_begins_a_new_one(harness: Harness) -> None:
    host = harness.host
    host.wait_acked(host.put("one"))
    harness.stop()
    for transcript in harness.folder.glob("claude/projects/*/*.jsonl"):
        transcript.unlink()
    harness.start()
    host.wait_acked(host.put("two"))
    host.wait(lambda: any("not known here" in note["text"] for note in host.of("note")), "a note of it")
    assert not host.of("turn_end", outcome="failed")


def test_compacting_and_a_new_session(harness: Harness) -> None:
    host = harness.host
    host.wait_acked(host.put(script(shell("echo something"), {"text": "Something to compact."})))
    host.control("compact")
    assert host.wait_event("compaction")["pre_tokens"] > 0
    host.control("new_session")
    host.wait_acked(host.put("again"))
    host.wait(lambda: sum(" begun " in note["text"] for note in host.of("note")) == 2, "a second session")
    assert not host.of("turn_end", outcome="failed")


def test_a_task_in_the_background_keeps_the_process_and_starts_a_turn(folder: Path, api: Api) -> None:
    with Harness(folder, claude=str(CLAUDE), warm_s=0.5) as harness:
        background = {"command": "sleep 2; echo finished", "run_in_background": True}
        steps = ({"tools": [{"name": "Bash", "input": background}]}, {"text": "It runs."}, {"text": "It has ended."})
        harness.host.wait_acked(harness.host.put(script(*steps)))
        harness.host.wait_text("It has ended.")
        assert [start["messages"] == [] for start in harness.host.of("turn_start")] == [False, True]
        pid = harness.claude_pid()
        wait_for(lambda: not psutil.pid_exists(pid), "the idle process to end")


def test_sigterm_in_a_turn_leaves_no_process(harness: Harness) -> None:
    message = harness.host.put(script(shell("sleep 300"), {"text": "Never."}))
    wait_for(lambda: [one for one in processes_of(harness.folder) if one.name() == "sleep"], "the tool")
    assert harness.stop() == 0
    assert not processes_of(harness.folder)
    assert harness.host.mail[message]["state"] == "queued" and harness.host.mail[message]["blamed"] == 0


def test_signing_in_shows_an_address_and_can_be_cancelled(harness: Harness) -> None:
    host = harness.host
    host.control("login_begin")
    state = host.wait(
        lambda: (last := host.states[-1:]) and "url" in last[0].get("login", {}) and last[0], "the address"
    )
    assert state["login"]["url"].startswith("https://") and state["login"]["phase"] == "code_wanted"
    host.control("login_cancel")
    host.wait(lambda: host.states[-1]["login"]["phase"] == "failed", "the end")
    assert host.states[-1]["state"] == "idle"
