"""The hive as a service of a machine: a Debian with systemd, Nix and real containers, in a box. See hostbox.py.

All tests share one box, in which manager, alice and bob run. A test leaves them running; configs may differ.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import precheck
import psutil
import pytest
from hostbox import Box, Terminal, commands
from precheck import builders, verdict

pytestmark = [
    pytest.mark.needs("debootstrap", "systemd-nspawn", "nsenter"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for containers"),
    pytest.mark.timeout(900),  # the first test of all waits for debootstrap
]

CREW = ("manager", "alice", "bob")


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with Box() as running:
        for name in CREW[1:]:
            spawned(running, name)
        are_idle(running, *CREW)
        yield running


# ── what the tests do again and again ──


def spawned(box: Box, name: str) -> None:
    answer = box.ask(cmd="spawn", name=name)
    assert answer["ok"], answer


def row(box: Box, name: str) -> dict[str, Any]:
    return next((one for one in box.ask(cmd="agents")["agents"] if one["name"] == name), {})


def are_idle(box: Box, *names: str) -> None:
    """Their harnesses have said hello, and their mail is done."""
    box.wait_for(lambda: all(row(box, name).get("state") == "idle" for name in names), f"{names}", timeout_s=120)


def leader(box: Box, name: str) -> str:
    """Changes when a container is started again."""
    return box.run("machinectl", "show", f"h-{name}", "--property=Leader", "--value").strip()


def inside(box: Box, name: str, *argv: str, stdin: str = "") -> str:
    """A program in an agent's container, as its root."""
    enter = ("nsenter", "--target", leader(box, name), "--all", "--wdns=/")
    return box.run(*enter, "env", "-i", "HOME=/root", "PATH=/run/current-system/sw/bin:/usr/bin", *argv, stdin=stdin)


def tool(box: Box, tool: str, **arguments: Any) -> dict[str, Any]:
    """One of the manager's tools, as Claude would use it: in the container, through the harness."""
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
    answer = json.loads(inside(box, "manager", "hyperhive-harness", "mcp", stdin=json.dumps(call) + "\n"))
    (content,) = answer["result"]["content"]
    assert not answer["result"].get("isError"), content
    return json.loads(content["text"])


def commit(box: Box, name: str, config: str) -> str:
    """A commit in the manager's checkout of an agent's config."""
    script = f"cd /state/configs/{name}; cat > agent.nix; git commit --quiet --all --message=change; git rev-parse HEAD"
    return inside(box, "manager", "sh", "-euc", script, stdin=config).strip()


def proposal(box: Box, name: str, config: str) -> int:
    """The manager's request for this config."""
    tool(box, "checkout_config", agent=name)
    sha = commit(box, name, config)
    return int(tool(box, "request_apply_commit", agent=name, sha=sha, description="a change")["id"])


def approved(box: Box, approval: int) -> int:
    answer = box.ask(cmd="approve", id=approval)
    assert answer["ok"], answer
    return int(box.ask(cmd="show", id=approval)["approval"]["deploy_id"])


def ended(box: Box, deploy: int) -> dict[str, Any]:
    def look() -> Any:
        (found,) = box.ask(cmd="deploys", id=deploy)["deploys"]
        return found if found["phase"] in ("deployed", "failed") else None

    return box.wait_for(look, f"the end of deploy {deploy}", timeout_s=60)


def painted(colour: str, more: str = "") -> str:
    """A config by which a container is known."""
    return f'{{ pkgs, ... }}:\n{{\n  services.hyperhive.harness.environment.COLOUR = "{colour}";\n  {more}\n}}\n'


def colour(box: Box, name: str) -> str:
    """Of the harness that runs."""
    script = "tr '\\0' '\\n' < /proc/$(systemctl show hyperhive-harness --property=MainPID --value)/environ"
    found = re.search(r"^COLOUR=(.*)$", inside(box, name, "sh", "-euc", script), re.MULTILINE)
    return found[1] if found else ""


def built_by(script: str) -> str:
    """A line for a config: a package that this script builds."""
    return f"""environment.systemPackages = [ (derivation {{
      name = "trial"; system = pkgs.stdenv.hostPlatform.system; PATH = "/usr/bin";
      builder = "/bin/sh"; args = [ "-euc" ''{script}'' ];
    }}) ];"""


# ── agents ──


