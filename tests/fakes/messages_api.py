"""A stand-in for Anthropic's Messages API, as much of it as the claude command needs.

    python tests/fakes/messages_api.py PORT

A conversation is steered by what is said in it: a user message may hold `SCRIPT:` and a JSON list of steps, and the
first step answers the first request after that message, the second the second, and so on. A step is an object with

    text      what the model says
    tools     [{"name", "input"}] it calls
    delay     seconds before the answer begins

Without a script the answer is that there was none. `Api.fail` makes requests fail instead, and `Api.manner` says how
answers are sent: "well", "slow" (in pieces, with pauses), "cut" (the connection ends in the middle), or "hang" (never,
until it is "well" again).
"""

from __future__ import annotations

import http.server
import json
import sys
import threading
import time
import uuid
from typing import Any

Json = dict[str, Any]


class Api(http.server.ThreadingHTTPServer):
    """Serves on loopback until `stop`; the same object steers it and remembers the requests."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.requests: list[Json] = []
        self.arrivals: list[float] = []  # of each, by time.monotonic()
        self.failure: tuple[int, str, str, dict[str, str]] | None = None
        self.manner = "well"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> Api:
        self._thread.start()
        return self

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed, or tired of waiting
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.work()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def fail(self, status: int, kind: str, message: str, **headers: str) -> None:
        """From now on every request for a message fails like this, until `work`."""
        self.failure = (status, kind, message, headers)

    def work(self) -> None:
        self.failure, self.manner = None, "well"

    def said(self) -> str:
        """All that the model has been given in its last request, as one text."""
        return json.dumps(self.requests[-1]["messages"])


class Handler(http.server.BaseHTTPRequestHandler):
    server: Api
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer({})

    do_GET = do_HEAD

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "count_tokens" in self.path:
            self.answer({"input_tokens": len(json.dumps(request)) // 4})
            return
        self.server.arrivals.append(time.monotonic())
        self.server.requests.append(request)
        if self.server.failure:
            status, kind, message, headers = self.server.failure
            self.answer({"type": "error", "error": {"type": kind, "message": message}}, status, headers)
            return
        while self.server.manner == "hang":
            time.sleep(0.05)
        step = next_step(request["messages"])
        time.sleep(step.get("delay", 0))
        message = as_message(step, request)
        if request.get("stream"):
            self.stream(message)
        else:
            self.answer(message)

    def answer(self, value: Json, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, content in (headers or {}).items():
            self.send_header(name.replace("_", "-"), content)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def stream(self, message: Json) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in events(message):
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
            while self.server.manner == "held" and event["type"] == "content_block_delta":
                time.sleep(0.05)
            if self.server.manner == "slow":
                time.sleep(0.3)
            elif self.server.manner == "cut" and event["type"] == "content_block_delta":
                return


def texts(message: Json) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(block["text"] for block in content if block["type"] == "text")


def next_step(messages: list[Json]) -> Json:
    """The step of the youngest script that is due: one for each answer since."""
    for at in range(len(messages) - 1, -1, -1):
        if messages[at]["role"] == "user" and "SCRIPT:" in (said := texts(messages[at])):
            steps, _ = json.JSONDecoder().raw_decode(said.partition("SCRIPT:")[2])
            done = sum(message["role"] == "assistant" for message in messages[at + 1 :])
            return steps[done] if done < len(steps) else {"text": "That was the script."}
    return {"text": "There was no script."}


def as_message(step: Json, request: Json) -> Json:
    content: list[Json] = [{"type": "text", "text": step["text"]}] if "text" in step else []
    content += [{"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:20]}", **tool} for tool in step.get("tools", [])]
    return {
        "id": f"msg_{uuid.uuid4().hex[:20]}",
        "type": "message",
        "role": "assistant",
        "model": request["model"],
        "content": content,
        "stop_reason": "tool_use" if step.get("tools") else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": len(json.dumps(request)) // 4, "output_tokens": len(json.dumps(content)) // 4},
    }


def events(message: Json) -> list[Json]:
    """The same message as the stream sends it."""
    found: list[Json] = [{"type": "message_start", "message": {**message, "content": [], "stop_reason": None}}]
    for index, block in enumerate(message["content"]):
        if block["type"] == "text":
            empty, delta = {"text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            empty, delta = {"input": {}}, {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        found += [
            {"type": "content_block_start", "index": index, "content_block": {**block, **empty}},
            {"type": "content_block_delta", "index": index, "delta": delta},
            {"type": "content_block_stop", "index": index},
        ]
    ending = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    return [*found, {"type": "message_delta", "delta": ending, "usage": message["usage"]}, {"type": "message_stop"}]


if __name__ == "__main__":
    Api(int(sys.argv[1])).serve_forever()
