"""Approvals: nothing that is asked for happens until the operator says so, and then it happens once."""

import base64
import hashlib
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from hive import ROOT, Hive, Line, originals, wait_for

CONFIG = "{ pkgs, ... }:\n{\n  environment.systemPackages = [ pkgs.hello ];\n}\n"
MIB = 1024 * 1024


def show(hive: Hive, approval: int) -> dict[str, Any]:
    return dict(hive.ask(cmd="show", id=approval)["approval"])


def is_over(hive: Hive, approval: int) -> bool:
    row = show(hive, approval)
    return row["status"] == "failed" or row.get("phase") in ("deployed", "failed")


def approve(hive: Hive, approval: int, **fields: Any) -> dict[str, Any]:
    """Approve, and wait for the end of the deploy; the request then."""
    answer = hive.ask(cmd="approve", id=approval, **fields)
    assert answer["ok"], answer
    wait_for(lambda: is_over(hive, approval), f"the deploy of request {approval}", timeout_s=60)
    return show(hive, approval)


def ask(hive: Hive, verb: str, **fields: Any) -> dict[str, Any]:
    """A request of the manager."""
    with hive.agent("manager") as manager:
        return manager.ask(verb, **fields)


def ask_spawn(hive: Hive, name: str = "carol", **fields: Any) -> int:
    answer = ask(hive, "request_spawn", **{"name": name, "description": "helps out"} | fields)
    assert answer["ok"], answer
    return int(answer["id"])


def mail(line: Line) -> list[dict[str, Any]]:
    """The system messages that wait, taken and done; the newest last."""
    messages = line.ask("lease", max=100, wait_s=0)["messages"]
    line.ask("ack", ids=[row["id"] for row in messages])
    return [{"kind": row["kind"], **row["data"]} for row in messages if "data" in row]


def deploys(hive: Hive, name: str) -> list[dict[str, Any]]:
    return list(hive.ask(cmd="deploys", name=name)["deploys"])


def agents(hive: Hive) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in hive.ask(cmd="agents", kept=True)["agents"]}


