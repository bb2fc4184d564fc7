"""The daemon and its service manager: what is said through NOTIFY_SOCKET, see sd_notify(3)."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hive import Hive


class Manager(socket.socket):
    """The service manager's end."""

    def __init__(self, address: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.bind(address)

    def hear(self, word: str, *, within_s: float = 10) -> bool:
        """Whether a message with this line comes; others are passed over."""
        deadline = time.monotonic() + within_s
        while (left := deadline - time.monotonic()) > 0:
            self.settimeout(left)
            with suppress(TimeoutError):
                if word in self.recv(4096).decode().splitlines():
                    return True
        return False


@contextmanager
def service(folder: Path, address: str, **environment: str) -> Iterator[tuple[Hive, Manager]]:
    hive = Hive(folder)
    hive.environment = {"NOTIFY_SOCKET": address.replace("\0", "@"), **environment}
    with Manager(address) as manager:
        try:
            hive.start(ready=False)
            yield hive, manager
        finally:
            hive.close()
    if not address.startswith("\0"):
        Path(address).unlink()


def test_signals_upon_signals_end_it(folder: Path) -> None:
    """A handler may interrupt the main thread inside the very lock that it would need."""
    for number in range(3):
        place = folder / str(number)
        place.mkdir()
        with Hive(place) as hive:
            daemon, deadline = hive.daemon, time.monotonic() + 30
            assert daemon
            while "stopping" not in hive.log.read_text() and time.monotonic() < deadline:
                for sign in (signal.SIGTERM, signal.SIGINT) * 50:
                    daemon.send_signal(sign)
            heard = "stopping" in hive.log.read_text()
            if not heard:
                daemon.kill()
            hive.daemon = None
            status = daemon.wait(timeout=30)
        assert heard and status in (0, -signal.SIGTERM, -signal.SIGINT)  # a late one may meet a Python that ends


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_ready_when_it_answers_and_stopping_when_it_ends(folder: Path, kind: str) -> None:
    address = str(folder / "notify") if kind == "path" else f"\0{folder}/notify"
    with service(folder, address) as (hive, manager):
        assert manager.hear("READY=1")
        assert hive.ask(cmd="list")["ok"] and hive.is_ready()
        assert not manager.hear("WATCHDOG=1", within_s=1)  # nobody asked for it
        hive.stop()
        assert manager.hear("STOPPING=1")


def test_the_watchdog_hears_of_it_while_its_loop_goes_round(folder: Path) -> None:
    with service(folder, str(folder / "notify"), WATCHDOG_USEC="4500000") as (hive, manager):
        for _ in range(4):
            assert manager.hear("WATCHDOG=1", within_s=4.5 if hive.is_ready() else 10)
        assert hive.daemon is not None
        hive.daemon.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        while manager.hear("WATCHDOG=1", within_s=0.01):
            pass
        assert not manager.hear("WATCHDOG=1", within_s=4)
        hive.daemon.send_signal(signal.SIGCONT)
        assert manager.hear("WATCHDOG=1")


def test_a_watchdog_that_waits_for_another_process_is_not_fed(folder: Path) -> None:
    with service(folder, str(folder / "notify"), WATCHDOG_USEC="600000", WATCHDOG_PID=str(os.getpid())) as (_, manager):
        assert manager.hear("READY=1")
        assert not manager.hear("WATCHDOG=1", within_s=1.5)


def test_a_manager_that_has_gone_is_no_reason_to_stop(folder: Path) -> None:
    hive = Hive(folder)
    hive.environment = {"NOTIFY_SOCKET": str(folder / "nobody")}
    with hive:
        assert hive.ask(cmd="list")["ok"]
    assert "the service manager can't be told" in hive.log.read_text()
