"""The harness with the real claude command, against a stand-in of its service: what the rehearsal only plays."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import re
import signal
import struct
import termios
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import CLAUDE
from fakes.harness import GO, HARNESS, Harness
from fakes.host import Host
from fakes.messages_api import Api
from hive import Hive, processes_of, wait_for

from harness import REMEDIES, Failure, Wait

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
    first = host.put(script(shell(GO), {"text": "Both read."}))
    host.wait_event("tool_call")
    second = host.put("by the way", "bob")
    host.wait_event("mail")
    wait_for(lambda: "> by the way" in transcript_of(harness), "Claude to have it")
    (harness.state / "go").touch()
    host.wait_acked(first, second)
    host.wait_text("Both read.")
    assert host.kinds().count("turn_start") == 1 and len(host.of("mail")) == 1
    assert "> by the way" in api.said()


def test_mail_sent_while_the_last_text_is_written_is_read_in_a_turn_of_its_own(harness: Harness, api: Api) -> None:
    host = harness.host
    api.manner = "held"
    messages = [host.put(script({"text": "The last word."}))]
    host.wait(lambda: host.partials, "its beginning")
    for number in range(3):
        messages.append(host.put(f"afterthought {number}", "bob"))
        host.wait_event("mail", number + 1)
    wait_for(lambda: all(f"> afterthought {n}" in transcript_of(harness) for n in range(3)), "Claude to have them")
    api.work()
    host.wait_acked(*messages)
    host.wait_event("turn_end", 2, outcome="done")
    assert [api.said().count(f"> afterthought {number}") for number in range(3)] == [1, 1, 1]
    assert len(host.of("turn_start")) == len(host.of("turn_end")) == 2


def png(side: int) -> bytes:
    """A picture of noise, which no compression makes smaller."""
    rows = b"".join(b"\0" + os.urandom(side * 3) for _ in range(side))
    parts = {b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    chunks = (struct.pack(">I", len(data)) + name + data for name, data in parts.items())
    sums = (struct.pack(">I", zlib.crc32(name + data)) for name, data in parts.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk + checksum for chunk, checksum in zip(chunks, sums, strict=True))


def test_a_picture_that_claude_reads_is_kept_if_it_is_small(harness: Harness) -> None:
    host = harness.host
    for name, side in (("small.png", 8), ("large.png", 400)):
        (harness.folder / name).write_bytes(png(side))
    reads = [
        {"tools": [{"name": "Read", "input": {"file_path": str(harness.folder / name)}}]}
        for name in ("small.png", "large.png")
    ]
    host.wait_acked(host.put(script(*reads, {"text": "Seen."})))
    host.wait_text("Seen.")
    small, large = host.of("tool_result")
    assert small["images"] == large["images"] == 1
    (picture,) = small["pictures"]
    assert picture["type"] == "image/png"
    assert base64.b64decode(picture["data"]) == (harness.folder / "small.png").read_bytes()
    assert "pictures" not in large


def test_what_a_sub_agent_does_is_told_as_its(harness: Harness) -> None:
    host = harness.host
    order = script(shell("echo from below"), {"text": "Looked."})
    task = {"description": "Look", "prompt": order, "subagent_type": "general-purpose", "run_in_background": False}
    host.wait_acked(host.put(script({"tools": [{"name": "Agent", "input": task}]}, {"text": "All done."})))
    host.wait_text("All done.")
    call = next(event for event in host.of("tool_call") if event["name"] == "Agent")
    below = [event for kind in ("tool_call", "tool_result") for event in host.of(kind) if "parent" in event]
    assert [event.get("name", "result") for event in below] == ["Bash", "result"]
    assert {event["parent"] for event in below} == {call["tool_use_id"]}


# ── failures: each ends as harness.REMEDIES says, and what comes after it needs no restart ──


def failed_as(harness: Harness, failure: Failure, message: int) -> dict[str, Any]:
    """Wait until the first turn of this message has failed, and hold it against the table: the class, the state, the
    sentence that the page shows, and where the mail is. Returns the state that was reported, if the agent waits.
    """
    host, remedy = harness.host, REMEDIES[failure]
    end = host.wait(lambda: end_of_turn(host, message), "the end of the turn")
    assert (end["outcome"], end["class"]) == ("failed", failure)
    assert end["reason"].startswith(remedy.reason), end["reason"]
    nack = host.wait(lambda: [call for call in host.called("nack") if message in call["ids"]], "the mail")[0]
    assert nack.get("blameless", False) is not remedy.blame and nack["reason"] == end["reason"]
    assert host.mail[message]["state"] in ("queued", "leased") and host.mail[message]["blamed"] >= remedy.blame
    if remedy.wait is Wait.NOT:
        return {}
    states = host.wait(lambda: [one for one in host.states if one.get("reason") == end["reason"]], "the state")
    assert states[-1]["state"] == remedy.state
    assert ("until" in states[-1]) is (remedy.wait is not Wait.OPERATOR)
    return dict(states[-1])


def end_of_turn(host: Host, message: int) -> dict[str, Any] | None:
    events = [host.events[number] for number in sorted(host.events)]
    given = (event for event in events if any(one["id"] == message for one in event["data"].get("messages", [])))
    turn = next((event["turn"] for event in given), None)
    return next((one["data"] for one in events if one["kind"] == "turn_end" and one["turn"] == turn), None)


def recovered(harness: Harness, message: int, *, blamed: int | None = 0) -> None:
    """Wait until it was read; `blamed` is how often by then, None where that is by chance."""
    harness.host.wait_acked(message)
    harness.host.wait_state("idle")
    assert blamed in (None, harness.host.mail[message]["blamed"])


NO_CREDIT = "Your credit balance is too low to access the Anthropic API."
ANSWERS: dict[str, tuple[Failure, tuple[int, str, str]]] = {
    "401": (Failure.SIGN_IN, (401, "authentication_error", "no")),
    "403": (Failure.SIGN_IN, (403, "permission_error", "no")),
    "429": (Failure.LIMIT, (429, "rate_limit_error", "no")),
    "529": (Failure.OVERLOAD, (529, "overloaded_error", "no")),
    "500": (Failure.OVERLOAD, (500, "api_error", "no")),
    "billing": (Failure.BILLING, (400, "invalid_request_error", NO_CREDIT)),
    "model": (Failure.MODEL, (404, "not_found_error", "no")),
    "poison": (Failure.OTHER, (400, "invalid_request_error", "messages.1 is broken")),
}


def test_what_the_service_answers(folder: Path, api: Api) -> None:
    harness = Harness(folder, claude=str(CLAUDE))
    harness.env["HYPERHIVE_BACKOFF_S"] = "600"
    with harness:
        host = harness.host
        for name, (failure, answer) in ANSWERS.items():
            api.fail(*answer)
            message = host.put(f"hello from case {name}")
            failed_as(harness, failure, message)
            api.work()
            if failure is Failure.MODEL:
                host.control("set_model", model="another-1")
            else:
                host.control("resume")
            recovered(harness, message, blamed=REMEDIES[failure].blame)
            assert api.said().count(f"hello from case {name}") == 1  # it was given twice
        assert sum("(process" in note["text"] for note in host.of("note")) == 1, "one process, through all of it"


@pytest.mark.parametrize("manner", ["slow", "cut"])
def test_a_service_that_stumbles_is_waited_for(harness: Harness, api: Api, manner: str) -> None:
    api.manner = manner
    message = harness.host.put(script({"text": "a text of several words"}), "bob")
    recovered(harness, message)
    harness.host.wait_event("turn_end", outcome="done")
    harness.host.wait_text("a text of several words")


def test_a_service_that_hangs_is_out_of_reach(harness: Harness, api: Api) -> None:
    api.manner = "hang"
    message = harness.host.put("anybody there?")
    failed_as(harness, Failure.UNREACHABLE, message)
    api.work()
    recovered(harness, message)


def test_a_service_that_refuses_connections_is_out_of_reach(harness: Harness, api: Api) -> None:
    api.stop()
    message = harness.host.put("anybody there?")
    failed_as(harness, Failure.UNREACHABLE, message)
    again = Api(api.server_address[1]).start()
    try:
        recovered(harness, message)
    finally:
        again.stop()


def test_a_turn_in_which_nothing_happens_is_ended(folder: Path, api: Api) -> None:
    (folder / "environment").write_text(f"ANTHROPIC_API_KEY=dummy\nANTHROPIC_BASE_URL={api.url}\n")
    with Harness(folder, claude=str(CLAUDE), stall_s=3) as harness:
        harness.host.wait_acked(harness.host.put("warm"))
        api.manner = "hang"
        message = harness.host.put("anybody there?")
        failed_as(harness, Failure.STALLED, message)
        api.work()
        recovered(harness, message, blamed=None)


def test_a_claude_that_dies(harness: Harness) -> None:
    mark = harness.folder / "begun"
    once = f"test -e {mark} || {{ touch {mark}; kill -9 $PPID; }}"
    message = harness.host.put(script(shell(once), shell(once), {"text": "The second time."}))
    failed_as(harness, Failure.DIED, message)
    recovered(harness, message, blamed=1)


def test_a_claude_that_was_ended_and_later_killed_goes_on_from_where_it_was_last(harness: Harness, api: Api) -> None:
    host = harness.host
    for number, blow in enumerate((signal.SIGTERM, signal.SIGKILL)):
        host.wait_acked(host.put(f"before blow {number}"))
        mark = harness.folder / f"tool-{number}"
        message = host.put(script(shell(f"test -e {mark} || {{ touch {mark}; sleep 300; }}"), {"text": "Done."}))
        wait_for(mark.exists, "the tool")
        wait_for(lambda path=mark: str(path) in transcript_of(harness), "the call to be written down")
        os.kill(harness.claude_pid(), blow)
        host.wait_acked(message)
    host.wait_acked(host.put("after both"))
    assert [api.said().count(f"> {text}") for text in ("before blow 0", "before blow 1", "after both")] == [1, 1, 1]


def test_a_claude_that_prints_what_is_not_its_protocol(folder: Path) -> None:
    command = folder / "claude-with-a-greeting"
    command.write_text(f'#!/bin/sh\ntest -e {folder}/quiet || echo "Welcome."\nexec {CLAUDE} "$@"\n')
    command.chmod(0o755)
    harness = Harness(folder, claude=str(command))
    harness.env["HYPERHIVE_BACKOFF_S"] = "3"
    with harness:
        message = harness.host.put("hello")
        assert "Welcome." in failed_as(harness, Failure.GARBAGE, message)["reason"]
        (folder / "quiet").touch()
        recovered(harness, message, blamed=None)


def test_a_claude_that_is_not_there_yet(folder: Path) -> None:
    command = folder / "claude-to-come"
    with Harness(folder, claude=str(command)) as harness:
        message = harness.host.put("hello")
        failed_as(harness, Failure.CANNOT_START, message)
        command.symlink_to(CLAUDE)
        recovered(harness, message)


def test_a_claude_that_refuses_to_start(folder: Path) -> None:
    command = folder / "claude-with-an-option"
    command.write_text(f'#!/bin/sh\ntest -e {folder}/better || set -- --no-such-option "$@"\nexec {CLAUDE} "$@"\n')
    command.chmod(0o755)
    with Harness(folder, claude=str(command)) as harness:
        message = harness.host.put("hello")
        assert "no-such-option" in failed_as(harness, Failure.CANNOT_START, message)["reason"]
        (folder / "better").touch()
        recovered(harness, message)


@pytest.fixture
def subscription(folder: Path, api: Api) -> Callable[[float], None]:
    """Signs the agent in with a subscription whose token ends so many seconds from now. What would renew it is away."""
    settings = {"ANTHROPIC_BASE_URL": api.url, "CLAUDE_CODE_MAX_RETRIES": "1"}
    settings |= {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    (folder / "environment").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))

    def sign_in(ends_in_s: float) -> None:
        tokens = {"accessToken": "made-up", "refreshToken": "made-up"}
        about = {"expiresAt": int(time.time() + ends_in_s) * 1000, "scopes": ["user:inference"]}
        (folder / "claude").mkdir(exist_ok=True)
        credentials = {"claudeAiOauth": {**tokens, **about, "subscriptionType": "max"}}
        (folder / "claude/.credentials.json").write_text(json.dumps(credentials))

    return sign_in


def test_a_sign_in_that_can_not_be_renewed_is_noticed_at_the_next_turn(
    harness: Harness, api: Api, subscription: Callable[[float], None]
) -> None:
    host = harness.host
    subscription(9000)
    host.wait_acked(host.put("hello"))
    assert host.wait_state("idle")["signed_in_renews"]
    subscription(-60)
    api.fail(401, "authentication_error", "OAuth token has expired.")
    message = host.put("still there?")
    failed_as(harness, Failure.SIGN_IN, message)
    subscription(9000)
    api.work()
    host.control("resume")
    recovered(harness, message)


def test_a_subscription_limit_is_waited_for_until_it_resets(
    harness: Harness, api: Api, subscription: Callable[[float], None]
) -> None:
    host = harness.host
    subscription(9000)
    host.wait_acked(host.put("warm"))
    resets = int(time.time()) + 8
    unified = {"status": "rejected", "reset": str(resets), "representative_claim": "five_hour"}
    headers = {f"anthropic_ratelimit_unified_{name}": value for name, value in unified.items()}
    api.fail(429, "rate_limit_error", "no", **headers)
    message = host.put("hello")
    report = failed_as(harness, Failure.LIMIT, message)
    assert datetime.fromisoformat(report["until"]).timestamp() == resets + 1
    assert report["signed_in_until"] and report["signed_in_renews"]
    api.work()
    recovered(harness, message)
    assert time.time() >= resets


def test_a_conversation_that_is_too_long_gives_way_to_a_new_one(harness: Harness, api: Api) -> None:
    host = harness.host
    host.wait_acked(host.put("one"))
    api.fail(400, "invalid_request_error", "prompt is too long: 250000 tokens > 200000 maximum")
    message = host.put("two")
    failed_as(harness, Failure.TOO_LONG, message)
    api.work()
    recovered(harness, message, blamed=None)
    assert f"Your notes are in {harness.state}/notes.md" in api.said() and "> one" not in api.said()


def test_words_of_failures_in_an_agents_own_text_change_nothing(harness: Harness, api: Api) -> None:
    host = harness.host
    words = "API Error: 429 rate_limit. You've hit your session limit. authentication_failed, prompt_too_long: 401"
    host.wait_acked(host.put(script({"text": words}), "bob"), host.put(words, "bob"))
    host.wait_text(words)
    host.wait_state("idle")
    assert not host.of("turn_end", outcome="failed")
    assert {state["state"] for state in host.states} <= {"idle", "working"}


def test_what_the_config_adds_to_the_prompt(folder: Path, api: Api) -> None:
    harness = Harness(folder, claude=str(CLAUDE))
    harness.env["HYPERHIVE_EXTRA_PROMPT"] = "You write short, plain reports.\nIn {braces}, too."
    with harness:
        harness.host.wait_acked(harness.host.put("hello"))
        (prompt,) = [part["text"] for part in api.requests[-1]["system"] if "You are alice" in part["text"]]
        assert "You write short, plain reports.\nIn {braces}, too." in prompt
        assert f"{harness.state}/notes.md" in prompt and "not the operator's word" in prompt


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
    with Harness(folder, claude=str(CLAUDE), warm_s=4) as harness:
        background = {"command": f"{GO}; echo finished", "run_in_background": True}
        steps = ({"tools": [{"name": "Bash", "input": background}]}, {"text": "It runs."}, {"text": "It has ended."})
        harness.host.wait_acked(harness.host.put(script(*steps)))
        harness.host.wait_event("turn_end")
        (harness.state / "go").touch()
        harness.host.wait_text("It has ended.")
        assert [start["messages"] == [] for start in harness.host.of("turn_start")] == [False, True]
        pid = harness.claude_pid()
        wait_for(lambda: not psutil.pid_exists(pid), "the idle process to end")


def test_a_long_command_in_the_foreground_keeps_no_idle_process(folder: Path) -> None:
    with Harness(folder, claude=str(CLAUDE), warm_s=0.5) as harness:
        harness.host.wait_acked(harness.host.put(script(shell("sleep 4"), {"text": "Done."})))
        pid = harness.claude_pid()
        wait_for(lambda: not psutil.pid_exists(pid), "the idle process to end")


def test_a_paused_agent_starts_no_turn_when_its_task_ends(harness: Harness, api: Api) -> None:
    background = {"command": "sleep 300; echo finished", "run_in_background": True}
    steps = ({"tools": [{"name": "Bash", "input": background}]}, {"text": "It runs."}, {"text": "It has ended."})
    harness.host.wait_acked(harness.host.put(script(*steps)))
    wait_for(lambda: processes_of(harness.folder, "sleep"), "the task")
    harness.host.control("pause")
    harness.host.wait_state("paused")
    assert not processes_of(harness.folder, "sleep")
    assert not psutil.pid_exists(harness.claude_pid())
    assert len(harness.host.of("turn_start")) == 1


def test_a_model_that_is_chosen_between_turns_starts_none(harness: Harness, api: Api) -> None:
    host = harness.host
    for number, model in enumerate(("claude-opus-4-8", "claude-haiku-4-5"), 1):
        host.control("set_model", model=model)
        host.wait_acked(host.put(f"with {model}"))
        usage = host.wait(lambda number=number: list(host.usages.values())[number - 1 :], "its usage")[0]
        assert api.requests[-1]["model"].startswith(model) and usage["model"].startswith(model)
    assert host.wait_state("idle")
    assert len(host.of("turn_start")) == 2


def test_sigkill_of_the_harness_before_claude_has_begun(harness: Harness, api: Api) -> None:
    done = harness.state / "done"
    api.manner = "hang"  # so that the first Claude comes to no tool, however slow we are
    message = harness.host.put(script(shell(f"echo run >> {done}; sleep 1"), {"text": "Done."}))
    harness.host.wait_event("note")  # that it was started
    first = harness.claude_pid()
    harness.end(signal.SIGKILL)
    harness.start()
    wait_for(lambda: not psutil.pid_exists(first), "the end of the first Claude")
    api.work()
    harness.host.wait_acked(message)
    assert done.read_text() == "run\n" and transcript_of(harness).count('"type":"user","message"') >= 1
    assert len(list(harness.folder.glob("claude/projects/*/*.jsonl"))) == 1


def test_sigterm_in_a_turn_leaves_no_process(harness: Harness) -> None:
    message = harness.host.put(script(shell("sleep 300"), {"text": "Never."}))
    wait_for(lambda: processes_of(harness.folder, "sleep"), "the tool")
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


# ── a person at the keyboard ──


class Terminal:
    """A command at a terminal, and what has been written on it so far, without its colours and jumps."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self.written = b""
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execvpe(argv[0], argv, {**env, "TERM": "xterm-256color"})
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                read = os.read(self.file, 65536)
            except OSError:  # its other end is closed
                return
            self.written += read

    def shows(self, text: str) -> None:
        wait_for(lambda: text in self.words(), f"{text!r} on the terminal")

    def words(self) -> str:
        return re.sub(r"\s+", " ", re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b" ", self.written).decode(errors="replace"))

    def type(self, text: str) -> None:
        self.written = b""
        os.write(self.file, text.encode())
        self.shows(text.split()[-1])
        os.write(self.file, b"\r")

    def ended(self) -> bool:
        return os.waitpid(self.pid, os.WNOHANG)[0] != 0


