"""Dashboard: who gets in, one shape for every answer, what the routes do, and the live stream."""

import http.client
import json
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import contract
import psutil
import pytest
from hive import HYPERHIVE, Answer, Hive, free_ports, wait_for

import hyperhive

FILLED = {"<number:int>": "1", "<name>": "alice"}
TABLE = hyperhive.Routes(None, None, None).table()  # type: ignore[arg-type]


def filled(path: str) -> str:
    """A route with something in the place of its wildcards."""
    path = path.replace("/static/<file>", "/static/app.css")
    for wildcard, value in FILLED.items():
        path = path.replace(wildcard, value)
    assert "<" not in path, "a wildcard that FILLED does not know"
    return path


every_route = pytest.mark.parametrize(("method", "path"), [(route.method, filled(route.path)) for route in TABLE])
guarded_route = pytest.mark.parametrize(
    ("method", "path"), [(route.method, filled(route.path)) for route in TABLE if not route.open]
)
posting_route = pytest.mark.parametrize("path", [filled(route.path) for route in TABLE if route.method == "POST"])


def raw(hive: Hive, request: str | bytes) -> Answer:
    """An answer to bytes that no client library would send."""
    with socket.create_connection(("127.0.0.1", hive.port), timeout=30) as peer:
        peer.sendall(request if isinstance(request, bytes) else request.encode())
        with closing(http.client.HTTPResponse(peer)) as response:
            response.begin()
            text = response.read().decode()
    is_json = response.headers.get_content_type() == "application/json"
    return Answer(response.status, response.headers, json.loads(text) if is_json else text)


def refused(answer: Answer, status: int, code: str) -> bool:
    """Of the one error shape, with this status and word, and with the headers that every answer has."""
    assert answer.status == status, answer
    assert {"error", "code"} <= answer.body.keys() <= {"error", "code", "hint"}, answer.body
    assert all(isinstance(text, str) and text for text in answer.body.values())
    assert answer.body["code"] == code
    assert has_headers(answer) and answer.headers["Cache-Control"] == "no-store"
    return True


def has_headers(answer: Answer) -> bool:
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "http:" not in policy and "*" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert "Set-Cookie" not in answer.headers and "Server" not in answer.headers
    return True


# ── who gets in ──


def test_only_three_routes_are_open() -> None:
    assert [route.path for route in TABLE if route.open] == ["/", "/static/<file>", "/healthz"]


@guarded_route
def test_a_route_needs_the_token(crew: Hive, method: str, path: str) -> None:
    body = {} if method == "POST" else None
    for headers in ({}, {"Authorization": ""}, {"Authorization": crew.token}, {"Authorization": f"Basic {crew.token}"}):
        answer = crew.api(method, path, body, token=None, headers=headers)
        assert refused(answer, 401, "unauthorized") and answer.headers["WWW-Authenticate"] == "Bearer"
    for wrong in ("x", crew.token[:-1], f"{crew.token}x", "é", "x" * 10_000):
        assert refused(crew.api(method, path, body, token=wrong), 401, "unauthorized")
    with_token = crew.api(
        method, f"{path}?token={crew.token}", body, token=None, headers={"Cookie": f"token={crew.token}"}
    )
    assert refused(with_token, 401, "unauthorized")


@every_route
def test_a_route_takes_no_foreign_host(crew: Hive, method: str, path: str) -> None:
    for host in (
        "evil.example",
        f"evil.example:{crew.port}",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "",
        "[::2]",
    ):
        answer = crew.api(method, path, {} if method == "POST" else None, headers={"Host": host})
        assert refused(answer, 403, "bad_host"), host


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8", socket.gethostname()])
def test_hosts_that_are_ours(crew: Hive, host: str) -> None:
    assert crew.api("GET", "/api/agents", headers={"Host": host}).status == 200


@posting_route
def test_a_change_takes_no_foreign_origin_and_only_json(crew: Hive, path: str) -> None:
    for origin in (
        "http://evil.example",
        "null",
        "é",
        f"http://127.0.0.1:{crew.port + 1}",
        f"http://localhost:{crew.port}",
    ):
        assert refused(crew.api("POST", path, {}, headers={"Origin": origin}), 403, "bad_origin"), origin
    for content in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonp"):
        assert refused(crew.api("POST", path, {}, headers={"Content-Type": content}), 415, "bad_type"), content
    assert refused(crew.api("POST", path, {}, token=None, headers={"Origin": crew.url}), 401, "unauthorized")


def test_our_own_origin_and_content_type_with_a_charset(crew: Hive) -> None:
    headers = {"Origin": crew.url, "Content-Type": "application/json; charset=utf-8"}
    assert crew.api("POST", "/api/messages", {"to": "alice", "body": "hi"}, headers=headers).status == 200


def test_guessing_is_slowed_down_but_the_right_token_passes(hive: Hive) -> None:
    for _ in range(hyperhive.Limits().wrong_tokens_per_minute):
        assert refused(hive.api("GET", "/api/state", token="wrong"), 401, "unauthorized")
    for _ in range(3):
        answer = hive.api("GET", "/api/state", token="wrong")
        assert refused(answer, 429, "too_many") and 0 < int(answer.headers["Retry-After"]) <= 61
        assert refused(hive.api("GET", "/api/state", token=None), 401, "unauthorized")  # no guess
        assert hive.api("GET", "/api/state").status == 200
        assert hive.api("GET", "/healthz", token=None).status == 200


def test_guessing_may_be_free(folder: Path) -> None:
    with Hive(folder, limits={"wrong_tokens_per_minute": 0}) as hive:
        for _ in range(20):
            assert refused(hive.api("GET", "/api/state", token="wrong"), 401, "unauthorized")


def test_a_rotated_token_is_void_at_once(hive: Hive) -> None:
    old = hive.token
    with Stream(hive) as stream:
        stream.next()
        new = hive.ask(cmd="token", rotate=True)["token"]
        assert stream.ended()
    assert old != new == hive.token
    assert refused(hive.api("GET", "/api/state", token=old), 401, "unauthorized")
    assert hive.api("GET", "/api/state", token=new).status == 200
    hive.stop()
    hive.start()
    assert hive.api("GET", "/api/state", token=new).status == 200


# ── the shape of answers ──


