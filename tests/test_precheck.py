"""What the host finds out about a config while the request for it waits, with the real Nix."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import precheck
import pytest
from hive import end, wait_for
from nixos import NixosHive
from precheck import builders, verdict

from hyperhive import package_changes, what_nix_says

pytestmark = [
    pytest.mark.needs("git", "nix", "systemd-nspawn"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for containers"),
    pytest.mark.timeout(300),
]


def test_what_diff_closures_says_is_a_table() -> None:
    lines = [
        "librsvg: ∅ → 2.60.0, +4100.5 KiB",
        "acl: 2.2.53 → 2.3.1",
        "kexts: 1.2, 1.3 → 1.4, \x1b[32;1m-9.5 MiB\x1b[0m",
        "linux: +7.0 KiB",
        "warning: something else",
    ]
    assert package_changes(lines) == [
        {"name": "librsvg", "to": "2.60.0", "bytes": 4198912},
        {"name": "acl", "from": "2.2.53", "to": "2.3.1", "bytes": 0},
        {"name": "kexts", "from": "1.2, 1.3", "to": "1.4", "bytes": -9961472},
        {"name": "linux", "bytes": 7168},
    ]


OLD_ERROR = """\
error: \x1b[1maccess to absolute path '/etc/shadow' is forbidden\x1b[0m

… while calling the 'readFile' builtin

       at SOURCE/sub/agent.nix:12:3:

… while evaluating the attribute 'config'

       at SOURCE/agent.nix:2:1:
"""
NEW_ERROR = """\
error:
       … while evaluating the attribute 'config'
         at SOURCE/agent.nix:2:1:
            1| {
       … while calling the 'readFile' builtin
         at SOURCE/sub/agent.nix:12:3:
       … while evaluating a branch condition
         at /nix/store/h-source/lib/modules.nix:294:9:

       error: access to absolute path '/etc/shadow' is forbidden
"""


@pytest.mark.parametrize("said", [OLD_ERROR, NEW_ERROR], ids=["old", "new"])
@pytest.mark.parametrize("source", ["/nix/store/abc-source", "«git+file:///x?ref=r&rev=s»"])
def test_the_place_of_an_error_is_found(source: str, said: str) -> None:
    lines = said.replace("SOURCE", source).splitlines()
    assert what_nix_says(lines, ["agent.nix", "sub/agent.nix"]) == {
        "error": "access to absolute path '/etc/shadow' is forbidden",
        "at": {"path": "sub/agent.nix", "line": 12},
    }


def test_of_a_failed_build_the_cause_is_told() -> None:
    store = "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-"
    lines = [
        "trial> error: something that the builder said",
        f"error: builder for '{store}trial.drv' failed with exit code 7;",
        f"error: 1 dependencies of derivation '{store}nixos-system-alice.drv' failed to build",
    ]
    assert what_nix_says(lines, ["agent.nix"]) == {"error": "builder for 'trial.drv' failed with exit code 7;"}
    assert what_nix_says(["killed"], ["agent.nix"]) == {}


@pytest.fixture(scope="module")
def hive() -> Iterator[NixosHive]:
    with tempfile.TemporaryDirectory(prefix="hh-", dir="/tmp") as place, NixosHive(Path(place), precheck="build") as it:
        yield it.spawn("manager", "alice")


def built_by(script: str) -> str:
    return f"trial.build = ''{script}'';"


def config(script: str) -> str:
    return f"{{ {built_by(script)} }}\n"


BIG, SLOW = precheck.BUILDS.config(built_by), precheck.HANGS.config(built_by)


def log(hive: NixosHive, approval: int) -> str:
    return "\n".join(hive.api("GET", f"/api/approvals/{approval}/precheck").body["log"])


def show(hive: NixosHive, approval: int) -> dict[str, Any]:
    row: dict[str, Any] = hive.ask(cmd="show", id=approval)["approval"]
    return row


def deny(hive: NixosHive, *approvals: int) -> None:
    assert all(hive.ask(cmd="deny", id=approval)["ok"] for approval in approvals)


# ── the verdict ──


@pytest.mark.parametrize("case", precheck.CASES.values(), ids=precheck.CASES)
def test_what_is_found_out_about_a_config(hive: NixosHive, case: precheck.Case) -> None:
    asked = hive.propose("alice", case.config(built_by))
    found = verdict(hive, asked)
    case.check(found, log(hive, asked))
    assert "root:" not in log(hive, asked)
    if case.at:
        assert case.line in precheck.line_of(show(hive, asked)["diff"], case.at)
    deny(hive, asked)


def test_a_build_that_hangs_is_ended(folder: Path) -> None:
    with NixosHive(folder, precheck="build", precheck_timeout_s=20.0) as hive:
        asked = hive.propose("alice", SLOW)
        precheck.HANGS.check(verdict(hive, asked), log(hive, asked))
        wait_for(lambda: not builders(), "the end of the build")


def test_what_an_agent_says_that_it_runs_is_not_believed(hive: NixosHive) -> None:
    """Its profile is bound into its container, writable: as if it had run nothing, or what is proposed already."""
    deploy = hive.change("alice", "{ }\n# what it runs\n")
    assert deploy["phase"] == "deployed", deploy
    profile = hive.nixos / "nix/state/profiles/per-container/h-alice/system"
    before = profile.readlink()
    profile.unlink()
    asked = hive.propose("alice", BIG)
    assert [package["name"] for package in verdict(hive, asked)["packages"]] == ["nixos-system"], log(hive, asked)
    profile.symlink_to(before)
    deny(hive, asked)


def test_which_packages_change_and_by_how_much(hive: NixosHive) -> None:
    asked = hive.propose("alice", BIG)
    (package,) = verdict(hive, asked)["packages"]
    assert package["name"] == "nixos-system" and 2_900_000 < package["bytes"] < 3_100_000
    shown = hive.cli("show", str(asked)).stdout.splitlines()
    assert {"pre-check     ok", f"{'':13} nixos-system – → –, +2.9 MiB"} <= set(shown)
    deny(hive, asked)


def test_a_first_config_is_tried_before_there_is_an_agent(hive: NixosHive) -> None:
    asked = hive.propose("carol", "{ }\n")
    found = verdict(hive, asked)
    assert found["state"] == "ok" and found["packages"] == [], log(hive, asked)
    assert not (hive.state / "applied/carol").exists(), "nothing is made for a request that only waits"
    deny(hive, asked)


def test_what_nix_says_of_a_first_config_is_shown_where_it_is(hive: NixosHive) -> None:
    asked = hive.propose("carol", "{\n  networking.hostName = oops;\n}\n")
    found = verdict(hive, asked)
    assert (found["state"], found["at"]) == ("failed", {"path": "agent.nix", "line": 2})
    assert found["error"] == "undefined variable 'oops'"
    assert "oops" in precheck.line_of(show(hive, asked)["diff"], found["at"])
    assert "failed at agent.nix:2: undefined variable 'oops'" in hive.cli("show", str(asked)).stdout
    deny(hive, asked)


def test_nothing_is_built_while_it_is_evaluated(hive: NixosHive) -> None:
    """Import from derivation: an evaluation that would need a build is refused."""
    script = 'derivation { name = "x"; system = pkgs.stdenv.hostPlatform.system; builder = "/bin/sh"; args = [ ]; }'
    asked = hive.propose("alice", f"{{ pkgs, ... }}: {{ networking.hostName = import ({script}); }}\n")
    found = verdict(hive, asked)
    assert found["state"] == "failed" and "evaluates" not in found
    assert "allow-import-from-derivation" in log(hive, asked) and "building" not in log(hive, asked)
    deny(hive, asked)


@pytest.fixture(scope="module")
def trap(hive: NixosHive) -> tuple[Path, str]:
    """A repository in the manager's own folder whose settings run a command for who uses it; and its commit."""
    folder = hive.state / "agents/manager/state/trap"
    folder.mkdir()
    (folder / ".gitattributes").write_text("* filter=x\n")
    (folder / "host.nix").write_text('"read-by-the-host"\n')

    def git(*words: str) -> str:
        return hive.program("git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x", *words)

    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message=trap")
    git("config", "filter.x.smudge", f"touch {folder}/ran; cat")
    git("config", "uploadpack.packObjectsHook", f"touch {folder}/ran; exec")
    return folder, git("rev-parse", "HEAD").strip()


@pytest.mark.parametrize("way", ["", "file://", "/proc/1/root"])
def test_what_an_agent_can_write_is_not_in_sight(hive: NixosHive, trap: tuple[Path, str], way: str) -> None:
    """Pure as it is, an evaluation may fetch from a repository on this machine, and git does what that one says."""
    folder, commit = trap
    fetched = f'builtins.fetchGit {{ url = "{way}{folder}"; rev = "{commit}"; allRefs = true; }}'
    asked = hive.propose("alice", f'{{ networking.hostName = import "${{{fetched}}}/host.nix"; }}\n')
    found = verdict(hive, asked)
    assert found["state"] == "failed" and "evaluates" not in found, log(hive, asked)
    assert "read-by-the-host" not in log(hive, asked) and not (folder / "ran").exists()
    deploy = hive.approve(asked)
    assert deploy["phase"] == "failed" and not (folder / "ran").exists(), "nor when it is approved"


def test_no_error_tells_the_hash_of_a_secret(hive: NixosHive) -> None:
    """With it, the next config could read the file."""
    wrong = f"sha256-{'A' * 43}="
    file = f'builtins.fetchTree {{ type = "path"; path = "{hive.state}/operator.token"; narHash = "{wrong}"; }}'
    asked = hive.propose("alice", f"{{ networking.hostName = builtins.readFile ({file}); }}\n")
    assert verdict(hive, asked)["state"] == "failed"
    assert "operator.token" in log(hive, asked) and "mismatch" not in log(hive, asked)
    deny(hive, asked)


def test_evaluation_alone_can_be_asked_for_or_nothing(folder: Path) -> None:
    with NixosHive(folder, precheck="eval") as hive:
        asked = hive.propose("alice", SLOW)
        found = verdict(hive, asked)
        assert (found["state"], found["evaluates"]) == ("ok", True)
        assert {"builds", "packages"}.isdisjoint(found) and "nix build" not in log(hive, asked)
        hive.stop()
        hive.configure(precheck="off")
        hive.start()
        assert show(hive, asked)["precheck"] == found, "what was found out stays"
        assert show(hive, hive.propose("bob", BIG))["precheck"] == {"state": "off"}


# ── its place among the rest ──


def test_it_never_decides(hive: NixosHive) -> None:
    asked = hive.propose("alice", precheck.DOES_NOT_BUILD.config(built_by))
    assert verdict(hive, asked)["state"] == "failed"
    assert hive.ask(cmd="approve", id=asked)["ok"], "it colours the button and does not block it"
    wait_for(lambda: show(hive, asked)["status"] == "failed", "the deploy to fail, too", timeout_s=60)


def test_one_at_a_time_at_low_priority_with_one_core(hive: NixosHive) -> None:
    first = hive.propose("alice", config(f'echo "cores $NIX_BUILD_CORES"; {precheck.HANGS.script}'))
    second = hive.propose("alice", BIG)
    wait_for(builders, "the build to begin")
    assert [process.info["nice"] for process in builders()] == [19]
    assert verdict(hive, first, "running")["evaluates"]
    assert show(hive, second)["precheck"] == {"state": "waiting"}
    wait_for(lambda: "cores 1" in log(hive, first), "the log, while it runs")
    deny(hive, first)
    assert verdict(hive, second)["state"] == "ok"
    deny(hive, second)


@pytest.mark.parametrize("who", ["operator", "manager"])
def test_it_ends_with_its_request(hive: NixosHive, who: str) -> None:
    asked = hive.propose("alice", SLOW)
    wait_for(builders, "the build to begin")
    if who == "operator":
        deny(hive, asked)
    else:
        with hive.agent("manager") as manager:
            assert manager.ask("cancel_request", id=asked)["ok"]
    wait_for(lambda: not builders(), "the end of the build")
    wait_for(lambda: not [*(hive.state / "tmp").glob("precheck-*")], "the end of its folder")
    after = hive.propose("alice", BIG)
    assert verdict(hive, after)["state"] == "ok", "it holds nobody up"
    deny(hive, after)


def test_it_ends_with_an_approval_too_and_the_deploy_has_its_own_priority(folder: Path) -> None:
    with NixosHive(folder, precheck="build") as hive:
        asked = hive.propose("alice", SLOW)
        wait_for(builders, "the build to begin")
        assert hive.ask(cmd="approve", id=asked)["ok"]
        wait_for(lambda: [process.info["nice"] for process in builders()] == [0], "the build of the deploy")


def test_it_begins_again_with_an_undo(folder: Path) -> None:
    with NixosHive(folder, precheck="build", undo_s=60) as hive:
        asked = hive.propose("alice", SLOW)
        wait_for(builders, "the build to begin")
        path = f"/api/approvals/{asked}"
        assert hive.api("POST", f"{path}/approve", {"undo": True}).status == 200
        wait_for(lambda: not builders(), "its end")
        assert hive.api("POST", f"{path}/undo", {}).status == 200
        wait_for(builders, "the next build")
        deny(hive, asked)
        wait_for(lambda: not builders(), "the end of the build")


def test_it_ends_with_the_daemon_and_begins_again_with_it(folder: Path) -> None:
    with NixosHive(folder, precheck="build") as hive:
        asked = hive.propose("alice", SLOW)
        wait_for(builders, "the build")
        hive.stop()
        wait_for(lambda: not builders(), "the end of the build")
        hive.start()
        wait_for(builders, "the next build")
        hive.kill()
        cut_off = builders()  # without its daemon, a Nix that is killed leaves them; it would hold up the next one
        hive.start()
        wait_for(lambda: set(builders()) - set(cut_off), "a build that does not wait for the one before")
        end(cut_off)
        deny(hive, asked)
        wait_for(lambda: not builders(), "the end of the build")


def test_it_begins_again_with_an_edit(hive: NixosHive) -> None:
    asked = hive.propose("alice", SLOW)
    wait_for(builders, "the build to begin")
    edit = {"path": "agent.nix", "text": BIG, "digest": show(hive, asked)["digest"]}
    assert hive.api("POST", f"/api/approvals/{asked}/edit", edit).status == 200
    assert verdict(hive, asked)["state"] == "ok", "it did not wait for the one that hangs"
    assert "first_base_sha" not in show(hive, asked)
    deny(hive, asked)


def test_it_is_done_again_when_something_else_was_deployed_meanwhile(hive: NixosHive) -> None:
    """A change is compared with what runs now, and so are new inputs; the request says on what it was asked."""
    asked, other = hive.propose("alice", BIG), hive.propose("alice", "{ }\n# other\n")
    with hive.agent("manager") as manager:
        inputs = manager.ask("request_update_inputs", agent="alice")["id"]
    shown = {request: show(hive, request) for request in (asked, inputs) if verdict(hive, request)["state"] == "ok"}
    assert not any("first_base_sha" in row for row in shown.values())
    assert hive.approve(other)["phase"] == "deployed"
    deployed = next(row for row in hive.ask(cmd="agent_status")["agent_statuses"] if row["name"] == "alice")
    for request, before in shown.items():
        now = show(hive, request)
        assert now["first_base_sha"] == before["base_sha"] != now["base_sha"]
        assert now["base_sha"].startswith(deployed["deployed_sha"])
        assert now["digest"] != before["digest"]
        stale = hive.api("POST", f"/api/approvals/{request}/approve", {"digest": before["digest"]})
        assert stale.status == 409 and stale.body["code"] == "stale"
        assert verdict(hive, request)["state"] == "ok"
    assert "# other" in show(hive, asked)["diff"]
    assert "deployed after this was asked for" in hive.cli("show", str(asked)).stdout
    deny(hive, asked, inputs)
