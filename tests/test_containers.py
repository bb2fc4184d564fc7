"""NixOS containers: the conf file, every trap of `nixos-container`, and harnesses in real systemd-nspawn.

What a machine without NixOS can't have is in tests/fakes and is not kinder than the real thing; Nix builds for real,
and containers are real ones. See tests/nixos.py.
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.systemd import environment_file
from hive import ROOT, end, listens, processes_of, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from nixos import NixosHive

import hyperhive
from hyperhive import Config, NixosContainers, Refused, parse_conf, render_conf

EMPTIED = ["HOST_ADDRESS", "LOCAL_ADDRESS", "HOST_ADDRESS6", "LOCAL_ADDRESS6", "LOCAL_MAC_ADDRESS"]
EMPTIED += ["HOST_BRIDGE", "HOST_PORT"]


def real(test: Any) -> Any:
    test = pytest.mark.needs("nix", "systemd-nspawn")(test)
    test = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for containers")(test)
    return pytest.mark.timeout(300)(test)


def config(**trial: str) -> str:
    """An agent.nix whose build, or whose container before the harness, runs a script."""
    settings = "".join(f"  trial.{key} = ''{value}'';\n" for key, value in trial.items())
    return f"{{ pkgs, ... }}:\n{{\n  environment.systemPackages = [ pkgs.git ];\n{settings}}}\n"


def messages(hive: NixosHive, kind: str) -> list[dict[str, Any]]:
    return [row for row in hive.ask(cmd="inbox", max=1000)["messages"] if row.get("kind") == kind]


def row(hive: NixosHive, name: str) -> dict[str, Any]:
    return next(row for row in hive.ask(cmd="agents", kept=True)["agents"] if row["name"] == name)


# ── the conf file ──

keys = st.from_regex(r"[A-Z][A-Z0-9_]{0,8}", fullmatch=True)
values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@given(st.dictionaries(keys, values))
def test_what_is_rendered_is_read_again_by_systemds_rules_and_by_ours(settings: dict[str, str]) -> None:
    assert parse_conf(render_conf(settings)) == settings
    assert environment_file(render_conf(settings)) == settings


@settings(max_examples=500)
@given(st.text("AB=='\"\\\n \t#;$`x\r", max_size=40))
def test_any_text_is_read_as_systemd_reads_it(text: str) -> None:
    assert parse_conf(text) == environment_file(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("x=a \\", "a "), ("x=\\", ""), ('x="a" \\', "a"), ('x="a\n', "a\n"), ("x=a  \\\n", "a  "), ("x=a  ", "a")],
)
def test_the_end_of_a_file_is_read_as_a_real_systemd_reads_it(text: str, value: str) -> None:
    assert parse_conf(text) == environment_file(text) == {"x": value}


@pytest.fixture
def programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH with programs that are there, and do nothing."""
    place = folder / "bin"
    place.mkdir()
    for name in ("nixos-container", "nix", "systemctl", "journalctl"):
        (place / name).write_text("#!/bin/sh\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def containers(folder: Path, **settings: Any) -> NixosContainers:
    (folder / "etc").mkdir(exist_ok=True)
    paths = {"state_dir": folder / "state", "runtime_dir": folder / "run", "conf_dir": folder / "etc"}
    return NixosContainers(Config(**{**paths, "source": str(folder), **settings}))


def test_our_keys_are_set_and_all_others_kept(folder: Path, programs: Path) -> None:
    ours = containers(folder)
    flake = str(folder / "state/deploy/alice")

    @given(st.dictionaries(keys, values))
    def rewritten(foreign: dict[str, str]) -> None:
        conf = folder / "etc/h-alice.conf"
        conf.write_text(render_conf(foreign | {"PRIVATE_NETWORK": "1", "HOST_ADDRESS": "10.233.1.1", "FLAKE": flake}))
        ours.rewrite_conf("alice")
        after = environment_file(conf.read_bytes().decode())
        flags = after.pop("EXTRA_NSPAWN_FLAGS").split(" ")
        assert flags[0] == "--drop-capability=CAP_NET_RAW"
        assert [flag.rsplit(":", 2)[1] for flag in flags[1:]] == [
            "/root/.claude", "/state", "/shared", "/operator", "/run/hive",
        ]  # fmt: skip
        own = {"PRIVATE_NETWORK": "0", "PRIVATE_USERS": "pick", **dict.fromkeys(EMPTIED, "")}
        assert after == foreign | {"FLAKE": flake} | own
        assert conf.stat().st_mode & 0o777 == 0o644
        assert [path.name for path in conf.parent.iterdir()] == [conf.name]

    rewritten()


@given(st.from_regex(hyperhive.BINDABLE, fullmatch=True))
def test_a_path_that_is_taken_survives_unquoted_expansion(path: str) -> None:
    hyperhive.check_bindable(Path(path), "it")
    flags = f"--bind={path}/claude:/root/.claude --bind-ro={path}:/run/hive"
    split = subprocess.run(
        ["bash", "-c", 'printf "%s\\0" $FLAGS'], env={"FLAGS": flags}, cwd="/", capture_output=True, check=True
    )
    assert split.stdout.decode().rstrip("\0").split("\0") == flags.split(" ")


@pytest.mark.parametrize("character", list(" \t\n'\"\\*?[]{}:;#%&$`<>|()!~^ä"))
def test_a_path_that_would_be_split_or_globbed_is_refused_at_the_start(
    folder: Path, programs: Path, character: str
) -> None:
    for what in ("state_dir", "runtime_dir"):
        with pytest.raises(Refused, match="can't be used for NixOS containers") as refused:
            containers(folder, **{what: folder / f"a{character}b"})
        assert refused.value.code == "usage" and "choose a path" in refused.value.hint


def serve(*options: str | Path, path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "hyperhive.py", "serve", *options]
    return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, timeout=30)