def test_headers_are_on_every_answer(crew: Hive) -> None:
    answers = [
        crew.api("GET", path) for path in ("/", "/static/app.css", "/healthz", "/metrics", "/api/state", "/nothing")
    ]
    answers += [crew.api("PUT", "/api/state"), crew.api("HEAD", "/healthz", token=None)]
    assert [answer.status for answer in answers] == [200] * 5 + [404, 405, 200]
    assert all(map(has_headers, answers))
    assert {answer.headers["Cache-Control"] for answer in answers[3:5]} == {"no-store"}
    with Stream(crew) as stream:
        assert has_headers(Answer(200, stream.headers, "")) and stream.headers["Cache-Control"] == "no-store"
        assert stream.headers.get_content_type() == "text/event-stream"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/api", 404, "not_found"),
        ("GET", "/api/agents/", 404, "not_found"),
        ("POST", "/api/state", 405, "bad_method"),
        ("DELETE", "/api/agents/alice", 405, "bad_method"),
        ("GET", "/api/agents/nobody", 404, "unknown_agent"),
        ("GET", "/api/agents/NOBODY", 400, "bad_name"),
        ("GET", "/api/agents/..", 400, "bad_name"),
        ("GET", "/api/agents/%2e%2e", 400, "bad_name"),
        ("GET", "/api/agents/tencharact/events", 400, "bad_name"),
        ("GET", "/api/agents/%00", 400, "bad_name"),
        ("GET", "/api/agents/al%ffice", 404, "not_found"),
        ("GET", "/api/st%ffate", 404, "not_found"),
        ("GET", "/api/st%c0%61te", 404, "not_found"),
        ("GET", "/api/agents/nobody/events", 404, "unknown_agent"),
        ("GET", "/api/approvals/9999", 404, "not_found"),
        ("GET", "/api/approvals/-1", 404, "not_found"),
        ("GET", "/api/approvals/x", 404, "not_found"),
        ("GET", "/api/approvals/99999999999999999999", 404, "not_found"),
        ("GET", "/api/approvals/%D9%A1", 404, "not_found"),  # a digit, but none of ours
        ("GET", "/api/approvals/9999/precheck", 404, "not_found"),
        ("GET", "/api/approvals?status=odd", 400, "bad_request"),
        ("GET", "/api/approvals?state=pending", 400, "bad_request"),
        ("GET", "/api/approvals?status=pending&status=pending", 400, "bad_request"),
        ("GET", "/api/state?x", 400, "bad_request"),
        ("POST", "/api/pause_all?x=%00", 400, "bad_request"),
        ("GET", "/api/questions?status=odd", 400, "bad_request"),
        ("GET", "/api/messages?max=", 400, "bad_request"),
        ("GET", "/api/deploys/9999", 404, "not_found"),
        ("GET", "/api/messages?max=0", 400, "bad_request"),
        ("GET", "/api/messages?max=1001", 400, "bad_request"),
        ("GET", "/api/messages?before=x", 400, "bad_request"),
        ("GET", f"/api/messages?before={'9' * 5000}", 400, "bad_request"),
        ("GET", "/api/messages?with=A", 400, "bad_name"),
        ("GET", "/api/usage?days=-1", 400, "bad_request"),
        ("GET", "/api/audit?max=1e3", 400, "bad_request"),
        ("GET", "/api/stream?agent=..", 400, "bad_name"),
        ("GET", "/api/deploys?agent=%ff", 400, "bad_request"),
        ("GET", "/api/deploys?agent=", 400, "bad_name"),
        ("GET", f"/api/agents/alice/events?find={'x' * 201}", 413, "too_large"),
        ("GET", "/api/agents/alice/diff", 400, "bad_request"),
        ("GET", "/api/agents/alice/diff?from=-x&to=--all", 400, "bad_request"),
        ("GET", f"/api/agents/alice/diff?from={'0' * 40}&to={'0' * 40}", 404, "not_found"),
    ],
)
def test_a_wrong_address_has_the_one_error_shape(crew: Hive, method: str, path: str, status: int, code: str) -> None:
    assert refused(crew.api(method, path, {} if method == "POST" else None), status, code)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/messages", b""),
        ("/api/messages", b"{"),
        ("/api/messages", b"[]"),
        ("/api/messages", b"null"),
        ("/api/messages", b"\xff"),
        ("/api/messages", b'{"to":"alice","body":NaN}'),
        ("/api/messages", b'{"to":"alice","body":"\\ud800"}'),
        ("/api/messages", b"[" * 100_000),
        ("/api/messages", b'{"to":"alice","body":"x","body":"y"}'),
        ("/api/messages", b'{"to":"alice"}'),
        ("/api/messages", b'{"to":"alice","body":"x","client_id":null}'),
        ("/api/messages", b'{"to":"alice","body":"x","in_reply_to":1.5}'),
        ("/api/messages", b'{"to":"alice","body":"x","in_reply_to":1e999}'),
        ("/api/messages", b'{"to":"alice","body":"x","in_reply_to":%s}' % (b"9" * 5000)),
        ("/api/messages", b'{"to":"alice","body":"x","in_reply_to":9007199254740993}'),
        ("/api/messages", b'{"to":"alice","body":7}'),
        ("/api/messages", b'{"to":"alice","body":""}'),
        ("/api/messages", b'{"to":"alice","body":"x","from":"bob"}'),
        ("/api/messages", b'{"to":["alice"],"body":"x"}'),
        ("/api/messages/read", b'{"ids":"1"}'),
        ("/api/messages/read", b'{"ids":[true]}'),
        ("/api/messages/read", b'{"ids":[99999999999999999999]}'),
        ("/api/pause_all", b"{}"),
        ("/api/pause_all", b'{"paused":"yes"}'),
        ("/api/agents", b'{"name":7}'),
        ("/api/schedules", b'{"to":"alice","body":"x","first":"tomorrow"}'),
        ("/api/schedules", b'{"to":"alice","body":"x","first":"2030-01-31T08:00:00Z","every_s":59}'),
        ("/api/approvals/1/approve", b'{"sha":7}'),
        ("/api/approvals/1/approve", b'{"surprise":1}'),
        ("/api/questions/1/answer", b"{}"),
        ("/api/agents/alice/start", b'{"surprise":1}'),
        ("/api/agents/bob/model", b"{}"),
        ("/api/agents/alice/destroy", b"{}"),
        ("/api/agents/alice/destroy", b'{"confirm":"bob"}'),
    ],
)
def test_a_wrong_body_has_the_one_error_shape(crew: Hive, path: str, body: bytes) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {crew.token}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    assert refused(raw(crew, head.encode() + body), 400, "bad_request")


def test_other_refusals_of_actions(crew: Hive) -> None:
    assert refused(crew.api("POST", "/api/agents/alice/dance", {}), 404, "not_found")
    assert refused(crew.api("POST", "/api/agents/nobody/start", {}), 404, "unknown_agent")
    assert refused(crew.api("POST", "/api/agents", {"name": "alice"}), 409, "conflict")
    assert refused(crew.api("POST", "/api/agents", {"name": "-rf"}), 400, "bad_name")
    assert refused(crew.api("POST", "/api/agents/alice/interrupt", {}), 409, "conflict")  # nobody is there
    assert refused(crew.api("POST", "/api/agents/manager/destroy", {"confirm": "manager"}), 403, "forbidden")
    assert refused(crew.api("POST", "/api/messages", {"to": "alice", "body": "x" * 65_537}), 413, "too_large")


def test_a_body_has_a_largest(crew: Hive) -> None:
    for size in (hyperhive.BODY_MAX + 1, 10**12):  # promised, not sent: nobody waits for it
        head = f"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {crew.token}\r\n"
        answer = raw(crew, f"{head}Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n")
        assert refused(answer, 413, "too_large")