def audit(hive: Hive) -> list[tuple[str, str, str]]:
    rows = hive.api("GET", "/api/audit?max=1000").body["audit"]
    return sorted((row["what"], row["subject"], row["who"].split()[0]) for row in rows)


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work` returns in so many threads that begin together."""
    begin, results = threading.Barrier(count), list[Any]()

    def run(number: int) -> None:
        begin.wait()
        results.append(work(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Source:
    """A repository like the manager's checkout, made by plumbing so that it can be as wrong as it likes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "init", "-q", "-b", "main", folder], check=True)

    def git(self, *arguments: str, stdin: bytes = b"") -> str:
        names = {f"GIT_{who}_{what}": "me" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        command, env = ["git", *arguments], {**os.environ, **names}
        done = subprocess.run(command, cwd=self.folder, input=stdin, env=env, capture_output=True, check=True)
        return done.stdout.decode().strip()

    def blob(self, content: bytes = b"{ }\n") -> str:
        return self.git("hash-object", "-w", "--stdin", stdin=content)

    def tree(self, *entries: str) -> str:
        """Of lines as `ls-tree` prints them."""
        return self.git("mktree", "--missing", stdin="".join(f"{entry}\n" for entry in entries).encode())

    def tree_of(self, files: dict[str, bytes]) -> str:
        here = {path: content for path, content in files.items() if "/" not in path}
        folders = sorted({path.partition("/")[0] for path in files.keys() - here})
        entries = [f"100644 blob {self.blob(content)}\t{path}" for path, content in here.items()]
        for folder in folders:
            inner = {path.partition("/")[2]: text for path, text in files.items() if path.startswith(f"{folder}/")}
            entries.append(f"040000 tree {self.tree_of(inner)}\t{folder}")
        return self.tree(*entries)

    def commit(self, tree: str, *parents: str) -> str:
        return self.git("commit-tree", tree, *(f"-p{parent}" for parent in parents), "-m", "a change")

    def running(self, hive: Hive, name: str = "alice") -> str:
        """What an agent runs, fetched: the commit that a proposal is built on."""
        self.git("fetch", "-q", str(repository(hive, name)), "main")
        return self.git("rev-parse", "FETCH_HEAD")

    def bundle(self, sha: str, *without: str) -> str:
        self.git("update-ref", "refs/heads/main", sha)
        self.git("bundle", "create", "-q", "it", "refs/heads/main", *(f"^{parent}" for parent in without))
        return base64.b64encode((self.folder / "it").read_bytes()).decode()


def propose(hive: Hive, source: Source, commit: str, **fields: Any) -> dict[str, Any]:
    request = {"agent": "alice", "sha": commit, "description": "better", "bundle": source.bundle(commit)}
    return ask(hive, "request_apply_commit", **request | fields)


def proposed(hive: Hive, source: Source, files: dict[str, bytes], *parents: str) -> tuple[int, str]:
    sha = source.commit(source.tree_of(files), *(parents or [source.running(hive)]))
    answer = propose(hive, source, sha)
    assert answer["ok"], answer
    return answer["id"], sha


def repository(hive: Hive, name: str = "alice") -> Path:
    return hive.state / "applied" / name


def ref(hive: Hive, ref_name: str, name: str = "alice") -> str:
    command = ["git", "-C", repository(hive, name), "rev-parse", "--verify", "-q", ref_name]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def content(hive: Hive, sha: str, path: str = "agent.nix", name: str = "alice") -> bytes:
    command = ["git", "-C", repository(hive, name), "cat-file", "blob", f"{sha}:{path}"]
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.fixture
def source(folder: Path) -> Source:
    return Source(folder / "source")


@pytest.fixture
def team(hive: Hive) -> Hive:
    """A hive of one's own, with manager and alice."""
    return hive.spawn("manager", "alice")


# ── deciding ──


def test_a_spawn_from_the_request_to_the_running_agent(team: Hive) -> None:
    approval = ask_spawn(team, config=CONFIG)
    asked = show(team, approval)
    assert (asked["kind"], asked["agent"], asked["status"]) == ("spawn", "carol", "pending")
    assert (asked["requested_by"], asked["description"]) == ("manager", "helps out")
    assert [line[1:] for line in asked["diff"].splitlines()[5:]] == CONFIG.splitlines()
    assert asked["files"] == [{"path": "agent.nix", "added": 4, "removed": 0}]
    assert "carol" not in agents(team) and not (team.state / "agents/carol").exists()
    done = approve(team, approval, note="welcome")
    assert (done["status"], done["phase"], done["note"], done["resolved_by"]) == (
        "approved", "deployed", "welcome", "operator",
    )  # fmt: skip
    carol = agents(team)["carol"]
    assert carol["running"] and (carol["parent"], carol["description"]) == ("manager", "helps out")
    assert content(team, "refs/heads/main", name="carol").decode() == CONFIG
    with team.agent("manager") as manager:
        resolved, deployed = mail(manager)
    assert resolved == {
        "kind": "spawn", "approval": approval, "agent": "carol", "status": "approved", "note": "welcome",
    }  # fmt: skip
    assert deployed == {"kind": "deployed", "agent": "carol", "sha": ref(team, "main", "carol"), "approval": approval}
    subject = f"approval {approval}"
    steps = [("request_spawn", "carol", "manager"), ("approved", subject, "operator"), ("deployed", "carol", "system")]
    assert all(audit(team).count(step) == 1 for step in steps)


def test_a_denial_and_its_note_reach_who_asked(crew: Hive) -> None:
    approval = ask_spawn(crew, "denied")
    with crew.agent("manager") as manager:
        mail(manager)
        assert crew.ask(cmd="deny", id=approval, note="not now")["ok"]
        (news,) = mail(manager)
    assert (news["approval"], news["status"], news["note"]) == (approval, "denied", "not now")
    assert crew.ask(cmd="deny", id=approval)["ok"]  # it is
    assert crew.ask(cmd="approve", id=approval)["code"] == "conflict"
    assert show(crew, approval)["note"] == "not now" and "denied" not in agents(crew)


def test_what_is_approved_can_not_be_denied(team: Hive) -> None:
    approval = ask_spawn(team)
    assert team.ask(cmd="approve", id=approval)["ok"]
    refused = team.ask(cmd="deny", id=approval)
    assert refused["code"] == "conflict" and "approved already by operator" in refused["error"]
    assert approve(team, approval)["phase"] == "deployed"


def test_only_who_asked_cancels(crew: Hive) -> None:
    theirs = crew.ask(cmd="request_spawn", name="theirs")["id"]
    mine = ask_spawn(crew, "mine")
    assert ask(crew, "cancel_request", id=theirs)["code"] == "forbidden"
    assert ask(crew, "cancel_request", id=mine)["ok"]
    assert [show(crew, number)["status"] for number in (theirs, mine)] == ["pending", "cancelled"]
    assert ask(crew, "cancel_request", id=mine)["code"] == "conflict"
    assert crew.ask(cmd="approve", id=mine)["code"] == "conflict"
    assert ask(crew, "cancel_request", id=10**6)["code"] == "not_found"


def test_the_same_request_is_one_as_long_as_it_waits(crew: Hive) -> None:
    first = ask_spawn(crew, "twice", description="please")
    assert at_once(10, lambda _: ask_spawn(crew, "twice", description="pretty please")) == [first] * 10
    other = ask(crew, "request_spawn", name="twice", description="another", config=CONFIG)
    assert other["code"] == "conflict" and f"request {first}" in other["error"]
    crew.ask(cmd="deny", id=first)
    assert ask_spawn(crew, "twice") != first


def test_approving_from_everywhere_at_once_is_one_deploy(team: Hive) -> None:
    approval = ask_spawn(team)

    def one(number: int) -> bool:
        if number % 2:
            return bool(team.ask(cmd="approve", id=approval)["ok"])
        return team.api("POST", f"/api/approvals/{approval}/approve", {}).status == 200

    assert at_once(20, one) == [True] * 20
    assert approve(team, approval)["phase"] == "deployed"
    assert [row["approval_id"] for row in deploys(team, "carol")] == [approval]
    assert Counter(what for what, subject, _ in audit(team) if subject == f"approval {approval}") == {"approved": 1}


def test_approving_and_denying_at_once_has_one_outcome(team: Hive) -> None:
    approval = ask_spawn(team)
    at_once(20, lambda number: team.ask(cmd=("approve", "deny")[number % 2], id=approval))
    decisions = [what for what, subject, _ in audit(team) if subject == f"approval {approval}"]
    assert decisions == [show(team, approval)["status"]]
    wait_for(lambda: decisions == ["denied"] or is_over(team, approval), "its deploy")
    assert len(deploys(team, "carol")) == (decisions == ["approved"])


def test_what_was_not_shown_is_not_approved(crew: Hive, source: Source) -> None:
    approval, _ = proposed(crew, source, {"agent.nix": b"# shown\n"})
    for seen in ({"sha": "0" * 40}, {"digest": "0" * 16}):
        assert crew.api("POST", f"/api/approvals/{approval}/approve", seen).body["code"] == "stale"
    assert show(crew, approval)["status"] == "pending"
    crew.ask(cmd="deny", id=approval)


def test_no_more_than_twenty_wait(team: Hive) -> None:
    first, *_ = [ask_spawn(team, f"n{number}") for number in range(20)]
    refused = ask(team, "request_spawn", name="n20", description="one more")
    assert refused["code"] == "too_many" and "20" in refused["error"]
    assert ask_spawn(team, "n0") == first  # it waits already
    assert team.ask(cmd="deny", id=first)["ok"]
    ask_spawn(team, "n20")


def test_who_asks_and_cancels_for_ever_has_an_end(folder: Path) -> None:
    with Hive(folder, limits={"requests_per_day": 3}) as hive:
        hive.spawn("manager")
        for number in range(3):
            assert ask(hive, "cancel_request", id=ask_spawn(hive, f"n{number}"))["ok"]
        refused = ask(hive, "request_spawn", name="n3", description="one more")
        assert refused["code"] == "too_many" and "in a day" in refused["error"]
        assert hive.ask(cmd="request_spawn", name="n3")["ok"]  # the operator's own


def test_requests_for_an_agent_whose_folder_is_gone_fail(team: Hive) -> None:
    when = "2040-01-31T08:00:00Z"
    seen = ask(team, "request_schedule", to="alice", body="wake up", first=when)["id"]
    shutil.rmtree(team.state / "agents/alice")
    assert team.ask(cmd="pending")["approvals"] == []
    unseen = ask(team, "request_schedule", to="alice", body="and work", first=when)["id"]
    team.stop()
    team.start()
    for approval in (seen, unseen):
        row = show(team, approval)  # it stays on record
        assert (row["status"], row["note"], row["resolved_by"]) == ("failed", "agent state dir missing", "system")
        assert team.ask(cmd="approve", id=approval)["code"] == "conflict"
    with team.agent("manager") as manager:
        assert [(news["approval"], news["status"]) for news in mail(manager)] == [(seen, "failed"), (unseen, "failed")]


def test_an_approval_can_be_undone_until_its_deploy_begins(folder: Path) -> None:
    with Hive(folder, undo_s=60) as hive:
        hive.spawn("manager")
        approval, path = ask_spawn(hive), "/api/approvals/1"
        assert approval == 1
        waiting = hive.api("POST", f"{path}/approve", {"undo": True}).body["approval"]
        assert (waiting["status"], waiting["phase"]) == ("approved", "queued") and waiting["undo_until"]
        with hive.agent("manager") as manager:
            assert mail(manager) == []  # not yet
        assert hive.api("POST", f"{path}/undo", {}).status == 200
        assert show(hive, approval)["status"] == "pending" and "carol" not in agents(hive)
        assert hive.api("POST", f"{path}/undo", {}).status == 409
        assert approve(hive, approval)["phase"] == "deployed"
        assert hive.api("POST", f"{path}/undo", {}).status == 409


def test_an_undo_takes_back_the_deploys_of_all_agents(folder: Path) -> None:
    with Hive(folder, undo_s=60) as hive:
        hive.spawn("alice", "bob", "carol")
        hive.stop()
        with closing(sqlite3.connect(hive.state / "hive.sqlite")) as database, database:  # what only containers can ask
            database.execute(
                "INSERT INTO approvals (kind, agent, requested_by, requested_at, fingerprint)"
                " VALUES ('update_inputs', '*', 'manager', 0, 'newer')"
            )
        hive.start()
        before = hive.ask(cmd="deploys")["deploys"]
        assert hive.api("POST", "/api/approvals/1/approve", {"undo": True}).status == 200
        assert len(hive.ask(cmd="deploys")["deploys"]) == len(before) + 3
        assert hive.api("POST", "/api/approvals/1/undo", {}).status == 200
        assert hive.ask(cmd="deploys")["deploys"] == before and show(hive, 1)["status"] == "pending"


def test_who_asks_again_does_not_hinder_an_undo(folder: Path, source: Source) -> None:
    with Hive(folder, undo_s=60) as hive:
        approval, sha = proposed(hive.spawn("manager", "alice"), source, {"agent.nix": b"# new\n"})
        assert hive.api("POST", f"/api/approvals/{approval}/approve", {"undo": True}).status == 200
        assert propose(hive, source, sha)["id"] == approval
        assert hive.api("POST", f"/api/approvals/{approval}/undo", {}).status == 200
        assert [row["id"] for row in hive.ask(cmd="pending")["approvals"]] == [approval]


# ── schedules ──


def test_a_schedule_begins_when_it_is_approved(crew: Hive) -> None:
    request = {"to": "alice", "body": "stand up", "first": "2020-01-31T08:00:00Z", "every_s": 86_400}
    approval = ask(crew, "request_schedule", **request, description="every morning")["id"]
    row = show(crew, approval)
    assert row["kind"] == "schedule_prompt" and row["schedule"] == request | {"first": "2020-01-31T08:00:00.000Z"}
    assert ask(crew, "request_schedule", **request)["id"] == approval
    before = crew.ask(cmd="schedules")["schedules"]
    with crew.agent("alice") as alice:
        mail(alice)
        assert crew.ask(cmd="approve", id=approval)["ok"]
        (message,) = alice.ask("lease", wait_s=10)["messages"]
        alice.ask("ack", ids=[message["id"]])
    assert (message["kind"], message["body"], message["from"]) == ("schedule", "stand up", "system")
    (schedule,) = (row for row in crew.ask(cmd="schedules")["schedules"] if row not in before)
    assert schedule["every_s"] == 86_400
    assert crew.ask(cmd="approve", id=approval)["ok"] and len(crew.ask(cmd="schedules")["schedules"]) == len(before) + 1


@pytest.mark.parametrize(
    ("fields", "code"),
    [({"to": "nobody"}, "unknown_agent"), ({"to": "operator"}, "bad_request"), ({"every_s": 59}, "bad_request")],
)
def test_schedules_that_can_not_be_asked_for(crew: Hive, fields: dict[str, Any], code: str) -> None:
    request = {"to": "alice", "body": "x", "first": "2040-01-31T08:00:00Z"}
    assert ask(crew, "request_schedule", **request | fields)["code"] == code


# ── spawns that come back or fail ──


def test_a_destroyed_agent_comes_back_with_its_config(team: Hive) -> None:
    approve(team, ask_spawn(team, config=CONFIG))
    first = ref(team, "main", "carol")
    team.ask(cmd="destroy", name="carol")
    again = ask_spawn(team)
    assert show(team, again)["diff"] == ""
    assert approve(team, again)["phase"] == "deployed"
    assert ref(team, "main", "carol") == first
    team.ask(cmd="destroy", name="carol")
    changed = ask_spawn(team, config=CONFIG.replace("hello", "cowsay"))
    assert show(team, changed)["files"] == [{"path": "agent.nix", "added": 1, "removed": 1}]
    assert approve(team, changed)["phase"] == "deployed"
    assert b"cowsay" in content(team, "main", name="carol") and ref(team, "main~1", "carol") == first


def test_a_harness_that_does_not_start_leaves_nothing_of_its_agent(team: Hive, monkeypatch: pytest.MonkeyPatch) -> None:
    approval = ask_spawn(team)
    team.stop()
    monkeypatch.setenv("HYPERHIVE_BACKOFF_S", "soon")  # no number: the harness ends at once
    team.start()
    failed = approve(team, approval)
    assert (failed["status"], failed["phase"]) == ("failed", "failed")
    assert "hello" in failed["error"] and "'soon'" in failed["error"]  # the end of the harness's log
    assert "carol" not in agents(team)
    assert not any((team.state / where / "carol").exists() for where in ("agents", "applied"))
    assert not (team.run / "agents/carol").exists() and not (team.state / "logs/carol.log").exists()
    with team.agent("manager") as manager:
        assert [news["status"] for news in mail(manager)] == ["approved", "failed"]
        assert manager.ask("send", to="carol", body="hello?")["code"] == "unknown_agent"
    team.stop()
    monkeypatch.delenv("HYPERHIVE_BACKOFF_S")
    team.start()
    assert approve(team, ask_spawn(team))["phase"] == "deployed"


# ── proposed commits ──


def test_a_commit_is_shown_and_then_deployed(team: Hive, source: Source) -> None:
    base = ref(team, "main")
    files = {"agent.nix": CONFIG.encode(), "notes/more.nix": b"{ }\n"}
    approval, sha = proposed(team, source, files)
    row = show(team, approval)
    assert (row["kind"], row["fetched_sha"], row["base_sha"]) == ("apply_commit", sha, base)
    assert ref(team, row["commit_ref"]) == sha and ref(team, "main") == base
    assert [file["path"] for file in row["files"]] == ["agent.nix", "notes/more.nix"]
    assert "+  environment.systemPackages = [ pkgs.hello ];" in row["diff"].splitlines()
    done = approve(team, approval)
    assert done["phase"] == "deployed" and agents(team)["alice"]["running"]
    assert ref(team, "main") == ref(team, f"deployed/{done['deploy_id']}") == sha
    assert agents(team)["alice"]["deployed_sha"] == sha[:12]
    with team.agent("manager") as manager:
        resolved, deployed = mail(manager)
    assert (resolved["status"], resolved["sha"]) == ("approved", sha)
    assert deployed == {"kind": "deployed", "agent": "alice", "sha": sha, "approval": approval}


LAYERED = b"""{ pkgs, ... }:
let tools = [ ]; in {
  # a start
  environment.systemPackages = with pkgs; [
    git
  ] ++ tools;

  services = {

    nginx = {
      enable = false;
    };
  };
  i18n.glyphs = "''";
  services.hyperhive.harness.extraPrompt = ''
    Be kind.
  '';

  fonts.fontconfig = {

    subpixel.rgba = "none"; # an end
  };
}
"""
SHELL, SERVICES, USERS = "programs that its shell finds", "services that run in its container", "users and their rights"
REACHES: list[tuple[bytes, bytes, list[str]]] = [
    (b"    git\n", b"    git\n    jq\n", [SHELL]),
    (b"    git\n", b"", [SHELL]),
    (b" ++ tools", b"\n++ [ pkgs.jq ]", [SHELL]),  # in the diff as "+++ [ pkgs.jq ]"
    (b"enable = false", b"enable = true", [SERVICES]),
    (b"Be kind.", b"Be quick.", ["how its Claude is run or prompted"]),
    (b'"none"', b'"rgb"', []),
    (b"# a start", b"# users", []),
    (b"# a start", b"# a start\r  users.mutableUsers = true;", [USERS]),  # a comment ends there
    (b"# an end", b"# \0\n    users.groups.x = { };", [USERS]),  # a NUL hides nothing
    (b"{ pkgs", b"# " + b"x" * (MIB - len(LAYERED) - 3) + b"\n{ pkgs", ["more than was looked through"]),
]


def test_a_change_that_reaches_into_too_much_says_so(crew: Hive, source: Source) -> None:
    """Each short line of it lies in a long attribute of its own."""
    deep = "".join(f"{'x' * 190} = {{" for _ in range(15))
    text = deep + "".join(f"\n}} a{number} = {{" for number in range(12_000))
    approval, _ = proposed(crew, source, {"agent.nix": text.encode()})
    assert show(crew, approval)["touches"][-1] == "more than was looked through"
    crew.ask(cmd="deny", id=approval)


def test_a_very_long_diff_says_how_much_is_left_out(crew: Hive, source: Source) -> None:
    files = {f"f{number}": b"x\n" * (MIB // 2) for number in range(4)}
    for more, is_cut in ((files, True), ({}, False)):
        approval, _ = proposed(crew, source, {"agent.nix": b"# long\n", **more})
        row = crew.api("GET", f"/api/approvals/{approval}").body["approval"]
        assert ("cut_bytes" in row) == is_cut
        assert not is_cut or row["diff"].endswith(f"({row['cut_bytes']} bytes more)\n")
        crew.ask(cmd="deny", id=approval)


def test_a_renamed_file_is_listed_with_its_new_name_whatever_that_is(team: Hive, source: Source) -> None:
    one, other = (f"# {word}\n".encode() * 20 for word in ("one", "other"))
    first, base = proposed(team, source, {"agent.nix": b"{ }\n", "x.nix": one, "q": other})
    assert approve(team, first)["phase"] == "deployed"
    renamed = {"agent.nix": b"{ }\n", "notes b/agent.nix": one, "q b/q b/q": other}
    approval, _ = proposed(team, source, renamed, base)
    assert "rename to notes b/agent.nix" in show(team, approval)["diff"].splitlines()
    assert [file["path"] for file in show(team, approval)["files"]] == ["notes b/agent.nix", "q b/q b/q"]


def test_what_a_change_reaches_into_is_said_in_words(team: Hive, source: Source) -> None:
    first, base = proposed(team, source, {"agent.nix": LAYERED})
    assert show(team, first)["touches"] == [SHELL, "how its Claude is run or prompted", SERVICES]
    assert approve(team, first)["phase"] == "deployed"
    for before, after, words in REACHES:
        approval, _ = proposed(team, source, {"agent.nix": LAYERED.replace(before, after)}, base)
        assert show(team, approval)["touches"] == words, after[:80]
        assert team.ask(cmd="deny", id=approval)["ok"]


def test_a_diff_counts_and_names_what_is_in_it(team: Hive, source: Source) -> None:
    files = {"agent.nix": b"{ }\n", "a b/x b/y.sh": b"++ more\n-- less\n\0hidden\n", "é": b"x"}
    first, base = proposed(team, source, files)
    row = show(team, first)
    assert {"path": "a b/x b/y.sh", "added": 3, "removed": 0} in row["files"]
    assert {"path": "é", "added": 1, "removed": 0} in row["files"]
    assert "+\0hidden" in row["diff"].split("\n")
    assert approve(team, first)["phase"] == "deployed"
    second, _ = proposed(team, source, files | {"a b/x b/y.sh": b"\0hidden\n"}, base)
    assert {"path": "a b/x b/y.sh", "added": 0, "removed": 2} in show(team, second)["files"]


def test_the_manager_changes_what_it_checked_out(team: Hive, source: Source, folder: Path) -> None:
    given = ask(team, "checkout_config", agent="alice")
    (folder / "bundle").write_bytes(base64.b64decode(given["bundle"]))
    source.git("fetch", "-q", "../bundle", "refs/heads/main")
    assert given["sha"] == source.git("rev-parse", "FETCH_HEAD") == ref(team, "main")
    sha = source.commit(source.tree_of({"agent.nix": CONFIG.encode()}), given["sha"])
    answer = propose(team, source, sha, bundle=source.bundle(sha, given["sha"]))  # only what is new
    assert approve(team, answer["id"])["phase"] == "deployed"
    assert ref(team, "main~1") == given["sha"]
    assert propose(team, source, sha)["code"] == "conflict"  # it runs already


def test_a_history_that_was_rewritten_is_refused(team: Hive, source: Source) -> None:
    """Built on something else than what runs, it would undo what was approved; so would one that began too early."""
    before = source.running(team)
    kept = everything_in(repository(team))
    orphan = propose(team, source, source.commit(source.tree_of({"agent.nix": CONFIG.encode()})))
    assert orphan["code"] == "bad_config" and "not built on" in orphan["error"]
    assert everything_in(repository(team)) == kept
    approval, _ = proposed(team, source, {"agent.nix": b"# deployed meanwhile\n"})
    assert approve(team, approval)["phase"] == "deployed"
    late = propose(team, source, source.commit(source.tree_of({"agent.nix": CONFIG.encode()}), before))
    assert late["code"] == "bad_config" and "again" in late["hint"]


def test_a_proposal_stays_what_it_was(team: Hive, source: Source) -> None:
    approval, sha = proposed(team, source, {"agent.nix": b"# first\n"})
    before = show(team, approval)
    other, _ = proposed(team, source, {"agent.nix": b"# second\n"}, sha)
    again = propose(team, source, sha)
    assert again["id"] == approval != other
    shutil.rmtree(source.folder)
    for key in ("fetched_sha", "diff", "digest", "commit_ref"):
        assert show(team, approval)[key] == before[key]
    assert approve(team, approval)["phase"] == "deployed"
    assert content(team, "main") == b"# first\n"
    # What still waits is compared with what runs now.
    assert {"-# first", "+# second"} <= set(show(team, other)["diff"].splitlines())


def test_what_is_asked_for_while_another_config_is_deployed_is_compared_with_that(team: Hive, source: Source) -> None:
    """Or it is refused; and nothing is approved that was compared with anything else."""
    other, _ = proposed(team, source, {"agent.nix": b"# other\n"})
    base = source.running(team)
    commits = [source.commit(source.tree_of({"agent.nix": f"# {number}\n".encode()}), base) for number in range(15)]
    requests = [{"agent": "alice", "sha": sha, "description": "x", "bundle": source.bundle(sha)} for sha in commits]
    answers = []

    def ask_later(number: int) -> None:
        time.sleep(number / 15)
        answers.append(ask(team, "request_apply_commit", **requests[number]))

    assert team.ask(cmd="approve", id=other)["ok"]
    at_once(len(requests), ask_later)
    wait_for(lambda: is_over(team, other), "the deploy")
    assert {answer.get("code") for answer in answers} <= {None, "conflict", "bad_config"}
    filed, now = [answer["id"] for answer in answers if answer["ok"]], ref(team, "refs/heads/main")
    wait_for(lambda: all(show(team, approval)["base_sha"] == now for approval in filed), "all to be compared again")
    assert base != now and all("-# other" in show(team, approval)["diff"] for approval in filed)


def test_what_was_compared_with_something_else_is_not_approved(folder: Path, source: Source) -> None:
    with Hive(folder) as hive:
        approval, _ = proposed(hive.spawn("manager", "alice"), source, {"agent.nix": b"# mine\n"})
        hive.stop()
        with closing(sqlite3.connect(hive.state / "hive.sqlite")) as database, database:
            database.execute("UPDATE approvals SET base_sha = ? WHERE id = ?", ("0" * 40, approval))
        hive.start()
        assert hive.ask(cmd="approve", id=approval)["code"] == "stale"
        assert show(hive, approval)["status"] == "pending"


def fine(source: Source, **more: bytes) -> str:
    return source.commit(source.tree_of({"agent.nix": b"{ }\n", **more}))


def raw(source: Source, kind: str, data: bytes) -> str:
    """An object that git would never make itself."""
    return source.git("hash-object", "-t", kind, "-w", "--stdin", "--literally", stdin=data)


def entry(source: Source, mode: str, name: str) -> bytes:
    return f"{mode} {name}\0".encode(errors="surrogateescape") + bytes.fromhex(source.blob())


def nested(source: Source, path: str) -> str:
    return source.commit(source.tree_of({"agent.nix": b"{ }\n", path: b"{ }\n"}))


def unfolding(source: Source) -> str:
    """A few small trees that hold the one below ten times over: a thousand million files."""
    tree = source.tree_of({"agent.nix": b"{ }\n"})
    for _ in range(9):
        tree = source.tree(f"100644 blob {source.blob()}\tagent.nix", *(f"040000 tree {tree}\tt{n}" for n in range(10)))
    return source.commit(tree)


REFUSED: dict[str, tuple[Callable[[Source], str], str]] = {
    "a link": (
        lambda s: s.commit(s.tree(f"100644 blob {s.blob()}\tagent.nix", f"120000 blob {s.blob(b'/etc')}\tetc")),
        "etc is a symbolic link",
    ),
    "agent.nix a link": (
        lambda s: s.commit(s.tree(f"120000 blob {s.blob(b'/etc/shadow')}\tagent.nix")),
        "agent.nix is a symbolic link",
    ),
    "a submodule": (
        lambda s: s.commit(s.tree(f"100644 blob {s.blob()}\tagent.nix", f"160000 commit {'1' * 40}\tsub")),
        "sub is a submodule",
    ),
    ".gitmodules": (lambda s: nested(s, ".gitmodules"), ".git"),
    ".gitattributes": (lambda s: nested(s, "deep/er/.gitattributes"), ".git"),
    ".GITignore": (lambda s: nested(s, "deep/.GITignore"), ".git"),
    "flake.nix": (lambda s: nested(s, "flake.nix"), "flake"),
    "flake.lock": (lambda s: nested(s, "flake.lock"), "flake"),
    "no agent.nix": (lambda s: s.commit(s.tree_of({"other.nix": b"{ }\n"})), "no agent.nix"),
    "agent.nix a folder": (lambda s: s.commit(s.tree_of({"agent.nix/default.nix": b"{ }\n"})), "no agent.nix"),
    "an empty tree": (lambda s: s.commit(s.tree()), "no agent.nix"),
    "257 files": (lambda s: fine(s, **{f"f{n}": b"" for n in range(256)}), "257 files"),
    "a thousand million files": (unfolding, "far too many files"),
    "a large file": (lambda s: fine(s, large=b"x" * (MIB + 1)), str(MIB + 1)),
    "a large file in an older commit": (
        lambda s: s.commit(s.tree_of({"agent.nix": b"{ }\n"}), fine(s, large=b"x" * (MIB + 1))), str(MIB + 1),
    ),
    "a name that is not UTF-8": (
        lambda s: s.commit(raw(s, "tree", entry(s, "100644", "agent.nix") + entry(s, "100644", "\udcff"))),
        "plain text",
    ),
    "a name with a control character": (lambda s: nested(s, "deep/\x1b[2J"), "plain text"),
    "a name with a quotation mark": (lambda s: nested(s, 'a"b'), "plain text"),
    "a tree with a file twice": (
        lambda s: s.commit(raw(s, "tree", entry(s, "100644", "agent.nix") * 2)), "duplicate",
    ),
    "a tree with a path": (
        lambda s: s.commit(raw(s, "tree", entry(s, "100644", "../x") + entry(s, "100644", "agent.nix"))), "",
    ),
    "a tree with ..": (
        lambda s: s.commit(raw(s, "tree", entry(s, "100644", "..") + entry(s, "100644", "agent.nix"))), "",
    ),
    "a commit without an author": (
        lambda s: raw(s, "commit", f"tree {s.tree_of({'agent.nix': b''})}\n\nnobody\n".encode()), "",
    ),
}  # fmt: skip


def everything_in(place: Path) -> dict[str, str]:
    """Every file and its content's hash."""
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("what", REFUSED)
def test_a_commit_with_this_is_refused_and_leaves_nothing(crew: Hive, source: Source, what: str) -> None:
    make, why = REFUSED[what]
    sha = make(source)
    before = everything_in(repository(crew))
    refused = propose(crew, source, sha)
    assert (refused["ok"], refused["code"]) == (False, "bad_config"), refused
    assert why in refused["error"] and str(crew.folder) not in refused["error"], refused["error"]
    assert everything_in(repository(crew)) == before
    assert list((crew.state / "tmp").iterdir()) == []


def test_as_many_and_as_large_files_as_are_allowed(crew: Hive, source: Source) -> None:
    files = {f"folder/f{number}": str(number).encode() for number in range(254)}
    approval, _ = proposed(crew, source, {"agent.nix": b"{ }\n", "large": b"x" * MIB, **files})
    assert len(show(crew, approval)["files"]) == 256
    crew.ask(cmd="deny", id=approval)


def test_what_is_no_commit_of_a_bundle_is_refused(crew: Hive, source: Source) -> None:
    sha, tree = fine(source), source.tree_of({"agent.nix": b"{ }\n"})
    other = source.commit(tree, sha)
    garbage = base64.b64encode(b"# v2 git bundle\n" + b"0" * 40 + b" refs/heads/main\n\nPACK" + bytes(100)).decode()
    before = everything_in(repository(crew))
    for fields, code, why in [
        ({"sha": sha[:12]}, "bad_request", "no commit id"),
        ({"sha": "main"}, "bad_request", "no commit id"),
        ({"sha": sha.upper()}, "bad_request", "no commit id"),
        ({"sha": f"{sha[:-1]}\n"}, "bad_request", "no commit id"),
        ({"sha": "--upload-pack=touch".ljust(40)}, "bad_request", "no commit id"),
        ({"sha": other}, "bad_config", "not in the bundle"),
        ({"sha": tree}, "bad_config", "not in the bundle"),
        ({"sha": "0" * 40}, "bad_config", "not in the bundle"),
        ({"sha": ref(crew, "main")}, "conflict", "runs already"),
        ({"bundle": "%%%"}, "bad_request", "base64"),
        ({"bundle": base64.b64encode(b"hello").decode()}, "bad_config", "no git bundle"),
        ({"bundle": garbage}, "bad_config", "bundle"),
        ({"bundle": source.bundle(sha)[:-40]}, "bad_config", "bundle"),
        ({"bundle": source.bundle(other, sha), "sha": other}, "bad_config", "bundle"),  # its parent is missing
        ({"agent": "nobody"}, "unknown_agent", "nobody"),
    ]:
        refused = propose(crew, source, sha, **fields)
        assert (refused["ok"], refused.get("code")) == (False, code), (fields, refused)
        assert why in refused["error"], (fields, refused)
    assert everything_in(repository(crew)) == before


def test_a_request_that_is_one_too_many_leaves_nothing(folder: Path, source: Source) -> None:
    with Hive(folder, limits={"pending_approvals": 1}) as hive:
        hive.spawn("manager", "alice")
        proposed(hive, source, {"agent.nix": b"# first\n"})
        tree, before = source.tree_of({"agent.nix": b"# second\n"}), everything_in(repository(hive))
        second = propose(hive, source, source.commit(tree, source.running(hive)))
        assert second["code"] == "too_many" and everything_in(repository(hive)) == before


def test_a_request_of_long_ago_keeps_its_row_alone(folder: Path, source: Source) -> None:
    with Hive(folder) as hive:
        approval, sha = proposed(hive.spawn("manager", "alice"), source, {"agent.nix": b"# never\n"})
        other, young = proposed(hive, source, {"agent.nix": b"# some day\n"})
        for number in (approval, other):
            assert hive.ask(cmd="deny", id=number)["ok"]
        hive.stop()
        with closing(sqlite3.connect(hive.state / "hive.sqlite")) as database, database:
            database.execute("UPDATE approvals SET resolved_at = 0 WHERE id = ?", (approval,))
        for path in repository(hive).rglob("*"):
            os.utime(path, (0, 0))
        hive.start()
        wait_for(lambda: not show(hive, approval)["diff"], "the old one to be forgotten")
        assert show(hive, approval)["status"] == "denied" and "# some day" in show(hive, other)["diff"]
        assert ref(hive, f"refs/proposals/{other}") == young and not ref(hive, f"{sha}^{{commit}}")
        assert content(hive, "main")


def test_a_repository_that_was_broken_off_is_made_whole_and_none_around_it_is_taken(folder: Path) -> None:
    with Hive(folder) as hive:
        around = Source(folder)
        around.git("update-ref", "refs/heads/main", around.commit(around.tree()))
        before, half = around.git("rev-parse", "main"), repository(hive, "carol")
        half.mkdir(parents=True)
        (half / "HEAD").write_text("ref: refs/heads/main\n")
        hive.spawn("carol")
        assert around.git("rev-parse", "main") == before != ref(hive, "refs/heads/main", "carol")
        assert content(hive, "main", name="carol")


def test_hooks_and_config_of_the_source_never_run(team: Hive, source: Source, folder: Path) -> None:
    trap = folder / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {folder}/sprung\n")
    trap.chmod(0o755)
    hooks = source.folder / ".git/hooks"
    for hook in ("post-checkout", "post-merge", "pre-receive", "update", "post-receive", "reference-transaction",
                 "post-commit", "pre-auto-gc", "fsmonitor-watchman"):  # fmt: skip
        (hooks / hook).symlink_to(trap)
    settings = {
        "core.fsmonitor": trap, "core.sshCommand": trap, "core.pager": trap, "core.editor": trap,
        "diff.external": trap, "uploadpack.packObjectsHook": trap, "filter.x.clean": trap, "filter.x.smudge": trap,
        "core.alternateRefsCommand": trap, "diff.x.textconv": trap, "gpg.program": trap,
    }  # fmt: skip
    sha = source.commit(source.tree_of({"agent.nix": CONFIG.encode(), "it.x": b"x"}), source.running(team))
    bundle = source.bundle(sha)
    for key, value in settings.items():
        source.git("config", key, str(value))
    (source.folder / ".git/info/attributes").write_text("* filter=x diff=x\n")
    (folder / "sprung").unlink(missing_ok=True)
    with team.agent("manager") as manager:
        answer = manager.ask("request_apply_commit", agent="alice", sha=sha, description="a trap", bundle=bundle)
    assert approve(team, answer["id"])["phase"] == "deployed"
    # The hive's own files hold nothing of it, either: a bundle carries objects and names alone.
    kept = repository(team)
    assert not (folder / "sprung").exists() and not (kept / "hooks").exists()
    assert str(trap) not in (kept / "config").read_text()


# ── deploys ──


def test_rollback_deploys_the_one_before(team: Hive, source: Source) -> None:
    first = ref(team, "main")
    assert team.ask(cmd="rollback", name="alice")["code"] == "not_found"
    approval, second = proposed(team, source, {"agent.nix": b"# second\n"})
    approve(team, approval)
    for expected in (first, second):
        deploy = team.ask(cmd="rollback", name="alice")["deploy"]
        wait_for(lambda number=deploy: team.phase(number) == "deployed", "the rollback")
        assert ref(team, "main") == expected and agents(team)["alice"]["deployed_sha"] == expected[:12]


def test_a_deploy_that_fails_changes_nothing(team: Hive, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ref(team, "main")
    approval, _ = proposed(team, source, {"agent.nix": b"# never\n"})
    team.stop()
    monkeypatch.setenv("HYPERHIVE_BACKOFF_S", "soon")
    team.start()
    failed = approve(team, approval, note="let us see")
    assert (failed["status"], failed["note"]) == ("failed", "let us see") and "'soon'" in failed["error"]
    assert ref(team, "main") == before and agents(team)["alice"]["deployed_sha"] == before[:12]
    assert team.ask(cmd="approve", id=approval)["code"] == "conflict"
    assert propose(team, source, show(team, approval)["fetched_sha"])["id"] != approval  # it may be asked for again


# ── kill -9 ──


@pytest.fixture
def slow_git(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this file is there, the hive's git waits; with `-last` to its name, only that which moves a branch."""
    barrier, program = folder / "barrier", folder / "git"
    holds = f'case "$*" in *"update-ref --stdin"*) [ -e {barrier}-last ];; *) false;; esac'
    wait = f"while [ -e {barrier} ] || {holds}; do sleep 0.05; done"
    program.write_text(f'#!/bin/sh\n{wait}\nexec {shutil.which("git")} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("HYPERHIVE_GIT", str(program))
    return barrier


def phase_on_disk(hive: Hive, approval: int) -> str:
    with closing(sqlite3.connect(f"file:{hive.state / 'hive.sqlite'}?mode=ro", uri=True)) as connection:
        row = connection.execute("SELECT phase FROM deploys WHERE approval = ?", (approval,)).fetchone()
    return str(row[0])


@pytest.mark.parametrize("kind", ["spawn", "apply"])
@pytest.mark.parametrize("phase", ["queued", "building", "switching"])
def test_kill_9_in_any_phase_and_the_deploy_is_done_once(
    folder: Path, source: Source, slow_git: Path, phase: str, kind: str
) -> None:
    last = slow_git.with_name("barrier-last")
    with Hive(folder, undo_s=60) as hive:
        hive.spawn("manager", "alice")
        if kind == "spawn":
            approval, name = ask_spawn(hive, config=CONFIG), "carol"
        else:
            approval, name = proposed(hive, source, {"agent.nix": CONFIG.encode()})[0], "alice"
        for held, barrier in (("building", slow_git), ("switching", last)):
            if phase == held:
                barrier.touch()
        answer = hive.api("POST", f"/api/approvals/{approval}/approve", {"undo": phase == "queued"})
        assert answer.status == 200
        wait_for(lambda: phase_on_disk(hive, approval) == phase, phase)
        hive.kill()
        assert phase_on_disk(hive, approval) == phase
        for barrier in (slow_git, last):
            barrier.unlink(missing_ok=True)  # what the dead daemon's git still does must not matter
        if phase == "queued":  # the time for an undo is over
            with closing(sqlite3.connect(hive.state / "hive.sqlite")) as db, db:
                db.execute("UPDATE deploys SET not_before = 1 WHERE approval = ?", (approval,))
        hive.start()
        wait_for(lambda: is_over(hive, approval), "the deploy", timeout_s=60)
        assert (show(hive, approval)["status"], show(hive, approval)["phase"]) == ("approved", "deployed")
        assert content(hive, "main", name=name).decode() == CONFIG
        assert len(harnesses(hive, name)) == 1
        with hive.agent("manager") as manager:
            assert [(news["kind"], news["approval"]) for news in mail(manager)] == [
                ({"spawn": "spawn", "apply": "apply_commit"}[kind], approval), ("deployed", approval),
            ]  # fmt: skip
        asked = ("request_spawn" if kind == "spawn" else "request_apply_commit", name, "manager")
        steps = [asked, ("approved", f"approval {approval}", "operator"), ("deployed", name, "system")]
        others = 1 if kind == "apply" else 0  # alice's own first deploy
        assert [audit(hive).count(step) for step in steps] == [1, 1, 1 + others]


def harnesses(hive: Hive, name: str) -> list[psutil.Process]:
    argv = [str(ROOT / "harness.py"), "run"]
    return originals(hive.run / "agents" / name, lambda process: process.cmdline()[1:] == argv)