def test_the_daemon_refuses_a_folder_with_a_space(folder: Path, programs: Path) -> None:
    refused = serve("--dir", folder / "my hive", "--port", "1", path=os.environ["PATH"])
    assert refused.returncode == 2, refused.stderr
    assert f"the state folder '{folder}/my hive/state' can't be used" in refused.stderr


def test_without_nixos_container_the_daemon_says_what_is_missing(folder: Path) -> None:
    refused = serve("--dir", folder / "hive", path="/nonexistent")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "no nixos-container and no nix" in refused.stderr and "--containers process" in refused.stderr


def test_unknown_kinds_of_containers_and_users_are_refused(folder: Path, programs: Path) -> None:
    refused = serve("--dir", folder / "hive", "--containers", "docker", path=os.environ["PATH"])
    assert refused.returncode == 2 and "invalid choice: 'docker'" in refused.stderr
    (folder / "hive.toml").write_text('containers = "docker"\n')
    refused = serve("--dir", folder / "hive", "--config", folder / "hive.toml", path=os.environ["PATH"])
    assert refused.returncode == 2 and '"nixos" and "process"' in refused.stderr
    with pytest.raises(Refused, match="private_users"):
        containers(folder, private_users="some")


@pytest.mark.parametrize("text", ['a"b', "a\\b", "${x}", "$x", "a\nb", "''", "#"])
@pytest.mark.needs("nix")
def test_text_in_a_flake_stays_text(text: str) -> None:
    command = ["nix-instantiate", "--eval", "--strict", "--json", "--expr", hyperhive.nix_string(text)]
    shown = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "HOME": "/nonexistent"}
    )
    assert json.loads(shown.stdout) == text


def test_the_source_has_a_name_that_changes_with_it(folder: Path) -> None:
    (folder / "static").mkdir()
    names = [hyperhive.hash_of_source(folder)]
    for path in ("harness.py", "static/app.js", "module.nix"):
        (folder / path).write_text("x")
        names.append(hyperhive.hash_of_source(folder))
    (folder / "unrelated").write_text("x")
    assert len(set(names)) == 4 and hyperhive.hash_of_source(folder) == names[-1]


# ── a long output, and one that does not end ──