LINES = "Host: localhost\r\nConnection: close\r\n"
POST = f"POST /api/messages HTTP/1.1\r\n{LINES}Authorization: Bearer TOKEN\r\nContent-Type: application/json\r\n"
MAIL = '{"to":"alice","body":"x"}'
CHUNKED = f"{POST}Transfer-Encoding: chunked\r\n\r\n"
ODD_REQUESTS = {
    "no HTTP": ("\0\xff\x16\x03\x01\r\n\r\n", 400),
    "the preface of HTTP/2": ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
    "no version that there is": (f"GET /healthz HTTP/x\r\n{LINES}\r\n", 400),
    "a method in lower case": (f"get /healthz HTTP/1.1\r\n{LINES}\r\n", 400),
    "tabs": (f"GET\t/healthz\tHTTP/1.1\r\n{LINES}\r\n", 400),
    "a method that nobody has": (f"BREW /healthz HTTP/1.1\r\n{LINES}\r\n", 405),
    "OPTIONS": (f"OPTIONS /healthz HTTP/1.1\r\n{LINES}\r\n", 405),
    "OPTIONS of all": (f"OPTIONS * HTTP/1.1\r\n{LINES}\r\n", 404),
    "CONNECT": (f"CONNECT localhost:22 HTTP/1.1\r\n{LINES}\r\n", 404),
    "TRACE": (f"TRACE /healthz HTTP/1.1\r\n{LINES}\r\n", 405),
    "another address within": (f"GET http://evil.example/api/state HTTP/1.1\r\n{LINES}\r\n", 401),
    "two slashes": (f"GET //api/state HTTP/1.1\r\n{LINES}\r\n", 401),
    "two slashes within": (f"GET /api//state HTTP/1.1\r\n{LINES}\r\n", 404),
    "a way up": (f"GET /api/../api/state HTTP/1.1\r\n{LINES}\r\n", 404),
    "a way up, encoded": (f"GET /static/%2e%2e/api/state HTTP/1.1\r\n{LINES}\r\n", 404),
    "a NUL": (f"GET /healthz\0 HTTP/1.1\r\n{LINES}\r\n", 404),
    "a NUL, encoded": (f"GET /healthz%00 HTTP/1.1\r\n{LINES}\r\n", 404),
    "half an encoding": (f"GET /healthz%zz HTTP/1.1\r\n{LINES}\r\n", 404),
    "parameters of a path": (f"GET /healthz;x HTTP/1.1\r\n{LINES}\r\n", 404),
    "no colon": ("GET /healthz HTTP/1.1\r\nno colon\r\n\r\n", 400),
    "a space before the colon": (f"GET /healthz HTTP/1.1\r\nHost : localhost\r\n{LINES}\r\n", 400),
    "a NUL in a header": (f"GET /healthz HTTP/1.1\r\n{LINES}X: a\0b\r\n\r\n", 400),
    "a bare CR in a header": (f"GET /healthz HTTP/1.1\r\n{LINES}X: a\rb\r\n\r\n", 400),
    "two hosts": (f"GET /healthz HTTP/1.1\r\n{LINES}Host: evil.example\r\n\r\n", 403),
    "two tokens": (f"{POST}Authorization: Bearer x\r\nContent-Length: 2\r\n\r\n{{}}", 401),
    "a long header": (f"GET /healthz HTTP/1.1\r\n{LINES}X: {'x' * 16_384}\r\n\r\n", 431),
    "many headers": (f"GET /healthz HTTP/1.1\r\n{LINES}" + "X: y\r\n" * 4000 + "\r\n", 431),
    "a negative length": (f"{POST}Content-Length: -1\r\n\r\n{MAIL}", 400),
    "a length with a sign": (f"{POST}Content-Length: +{len(MAIL)}\r\n\r\n{MAIL}", 400),
    "two lengths": (f"{POST}Content-Length: {len(MAIL)}\r\nContent-Length: 2\r\n\r\n{MAIL}", 400),
    "a length that is too short": (f"{POST}Content-Length: 9\r\n\r\n{MAIL}", 400),
    "a length beyond measure": (f"{POST}Content-Length: {'9' * 30}\r\n\r\n{MAIL}", 413),
    "no length": (f"{POST}\r\n{MAIL}", 400),
    "chunks": (f"{CHUNKED}{len(MAIL):x}\r\n{MAIL}\r\n0\r\n\r\n", 200),
    "a chunk that is longer": (f"{CHUNKED}5\r\n{MAIL}\r\n0\r\n\r\n", 400),
    "a chunk of no size": (f"{CHUNKED}zz\r\n{MAIL}\r\n0\r\n\r\n", 400),
    "a chunk of negative size": (f"{CHUNKED}-1\r\n{MAIL}\r\n0\r\n\r\n", 400),
    "chunks in HTTP/1.0": (CHUNKED.replace("1.1", "1.0") + f"{len(MAIL):x}\r\n{MAIL}\r\n0\r\n\r\n", 400),
    "another encoding": (f"{POST}Transfer-Encoding: gzip\r\n\r\n{MAIL}", 501),
    "two encodings": (f"{POST}Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", 501),
}
UNFINISHED = {
    "nothing": "",
    "lines without an end": "GET /healthz HTTP/1.1\r\nHost: loc",
    "bare LF": "GET /healthz HTTP/1.1\nHost: localhost\n\n",
    "less than promised": f"{POST}Content-Length: 999\r\n\r\n{MAIL}",
    "a chunk beyond measure": f"{CHUNKED}{'f' * 15}\r\n{MAIL}",
    "a refusal that nobody waits for": "garbage\r\n\r\n",
    "an answer that nobody waits for": f"GET / HTTP/1.1\r\n{LINES}\r\n",
}


def is_well(hive: Hive, before: int) -> bool:
    """It answers, and its log has no more than it had."""
    assert hive.api("GET", "/healthz", token=None).status == 200
    log = hive.log.read_text()[before:]
    return "Traceback" not in log and "ERROR" not in log


@pytest.mark.parametrize(("request_", "status"), ODD_REQUESTS.values(), ids=ODD_REQUESTS)
def test_odd_requests_are_refused_in_the_same_shape(crew: Hive, request_: str, status: int) -> None:
    before = len(crew.log.read_text())
    answer = raw(crew, request_.replace("TOKEN", crew.token).encode("latin-1"))
    assert answer.status == status, answer
    assert status == 200 or refused(answer, status, answer.body["code"])
    assert is_well(crew, before)


@pytest.mark.parametrize("request_", UNFINISHED.values(), ids=UNFINISHED)
def test_clients_that_go_away_leave_no_trace(crew: Hive, request_: str) -> None:
    before = len(crew.log.read_text())
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", crew.port), timeout=30) as peer:
            peer.sendall(request_.replace("TOKEN", crew.token).encode("latin-1"))
    assert is_well(crew, before)


def test_requests_that_come_together_are_answered_in_order(crew: Hive) -> None:
    asked = f"GET /healthz HTTP/1.1\r\n{LINES}\r\n".replace("Connection: close\r\n", "")
    with socket.create_connection(("127.0.0.1", crew.port), timeout=30) as peer, peer.makefile("rb") as answers:
        peer.sendall((asked * 3 + "garbage\r\n\r\n" + asked).encode())
        found = answers.read()
    assert re.findall(rb"HTTP/1\.. (\d+)", found) == [b"200"] * 3 + [b"400"]  # and then it hangs up