def test_a_person_takes_the_session_over_at_a_terminal(folder: Path, api: Api) -> None:
    harness = Harness(folder, claude=str(CLAUDE))
    trusted = {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}
    asked_the_first_time = {"hasCompletedOnboarding": True, "theme": "dark", "bypassPermissionsModeAccepted": True}
    known = {"customApiKeyResponses": {"approved": ["dummy"]}, "projects": {str(harness.state): trusted}}
    (folder / "claude").mkdir()
    (folder / "claude/.claude.json").write_text(json.dumps(asked_the_first_time | known))
    with harness:
        host = harness.host
        host.wait_acked(host.put("the first word"))
        host.control("attach")
        host.wait(lambda: host.states[-1].get("attached"), "the loop to be held")
        terminal = Terminal([*HARNESS, "attach"], harness.env)
        try:
            terminal.shows("the first word")
            terminal.shows("bypass permissions on")
            terminal.type("typed by a person")
            wait_for(lambda: "typed by a person" in api.said() and "> the first word" in api.said(), "it to be heard")
            terminal.shows("There was no script.")
            waiting = host.put("after it")
            terminal.type("/exit")
            wait_for(terminal.ended, "the command to end")
        finally:
            os.close(terminal.file)
        host.control("detach")
        host.wait_acked(waiting)
        assert all(words in api.said() for words in ("> the first word", "typed by a person", "> after it"))
