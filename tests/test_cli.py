"""Command line: every verb, as a person and as a program calls it."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hive import HYPERHIVE, Hive, free_ports

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066\r\x00"  # titles, clears, colours, turns the line around
# For whom modes of files count, as they do not for root.
LESS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-sys_ptrace"] if os.geteuid() == 0 else []
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def words(hive: Hive, *args: str, **more: Any) -> str:
    """What a verb that must do it says."""
    ran = hive.cli(*args, **more)
    assert (ran.returncode, ran.stderr) == (0, ""), ran
    return ran.stdout


def data(hive: Hive, *args: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(words(hive, *args, "--json"))
    return answer


def refused(hive: Hive, *args: str, status: int = 1) -> str:
    """What a verb says that must be refused: on stderr, and without a traceback."""
    ran = hive.cli(*args)
    assert (ran.returncode, ran.stdout) == (status, ""), ran
    assert ran.stderr.startswith("hyperhive: ") and "Traceback" not in ran.stderr
    return ran.stderr


def answers(crew: Hive) -> Iterator[tuple[list[str], set[str], str]]:
    """Each verb that the daemon answers at once, with the keys for a program and some words for a person."""
    with crew.agent("manager") as manager:
        manager.ask("send", to="operator", body="a letter\nof two lines")
        manager.ask("ask", question="Which one?", options=["this", "that"])
        question = manager.ask("ask", question="Now?")["id"]
        shown, approved, denied = (
            str(manager.ask("request_spawn", name=name, description="helps us", config="{ }\n")["id"])
            for name in ("shown", "approved", "denied")
        )
    yield ["list"], {"agents", "containers"}, "alice"
    yield ["status"], {"agent_statuses", "approvals", "questions", "attention"}, "manager asks: Which one?"
    yield ["status", "alice"], {"agent"}, "stopped"
    yield ["pending"], {"approvals", "questions", "attention"}, "Which one?"
    yield ["show", shown], {"approval"}, "+{ }"
    yield ["approve", approved, "--note", "good"], set(), f"approved {approved}"
    yield ["deny", denied, "--note", "bad"], set(), f"denied {denied}"
    yield ["send", "alice", "hello"], {"id"}, "sent to alice"
    yield ["send", "*", "hello"], {"id", "ids"}, "sent to *"
    yield ["inbox", "--keep"], {"messages"}, "of two lines"
    yield ["inbox", "--unread"], {"messages"}, "a letter"
    yield ["pause", "bob"], set(), "paused bob"
    yield ["resume", "bob"], set(), "resumed bob"
    yield ["pause", "--all"], set(), "everyone"
    yield ["resume", "--all"], set(), "everyone"
    yield ["start", "alice", "bob"], set(), "started alice, bob"
    yield ["stop", "alice"], set(), "stopped alice"
    yield ["stop", "bob", "--now"], set(), "stopped bob"
    yield ["restart", "bob"], set(), "restarted bob"
    yield ["rebuild", "bob"], {"deploy"}, "rebuild of bob begins"
    yield ["logs", "bob"], {"lines", "cursor"}, "connected as bob"
    yield ["events"], {"events"}, "bob"
    yield ["events", "bob", "--lines", "1"], {"events"}, "bob"
    yield ["usage"], {"usage"}, ""
    yield ["url"], {"url"}, f"{crew.url}/#token={crew.token}"
    yield ["token"], {"token"}, crew.token
    yield ["answer", str(question), "yes"], set(), f"answered question {question}"


def test_each_verb_answers_people_and_programs(crew: Hive) -> None:
    once = {"answer"}  # a second time is refused
    seen = set()
    for args, keys, text in answers(crew):
        assert text in words(crew, *args), args
        if args[0] not in once and args[:2] != ["inbox", "--unread"]:
            assert data(crew, *args).keys() == keys, args
        seen.add(args[0])
    shown = subprocess.run([*HYPERHIVE, "--help"], check=True, capture_output=True, text=True, env={"COLUMNS": "200"})
    verbs = set(re.findall(r"^ {4}([a-z]+) ", shown.stdout, re.MULTILINE))
    elsewhere = {"serve", "demo", "spawn", "rollback", "destroy", "backup", "restore", "doctor"}
    assert seen | elsewhere >= verbs - {"attach", "deploys", "schedules"}


def test_empty_answers_are_words_too(hive: Hive) -> None:
    for verb, text in (
        ("list", "No agents"),
        ("pending", "No request"),
        ("inbox", "Nothing"),
        ("usage", "Nothing used"),
    ):
        assert text in words(hive, verb)
    hive.spawn("manager")
    assert "nothing waits for you" in words(hive, "status")


def test_status_counts_what_the_dashboard_counts(hive: Hive) -> None:
    assert "1 waits for you:\n  No manager yet" in words(hive, "status")
    hive.spawn("alice")
    with hive.agent("alice") as alice:
        soon = f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
        assert alice.ask("report", state={"state": "idle", "signed_in_until": soon})["ok"]
        alice.ask("ask", question="Now?")
        said = words(hive, "status")
    assert "3 wait for you:\n" in said and "alice's sign-in ends at" in said and "alice asks: Now?" in said
    shown = {row["key"] for row in hive.api("GET", "/api/state").body["attention"]}
    assert shown == {row["key"] for row in data(hive, "status")["attention"]}


def test_requests_and_questions_have_numbers_of_their_own(hive: Hive) -> None:
    hive.spawn("manager")
    with hive.agent("manager") as manager:
        asked = [manager.ask("request_spawn", name="alice", description="x"), manager.ask("ask", question="Now?")]
        said = words(hive, "pending")
    assert [answer["id"] for answer in asked] == [1, 1]
    assert re.search(r"^Requests \(.*approve ID.*\nrequest .*\n1  ", said, re.MULTILINE), said
    assert re.search(r"^Questions \(answer ID TEXT\):\nquestion .*\n1 ", said, re.MULTILINE), said


def test_what_is_refused_and_why(crew: Hive) -> None:
    for args, text in {
        ("status", "nobody"): "there is no agent 'nobody'",
        ("start", "nobody"): "`list` shows who is there",
        ("stop", "alice", "nobody"): "there is no agent 'nobody'",
        ("spawn", "alice"): "there is an agent 'alice' already",
        ("spawn", "Alice"): "lower-case letters",
        ("spawn", "tencharact"): "at most 9",
        ("rollback", "alice"): "no earlier config",
        ("show", "9999"): "no request 9999",
        ("approve", "9999"): "no request 9999",
        ("deny", "9999"): "no request 9999",
        ("answer", "9999", "yes"): "no question 9999",
        ("send", "nobody", "hello"): "there is no agent 'nobody'",
        ("send", "alice@home", "hello"): "no such hive: 'home'",
        ("send", "alice", ""): "empty",
        ("send", "alice", "x" * 65_537): "at most 65536",
        ("logs", "nobody"): "there is no agent 'nobody'",
        ("events", "nobody"): "there is no agent 'nobody'",
        ("logs", "../alice"): "lower-case letters",
        ("logs", "alice", "--lines", "0"): "from 1 to 1000",
        ("destroy", "manager", "--yes"): "the manager can't be destroyed",
        ("backup", "/nowhere/copy"): "can't write the backup",
    }.items():
        assert text in refused(crew, *args), args


def test_a_refusal_for_a_program(crew: Hive) -> None:
    ran = crew.cli("start", "nobody", "--json")
    assert (ran.returncode, ran.stdout) == (1, "")
    error = json.loads(ran.stderr)
    assert error == {
        "error": "there is no agent 'nobody'",
        "code": "unknown_agent",
        "hint": "`list` shows who is there",
    }
    assert refused(crew, "start", "nobody") == f"hyperhive: {error['error']}\n  {error['hint']}\n"


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["dance"],
        ["show"],
        ["show", "one"],
        ["send", "alice"],
        ["list", "--colour"],
        ["start"],
        ["logs", "alice", "bob"],
        ["list", "--dir", ""],  # of an unset variable: it must not mean the machine's own hive
        ["list", "--state-dir="],
        ["serve", "--containers", "magic"],
    ],
    ids=" ".join,
)
def test_usage_errors_are_told_apart(folder: Path, args: list[str]) -> None:
    ran = subprocess.run([*HYPERHIVE, "--dir", str(folder), *args], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 2 and ran.stdout == "" and "usage: hyperhive.py" in ran.stderr


def test_usage_errors_that_the_parser_does_not_see(crew: Hive, folder: Path) -> None:
    assert "name an agent, or say --all" in refused(crew, "pause", status=2)
    assert "name an agent, or say --all" in refused(crew, "resume", "bob", "--all", status=2)
    bad = folder / "bad.toml"
    for text, word in {
        "colour = 1": "colour",
        "port = '7000'": "port",
        "limits = 3": "limits",
        "[limits]\nunread = true": "unread",
        "=": "can't be read",
        "containers = 'magic'": "magic",
        "claude = ' '": "no command",
        "public_url = 'hive.example.org'": "no address",
        "public_url = 'https://example.org/hive'": "not below a path",
        'claude = "claude \'"': "no command",
    }.items():
        bad.write_text(text)
        assert word in refused(crew, "--config", str(bad), "list", status=2)
    assert "can't be read" in refused(crew, "--config", str(folder / "none.toml"), "list", status=2)


def test_text_that_is_no_utf_8(crew: Hive) -> None:
    base = [*HYPERHIVE, "--dir", str(crew.folder)]
    for args, stdin in (
        ([b"send", b"alice", b"\xff"], b""),
        ([b"send", b"alice", b"-"], b"\xff"),
        ([b"stop", b"\xff"], b""),
    ):
        ran = subprocess.run([*base, *args], input=stdin, capture_output=True, timeout=30)
        assert ran.returncode == 2 and b"no UTF-8" in ran.stderr and b"Traceback" not in ran.stderr


def test_no_daemon_is_said_with_what_to_do(folder: Path) -> None:
    ran = subprocess.run([*HYPERHIVE, "--dir", str(folder), "list"], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 1 and str(folder / "run/host.sock") in ran.stderr and "hyperhive.py serve" in ran.stderr


def test_a_line_that_is_too_long_is_refused_with_the_daemons_words(crew: Hive) -> None:
    ran = crew.cli("send", "alice", "-", stdin="x" * 8_000_000)
    assert ran.returncode == 1 and "a line may have at most 1048576 bytes" in ran.stderr, ran.stderr


@contextmanager
def instead_of_a_daemon(folder: Path, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    (folder / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "run/host.sock"))
        server.listen()
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        yield
        thread.join(30)
    (folder / "run/host.sock").unlink()


def test_a_daemon_that_goes_away_is_told_from_one_that_is_not_there(folder: Path) -> None:
    def hang_up(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(10)

    with instead_of_a_daemon(folder, hang_up):
        ran = subprocess.run([*HYPERHIVE, "--dir", str(folder), "list"], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 1 and "went away before it answered" in ran.stderr and "serve" not in ran.stderr


def test_doctor_waits_no_longer_than_that(folder: Path) -> None:
    """Other verbs wait for ever: a start or a stop of a container may take minutes."""

    def listen(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            while connection.recv(4096):
                pass

    with instead_of_a_daemon(folder, listen):
        command = [*HYPERHIVE, "--dir", str(folder), "doctor", "--json"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    findings = {row["check"]: row for row in json.loads(ran.stdout)["findings"]}
    assert "did not answer within" in findings["daemon"]["found"]


def test_text_from_standard_input(crew: Hive) -> None:
    sent = re.search(r"message (\d+)", words(crew, "send", "alice", "-", stdin="from\na pipe\n"))
    assert sent
    with crew.agent("alice") as alice:
        bodies = {row["id"]: row["body"] for row in alice.ask("inbox", max=100)["messages"]}
    assert bodies[int(sent[1])] == "from\na pipe\n"


def test_list_needs_neither_bottle_nor_waitress(crew: Hive) -> None:
    program, script = HYPERHIVE
    for verb in ("list", "status", "pending", "inbox"):
        command = [program, "-X", "importtime", script, "--dir", str(crew.folder), verb]
        ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
        imported = set(re.findall(r"\| +([\w.]+)$", ran.stderr, re.MULTILINE))
        assert {"json", "socket"} <= imported and not {"bottle", "waitress"} & imported


def test_no_text_of_an_agent_drives_the_terminal(hive: Hive) -> None:
    hive.spawn("manager")
    with hive.agent("manager") as manager:
        manager.ask("hello", harness_version="0", last_event=0, model=f"m{EVIL}")
        manager.ask("set_status", text=EVIL)
        manager.ask("send", to="operator", body=f"{EVIL}\n{EVIL}")
        manager.ask("ask", question=EVIL, options=[EVIL])
        manager.ask("request_spawn", name="alice", description=EVIL, config=f"# {EVIL}\n{{ }}\n")
        schedule = {"to": "manager", "body": EVIL, "first": "2030-01-31T08:00:00Z", "description": EVIL}
        manager.ask("request_schedule", **schedule)
        event = {"id": 10**6, "at": "2030-01-31T08:00:00Z", "turn": 1, "kind": EVIL, "data": {EVIL: EVIL}}
        assert manager.ask("report", events=[event], state={"state": "failed", "reason": EVIL, "model": EVIL})["ok"]
        with (hive.state / "logs/manager.log").open("a") as log:
            log.write(f"{EVIL}\n")
        lines = ["list", "status", "status manager", "pending", "show 1", "show 2", "inbox", "events", "logs manager"]
        for args in lines:
            for more in ([], ["--json"]):
                shown = words(hive, *args.split(), *more)
                assert not CONTROL.search(shown.replace("\n", "")), (args, more, shown)
        assert r"\x1b" in words(hive, "inbox") and r"\u202e" in words(hive, "inbox")
    ran = hive.cli("send", "nobody\x1b[2J", "x")
    assert ran.returncode == 1 and not CONTROL.search(ran.stderr.replace("\n", ""))


def test_a_terminal_that_knows_fewer_characters(crew: Hive, monkeypatch: pytest.MonkeyPatch) -> None:
    crew.ask(cmd="send", to="operator", body="schön →")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert r"sch\xf6n" in words(crew, "inbox", "--keep")


def test_a_deploy_is_waited_for(hive: Hive) -> None:
    ran = hive.cli("spawn", "alice", "--description", "helps", "--wait")
    assert ran.returncode == 0 and "spawn of alice begins" in ran.stdout
    assert "building" in ran.stderr and "said hello" in ran.stderr
    assert data(hive, "status", "alice")["agent"]["description"] == "helps"
    assert words(hive, "stop", "alice") == "stopped alice\n"  # also right after the deploy
    hive.stop()
    hive.configure(claude="/nowhere/claude", hello_s=0.2)
    hive.start()
    ran = hive.cli("rebuild", "alice", "--wait")
    assert ran.returncode in (0, 1) and "Traceback" not in ran.stderr
    if ran.returncode:
        assert "the deploy failed" in ran.stderr


def test_destroy_asks_for_the_name(hive: Hive) -> None:
    hive.spawn("alice")
    for typed in ("", "yes\n", "ALICE\n", "bob\n"):
        ran = hive.cli("destroy", "alice", stdin=typed)
        assert ran.returncode == 2 and ran.stdout == ""
        assert "Type its name" in ran.stderr and "hyperhive: " in ran.stderr
    assert words(hive, "list").count("alice") == 1
    ran = hive.cli("destroy", "alice", "--json", stdin="alice\n")
    assert ran.returncode == 0 and json.loads(ran.stdout) == {} and "Type its name" in ran.stderr
    assert data(hive, "status", "alice")["agent"]["kept"]
    assert (hive.state / "agents/alice/state").is_dir()
    hive.cli("spawn", "alice", "--wait")
    assert words(hive, "destroy", "alice", "--purge", "--yes") == "destroyed alice\n"
    assert not (hive.state / "agents/alice").exists()
    refused(hive, "status", "alice")


def test_a_new_token(hive: Hive) -> None:
    old = words(hive, "token").strip()
    new = words(hive, "token", "--rotate").strip()
    assert old != new == hive.token == words(hive, "token").strip()
    assert words(hive, "url").strip() == f"{hive.url}/#token={new}"
    assert hive.api("GET", "/api/state", token=old).status == 401


def test_backup_and_restore(hive: Hive, monkeypatch: pytest.MonkeyPatch) -> None:
    hive.spawn("alice")
    copy = hive.folder / "copy.sqlite"
    hive.ask(cmd="send", to="alice", body="before")
    monkeypatch.chdir(hive.folder)
    assert words(hive, "backup", "copy.sqlite") == f"wrote {copy}\n"
    assert copy.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(copy)) as database:
        assert database.execute("SELECT body FROM messages").fetchall() == [("before",)]
    assert "can't write the backup" in refused(hive, "backup", str(copy))
    hive.ask(cmd="send", to="alice", body="after")
    assert "serves" in refused(hive, "restore", str(copy))
    hive.stop()
    assert "no file" in refused(hive, "restore", "nothing.sqlite")
    (hive.folder / "junk").write_text("junk" * 1000)
    assert "junk can't be restored" in refused(hive, "restore", "junk")
    before = Path(data(hive, "restore", "copy.sqlite")["before"])
    with closing(sqlite3.connect(before)) as database:
        assert database.execute("SELECT body FROM messages ORDER BY id").fetchall() == [("before",), ("after",)]
    hive.start()
    with hive.agent("alice") as alice:
        assert [row["body"] for row in alice.ask("inbox")["messages"]] == ["before"]
    (name,) = words(hive, "list").splitlines()[1:]
    assert name.startswith("alice")


def test_restore_takes_what_a_killed_daemon_had_not_moved_into_the_file(hive: Hive, folder: Path) -> None:
    hive.spawn("alice")
    words(hive, "backup", str(folder / "copy.sqlite"))
    sent = [hive.ask(cmd="send", to="alice", body=f"letter {number}")["id"] for number in range(10)]
    hive.kill()
    before = data(hive, "restore", str(folder / "copy.sqlite"))["before"]
    with closing(sqlite3.connect(hive.state / "hive.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM messages").fetchone() == (0,)
    words(hive, "restore", before)
    with closing(sqlite3.connect(hive.state / "hive.sqlite")) as database:
        assert [row[0] for row in database.execute("SELECT id FROM messages ORDER BY id")] == sent
    assert (hive.state / "hive.sqlite").stat().st_mode & 0o777 == 0o600


def test_restore_from_where_no_file_can_be_made(hive: Hive, folder: Path) -> None:
    hive.spawn("alice").stop()
    (folder / "snapshot").mkdir()
    shutil.copy(hive.state / "hive.sqlite", folder / "snapshot")
    (folder / "snapshot").chmod(0o555)
    command = [*LESS, *HYPERHIVE, "--dir", hive.folder, "restore", folder / "snapshot/hive.sqlite"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    (folder / "snapshot").chmod(0o755)
    assert ran.returncode == 0, ran
    with closing(sqlite3.connect(hive.state / "hive.sqlite")) as database:
        assert database.execute("SELECT name FROM agents").fetchall() == [("alice",)]


def test_a_public_address_is_that_of_all_links(folder: Path) -> None:
    with Hive(folder, public_url="https://hive.example.org") as hive:
        assert words(hive, "url") == f"https://hive.example.org/#token={hive.token}\n"
        hive.spawn("alice")
        page = data(hive, "status", "alice")["agent"]["url"]
        assert re.fullmatch(r"https://hive\.example\.org:[0-9]+/#token=\S+", page)
        assert hive.api("GET", "/api/state", headers={"Host": "hive.example.org"}).status == 200
        assert hive.ask(cmd="urls")["urls"] == {"domain": "hive.example.org", "home": "https://hive.example.org/"}


def test_doctor(hive: Hive, folder: Path) -> None:
    ran = hive.cli("doctor", "--config", str(hive.config))
    found = {line[5:].partition(":")[0]: line[:4].strip() for line in ran.stdout.splitlines() if line[0] != " "}
    assert found.items() >= {"Python": "ok", "bottle": "ok", "git": "ok", "Claude Code": "ok", "daemon": "ok"}.items()
    (hive.state / "operator.token").chmod(0o644)
    ran = hive.cli("doctor")
    assert ran.returncode == 1 and "FIX  token file: mode 644" in ran.stdout and "chmod 600" in ran.stdout
    with socket.create_server(("127.0.0.1", free_ports())) as taken:
        port = taken.getsockname()[1]
        settings = folder / "other.toml"
        settings.write_text(f"port = {port}\ncontainers = 'process'\nclaude = '/nowhere/claude'\n")
        command = [*HYPERHIVE, "--dir", str(folder / "other"), "--config", str(settings), "doctor", "--json"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 1
    findings = {row["check"]: row for row in json.loads(ran.stdout)["findings"]}
    assert [findings[check]["ok"] for check in ("Claude Code", "daemon", "port")] == [False] * 3
    assert f"taken by pid {os.getpid()}" in findings["port"]["found"]
    assert all(row["ok"] or row["fix"] for row in findings.values())
    assert not (folder / "other").exists()  # it looks and touches nothing


def findings_of(*command: Any, **environment: str) -> dict[str, Any]:
    ran = subprocess.run(
        [*command, "doctor", "--json"], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    return {row["check"]: row for row in json.loads(ran.stdout)["findings"]}


def test_doctor_for_who_may_not_look_everywhere(folder: Path) -> None:
    """As a member of hive-admin: the state folder is closed, and who holds a port can't be seen."""
    (folder / "state").mkdir()
    (folder / "state/operator.token").touch()
    (folder / "state").chmod(0)
    with socket.create_server(("127.0.0.1", free_ports())) as taken:
        port = taken.getsockname()[1]
        (folder / "config.toml").write_text(f"port = {port}\ncontainers = 'process'\n")
        found = findings_of(*LESS, *HYPERHIVE, "--dir", folder, "--config", folder / "config.toml")
    (folder / "state").chmod(0o700)
    assert found["token file"] == {"check": "token file", "ok": True, "found": "kept from you by its folder"}
    assert not found["port"]["ok"] and f"{port} is taken" in found["port"]["found"]
    assert found["clock"]["found"].startswith("20")