def test_an_agent_has_what_it_needs_and_no_more(box: Box) -> None:
    for place in ("/state", "/shared", "/root/.claude"):
        inside(box, "alice", "touch", f"{place}/trial")
    for place in ("/run/hive", "/operator"):
        with pytest.raises(AssertionError, match="Read-only file system"):
            inside(box, "alice", "touch", f"{place}/trial")
    with pytest.raises(AssertionError, match="Operation not permitted"):
        inside(box, "alice", "python3", "-c", "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)")
    url, _, token = row(box, "alice")["url"].partition("#token=")
    page = box.run("curl", "--silent", "--fail", "--header", f"Authorization: Bearer {token}", f"{url}api/state")
    assert json.loads(page)["agent"]["name"] == "alice"


def test_root_in_a_container_is_nobody_outside(box: Box) -> None:
    """`privateUsers = "pick"`: and yet what it writes belongs to root, by idmapped binds."""
    assert "PRIVATE_USERS=pick" in (box.root / "etc/nixos-containers/h-bob.conf").read_text()
    assert int(box.run("stat", "--format=%u", f"/proc/{leader(box, 'bob')}")) >= 65536
    inside(box, "bob", "touch", "/state/mine")
    assert (box.root / "var/lib/hyperhive/agents/bob/state/mine").stat().st_uid == 0


def test_a_container_has_limits_and_systemd_leaves_its_crashes_to_the_hive(box: Box) -> None:
    limits = box.unit("container@h-bob", "Restart", "MemoryMax", "CPUQuotaPerSecUSec", "TasksMax")
    assert limits == {"Restart": "no", "MemoryMax": str(4 << 30), "CPUQuotaPerSecUSec": "2s", "TasksMax": "4096"}
    before = leader(box, "bob")
    box.run("sh", "-c", f"kill -KILL {before}")
    box.wait_for(
        lambda: [m for m in box.ask(cmd="inbox")["messages"] if m.get("kind") == "container_crash"], "the news"
    )
    are_idle(box, "bob")
    assert leader(box, "bob") != before


def test_mail_becomes_a_turn(box: Box) -> None:
    """Claude, here the rehearsal, is started by the harness of the unit and has the programs of its config."""
    step = {"tool": "Bash", "input": {"command": "command -v git; pwd"}}
    sent = box.ask(cmd="send", to="alice", body=f"rehearse: {json.dumps([step])}")
    assert sent["ok"], sent

    def results() -> list[str]:
        events = box.ask(cmd="events", name="alice")["events"]
        return [event["data"]["output"] for event in events if event["kind"] == "tool_result"]

    box.wait_for(results, "what the tool said")
    assert results() == ["/run/current-system/sw/bin/git\n/state"]
    are_idle(box, "alice")


def test_logs_are_the_harness_own(box: Box) -> None:
    assert "page on http://127.0.0.1:" in box.run("hyperhive", "logs", "alice")


def test_a_spawn_that_was_asked_for_becomes_a_container(box: Box) -> None:
    approval = int(tool(box, "request_spawn", name="carol", description="a helper", config=painted("white"))["id"])
    assert row(box, "carol") == {}
    assert ended(box, approved(box, approval))["phase"] == "deployed"
    are_idle(box, "carol")
    assert colour(box, "carol") == "white"
    assert box.unit("container@h-carol", "Type", "ActiveState") == {"Type": "notify", "ActiveState": "active"}
    assert box.ask(cmd="destroy", name="carol", purge=True)["ok"]
    places = ["etc/nixos-containers", "var/lib/nixos-containers", "nix/var/nix/profiles/per-container"]
    places += ["nix/var/nix/gcroots/per-container", "var/lib/hyperhive/agents", "var/lib/hyperhive/deploy"]
    assert [path for place in places for path in (box.root / place).glob("*carol*")] == []
    assert not box.try_run("sh", "-c", "ls -d /run/systemd/system/*carol* /run/hyperhive/agents/carol")


# ── before the decision ──


def precheck_log(box: Box, approval: int) -> str:
    return "\n".join(box.read(f"/api/approvals/{approval}/precheck")["log"])


@pytest.mark.parametrize("case", precheck.CASES.values(), ids=precheck.CASES)
def test_what_is_found_out_about_a_config_that_waits(box: Box, case: precheck.Case) -> None:
    asked = proposal(box, "alice", case.config(built_by))
    found = verdict(box, asked)
    case.check(found, precheck_log(box, asked))
    if case.at:
        assert case.line in precheck.line_of(box.ask(cmd="show", id=asked)["approval"]["diff"], case.at)
    if case.state == "ok":
        sizes = {package["name"]: package["bytes"] for package in found["packages"]}
        assert 2_900_000 < sizes["trial"] < 3_100_000, sizes
    assert box.ask(cmd="deny", id=asked)["ok"]


