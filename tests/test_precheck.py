"""What the host finds out about a config while the request for it waits, with the real Nix."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hive import wait_for
from nixos import NixosHive

from hyperhive import ERROR_PLACE, package_changes

pytestmark = [
    pytest.mark.needs("git", "nix", "systemd-nspawn"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for containers"),
    pytest.mark.timeout(300),
]
BIG = "{ trial.build = ''mkdir -p $out; head -c 3000000 /dev/zero > $out/big''; }\n"


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


@pytest.mark.parametrize("source", ["/nix/store/abc-source", "«git+file:///x?ref=r&rev=s»"])
def test_the_place_of_an_error_is_found(source: str) -> None:
    place = ERROR_PLACE.search(f"       at {source}/sub/agent.nix:12:3:")
    assert place and (place["path"], place["line"]) == ("sub/agent.nix", "12")


@pytest.fixture(scope="module")
def hive() -> Iterator[NixosHive]:
    settings = {"precheck": "build", "precheck_timeout_s": 20.0}
    with tempfile.TemporaryDirectory(prefix="hh-", dir="/tmp") as folder, NixosHive(Path(folder), **settings) as hive:
        yield hive.spawn("manager", "alice")


def verdict(hive: NixosHive, approval: int, *states: str) -> dict[str, Any]:
    """The pre-check of a request when it has come to one of these states, by default any last one."""
    last = states or ("ok", "failed", "timed_out")

    def look() -> Any:
        found = hive.ask(cmd="show", id=approval)["approval"]["precheck"]
        return found if found["state"] in last else None

    return wait_for(look, f"{' or '.join(last)} of request {approval}", timeout_s=100)


def log(hive: NixosHive, approval: int) -> str:
    return "\n".join(hive.api("GET", f"/api/approvals/{approval}/precheck").body["log"])


def test_a_config_that_builds_tells_what_would_change(hive: NixosHive) -> None:
    asked = hive.propose("alice", BIG)
    found = verdict(hive, asked)
    assert (found["state"], found["evaluates"], found["builds"]) == ("ok", True, True), log(hive, asked)
    assert sum(package["bytes"] for package in found["packages"]) > 2_000_000, found
    assert found["seconds"] > 0 and "nix build" in log(hive, asked)
    assert hive.ask(cmd="deny", id=asked)["ok"]


def test_a_first_config_is_tried_before_there_is_an_agent(hive: NixosHive) -> None:
    asked = hive.propose("carol", "{ }\n")
    assert verdict(hive, asked)["state"] == "ok", log(hive, asked)
    assert not (hive.state / "applied/carol").exists(), "nothing is made for a request that only waits"
    assert hive.ask(cmd="deny", id=asked)["ok"]


def test_a_syntax_error_is_shown_where_it_is(hive: NixosHive) -> None:
    asked = hive.propose("alice", "{\n  trial.build = ;\n}\n")
    found = verdict(hive, asked)
    assert found["state"] == "failed" and "evaluates" not in found
    assert found["at"] == {"path": "agent.nix", "line": 2}, log(hive, asked)
    assert hive.ask(cmd="deny", id=asked)["ok"]


def test_a_config_that_evaluates_and_does_not_build(hive: NixosHive) -> None:
    asked = hive.propose("alice", "{ trial.build = ''echo these are its last words; exit 7''; }\n")
    found = verdict(hive, asked)
    assert found["state"] == "failed" and found["evaluates"] and "builds" not in found
    assert "these are its last words" in log(hive, asked)
    assert hive.ask(cmd="approve", id=asked)["ok"], "a pre-check colours the button and does not block it"
    wait_for(lambda: hive.ask(cmd="show", id=asked)["approval"]["status"] == "failed", "the deploy to fail, too")


def test_a_build_that_hangs_is_ended(hive: NixosHive) -> None:
    asked = hive.propose("alice", "{ trial.build = ''sleep 1000''; }\n")
    assert verdict(hive, asked)["state"] == "timed_out"
    assert hive.ask(cmd="deny", id=asked)["ok"]


def test_a_host_file_can_not_be_read(hive: NixosHive) -> None:
    asked = hive.propose("alice", "{ trial.build = builtins.readFile /etc/shadow; }\n")
    found = verdict(hive, asked)
    assert found["state"] == "failed" and "evaluates" not in found
    assert "/etc/shadow" in log(hive, asked) and "root:" not in log(hive, asked)
    assert hive.ask(cmd="deny", id=asked)["ok"]


def test_it_ends_with_its_request_and_begins_again_with_an_edit(hive: NixosHive) -> None:
    asked = hive.propose("alice", "{ trial.build = ''sleep 1000''; }\n")
    verdict(hive, asked, "running")
    digest = hive.ask(cmd="show", id=asked)["approval"]["digest"]
    edit = {"path": "agent.nix", "text": BIG, "digest": digest}
    assert hive.api("POST", f"/api/approvals/{asked}/edit", edit).status == 200
    found = verdict(hive, asked)
    assert found["state"] == "ok" and found["seconds"] < 15, "it did not wait for the one that hangs"
    slow = hive.propose("alice", "{ trial.build = ''sleep 999''; }\n")
    verdict(hive, slow, "running")
    assert hive.ask(cmd="deny", id=slow)["ok"] and hive.ask(cmd="deny", id=asked)["ok"]
    again = hive.propose("alice", BIG + "# again\n")
    assert verdict(hive, again)["state"] == "ok", "the one that was denied holds nobody up"
    assert hive.ask(cmd="deny", id=again)["ok"]


def test_it_is_done_again_when_something_else_was_deployed_meanwhile(hive: NixosHive) -> None:
    asked, other = hive.propose("alice", BIG), hive.propose("alice", "{ }\n# other\n")
    before = verdict(hive, asked)
    shown = hive.ask(cmd="show", id=asked)["approval"]
    assert hive.approve(other)["phase"] == "deployed"
    now = wait_for(
        lambda: (row := hive.ask(cmd="show", id=asked)["approval"])["base_sha"] != shown["base_sha"] and row,
        "the comparison with what runs now",
    )
    assert now["digest"] != shown["digest"] and "# other" in now["diff"]
    assert verdict(hive, asked)["state"] == "ok" and before["state"] == "ok"
    assert hive.ask(cmd="deny", id=asked)["ok"]