def test_doctor_survives_a_check_that_can_not_be_made(folder: Path) -> None:
    (folder / "nix").write_text("#!/bin/sh\nkill -9 $$\n")
    (folder / "nix").chmod(0o755)
    found = findings_of(*HYPERHIVE, "--dir", folder / "other", PATH=f"{folder}:{os.environ['PATH']}")
    assert "status -9" in found["flakes"]["found"] and found["flakes"]["fix"] and found["disk"]["ok"]


def test_doctor_names_who_sits_on_an_agents_port(hive: Hive) -> None:
    hive.spawn("alice")
    port = int(re.findall(r":(\d+)/", data(hive, "status", "alice")["agent"]["url"])[0])
    found = findings_of(*HYPERHIVE, "--dir", hive.folder)
    assert found["agents' ports"]["ok"] and found["Claude Code"]["found"] == "played by a rehearsal"
    with socket.create_server(("127.0.0.1", port)):
        found = findings_of(*HYPERHIVE, "--dir", hive.folder)["agents' ports"]
    assert not found["ok"] and f"{port} of alice is taken by pid {os.getpid()}" in found["found"]


@contextmanager
def following(hive: Hive, *args: str) -> Iterator[subprocess.Popen[str]]:
    command = [*HYPERHIVE, "--dir", str(hive.folder), *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=15)
            assert process.returncode == 130 and err == ""
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    seen = ""
    assert process.stdout
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise EOFError(f"it ended without {text!r}:\n{seen}")