def test_a_pre_check_that_hangs_is_ended_by_the_daemon_of_nix_too(box: Box) -> None:
    (settings,) = re.findall(r"HYPERHIVE_CONFIG=(\S+)", box.unit("hyperhive", "Environment")["Environment"])
    (box.root / "etc/hasty.toml").write_text(f"precheck_timeout_s = 20.0\n{box.run('cat', settings)}")
    box.drop_in("Environment=HYPERHIVE_CONFIG=/etc/hasty.toml")
    box.run("systemctl", "restart", "hyperhive")
    are_idle(box, *CREW)
    asked = proposal(box, "alice", precheck.HANGS.config(built_by))
    precheck.HANGS.check(verdict(box, asked), precheck_log(box, asked))
    box.wait_for(lambda: not builders(), "the end of the build")
    assert box.ask(cmd="deny", id=asked)["ok"]
    box.drop_in("")
    box.run("systemctl", "restart", "hyperhive")
    are_idle(box, *CREW)


# ── deploys ──


def test_what_does_not_build_changes_nothing(box: Box) -> None:
    before, sha = leader(box, "alice"), row(box, "alice")["deployed_sha"]
    approval = proposal(box, "alice", painted("red", built_by("echo the shelf is empty; exit 1")))
    deploy = ended(box, approved(box, approval))
    assert deploy["phase"] == "failed"
    shown = box.ask(cmd="show", id=approval)["approval"]
    assert shown["status"] == "failed" and "the shelf is empty" in shown["error"]
    assert (leader(box, "alice"), row(box, "alice")["deployed_sha"]) == (before, sha)
    assert colour(box, "alice") != "red"


def test_a_change_and_back(box: Box) -> None:
    for wanted in ("green", "blue"):
        assert ended(box, approved(box, proposal(box, "alice", painted(wanted))))["phase"] == "deployed"
        assert colour(box, "alice") == wanted
    assert ended(box, box.ask(cmd="rollback", name="alice")["deploy"])["phase"] == "deployed"
    assert colour(box, "alice") == "green"
    are_idle(box, "alice")


def test_two_deploys_at_once(box: Box) -> None:
    slow = {name: built_by(f"sleep 1; echo {name} > $out") for name in ("alice", "bob")}
    approvals = [proposal(box, name, painted(f"{name}s", build)) for name, build in slow.items()]
    deploys = [ended(box, deploy) for deploy in [approved(box, approval) for approval in approvals]]
    assert [deploy["phase"] for deploy in deploys] == ["deployed", "deployed"]
    assert max(deploy["started_at"] for deploy in deploys) < min(deploy["ended_at"] for deploy in deploys)
    assert (colour(box, "alice"), colour(box, "bob")) == ("alices", "bobs")
    assert list((box.root / "var/lib/hyperhive/deploy").rglob(".tmp")) == []
    are_idle(box, "alice", "bob")


def test_what_was_shown_is_built_whatever_becomes_of_the_checkout(box: Box) -> None:
    approval = proposal(box, "bob", painted("grey"))
    before = box.ask(cmd="show", id=approval)["approval"]
    commit(box, "bob", painted("black"))
    inside(box, "manager", "sh", "-euc", "cd /state/configs/bob && git branch --force hive/main main")
    now = box.ask(cmd="show", id=approval)["approval"]
    shown = ("fetched_sha", "base_sha", "commit_ref", "diff", "digest")
    assert [now[field] for field in shown] == [before[field] for field in shown] and '"grey"' in now["diff"]
    deploy = ended(box, approved(box, approval))
    assert deploy["phase"] == "deployed"
    assert colour(box, "bob") == "grey"
    inside(box, "manager", "rm", "-r", "/state/configs/bob")
    assert ended(box, box.ask(cmd="rebuild", name="bob")["deploy"])["phase"] == "deployed"
    assert colour(box, "bob") == "grey"
    are_idle(box, "bob")


