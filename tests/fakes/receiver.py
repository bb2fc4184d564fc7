"""An address that takes notifications, as ntfy or a webhook would; it refuses as many as it is told to, or
answers as many by what is no HTTP."""

import http.server
import threading
from typing import NamedTuple, Self


class Told(NamedTuple):
    headers: dict[str, str]
    text: str


class Receiver(http.server.ThreadingHTTPServer):
    """`with Receiver() as receiver:` serves until the end of the block; `told` is what came, `tries` counts all."""

    def __init__(self, *, refuse: int = 0, garble: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Taker)
        self.refuse, self.garble, self.tries = refuse, garble, 0
        self.told: list[Told] = []
        self._thread = threading.Thread(target=self.serve_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/topic"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Taker(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.tries += 1
        if self.server.tries <= self.server.garble:
            self.wfile.write(b"what is this?\r\n")
            return
        taken = self.server.tries > self.server.refuse
        if taken:
            self.server.told.append(Told(dict(self.headers), text))
        self.send_response(200 if taken else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""
