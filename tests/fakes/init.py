"""The first process of a container of these tests: it runs the harness as its service and starts it again.

It says when it is ready, stops when it is told to halt (SIGRTMIN+3), and waits for all that ends. Its arguments are
the command; KEY=VALUE among them goes into the environment.
"""

import os
import signal
import socket
import subprocess
import sys
import time


def main() -> int:
    settings = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    command = [word for word in sys.argv[1:] if "=" not in word]
    halting = []

    def halt(*_: object) -> None:
        halting.append(True)
        if service.poll() is None:
            service.terminate()

    service = subprocess.Popen(command, env={**os.environ, **settings})
    signal.signal(signal.SIGRTMIN + 3, halt)
    signal.signal(signal.SIGTERM, halt)
    tell_ready()
    while True:
        pid, _ = os.waitpid(-1, os.WNOHANG)  # a signal that comes just before a wait would not end it
        if pid == 0:
            time.sleep(0.05)
        if pid == service.pid:
            if halting:
                return 0
            time.sleep(0.2)
            service = subprocess.Popen(command, env={**os.environ, **settings})


def tell_ready() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])


if __name__ == "__main__":
    sys.exit(main())