def aloud(folder: Path, script: str, *, timeout_s: float = 60) -> list[str]:
    said: list[str] = []
    hyperhive.run_aloud(
        ["sh", "-c", script],
        env=os.environ,
        cwd=folder,
        say=said.extend,
        timeout_s=timeout_s,
        stop=hyperhive.threading.Event(),
    )
    return said[1:]


def test_of_a_long_output_the_ends_are_kept(folder: Path) -> None:
    said = aloud(folder, "echo first; yes 0123456789 | head -c 100000000; echo; echo last")
    assert (said[0], said[-1]) == ("first", "last")
    assert sum(map(len, said)) < 500_000
    [left_out] = [line for line in said if line.endswith("bytes left out) …")]
    assert 99_000_000 < int(left_out.split()[1].lstrip("(")) < 100_000_000


@given(st.lists(st.binary(max_size=40), max_size=30))
def test_a_short_output_is_whole_however_it_comes(chunks: list[bytes]) -> None:
    said: list[str] = []
    excerpt = hyperhive.Excerpt(said.extend)
    for chunk in chunks:
        excerpt.take(chunk)
    excerpt.close()
    whole = b"".join(chunks).decode(errors="replace").removesuffix("\n")
    assert [line.rstrip("\r") for line in whole.split("\n")] == (said or [""])


def test_what_does_not_end_is_ended_with_all_it_started(folder: Path) -> None:
    with pytest.raises(Refused, match="did not end within"):
        aloud(folder, "sleep 1000 & sh -c 'trap \"\" TERM; sleep 1000'", timeout_s=0.5)
    wait_for(lambda: not processes_of(folder), "the end of them all")


def test_memory_has_a_ceiling_where_one_is_set() -> None:
    with pytest.raises(Refused, match="MemoryError"):
        hyperhive.run([sys.executable, "-c", "bytearray(10**9)"], env={}, memory_bytes=300 * 1024 * 1024)


def test_a_process_may_call_itself_anything() -> None:
    script = r"open('/proc/self/comm', 'wb').write(b'\xc3'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout and child.stdout.readline()
        assert hyperhive.start_time_of(child.pid)
        child.stdin.write(b"\n")


def test_a_grandchild_that_holds_the_pipe_is_not_waited_for(folder: Path) -> None:
    with pytest.raises(Refused, match="failed with status 3"):
        aloud(folder, "sleep 1000 & exit 3")
    end(processes_of(folder))