def test_a_daemon_that_dies_in_the_middle_of_a_deploy_does_it_again(box: Box) -> None:
    deploy = approved(box, proposal(box, "bob", painted("pink", built_by("sleep 3; mkdir $out"))))
    box.wait_for(lambda: box.ask(cmd="deploys", id=deploy)["deploys"][0]["phase"] == "building", "the build")
    before = box.unit("hyperhive", "MainPID")
    box.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "hyperhive")
    box.wait_for(lambda: box.unit("hyperhive", "MainPID") != before, "the end of the daemon")
    box.wait_for(lambda: box.unit("hyperhive", "ActiveState")["ActiveState"] == "active", "the service to be back")
    assert ended(box, deploy)["phase"] == "deployed"
    assert colour(box, "bob") == "pink"
    are_idle(box, *CREW)


# ── the keyboard ──

# A Claude with a script for each side: the rehearsal for the harness, and for a person what ends as it is told to and
# not without its terminal.
CLAUDE = """\
#!/bin/sh
case "$*" in auth* | "-p "* | *" -p "*) exec hyperhive-harness rehearsal "$@" ;; esac
[ -t 0 ] && [ -t 1 ] && echo "Claude at a terminal: $*"
trap '' HUP
read -r status && exit "$status"
while :; do sleep 1; done
"""


@pytest.fixture(scope="module")
def alice(box: Box) -> str:
    """She has had a turn, and so a session; its id."""
    inside(box, "alice", "sh", "-c", "cat > /state/claude && chmod 755 /state/claude", stdin=CLAUDE)
    harness = '{ environment.HYPERHIVE_CLAUDE = "/state/claude"; mcpServers.more.command = "/bin/more"; }'
    asked = proposal(box, "alice", f"{{ services.hyperhive.harness = {harness}; }}\n")
    assert ended(box, approved(box, asked))["phase"] == "deployed"
    sent = box.ask(cmd="send", to="alice", body="hello")
    box.wait_for(lambda: is_done(box, sent["id"]), "a turn")
    return session(box)


def session(box: Box) -> str:
    known = json.loads((box.root / "var/lib/hyperhive/agents/alice/state/session.json").read_text())
    return str(known["session"])


def is_done(box: Box, message: int) -> bool:
    messages = box.read("/api/messages?with=alice&max=1000")["messages"]
    return any(one["id"] == message and one["state"] == "acked" for one in messages)


def at_keyboard(box: Box) -> list[psutil.Process]:
    """The Claudes that a person talks to."""
    running = commands(box.leader).items()
    return [process for process, line in running if "/bin/sh /state/claude" in line and " -p " not in line]


def kill_the_command(terminal: Terminal) -> None:
    running = commands(terminal.command.pid).items()
    (command,) = [process for process, line in running if "-m hyperhive" in line]
    command.kill()


def restart_the_daemon(box: Box) -> None:
    box.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "hyperhive")


ENDS: dict[str, Callable[[Box, Terminal], object]] = {
    "exit 0": lambda box, terminal: terminal.type("0\n"),
    "exit 1": lambda box, terminal: terminal.type("1\n"),
    "the terminal goes": lambda box, terminal: terminal.hang_up(),
    "the command is killed": lambda box, terminal: kill_the_command(terminal),
    "the daemon is killed": lambda box, terminal: restart_the_daemon(box),
}


@pytest.mark.parametrize("leave", ENDS.values(), ids=ENDS)
def test_an_operator_takes_the_session_over_and_leaves_it(
    box: Box, alice: str, leave: Callable[[Box, Terminal], object]
) -> None:
    with Terminal(box, "hyperhive", "attach", "alice") as terminal:
        shown = terminal.wait_for(f"--resume={alice}")
        assert "Claude at a terminal: " in shown and "--mcp-config=/state/hyperhive-mcp-attached.json" in shown
        (claude,) = at_keyboard(box)
        assert claude.uids().real >= 65536 and "/container@h-alice.service/" in group_of(claude)
        servers = json.loads(inside(box, "alice", "cat", "/state/hyperhive-mcp-attached.json"))["mcpServers"]
        assert servers.keys() == {"hive", "more"}
        assert (row(box, "alice")["state"], row(box, "alice")["attached"]) == ("paused", True)
        sent = box.ask(cmd="send", to="alice", body="are you there?")
        time.sleep(1)
        assert not is_done(box, sent["id"])
        leave(box, terminal)
        box.wait_for(lambda: box.try_run("hyperhive", "list") and is_done(box, sent["id"]), "the loop to go on")
        box.wait_for(lambda: terminal.command.poll() is not None, "the end of the command")
    box.wait_for(lambda: at_keyboard(box) == [], "the end of the Claude at the keyboard")
    are_idle(box, *CREW)
    assert "attached" not in row(box, "alice") and session(box) == alice