def test_head_is_get_without_the_body(crew: Hive) -> None:
    for path in ("/", "/healthz", "/api/state", "/api/agents/nobody"):
        shown, head = crew.api("GET", path), crew.api("HEAD", path)
        assert (head.status, head.body) == (shown.status, "") and has_headers(head)
        assert head.headers.get_content_type() == shown.headers.get_content_type()
    assert crew.api("HEAD", "/api/stream").status == 200  # it does not stay


def test_clients_that_dawdle_keep_nobody_waiting(crew: Hive) -> None:
    with ExitStack() as stack:
        where = ("127.0.0.1", crew.port)
        peers = [stack.enter_context(socket.create_connection(where, timeout=30)) for _ in range(100)]
        for letter in f"GET /healthz HTTP/1.1\r\n{LINES}":
            for peer in peers:
                peer.sendall(letter.encode())
            if letter == "\n":
                assert crew.api("GET", "/api/state").status == 200
        for peer in peers:
            peer.sendall(b"\r\n")
        for peer in peers:
            with closing(http.client.HTTPResponse(peer)) as response:
                response.begin()
                assert response.status == 200


# ── static files ──


def test_the_page_and_its_files_are_open_and_hold_no_data(crew: Hive) -> None:
    page = crew.api("GET", "/", token=None)
    assert page.status == 200 and page.headers.get_content_type() == "text/html"
    named = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', page.body))
    assert named
    types = {
        ".js": "text/javascript",
        ".css": "text/css",
        ".svg": "image/svg+xml",
        ".webmanifest": "application/manifest+json",
    }
    for path in named:
        answer = crew.api("GET", path, token=None)
        assert answer.status == 200 and answer.headers.get_content_type() == types[Path(path).suffix]
        assert crew.token not in answer.body
    assert crew.token not in page.body


