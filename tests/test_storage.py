"""Storage: migrations, what is refused at start, backups, and writes that fail."""

import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hive import Hive, Line, free_ports, wait_for

import hyperhive


def serve(hive: Hive, *, port: int | None = None) -> subprocess.CompletedProcess[str]:
    """A daemon on this hive's folder that is expected to give up."""
    return hive.cli("serve", "--port", str(port or hive.port), "--containers", "process")


def query(database: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def bodies(hive: Hive) -> list[str]:
    return [row["body"] for row in hive.ask(cmd="inbox", max=1000)["messages"]]


@pytest.fixture
def stopped(folder: Path) -> Iterator[Hive]:
    """A hive with an agent and some mail, whose daemon has ended."""
    hive = Hive(folder, limits={"messages_per_minute": 0})
    with hive.start().spawn("alice").agent("alice") as alice:
        for number in range(200):
            alice.ask("send", to="alice" if number % 2 else "operator", body=f"{number} " + "x" * 500)
    hive.stop()
    yield hive
    if hive.daemon is not None:
        hive.stop()


# ── start ──


def test_migrations_are_applied_once(stopped: Hive) -> None:
    database = stopped.state / "hive.sqlite"
    schema = query(database, "SELECT sql FROM sqlite_master ORDER BY name")
    assert query(database, "PRAGMA user_version") == [(len(hyperhive.MIGRATIONS),)]
    stopped.start()
    assert len(bodies(stopped)) == 100
    stopped.stop()
    assert query(database, "SELECT sql FROM sqlite_master ORDER BY name") == schema
    assert query(database, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("step", range(len(hyperhive.MIGRATIONS)))
def test_a_database_of_any_earlier_version_is_brought_up(folder: Path, step: int) -> None:
    """With what the steps before it made, and with nothing but them."""
    hive = Hive(folder)
    hive.state.mkdir()
    with closing(sqlite3.connect(hive.state / "hive.sqlite")) as old:
        old.executescript("".join(hyperhive.MIGRATIONS[:step]) + f"PRAGMA user_version = {step}")
    with hive:
        assert hive.ask(cmd="list")["agents"] == []
    assert query(hive.state / "hive.sqlite", "PRAGMA user_version") == [(len(hyperhive.MIGRATIONS),)]


def test_a_migration_is_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hyperhive.Store(folder / "it.sqlite").close()
    known = len(hyperhive.MIGRATIONS)
    steps = ("CREATE TABLE good (x)", "CREATE TABLE half (x); CREATE TABLE agents (y)")  # there are agents already
    monkeypatch.setattr(hyperhive, "MIGRATIONS", (*hyperhive.MIGRATIONS, *steps))
    with pytest.raises(hyperhive.Refused):
        hyperhive.Store(folder / "it.sqlite")
    assert query(folder / "it.sqlite", "PRAGMA user_version") == [(known + 1,)]
    assert query(folder / "it.sqlite", "SELECT name FROM sqlite_master WHERE name IN ('good', 'half')") == [("good",)]


def test_a_database_from_the_future_is_refused_and_left_alone(stopped: Hive) -> None:
    database = stopped.state / "hive.sqlite"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = database.read_bytes()
    refused = serve(stopped)
    assert refused.returncode == 1
    assert "newer hyperhive" in refused.stderr and "schema 99" in refused.stderr and "restore" in refused.stderr
    assert database.read_bytes() == before


def spoil_header(database: Path) -> None:
    database.write_bytes(b"this was a database once".ljust(4096) + database.read_bytes()[4096:])


def spoil_pages(database: Path) -> None:
    content = bytearray(database.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 8192] = os.urandom(8192)
    database.write_bytes(content)


def cut_off(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


@pytest.mark.parametrize("damage", [spoil_header, spoil_pages, cut_off])
def test_a_damaged_database_is_refused_and_the_last_backup_named(
    stopped: Hive, folder: Path, damage: Callable[[Path], None]
) -> None:
    backup, database = folder / "monday.sqlite", stopped.state / "hive.sqlite"
    stopped.start()
    stopped.ask(cmd="backup", path=str(backup))
    stopped.stop()
    damage(database)
    damaged = database.read_bytes()
    refused = serve(stopped)
    assert refused.returncode == 1
    assert f"{database} is damaged" in refused.stderr and f"restore {backup}" in refused.stderr
    assert database.read_bytes() == damaged
    assert stopped.cli("restore", str(backup)).returncode == 0
    stopped.start()
    assert len(bodies(stopped)) == 100


def test_a_damaged_database_without_a_backup(stopped: Hive) -> None:
    spoil_header(stopped.state / "hive.sqlite")
    assert "no backup is on record" in serve(stopped).stderr


def test_a_database_that_can_not_be_opened_is_no_crash(stopped: Hive) -> None:
    database = stopped.state / "hive.sqlite"
    database.unlink()
    database.symlink_to("/no/such/disk/hive.sqlite")
    refused = serve(stopped)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr, refused.stderr
    assert str(database) in refused.stderr and "damaged" not in refused.stderr


def test_a_second_daemon_is_refused_and_told_whose_folder_this_is(hive: Hive) -> None:
    assert hive.daemon is not None
    second = serve(hive, port=free_ports())
    assert second.returncode == 1 and f"pid {hive.daemon.pid}" in second.stderr
    assert hive.ask(cmd="list")["ok"]


def test_files_with_secrets_are_their_owners_alone(stopped: Hive) -> None:
    assert stopped.state.stat().st_mode & 0o077 == 0
    for name in ("hive.sqlite", "operator.token"):
        assert (stopped.state / name).stat().st_mode & 0o777 == 0o600, name


# ── backups ──


def test_a_backup_brings_back_what_there_was(stopped: Hive, folder: Path) -> None:
    backup = folder / "monday.sqlite"
    stopped.start()
    made = stopped.cli("backup", str(backup))
    assert made.returncode == 0, made.stderr
    assert backup.stat().st_mode & 0o777 == 0o600
    before, row = bodies(stopped), stopped.ask(cmd="agents")["agents"]
    with stopped.agent("alice") as alice:
        alice.ask("send", to="operator", body="after the backup")
    assert stopped.cli("restore", str(backup)).returncode == 1  # the daemon runs
    assert bodies(stopped)[-1] == "after the backup"
    stopped.stop()
    restored = stopped.cli("restore", str(backup))
    assert restored.returncode == 0, restored.stderr
    stopped.start()
    assert bodies(stopped) == before and stopped.ask(cmd="agents")["agents"][0]["name"] == row[0]["name"]
    with stopped.agent("alice") as alice:
        assert len(alice.ask("lease", max=100)["messages"]) == 100
    (aside,) = stopped.state.glob("hive.sqlite.before-restore-*")
    assert ("after the backup",) in query(aside, "SELECT body FROM messages")


def test_a_backup_overwrites_nothing(stopped: Hive, folder: Path) -> None:
    (folder / "precious").write_text("keep me")
    stopped.start()
    for path in (folder / "precious", folder / "no such folder/backup"):
        refused = stopped.ask(cmd="backup", path=str(path))
        assert (refused["ok"], refused["code"]) == (False, "storage") and str(path) in refused["error"]
    assert (folder / "precious").read_text() == "keep me"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_backup_that_fails_does_not_stand_in_the_way_of_the_next(hive: Hive, folder: Path) -> None:
    with small_disk(folder / "usb", 8) as fill:
        fill()
        path = folder / "usb/monday.sqlite"
        refused = hive.ask(cmd="backup", path=str(path))
        assert refused["code"] == "storage" and not path.exists()
        (folder / "usb/ballast").unlink()
        assert hive.ask(cmd="backup", path=str(path))["ok"]


def test_what_is_no_backup_is_not_restored(stopped: Hive, folder: Path) -> None:
    (folder / "text").write_text("nothing of the kind")
    database = stopped.state / "hive.sqlite"
    before = database.read_bytes()
    for path in (folder / "text", folder / "missing", folder):
        refused = stopped.cli("restore", str(path))
        assert refused.returncode == 1 and "Traceback" not in refused.stderr, refused.stderr
    assert database.read_bytes() == before


# ── writing ──


def test_thirty_senders_at_once_and_all_is_kept(folder: Path) -> None:
    """A request that fails in the same transaction takes none of the others with it."""
    hive = Hive(folder, limits={"messages_per_minute": 0, "ping_pong": 0})
    hive.start().spawn("alice", "bob")
    begin, kept = threading.Barrier(30), list[int]()

    def send(line: Line) -> None:
        begin.wait()
        for _ in range(20):
            kept.append(line.ask("send", to="bob", body="keep me")["id"])
            assert line.ask("send", to="nobody", body="not me")["code"] == "unknown_agent"
            assert line.ask("send", to="bob", body="nor me", in_reply_to=10**9)["code"] == "not_found"

    lines = [hive.agent("alice") for _ in range(30)]
    threads = [threading.Thread(target=send, args=(line,)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hive.kill()  # nothing of this waits for a clean end
    for line in lines:
        line.close()
    found = query(hive.state / "hive.sqlite", "SELECT id, body FROM messages WHERE recipient = 'bob' ORDER BY id")
    assert [number for number, _ in found] == sorted(kept) and len(kept) == 600
    assert {body for _, body in found} == {"keep me"}
    hive.close()


@contextmanager
def small_disk(at: Path, mebibytes: int) -> Iterator[Callable[[], None]]:
    """A file system of this size in place of a folder; yields what fills it up."""
    at.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "none", at], check=True)

    def fill() -> None:
        with (at / "ballast").open("ab", buffering=0) as ballast:
            for size in (65536, 4096, 1):
                try:
                    while True:
                        ballast.write(b"x" * size)
                except OSError:
                    continue

    try:
        yield fill
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk_refuses_and_loses_nothing(folder: Path) -> None:
    hive = Hive(folder, limits={"messages_per_minute": 0, "ping_pong": 0})
    with small_disk(hive.state, 24) as fill, hive:
        hive.spawn("alice", "bob")
        with hive.agent("alice") as alice, hive.agent("bob") as bob:
            kept = [alice.ask("send", to="bob", body=f"{number}")["id"] for number in range(20)]
            in_hand = [row["id"] for row in bob.ask("lease", max=5)["messages"]]
            fill()
            while (answer := alice.ask("send", to="bob", body="x" * 60_000))["ok"]:
                kept.append(answer["id"])  # what the database had set aside before
            assert answer["code"] == "storage" and "disk full" in answer["hint"]
            assert bob.ask("lease", wait_s=0)["code"] == bob.ask("ack", ids=in_hand)["code"] == "storage"
            assert hive.ask(cmd="list")["agents"] == ["alice", "bob"]  # reading goes on
        wait_for(lambda: "can't be taken back" in hive.log.read_text(), "bob's end to be noticed")
        (hive.state / "ballast").unlink()
        with hive.agent("bob") as bob:
            got = list[int]()
            while len(got) < len(kept):
                mail = bob.ask("lease", wait_s=10)["messages"]
                assert mail, f"of {kept} only {got} came"
                got += [row["id"] for row in mail]
            assert sorted(got) == kept
            assert bob.ask("ack", ids=got)["acked"] == len(got)
        with hive.agent("alice") as alice:
            assert alice.ask("send", to="bob", body="again")["ok"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk_at_the_start_is_not_taken_for_damage(folder: Path) -> None:
    hive = Hive(folder)
    with small_disk(hive.state, 24) as fill:
        hive.start().spawn("alice").stop()
        fill()
        refused = serve(hive)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr, refused.stderr
        assert "No space left" in refused.stderr or "full" in refused.stderr, refused.stderr
        assert "damaged" not in refused.stderr
        (hive.state / "ballast").unlink()
        hive.start()
        assert hive.ask(cmd="list")["agents"] == ["alice"]
        hive.stop()