BOASTER = """
import ctypes, mmap, signal, struct
size = 1 << 28
room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(room))
stat = [0, 0, 0, *open("/proc/self/stat").read().rpartition(")")[2].split()]
known = [int(stat[number]) for number in (26, 27, 45, 46, 47, 47, 28, 48, 49)]
wanted = struct.pack("=12QIi", *known, start, start + size, 0, 0, -1)
assert ctypes.CDLL(None).prctl(35, 14, wanted, len(wanted), 0) == 0  # PR_SET_MM, PR_SET_MM_MAP
print("ready", flush=True)
signal.pause()
"""
SEARCH = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
import harness, hyperhive
print(hyperhive.processes_with("NOBODY=has this"), harness.sweep_orphans("nobody's"))
"""


def test_an_environment_of_any_size_harms_nobody_who_looks(folder: Path) -> None:
    """Every process, in a container, too, may say that a quarter of a gigabyte of zeros is its environment."""
    boaster = subprocess.Popen([sys.executable, "-c", BOASTER], stdout=subprocess.PIPE, text=True)
    try:
        assert boaster.stdout and boaster.stdout.readline() == "ready\n"
        command = [sys.executable, "-c", SEARCH]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert found.stdout == "[] 0\n", found.stderr
    finally:
        boaster.kill()
        boaster.communicate()


# ── in real containers ──


@pytest.fixture
def hive(folder: Path) -> Iterator[NixosHive]:
    with NixosHive(folder) as running:
        yield running


PROBE = """
{
  id -u
  touch /run/hive/x 2>&1 || echo refused
  touch /operator/x 2>&1 || echo refused
  for place in /state /root/.claude /shared; do echo kept > $place/probe && echo $place; done
  /usr/bin/python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 768)' 2>&1 | tail -n 1
  cat /proc/self/uid_map
} > /state/seen 2>&1
"""


@real
@pytest.mark.parametrize("private_users", ["pick", "no"])
def test_an_agent_in_its_container(folder: Path, private_users: str) -> None:
    with NixosHive(folder, private_users=private_users) as hive:
        deploy = hive.change("alice", config(run=PROBE))
        assert deploy["phase"] == "deployed", deploy
        state = hive.state / "agents/alice/state"
        seen = (state / "seen").read_text().splitlines()
        assert seen[0] == "0"
        assert "Read-only file system" in seen[1] and seen[2] == "refused"
        assert "Read-only file system" in seen[3] and seen[4] == "refused"
        assert seen[5:8] == ["/state", "/root/.claude", "/shared"]
        assert seen[8] == "PermissionError: [Errno 1] Operation not permitted"
        assert (seen[9].split()[1] == "0") == (private_users == "no")
        for path in (state, hive.state / "agents/alice/claude", hive.state / "shared"):
            assert (path / "probe").read_text() == "kept\n" and (path / "probe").stat().st_uid == 0
        check_page(hive, "alice")
        answer_mail(hive, "alice", "hello")
        assert any("connected as alice" in line for line in hive.ask(cmd="logs", name="alice")["lines"])


def check_page(hive: NixosHive, name: str) -> None:
    token = (hive.run / "agents" / name / "ui-token").read_text()
    port = row(hive, name)["port"]
    wait_for(lambda: listens(port), f"the page of {name}")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/api/state", headers={"Authorization": f"Bearer {token}"})
    with connection.getresponse() as response:
        assert response.status == 200 and json.loads(response.read())["agent"]["name"] == name
    connection.close()


def answer_mail(hive: NixosHive, name: str, text: str) -> None:
    """A message is answered by a turn of the harness in the container."""
    number = hive.ask(cmd="send", to=name, body=text)["id"]

    def acknowledged() -> bool:
        mail = hive.api("GET", f"/api/messages?with={name}&max=1000").body["messages"]
        return any(message["id"] == number and message["state"] == "acked" for message in mail)

    wait_for(acknowledged, f"{name} to work through {text!r}", timeout_s=30)


@real
def test_limits_and_restarts_are_in_a_drop_in(folder: Path) -> None:
    with NixosHive(folder, memory_max="1G", cpu_quota="50%", tasks_max=100) as hive:
        hive.spawn("alice")
        drop_in = hive.nixos / "run/container@h-alice.service.d/50-hyperhive.conf"
        assert {"MemoryMax=1G", "CPUQuota=50%", "TasksMax=100", "Restart=no"} <= set(drop_in.read_text().splitlines())
        hive.ask(cmd="destroy", name="alice")
        assert not drop_in.parent.exists()


@real
def test_limits_that_systemd_was_not_told_of_are_told_before_a_start(hive: NixosHive) -> None:
    """The file was written, and then the daemon was killed, say."""
    hive.spawn("alice")
    hive.stop()
    read_by_systemd = hive.units / "container@h-alice.service/drop-in"
    read_by_systemd.unlink()
    hive.start()
    for verb in ("stop", "start"):
        assert (answer := hive.ask(cmd=verb, scope={"agent_names": ["alice"]}))["ok"], answer
    assert "MemoryMax=" in read_by_systemd.read_text()


@real
def test_destroyed_and_revived_and_purged(hive: NixosHive) -> None:
    hive.spawn("alice")
    notes = hive.state / "agents/alice/state/notes.md"
    notes.write_text("remember")
    assert not (hive.state / "deploy/alice/.tmp").is_symlink()
    assert hive.ask(cmd="destroy", name="alice")["ok"]
    assert hive.program("nixos-container", "list") == ""
    assert hive.program("nixos-container", "status", "h-alice", accept=[*range(1, 256)]) == "gone\n"
    assert not (hive.nixos / "var/h-alice").exists() and not (hive.state / "deploy/alice").exists()
    hive.spawn("alice")
    assert notes.read_text() == "remember"
    assert hive.ask(cmd="destroy", name="alice", purge=True)["ok"]
    assert not notes.exists() and not hive.conf("alice").exists()


@real
def test_a_config_that_fails_to_build_leaves_the_old_one_running(hive: NixosHive) -> None:
    assert hive.change("alice", config())["phase"] == "deployed"
    before, sha = hive.leader("alice"), row(hive, "alice")["deployed_sha"]
    for broken, words in (
        (config(build="echo no such luck >&2; exit 7"), "no such luck"),
        ("{ x }: oh", "undefined variable 'oh'"),
    ):
        approval = hive.propose("alice", broken)
        assert hive.approve(approval)["phase"] == "failed"
        shown = hive.ask(cmd="show", id=approval)["approval"]
        assert shown["status"] == "failed" and words in shown["error"], shown
        assert (hive.leader("alice"), row(hive, "alice")["deployed_sha"]) == (before, sha)
    answer_mail(hive, "alice", "still there?")


@real
def test_a_spawn_that_fails_leaves_nothing(hive: NixosHive) -> None:
    assert hive.change("bob", config(build="exit 1"))["phase"] == "failed"
    assert hive.change("carol", config(run="exit 1"))["phase"] == "failed"  # it is created, and does not start
    assert hive.ask(cmd="list")["agents"] == ["manager"]
    assert hive.program("nixos-container", "list") == "h-manager\n"
    assert hive.change("bob", config())["phase"] == "deployed"


@real
def test_a_config_that_never_says_hello_is_switched_back(folder: Path) -> None:
    with NixosHive(folder, hello_s=15.0) as hive:
        assert hive.change("alice", config())["phase"] == "deployed"
        sha = row(hive, "alice")["deployed_sha"]
        deploy = hive.change("alice", config(run="touch /state/was-here", command="/usr/bin/sleep 1000"))
        assert deploy["phase"] == "failed" and any("falling back" in line for line in deploy["log"])
        assert (hive.state / "agents/alice/state/was-here").exists()
        answer_mail(hive, "alice", "back?")
        assert row(hive, "alice")["deployed_sha"] == sha


@real
@pytest.mark.parametrize("point", ["conf", "built", "set"])
def test_nixos_container_killed_in_the_middle(hive: NixosHive, point: str) -> None:
    (hive.nixos / "die").write_text(point)
    deploy = hive.deploy("alice")
    assert deploy["phase"] == "failed" and "failed with status -9" in deploy["error"]
    assert not hive.conf("alice").exists()
    hive.spawn("alice")
    (hive.nixos / "die").write_text("built")  # of an update
    assert hive.deploy("alice", "rebuild")["phase"] == "failed"
    answer_mail(hive, "alice", "what was deployed runs again?")
    assert hive.deploy("alice", "rebuild")["phase"] == "deployed"


@real
def test_what_a_create_left_half_done_is_made_anew(hive: NixosHive) -> None:
    flake = hive.state / "deploy/alice"
    hive.conf("alice").write_text(f"PRIVATE_NETWORK=1\nHOST_ADDRESS=10.233.1.1\nAUTO_START=0\nFLAKE={flake}\n")
    hive.spawn("alice")
    answer_mail(hive, "alice", "hello")


@real
def test_a_container_of_somebody_else_is_left_alone(hive: NixosHive) -> None:
    foreign = "PRIVATE_NETWORK=1\nHOST_ADDRESS=10.233.1.1\nFLAKE=/etc/nixos\nEXTRA_NSPAWN_FLAGS=\n"
    hive.conf("alice").write_text(foreign)
    deploy = hive.deploy("alice")
    assert deploy["phase"] == "failed" and "that this hive did not make" in deploy["error"]
    assert hive.ask(cmd="list")["agents"] == [] and hive.conf("alice").read_text() == foreign
    hive.spawn("bob")
    mine = hive.conf("bob").read_text()
    theirs = mine.replace(str(hive.state), "/elsewhere")
    hive.ask(cmd="stop", scope={"agent_names": ["bob"]})
    hive.conf("bob").write_text(theirs)  # somebody made one of this name while ours was gone
    for request in ({"cmd": "start", "scope": {"agent_names": ["bob"]}}, {"cmd": "restart", "name": "bob"}):
        assert "did not make" in hive.ask(**request)["error"]
    assert hive.ask(cmd="destroy", name="bob", purge=True)["ok"]
    assert hive.conf("bob").read_text() == theirs


@real
def test_a_conf_file_edited_by_hand_is_repaired_before_a_start(hive: NixosHive) -> None:
    hive.spawn("alice")
    before = hive.conf("alice").read_text()
    hive.ask(cmd="stop", scope={"agent_names": ["alice"]})
    edited = "".join(line for line in before.splitlines(True) if not line.startswith(("EXTRA_", "PRIVATE_USERS")))
    edited = edited.replace("PRIVATE_NETWORK=0", "PRIVATE_NETWORK=1").replace(
        "HOST_ADDRESS=", "HOST_ADDRESS=10.233.7.1"
    )
    hive.conf("alice").write_text("# mine\n" + edited + "MINE='a  b'\n")
    assert (answer := hive.ask(cmd="start", scope={"agent_names": ["alice"]}))["ok"], answer
    assert parse_conf(hive.conf("alice").read_text()) == parse_conf(before) | {"MINE": "a  b"}
    answer_mail(hive, "alice", "hello")
    hive.conf("alice").write_text(edited)
    assert hive.deploy("alice", "rebuild")["phase"] == "deployed"
    assert parse_conf(hive.conf("alice").read_text()) == parse_conf(before)


@real
def test_a_full_disk_leaves_the_conf_file_as_it_was(folder: Path) -> None:
    hive = NixosHive(folder)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", hive.etc], check=True)
    try:
        with hive:
            hive.spawn("alice")
            before = hive.conf("alice").read_bytes()
            hive.ask(cmd="stop", scope={"agent_names": ["alice"]})
            with (hive.etc / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError):
                while True:
                    ballast.write(b"x" * 4096)
            refused = hive.ask(cmd="start", scope={"agent_names": ["alice"]})
            assert refused["code"] == "storage" and "No space left" in refused["error"]
            assert hive.conf("alice").read_bytes() == before
            assert sorted(path.name for path in hive.etc.iterdir()) == ["ballast", "h-alice.conf"]
            (hive.etc / "ballast").unlink()
            assert (answer := hive.ask(cmd="start", scope={"agent_names": ["alice"]}))["ok"], answer
    finally:
        subprocess.run(["umount", hive.etc], check=True)


@real
def test_a_build_that_hangs_is_ended(folder: Path) -> None:
    with NixosHive(folder, build_timeout_s=30.0) as hive:
        deploy = hive.change("alice", config(build="echo waiting; sleep 1000"))
        assert deploy["phase"] == "failed" and "did not end within 30 s" in deploy["error"]
        assert any("waiting" in line for line in deploy["log"])
        assert "alice" not in hive.ask(cmd="list")["agents"]


@real
def test_of_a_build_that_chatters_the_ends_are_kept(hive: NixosHive) -> None:
    deploy = hive.change("bob", config(build="yes 'so much to say' | head -c 10000000; echo the end"))
    assert deploy["phase"] == "deployed", deploy["log"][-5:]
    assert sum(map(len, deploy["log"])) < 500_000
    assert any("bytes left out" in line for line in deploy["log"]) and any("the end" in line for line in deploy["log"])
    chatter = f"for n in {' '.join(map(str, range(20)))}; do echo {'x' * 400}; done; exit 1"
    error = hive.change("bob", config(build=chatter))["error"]
    assert "failed with status 1" in error.partition("\n")[0] and "xxx" in error, "the reason comes first"


@real
def test_two_deploys_at_once_do_not_disturb_each_other(hive: NixosHive) -> None:
    hive.spawn("manager")
    slow = [hive.propose(name, config(build="sleep 2", run=f"echo {name} > /state/me")) for name in ("alice", "bob")]
    for approval in slow:
        assert hive.ask(cmd="approve", id=approval)["ok"]
    deploys = [hive.deployed(hive.ask(cmd="show", id=approval)["approval"]["deploy_id"]) for approval in slow]
    assert [deploy["phase"] for deploy in deploys] == ["deployed", "deployed"], deploys
    assert max(deploy["started_at"] for deploy in deploys) < min(deploy["ended_at"] for deploy in deploys)
    for name in ("alice", "bob"):
        assert (hive.state / f"agents/{name}/state/me").read_text() == f"{name}\n"


@real
def test_roll_back_and_new_inputs(hive: NixosHive) -> None:
    hive.change("alice", config(run="echo one > /state/which"))
    first = lock_of(hive, "alice")
    hive.change("alice", config(run="echo two > /state/which"))
    which = hive.state / "agents/alice/state/which"
    assert which.read_text() == "two\n"
    assert hive.deploy("alice", "rollback")["phase"] == "deployed"
    assert which.read_text() == "one\n" and lock_of(hive, "alice") == first
    (hive.nixos / "nixpkgs/news").write_text("new")
    assert hive.deploy("alice", "rebuild")["phase"] == "deployed"
    assert lock_of(hive, "alice") == first  # pinned
    with hive.agent("manager") as manager:
        asked = manager.ask("request_update_inputs", agent="all")
    deploy = hive.approve(asked["id"])
    assert deploy["phase"] == "deployed" and any("Updated input 'nixpkgs'" in line for line in deploy["log"]), deploy[
        "log"
    ]
    wait_for(lambda: all(row["phase"] == "deployed" for row in hive.ask(cmd="deploys")["deploys"]), "all deploys")
    assert lock_of(hive, "alice") != first
    assert hive.deploy("alice", "rollback")["phase"] == "deployed"
    assert lock_of(hive, "alice") == first and which.read_text() == "one\n"


def lock_of(hive: NixosHive, name: str) -> dict[str, Any]:
    """The pinned inputs of the last build, without those that are a deploy's own."""
    nodes = json.loads((hive.state / f"deploy/{name}/flake.lock").read_text())["nodes"]
    return {key: nodes[key]["locked"]["narHash"] for key in ("nixpkgs", "nixpkgs-unstable")}