def test_a_file_that_a_browser_has_does_not_come_again(crew: Hive) -> None:
    for path in ("/", "/static/app.js"):
        tag = crew.api("GET", path, token=None).headers["ETag"]
        for known in (tag, f'"another", W/{tag}'):
            same = crew.api("GET", path, token=None, headers={"If-None-Match": known})
            assert (same.status, same.body, same.headers["ETag"]) == (304, "", tag) and has_headers(same)
            assert same.headers["Cache-Control"] == "no-cache"
        for known in (tag.strip('"')[:8], '"another"', ""):
            assert crew.api("GET", path, token=None, headers={"If-None-Match": known}).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/../hyperhive.py", "/static/%2e%2e/hyperhive.py", "/static/..%2fhyperhive.py", "/static/..",
        "/static/.", "/static/", "/static/app.css/", "/static//etc/passwd", "//etc/passwd", "/static/%2fetc%2fpasswd",
        "/static/index.html%00.js", "/static/..\\hyperhive.py", "/../../../../etc/passwd", "/static/APP.CSS",
    ],
)  # fmt: skip
def test_nothing_else_is_served_as_a_file(crew: Hive, path: str) -> None:
    answer = raw(crew, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert refused(answer, 404, "not_found")


# ── GET ──


def test_each_get_answers_with_its_keys(crew: Hive) -> None:
    with crew.agent("manager") as manager:
        approval = manager.ask("request_spawn", name="shown", description="to be shown")["id"]
        message = manager.ask("send", to="alice", body="to be shown")["id"]
    sha = crew.api("GET", "/api/deploys?agent=alice").body["deploys"][0]["sha"]
    keys = {
        "/healthz": {"ok"},
        "/api/state": {
            "seq", "version", "now", "hive", "agents", "approvals", "questions", "messages", "deploys", "usage",
            "attention", "paused_all",
        },
        "/api/agents": {"agents"},
        "/api/agents/alice": {"agent", "events", "questions", "reminders"},
        "/api/agents/alice/events": {"events"},
        "/api/approvals": {"approvals"},
        "/api/approvals?status=pending": {"approvals"},
        f"/api/approvals/{approval}": {"approval"},
        f"/api/approvals/{approval}/files": {"files"},
        f"/api/approvals/{approval}/precheck": {"log"},
        f"/api/agents/alice/diff?from={sha}&to={sha}": {"diff", "files"},
        "/api/messages?with=alice&before=9&max=2": {"messages"},
        f"/api/messages/{message}/thread": {"messages"},
        "/api/questions": {"questions"},
        "/api/deploys?agent=alice": {"deploys"},
        "/api/deploys/1": {"deploy"},
        "/api/schedules": {"schedules"},
        "/api/usage?days=3": {"today", "usage"},
        "/api/audit?max=5": {"audit"},
        "/api/files": {"files", "max_bytes"},
        "/api/system": {"versions", "disk", "sockets", "log"},
        "/api/doctor": {"findings"},
    }  # fmt: skip
    for path, expected in keys.items():
        answer = crew.api("GET", path)
        assert answer.status == 200 and answer.body.keys() == expected, path
    assert {"name", "containers", "rehearsal", "domain", "home"} == crew.api("GET", "/api/state").body["hive"].keys()
    assert {"diff", "files"} <= crew.api("GET", f"/api/approvals/{approval}").body["approval"].keys()
    assert crew.api("GET", "/api/deploys/1").body["deploy"]["log"]
    assert len(crew.api("GET", "/api/audit?max=5").body["audit"]) == 5
    one = re.compile(r"<number:int>|<name>|<file>")
    gets = {one.sub("*", route.path) for route in TABLE if route.method == "GET"}
    tried = {re.sub(r"/\d+|/alice", "/*", path.partition("?")[0]) for path in keys}
    assert gets - tried == {"/", "/static/*", "/metrics", "/api/stream"}


def test_metrics_are_prometheus_text(crew: Hive) -> None:
    answer = crew.api("GET", "/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    sample = re.compile(r'(hyperhive_[a-z_]+)(?:\{[a-z_]+="[^"\\\n]*"(?:,[a-z_]+="[^"\\\n]*")*\})? (-?\d+(?:\.\d+)?)')
    declared: dict[str, int] = {}
    assert answer.body.endswith("\n")
    for line in answer.body.splitlines():
        if match := re.fullmatch(r"# TYPE (hyperhive_[a-z_]+) (?:gauge|counter)", line):
            assert declared.setdefault(match[1], 0) == 0, "declared twice"
        elif not re.fullmatch(r"# HELP hyperhive_[a-z_]+ .+", line):
            match = sample.fullmatch(line)
            assert match and match[1] in declared, line
            declared[match[1]] += 1
    assert {"hyperhive_agents", "hyperhive_messages", "hyperhive_cost_today_usd"} <= declared.keys()
    assert all(declared.values())


# ── POST ──


def test_an_attached_file_is_kept_for_the_agents_to_read(crew: Hive) -> None:
    names = ["plan.tar.gz", "plan.tar.gz", "../../etc/pass wd", "C:\\notes.txt", ".bashrc", "-rf", "é" * 200 + ".pdf"]
    kept = ["plan.tar.gz", "plan.tar-2.gz", "pass-wd", "notes.txt", "bashrc", "rf", "é" * 58 + ".pdf"]
    content = bytes(range(256))
    answers = [crew.api("POST", f"/api/files?name={quote(name)}", content).body for name in names]
    assert [answer["name"] for answer in answers] == kept
    for answer in answers:
        file = Path(answer["path"])
        assert file.parent == crew.state / "operator" and file.read_bytes() == content and answer["size"] == 256
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert sorted(row["name"] for row in crew.api("GET", "/api/files").body["files"]) == sorted(kept)
    assert crew.api("POST", "/api/files/delete", {"name": "rf"}).body == {}
    assert not (crew.state / "operator/rf").exists()
    for name in ("rf", "../hive.sqlite", "."):
        assert refused(crew.api("POST", "/api/files/delete", {"name": name}), 404, "not_found")
    for name in ("", "%00", "a%0Ab", "a%E2%80%AEb"):
        assert refused(crew.api("POST", f"/api/files?name={name}", b"x"), 400, "bad_request")
    whats = [row["what"] for row in crew.api("GET", "/api/audit").body["audit"]]
    assert whats.count("attached") == len(names) and whats.count("attachment_deleted") == 1
    assert not list((crew.state / "tmp").iterdir())


def test_only_the_operator_may_send_a_long_body(folder: Path) -> None:
    with Hive(folder, limits={"attachment_bytes": 3_000_000}) as hive:
        assert hive.api("POST", "/api/files?name=long", b"x" * 3_000_000).body["size"] == 3_000_000
        for token, path, size in (
            (hive.token, "/api/files?name=longer", 3_000_001),
            (hive.token, "/api/messages", 3_000_000),
            ("wrong", "/api/files?name=long", 3_000_000),
        ):
            asked = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
            asked += f"Content-Type: application/octet-stream\r\nContent-Length: {size}\r\n\r\n"
            assert refused(raw(hive, asked), 413, "too_large")  # before a byte of it was sent
        assert refused(hive.api("POST", "/api/files?name=x", {}), 415, "bad_type")
        assert refused(hive.api("POST", "/api/files?name=x", b"x", token=None), 401, "unauthorized")


def test_messages_and_reading_them(crew: Hive) -> None:
    sent = [crew.api("POST", "/api/messages", {"to": "alice", "body": "hello", "client_id": "same"}).body for _ in "ab"]
    assert sent[0] == sent[1]
    everyone = crew.api("POST", "/api/messages", {"to": "*", "body": "hello all"}).body
    assert len(everyone["ids"]) == 3
    with crew.agent("alice") as alice:
        (mine,) = (row for row in alice.ask("inbox", max=100)["messages"] if row["id"] == sent[0]["id"])
        assert (mine["from"], mine["body"]) == ("operator", "hello")
        answer = alice.ask("send", to="operator", body="here", in_reply_to=mine["id"])["id"]
    (row,) = (row for row in crew.api("GET", "/api/messages?with=alice").body["messages"] if row["id"] == answer)
    assert (row["state"], row["in_reply_to"]) == ("queued", sent[0]["id"])
    assert crew.api("POST", "/api/messages/read", {"ids": [answer]}).body == {"read": 1}
    assert crew.api("POST", "/api/messages/read", {"ids": [answer, 10**6]}).body == {"read": 0}


def test_questions(crew: Hive) -> None:
    with crew.agent("bob") as bob:
        answered, cancelled = (bob.ask("ask", question="Which?", options=["a", "b"])["id"] for _ in range(2))
        assert crew.api("POST", f"/api/questions/{answered}/answer", {"text": "b"}).body["question"]["answer"] == "b"
        assert refused(crew.api("POST", f"/api/questions/{answered}/answer", {"text": "a"}), 409, "conflict")
        assert crew.api("POST", f"/api/questions/{cancelled}/cancel", {}).status == 200
        assert refused(crew.api("POST", "/api/questions/10000/cancel", {}), 404, "not_found")
        told = [row["data"] for row in bob.ask("inbox", max=100)["messages"] if row.get("kind") == "question_answered"]
    assert [(data["question"], data["outcome"]) for data in told] == [(answered, "answered"), (cancelled, "cancelled")]


def test_decisions(crew: Hive) -> None:
    with crew.agent("manager") as manager:
        asked = [manager.ask("request_spawn", name=name, description="helps") for name in ("yes", "no")]
    assert all(answer["ok"] for answer in asked), asked
    yes, no = (answer["id"] for answer in asked)
    stale = crew.api("POST", f"/api/approvals/{yes}/approve", {"sha": "0" * 40})
    assert refused(stale, 409, "stale")
    stale = crew.api("POST", f"/api/approvals/{yes}/approve", {"digest": "0" * 16})
    assert refused(stale, 409, "stale")
    shown = crew.api("GET", f"/api/approvals/{yes}").body["approval"]
    for _ in range(2):  # twice is once
        answer = crew.api("POST", f"/api/approvals/{yes}/approve", {"note": "good", "digest": shown["digest"]})
        assert answer.body["approval"]["status"] == "approved"
    assert crew.api("POST", f"/api/approvals/{no}/deny", {"note": "bad"}).body["approval"]["note"] == "bad"
    assert refused(crew.api("POST", f"/api/approvals/{no}/approve", {}), 409, "conflict")
    wait_for(lambda: crew.api("GET", f"/api/approvals/{yes}").body["approval"].get("phase") == "deployed", "the deploy")
    assert len(crew.api("GET", "/api/deploys?agent=yes").body["deploys"]) == 1


def test_an_approval_can_be_taken_back_before_its_deploy_begins(hive: Hive) -> None:
    hive.stop()
    hive.configure(undo_s=600.0)
    hive.start()
    with hive.spawn("manager").agent("manager") as manager:
        number = manager.ask("request_spawn", name="alice", description="helps")["id"]
        with Stream(hive) as stream:
            stream.next()
            assert hive.api("POST", f"/api/approvals/{number}/approve", {"undo": True}).status == 200
            deploy = stream.until("deploy")["row"]
            assert (deploy["agent"], deploy["phase"]) == ("alice", "queued")
            undone = hive.api("POST", f"/api/approvals/{number}/undo", {}).body["approval"]
            assert undone["status"] == "pending" and not undone.keys() & {"phase", "undo_until", "resolved_at"}
            assert stream.until("deploy_gone")["id"] == deploy["id"]
        assert refused(hive.api("POST", f"/api/approvals/{number}/undo", {}), 409, "conflict")
        assert hive.ask(cmd="list")["agents"] == ["manager"]
        assert manager.ask("inbox")["messages"] == []  # it heard nothing of this


def test_a_proposal_can_be_edited_before_it_is_approved(crew: Hive) -> None:
    with crew.agent("manager") as manager:
        number = manager.ask("request_spawn", name="edited", description="helps", config="{ }\n")["id"]
    shown = crew.api("GET", f"/api/approvals/{number}").body["approval"]
    edit = {"path": "agent.nix", "text": "{ /* mine */ }\n", "digest": shown["digest"]}
    edited = crew.api("POST", f"/api/approvals/{number}/edit", edit).body["approval"]
    assert "+{ /* mine */ }" in edited["diff"] and edited["digest"] != shown["digest"]
    assert refused(crew.api("POST", f"/api/approvals/{number}/edit", edit), 409, "stale")
    assert refused(crew.api("POST", f"/api/approvals/{number}/approve", {"digest": shown["digest"]}), 409, "stale")
    assert crew.api("GET", f"/api/approvals/{number}/files").body["files"] == {"agent.nix": edit["text"]}
    assert crew.api("POST", f"/api/approvals/{number}/deny", {}).status == 200


def test_an_agents_life_by_its_actions(hive: Hive) -> None:
    def do(action: str, **body: Any) -> Any:
        answer = hive.api("POST", f"/api/agents/dora/{action}", body)
        assert answer.status == 200, (action, answer.body)
        return answer.body

    def agent() -> dict[str, Any]:
        row: dict[str, Any] = hive.api("GET", "/api/agents/dora").body["agent"]
        return row

    deploy = hive.api("POST", "/api/agents", {"name": "dora", "description": "explores"}).body["deploy_id"]
    wait_for(lambda: hive.phase(deploy) == "deployed", "the deploy")
    wait_for(lambda: agent()["state"] == "idle", "dora to be idle")
    assert (agent()["description"], agent()["running"], agent()["manager"]) == ("explores", True, False)
    do("model", model="other")
    with hive.agent("dora") as dora:
        assert dora.ask("hello", harness_version="0", last_event=10**6)["model"] == "other"
    do("pause")
    assert agent()["paused"] and agent()["state"] == "paused"
    do("resume")
    for action, running in (("stop", False), ("start", True), ("kill", False), ("restart", True)):
        do(action)
        assert agent()["running"] is running, action
    deploy = do("rebuild")["deploy_id"]
    wait_for(lambda: hive.phase(deploy) == "deployed", "the second deploy")
    assert refused(hive.api("POST", "/api/agents/dora/rollback", {}), 404, "not_found")
    wait_for(lambda: agent()["state"] == "idle", "dora to be back")
    do("login_begin")
    wait_for(lambda: agent().get("login", {}).get("phase") == "code_wanted", "an address to sign in at")
    do("login_finish", code="right#code")
    wait_for(lambda: agent()["login"]["phase"] == "done", "the sign-in")
    for action in ("interrupt", "compact", "new_session", "login_cancel"):
        do(action)
    wait_for(lambda: hive.api("POST", "/api/agents/dora/destroy", {"confirm": "dora"}).status == 200, "dora's end")
    assert agent()["kept"] and hive.api("GET", "/api/state").body["agents"] == []
    do("destroy", confirm="dora", purge=True)
    assert refused(hive.api("GET", "/api/agents/dora"), 404, "unknown_agent")


def test_pause_all_and_schedules(crew: Hive) -> None:
    for paused in (True, False):
        assert crew.api("POST", "/api/pause_all", {"paused": paused}).body == {}
        assert crew.api("GET", "/api/state").body["paused_all"] is paused
    schedule = {"to": "alice", "body": "look around", "first": "2030-01-31T08:00:00.000Z", "every_s": 60}
    number = crew.api("POST", "/api/schedules", schedule).body["id"]
    (row,) = (row for row in crew.api("GET", "/api/schedules").body["schedules"] if row["id"] == number)
    assert row.items() >= schedule.items() and row["next"] == schedule["first"]
    assert crew.api("POST", f"/api/schedules/{number}/cancel", {}).status == 200
    assert refused(crew.api("POST", f"/api/schedules/{number}/cancel", {}), 404, "not_found")
    assert refused(crew.api("POST", "/api/schedules", {**schedule, "to": "nobody"}), 404, "unknown_agent")


def test_older_events_come_from_the_agent_itself(hive: Hive) -> None:
    """The host keeps the newest; what a page asks beyond them is not mixed in with those, it is shown and forgotten."""
    event = {"at": "2030-01-31T08:00:00Z", "turn": 1, "kind": "text", "data": {"text": "x"}}
    with hive.spawn("alice").agent("alice") as alice:
        seen = alice.ask("hello", harness_version="0", last_event=10**6)["last_event"]
        for start in range(seen + 1, seen + 2501, 500):
            assert alice.ask("report", events=[{"id": start + n, **event} for n in range(500)])["ok"]
        newest = seen + 2500
        kept = hive.api("GET", f"/api/agents/alice/events?before={newest - 1990}&max=300").body["events"]
        ids = [row["id"] for row in kept]
        assert ids == list(range(newest - 1999, newest - 1990))
        (control,) = (item for item in alice.ask("lease", wait_s=5)["control"] if item["do"] == "send_history")
        assert control == {"do": "send_history", "before": newest - 1999, "max": 291}
        with Stream(hive, "?agent=alice") as stream:
            stream.next()
            alice.ask("report", events=[{"id": 5, **event}])
            assert stream.until("events")["events"][0]["id"] == 5
    shown = [row["id"] for row in hive.api("GET", "/api/agents/alice").body["events"]]
    assert shown == list(range(newest - 299, newest + 1))


def an_event(number: int, size: int) -> dict[str, Any]:
    data = {"text": "x" * size}
    return {"id": number, "at": "2030-01-31T08:00:00Z", "turn": 1, "kind": "text", "data": data}


def test_large_events_are_kept_and_shown_up_to_a_sum_of_bytes(hive: Hive) -> None:
    size, path = 700_000, "/api/agents/alice"
    with hive.spawn("alice").agent("alice") as alice:
        known = alice.ask("hello", harness_version="0", last_event=10**6)["last_event"]
        too_large = alice.ask("report", events=[an_event(known + 1, hyperhive.EVENT_BYTES)])
        assert (too_large["code"], too_large["ok"]) == ("too_large", False)
        newest = known + hyperhive.EVENTS_KEPT_BYTES // size + 10
        for number in range(known + 1, newest + 1):
            assert alice.ask("report", events=[an_event(number, size)])["ok"]
    pages = [hive.api("GET", f"{path}/events?before={newest + 1}&max=1000").body]
    while pages[-1].get("more"):
        pages.append(hive.api("GET", f"{path}/events?before={pages[-1]['events'][0]['id']}&max=1000").body)
    assert all(len(json.dumps(page)) < hyperhive.EVENTS_BYTES + 2 * size for page in pages)
    kept = [event["id"] for page in reversed(pages) for event in page["events"]]
    assert kept == list(range(kept[0], newest + 1))
    room = hyperhive.EVENTS_KEPT_BYTES // size
    assert room - 3 <= len(kept) <= room + 3  # what came since the last weighing is kept, too
    answer = hive.api("GET", path).body["events"]
    assert [event["id"] for event in answer] == kept[-len(answer) :] and len(answer) == len(pages[0]["events"])
    assert [event["id"] for event in hive.ask(cmd="events", name="alice")["events"]] == kept[-len(answer) :]


# ── the stream ──


class Event(NamedTuple):
    id: str
    event: str
    data: Any

    @property
    def number(self) -> int:
        return int(self.id.rpartition("-")[2])


class Stream:
    """GET /api/stream as a browser reads it."""

    def __init__(self, hive: Hive, query: str = "", *, after: str = "") -> None:
        headers = {"Authorization": f"Bearer {hive.token}", **({"Last-Event-ID": after} if after else {})}
        self.connection = http.client.HTTPConnection("127.0.0.1", hive.port, timeout=30)
        self.connection.request("GET", f"/api/stream{query}", headers=headers)
        self.response = self.connection.getresponse()
        self.headers = self.response.headers
        assert self.response.status == 200

    def next(self) -> Event:
        fields: dict[str, str] = {}
        while line := self.response.readline().decode():
            if line == "\n" and fields:
                event = Event(fields["id"], fields["event"], json.loads(fields["data"]))
                assert contract.conforms(event.data, event.event.capitalize())
                return event
            if line != "\n" and not line.startswith(":"):
                key, _, value = line.rstrip("\n").partition(": ")
                fields[key] = value
        raise EOFError("the stream has ended")

    def until(self, kind: str) -> dict[str, Any]:
        """The next change of this kind."""
        while (event := self.next()).event != "change" or event.data["kind"] != kind:
            pass
        change: dict[str, Any] = event.data
        return change

    def ended(self) -> bool:
        try:
            while True:
                self.next()
        except (EOFError, http.client.IncompleteRead, ConnectionResetError):
            return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()
        self.connection.close()


def pauses(hive: Hive, *names: str) -> None:
    """Two changes a name, the second takes back the first."""
    for name in names:
        for paused in (True, False):
            hive.ask(cmd="set_paused", name=name, paused=paused)


def test_a_stream_begins_with_a_snapshot_and_goes_on_with_changes(crew: Hive) -> None:
    with Stream(crew) as stream:
        first = stream.next()
        state = crew.api("GET", "/api/state").body
        assert first.event == "snapshot" and first.data["seq"] == first.id == state["seq"]
        assert first.data.keys() == state.keys() and first.data["agents"] == state["agents"]
        sent = crew.api("POST", "/api/messages", {"to": "alice", "body": "streamed"}).body["id"]
        crew.ask(cmd="set_paused", name="alice", paused=True)
        crew.ask(cmd="set_paused", name="alice", paused=False)
        seen = []
        while not (
            seen and seen[-1].data == {"kind": "agent", "row": crew.api("GET", "/api/agents/alice").body["agent"]}
        ):
            seen.append(stream.next())
    assert [event.event for event in seen] == ["change"] * len(seen)
    assert [event.number for event in seen] == list(range(first.number + 1, first.number + 1 + len(seen)))
    (message,) = (event.data["row"] for event in seen if event.data["kind"] == "message")
    assert (message["id"], message["body"], message["state"]) == (sent, "streamed", "queued")


def test_every_kind_of_change_is_streamed(hive: Hive) -> None:
    with Stream(hive, "?agent=dora") as stream, Stream(hive) as other:
        stream.next()
        hive.spawn("manager", "dora")
        assert stream.until("deploy")["row"]["agent"] == "manager"
        assert stream.until("deploy_log")["lines"]
        with hive.agent("dora") as dora, hive.agent("manager") as manager:
            event = {"id": 10**6, "at": "2030-01-31T08:00:00Z", "turn": 1, "kind": "text", "data": {"text": "hi"}}
            usage = dict.fromkeys(("input_tokens", "output_tokens", "cache_read_tokens", "cache_creation_tokens"), 1)
            usage |= {"turn": "t", "duration_ms": 1, "cost_usd": 0.25}  # type: ignore[dict-item]
            dora.ask("report", events=[event], usage=usage)
            assert stream.until("usage") == {"kind": "usage", "today_usd": 0.25}
            shown = stream.until("events")
            assert shown["agent"] == "dora" and shown["events"][0]["data"] == {"text": "hi"}
            dora.ask("ask", question="Which?")
            assert stream.until("question")["row"]["question"] == "Which?"
            assert [row["kind"] for row in stream.until("attention")["rows"]] == ["question"]
            manager.ask("request_spawn", name="eve", description="helps")
            assert stream.until("approval")["row"]["agent"] == "eve"
        hive.ask(cmd="destroy", name="dora")
        assert stream.until("agent_gone")["name"] == "dora"
        kinds = set()
        while "agent_gone" not in kinds:
            event = other.next()
            kinds |= {event.data["kind"]} if event.event == "change" else set()
        assert "events" not in kinds  # those are only for who asked


def test_a_stream_that_comes_back_gets_exactly_what_it_missed(crew: Hive) -> None:
    with Stream(crew) as whole:
        first = whole.next()
        pauses(crew, "alice")
        with Stream(crew) as other:
            other.next()
            pauses(crew, "bob")
            last = other.next()
        pauses(crew, "alice", "bob")
        everything = [first]
        with Stream(crew, after=last.id) as again:
            sent = crew.api("POST", "/api/messages", {"to": "alice", "body": "the last"}).body["id"]
            missed = [again.next()]
            for events, stream in ((everything, whole), (missed, again)):
                while events[-1].data.get("row", {}).get("id") != sent:
                    events.append(stream.next())
    assert missed == everything[everything.index(last) + 1 :]


@pytest.mark.parametrize(
    "after",
    ["", "x", "é", "0-0", "{epoch}-", "{epoch}-²", f"{{epoch}}-{'9' * 5000}", "{epoch}--1", "{epoch}-1x", "x-1", "-1"],
    ids=lambda after: after[:12],
)
def test_an_id_that_says_nothing_gets_a_snapshot(crew: Hive, after: str) -> None:
    epoch = crew.api("GET", "/api/state").body["seq"].rpartition("-")[0]
    with Stream(crew, after=after.format(epoch=epoch)) as stream:
        assert stream.next().event == "snapshot"


def test_an_id_from_before_a_restart_or_a_gap_gets_a_snapshot(hive: Hive) -> None:
    with Stream(hive.spawn("alice")) as stream:
        old = stream.next().id
    wait_for(lambda: len(streams_of(hive)) == 0, "the stream to be gone")
    pauses(hive, "alice")  # nobody listens: changes are not kept
    with Stream(hive, after=old) as stream:
        assert stream.next().event == "snapshot"
    hive.stop()
    hive.start()
    with Stream(hive, after=old) as stream:
        assert stream.next().event == "snapshot"


def streams_of(hive: Hive) -> list[Any]:
    """The daemon's TCP connections that are open at both ends, where no other request is under way."""
    assert hive.daemon is not None
    connections = psutil.Process(hive.daemon.pid).net_connections("tcp")
    return [connection for connection in connections if connection.status == psutil.CONN_ESTABLISHED]


def test_200_open_streams_take_no_thread_each_and_vanish(hive: Hive) -> None:
    assert hive.daemon is not None
    daemon = psutil.Process(hive.daemon.pid)
    with ExitStack() as stack:
        for _ in range(20):  # the web server's threads are all there
            stack.enter_context(Stream(hive)).next()
        before = daemon.num_threads()
        streams = [stack.enter_context(Stream(hive)) for _ in range(180)]
        assert all(stream.next().event == "snapshot" for stream in streams)
        assert daemon.num_threads() <= before
        for _ in range(20):
            assert hive.api("GET", "/healthz", token=None).status == 200
        hive.ask(cmd="token")
        sent = hive.spawn("alice").api("POST", "/api/messages", {"to": "alice", "body": "to all"}).body["id"]
        for stream in streams[::30]:
            while stream.until("message")["row"]["id"] != sent:
                pass
    wait_for(lambda: not streams_of(hive), "every stream to be gone")


def test_a_stream_that_is_not_read_is_dropped_disturbs_nobody_and_can_come_back(hive: Hive) -> None:
    hive.spawn("alice")
    with Stream(hive) as reads, Stream(hive) as stalls:
        reads.next()
        seen = stalls.next().id
        body, sent = "x" * 60_000, 0
        while len(streams_of(hive)) > 1 and sent < 300:
            number = hive.api("POST", "/api/messages", {"to": "alice", "body": body}).body["id"]
            while reads.until("message")["row"]["id"] != number:
                pass
            sent += 1
        assert len(streams_of(hive)) == 1, "the stalled stream is still there"
        assert stalls.ended()
        hive.api("POST", "/api/messages", {"to": "operator", "body": "still there?"})
        assert reads.until("message")["row"]["body"] == "still there?"
    with Stream(hive, after=seen) as again:
        while "still there?" not in told_in(again.next()):
            pass


def test_what_an_agent_reports_fills_no_memory(hive: Hive) -> None:
    """Also what nobody asked for, and what is only shown: the stream keeps of it what may be missed, and no more."""
    assert hive.daemon is not None
    memory = psutil.Process(hive.daemon.pid).memory_info
    with hive.spawn("alice").agent("alice") as alice, Stream(hive) as stream, Stream(hive, "?agent=alice") as other:
        seen, _ = stream.next().id, other.next()
        assert alice.ask("report", events=[an_event(0, 700_000)])["ok"]
        before = memory().rss
        for _ in range(150):
            assert alice.ask("report", events=[an_event(0, 700_000)])["ok"]
        assert memory().rss - before < 60 * 1024 * 1024
        with Stream(hive, after=seen) as again:
            assert again.next().event == "snapshot"
        hive.ask(cmd="set_paused", name="alice", paused=True)
        while not stream.until("agent")["row"]["paused"]:
            pass


def test_a_stream_that_is_on_its_way_when_the_token_is_rotated_ends(hive: Hive) -> None:
    """Its token was looked at, but what was asked for before it is not read yet."""
    head = f"HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {hive.token}\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", hive.port))
        connection.sendall(f"GET /static/readme.png {head}\r\n".encode() * 40)
        connection.sendall(f"GET /api/stream {head}Connection: close\r\n\r\n".encode())
        assert connection.recv(1)
        time.sleep(1)  # enough to come so far; where it is not, the stream is refused sooner
        hive.ask(cmd="token", rotate=True)
        with suppress(ConnectionResetError):
            while connection.recv(65536):
                pass


@contextmanager
def unreadable(hive: Hive) -> Iterator[None]:
    """Meanwhile nobody can read alice's row."""
    with closing(sqlite3.connect(hive.state / "hive.sqlite", isolation_level=None)) as database:
        database.execute("UPDATE agents SET login = '{' WHERE name = 'alice'")
        yield
        database.execute("UPDATE agents SET login = NULL WHERE name = 'alice'")


def test_a_stream_that_can_not_begin_is_closed(hive: Hive) -> None:
    hive.spawn("alice")
    with unreadable(hive):
        for _ in range(2):
            hive.api("POST", "/api/messages", {"to": "operator", "body": "no snapshot is as before"})
            with Stream(hive) as stream:
                assert stream.ended()
    with Stream(hive) as stream:
        assert stream.next().event == "snapshot"


def test_a_change_that_could_not_be_told_comes_with_a_snapshot(hive: Hive) -> None:
    hive.spawn("alice")
    log_before = hive.log.read_text().count("live streams")
    with Stream(hive) as stream:
        seen = stream.next().id
        with unreadable(hive):
            hive.ask(cmd="set_paused", name="alice", paused=True)
            wait_for(lambda: hive.log.read_text().count("live streams") > log_before, "the failure to be logged")
        hive.api("POST", "/api/messages", {"to": "alice", "body": "wakes the streams"})
        while (event := stream.next()).event != "snapshot":
            pass
        assert [row["paused"] for row in event.data["agents"]] == [True]
    with Stream(hive, after=seen) as again:
        assert again.next().event == "snapshot"


def told_in(event: Event) -> list[str]:
    """The bodies of the messages that an event of the stream brings."""
    rows = event.data["messages"] if event.event == "snapshot" else [event.data.get("row", {})]
    return [row.get("body", "") for row in rows]


def test_a_stream_on_which_nothing_happens_shows_that_it_lives(folder: Path) -> None:
    with Hive(folder, heartbeat_s=0.1) as hive, Stream(hive) as stream:
        assert stream.next().event == "snapshot"
        lines = [stream.response.readline() for _ in range(6)]
        assert lines == [b": still here\n", b"\n"] * 3
        sent = hive.api("POST", "/api/messages", {"to": "operator", "body": "between beats"}).body["id"]
        assert stream.until("message")["row"]["id"] == sent


def test_a_stream_needs_http_1_1(crew: Hive) -> None:
    answer = raw(crew, f"GET /api/stream HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {crew.token}\r\n\r\n")
    assert refused(answer, 400, "bad_request") and "HTTP/1.1" in answer.body["error"]


# ── the port ──


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", free_ports())) as taken:
        yield taken.getsockname()[1]


def serve(folder: Path, port: int) -> subprocess.Popen[str]:
    command = [*HYPERHIVE, "serve", "--dir", str(folder), "--port", str(port), "--containers", "process"]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_port_in_use_is_waited_for_and_the_wait_ends_at_a_signal(folder: Path) -> None:
    with taken_port() as port, serve(folder, port) as daemon:
        assert daemon.stdout
        warning = daemon.stdout.readline()
        assert f"port {port} is in use by pid {psutil.Process().pid}" in warning and "trying again" in warning
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(timeout=10) == 0


def test_a_port_that_stays_in_use_is_named_with_its_holder(folder: Path) -> None:
    with taken_port() as port:
        with serve(folder, port) as daemon:
            out, _ = daemon.communicate(timeout=60)
        assert daemon.returncode == 1
        *warnings, error, hint = out.splitlines()
        assert len(warnings) == hyperhive.BIND_TRIES
        assert f"port {port} is in use by pid {psutil.Process().pid}" in error and "choose another port" in hint


def test_a_second_daemon_on_the_same_folder_is_refused(hive: Hive) -> None:
    with serve(hive.folder, free_ports()) as second:
        out, _ = second.communicate(timeout=30)
    assert second.returncode == 1 and hive.daemon and f"pid {hive.daemon.pid}" in out
    assert hive.ask(cmd="list")["ok"]