def group_of(process: psutil.Process) -> str:
    return Path(f"/proc/{process.pid}/cgroup").read_text()


# ── the service ──


def bind_source(box: Box, name: str) -> int:
    return box.path(f"/run/hyperhive/agents/{name}").stat().st_ino


def test_the_unit_is_understood_and_ready(box: Box) -> None:
    assert box.unit("hyperhive", "Type", "ActiveState", "WatchdogUSec", "StatusText") == {
        "Type": "notify",
        "ActiveState": "active",
        "WatchdogUSec": "1min",
        "StatusText": "serving http://127.0.0.1:7000/",
    }
    assert box.run("systemd-analyze", "verify", "hyperhive.service") == ""


def test_a_restart_disturbs_nobody(box: Box) -> None:
    before = [(leader(box, name), bind_source(box, name)) for name in CREW]
    box.run("systemctl", "stop", "hyperhive")
    assert [(leader(box, name), bind_source(box, name)) for name in CREW] == before
    box.run("systemctl", "start", "hyperhive")
    are_idle(box, *CREW)
    assert [(leader(box, name), bind_source(box, name)) for name in CREW] == before
    assert ended(box, box.ask(cmd="rebuild", name="alice")["deploy"])["phase"] == "deployed"
    are_idle(box, "alice")


def test_a_newer_hyperhive_reaches_agents_when_they_are_rebuilt(box: Box) -> None:
    before = leader(box, "alice")
    with (box.root / "opt/hyperhive/harness.py").open("a") as file:
        file.write("# newer\n")
    box.switch()
    are_idle(box, *CREW)
    assert leader(box, "alice") == before and row(box, "alice")["needs_update"]
    assert ended(box, box.ask(cmd="rebuild", name="alice")["deploy"])["phase"] == "deployed"
    assert [row(box, name)["needs_update"] for name in CREW] == [True, False, True]
    script = "tail --lines=1 $(dirname $(readlink -f /run/current-system/sw/bin/hyperhive))/../lib/hyperhive/harness.py"
    assert inside(box, "alice", "sh", "-euc", script) == "# newer\n"
    are_idle(box, "alice")


def test_without_runtime_directory_preserve_a_restart_cuts_them_off(box: Box) -> None:
    """Why the line is there: the folders that are bound into running containers would be gone."""
    before = bind_source(box, "alice")
    box.drop_in("RuntimeDirectoryPreserve=no")
    box.run("systemctl", "restart", "hyperhive")
    assert bind_source(box, "alice") != before
    assert inside(box, "alice", "ls", "/run/hive") == ""
    box.drop_in("")
    for name in CREW:
        assert box.ask(cmd="restart", name=name)["ok"]
    are_idle(box, *CREW)


def test_a_daemon_that_hangs_is_killed_and_comes_back(box: Box) -> None:
    before = leader(box, "alice")
    box.drop_in("WatchdogSec=8\nTimeoutAbortSec=1")
    box.run("systemctl", "restart", "hyperhive")
    time.sleep(10)  # it lives longer than that, if it may
    assert box.unit("hyperhive", "NRestarts")["NRestarts"] == "0"
    box.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "hyperhive")
    box.wait_for(lambda: box.unit("hyperhive", "NRestarts")["NRestarts"] != "0", "the watchdog", timeout_s=60)
    box.wait_for(lambda: box.unit("hyperhive", "ActiveState")["ActiveState"] == "active", "the service to be back")
    assert "Watchdog timeout" in box.journal("hyperhive")
    assert box.unit("hyperhive", "NRestarts")["NRestarts"] == "1"
    are_idle(box, *CREW)
    assert leader(box, "alice") == before
    box.drop_in("")
    box.run("systemctl", "restart", "hyperhive")
    are_idle(box, *CREW)


def test_after_a_reboot_run_those_that_ran(box: Box) -> None:
    assert box.ask(cmd="stop", scope={"agent_names": ["bob"]}, graceful=True)["ok"]
    box.reboot()
    are_idle(box, "manager", "alice")
    assert row(box, "bob")["state"] == "stopped"
    assert "bob" not in box.run("machinectl", "list")
    assert box.ask(cmd="start", scope={"agent_names": ["bob"]})["ok"]
    are_idle(box, *CREW)