@real
def test_needs_update_when_hyperhive_itself_is_another(hive: NixosHive) -> None:
    hive.spawn("alice")
    assert not row(hive, "alice")["needs_update"]
    hive.stop()
    with (hive.source / "harness.py").open("a") as harness:
        harness.write("\n# newer\n")
    hive.start()
    assert row(hive, "alice")["needs_update"]
    assert hive.deploy("alice", "rebuild")["phase"] == "deployed"
    assert not row(hive, "alice")["needs_update"]
    command = Path(f"/proc/{hive.leader('alice')}/cmdline").read_bytes().split(b"\0")
    harness_file = Path(next(word for word in command if word.endswith(b"harness.py")).decode())
    assert harness_file.read_text().endswith("# newer\n")


# ── life: crashes, and a daemon that comes and goes ──


@real
def test_a_crash_is_told_once_and_the_third_in_ten_minutes_stops_it(hive: NixosHive) -> None:
    hive.spawn("alice")
    for crash in (1, 2, 3):
        before = hive.leader("alice")
        os.kill(before, signal.SIGKILL)
        wait_for(lambda crash=crash: len(messages(hive, "container_crash")) == crash, "the report of a crash")
        if crash < 3:
            wait_for(lambda before=before: row(hive, "alice")["state"] == "idle", "alice to be back", timeout_s=30)
            assert hive.leader("alice") != before
            time.sleep(1.5)  # a tick or two in which nothing more is told
            assert len(messages(hive, "container_crash")) == crash
    last = messages(hive, "container_crash")[-1]["body"]
    assert "alice is stopped: its container was found down 3 times in ten minutes" in last
    time.sleep(1.5)
    assert not row(hive, "alice")["running"] and row(hive, "alice")["failed"]
    assert hive.program("nixos-container", "status", "h-alice") == "down\n"
    assert (answer := hive.ask(cmd="start", scope={"agent_names": ["alice"]}))["ok"], answer
    answer_mail(hive, "alice", "better?")


