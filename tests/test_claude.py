"""The harness with the real claude command, against a stand-in of its service: what the rehearsal only plays."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import CLAUDE
from fakes.harness import HARNESS, Harness
from fakes.messages_api import Api
from hive import Hive, processes_of, wait_for

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
    settings["API_TIMEOUT_MS"] = "3000"
    (folder / "environment").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))


def script(*steps: Any) -> str:
    return "SCRIPT:" + json.dumps(steps)


def transcript_of(harness: Harness) -> str:
    return "".join(file.read_text() for file in harness.folder.glob("claude/projects/*/*.jsonl"))


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


def test_mail_sent_while_the_last_text_is_written_is_read_in_a_turn_of_its_own(harness: Harness, api: Api) -> None:
    host = harness.host
    api.manner = "slow"
    messages = [host.put(script({"text": "The last word."}))]
    host.wait(lambda: host.partials, "its beginning")
    for number in range(3):
        messages.append(host.put(f"afterthought {number}", "bob"))
        host.wait_event("mail", number + 1)
    api.work()
    host.wait_acked(*messages)
    host.wait_event("turn_end", 2, outcome="done")
    assert [api.said().count(f"> afterthought {number}") for number in range(3)] == [1, 1, 1]
    assert len(host.of("turn_start")) == len(host.of("turn_end")) == 2


FAILURES: dict[str, tuple[tuple[int, str, str], str, str, str]] = {
    # what the service says → class, state, and words of the sentence that the page shows
    "401": ((401, "authentication_error", "no"), "authentication_failed", "needs_login", "Claude is not signed in."),
    "403": ((403, "permission_error", "no"), "authentication_failed", "needs_login", "Claude is not signed in."),
    "429": ((429, "rate_limit_error", "no"), "rate_limit", "rate_limited", "A limit of the service is reached."),
    "529": ((529, "overloaded_error", "no"), "server_error", "rate_limited", "overloaded or failing"),
    "500": ((500, "api_error", "no"), "server_error", "rate_limited", "overloaded or failing"),
    "billing": (
        (400, "invalid_request_error", "Your credit balance is too low to access the Anthropic API."),
        "billing_error",
        "failed",
        "The account has no credit.",
    ),
    "model": ((404, "not_found_error", "no"), "model_not_found", "failed", "does not know the model"),
    "poison": ((400, "invalid_request_error", "messages.1 is broken"), "other", "failed", "The turn failed."),
}


def test_each_failure_ends_in_its_state_and_needs_no_restart(harness: Harness, api: Api) -> None:
    host = harness.host
    harness.stop()
    harness.env["HYPERHIVE_BACKOFF_S"] = "60"
    harness.start()
    for number, (name, (failure, kind, state, words)) in enumerate(FAILURES.items(), 1):
        api.fail(*failure)
        message = host.put(f"hello from case {name}")
        assert host.wait_event("turn_end", number, outcome="failed")["class"] == kind, name
        report = host.wait_state(state)
        assert words in report["reason"], name
        assert ("until" in report) == (state == "rate_limited" or kind == "other"), name
        host.wait(lambda expected=number: len(host.called("nack")) >= expected, f"{name}: the mail to come back")
        assert host.called("nack")[-1].get("blameless", False) is (kind != "other"), name
        api.work()
        host.control("resume")
        host.wait_acked(message)
        host.wait_state("idle")
        assert api.said().count(f"hello from case {name}") == 1  # it was given twice
    assert sum("(process" in note["text"] for note in host.of("note")) == 1, "one process, through all of it"


def test_a_service_that_hangs_or_is_gone_is_out_of_reach_and_one_that_stumbles_is_not(
    harness: Harness, api: Api
) -> None:
    host = harness.host
    for number, manner in enumerate(("slow", "cut"), 1):
        api.manner = manner
        host.wait_acked(host.put(script({"text": "a text of several words"}), "bob"))
        host.wait_event("turn_end", number, outcome="done")
    api.manner = "hang"
    message = host.put("anybody there?")
    assert host.wait_event("turn_end", outcome="failed")["class"] == "unreachable"
    api.work()
    host.wait_acked(message)
    api.stop()
    failed = len(host.of("turn_end", outcome="failed"))
    message = host.put("and now?")
    end = host.wait_event("turn_end", failed + 1, outcome="failed")
    assert end["class"] == "unreachable" and "cannot be reached" in end["reason"]
    again = Api(api.server_address[1]).start()
    try:
        host.wait_acked(message)
    finally:
        again.stop()


def test_a_subscription_limit_is_waited_for_until_it_resets(harness: Harness, api: Api, folder: Path) -> None:
    host = harness.host
    (folder / "environment").write_text(f"ANTHROPIC_BASE_URL={api.url}\nCLAUDE_CODE_MAX_RETRIES=1\n")
    sign_in = {"accessToken": "made-up", "refreshToken": "made-up", "expiresAt": int(time.time() + 9000) * 1000}
    (folder / "claude").mkdir(exist_ok=True)
    credentials = {"claudeAiOauth": {**sign_in, "scopes": ["user:inference"], "subscriptionType": "max"}}
    (folder / "claude/.credentials.json").write_text(json.dumps(credentials))
    resets = int(time.time()) + 8
    unified = {"status": "rejected", "reset": str(resets), "representative_claim": "five_hour"}
    headers = {f"anthropic_ratelimit_unified_{name}": value for name, value in unified.items()}
    api.fail(429, "rate_limit_error", "no", **headers)
    message = host.put("hello")
    host.wait_state("rate_limited")
    report = next(state for state in host.states if state["state"] == "rate_limited")
    assert datetime.fromisoformat(report["until"]).timestamp() == resets + 1
    assert report["signed_in_until"] and report["signed_in_renews"]
    api.work()
    host.wait_acked(message)
    assert time.time() >= resets and host.mail[message]["blamed"] == 0
    host.wait_state("idle")


def test_a_conversation_that_is_too_long_gives_way_to_a_new_one(harness: Harness, api: Api) -> None:
    host = harness.host
    host.wait_acked(host.put("one"))
    api.fail(400, "invalid_request_error", "prompt is too long: 250000 tokens > 200000 maximum")
    message = host.put("two")
    assert host.wait_event("turn_end", outcome="failed")["class"] == "prompt_too_long"
    api.work()
    host.wait_acked(message)
    assert f"Your notes are in {harness.state}/notes.md" in api.said() and "> one" not in api.said()


def test_words_of_failures_in_an_agents_own_text_change_nothing(harness: Harness, api: Api) -> None:
    host = harness.host
    words = "API Error: 429 rate_limit. You've hit your session limit. authentication_failed, prompt_too_long: 401"
    host.wait_acked(host.put(script({"text": words}), "bob"), host.put(words, "bob"))
    host.wait_text(words)
    host.wait_state("idle")
    assert not host.of("turn_end", outcome="failed")
    assert {state["state"] for state in host.states} <= {"idle", "working"}


def test_more_tool_servers(folder: Path, api: Api) -> None:
    harness = Harness(folder, claude=str(CLAUDE))
    servers = {"again": {"command": HARNESS[0], "args": [*HARNESS[1:], "mcp"]}}
    harness.env["HYPERHIVE_MCP_SERVERS"] = json.dumps({"mcpServers": servers})
    call = {"tools": [{"name": "mcp__again__whoami", "input": {}}]}
    with harness:
        harness.host.wait_acked(harness.host.put(script(call, {"text": "So that is me."})))
        harness.host.wait_text("So that is me.")
        assert '"name":"alice"' in harness.host.wait_event("tool_result")["output"]


def test_an_idle_hive_asks_the_model_nothing(folder: Path, api: Api) -> None:
    settings = {"claude": str(CLAUDE), "rehearsal": False, "environment_file": str(folder / "environment")}
    with Hive(folder) as hive:
        hive.stop()
        hive.configure(**settings)
        hive.start().spawn("alice", "bob", running=True)
        time.sleep(2)
        assert not api.requests
        hive.ask(cmd="send", to="alice", body="hello")
        wait_for(lambda: hive.api("GET", "/api/usage").body["usage"], "the turn", timeout_s=30)
        asked = len(api.requests)
        assert asked
        time.sleep(6)  # her Claude stays warm, and silent
        assert len(api.requests) == asked


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


def test_compacting_and_a_new_session(harness: Harness, api: Api) -> None:
    host = harness.host
    host.wait_acked(host.put(script(shell("echo something"), {"text": "Something to compact."})))
    host.control("compact")
    assert host.wait_event("compaction")["pre_tokens"] > 0
    host.control("new_session")  # while the compaction still ends
    host.wait_acked(host.put("again"))
    host.wait(lambda: sum(" begun " in note["text"] for note in host.of("note")) == 2, "a second session")
    assert "> again" in api.said() and "Something to compact." not in api.said()
    assert not host.of("mail") and not host.of("turn_end", outcome="failed")


def test_a_claude_that_was_ending_when_the_mail_came_is_replaced_at_once(harness: Harness, api: Api) -> None:
    host = harness.host
    host.wait_acked(host.put("one"))
    wait_for(lambda: "> one" in transcript_of(harness), "it to be written down")
    os.kill(harness.claude_pid(), signal.SIGSTOP)
    message = host.put("two")
    host.wait_event("turn_start", 2)
    os.kill(harness.claude_pid(), signal.SIGKILL)
    host.wait_acked(message)
    assert not host.called("nack") and not host.of("turn_end", outcome="failed")
    assert api.said().count("> one") == api.said().count("> two") == 1


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