def test_logs_are_followed_until_ctrl_c(hive: Hive) -> None:
    hive.spawn("alice", running=True)
    with following(hive, "logs", "alice", "-f") as process:
        read_until(process, "connected as alice")
        hive.ask(cmd="restart", name="alice")
        assert read_until(process, "connected as alice").count("connected as alice") == 1  # nothing twice


def test_events_are_followed_until_ctrl_c(hive: Hive) -> None:
    hive.spawn("alice", running=True)
    with following(hive, "events", "-f") as everything, following(hive, "events", "alice", "--json", "-f") as program:
        for number in range(3):
            hive.ask(cmd="send", to="alice", body=f'rehearse: [{{"text": "thought {number}"}}]')
            read_until(everything, f"thought {number}")
            read_until(program, f"thought {number}")
            time.sleep(0.1)


def test_a_reader_that_has_enough_is_no_error(crew: Hive) -> None:
    command = [*HYPERHIVE, "--dir", str(crew.folder), "url"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait(timeout=30) in (0, 1)


def test_where_the_hive_is_can_be_said_in_the_environment(crew: Hive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERHIVE_STATE_DIR", str(crew.state))
    monkeypatch.setenv("HYPERHIVE_RUNTIME_DIR", str(crew.run))
    ran = subprocess.run([*HYPERHIVE, "list", "--json"], check=True, capture_output=True, text=True, timeout=30)
    assert {"manager", "alice", "bob"} <= {row["name"] for row in json.loads(ran.stdout)["agents"]}


@pytest.mark.parametrize("verb", ["serve", "demo"])
def test_without_its_packages_nothing_is_made(folder: Path, verb: str) -> None:
    command = [HYPERHIVE[0], "-S", *HYPERHIVE[1:], "--dir", str(folder / "hive"), "--config", "/dev/null", verb]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 1 and "no bottle and no waitress" in ran.stderr and "pip install" in ran.stderr
    assert not (folder / "hive").exists()


def test_serve_says_what_is_missing(folder: Path) -> None:
    command = [*HYPERHIVE, "serve", "--dir", str(folder), "--port", str(free_ports())]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if ran.returncode != 2:
        pytest.fail(f"it neither served nor said how agents should run: {ran}")
    assert "--containers process" in ran.stderr


def test_ports_and_addresses_that_can_not_be(folder: Path) -> None:
    base = [*HYPERHIVE, "serve", "--dir", str(folder), "--containers", "process"]
    for more in (["--port", "99999"], ["--port", "-1"], ["--port", "1", "--listen", "nowhere.invalid"]):
        ran = subprocess.run([*base, *more], capture_output=True, text=True, timeout=30)
        assert ran.returncode == 2 and "Traceback" not in ran.stderr, ran.stderr