@real
def test_what_the_hive_stops_itself_is_no_crash(hive: NixosHive) -> None:
    hive.spawn("alice")
    hive.ask(cmd="stop", scope={"agent_names": ["alice"]})
    assert hive.program("nixos-container", "status", "h-alice") == "down\n"
    hive.ask(cmd="start", scope={"agent_names": ["alice"]})
    hive.ask(cmd="kill", name="alice")
    assert hive.program("nixos-container", "status", "h-alice") == "down\n"
    hive.ask(cmd="start", scope={"agent_names": ["alice"]})
    hive.ask(cmd="restart", name="alice")
    assert hive.deploy("alice", "rebuild")["phase"] == "deployed"
    time.sleep(1.5)
    assert messages(hive, "container_crash") == []
    hive.ask(cmd="destroy", name="alice")
    assert messages(hive, "container_crash") == []


@real
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_containers_run_on_while_the_daemon_is_away(hive: NixosHive, end: str) -> None:
    hive.spawn("alice", "bob")
    leaders = [hive.leader(name) for name in ("alice", "bob")]
    for number in range(5):
        hive.ask(cmd="send", to="alice", body=f"before {number}")
    getattr(hive, end)()
    assert [hive.leader(name) for name in ("alice", "bob")] == leaders
    hive.program("systemctl", "stop", "container@h-bob")  # it does not run when the daemon comes back, but should
    hive.start()
    wait_for(lambda: row(hive, "alice")["state"] in ("idle", "working"), "alice to connect again")
    wait_for(lambda: row(hive, "bob")["state"] == "idle", "bob to be started")
    assert hive.leader("alice") == leaders[0] and messages(hive, "container_crash") == []
    answer_mail(hive, "alice", "after")
    mail = hive.api("GET", "/api/messages?with=alice&max=1000").body["messages"]
    to_alice = [message for message in mail if message["to"] == "alice" and message["from"] == "operator"]
    wait_for(lambda: row(hive, "alice")["unread"] == 0, "the end of the mail")
    assert len(to_alice) == 6
    assert hive.deploy("alice", "rebuild")["phase"] == "deployed"
    answer_mail(hive, "alice", "rebuilt")


@real
@pytest.mark.parametrize("script", [{"build": "sleep 3"}, {"run": "sleep 3"}], ids=["building", "switching"])
def test_a_deploy_that_the_daemon_did_not_live_to_end_is_done_again(hive: NixosHive, script: dict[str, str]) -> None:
    hive.change("alice", config())
    approval = hive.propose("alice", config(**script))
    hive.ask(cmd="approve", id=approval)
    deploy = hive.ask(cmd="show", id=approval)["approval"]["deploy_id"]
    phase = "building" if "build" in script else "switching"
    wait_for(lambda: hive.ask(cmd="deploys", id=deploy)["deploys"][0]["phase"] == phase, "the deploy to begin")
    time.sleep(1)
    hive.kill()
    hive.start()
    assert hive.deployed(deploy)["phase"] == "deployed"
    answer_mail(hive, "alice", "hello")
    assert messages(hive, "container_crash") == []


@real
def test_a_build_ends_with_the_daemon_and_begins_again_with_it(hive: NixosHive) -> None:
    flag = hive.folder / "flag"
    approval = hive.propose("alice", config(build=f"[ -e {flag} ] || sleep 1000"))
    hive.ask(cmd="approve", id=approval)
    deploy = hive.ask(cmd="show", id=approval)["approval"]["deploy_id"]
    wait_for(lambda: hive.ask(cmd="deploys", id=deploy)["deploys"][0]["phase"] == "building", "the build")
    time.sleep(1)
    hive.stop()
    wait_for(lambda: not processes_of(hive.state, "nix"), "the end of the build")
    flag.touch()
    hive.start()
    assert hive.deployed(deploy)["phase"] == "deployed"
