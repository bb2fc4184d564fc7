#!/usr/bin/env python3
"""hyperhive: a swarm of Claude Code agents on one machine, and the operator's gate in front of it.

This file is the host's side: a daemon (`serve`), a web dashboard, and the command line that talks to
the daemon. `harness.py` is the other side; one copy runs beside each agent and turns mail into turns.
It is one file because it is an appliance: copy it, read it from top to bottom, run it.

Who is trusted with what (each line is enforced in the room named behind it):

* the operator holds the dashboard's token or may open `host.sock`: everything       (Sockets, Dashboard)
* an agent is known by the socket it speaks on, never by what it says                (Sockets)
* the manager, the agent of that name, may ask for changes; it approves nothing      (Approvals)
* the host opens no path that an agent can write, and runs git only in repositories
  that it made itself; what an agent hands over comes through its socket             (Config repositories)
* what comes from outside is parsed into typed values once, and refused with a reason (Boundary parsing)

Rooms, top to bottom; each uses only those above it:

    Constants and configuration · Errors · Types · Boundary parsing · Processes · Storage · Broker ·
    Budgets · Config repositories · Approvals · Containers · Agents · Attachments · Deploys · Pre-checks ·
    Views · Live · Notifications · Sockets · Dashboard · Daemon · Command line
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import copy
import dataclasses
import datetime
import enum
import errno
import fcntl
import functools
import grp
import hashlib
import hmac
import io
import itertools
import json
import logging
import math
import os
import queue
import re
import resource
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tomllib
import typing
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Literal, NamedTuple, NoReturn, Protocol, TypeVar

# ──────────────────────────────────────────────────────────────────────────────
# Constants and configuration
# ──────────────────────────────────────────────────────────────────────────────
# Every path and every limit comes from `Config`: tests and `demo` run beside a real hive.

VERSION: Final = "0.1.0"
COMMAND: Final = "hyperhive" if globals()["__spec__"] else "hyperhive.py"  # as a module where Nix installed it
PROTOCOL: Final = 1
HERE: Final = Path(__file__).resolve().parent

MANAGER: Final = "manager"
OPERATOR: Final = "operator"
SYSTEM: Final = "system"
EVERYONE: Final = "*"
RESERVED_NAMES: Final = frozenset({"operator", "system", "all", "host", "hive", "self", "reminder"})
NAME_MAX: Final = 9  # `nixos-container create` refuses more than 11 characters, and we add `h-`

SOCKET_PATH_MAX: Final = 107  # sun_path without its final NUL
BIND_TRIES: Final = 12  # after the first: 0.5 + 1 + 10 × 2 s, about 22 s
BIND_WAIT_MAX_S: Final = 2.0
PUBLIC_URL: Final = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::\d{1,5})?/?", re.ASCII)
CONTAINER_KINDS: Final = ("nixos", "process")
TICK_S: Final = 0.25
EVENTS_KEPT: Final = 2000  # of each agent, for the dashboard
EVENTS_KEPT_BYTES: Final = 32 * 1024 * 1024
EVENT_BYTES: Final = 768 * 1024  # a harness cuts its own at 512 KiB, and 128 KiB of pictures
EVENTS_BYTES: Final = 8 * 1024 * 1024  # of events in one answer; at least one of them
WEIGH_BYTES: Final = 1024 * 1024  # how much an agent may report on a connection until what is kept is weighed
LOG_LINES_MAX: Final = 1000
CRASH_WINDOW_MS: Final = 600_000
SIGN_IN_ENDS_MS: Final = 3 * 86_400_000  # so long before its end the operator is told
DAY_MS: Final = 86_400_000

Json = dict[str, Any]
T = TypeVar("T")

log = logging.getLogger("hyperhive")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an agent may use up. Zero turns a limit off where that makes sense (the rates)."""

    body_bytes: int = 64 * 1024
    line_bytes: int = 1024 * 1024
    bundle_line_bytes: int = 8 * 1024 * 1024
    attachment_bytes: int = 25 * 1024 * 1024
    connections: int = 32
    unread: int = 1000
    messages_per_minute: int = 60
    message_burst: int = 30
    reminders: int = 50
    questions: int = 16
    pending_approvals: int = 20
    requests_per_day: int = 500  # of one agent, those included that it cancelled
    attempts: int = 5
    ping_pong: int = 40
    ping_pong_s: int = 600
    config_files: int = 256
    config_file_bytes: int = 1024 * 1024
    crashes: int = 3
    wrong_tokens_per_minute: int = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one hive; `load_config` fills them from a TOML file and the command line."""

    state_dir: Path = Path("/var/lib/hyperhive")
    runtime_dir: Path = Path("/run/hyperhive")
    listen_address: str = "127.0.0.1"
    port: int = 7000
    domains: tuple[str, ...] = ()
    public_url: str = ""  # where a reverse proxy serves the dashboard
    containers: str = "nixos"
    conf_dir: Path = Path("/etc/nixos-containers")
    container_dirs: tuple[str, ...] = (  # in which containers can write
        "/var/lib/nixos-containers",
        "/nix/var/nix/profiles/per-container",
        "/nix/var/nix/gcroots/per-container",
    )
    unit_dir: Path = Path("/run/systemd/system")
    private_users: str = "pick"
    memory_max: str = "4G"
    cpu_quota: str = "200%"
    tasks_max: int = 4096
    nixpkgs: str = ""  # the host's, as a path or flake reference; else what the registry calls nixpkgs
    nixpkgs_unstable: str = "github:NixOS/nixpkgs/nixos-unstable"  # where Claude Code comes from
    source: str = ""  # the folder of hyperhive's own flake; else the one this file lies in
    build_timeout_s: float = 3600.0
    notify_url: str = ""
    notify_format: str = "ntfy"
    manager_autostart: bool = True
    manager_port: int = 8000
    agent_port_base: int = 8100
    claude: str = "claude"
    rehearsal: bool = False
    model: str = ""
    environment_file: str = ""
    extra_prompt: str = ""
    mcp_servers: str = ""
    daily_budget_usd: float = 0.0
    hive_daily_budget_usd: float = 0.0
    wait_for_limit: bool = True
    precheck: str = "build"
    precheck_timeout_s: float = 1800.0
    undo_s: float = 5.0
    remind_after_s: float = 3600.0
    warm_s: float = 120.0
    stall_s: float = 1800.0
    hello_s: float = 60.0
    heartbeat_s: float = 15.0  # of a live stream on which nothing happens: what stands between may close such ones
    silent_s: float = 300.0
    admin_group: str = "hive-admin"
    limits: Limits = dataclasses.field(default_factory=Limits)

    @property
    def host_socket(self) -> Path:
        return self.runtime_dir / "host.sock"

    @property
    def database(self) -> Path:
        return self.state_dir / "hive.sqlite"

    @property
    def token_file(self) -> Path:
        return self.state_dir / "operator.token"

    @property
    def shared_dir(self) -> Path:
        return self.state_dir / "shared"

    @property
    def operator_dir(self) -> Path:
        return self.state_dir / "operator"

    @property
    def scratch_dir(self) -> Path:
        return self.state_dir / "tmp"

    def repository(self, name: str) -> Path:
        return self.state_dir / "applied" / name

    def deploy_dir(self, name: str) -> Path:
        return self.state_dir / "deploy" / name

    def system_dir(self, name: str) -> Path:
        return self.state_dir / "systems" / name

    @property
    def source_dir(self) -> Path:
        return Path(self.source) if self.source else HERE

    def agent_dir(self, name: str) -> Path:
        return self.state_dir / "agents" / name

    def agent_runtime(self, name: str) -> Path:
        return self.runtime_dir / "agents" / name

    def agent_socket(self, name: str) -> Path:
        return self.agent_runtime(name) / "hive.sock"

    def agent_log(self, name: str) -> Path:
        return self.state_dir / "logs" / f"{name}.log"

    def port_of(self, name: str) -> int:
        """The web page's port of an agent: from its name alone, so that it never moves."""
        if name == MANAGER:
            return self.manager_port
        return self.agent_port_base + fnv1a32(name) % 900

    @property
    def home_url(self) -> str:
        address = self.public_url or f"http://{self.page_host}:{self.port}"
        return address.rstrip("/") + "/"

    def page_url(self, name: str) -> str:
        """An agent's page: behind a proxy it has the dashboard's scheme and name, and its own port as always."""
        scheme = self.public_url.partition("://")[0] or "http"
        return f"{scheme}://{self.page_host}:{self.port_of(name)}/"

    @property
    def page_host(self) -> str:
        """The name under which a person reaches this machine's pages."""
        if public := PUBLIC_URL.fullmatch(self.public_url):
            return public[1]
        if self.domains:
            return self.domains[0]
        if self.listen_address in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            return socket.gethostname()
        return f"[{self.listen_address}]" if ":" in self.listen_address else self.listen_address

    @property
    def known_hosts(self) -> tuple[str, ...]:
        """Host names, without port, that a browser may name: all others are refused (DNS rebinding)."""
        own = {"localhost", "127.0.0.1", "[::1]", socket.gethostname().lower(), self.page_host.lower()}
        return tuple(sorted(own | {name.lower() for name in self.domains}))


def fnv1a32(text: str) -> int:
    """FNV-1a, 32 bit, of the text's UTF-8 (offset basis 2166136261, prime 16777619)."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def rfc3339(at_ms: int) -> str:
    """Milliseconds since 1970 as RFC 3339 in UTC, to the millisecond."""
    moment = datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def day_of(at_ms: int) -> str:
    """The host's own calendar day: budgets follow the operator's clock, not UTC."""
    return datetime.datetime.fromtimestamp(at_ms / 1000).astimezone().date().isoformat()


# ──────────────────────────────────────────────────────────────────────────────
# Errors
# ──────────────────────────────────────────────────────────────────────────────


# code → HTTP status. The command line exits with 2 for `usage` and 1 for everything else.
STATUS_OF: Final[Mapping[str, int]] = {
    "usage": 400,
    "bad_request": 400,
    "bad_name": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "bad_host": 403,
    "bad_origin": 403,
    "unknown_agent": 404,
    "unknown_verb": 404,
    "not_found": 404,
    "bad_method": 405,
    "conflict": 409,
    "port_taken": 409,
    "stale": 409,
    "too_large": 413,
    "bad_type": 415,
    "bad_config": 422,
    "unsupported": 422,
    "inbox_full": 429,
    "too_many": 429,
    "too_fast": 429,
    "internal": 500,
    "unreachable": 502,
    "storage": 507,
}


class Refused(Exception):
    """Something was asked that can't be done: a word for programs, a sentence and a hint for people."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint

    def as_json(self) -> Json:
        return {"error": self.message, "code": self.code} | ({"hint": self.hint} if self.hint else {})


# ──────────────────────────────────────────────────────────────────────────────
# Types
# ──────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Actor:
    """Who did something, for the audit: a name, and the door that it came through."""

    name: str
    via: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.via})" if self.via else self.name


SYSTEM_ACTOR: Final = Actor(SYSTEM)


class MessageState(enum.StrEnum):
    QUEUED = "queued"
    LEASED = "leased"
    ACKED = "acked"
    DEAD = "dead"  # given back too often; the operator was told
    CLOSED = "closed"  # its recipient was purged


class Kind(enum.StrEnum):
    SPAWN = "spawn"
    APPLY = "apply_commit"
    INPUTS = "update_inputs"
    SCHEDULE = "schedule_prompt"


class Status(enum.StrEnum):
    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"
    CANCELLED = "cancelled"
    FAILED = "failed"


class QuestionStatus(enum.StrEnum):
    OPEN = "open"
    ANSWERED = "answered"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class Phase(enum.StrEnum):
    QUEUED = "queued"
    BUILDING = "building"
    SWITCHING = "switching"
    DEPLOYED = "deployed"
    FAILED = "failed"


UNDER_WAY: Final = (Phase.BUILDING, Phase.SWITCHING)
LIVE_PHASES: Final = (Phase.QUEUED, *UNDER_WAY)


class HarnessState(enum.StrEnum):
    """What a harness says of itself; `offline` is the host's word for one that isn't connected."""

    IDLE = "idle"
    WORKING = "working"
    SIGNING_IN = "signing_in"
    NEEDS_LOGIN = "needs_login"
    RATE_LIMITED = "rate_limited"
    PAUSED = "paused"
    FAILED = "failed"
    OFFLINE = "offline"


class Control(enum.StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    INTERRUPT = "interrupt"
    COMPACT = "compact"
    NEW_SESSION = "new_session"
    SET_MODEL = "set_model"
    LOGIN_BEGIN = "login_begin"
    LOGIN_FINISH = "login_finish"
    LOGIN_CANCEL = "login_cancel"
    SEND_HISTORY = "send_history"
    SEND_NOTES = "send_notes"
    ATTACH = "attach"
    DETACH = "detach"


@dataclasses.dataclass(frozen=True)
class Draft:
    """A message before the broker has numbered it."""

    sender: str
    to: str
    body: str
    in_reply_to: int | None = None
    client_id: str | None = None
    via: str | None = None
    kind: str | None = None
    data: Json | None = None


def without_none(**fields: Any) -> Json:
    """Optional fields are left out of an answer, never null."""
    return {key: value for key, value in fields.items() if value is not None}


def when(at_ms: int | None) -> str | None:
    return None if at_ms is None else rfc3339(at_ms)


# ──────────────────────────────────────────────────────────────────────────────
# Boundary parsing
# ──────────────────────────────────────────────────────────────────────────────
# A name never reaches a path or an argv unchecked; all doors use `check_name`.

NAME_PATTERN: Final = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
SHA_PATTERN: Final = re.compile(r"[0-9a-f]{40}")
NESTING_MAX: Final = 100
YEARS: Final = range(1970, 9999)  # at either end of what Python counts, an offset leads out of it
MISSING: Final[Any] = object()
EXACT: Final = 2**53  # up to here every reader of JSON has the same whole numbers
JSON_WORDS: Final[Mapping[type, str]] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def check_name(value: object) -> str:
    """An agent's name, or `Refused` saying which rule it breaks."""
    if not isinstance(value, str):
        raise Refused("bad_name", f"a name must be text, not {JSON_WORDS[type(value)]}")
    shown = repr(value[:40])
    if len(value) > NAME_MAX:
        raise Refused("bad_name", f"the name {shown} is too long: at most {NAME_MAX} characters")
    if not NAME_PATTERN.fullmatch(value) or "--" in value:
        raise Refused(
            "bad_name",
            f"{shown} is no agent name",
            "lower-case letters, digits and single hyphens, beginning with a letter, not ending with a hyphen",
        )
    if value in RESERVED_NAMES:
        raise Refused("bad_name", f"the name {shown} is reserved", "choose another name")
    return value


def check_address(value: object) -> str:
    """Whom a message may go to: an agent, `operator`, or `*`."""
    if value in (OPERATOR, EVERYONE):
        return str(value)
    if isinstance(value, str) and "@" in value:
        hive = value.partition("@")[2]
        raise Refused(
            "not_found", f"there is no such hive: {hive[:40]!r}", "agents of this hive have no @ in their address"
        )
    return check_name(value)


def check_sha(value: str) -> str:
    if not SHA_PATTERN.fullmatch(value):
        raise Refused("bad_request", f"{value[:50]!r} is no commit id", "give all 40 hexadecimal digits in lower case")
    return value


def parse_object(line: bytes | str, what: str = "the request") -> Json:
    """One JSON object. Refuses what Python reads and others can't, or read otherwise.

    That is: UTF-16, lone surrogates, NaN, 1e999, deep nesting, and a key that stands twice in one object.
    """
    try:
        text = line if isinstance(line, str) else line.decode()
        value = json.loads(
            text, parse_constant=_no_constant, parse_float=_number, object_pairs_hook=_object_without_doubles
        )
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError, UnicodeError) as error:
        raise Refused("bad_request", f"{what} is no JSON that we can read: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise Refused("bad_request", f"{what} must be a JSON object, not {JSON_WORDS[type(value)]}")
    if _is_deep(value):
        raise Refused("bad_request", f"{what} is nested more than {NESTING_MAX} levels deep")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a reader with less stack than ours might fail on it."""
    level = [value]
    for _ in range(NESTING_MAX):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def _number(text: str) -> float:
    """In JSON 1.0 and 1e3 are whole numbers, too."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) <= EXACT else value


def _object_without_doubles(pairs: list[tuple[str, Any]]) -> Json:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


class Fields:
    """Typed reading of one JSON object from outside.

    Each getter names the field in its error. `done()` refuses keys that no getter asked for; call it
    before anything is changed. With `strict=False` unknown keys are ignored (newer clients), and so is null.
    """

    def __init__(self, data: Json, *, strict: bool = True) -> None:
        self._data = data if strict else without_none(**data)
        self._strict = strict
        self._asked: set[str] = {"cmd"}

    def done(self) -> None:
        unknown = sorted(set(self._data) - self._asked)
        if unknown and self._strict:
            known = ", ".join(sorted(self._asked - {"cmd"})) or "none"
            raise Refused("bad_request", f"unknown field {unknown[0][:60]!r}", f"the fields here: {known}")

    def has(self, key: str) -> bool:
        self._asked.add(key)
        return key in self._data

    def _get(self, key: str, types: tuple[type, ...], word: str, default: Any) -> Any:
        self._asked.add(key)
        if key not in self._data:
            if default is MISSING:
                raise Refused("bad_request", f"the field {key!r} is missing", f"it must be {word}")
            return default
        value = self._data[key]
        # bool is an int in Python; in JSON it is not.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise Refused("bad_request", f"the field {key!r} must be {word}, not {JSON_WORDS[type(value)]}")
        return value

    def text(self, key: str, *, max_bytes: int = 4096, default: Any = MISSING, blank: bool = False) -> str:
        value = self._get(key, (str,), "text", default)
        if value is default:
            return typing.cast(str, value)
        size = len(value.encode())
        if size > max_bytes:
            raise Refused("too_large", f"the field {key!r} has {size} bytes; at most {max_bytes} are allowed")
        if not blank and not value.strip():
            raise Refused("bad_request", f"the field {key!r} is empty")
        return typing.cast(str, value)

    def integer(self, key: str, *, least: int = 0, most: int = EXACT, default: Any = MISSING) -> int:
        value = self._get(key, (int,), "a whole number", default)
        return typing.cast(int, value if value is default else self._in_range(key, value, least, most))

    def number(self, key: str, *, least: float = 0, most: float = 1e15, default: Any = MISSING) -> float:
        value = self._get(key, (int, float), "a number", default)
        return typing.cast(float, value if value is default else self._in_range(key, value, least, most))

    @staticmethod
    def _in_range(key: str, value: Any, least: float, most: float) -> Any:
        if not least <= value <= most:
            shown = str(value)[:40]
            raise Refused("bad_request", f"the field {key!r} is {shown}; it must be from {least:g} to {most:g}")
        return value

    def flag(self, key: str, *, default: Any = False) -> bool:
        return typing.cast(bool, self._get(key, (bool,), "true or false", default))

    def mapping(self, key: str, *, default: Any = MISSING) -> Json:
        return typing.cast(Json, self._get(key, (dict,), "an object", default))

    def items(self, key: str, kind: type, *, most: int, default: Any = MISSING) -> list[Any]:
        value = self._get(key, (list,), "a list", default)
        if value is default:
            return typing.cast(list[Any], value)
        if len(value) > most:
            raise Refused("bad_request", f"the field {key!r} has {len(value)} entries; at most {most} are allowed")
        for entry in value:
            if not isinstance(entry, kind) or (isinstance(entry, bool) and kind is not bool):
                words = f"must be {JSON_WORDS[kind]}, not {JSON_WORDS[type(entry)]}"
                raise Refused("bad_request", f"each entry of {key!r} {words}")
            if isinstance(entry, int) and not -EXACT <= entry <= EXACT:
                raise Refused("bad_request", f"an entry of {key!r} is out of range")
        return typing.cast(list[Any], value)

    def name(self, key: str = "name") -> str:
        return check_name(self._get(key, (str,), "an agent's name", MISSING))

    def address(self, key: str = "to", *, default: Any = MISSING) -> str:
        value = self._get(key, (str,), "an address", default)
        return check_address(value)

    def moment(self, key: str, *, default: Any = MISSING) -> int:
        """An RFC 3339 time with its offset, as milliseconds since 1970."""
        text = self._get(key, (str,), "a time like 2030-01-31T08:00:00Z", default)
        if text is default:
            return typing.cast(int, text)
        try:
            moment = datetime.datetime.fromisoformat(text)
            if moment.tzinfo is None:
                raise ValueError("it has no offset")
            if moment.year not in YEARS:
                raise ValueError(f"the year {moment.year} is too far away")
            return int(moment.timestamp() * 1000)
        except (ValueError, OverflowError) as error:
            raise Refused(
                "bad_request", f"the field {key!r} is no time: {error}", "write it like 2030-01-31T08:00:00Z"
            ) from None

    def choice(self, key: str, choices: type[enum.StrEnum], *, default: Any = MISSING) -> Any:
        value = self._get(key, (str,), "a word", default)
        if value is default:
            return value
        try:
            return choices(value)
        except ValueError:
            words = ", ".join(choices)
            raise Refused("bad_request", f"the field {key!r} is {value[:40]!r}; it must be one of {words}") from None


def ok_answer(**fields: Any) -> Json:
    return {"version": PROTOCOL, "ok": True, **fields}


def failed_answer(error: Refused) -> Json:
    return {"version": PROTOCOL, "ok": False, **error.as_json()}


def encode_line(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def load_config(file: str | None, **overrides: Any) -> Config:
    """Settings from a TOML file, and what the command line says over them (None: not said)."""
    table: Json = {}
    if file:
        try:
            table = tomllib.loads(Path(file).read_text())
        except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
            raise Refused("usage", f"the settings in {file} can't be read: {error}") from None
    table |= {key: value for key, value in overrides.items() if value is not None}
    limits = _typed(Limits, table.pop("limits", {}), "[limits] ")
    config = _typed(Config, table | {"limits": limits}, "")
    if config.containers not in CONTAINER_KINDS:
        raise Refused("usage", f"containers = {config.containers!r} is not known", 'there are "nixos" and "process"')
    if not words_of(config.claude):
        raise Refused("usage", f"claude = {config.claude!r} is no command")
    if config.notify_url and not config.notify_url.startswith(("https://", "http://")):
        raise Refused("usage", f"notify_url = {config.notify_url!r} is no http address")
    if config.public_url and not PUBLIC_URL.fullmatch(config.public_url):
        hint = "say https://NAME or https://NAME:PORT; the dashboard is served at /, not below a path"
        raise Refused("usage", f"public_url = {config.public_url!r} is no address of a dashboard", hint)
    if config.precheck not in ("build", "eval", "off"):
        raise Refused("usage", f"precheck = {config.precheck!r} is not known", 'use "build", "eval" or "off"')
    if config.notify_format not in ("ntfy", "json"):
        raise Refused("usage", f"notify_format = {config.notify_format!r} is not known", 'use "ntfy" or "json"')
    for name in (MANAGER, "n" * NAME_MAX):
        if len(os.fsencode(config.agent_socket(name))) > SOCKET_PATH_MAX:
            raise Refused(
                "usage",
                f"the socket path {config.agent_socket(name)} is longer than {SOCKET_PATH_MAX} bytes",
                "choose a shorter runtime directory",
            )
    return config


def words_of(command: str) -> list[str]:
    """A command line as its words; none where a quotation does not end."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _typed(cls: type[T], table: Json, where: str) -> T:
    """A settings dataclass from a table; each value must have the type of the field's default."""
    if not isinstance(table, dict):
        raise Refused("usage", f"the setting {where.strip()} must be a table")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: Json = {}
    for key, value in table.items():
        if key not in fields:
            raise Refused("usage", f"unknown setting {where}{key}", f"known: {', '.join(fields)}")
        default = fields[key].default
        if isinstance(default, Path):
            value = Path(value).absolute() if isinstance(value, str | Path) else value
        elif isinstance(default, tuple) and isinstance(value, list):
            value = tuple(str(entry) for entry in value)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        expected = Limits if key == "limits" else (Path if isinstance(default, Path) else type(default))
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise Refused(
                "usage", f"the setting {where}{key} must be of type {expected.__name__}, not {type(value).__name__}"
            )
        values[key] = value
    return cls(**values)


# ──────────────────────────────────────────────────────────────────────────────
# Processes
# ──────────────────────────────────────────────────────────────────────────────
# The one door to child processes. Nothing inherits our environment: a child gets what its caller names.


Say = Callable[[Sequence[str]], None]  # takes lines for a log that people read


@dataclasses.dataclass(frozen=True)
class Finished:
    status: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")


def popen(argv: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
    """Start a child; `Refused` where there is no such program, or it can't be run."""
    try:
        return subprocess.Popen(argv, **how)
    except OSError as error:
        raise Refused("internal", f"can't run {argv[0]}: {error.strerror}", "is it installed and on PATH?") from None


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    stdin: bytes | None = None,
    timeout_s: float = 60.0,
    accept: Iterable[int] = (0,),
    max_bytes: int = 16 * 1024 * 1024,
    memory_bytes: int | None = None,
) -> Finished:
    """Run a command to its end. `Refused` names it when it is missing, fails, hangs or says too much.

    `memory_bytes` is what it, and each process that it starts, may map.
    """
    name, shown, deadline = argv[0], shlex.join(argv), time.monotonic() + timeout_s
    log.debug("run: %s", shown)
    if memory_bytes is not None:  # not from here, once it runs: it might have started others by then
        argv = ["/bin/sh", "-c", 'ulimit -v "$0" && exec "$@"', str(memory_bytes // 1024), *argv]
    with tempfile.TemporaryFile() as given:
        given.write(stdin or b"")
        given.seek(0)
        child = popen(
            argv,
            env=dict(env),
            cwd=cwd,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    try:
        stdout, stderr = read_output(child, name, max_bytes, deadline)
        child.wait(max(0.0, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        raise Refused("internal", f"{shown} did not end within {timeout_s:g} s") from None
    finally:
        end_process(child)
    if child.returncode not in accept:
        tail = stderr.decode(errors="replace").strip()[-600:]
        raise Refused("internal", f"{shown} failed with status {child.returncode}: {tail}")
    return Finished(child.returncode, stdout, stderr)


def read_output(child: subprocess.Popen[bytes], name: str, most: int, deadline: float) -> tuple[bytes, bytes]:
    """What it prints until it closes both pipes. `Refused` at once when that is too much: memory is ours."""
    printed = {child.stdout: bytearray(), child.stderr: bytearray()}
    with selectors.DefaultSelector() as selector:
        for pipe in (child.stdout, child.stderr):
            selector.register(typing.cast(typing.IO[bytes], pipe), selectors.EVENT_READ, printed[pipe])
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                chunk = os.read(key.fd, 65536)
                key.data.extend(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif len(key.data) > most:
                    raise Refused("too_large", f"{name} printed more than {most} bytes")
    return bytes(printed[child.stdout]), bytes(printed[child.stderr])


def end_process(child: subprocess.Popen[bytes], *, grace_s: float = 2.0) -> None:
    """Terminate, wait, kill, reap, with all that it started in its session: a no-op for a child that has ended."""
    if child.poll() is None:
        signal_group(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace_s)
        signal_group(child.pid, signal.SIGKILL)
        child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe:
            pipe.close()


def run_at_terminal(argv: Sequence[str], env: Mapping[str, str], lifeline: socket.socket) -> int:
    """Lend our terminal to a command until it ends. When the other end of `lifeline` hangs up, it is terminated."""
    ours = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TERM", "COLORTERM") if key in os.environ}
    terminal = termios.tcgetattr(0) if os.isatty(0) else None
    child = popen(argv, env={**ours, **env})

    def watch() -> None:
        with contextlib.suppress(OSError):
            while lifeline.recv(4096):
                pass
        child.terminate()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever has the terminal
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        if terminal:  # a command that was killed leaves it raw
            termios.tcsetattr(0, termios.TCSADRAIN, terminal)


def signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


class Excerpt:
    """The first and the last lines of an output of any length; `say` gets the last ones when it is over."""

    HEAD: Final = 256 * 1024
    TAIL: Final = 64 * 1024
    LINE: Final = 4096

    def __init__(self, say: Say) -> None:
        self._say = say
        self._room = self.HEAD
        self._begun = b""  # a line whose end has not come
        self._tail = bytearray()
        self._left_out = 0

    def take(self, chunk: bytes) -> None:
        head, rest = chunk[: self._room], chunk[self._room :]
        if self._room:
            self._room -= len(head)
            *lines, self._begun = (self._begun + head).split(b"\n")
            self._pass_on(lines)
        if not self._room:
            self._tail += self._begun + rest
            self._begun = b""
        if len(self._tail) > 2 * self.TAIL:
            self._left_out += len(self._tail) - self.TAIL
            del self._tail[: -self.TAIL]

    def close(self) -> None:
        rest = self._begun + bytes(self._tail)
        if self._left_out:
            begun, _, rest = rest.partition(b"\n")
            self._say([f"… ({self._left_out + len(begun)} bytes left out) …"])
        if rest:
            self._pass_on(rest.removesuffix(b"\n").split(b"\n"))

    def _pass_on(self, lines: list[bytes]) -> None:
        if lines:
            self._say([self._text(line) for line in lines])

    def _text(self, line: bytes) -> str:
        more = f"… ({len(line) - self.LINE} bytes more)" if len(line) > self.LINE else ""
        return line[: self.LINE].decode(errors="replace").rstrip("\r") + more


def run_aloud(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    say: Say,
    timeout_s: float,
    stop: threading.Event,
    within: Sequence[str] = (),
) -> None:
    """Run what takes long and talks: its output goes to `say` line by line. `stop` ends it early.

    `within` are the words of a command that runs this one; nobody wants to read them.
    """
    shown = shlex.join(argv)
    excerpt = Excerpt(say)
    say([f"$ {shown}"])
    child = popen(
        [*within, *argv],
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _follow(child, excerpt, time.monotonic() + timeout_s, stop)
        if child.poll() is None:
            why = "it was called off" if stop.is_set() else f"it did not end within {timeout_s:g} s"
            raise Refused("internal", f"{shown} was ended: {why}")
    finally:
        end_process(child)
        excerpt.close()
    if child.returncode != 0:
        raise Refused("internal", f"{shown} failed with status {child.returncode}")


def _follow(child: subprocess.Popen[bytes], excerpt: Excerpt, deadline: float, stop: threading.Event) -> None:
    """Read until the child has ended, or until it is time. What it left behind may hold the pipe open for ever."""
    pipe = typing.cast("typing.IO[bytes]", child.stdout)
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while not stop.is_set() and time.monotonic() < deadline:
        if poll.poll(100):
            chunk = os.read(pipe.fileno(), 256 * 1024)
            excerpt.take(chunk)
            if not chunk:
                poll.unregister(pipe)
        elif child.poll() is not None:
            return


def start_time_of(pid: int) -> int | None:
    """Clock ticks since boot at which a process began: with its id it names one process for ever (proc(5))."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text(errors="replace")  # with what it calls itself: any bytes
    except OSError:
        return None
    fields = stat_line.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


ENVIRON_MAX: Final = 2 * 1024 * 1024  # more no program is started with; but a process can make it terabytes


def processes_with(marker: str) -> list[int]:
    """Processes whose environment holds `marker` (KEY=value), as far as we may look."""
    wanted, found = f"\0{marker}\0".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError), (entry / "environ").open("rb") as file:
                if wanted in b"\0" + file.read(ENVIRON_MAX) + b"\0":
                    found.append(int(entry.name))
    return found


def open_files(folder: Path) -> Iterator[str]:
    """What the descriptors in a /proc/PID/fd are of, but for those that are closed meanwhile."""
    for fd in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield str(fd.readlink())


def port_holder(port: int) -> str:
    """Who listens on a TCP port: ` by pid 12 (nginx)`, or nothing where it can't be found."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and inodes:
            with contextlib.suppress(OSError):
                if not inodes.isdisjoint(open_files(entry / "fd")):
                    name = (entry / "comm").read_text(errors="replace").strip()  # what it calls itself: any bytes
                    return f" by pid {entry.name} ({name.encode('unicode_escape').decode()})"
    return ""


def listen_on(address: str, port: int, cancelled: threading.Event) -> socket.socket:
    """A listening TCP socket. A port in use is tried again for about 22 s: a predecessor may be leaving."""
    wait_s = 0.5
    for attempt in range(BIND_TRIES + 1):
        server = listen_if_free(address, port)
        if server is not None:
            return server
        if attempt < BIND_TRIES:
            log.warning("port %d is in use%s; trying again in %g s", port, port_holder(port), wait_s)
            if cancelled.wait(wait_s):
                break
            wait_s = min(wait_s * 2, BIND_WAIT_MAX_S)
    raise Refused("conflict", f"port {port} is in use{port_holder(port)}", "end that process, or choose another port")


def listen_if_free(address: str, port: int) -> socket.socket | None:
    server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((address, port))
        server.listen(128)
        return server
    except OSError as error:
        server.close()
        if error.errno != errno.EADDRINUSE:
            raise Refused("usage", f"can't listen on {address}, port {port}: {error.strerror}") from None
        return None
    except OverflowError:
        server.close()
        raise Refused("usage", f"there is no port {port}", "ports go from 1 to 65535") from None


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file as a whole, durably: readers see the old text or the new one, also after a power cut."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w") as file:
            os.fchmod(handle, mode)
            file.write(text)
            file.flush()
            os.fsync(handle)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def until_done(work: Callable[[], T], is_over: Callable[[], bool]) -> T | None:
    """What has to be done though the disk is full, say: again each second, until it could be, or the daemon stops."""
    while True:
        try:
            return work()
        except Exception:
            if is_over():
                return None
            log.exception("trying it again in a second")
            time.sleep(1)


def sync_folder(folder: Path) -> None:
    """A new name in a folder is durable once the folder is."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ──────────────────────────────────────────────────────────────────────────────
# Storage
# ──────────────────────────────────────────────────────────────────────────────
# One writer thread owns the writing connection and takes all work that waits into one transaction
# (group commit: with synchronous=FULL an fsync serves them all), a savepoint each, so that work that
# fails harms no other. Nobody is answered before the COMMIT that holds their work.

MIGRATIONS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE agents (
        name TEXT PRIMARY KEY,
        description TEXT NOT NULL DEFAULT '',
        parent TEXT,
        created_at INTEGER NOT NULL,
        kept INTEGER NOT NULL DEFAULT 0,         -- destroyed, its state kept
        wanted INTEGER NOT NULL DEFAULT 1,       -- should run
        paused INTEGER NOT NULL DEFAULT 0,
        model TEXT,
        deployed_sha TEXT,
        failed TEXT,                             -- why the host gave up on it
        state TEXT NOT NULL DEFAULT 'offline',   -- the harness's word, see HarnessState
        state_since INTEGER NOT NULL,
        state_reason TEXT,
        state_until INTEGER,
        status_text TEXT,
        status_set_at INTEGER,
        active_model TEXT,
        context_tokens INTEGER,
        context_window INTEGER,
        login TEXT,
        signed_in_until INTEGER
    ) STRICT;
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at INTEGER NOT NULL,
        sender TEXT NOT NULL,
        recipient TEXT NOT NULL,
        body TEXT NOT NULL,
        in_reply_to INTEGER,
        kind TEXT,
        data TEXT,
        via TEXT,
        broadcast INTEGER NOT NULL DEFAULT 0,
        client_id TEXT,
        state TEXT NOT NULL DEFAULT 'queued',
        attempts INTEGER NOT NULL DEFAULT 0,
        redelivered INTEGER NOT NULL DEFAULT 0,
        resolved_at INTEGER
    ) STRICT;
    CREATE INDEX messages_by_mailbox ON messages (recipient, state, id);
    CREATE INDEX messages_by_pair ON messages (sender, recipient, at);
    CREATE UNIQUE INDEX messages_by_client ON messages (sender, client_id, recipient) WHERE client_id IS NOT NULL;
    CREATE TABLE approvals (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        agent TEXT NOT NULL,
        detail TEXT NOT NULL DEFAULT '{}',       -- what only this kind has
        description TEXT,
        requested_by TEXT NOT NULL,
        requested_at INTEGER NOT NULL,
        fingerprint TEXT NOT NULL,               -- the same request twice is one
        commit_ref TEXT,
        fetched_sha TEXT,
        base_sha TEXT,
        diff TEXT NOT NULL DEFAULT '',
        status TEXT NOT NULL DEFAULT 'pending',
        note TEXT,
        error TEXT,
        resolved_at INTEGER,
        resolved_by TEXT
    ) STRICT;
    CREATE UNIQUE INDEX approvals_pending ON approvals (fingerprint) WHERE status = 'pending';
    CREATE TABLE deploys (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        agent TEXT NOT NULL,
        kind TEXT NOT NULL,
        sha TEXT,
        approval INTEGER REFERENCES approvals (id),
        phase TEXT NOT NULL DEFAULT 'queued',
        requested_at INTEGER NOT NULL,
        started_at INTEGER,
        ended_at INTEGER,
        error TEXT
    ) STRICT;
    CREATE INDEX deploys_by_phase ON deploys (phase, id);
    CREATE UNIQUE INDEX deploys_by_approval ON deploys (approval) WHERE approval IS NOT NULL;
    CREATE TABLE deploy_log (
        deploy INTEGER NOT NULL REFERENCES deploys (id) ON DELETE CASCADE,
        n INTEGER NOT NULL,
        line TEXT NOT NULL,
        PRIMARY KEY (deploy, n)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE questions (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        asker TEXT NOT NULL,
        target TEXT NOT NULL,
        question TEXT NOT NULL,
        options TEXT,
        multi INTEGER NOT NULL DEFAULT 0,
        asked_at INTEGER NOT NULL,
        expires_at INTEGER,
        status TEXT NOT NULL DEFAULT 'open',
        answer TEXT,
        answered_by TEXT,
        answered_at INTEGER
    ) STRICT;
    CREATE INDEX questions_open ON questions (status, expires_at);
    CREATE TABLE reminders (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        agent TEXT NOT NULL,
        body TEXT NOT NULL,
        due_at INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX reminders_due ON reminders (due_at);
    CREATE TABLE schedules (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        recipient TEXT NOT NULL,
        body TEXT NOT NULL,
        first_at INTEGER NOT NULL,
        every_ms INTEGER,
        next_at INTEGER,                         -- NULL: over or cancelled
        created_by TEXT NOT NULL
    ) STRICT;
    CREATE INDEX schedules_due ON schedules (next_at);
    CREATE TABLE usage (
        turn TEXT NOT NULL,
        agent TEXT NOT NULL,
        at INTEGER NOT NULL,
        day TEXT NOT NULL,
        model TEXT,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        cache_read_tokens INTEGER NOT NULL,
        cache_creation_tokens INTEGER NOT NULL,
        cost_usd REAL NOT NULL,
        duration_ms INTEGER NOT NULL,
        PRIMARY KEY (agent, turn)
    ) STRICT;
    CREATE INDEX usage_by_day ON usage (day, agent);
    CREATE TABLE events (
        n INTEGER PRIMARY KEY AUTOINCREMENT,
        agent TEXT NOT NULL,
        id INTEGER NOT NULL,                     -- the harness's own number
        at INTEGER NOT NULL,
        turn INTEGER NOT NULL,
        kind TEXT NOT NULL,
        data TEXT NOT NULL,
        UNIQUE (agent, id)
    ) STRICT;
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at INTEGER NOT NULL,
        who TEXT NOT NULL,
        what TEXT NOT NULL,
        subject TEXT NOT NULL,
        outcome TEXT NOT NULL
    ) STRICT;
    """,
    """
    ALTER TABLE approvals ADD COLUMN cause TEXT NOT NULL DEFAULT '[]';  -- ids of the messages that led to it
    ALTER TABLE approvals ADD COLUMN proposed_sha TEXT;                 -- before the operator's own edit
    ALTER TABLE approvals ADD COLUMN reminded_at INTEGER;
    ALTER TABLE deploys ADD COLUMN not_before INTEGER;                  -- until then the approval can be undone
    """,
    """
    ALTER TABLE agents ADD COLUMN source TEXT;                          -- which hyperhive is built into it
    ALTER TABLE deploys ADD COLUMN pins TEXT;                           -- the flake inputs that it was built with
    DROP INDEX deploys_by_approval;
    CREATE INDEX deploys_by_approval ON deploys (approval);             -- new inputs for all: a deploy for each agent
    """,
    """
    ALTER TABLE approvals ADD COLUMN precheck TEXT;                     -- JSON; NULL: not begun
    CREATE TABLE precheck_log (
        approval INTEGER NOT NULL REFERENCES approvals (id),
        n INTEGER NOT NULL,
        line TEXT NOT NULL,
        PRIMARY KEY (approval, n)
    ) STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE agents ADD COLUMN pause_reason TEXT;                    -- these three while it is paused
    ALTER TABLE agents ADD COLUMN paused_by TEXT;
    ALTER TABLE agents ADD COLUMN budget_day TEXT;                      -- the day whose budget paused it
    ALTER TABLE agents ADD COLUMN trouble TEXT NOT NULL DEFAULT '';     -- what the manager was told of
    ALTER TABLE agents ADD COLUMN signed_in_renews INTEGER;
    """,
    """
    ALTER TABLE approvals ADD COLUMN touches TEXT NOT NULL DEFAULT '[]';  -- what its diff reaches into, in words
    """,
    """
    ALTER TABLE approvals ADD COLUMN first_base_sha TEXT;               -- before something else was deployed meanwhile
    """,
    """
    CREATE INDEX messages_by_thread ON messages (in_reply_to) WHERE in_reply_to NOT NULL;
    """,
)


class Tx:
    """One transaction as the work inside it sees it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.touched: set[str] = set()  # mailboxes that a waiting lease should look into
        self.changes: list[tuple[str, Any]] = []  # (kind, key) of rows that live views show
        self.after: list[Callable[[], object]] = []  # run on the writer thread once this is durable
        self.undo: list[Callable[[], object]] = []  # run there when it is rolled back

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return self._connection.execute(sql, values)

    def one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        return typing.cast("sqlite3.Row | None", self.execute(sql, *values).fetchone())

    def value(self, sql: str, *values: Any) -> Any:
        row = self.one(sql, *values)
        return None if row is None else row[0]

    def insert(self, table: str, **values: Any) -> int:
        """Insert a row; the table and column names are ours, never from outside."""
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        cursor = self.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", *values.values())  # noqa: S608
        return typing.cast(int, cursor.lastrowid)

    def changed(self, kind: str, key: Any) -> None:
        self.changes.append((kind, key))

    def after_commit(self, action: Callable[[], object]) -> None:
        self.after.append(action)

    def audit(self, actor: Actor, what: str, subject: object, outcome: str = "ok") -> None:
        self.insert("audit", at=now_ms(), who=str(actor), what=what, subject=str(subject), outcome=outcome[:500])
        self.changed("audit", None)


class _Job:
    """Work on its way through the writer thread. A bare lock is the cheapest way to wait for it."""

    __slots__ = ("done", "error", "result", "work")

    def __init__(self, work: Callable[[Tx], Any]) -> None:
        self.work, self.result = work, None
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()


class Store:
    """The database. `write` runs work on the writer thread; `read` lends a read-only connection."""

    BATCH: Final = 256

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = _open_database(path)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._readers: list[sqlite3.Connection] = []
        self._closed = False
        self.before_commit: Callable[[Tx], None] = lambda tx: None
        self.on_changes: Callable[[list[tuple[str, Any]]], None] = lambda changes: None
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def write(self, work: Callable[[Tx], T]) -> T:
        """Run `work` in a transaction and return its result once that is durable. Never from the writer thread."""
        job = self.submit(work)
        job.done.acquire()
        if job.error is not None:
            raise job.error
        return typing.cast(T, job.result)

    def submit(self, work: Callable[[Tx], Any]) -> _Job:
        """The same without waiting."""
        if self._closed:
            raise Refused("storage", "the daemon is shutting down", "try again in a moment")
        job = _Job(work)
        self._jobs.put(job)
        return job

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One consistent view of the database, for as long as the block lasts."""
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = _connect(self._path)
            connection.execute("PRAGMA query_only = ON")
        try:
            connection.execute("BEGIN")
            yield connection
        finally:
            connection.execute("ROLLBACK")
            self._readers.append(connection)

    def rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self.read() as connection:
            return connection.execute(sql, values).fetchall()

    def row(self, sql: str, *values: Any) -> sqlite3.Row | None:
        with self.read() as connection:
            return typing.cast("sqlite3.Row | None", connection.execute(sql, values).fetchone())

    def backup(self, target: Path) -> None:
        """A consistent copy while we run. The target must not exist."""
        try:
            target.touch(mode=0o600, exist_ok=False)
            try:
                # Not one of the readers: they may write nothing, nowhere.
                with contextlib.closing(_connect(self._path)) as connection:
                    connection.execute("VACUUM INTO ?", (str(target),))
            except BaseException:
                target.unlink()
                raise
        except (OSError, sqlite3.Error) as error:
            raise Refused("storage", f"can't write the backup {target}: {error}") from None

    def close(self) -> None:
        self._closed = True
        self._jobs.put(None)
        self._thread.join()
        for connection in (self._writer, *self._readers):
            connection.close()

    def _run(self) -> None:
        while True:
            batch = [self._jobs.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < self.BATCH:
                    batch.append(self._jobs.get_nowait())
            jobs = [job for job in batch if job is not None]
            if jobs:
                self._commit(jobs)
            if len(jobs) < len(batch):
                return

    def _commit(self, jobs: list[_Job]) -> None:
        tx = Tx(self._writer)
        try:
            tx.execute("BEGIN IMMEDIATE")
            for job in jobs:
                self._savepoint(tx, job)
            self.before_commit(tx)
            tx.execute("COMMIT")
        except Exception as error:  # a full disk, say: nobody in this batch may believe that it was stored
            log.exception("a transaction failed")
            with contextlib.suppress(sqlite3.Error):
                tx.execute("ROLLBACK")
            failure = _unwritable(error)
            for job in jobs:
                job.error = job.error or failure
            for action in tx.undo:
                action()
        else:
            self._afterwards(tx)
        for job in jobs:
            job.done.release()

    def _savepoint(self, tx: Tx, job: _Job) -> None:
        marks = len(tx.changes), len(tx.after), len(tx.undo), set(tx.touched)
        tx.execute("SAVEPOINT job")
        try:
            job.result = job.work(tx)
        except Exception as error:
            tx.execute("ROLLBACK TO job")
            undo = tx.undo[marks[2] :]
            del tx.changes[marks[0] :], tx.after[marks[1] :], tx.undo[marks[2] :]
            tx.touched = marks[3]
            for action in undo:
                action()
            job.error = _unwritable(error) if isinstance(error, sqlite3.OperationalError) else error
        tx.execute("RELEASE job")

    def _afterwards(self, tx: Tx) -> None:
        actions: list[Callable[[], object]] = [*tx.after, functools.partial(self.on_changes, tx.changes)]
        for action in actions:
            try:
                action()
            except Exception:  # whoever waits for this commit must be answered
                log.exception("after a commit")


def _unwritable(error: Exception) -> Refused:
    return Refused("storage", f"the database can't be written: {error}", "is the disk full?")


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _open_database(path: Path) -> sqlite3.Connection:
    """Open, check and migrate. A database from the future or a damaged one is refused, and left as it is."""
    try:
        path.touch(mode=0o600)
        connection = _connect(path)
        try:
            _bring_up(connection, path)
        except BaseException:
            connection.close()
            raise
    except (OSError, sqlite3.Error) as error:
        raise _unusable(path, error) from None
    return connection


def _bring_up(connection: sqlite3.Connection, path: Path) -> None:
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise sqlite3.DatabaseError(problem)
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise Refused(
            "conflict",
            f"{path} was written by a newer hyperhive (schema {version}; this one knows {len(MIGRATIONS)})",
            "run the newer version, or restore a backup from before the update",
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")


def _unusable(path: Path, error: OSError | sqlite3.Error) -> Refused:
    """Damage is what sqlite calls damage, or what its check found: not a full disk, nor a file that isn't ours."""
    code = getattr(error, "sqlite_errorcode", None)
    damaged = code is None or code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    if isinstance(error, OSError) or not damaged:
        return Refused("storage", f"{path} can't be used: {error}", "is the disk full, or the file another user's?")
    backup = last_backup(path)
    remedy = f"stop the daemon and run `{COMMAND} restore {backup or 'FILE'}`"
    return Refused("storage", f"{path} is damaged: {error}", remedy + ("" if backup else " (no backup is on record)"))


def copy_database(source: Path, target: Path) -> None:
    """With what lies in the `-wal` beside the source: there is one while it is in use, and when its user was killed."""
    target.touch(mode=0o600)
    used = Path(f"{source}-wal").exists()  # one that is not may lie where no file can be made: in a snapshot, say
    address = f"{source.absolute().as_uri()}?mode=ro{'' if used else '&immutable=1'}"
    with (
        contextlib.closing(sqlite3.connect(address, uri=True)) as connection,
        contextlib.closing(sqlite3.connect(target)) as copied,
    ):
        connection.backup(copied)


def last_backup(database: Path) -> str:
    """Where the last backup went, from a note beside the database: it must be found when that can't be read."""
    with contextlib.suppress(OSError):
        return database.with_name("last-backup").read_text().strip()
    return ""


# ──────────────────────────────────────────────────────────────────────────────
# Broker
# ──────────────────────────────────────────────────────────────────────────────
# Mail is handed out at one place: before each commit, every mailbox that the transaction touched is
# offered to its waiting leases, and the rows are marked in that same transaction; the answer leaves
# right after the commit, from the writer thread. A lease that finds mail, one that waits for it, a
# send, a return and a resume are therefore the same path, and leases need no lock: `Broker`'s own state
# belongs to the writer thread, but for `_leaving` and `_unreturned`, which is a queue for that reason.

LEASE_BYTES: Final = 256 * 1024  # of bodies in one answer; at least one message
# A question and its answer come from the system; `from` and `by` say whose words they are.
PING_PONG_SQL: Final = """
    WITH pair (one, other) AS (VALUES (?1, ?2), (?2, ?1))
    SELECT count(*) FROM (
        SELECT 1 FROM pair JOIN messages ON sender = one AND recipient = other AND at >= ?3 AND id > ?4
        UNION ALL SELECT 1 FROM pair JOIN messages ON sender = 'system' AND recipient = other AND at >= ?3 AND id > ?4
            AND kind IN ('question_asked', 'question_answered')
            AND one IN (json_extract(data, '$.from'), json_extract(data, '$.by')) LIMIT ?5)
"""
RESUMED_SQL: Final = """
    SELECT max(at) FROM audit
    WHERE what = 'resume' AND subject IN (?, ?) AND (who = 'operator' OR who LIKE 'operator (%')
"""


class LeaseHolder(Protocol):
    """A connection that leases: what the broker needs of it."""

    def deliver(self, answer: Json) -> None: ...


@dataclasses.dataclass(eq=False)
class _Wait:
    agent: str
    holder: LeaseHolder
    most: int
    until: float  # time.monotonic()
    over: bool  # to be answered now, with or without mail


class Broker:
    """Durable mail between agents, operator and system; questions, reminders, schedules; control items."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self.store, self.limits = store, limits
        self._leaving = False
        self._waits: dict[str, list[_Wait]] = defaultdict(list)
        self._leases: dict[LeaseHolder, set[int]] = defaultdict(set)
        self._unreturned: deque[tuple[str, LeaseHolder]] = deque()
        self._controls: dict[str, list[Json]] = defaultdict(list)
        self._allowance: dict[str, tuple[float, float]] = {}  # sender → (tokens, at)
        store.before_commit = self._hand_out
        store.write(self._return_all)

    # -- sending

    def send(self, draft: Draft) -> list[int]:
        """Store a message; returns its ids (one a copy for `*`). Durable when this returns."""
        return self.store.write(lambda tx: self.post(tx, draft))

    def post(self, tx: Tx, draft: Draft) -> list[int]:
        if draft.client_id and (known := self._known(tx, draft)):
            return known
        recipients = self._recipients(tx, draft)
        if draft.sender not in (SYSTEM, OPERATOR):
            self._take_allowance(draft.sender)
        if draft.in_reply_to is not None and not self._saw(tx, draft.sender, draft.in_reply_to):
            raise Refused("not_found", f"message {draft.in_reply_to} is none that you have seen")
        moment = now_ms()  # the copies of one message have one time
        ids = [self._insert(tx, draft, recipient, moment) for recipient in recipients]
        if draft.sender not in (SYSTEM, OPERATOR):
            self._stop_ping_pong(tx, draft.sender, draft.to)
        return ids

    def tell(self, tx: Tx, to: str, kind: str, body: str, /, **data: Any) -> None:
        """A system message. It is never refused: a full inbox must not stop what it reports."""
        self._insert(tx, Draft(SYSTEM, to, body, kind=kind, data=without_none(**data)), to, now_ms())

    def tell_manager(self, tx: Tx, kind: str, body: str, /, **data: Any) -> None:
        if tx.one("SELECT 1 FROM agents WHERE name = ? AND NOT kept", MANAGER):
            self.tell(tx, MANAGER, kind, body, **data)

    def _known(self, tx: Tx, draft: Draft) -> list[int]:
        found = tx.execute(
            "SELECT id FROM messages WHERE sender = ? AND client_id = ? ORDER BY id", draft.sender, draft.client_id
        )
        return [row["id"] for row in found]

    def _saw(self, tx: Tx, who: str, message: int) -> bool:
        row = tx.one("SELECT sender, recipient FROM messages WHERE id = ?", message)
        return row is not None and (who == OPERATOR or who in (row["sender"], row["recipient"]))

    def _recipients(self, tx: Tx, draft: Draft) -> list[str]:
        if draft.to == EVERYONE:
            names = [row["name"] for row in tx.execute("SELECT name FROM agents WHERE NOT kept ORDER BY name")]
            names = [name for name in names if name != draft.sender]
            if not names:
                raise Refused("not_found", "there is no other agent to send to")
        else:
            if draft.to != OPERATOR and not tx.one("SELECT 1 FROM agents WHERE name = ?", draft.to):
                raise Refused("unknown_agent", f"there is no agent {draft.to!r}", "list_agents shows who is there")
            names = [draft.to]
        size = len(draft.body.encode())
        if size > self.limits.body_bytes:
            raise Refused(
                "too_large",
                f"the message has {size} bytes; at most {self.limits.body_bytes} are allowed",
                "put long text into a file in /shared and send its name",
            )
        self._check_room(tx, names)
        return names

    def _check_room(self, tx: Tx, names: list[str]) -> None:
        full = [name for name in names if self.unread(tx, name) >= self.limits.unread]
        if full:
            raise Refused(
                "inbox_full", f"the inbox of {', '.join(full)} is full ({self.limits.unread} unread)", "try later"
            )

    def unread(self, tx: Tx, name: str) -> int:
        return int(
            tx.value("SELECT count(*) FROM messages WHERE recipient = ? AND state IN ('queued', 'leased')", name)
        )

    def _insert(self, tx: Tx, draft: Draft, recipient: str, moment: int) -> int:
        message = tx.insert(
            "messages",
            at=moment,
            sender=draft.sender,
            recipient=recipient,
            body=draft.body,
            in_reply_to=draft.in_reply_to,
            kind=draft.kind,
            data=None if draft.data is None else json.dumps(draft.data),
            via=draft.via,
            broadcast=int(draft.to == EVERYONE),
            client_id=draft.client_id,
        )
        tx.touched.add(recipient)
        tx.changed("message", message)
        tx.changed("agent", recipient)
        return message

    def _take_allowance(self, sender: str) -> None:
        """A token bucket. It lives in memory: a restart forgives, and no send waits for a query."""
        rate, burst = self.limits.messages_per_minute / 60, self.limits.message_burst
        if not rate:
            return
        tokens, at = self._allowance.get(sender, (float(burst), 0.0))
        moment = time.monotonic()
        tokens = min(float(burst), tokens + (moment - at) * rate)
        if tokens < 1:
            raise Refused(
                "too_fast",
                f"{sender} sends too fast: at most {self.limits.messages_per_minute} messages a minute",
                f"try again in {(1 - tokens) / rate:.0f} s",
            )
        self._allowance[sender] = (tokens - 1, moment)

    def _stop_ping_pong(self, tx: Tx, one: str, other: str) -> None:
        """Two agents that only answer each other burn money for nothing: both are paused."""
        if not self.limits.ping_pong or other in (OPERATOR, EVERYONE, one):
            return
        spoke = tx.value("SELECT max(id) FROM messages WHERE sender = ? AND recipient IN (?, ?)", OPERATOR, one, other)
        since, most = now_ms() - self.limits.ping_pong_s * 1000, self.limits.ping_pong
        if tx.value(PING_PONG_SQL, one, other, since, spoke or 0, most + 1) <= most:
            return
        if tx.one("SELECT 1 FROM agents WHERE name = ? AND kept", other):
            return  # nobody is there to answer: it waits
        since = max(since, tx.value(RESUMED_SQL, one, other) or 0)  # to resume them is a word, too
        if tx.value(PING_PONG_SQL, one, other, since, spoke or 0, most + 1) <= most:
            return
        reason = f"{one} and {other} exchanged more than {most} messages without a word from you"
        fresh = [name for name in (one, other) if self.pause(tx, SYSTEM_ACTOR, name, paused=True, reason=reason)]
        if fresh:
            self.tell(tx, OPERATOR, "paused", f"{reason}: both are paused.", agents=[one, other])

    # -- pausing (here because a paused agent is leased nothing)

    def pause(
        self, tx: Tx, actor: Actor, name: str, *, paused: bool, reason: str = "", budget_day: str | None = None
    ) -> bool:
        """Whether this changed anything: on top of a pause only one that holds more firmly does.

        A resume also ends the wait of an agent that a failure has parked.
        """
        row = tx.one("SELECT paused, paused_by, budget_day, state FROM agents WHERE name = ? AND NOT kept", name)
        if row is None:
            raise Refused("unknown_agent", f"there is no agent {name!r}")
        parked = (HarnessState.NEEDS_LOGIN, HarnessState.RATE_LIMITED, HarnessState.FAILED)
        if paused:
            held = -1 if not row["paused"] else self._hold_of(row["paused_by"] or "", row["budget_day"])
            idle = self._hold_of(str(actor), budget_day) <= held
        else:
            idle = not row["paused"] and row["state"] not in parked
        if idle:
            return False
        why = (reason or None, str(actor), budget_day) if paused else (None, None, None)
        tx.execute(
            "UPDATE agents SET paused = ?, pause_reason = ?, paused_by = ?, budget_day = ? WHERE name = ?",
            int(paused),
            *why,
            name,
        )
        tx.audit(actor, "pause" if paused else "resume", name, reason or "ok")
        tx.changed("agent", name)
        tx.touched.add(name)
        if paused:
            self.control(tx, name, Control.PAUSE, **without_none(reason=reason or None))
        else:
            self.control(tx, name, Control.RESUME)
        return True

    @staticmethod
    def _hold_of(by: str, budget_day: str | None) -> int:
        """How firmly a pause holds: a page's, a budget's until midnight, another of the system's, the operator's."""
        who = by.partition(" ")[0]
        return 3 if who == OPERATOR else 0 if who != SYSTEM else 1 if budget_day else 2

    def pause_from_page(self, tx: Tx, name: str, *, paused: bool) -> None:
        """Whoever has the link to an agent's page may hold it, and let go what the page held; no more than that."""
        actor = Actor(name, "page")
        by = tx.value("SELECT paused_by FROM agents WHERE name = ? AND paused", name)
        if not paused and by not in (None, str(actor)):
            raise Refused("forbidden", f"{by} has paused {name}", "resume it on the dashboard")
        self.pause(tx, actor, name, paused=paused, reason="paused at its own page" if paused else "")

    def control(self, tx: Tx, name: str, do: Control, **fields: Any) -> None:
        """Queue a control item for a harness. Items are not durable: what must last is in hello's answer."""
        tx.after_commit(lambda: self._controls[name].append({"do": do, **fields}))
        tx.after_commit(lambda: self._poke(name))

    def drop_controls(self, name: str) -> None:
        """On the writer thread: a harness that has just said hello knows all that lasts."""
        self._controls.pop(name, None)

    def _poke(self, name: str) -> None:
        # On the writer thread: a second, empty transaction offers the mailbox again.
        self.store.submit(lambda tx: tx.touched.add(name))

    # -- leasing

    def lease(self, agent: str, holder: LeaseHolder, most: int, wait_s: float) -> None:
        """Ask for mail; the answer goes to `holder.deliver` as soon as there is something, or after `wait_s`."""
        wait = _Wait(agent, holder, most, time.monotonic() + wait_s, over=not wait_s)

        def work(tx: Tx) -> None:
            self._waits[agent].append(wait)
            tx.undo.append(lambda: self._waits[agent].remove(wait))
            tx.touched.add(agent)

        self.store.write(work)

    def is_waited_on(self, agent: str) -> bool:
        """Whether some connection of this agent waits for mail at this moment."""
        return bool(self._waits.get(agent))

    def end_waits(self, agent: str, holder: LeaseHolder) -> None:
        """Answer what this connection still waits for, so that its next request is answered in order."""
        self.store.write(lambda tx: self._end(tx, [wait for wait in self._waits[agent] if wait.holder is holder]))

    def expire_waits(self) -> None:
        """Called each tick. The look from another thread may be stale: a wait that was answered stays answered."""
        moment = time.monotonic()
        late = [wait for waits in list(self._waits.values()) for wait in list(waits) if wait.until <= moment]
        if late:
            self.store.write(lambda tx: self._end(tx, late))

    def _end(self, tx: Tx, waits: list[_Wait]) -> None:
        """Mail that came in the same moment still goes along: `_hand_out` answers a wait, and does so once."""
        for wait in waits:
            wait.over = True
            tx.touched.add(wait.agent)

    def acknowledge(self, agent: str, ids: list[int]) -> int:
        """The turn is done: these never come again. Also good for mail that a restart put back meanwhile."""

        def work(tx: Tx) -> int:
            count = 0
            for message in ids:
                done = tx.execute(
                    "UPDATE messages SET state = 'acked', resolved_at = ?"
                    " WHERE id = ? AND recipient = ? AND state IN ('queued', 'leased')",
                    now_ms(),
                    message,
                    agent,
                )
                count += done.rowcount
                tx.changed("message", message)
            tx.changed("agent", agent)
            tx.after_commit(lambda: self._forget(ids))
            return count

        return self.store.write(work)

    def give_back(self, agent: str, holder: LeaseHolder, ids: list[int], *, blameless: bool) -> int:
        def work(tx: Tx) -> int:
            mine = [message for message in ids if message in self._leases.get(holder, ())]
            tx.after_commit(lambda: self._forget(mine))
            return self._put_back(tx, agent, mine, blameless=blameless)

        return self.store.write(work)

    def connection_closed(self, agent: str, holder: LeaseHolder) -> None:
        """A lease belongs to the connection: all it had not acknowledged goes back at once."""
        if self._leaving:
            return  # our end is no fault of the mail: the next start returns every lease

        def work(tx: Tx) -> None:
            self._waits[agent] = [wait for wait in self._waits[agent] if wait.holder is not holder]
            self._put_back(tx, agent, sorted(self._leases.get(holder, ())), blameless=False)
            tx.after_commit(lambda: self._leases.pop(holder, None))

        try:
            self.store.write(work)
        except (Refused, sqlite3.Error) as error:  # a full disk, say: nobody else will ask for this mail again
            log.warning("the mail that %s had leased can't be taken back now: %s", agent, error)
            self._unreturned.append((agent, holder))

    def return_late(self) -> None:
        """Called each tick: take back what could not be stored when its connection closed."""
        for _ in range(len(self._unreturned)):  # each once: what fails again is put back
            self.connection_closed(*self._unreturned.popleft())

    def leave(self) -> None:
        """The daemon is about to close its connections."""
        self._leaving = True

    def in_hand(self, tx: Tx, agent: str) -> list[int]:
        """The newest mail that an agent is working on: why it does what it does."""
        leased = "SELECT id FROM messages WHERE recipient = ? AND state = 'leased' ORDER BY id DESC LIMIT 10"
        return [row["id"] for row in tx.execute(leased, agent)][::-1]

    def _put_back(self, tx: Tx, agent: str, ids: list[int], *, blameless: bool) -> int:
        returned = 0
        for message in ids:
            row = tx.one("SELECT * FROM messages WHERE id = ? AND recipient = ? AND state = 'leased'", message, agent)
            if row is None:
                continue
            attempts = row["attempts"] - int(blameless)
            dead = attempts >= self.limits.attempts
            tx.execute(
                "UPDATE messages SET state = ?, attempts = ?, redelivered = 1, resolved_at = ? WHERE id = ?",
                MessageState.DEAD if dead else MessageState.QUEUED,
                attempts,
                now_ms() if dead else None,
                message,
            )
            tx.changed("message", message)
            if dead:
                self._tell_dead(tx, row, attempts)
            returned += 1
        if ids:
            tx.touched.add(agent)
            tx.changed("agent", agent)
        return returned

    def give_again(self, actor: Actor, message: int) -> None:
        """Mail that was set aside gets its attempts anew: what made its turns fail may be mended."""

        def work(tx: Tx) -> None:
            row = tx.one("SELECT * FROM messages WHERE id = ?", message)
            if row is None:
                raise Refused("not_found", f"there is no message {message}")
            if row["state"] != MessageState.DEAD:
                raise Refused("conflict", f"message {message} was not set aside")
            if not tx.one("SELECT 1 FROM agents WHERE name = ? AND NOT kept", row["recipient"]):
                raise Refused("unknown_agent", f"there is no agent {row['recipient']!r} any more")
            tx.execute("UPDATE messages SET state = 'queued', attempts = 0, resolved_at = NULL WHERE id = ?", message)
            tx.audit(actor, "give_again", f"message {message}", f"for {row['recipient']}")
            tx.changed("message", message)
            tx.changed("agent", row["recipient"])
            tx.touched.add(row["recipient"])

        self.store.write(work)

    def _tell_dead(self, tx: Tx, row: sqlite3.Row, attempts: int) -> None:
        body = (
            f"Message {row['id']} from {row['sender']} to {row['recipient']} was given {attempts} times and its turn"
            f" never ended well. It is set aside. It began: {row['body'][:200]}"
        )
        self.tell(tx, OPERATOR, "dead_letter", body, message=row["id"], agent=row["recipient"])
        tx.audit(SYSTEM_ACTOR, "dead_letter", row["id"], f"for {row['recipient']}")

    def _return_all(self, tx: Tx) -> None:
        """At start: leases of the daemon before us are void, and our going was no fault of the mail."""
        tx.execute(
            "UPDATE messages SET state = 'queued', redelivered = 1, attempts = max(attempts - 1, 0)"
            " WHERE state = 'leased'"
        )

    def _hand_out(self, tx: Tx) -> None:
        for name in sorted(tx.touched):
            control = bool(self._controls.get(name))
            for wait in self._waits.get(name, ()):
                messages = self._claim(tx, wait)
                if messages or control or wait.over:
                    tx.after_commit(functools.partial(self._deliver, wait, messages))
                    control = False  # the first takes all of it

    def _claim(self, tx: Tx, wait: _Wait) -> list[Json]:
        if tx.value("SELECT paused FROM agents WHERE name = ?", wait.agent):
            return []
        taken: list[Json] = []
        size = 0
        query = "SELECT * FROM messages WHERE recipient = ? AND state = 'queued' ORDER BY id LIMIT ?"
        for row in tx.execute(query, wait.agent, wait.most).fetchall():
            size += len(row["body"].encode())
            if taken and size > LEASE_BYTES:
                break
            tx.execute("UPDATE messages SET state = 'leased', attempts = attempts + 1 WHERE id = ?", row["id"])
            tx.changed("message", row["id"])
            taken.append(message_json(row) | {"attempts": row["attempts"] + 1})
        return taken

    def _deliver(self, wait: _Wait, messages: list[Json]) -> None:
        self._waits[wait.agent].remove(wait)
        self._leases[wait.holder].update(message["id"] for message in messages)
        wait.holder.deliver({"messages": messages, "control": self._controls.pop(wait.agent, [])})

    def _forget(self, ids: Iterable[int]) -> None:
        for leased in self._leases.values():
            leased.difference_update(ids)

    # -- questions

    def ask(
        self, asker: str, target: str, question: str, options: list[str], *, multi: bool, ttl_s: float | None
    ) -> int:
        """Put a question to an agent or the operator. The answer comes as a message."""

        def work(tx: Tx) -> int:
            if target in (EVERYONE, asker):
                raise Refused("bad_request", "a question goes to one other agent, or to the operator")
            for name in {asker, target} - {OPERATOR}:
                self._check_living(tx, name)
            if (
                tx.value("SELECT count(*) FROM questions WHERE asker = ? AND status = 'open'", asker)
                >= self.limits.questions
            ):
                raise Refused("too_many", f"{self.limits.questions} questions are open already", "cancel one first")
            self._check_room(tx, [target])
            self._take_allowance(asker)
            number = tx.insert(
                "questions",
                asker=asker,
                target=target,
                question=question,
                options=json.dumps(options) if options else None,
                multi=int(multi),
                asked_at=now_ms(),
                expires_at=None if ttl_s is None else now_ms() + int(ttl_s * 1000),
            )
            tx.audit(Actor(asker), "ask", number, f"to {target}")
            tx.changed("question", number)
            choices = f" Options: {', '.join(options)}." if options else ""
            self.tell(
                tx,
                target,
                "question_asked",
                f"{asker} asks (question {number}): {question}{choices}",
                question=number,
                **{"from": asker},
                options=options or None,
                multi=multi or None,
            )
            self._stop_ping_pong(tx, asker, target)
            return number

        return self.store.write(work)

    def answer(self, actor: Actor, number: int, text: str) -> None:
        """Only the one asked, or the operator, answers; once."""

        def work(tx: Tx) -> None:
            row = self._open_question(tx, number)
            if actor.name not in (row["target"], OPERATOR):
                raise Refused("forbidden", f"question {number} was put to {row['target']}, not to you")
            if actor.name != OPERATOR:
                self._check_room(tx, [row["asker"]])
                self._take_allowance(actor.name)
            self._settle(tx, actor, row, QuestionStatus.ANSWERED, text)
            if actor.name != OPERATOR:
                self._stop_ping_pong(tx, actor.name, row["asker"])

        self.store.write(work)

    def cancel_question(self, actor: Actor, number: int) -> None:
        def work(tx: Tx) -> None:
            row = self._open_question(tx, number)
            if actor.name not in (row["asker"], OPERATOR):
                raise Refused("forbidden", f"question {number} was asked by {row['asker']}, not by you")
            self._settle(tx, actor, row, QuestionStatus.CANCELLED, "[cancelled]")

        self.store.write(work)

    def _open_question(self, tx: Tx, number: int) -> sqlite3.Row:
        row = tx.one("SELECT * FROM questions WHERE id = ?", number)
        if row is None:
            raise Refused("not_found", f"there is no question {number}")
        if row["status"] != QuestionStatus.OPEN:
            raise Refused("conflict", f"question {number} is {row['status']} already")
        return row

    def _settle(self, tx: Tx, actor: Actor, row: sqlite3.Row, outcome: QuestionStatus, text: str) -> None:
        number = row["id"]
        tx.execute(
            "UPDATE questions SET status = ?, answer = ?, answered_by = ?, answered_at = ? WHERE id = ?",
            outcome,
            text,
            actor.name,
            now_ms(),
            number,
        )
        copies = tx.execute(  # what was asked needs no reading any more
            "UPDATE messages SET state = 'acked', resolved_at = ? WHERE recipient = ? AND state = 'queued'"
            " AND kind = 'question_asked' AND json_extract(data, '$.question') = ? RETURNING id",
            now_ms(),
            row["target"],
            number,
        )
        for copy_of_it in copies.fetchall():
            tx.changed("message", copy_of_it["id"])
            tx.changed("agent", row["target"])
        tx.audit(actor, f"question_{outcome}", number)
        tx.changed("question", number)
        body = f"Question {number} ({row['question'][:200]}) was {outcome}"
        body += f" by {actor.name}: {text}" if outcome is QuestionStatus.ANSWERED else "."
        data = {"question": number, "answer": text, "by": actor.name, "outcome": outcome}
        if not (outcome is QuestionStatus.CANCELLED and actor.name == row["asker"]):
            self.tell(tx, row["asker"], "question_answered", body, **data)

    def _check_living(self, tx: Tx, name: str) -> None:
        """Also of who asks: a request may outlive its agent by a moment, and a namesake shall hear nothing of it."""
        if not tx.one("SELECT 1 FROM agents WHERE name = ? AND NOT kept", name):
            raise Refused("unknown_agent", f"there is no agent {name!r}", "list_agents shows who is there")

    # -- reminders and schedules

    def remind(self, agent: str, body: str, due_at: int) -> int:
        def work(tx: Tx) -> int:
            self._check_living(tx, agent)
            if tx.value("SELECT count(*) FROM reminders WHERE agent = ?", agent) >= self.limits.reminders:
                raise Refused("too_many", f"{self.limits.reminders} reminders are set already", "cancel one first")
            number = tx.insert("reminders", agent=agent, body=body, due_at=due_at)
            tx.audit(Actor(agent), "remind", number, rfc3339(due_at))
            tx.changed("agent", agent)
            return number

        return self.store.write(work)

    def cancel_reminder(self, agent: str, number: int) -> None:
        def work(tx: Tx) -> None:
            if not tx.execute("DELETE FROM reminders WHERE id = ? AND agent = ?", number, agent).rowcount:
                raise Refused("not_found", f"you have no reminder {number}")
            tx.audit(Actor(agent), "cancel_reminder", number)
            tx.changed("agent", agent)

        self.store.write(work)

    def add_schedule(self, tx: Tx, actor: Actor, to: str, body: str, first_at: int, every_s: float | None) -> int:
        if to != EVERYONE and not tx.one("SELECT 1 FROM agents WHERE name = ?", to):
            raise Refused("unknown_agent", f"there is no agent {to!r}")
        every_ms = None if every_s is None else int(every_s * 1000)
        number = tx.insert(
            "schedules",
            recipient=to,
            body=body,
            first_at=first_at,
            every_ms=every_ms,
            next_at=first_at,
            created_by=actor.name,
        )
        tx.audit(actor, "schedule", number, f"to {to}, first {rfc3339(first_at)}")
        return number

    def cancel_schedule(self, actor: Actor, number: int) -> None:
        def work(tx: Tx) -> None:
            if not tx.execute("UPDATE schedules SET next_at = NULL WHERE id = ? AND next_at NOT NULL", number).rowcount:
                raise Refused("not_found", f"there is no running schedule {number}")
            tx.audit(actor, "cancel_schedule", number)

        self.store.write(work)

    def fire_due(self) -> None:
        """Called each tick. What came due while the daemon was down fires once, not once a period."""
        moment = now_ms()
        due = self.store.row(
            "SELECT EXISTS (SELECT 1 FROM reminders WHERE due_at <= ?1)"
            " OR EXISTS (SELECT 1 FROM schedules WHERE next_at <= ?1)"
            " OR EXISTS (SELECT 1 FROM questions WHERE status = 'open' AND expires_at <= ?1)",
            moment,
        )
        if due and due[0]:
            self.store.write(lambda tx: self._fire(tx, moment))

    def _fire(self, tx: Tx, moment: int) -> None:
        for row in tx.execute("SELECT * FROM reminders WHERE due_at <= ? ORDER BY due_at, id", moment).fetchall():
            tx.execute("DELETE FROM reminders WHERE id = ?", row["id"])
            self.tell(tx, row["agent"], "reminder", row["body"], reminder=row["id"])
        for row in tx.execute("SELECT * FROM schedules WHERE next_at <= ? ORDER BY next_at, id", moment).fetchall():
            every = row["every_ms"]
            following = None if not every else row["next_at"] + every * ((moment - row["next_at"]) // every + 1)
            tx.execute("UPDATE schedules SET next_at = ? WHERE id = ?", following, row["id"])
            for name in self._scheduled_for(tx, row["recipient"]):
                self.tell(tx, name, "schedule", row["body"], schedule=row["id"], by=row["created_by"])
        expired = "SELECT * FROM questions WHERE status = 'open' AND expires_at <= ?"
        for row in tx.execute(expired, moment).fetchall():
            self._settle(tx, SYSTEM_ACTOR, row, QuestionStatus.EXPIRED, "[expired]")

    def _scheduled_for(self, tx: Tx, to: str) -> list[str]:
        query = "SELECT name FROM agents WHERE NOT kept AND (name = ?1 OR ?1 = '*') ORDER BY name"
        return [row["name"] for row in tx.execute(query, to)]

    # -- the operator's inbox, and keeping house

    def mark_read(self, ids: list[int] | None = None) -> int:
        """The operator has read these (or all): their way of acknowledging."""
        if ids is None:
            ids = [
                r["id"]
                for r in self.store.rows("SELECT id FROM messages WHERE recipient = ? AND state = 'queued'", OPERATOR)
            ]
        return self.acknowledge(OPERATOR, ids) if ids else 0

    def close_mail(self, tx: Tx, name: str) -> None:
        """A purge: what waits for this name, or was set aside, closes: a namesake starts with an empty inbox."""
        close = (
            "UPDATE messages SET state = 'closed', resolved_at = ?"
            " WHERE recipient = ? AND state IN ('queued', 'leased', 'dead') RETURNING id"
        )
        for row in tx.execute(close, now_ms(), name).fetchall():
            tx.changed("message", row["id"])
        for row in tx.execute(
            "SELECT * FROM questions WHERE status = 'open' AND (asker = ?1 OR target = ?1)", name
        ).fetchall():
            self._settle(
                tx,
                Actor(row["asker"]) if row["asker"] == name else SYSTEM_ACTOR,
                row,
                QuestionStatus.CANCELLED,
                "[cancelled]",
            )
        tx.execute("DELETE FROM reminders WHERE agent = ?", name)
        tx.execute("UPDATE schedules SET next_at = NULL WHERE recipient = ?", name)

    def forget_old(self) -> None:
        """Retention: acknowledged mail 30 days, deploy logs 30, audit 365; what waits is kept for ever."""
        moment = now_ms()

        def work(tx: Tx) -> None:
            tx.execute(
                "DELETE FROM messages WHERE state IN ('acked', 'closed') AND resolved_at < ?", moment - 30 * DAY_MS
            )
            tx.execute("DELETE FROM audit WHERE at < ?", moment - 365 * DAY_MS)
            old = "SELECT id FROM deploys WHERE ended_at < ?"
            tx.execute(f"DELETE FROM deploy_log WHERE deploy IN ({old})", moment - 30 * DAY_MS)  # noqa: S608
            old = "SELECT id FROM approvals WHERE resolved_at < ?"
            tx.execute(f"DELETE FROM precheck_log WHERE approval IN ({old})", moment - 30 * DAY_MS)  # noqa: S608

        self.store.write(work)


def message_json(row: sqlite3.Row) -> Json:
    """A message as it is on every wire."""
    return without_none(
        id=row["id"],
        **{"from": row["sender"]},
        to=row["recipient"],
        body=row["body"],
        at=rfc3339(row["at"]),
        attempts=row["attempts"],
        in_reply_to=row["in_reply_to"],
        redelivered=True if row["redelivered"] else None,
        broadcast=True if row["broadcast"] else None,
        via=row["via"],
        kind=row["kind"],
        data=None if row["data"] is None else json.loads(row["data"]),
    )


# ──────────────────────────────────────────────────────────────────────────────
# Budgets
# ──────────────────────────────────────────────────────────────────────────────
# What turns may cost in a day of the host's calendar, for each agent and for the hive. The sum only rises, so
# a mark is passed by exactly one turn: that is why nothing here has to be remembered. Who resumes an agent by
# hand grants it as much again; a new day resumes what a budget has paused.


class Budgets:
    NEAR: Final = 0.8

    def __init__(self, config: Config, store: Store, broker: Broker) -> None:
        self._config, self._store, self._broker = config, store, broker

    def charge(self, tx: Tx, agent: str, cost: float) -> None:
        """A turn's usage has just been stored."""
        day, sums = day_of(now_ms()), "SELECT coalesce(sum(cost_usd), 0) FROM usage WHERE day = ?"
        self._judge(tx, agent, tx.value(f"{sums} AND agent = ?", day, agent), cost, self._config.daily_budget_usd)
        self._judge(tx, None, tx.value(sums, day), cost, self._config.hive_daily_budget_usd)

    def _judge(self, tx: Tx, agent: str | None, spent: float, cost: float, budget: float) -> None:
        if not budget:
            return
        before, now = (amount / budget + 1e-9 for amount in (spent - cost, spent))
        reason = f"{agent or 'the hive'} has spent ${spent:.2f} today; its budget is ${budget:.2f}"
        if int(now) > int(before):
            self._stop(tx, agent, reason)
        elif before < self.NEAR <= now:
            tx.audit(SYSTEM_ACTOR, "budget_near", agent or "hive", reason)
            self._tell(tx, "budget_near", f"{reason}. At the whole of it {agent or 'everyone'} is paused.", agent)

    def _stop(self, tx: Tx, agent: str | None, reason: str) -> None:
        every = [row["name"] for row in tx.execute("SELECT name FROM agents WHERE NOT kept ORDER BY name").fetchall()]
        today = day_of(now_ms())
        for name in every if agent is None else {agent}.intersection(every):
            self._broker.pause(tx, SYSTEM_ACTOR, name, paused=True, reason=reason, budget_day=today)
        whom = "It is paused" if agent else "All agents are paused"
        self._tell(tx, "budget_reached", f"{reason}. {whom} until tomorrow, or until you resume.", agent)

    def _tell(self, tx: Tx, kind: str, text: str, agent: str | None) -> None:
        self._broker.tell(tx, OPERATOR, kind, text[0].upper() + text[1:] if agent is None else text, agent=agent)

    def begin_day(self) -> None:
        """Called each tick."""
        today, over = day_of(now_ms()), "SELECT name FROM agents WHERE budget_day < ? AND NOT kept"
        if self._store.row(over, today):
            self._store.write(lambda tx: self._resume(tx, tx.execute(over, today).fetchall()))

    def _resume(self, tx: Tx, rows: list[sqlite3.Row]) -> None:
        for row in rows:
            self._broker.pause(tx, SYSTEM_ACTOR, row["name"], paused=False, reason="a new day, a new budget")


# ──────────────────────────────────────────────────────────────────────────────
# Config repositories
# ──────────────────────────────────────────────────────────────────────────────
# An agent's config is a bare repository below `applied/` that only the host writes. A proposal comes as
# the bytes of a git bundle; it is unpacked and checked in a quarantine of its own, so that what is
# refused leaves nothing behind. Git runs without any configuration but ours: a bundle carries objects,
# never config or hooks, and no checkout is ever made. A small bundle can unpack to gigabytes, deltas in
# memory: what git may map has a ceiling, and no object that is taken over is larger than a file may be.

BUILD_REFS: Final = "refs/builds/"  # Nix fetches a commit by a ref that holds it
EMPTY_TREE: Final = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # git's own constant for SHA-1 repositories
DIFF_MAX: Final = 4 * 1024 * 1024
BUNDLE_MARKS: Final = (b"# v2 git bundle\n", b"# v3 git bundle\n")
FORBIDDEN_FILES: Final = frozenset({"flake.nix", "flake.lock"})
WHOLE: Final = 1_000_000  # lines of context around each change
READ_MAX: Final = 256 * 1024
CUT: Final = re.compile(r"\n… \((\d+) bytes more\)\n\Z")  # no line of a diff begins like that
GIT_MEMORY: Final = 512 * 1024 * 1024
# What a line of a config may touch, in a person's words. A hint beside the diff, never a verdict.
TOUCHES: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"\bsystemPackages\b"), "programs that its shell finds"),
    (re.compile(r"\bservices\.hyperhive\.harness\b"), "how its Claude is run or prompted"),
    (re.compile(r"\bservices\b(?!\.hyperhive\b)"), "services that run in its container"),
    (re.compile(r"\b(networking|firewall|openssh|nameservers|proxy)\b"), "networking"),
    (re.compile(r"\b(users|sudo|extraGroups|authorizedKeys)\b"), "users and their rights"),
    (re.compile(r"\b(systemd|boot|fileSystems)\b|\benvironment\.etc\b"), "the base system"),
    (re.compile(r"\bfetch\w+\b|\bhttps?:|\bimport\b|\bbuiltins\b"), "code or files from elsewhere"),
)
NIX_WORDS: Final = re.compile(
    r"""
      \#[^\r\n]* | /\*.*?(?:\*/|\Z) | "(?:[^"\\]|\\.)*+"? | ''.*?(?:''(?!['$\\])|\Z)
    | (?P<name>[A-Za-z_][\w'-]*(?:\s*\.\s*[A-Za-z_"][\w'"-]*)*)
    | (?P<mark>==|[=;{}()\[\]])
    """,
    re.DOTALL | re.VERBOSE,
)
ONLY_COMMENT: Final = re.compile(r"\s*(#[^\r]*)?")
HUNK: Final = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")


def git_program() -> str | None:
    return os.environ.get("HYPERHIVE_GIT") or shutil.which("git")


def git(
    *arguments: str,
    cwd: Path,
    stdin: bytes | None = None,
    accept: Iterable[int] = (0,),
    index: Path | None = None,
    author: str = "hyperhive",
    timeout_s: float = 60.0,
) -> bytes:
    """Git in the bare repository `cwd`, without anybody's configuration, hooks, helpers or prompts."""
    program = git_program()
    if not program:
        raise Refused("unsupported", "git is not installed", "install it, or set HYPERHIVE_GIT to its absolute path")
    settings = {
        "core.hooksPath": "/dev/null",
        "core.fsmonitor": "false",
        "core.quotePath": "false",
        "gc.auto": "0",
        "protocol.allow": "never",
        "protocol.file.allow": "always",
        "fetch.fsckObjects": "true",
        "core.bigFileThreshold": "16m",  # larger ones are streamed where that can be done: not as deltas
        "pack.threads": "1",  # each would map memory of its own
        "safe.directory": "*",
    }
    argv = [program, *(part for key, value in settings.items() for part in ("-c", f"{key}={value}")), *arguments]
    env = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": "/nonexistent",
        "LC_ALL": "C.UTF-8",
        "GIT_DIR": ".",  # or one that is broken would be passed over for a repository around it
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_AUTHOR_NAME": author,
        "GIT_AUTHOR_EMAIL": f"{author}@localhost",
        "GIT_COMMITTER_NAME": "hyperhive",
        "GIT_COMMITTER_EMAIL": "hyperhive@localhost",
        **({"GIT_INDEX_FILE": str(index)} if index else {}),
    }
    done = run(argv, env=env, cwd=cwd, stdin=stdin, accept=accept, timeout_s=timeout_s, memory_bytes=GIT_MEMORY)
    return done.stdout


@dataclasses.dataclass(frozen=True)
class Change:
    """One file of a config set to a new text, on top of `parent` (None: the first commit)."""

    parent: str | None
    text: str
    message: str
    path: str = "agent.nix"
    author: str = "hyperhive"


@dataclasses.dataclass(frozen=True)
class Diff:
    """What a person is shown of a change: its text as git writes it, and in words what it reaches into."""

    text: str = ""
    touches: tuple[str, ...] = ()


class Repositories:
    """The configs of all agents; a sha here is always 40 hex digits."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.proposing = threading.Lock()  # while one is taken over: all connections use up no more than one does

    def exists(self, name: str) -> bool:
        return (self._config.repository(name) / "objects").exists()  # which `git init` makes last

    def create(self, name: str) -> None:
        """An empty repository. Harmless to repeat, wherever it was broken off."""
        self._create(self._config.repository(name))

    @staticmethod
    def _create(folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        git("init", "--quiet", "--bare", "--initial-branch=main", "--template=", ".", cwd=folder)

    def head(self, name: str) -> str | None:
        """The deployed commit."""
        if not self.exists(name):
            return None
        text = git(
            "rev-parse", "--quiet", "--verify", "refs/heads/main", cwd=self._config.repository(name), accept=(0, 1)
        )
        return text.decode().strip() or None

    def commit(self, name: str, change: Change) -> str:
        """A commit on top of `change.parent` with one file set to a text; no ref moves."""
        return self._commit(self._config.repository(name), change)

    def _commit(self, folder: Path, change: Change) -> str:
        message = f"{change.message}\n".encode()
        blob = git("hash-object", "-w", "--stdin", cwd=folder, stdin=change.text.encode()).decode().strip()
        with tempfile.TemporaryDirectory(dir=self._config.scratch_dir, prefix="index-") as scratch:
            index = Path(scratch) / "index"
            git("read-tree", change.parent or "--empty", cwd=folder, index=index)
            git("update-index", "--add", "--cacheinfo", f"100644,{blob},{change.path}", cwd=folder, index=index)
            tree = git("write-tree", cwd=folder, index=index).decode().strip()
        parents = ("-p", change.parent) if change.parent else ()
        commit = git("commit-tree", tree, *parents, "-F", "-", cwd=folder, stdin=message, author=change.author)
        return commit.decode().strip()

    def trial(self, folder: Path, text: str) -> str:
        """A repository of its own with one config in it, for an agent that has none yet."""
        self._create(folder)
        sha = self._commit(folder, Change(None, text, "A trial"))
        self._hold(folder, sha)
        return sha

    def paths(self, folder: Path, sha: str) -> list[str]:
        """The files of a config in this repository."""
        listing = git("ls-tree", "-r", "-z", "--name-only", "--full-tree", sha, cwd=folder)
        return [raw.decode(errors="replace") for raw in listing.split(b"\0") if raw]

    def files(self, name: str, sha: str) -> dict[str, str]:
        """The texts of a config, by path."""
        folder, paths = self._config.repository(name), self.paths(self._config.repository(name), sha)
        return {path: git("cat-file", "blob", f"{sha}:{path}", cwd=folder).decode(errors="replace") for path in paths}

    def accept_bundle(self, name: str, sha: str, base: str | None, bundle: bytes) -> None:
        """Check a proposed commit in quarantine and take it over, or refuse it with the reason."""
        check_sha(sha)
        if not bundle.startswith(BUNDLE_MARKS):
            raise Refused("bad_config", "that is no git bundle")
        folder = self._config.repository(name)
        with tempfile.TemporaryDirectory(dir=self._config.scratch_dir, prefix="proposal-") as scratch:
            quarantine = Path(scratch) / "repository"
            quarantine.mkdir()
            (Path(scratch) / "bundle").write_bytes(bundle)
            git("init", "--quiet", "--bare", "--template=", ".", cwd=quarantine)
            (quarantine / "objects/info").mkdir(parents=True, exist_ok=True)
            (quarantine / "objects/info/alternates").write_text(f"{folder / 'objects'}\n")
            try:
                git("fetch", "--quiet", "--no-tags", "../bundle", "+refs/*:refs/proposed/*", cwd=quarantine)
                # From a bundle, older gits fetch without any check of the objects.
                git("fsck", "--strict", "--no-dangling", "--no-progress", cwd=quarantine)
            except Refused as error:
                why = error.message.rpartition(" failed with ")[2]
                raise Refused("bad_config", f"git can't take that bundle: {why}") from None
            self._check_commit(quarantine, sha)
            self._check_history(quarantine, name, sha, base)
            git("update-ref", "refs/heads/accepted", sha, cwd=quarantine)
            git(
                "fetch",
                "--quiet",
                "--no-tags",
                str(quarantine),
                "+refs/heads/accepted:refs/accepted/" + sha,
                cwd=folder,
            )

    def _check_commit(self, folder: Path, sha: str) -> None:
        kind = git("cat-file", "-t", sha, cwd=folder, accept=(0, 128)).decode().strip()
        if kind != "commit":
            raise Refused("bad_config", f"the commit {sha} is not in the bundle", "commit first, then ask")
        if not git("for-each-ref", f"--contains={sha}", "refs/proposed", cwd=folder):
            raise Refused("bad_config", f"the commit {sha} is not in the bundle", "bundle the commit that you ask for")
        most = self._config.limits.config_files
        try:
            listing = git("ls-tree", "-r", "-t", "-l", "-z", "--full-tree", sha, cwd=folder)
        except Refused as error:
            if error.code != "too_large":
                raise
            # Trees may hold the same tree many times over: a few objects can unfold to millions of files.
            raise Refused("bad_config", f"the config has far too many files; at most {most} are allowed") from None
        entries = [entry for entry in listing.split(b"\0") if entry]
        files = sum(not entry.startswith(b"040000 ") for entry in entries)
        if files > most:
            raise Refused("bad_config", f"the config has {files} files; at most {most} are allowed")
        paths = [self._check_entry(entry) for entry in entries]
        if "agent.nix" not in paths:
            raise Refused("bad_config", "the config has no agent.nix", "agent.nix must be at the top of the repository")

    def _check_history(self, folder: Path, name: str, sha: str, base: str | None) -> None:
        """All that the commit brings along, also what only older commits hold; and that it goes on from `base`."""
        brought = git("rev-list", "--objects", "--no-object-names", sha, "--not", "--alternate-refs", cwd=folder)
        sizes = git("cat-file", "--batch-check=%(objectsize)", cwd=folder, stdin=brought)
        largest, most = max(map(int, sizes.split()), default=0), self._config.limits.config_file_bytes
        if largest > most:
            raise Refused(
                "bad_config",
                f"an older commit in the bundle holds {largest} bytes in one piece; at most {most} are allowed",
                "check the config out again, and commit only what it needs",
            )
        # False for a history that was rewritten, or that began before the last deploy.
        if base is not None and int(git("rev-list", "--count", base, f"^{sha}", cwd=folder)):
            raise Refused(
                "bad_config",
                f"{sha[:12]} is not built on {base[:12]}, which {name} runs: it would undo what was approved",
                "check the config out again, and commit on top of that",
            )

    def _check_entry(self, entry: bytes) -> str:
        meta, _, raw = entry.partition(b"\t")
        mode, _, _, size = meta.decode().split()
        path = raw.decode(errors="backslashreplace")
        shown = path.encode("unicode_escape").decode()
        if not path.isprintable() or {"\\", '"'} & set(path):  # git would write these otherwise than they are
            raise Refused("bad_config", f"the name {shown} is not plain text", "no control characters, quotes or \\")
        if mode == "120000":
            raise Refused("bad_config", f"{shown} is a symbolic link", "configs hold plain files only")
        if mode == "160000":
            raise Refused("bad_config", f"{shown} is a submodule", "configs hold plain files only")
        parts = path.split("/")
        if any(part.lower().startswith(".git") for part in parts):
            raise Refused("bad_config", f"{shown}: names starting with .git are not allowed")
        if parts[-1].lower() in FORBIDDEN_FILES:
            raise Refused("bad_config", f"{shown} is not allowed: the host writes the flake itself")
        if size != "-" and int(size) > self._config.limits.config_file_bytes:
            raise Refused(
                "bad_config", f"{shown} has {size} bytes; at most {self._config.limits.config_file_bytes} are allowed"
            )
        return path if mode.startswith("100") else ""

    def release(self, name: str, sha: str) -> None:
        """A commit that was taken over has its approval's name by now, or no one wants it."""
        git("update-ref", "-d", f"refs/accepted/{sha}", cwd=self._config.repository(name))

    def keep_proposal(self, name: str, approval: int, sha: str) -> None:
        """Name an accepted commit after its approval."""
        git("update-ref", proposal_ref(approval), sha, cwd=self._config.repository(name))

    def forget_proposals(self, name: str, approvals: Sequence[int]) -> None:
        """Take these names away, and from the disk what had no other: a day later, as somebody may be at work."""
        if not self.exists(name):
            return
        folder = self._config.repository(name)
        gone = "".join(f"delete {proposal_ref(approval)}\n" for approval in approvals)
        git("update-ref", "--stdin", cwd=folder, stdin=gone.encode())
        git("gc", "--quiet", "--prune=1.day.ago", cwd=folder, timeout_s=20)  # within the time of a watchdog

    def diff(self, name: str, base: str | None, sha: str) -> Diff:
        """Made once. What is longer than `DIFF_MAX` says so at its end; of what is far longer there is none."""
        raw = self._git_diff(name, base, sha)
        text = raw[:DIFF_MAX].decode(errors="replace")
        text += f"\n… ({len(raw) - DIFF_MAX} bytes more)\n" if len(raw) > DIFF_MAX else ""
        try:
            whole = self._git_diff(name, base, sha, f"--unified={WHOLE}").decode(errors="replace")
        except Refused as error:
            if error.code != "too_large":
                raise
            whole = text
        return Diff(text, touches(whole))

    def _git_diff(self, name: str, base: str | None, sha: str, *more: str) -> bytes:
        """Everything as text: a file must not hide what it says by a NUL in it."""
        options = ("--text", "--no-color", "--no-ext-diff", "--no-textconv", "--full-index", "--find-renames", *more)
        return git("diff", *options, base or EMPTY_TREE, sha, "--", cwd=self._config.repository(name))

    def bundle(self, name: str) -> tuple[bytes, str]:
        """`main` as a bundle, and its sha."""
        sha = self.head(name)
        if sha is None:
            raise Refused("not_found", f"{name} has no config yet")
        return git("bundle", "create", "--quiet", "-", "refs/heads/main", cwd=self._config.repository(name)), sha

    def hold(self, name: str, sha: str) -> None:
        """Give a commit that is about to be built a name of its own."""
        self._hold(self._config.repository(name), sha)

    @staticmethod
    def _hold(folder: Path, sha: str) -> None:
        git("update-ref", BUILD_REFS + sha, sha, cwd=folder)

    def mark_deployed(self, name: str, sha: str, deploy: int) -> None:
        """Both refs or, where it is refused, none."""
        refs = f"update refs/heads/main {sha}\nupdate refs/tags/deployed/{deploy} {sha}\n"
        git("update-ref", "--stdin", cwd=self._config.repository(name), stdin=refs.encode())

    def unlock(self) -> None:
        """At the start, when no git of ours runs: one that was killed left its locks, and no other would go on."""
        for repository in (self._config.state_dir / "applied").glob("*"):
            for lock in (*repository.glob("*.lock"), *(repository / "refs").rglob("*.lock")):
                lock.unlink()


def proposal_ref(approval: int) -> str:
    return f"refs/proposals/{approval}"


def agent_template() -> str:
    """The config of an agent for which nobody proposed one; also what the flake's template copies."""
    return (HERE / "static" / "agent.nix").read_text()


def first_diff(text: str) -> Diff:
    """Of a config that does not exist yet: all additions, as git would show it."""
    lines = text.removesuffix("\n").split("\n")
    added = "".join(f"+{line}\n" for line in lines) + ("" if text.endswith("\n") else "\\ No newline at end of file\n")
    head = "diff --git a/agent.nix b/agent.nix\nnew file mode 100644\n--- /dev/null\n+++ b/agent.nix\n"
    diff = f"{head}@@ -0,0 +1,{len(lines)} @@\n{added}"
    return Diff(diff, touches(diff))


def diff_lines(diff: str) -> Iterator[tuple[str, str]]:
    """A diff as (mark, text): "file" and its path, then " ", "+" or "-" and a line of it."""
    old = new = 0  # lines that the hunk still has
    path = ""  # until it is told
    for line in diff.split("\n"):
        if (old > 0 or new > 0) and line[:1] in (" ", "+", "-"):
            old -= line[0] != "+"
            new -= line[0] != "-"
            yield line[0], line[1:]
        elif line.startswith("diff --git "):
            if path:
                yield "file", path
            names = line.removeprefix("diff --git ")  # `a/PATH b/PATH`; if there are two, the new one follows
            path = names[len(names) // 2 + 1 :].strip('"')[2:]
        elif line.startswith("rename to "):
            path = line.removeprefix("rename to ").strip('"')
        elif match := HUNK.match(line):
            if path:
                yield "file", path
            path = ""
            old, new = (int(count or 1) for count in match.groups())
    if path:
        yield "file", path


def cut_bytes(diff: str) -> int | None:
    """How much of it was left out at its end."""
    match = CUT.search(diff[-80:])
    return int(match[1]) if match else None


def diff_files(diff: str) -> list[Json]:
    """What a diff changes: [{path, added, removed}]."""
    files: list[Json] = []
    for mark, text in diff_lines(diff):
        if mark == "file":
            files.append({"path": text, "added": 0, "removed": 0})
        elif mark != " ":
            files[-1]["added" if mark == "+" else "removed"] += 1
    return files


def touches(diff: str) -> tuple[str, ...]:
    """What a change reaches into, for the eye: judged by its words and the attributes around them, not evaluated."""
    changed: set[str] = set()  # lines, and the attributes in which they lie
    room = 2 * READ_MAX  # there can be a long attribute for each short line
    sides: dict[str, list[tuple[bool, str]]] = {}
    for mark, text in itertools.chain(diff_lines(diff[:READ_MAX]), [("file", "")]):
        if mark == "file":
            for words in itertools.chain(*map(_changed_words, sides.values())):
                if room >= 0 and words not in changed:
                    changed.add(words)
                    room -= len(words)
            sides = {"-": [], "+": []}
            continue
        for side in sides if mark == " " else mark:
            sides[side].append((mark != " ", text))
    found = [words for pattern, words in TOUCHES if any(pattern.search(text) for text in changed)]
    return (*found, "more than was looked through") if len(diff) > READ_MAX or room < 0 else tuple(found)


def _changed_words(lines: list[tuple[bool, str]]) -> Iterator[str]:
    """Each changed line that is more than a comment, and the attribute that it lies in."""
    for (is_changed, text), scope in zip(lines, nix_scopes([text for _, text in lines]), strict=True):
        if is_changed and not ONLY_COMMENT.fullmatch(text):
            yield text
            yield scope


def nix_scopes(lines: list[str]) -> Iterator[str]:
    """For each line of a Nix text the attribute that is being defined where it begins: "services.nginx", say."""
    text, told = "\n".join(lines), 0
    starts = list(itertools.accumulate((len(line) + 1 for line in lines), initial=0))
    stack, attribute, name, withs = [""], "", "", 0
    for match in itertools.chain(NIX_WORDS.finditer(text), [None]):
        place = match.start() if match else len(text)
        if told < len(lines) and starts[told] <= place:
            scope = ".".join(filter(None, [*stack[:20], attribute]))
            while told < len(lines) and starts[told] <= place:
                yield scope
                told += 1
        if match is None:
            return
        word = match["name"] or match["mark"]
        if match["name"]:
            name = re.sub(r"\s", "", word[:200])
            withs += name in ("with", "assert")  # their semicolon ends no definition
        elif word == "=":
            attribute = name
        elif word == ";":
            withs, attribute = (withs - 1, attribute) if withs else (0, "")
        if word in ("{", "[", "(", "let"):
            stack.append(attribute)
            attribute = ""
        elif word in ("}", "]", ")", "in") and len(stack) > 1:
            attribute = stack.pop()


FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def remove_tree(folder: Path) -> None:
    """Delete a folder that an agent may have filled, however deep: links are removed, never followed."""
    try:
        top = os.open(folder, FOLDER)
        try:
            waiting = _flatten(top, top)
            while waiting:
                name = waiting.pop()
                inner = os.open(name, FOLDER, dir_fd=top)
                try:
                    waiting += _flatten(inner, top)
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=top)
        finally:
            os.close(top)
        folder.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Refused("storage", f"can't remove {folder}: {error}") from None


def _flatten(inner: int, top: int) -> list[str]:
    """Empty one folder: folders in it move to the top, where they have the names returned; all else goes."""
    moved = []
    with os.scandir(inner) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                moved.append(secrets.token_hex(16))
                os.rename(entry.name, moved[-1], src_dir_fd=inner, dst_dir_fd=top)
            else:
                os.unlink(entry.name, dir_fd=inner)
    return moved


# ──────────────────────────────────────────────────────────────────────────────
# Approvals
# ──────────────────────────────────────────────────────────────────────────────
# pending → approved | denied | cancelled | failed. Each step is one transaction that holds the row, the
# audit and the message to whoever asked; approving also queues the deploy in it, so that approving
# twice, or dying right after, is still one deploy. The phase of an approval is its deploy's: it is
# stored once, there.


@dataclasses.dataclass(frozen=True)
class Request:
    """What somebody asks the operator for."""

    kind: Kind
    agent: str
    description: str | None = None
    detail: Json = dataclasses.field(default_factory=dict)
    sha: str | None = None
    base_sha: str | None = None
    diff: Diff = Diff()

    @property
    def fingerprint(self) -> str:
        """Equal for requests that ask for the same thing, whatever their reason says."""
        same = json.dumps([self.kind, self.agent, self.sha, self.detail], sort_keys=True)
        return hashlib.sha256(same.encode()).hexdigest()


def found_request(approval: int, row: sqlite3.Row | None) -> sqlite3.Row:
    """What a look-up of a request has found, or `Refused`: the readers' connections and the writer's look alike."""
    if row is None:
        raise Refused("not_found", f"there is no request {approval}", "`pending` lists those that wait")
    return row


def digest_of(row: sqlite3.Row) -> str:
    """What a person was shown, in short: it changes whenever something else would be done."""
    shown = json.dumps([row["id"], row["fingerprint"], row["fetched_sha"], row["base_sha"]])
    return hashlib.sha256(shown.encode()).hexdigest()[:16]


BASED: Final = (Kind.APPLY, Kind.INPUTS)  # changes to what an agent runs
TWIN_SQL: Final = "SELECT id FROM approvals WHERE fingerprint = ?1 AND status = 'pending'"
SAME_SQL: Final = f"""{TWIN_SQL}
    UNION ALL SELECT a.id FROM deploys d JOIN approvals a ON a.id = d.approval
    WHERE d.phase = 'queued' AND d.not_before > ?2 AND a.fingerprint = ?1
"""  # noqa: S608 - of constants alone


@dataclasses.dataclass(frozen=True)
class Decision:
    """An approval, with what the person saw: `sha` and `digest` guard a page that shows something older."""

    note: str | None = None
    sha: str | None = None
    digest: str | None = None
    undo_s: float = 0.0

    def check(self, row: sqlite3.Row) -> None:
        if self.sha not in (None, row["fetched_sha"]) or self.digest not in (None, digest_of(row)):
            raise Refused("stale", f"request {row['id']} is not what was shown any more", "look at it again")


class Approvals:
    def __init__(self, config: Config, store: Store, broker: Broker) -> None:
        self._config, self._store, self._broker = config, store, broker
        self.on_deploy: Callable[[], None] = lambda: None

    def check_spawn(self, tx: Tx, name: str) -> sqlite3.Row | None:
        """The row of a kept agent that this would revive. Refuses a living namesake and a taken port."""
        row = tx.one("SELECT * FROM agents WHERE name = ?", name)
        if row is not None and not row["kept"]:
            raise Refused("conflict", f"there is an agent {name!r} already", "choose another name")
        port = self._config.port_of(name)
        others = [other["name"] for other in tx.execute("SELECT name FROM agents WHERE name != ?", name)]
        taken = {self._config.port_of(other): other for other in others}
        if port in taken:
            free = [f"{name[: NAME_MAX - 1]}{n}" for n in range(2, 10)]
            free = [word for word in free if self._config.port_of(word) not in taken and word not in others]
            raise Refused(
                "port_taken",
                f"the page of {name!r} would have port {port}, which is that of {taken[port]!r}",
                f"these names are free: {', '.join(free[:3])}",
            )
        return row

    def request(self, actor: Actor, request: Request) -> int:
        """File a request; returns its id, or that of the same request when one is pending, or may be so again."""

        def work(tx: Tx) -> int:
            if (same := self._same(tx, actor, request)) is not None:
                return same
            approval = tx.insert(
                "approvals",
                kind=request.kind,
                agent=request.agent,
                detail=json.dumps(request.detail),
                description=request.description,
                requested_by=actor.name,
                requested_at=now_ms(),
                fingerprint=request.fingerprint,
                fetched_sha=request.sha,
                base_sha=request.base_sha,
                diff=request.diff.text,
                touches=json.dumps(request.diff.touches),
                cause=json.dumps(self._broker.in_hand(tx, actor.name)),
            )
            if request.kind is Kind.APPLY:
                tx.execute("UPDATE approvals SET commit_ref = ? WHERE id = ?", proposal_ref(approval), approval)
            tx.audit(actor, f"request_{request.kind}", request.agent, f"approval {approval}")
            tx.changed("approval", approval)
            return approval

        return self._store.write(work)

    def same(self, actor: Actor, request: Request) -> int | None:
        """The request that says this already. Refuses one that could not be filed, before any work is done for it."""
        return self._store.write(lambda tx: self._same(tx, actor, request))

    def _same(self, tx: Tx, actor: Actor, request: Request) -> int | None:
        same: int | None = tx.value(SAME_SQL, request.fingerprint, now_ms())
        if same is None:
            self._check(tx, request)
            self._check_rate(tx, actor)
        return same

    def _check_rate(self, tx: Tx, actor: Actor) -> None:
        """Asking and cancelling in a loop fills the table as well."""
        limit = self._config.limits.requests_per_day
        if not limit or actor.name == OPERATOR:
            return
        made = "SELECT requested_at FROM approvals WHERE requested_by = ? ORDER BY id DESC LIMIT 1 OFFSET ?"
        if (tx.value(made, actor.name, limit - 1) or 0) > now_ms() - DAY_MS:
            raise Refused("too_many", f"{actor.name} has made {limit} requests in a day", "ask again tomorrow")

    def _check(self, tx: Tx, request: Request) -> None:
        limit = self._config.limits.pending_approvals
        if tx.value("SELECT count(*) FROM approvals WHERE status = 'pending'") >= limit:
            raise Refused("too_many", f"{limit} requests wait for the operator already", "wait, or cancel one")
        if request.kind is Kind.INPUTS and self._config.containers == "process":
            raise Refused(
                "unsupported", "the agents of this hive are plain processes: they have no flake inputs to update"
            )
        if request.kind is Kind.SPAWN:
            self.check_spawn(tx, request.agent)
            other = tx.value(
                "SELECT id FROM approvals WHERE kind = 'spawn' AND agent = ? AND status = 'pending'", request.agent
            )
            if other is not None:
                raise Refused(
                    "conflict", f"request {other} to spawn {request.agent} is pending", "cancel that one first"
                )
        elif request.agent != EVERYONE and not tx.one(
            "SELECT 1 FROM agents WHERE name = ? AND NOT kept", request.agent
        ):
            raise Refused("unknown_agent", f"there is no agent {request.agent!r}")
        if request.kind in BASED and request.base_sha != self._base(tx, request.agent):
            raise Refused("conflict", f"another config of {request.agent} was deployed meanwhile", "check it out again")

    @staticmethod
    def _base(tx: Tx, agent: str) -> Any:
        """What a change would be made to; of all agents there is no one commit."""
        return tx.value("SELECT deployed_sha FROM agents WHERE name = ?", agent)

    def approve(self, actor: Actor, approval: int, decision: Decision = Decision()) -> None:
        """Approve once; doing it again changes nothing."""

        def work(tx: Tx) -> None:
            row = self._row(tx, approval)
            if row["status"] == Status.APPROVED:
                return
            self._must_be_pending(row)
            decision.check(row)
            if row["kind"] in BASED and row["base_sha"] not in (None, self._base(tx, row["agent"])):
                raise Refused("stale", f"request {approval} was compared with what ran before", "look at it again")
            waits = decision.undo_s > 0 and row["kind"] != Kind.SCHEDULE
            self._resolve(tx, actor, row, Status.APPROVED, decision.note, quiet=waits)
            self._carry_out(tx, actor, row, now_ms() + int(decision.undo_s * 1000) if waits else None)

        self._store.write(work)
        self.on_deploy()

    def undo(self, actor: Actor, approval: int) -> None:
        """Take an approval back, as long as its deploy has not begun."""

        def work(tx: Tx) -> None:
            row = self._row(tx, approval)
            waiting = "SELECT id FROM deploys WHERE approval = ? AND phase = 'queued' AND not_before > ?"
            deploys = [deploy["id"] for deploy in tx.execute(waiting, approval, now_ms())]  # of inputs for all: many
            if row["status"] != Status.APPROVED or not deploys:
                raise Refused("conflict", f"request {approval} can't be undone any more", "`rollback` goes back")
            for deploy in deploys:
                tx.execute("DELETE FROM deploys WHERE id = ?", deploy)
                tx.changed("deploy", deploy)
            tx.execute(
                "UPDATE approvals SET status = 'pending', note = NULL, resolved_at = NULL, resolved_by = NULL"
                " WHERE id = ?",
                approval,
            )
            if row["kind"] == Kind.SPAWN:
                self.unadmit(tx, row["agent"])
            tx.audit(actor, "undo", f"approval {approval}")
            tx.changed("approval", approval)

        self._store.write(work)

    def begin(self, tx: Tx, approval: int) -> None:
        """The time for an undo is over: now whoever asked is told."""
        row = self._row(tx, approval)
        if tx.execute("UPDATE deploys SET not_before = NULL WHERE approval = ? AND not_before", approval).rowcount:
            self._tell(tx, row, Status.APPROVED, row["note"], None)

    def row(self, approval: int) -> sqlite3.Row:
        return found_request(approval, self._store.row("SELECT * FROM approvals WHERE id = ?", approval))

    def pending(self, approval: int) -> sqlite3.Row:
        row = self.row(approval)
        self._must_be_pending(row)
        return row

    def revise(self, actor: Actor, approval: int, request: Request, digest: str | None) -> None:
        """Put another content into a pending request: the operator's edit, or a diff against what runs now."""

        def work(tx: Tx) -> None:
            row = self._row(tx, approval)
            self._must_be_pending(row)
            Decision(digest=digest).check(row)
            twin = tx.value(TWIN_SQL, request.fingerprint)
            if twin not in (None, approval):
                raise Refused("conflict", f"request {twin} asks for the very same", "deny one of the two")
            proposed, first_base = row["proposed_sha"], row["first_base_sha"]
            if request.sha != row["fetched_sha"]:
                proposed = proposed or row["fetched_sha"]
            if request.base_sha != row["base_sha"]:
                first_base = first_base or row["base_sha"]
            tx.execute(
                "UPDATE approvals SET detail = ?, fingerprint = ?, diff = ?, touches = ?, base_sha = ?,"
                " first_base_sha = ?, fetched_sha = ?, proposed_sha = ?, precheck = NULL WHERE id = ?",
                json.dumps(request.detail),
                request.fingerprint,
                request.diff.text,
                json.dumps(request.diff.touches),
                request.base_sha,
                first_base,
                request.sha,
                proposed,
                approval,
            )
            tx.audit(actor, "revise", f"approval {approval}", request.sha or "ok")
            tx.changed("approval", approval)

        self._store.write(work)

    def deny(self, actor: Actor, approval: int, note: str | None = None) -> None:
        def work(tx: Tx) -> None:
            row = self._row(tx, approval)
            if row["status"] == Status.DENIED:
                return
            self._must_be_pending(row)
            self._resolve(tx, actor, row, Status.DENIED, note)

        self._store.write(work)

    def cancel(self, actor: Actor, approval: int) -> None:
        def work(tx: Tx) -> None:
            row = self._row(tx, approval)
            if actor.name not in (row["requested_by"], OPERATOR):
                raise Refused("forbidden", f"request {approval} was made by {row['requested_by']}, not by you")
            self._must_be_pending(row)
            self._resolve(tx, actor, row, Status.CANCELLED, None)

        self._store.write(work)

    def fail(self, tx: Tx, approval: int, error: str, *, note: str | None = None) -> None:
        """The deploy went wrong, or what it was for is gone."""
        row = self._row(tx, approval)
        tx.execute("UPDATE approvals SET error = ? WHERE id = ?", error, approval)
        self._resolve(tx, SYSTEM_ACTOR, row, Status.FAILED, note or row["note"], error)

    def fail_orphans(self) -> None:
        """Pending requests for agents whose state folder is gone can't be carried out any more."""
        pending = self._store.rows(
            "SELECT a.id, a.agent FROM approvals a JOIN agents g ON g.name = a.agent"
            " WHERE a.status = 'pending' AND NOT g.kept AND g.deployed_sha NOT NULL"
        )
        for row in pending:
            if not (self._config.agent_dir(row["agent"]) / "state").is_dir():
                self._store.write(functools.partial(self._orphan, approval=row["id"]))

    def _orphan(self, tx: Tx, approval: int) -> None:
        if self._row(tx, approval)["status"] == Status.PENDING:
            self.fail(tx, approval, "agent state dir missing", note="agent state dir missing")

    def fail_all(self, tx: Tx, agent: str, why: str) -> None:
        """The agent goes: nothing that waits for it can be carried out."""
        pending = "SELECT id FROM approvals WHERE agent = ? AND status = 'pending'"
        for row in tx.execute(pending, agent).fetchall():
            self.fail(tx, row["id"], why, note=why)

    def _row(self, tx: Tx, approval: int) -> sqlite3.Row:
        return found_request(approval, tx.one("SELECT * FROM approvals WHERE id = ?", approval))

    @staticmethod
    def _must_be_pending(row: sqlite3.Row) -> None:
        if row["status"] != Status.PENDING:
            by = f" by {row['resolved_by']}" if row["resolved_by"] else ""
            raise Refused("conflict", f"request {row['id']} was {row['status']} already{by}")

    def _resolve(
        self,
        tx: Tx,
        actor: Actor,
        row: sqlite3.Row,
        status: Status,
        note: str | None,
        error: str | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        tx.execute(
            "UPDATE approvals SET status = ?, note = ?, resolved_at = ?, resolved_by = ? WHERE id = ?",
            status,
            note,
            now_ms(),
            actor.name,
            row["id"],
        )
        tx.audit(actor, status, f"approval {row['id']}", error or note or "ok")
        tx.changed("approval", row["id"])
        tx.changed("agent", row["agent"])
        if not quiet and row["requested_by"] not in (actor.name, OPERATOR):
            self._tell(tx, row, status, note, error)

    def _tell(self, tx: Tx, row: sqlite3.Row, status: Status, note: str | None, error: str | None) -> None:
        """Every outcome wakes whoever asked."""
        body = f"Your request {row['id']} ({row['kind']} {row['agent']}) was {status}."
        body += f" The operator's note: {note}" if note and error is None else ""
        body += f" What went wrong: {error}" if error else ""
        self._broker.tell(
            tx,
            row["requested_by"],
            "approval_resolved",
            body,
            approval=row["id"],
            kind=row["kind"],
            agent=row["agent"],
            status=str(status),
            note=note,
            sha=row["fetched_sha"],
        )

    def _carry_out(self, tx: Tx, actor: Actor, row: sqlite3.Row, not_before: int | None) -> None:
        """What approval means for each kind."""
        kind, detail = Kind(row["kind"]), json.loads(row["detail"])
        if kind is Kind.SPAWN:
            self.admit(tx, row["agent"], row["description"] or "", row["requested_by"])
            queue_deploy(tx, row["agent"], "spawn", approval=row["id"], not_before=not_before)
        elif kind is Kind.APPLY:
            sha = row["fetched_sha"]
            queue_deploy(tx, row["agent"], "apply", sha=sha, approval=row["id"], not_before=not_before)
        elif kind is Kind.INPUTS:
            whom = "SELECT name FROM agents WHERE NOT kept AND deployed_sha NOT NULL AND ?1 IN (name, '*')"
            for agent in tx.execute(whom, row["agent"]).fetchall():
                queue_deploy(tx, agent["name"], "update", approval=row["id"], not_before=not_before)
        elif kind is Kind.SCHEDULE:
            self._broker.add_schedule(
                tx, actor, detail["to"], detail["body"], detail["first_at"], detail.get("every_s")
            )

    def admit(self, tx: Tx, name: str, description: str, parent: str) -> None:
        """Make the agent's row, or revive a kept one. Its folders and container come with the deploy."""
        kept = self.check_spawn(tx, name)
        if kept is None:
            tx.insert(
                "agents",
                name=name,
                description=description,
                parent=None if parent == OPERATOR else parent,
                created_at=now_ms(),
                state_since=now_ms(),
            )
        else:
            tx.execute(
                "UPDATE agents SET kept = 0, wanted = 1, failed = NULL, state = 'offline', state_since = ?,"
                " paused = 0, pause_reason = NULL, paused_by = NULL, budget_day = NULL,"
                " state_reason = NULL, description = CASE WHEN ?2 = '' THEN description ELSE ?2 END WHERE name = ?3",
                now_ms(),
                description,
                name,
            )
        tx.changed("agent", name)

    def unadmit(self, tx: Tx, name: str) -> None:
        """Back to what was there before `admit`: a kept agent, or none."""
        if tx.one("SELECT 1 FROM agents WHERE name = ? AND deployed_sha IS NULL", name):
            self._broker.close_mail(tx, name)
            tx.execute("DELETE FROM agents WHERE name = ?", name)
        tx.execute("UPDATE agents SET kept = 1, wanted = 0 WHERE name = ?", name)
        tx.changed("agent", name)

    def forget_old(self, repositories: Repositories) -> None:
        """Retention: what was decided 30 days ago keeps its row, not its diff and its commit. Each hour one agent's."""
        old = "SELECT id, agent FROM approvals WHERE resolved_at < ? AND (diff != '' OR commit_ref NOT NULL)"
        rows = self._store.rows(old, now_ms() - 30 * DAY_MS)
        agent = rows[0]["agent"] if rows else ""
        ids = [row["id"] for row in rows if row["agent"] == agent]
        if not ids:
            return
        repositories.forget_proposals(agent, ids)
        blank = "UPDATE approvals SET diff = '', commit_ref = NULL WHERE id = ?"

        def work(tx: Tx) -> None:
            for approval in ids:
                tx.execute(blank, approval)
                tx.changed("approval", approval)

        self._store.write(work)

    def remind_waiting(self) -> None:
        """Called each tick: a request that waits too long is brought up once more."""
        before = now_ms() - int(self._config.remind_after_s * 1000)
        late = (
            "SELECT id, kind, agent, requested_by FROM approvals"
            " WHERE status = 'pending' AND reminded_at IS NULL AND requested_at <= ?"
        )
        if self._config.remind_after_s and self._store.row(late, before):
            self._store.write(lambda tx: self._remind(tx, tx.execute(late, before).fetchall()))

    def _remind(self, tx: Tx, rows: list[sqlite3.Row]) -> None:
        for row in rows:
            tx.execute("UPDATE approvals SET reminded_at = ? WHERE id = ?", now_ms(), row["id"])
            text = f"Request {row['id']} ({row['kind']} {row['agent']}) by {row['requested_by']} still waits for you."
            self._broker.tell(tx, OPERATOR, "request_waits", text, approval=row["id"], agent=row["agent"])


def queue_deploy(
    tx: Tx,
    agent: str,
    kind: str,
    *,
    sha: str | None = None,
    approval: int | None = None,
    not_before: int | None = None,
    pins: str | None = None,
) -> int:
    row = {"agent": agent, "kind": kind, "sha": sha, "approval": approval, "not_before": not_before, "pins": pins}
    deploy = tx.insert("deploys", requested_at=now_ms(), **row)
    tx.changed("deploy", deploy)
    return deploy


# ──────────────────────────────────────────────────────────────────────────────
# Containers
# ──────────────────────────────────────────────────────────────────────────────
# One small interface, two implementations.
#
# `process` runs each harness as a child of this daemon: no isolation, and it says so. A child outlives a
# daemon that is killed; the next one finds it by its note (pid and start time), so that no turn is lost
# and no agent runs twice.
#
# `nixos` drives `nixos-container`. What bites there, and what is done about it:
# * `create` writes the conf file before it builds: we build first, and every failed create is followed by destroy.
# * It builds into `.tmp` of its working directory, and leaves that behind as a root of the garbage collector:
#   each agent has a directory of its own, and the link is removed.
# * A second `update` builds the attribute `container` whatever was named before: so ours has that name.
# * `update` reloads a container that runs, but with the old conf file: we stop it first.
# * `create` gives each container a private network, in which its page can't be seen: the keys are emptied.
# * EXTRA_NSPAWN_FLAGS is split at white space and globbed: a path that this would break is refused at start.
# * systemd would start a crashed container again by itself, and the watch would not see it: a drop-in says no.


@dataclasses.dataclass(frozen=True)
class ContainerState:
    running: bool
    ended: str = ""  # how the last run ended, where that is known: "status 1", "oom-kill"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A config to try, in a folder of its own that is thrown away afterwards."""

    folder: Path
    name: str
    repository: Path
    sha: str
    pins: str
    update: bool
    deadline: float  # of the monotonic clock

    @property
    def left_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


class Containers(Protocol):
    """What the hive needs of whatever runs its agents. All may raise `Refused`."""

    label: str
    source: str  # names the hyperhive that a deploy builds in; "" where agents run the code that lies here
    operator_dir: str  # where an agent sees the files that the operator attaches

    def build(self, name: str, sha: str, pins: str, say: Say, *, update: bool) -> str:
        """Make all that this config needs, with these inputs (`update`: with newer ones), and return its inputs.

        What runs is not touched. Harmless to repeat, wherever an earlier one was broken off.
        """

    def switch(self, name: str, say: Say) -> None:
        """Stop it; what was built last is what starts next."""

    def end_builds(self) -> None:
        """The daemon stops: a build that is under way fails."""

    def evaluate(self, trial: Trial, say: Say, stop: threading.Event) -> None:
        """Evaluate a config that is only proposed."""

    def try_build(self, trial: Trial, say: Say, stop: threading.Event) -> list[str]:
        """Build it, and tell how it differs from what runs, in the words of `nix store diff-closures`."""

    def start(self, name: str) -> None: ...
    def stop(self, name: str, *, graceful: bool) -> None: ...
    def destroy(self, name: str) -> None: ...
    def exists(self, name: str) -> bool: ...
    def states(self) -> dict[str, ContainerState]: ...
    def log(self, name: str, lines: int, after: str | None) -> tuple[list[str], str]: ...

    def command(self, name: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """How a person at a terminal runs the agent's harness.py with these arguments: argv and environment."""

    def leave(self) -> None: ...


@dataclasses.dataclass
class _Running:
    """A harness process: our child, or one that a daemon before us started."""

    pid: int
    started: int
    child: subprocess.Popen[bytes] | None

    def status(self) -> int | None:
        """None while it runs; its exit status, or -1 where somebody else reaps it."""
        if self.child is not None:
            return self.child.poll()
        return None if start_time_of(self.pid) == self.started else -1

    def wait(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        while self.status() is None and time.monotonic() < end:
            time.sleep(0.02)
        return self.status() is not None


class ProcessContainers:
    label = "process"
    source = ""
    GRACE_S: Final = 12.0  # a harness promises to end in 10

    def __init__(self, config: Config) -> None:
        self._config = config
        self.operator_dir = str(config.operator_dir)
        self._running: dict[str, _Running] = {}
        self._lock = threading.RLock()
        self._notes = config.runtime_dir / "processes"
        self._notes.mkdir(mode=0o700, exist_ok=True)
        for note in self._notes.glob("*.json"):
            self._adopt(note)

    def _adopt(self, note: Path) -> None:
        try:
            known = json.loads(note.read_text())
            running = _Running(int(known["pid"]), int(known["started"]), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("ignoring the note %s: %s", note, error)
            return
        if running.status() is None:
            self._running[note.stem] = running
        else:
            self._sweep(note.stem)
            note.unlink()

    def build(self, name: str, sha: str, pins: str, say: Say, *, update: bool) -> str:
        """The config is recorded; there is nothing to build."""
        return ""

    def switch(self, name: str, say: Say) -> None:
        self.stop(name, graceful=True)

    def end_builds(self) -> None:
        """There are none."""

    def evaluate(self, trial: Trial, say: Say, stop: threading.Event) -> None:
        """A process has nothing to evaluate; no pre-check is begun for it."""

    def try_build(self, trial: Trial, say: Say, stop: threading.Event) -> list[str]:
        return []

    def start(self, name: str) -> None:
        with self._lock:
            known = self._running.get(name)
            if known and known.status() is None:
                return
            self._sweep(name)
            child = self._launch(name)
            started = start_time_of(child.pid) or 0
            self._running[name] = _Running(child.pid, started, child)
            write_atomically(self._note(name), json.dumps({"pid": child.pid, "started": started}))

    def _launch(self, name: str) -> subprocess.Popen[bytes]:
        log_file = self._config.agent_log(name)
        log_file.parent.mkdir(mode=0o700, exist_ok=True)
        if log_file.exists() and log_file.stat().st_size > 8 * 1024 * 1024:
            log_file.replace(log_file.with_suffix(".log.1"))
        with log_file.open("ab") as output:
            return popen(
                [sys.executable, str(HERE / "harness.py"), "run"],
                env=self._environment(name),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _environment(self, name: str) -> dict[str, str]:
        folder = self._config.agent_dir(name)
        passed = (
            "PATH",
            "LANG",
            "LC_ALL",
            "TZ",
            "HYPERHIVE_REHEARSAL_SPEED",
            "HYPERHIVE_BACKOFF_S",
            "HYPERHIVE_LOGIN_S",
            "HYPERHIVE_TEST_MARK",
        )
        return {
            **{key: os.environ[key] for key in passed if key in os.environ},
            "HOME": str(folder),
            "CLAUDE_CONFIG_DIR": str(folder / "claude"),
            "PYTHONUNBUFFERED": "1",
            "HYPERHIVE_SOCKET": str(self._config.agent_socket(name)),
            "HYPERHIVE_STATE": str(folder / "state"),
            "HYPERHIVE_SHARED": str(self._config.shared_dir),
            "HYPERHIVE_OPERATOR": str(self._config.operator_dir),
            "HYPERHIVE_CLAUDE": self._config.claude,
            "HYPERHIVE_EXTRA_PROMPT": self._config.extra_prompt,
            "HYPERHIVE_MCP_SERVERS": self._config.mcp_servers,
            **({"HYPERHIVE_REHEARSAL": "1"} if self._config.rehearsal else {}),
        }

    def _note(self, name: str) -> Path:
        return self._notes / f"{name}.json"

    def stop(self, name: str, *, graceful: bool) -> None:
        with self._lock:
            running = self._running.get(name)
            if running and running.status() is None:
                self._signal(running, signal.SIGTERM if graceful else signal.SIGKILL)
                if not running.wait(self.GRACE_S):
                    self._signal(running, signal.SIGKILL)
                    running.wait(2.0)
            self._sweep(name)
            self._running.pop(name, None)
            self._note(name).unlink(missing_ok=True)

    @staticmethod
    def _signal(running: _Running, number: int) -> None:
        if running.status() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.pid, number)

    def _sweep(self, name: str) -> None:
        """Kill what a dead harness left: Claude and its tools run in sessions of their own."""
        for pid in processes_with(f"HYPERHIVE_SOCKET={self._config.agent_socket(name)}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def destroy(self, name: str) -> None:
        self.stop(name, graceful=True)

    def exists(self, name: str) -> bool:
        return name in self._running

    def states(self) -> dict[str, ContainerState]:
        with self._lock:
            found = {name: running.status() for name, running in self._running.items()}
        known = {name: "" if status in (None, -1) else f"status {status}" for name, status in found.items()}
        return {name: ContainerState(found[name] is None, ended) for name, ended in known.items()}

    def log(self, name: str, lines: int, after: str | None) -> tuple[list[str], str]:
        """The last lines, or those written since the cursor; and the new cursor."""
        path = self._config.agent_log(name)
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                begin = int(after) if after and after.isdecimal() and int(after) <= size else max(0, size - 256 * 1024)
                file.seek(begin)
                raw = file.read(1024 * 1024)
        except FileNotFoundError:
            return [], "0"
        whole = raw[: raw.rfind(b"\n") + 1] if after else raw
        text = whole.decode(errors="replace").splitlines()
        return text[-lines:], str(begin + len(whole))

    def command(self, name: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, str(HERE / "harness.py"), *arguments], self._environment(name)

    def leave(self) -> None:
        """The daemon ends: its children end with it, all at once."""
        threads = [
            threading.Thread(target=self.stop_quietly, args=(name,), name=f"stop-{name}")
            for name in list(self._running)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def stop_quietly(self, name: str) -> None:
        running = self._running.get(name)
        if running is not None:
            self._signal(running, signal.SIGTERM)
            running.wait(self.GRACE_S)
        try:
            self.stop(name, graceful=False)
        except Refused as error:
            log.warning("stopping %s: %s", name, error)


CONF_EMPTIED: Final = (  # each of them, when it is there, makes a private network
    "HOST_ADDRESS",
    "LOCAL_ADDRESS",
    "HOST_ADDRESS6",
    "LOCAL_ADDRESS6",
    "LOCAL_MAC_ADDRESS",
    "HOST_BRIDGE",
    "HOST_PORT",
)
CONF_KEY: Final = re.compile(r"(?:[ \t\r\n]|[#;][^\r\n]*)*((?:[^\r\n][^=\r\n]*)?)(=?)")
CONF_PIECE: Final = re.compile(
    r"""[ \t]* (?: '(?P<single>[^']*) (?:'|\Z)
                 | "(?P<double>(?:\\.|[^"\\])*) (?:"|\\?\Z)
                 | (?P<plain>(?=[^ \t])(?:\\.|[^\\\r\n])+) (?P<cut>\\?))""",
    re.VERBOSE | re.DOTALL,
)
BINDABLE: Final = re.compile(r"/[\w/.,+@=-]*", re.ASCII)
OWN_FILES: Final = ("hyperhive.py", "harness.py", "module.nix", "flake.nix", "static")


def parse_conf(text: str) -> dict[str, str]:
    """The assignments of an EnvironmentFile, see systemd.exec(5). Of a key that comes twice the last one counts."""
    values: dict[str, str] = {}
    at = 0
    while at < len(text) and (line := CONF_KEY.match(text, at)):
        key, assigned = line[1].rstrip(" \t"), line[2]
        value, at = _conf_value(text, line.end()) if assigned else ("", line.end())
        if assigned and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            values[key] = value
    return values


def _conf_value(text: str, at: int) -> tuple[str, int]:
    """The value that begins here, and where its line ends. Pieces in quotes are joined; a plain one is the last."""
    value = ""
    while piece := CONF_PIECE.match(text, at):
        at = piece.end()
        if piece["single"] is not None:
            value += piece["single"]
        elif piece["double"] is not None:
            value += re.sub(r'\\(["\\`$])|\\\n', lambda found: found[1] or "", piece["double"])
        else:
            spaces = "" if piece["cut"] else r"[ \t]*"  # which stay before a backslash at the very end
            bare = re.fullmatch(rf"((?:\\.|[^\\])*?){spaces}", piece["plain"], re.DOTALL)
            value += re.sub(r"\\(.)", lambda found: found[1].strip("\r\n"), bare[1] if bare else "", flags=re.DOTALL)
            break
    return value, at


def render_conf(values: Mapping[str, str]) -> str:
    def quoted(value: str) -> str:
        if re.fullmatch(r"[\w@%+=:,./~-]*", value):
            return value
        return '"' + re.sub(r'(["\\`$])', r"\\\1", value) + '"'

    return "".join(f"{key}={quoted(value)}\n" for key, value in values.items())


def check_bindable(path: Path, what: str) -> None:
    """Refuse what does not survive unquoted expansion in the start script of a container, or a flake reference."""
    if not BINDABLE.fullmatch(str(path)):
        raise Refused(
            "usage",
            f"{what} {str(path)!r} can't be used for NixOS containers, which pass paths on unquoted",
            "choose a path of ASCII letters, digits and / . , + @ = - _ alone",
        )


def nix_string(text: str) -> str:
    return '"' + re.sub(r'(["\\]|\$\{)', r"\\\1", text).replace("\n", "\\n") + '"'


def hash_of_source(folder: Path) -> str:
    """Names the hyperhive in this folder: equal for equal files."""
    digest = hashlib.sha256()
    for name in OWN_FILES:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def deploy_flake(config: Config, name: str, sha: str, repository: Path | None = None) -> str:
    """The flake that pins one deploy: hyperhive's own source, the host's nixpkgs, and the approved commit."""
    nixpkgs = f"path:{config.nixpkgs}" if config.nixpkgs.startswith("/") else config.nixpkgs or "flake:nixpkgs"
    agent = f"git+file://{repository or config.repository(name)}?ref={BUILD_REFS}{sha}&rev={sha}"
    return f"""\
# Written by hyperhive for each deploy of {name}; what is changed here is lost.
{{
  inputs = {{
    nixpkgs.url = {nix_string(nixpkgs)};
    nixpkgs-unstable.url = {nix_string(config.nixpkgs_unstable)};
    hyperhive = {{
      url = {nix_string(f"path:{config.source_dir}")};
      inputs.nixpkgs.follows = "nixpkgs";
      inputs.nixpkgs-unstable.follows = "nixpkgs-unstable";
    }};
    agent = {{
      url = {nix_string(agent)};
      flake = false;
    }};
  }};
  outputs = inputs: {{
    nixosConfigurations.container = inputs.hyperhive.lib.mkAgent {{
      name = {nix_string(name)};
      system = {nix_string(f"{os.uname().machine}-linux")};
      config = "${{inputs.agent}}/agent.nix";
    }};
  }};
}}
"""


TOPLEVEL: Final = "nixosConfigurations.container.config.system.build.toplevel"


class NixosContainers:
    label = "nixos"
    operator_dir = "/operator"
    COMMAND_S: Final = 150.0  # systemd gives a container one minute to start and one and a half to stop
    LOOK_S: Final = 10.0
    FRESH_S: Final = 1.0  # how long one look at the states serves
    PROGRAMS: Final = ("nixos-container", "nix", "systemctl", "journalctl", "unshare", "mount")
    UNPINNED: Final = ("agent", "hyperhive")  # inputs that are always those of the deploy itself
    PASSED: Final = (
        "HOME",
        "NIX_PATH",
        "NIX_REMOTE",
        "NIX_SSL_CERT_FILE",
        "SSL_CERT_FILE",
        "LOCALE_ARCHIVE",
        "TMPDIR",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HYPERHIVE_TEST_MARK",
    )
    NIX_SETTINGS: Final = (
        "extra-experimental-features = nix-command flakes\n"
        "allow-import-from-derivation = false\n"
        "min-free = 0\n"  # a collection of garbage that began here would not see what containers need
    )

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ending = threading.Event()
        self._reloaded: set[str] = set()  # whose limits systemd has read, as far as we know
        self._lock = threading.Lock()
        self._changes = 0  # of ours: a look that began before one is worth nothing after it
        self._seen: tuple[float, dict[str, ContainerState]] = (0.0, {})
        missing = [name for name in self.PROGRAMS if not shutil.which(name)]
        if missing:
            raise Refused(
                "usage",
                f"agents run in NixOS containers, and this machine has no {' and no '.join(missing)}",
                "set boot.enableContainers on NixOS; elsewhere say --containers process (no isolation)",
            )
        if config.private_users not in ("pick", "identity", "no"):
            raise Refused("usage", f"private_users = {config.private_users!r} is not known", "say pick, identity or no")
        check_bindable(config.state_dir, "the state folder")
        check_bindable(config.runtime_dir, "the runtime folder")
        check_bindable(config.source_dir, "hyperhive's own folder")
        self.source = hash_of_source(config.source_dir)

    # -- one command each

    def _environment(self) -> dict[str, str]:
        return {
            "HOME": str(self._config.state_dir),
            **{key: os.environ[key] for key in self.PASSED if key in os.environ},
            "PATH": os.environ.get("PATH", ""),
            "LC_ALL": "C.UTF-8",
            "NIX_CONFIG": f"{os.environ.get('NIX_CONFIG', '')}\n{self.NIX_SETTINGS}",
        }

    @staticmethod
    def _mark(folder: Path) -> str:
        """In the environment of builds, so that one whose daemon was killed is found again."""
        return f"HYPERHIVE_BUILD={folder}"

    def _marked(self, folder: Path) -> dict[str, str]:
        key, _, value = self._mark(folder).partition("=")
        return self._environment() | {key: value}

    def _end_leftovers(self, folder: Path) -> None:
        """Builds of a daemon that was killed may go on: they would spoil, or hold up, the next one here."""
        for pid in processes_with(self._mark(folder)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _folder(self, name: str) -> Path:
        """Where commands about this container run: some leave things in their working directory."""
        folder = self._config.deploy_dir(name)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def _command(self, verb: str, name: str) -> None:
        argv = ["nixos-container", verb, f"h-{name}"]
        try:
            run(argv, env=self._environment(), cwd=self._folder(name), timeout_s=self.COMMAND_S)
        finally:
            self._forget_states()

    def _build(self, name: str, say: Say, *argv: str, within: Sequence[str] = ()) -> None:
        folder, limit = self._folder(name), self._config.build_timeout_s
        env = self._marked(folder)
        run_aloud(argv, env=env, cwd=folder, say=say, timeout_s=limit, stop=self._ending, within=within)

    def _seeing(self, folder: Path, *others: Path) -> list[str]:
        """Words before a command that runs in this folder: of the hive's files it sees these folders alone.

        Nix opens any repository that a config names, and git runs what its settings say: none may be in sight that
        an agent can write. Nor other secrets of the hive, of which an error would tell a hash, and that the rest.
        Processes are hidden, too: each shows the files as it sees them itself (/proc/PID/root).
        """
        state, stage = self._config.state_dir, self._config.state_dir / "agents"
        lines = [f"mkdir -p {stage}", f"mount -t tmpfs none {stage}"]
        for path in (folder, *others):
            place = stage / path.relative_to(state)
            lines += [f"mkdir -p {place}", f"mount --bind {path} {place}"]
        lines += [f"mount --move {stage} {state}"]
        for hidden in map(shlex.quote, (str(self._config.runtime_dir), *self._config.container_dirs)):
            lines += [f"[ ! -d {hidden} ] || mount -t tmpfs none {hidden}"]
        lines += [f"cd {folder}", 'exec "$@"']  # the folder that it began in has the old ones above it
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return [*alone, "sh", "-euc", "\n".join(lines), "sh"]

    def _ask(self, *argv: str) -> str:
        env = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"}
        return run(argv, env=env, timeout_s=self.LOOK_S).text

    # -- whose is it?

    def _conf_file(self, name: str) -> Path:
        return self._config.conf_dir / f"h-{name}.conf"

    def _conf(self, name: str) -> dict[str, str] | None:
        try:
            return parse_conf(self._conf_file(name).read_bytes().decode(errors="replace"))
        except FileNotFoundError:
            return None

    def _is_ours(self, name: str) -> bool:
        """`create` notes the flake's folder, and ours is a folder that nobody else would name."""
        conf = self._conf(name)
        return conf is not None and conf.get("FLAKE") == str(self._config.deploy_dir(name))

    def _refuse_foreign(self, name: str) -> None:
        if self._conf(name) is not None and not self._is_ours(name):
            raise Refused(
                "conflict",
                f"there is a container h-{name} that this hive did not make",
                f"remove it (nixos-container destroy h-{name}), or choose another name for the agent",
            )

    def _must_be_ours(self, name: str) -> None:
        self._refuse_foreign(name)
        if self._conf(name) is None:
            raise Refused("not_found", f"the container h-{name} is gone", f"`rebuild {name}` makes it anew")

    # -- the conf file and the limits

    def rewrite_conf(self, name: str) -> None:
        """Our keys as they must be, all others as they are, in one step."""
        kept = self._conf(name) or {}
        ours = {
            "PRIVATE_NETWORK": "0",
            **dict.fromkeys(CONF_EMPTIED, ""),
            "PRIVATE_USERS": self._config.private_users,
            "EXTRA_NSPAWN_FLAGS": " ".join(["--drop-capability=CAP_NET_RAW", *self._binds(name)]),
        }
        text = render_conf({key: value for key, value in kept.items() if key not in ours} | ours)
        try:
            write_atomically(self._conf_file(name), text, mode=0o644)
        except OSError as error:
            raise Refused("storage", f"can't write {self._conf_file(name)}: {error.strerror}") from None

    def _binds(self, name: str) -> list[str]:
        config, agent = self._config, self._config.agent_dir(name)
        mapped = ":idmap" if config.private_users == "pick" else ""
        return [
            f"--bind={agent / 'claude'}:/root/.claude{mapped}",
            f"--bind={agent / 'state'}:/state{mapped}",
            f"--bind={config.shared_dir}:/shared{mapped}",
            f"--bind-ro={config.operator_dir}:/operator{mapped}",
            f"--bind-ro={config.agent_runtime(name)}:/run/hive{mapped}",
        ]

    def _drop_in(self, name: str) -> Path:
        return self._config.unit_dir / f"container@h-{name}.service.d" / "50-hyperhive.conf"

    def _write_limits(self, name: str) -> None:
        config, path = self._config, self._drop_in(name)
        text = (
            f"[Unit]\nStartLimitIntervalSec=0\n[Service]\nRestart=no\n"
            f"MemoryMax={config.memory_max}\nCPUQuota={config.cpu_quota}\nTasksMax={config.tasks_max}\n"
        )
        try:
            if name in self._reloaded and path.exists() and path.read_text() == text:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text, mode=0o644)
        except OSError as error:
            raise Refused("storage", f"can't write {path}: {error.strerror}") from None
        self._reload()
        self._reloaded.add(name)

    def _reload(self) -> None:
        """All units of the machine are read anew: that may take its time."""
        run(["systemctl", "daemon-reload"], env=self._environment(), timeout_s=self.COMMAND_S)

    # -- building

    def build(self, name: str, sha: str, pins: str, say: Say, *, update: bool) -> str:
        self._refuse_foreign(name)
        folder = self._folder(name)
        self._end_leftovers(folder)
        lock = folder / "flake.lock"
        if pins:
            write_atomically(lock, pins)
        else:
            lock.unlink(missing_ok=True)
        write_atomically(folder / "flake.nix", deploy_flake(self._config, name, sha))
        systems = self._config.system_dir(name)
        systems.mkdir(mode=0o700, parents=True, exist_ok=True)
        seeing = self._seeing(folder, self._config.repository(name), systems)
        if update:
            self._build(name, say, "nix", "flake", "update", within=seeing)
        build = ("nix", "build", "--print-build-logs", "--out-link", str(self._built(name)))
        self._build(name, say, *build, f"{folder}#{TOPLEVEL}", within=seeing)
        return self._pins(lock)

    def _built(self, name: str) -> Path:
        """A link to what was built last. Not beside the flake, which would be another one with it, evaluated anew."""
        return self._config.system_dir(name) / "built"

    def _switched(self, name: str) -> Path:
        """A link to what it was switched to last. In its profile, which it can write, it may say anything."""
        return self._config.system_dir(name) / "switched"

    def _pins(self, lock: Path) -> str:
        """What was built with, but for the inputs that change with each deploy: Nix locks those anew."""
        try:
            locked = json.loads(lock.read_text())
            inputs = locked["nodes"][locked["root"]]["inputs"]
            for name in self.UNPINNED:
                locked["nodes"].pop(inputs.pop(name, None), None)
            return json.dumps(locked, sort_keys=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is not a lock file that we understand: %s", lock, error)
            return ""

    def evaluate(self, trial: Trial, say: Say, stop: threading.Event) -> None:
        self._end_leftovers(self._config.scratch_dir)
        if trial.pins:
            write_atomically(trial.folder / "flake.lock", trial.pins)
        flake = deploy_flake(self._config, trial.name, trial.sha, trial.repository)
        write_atomically(trial.folder / "flake.nix", flake)
        if trial.update:
            self._try(trial, say, stop, "nix", "flake", "update")
        self._try(trial, say, stop, "nix", "eval", "--show-trace", "--raw", f"{trial.folder}#{TOPLEVEL}.drvPath")

    def try_build(self, trial: Trial, say: Say, stop: threading.Event) -> list[str]:
        result, runs = trial.folder / "result", self._switched(trial.name)
        # The builder may be the Nix daemon's child, which our niceness does not reach.
        modest = ("--max-jobs", "1", "--cores", "1")
        build = ("nix", "build", "--print-build-logs", *modest, "--out-link", str(result))
        self._try(trial, say, stop, *build, f"{trial.folder}#{TOPLEVEL}")
        if not runs.exists():
            return []
        argv = ["nix", "store", "diff-closures", str(runs.resolve()), str(result.resolve())]
        return run(argv, env=self._environment(), cwd=trial.folder, timeout_s=trial.left_s).text.splitlines()

    def _try(self, trial: Trial, say: Say, stop: threading.Event, *argv: str) -> None:
        """At the lowest priority: nobody waits for this as for a deploy. One at a time, so that one mark will do."""
        env, within = self._marked(self._config.scratch_dir), self._seeing(trial.folder, trial.repository)
        within += ["nice", "-n", "19"]
        run_aloud(argv, env=env, cwd=trial.folder, say=say, timeout_s=trial.left_s, stop=stop, within=within)

    def end_builds(self) -> None:
        self._ending.set()

    # -- life

    def switch(self, name: str, say: Say) -> None:
        self._refuse_foreign(name)
        self.stop(name, graceful=True)
        flake = f"{self._folder(name)}#container"
        conf = self._conf(name)
        try:
            if conf is None or "EXTRA_NSPAWN_FLAGS" not in conf:  # else an earlier create came to its end
                self._create(name, flake, say)
            else:
                self._build(name, say, "nixos-container", "update", f"h-{name}", "--flake", flake)
        finally:
            (self._folder(name) / ".tmp").unlink(missing_ok=True)
        self.rewrite_conf(name)
        switched, system = self._switched(name), self._built(name).resolve()
        self._build(name, say, "nix", "build", "--out-link", str(switched), str(system))

    def _create(self, name: str, flake: str, say: Say) -> None:
        if self._conf(name) is not None:
            self._command("destroy", name)
        try:
            self._build(name, say, "nixos-container", "create", f"h-{name}", "--flake", flake)
        except Refused:
            if self._is_ours(name):
                self._command("destroy", name)
            raise

    def start(self, name: str) -> None:
        self._must_be_ours(name)
        self._write_limits(name)
        self.rewrite_conf(name)
        self._command("start", name)

    def stop(self, name: str, *, graceful: bool) -> None:
        if not self._is_ours(name):
            return
        try:
            if self._running(name):
                self._command("stop" if graceful else "terminate", name)
        except Refused:
            if self._running(name):
                raise

    def destroy(self, name: str) -> None:
        """Leave nothing of it but what is ours to keep. One that somebody else made is left alone."""
        if self._is_ours(name):
            self.stop(name, graceful=True)
            self._command("destroy", name)
        elif self._conf(name) is not None:
            log.warning("h-%s was not made by this hive: it is left as it is", name)
        remove_tree(self._config.deploy_dir(name))
        remove_tree(self._config.system_dir(name))
        if self._drop_in(name).exists():
            remove_tree(self._drop_in(name).parent)
            self._reload()

    def exists(self, name: str) -> bool:
        return self._is_ours(name)

    def _running(self, name: str) -> bool:
        self._forget_states()
        return self.states().get(name, ContainerState(False)).running

    def _forget_states(self) -> None:
        with self._lock:
            self._changes += 1
            self._seen = (0.0, {})

    def states(self) -> dict[str, ContainerState]:
        with self._lock:
            (at, known), change = self._seen, self._changes
        if time.monotonic() < at + self.FRESH_S:
            return known
        states = self._look()
        with self._lock:
            if change == self._changes:
                self._seen = (time.monotonic(), states)
        return states

    def _look(self) -> dict[str, ContainerState]:
        """All of them in one call. A unit that systemd has not loaded is missing from its answer: it does not run."""
        found = {}
        shown = self._ask("systemctl", "show", "container@h-*", "-p", "Id,ActiveState,SubState,Result,MainPID")
        for block in shown.split("\n\n"):
            unit = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            name = unit.get("Id", "").removeprefix("container@h-").removesuffix(".service")
            if self._is_ours(name):
                running = unit["ActiveState"] not in ("inactive", "failed")
                result = unit.get("Result", "")
                found[name] = ContainerState(running, "" if running or result == "success" else result)
        return found

    def log(self, name: str, lines: int, after: str | None) -> tuple[list[str], str]:
        argv = ["journalctl", "--quiet", "--unit", f"container@h-{name}.service", "--output=cat", "--show-cursor"]
        argv += [f"--lines={lines}", *([f"--after-cursor={after}"] if after else [])]
        text = self._ask(*argv).splitlines()
        mark = "-- cursor: "
        cursor = text.pop().removeprefix(mark) if text and text[-1].startswith(mark) else after or ""
        return text, cursor

    def command(self, name: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """A unit of the container. `nixos-container run` would keep the host's root, outside of the agent's limits."""
        unit = ["systemd-run", f"--machine=h-{name}", "--pty", "--pipe", "--wait", "--collect", "--quiet"]
        return [*unit, "/run/current-system/sw/bin/hyperhive-harness", *arguments], {}

    def leave(self) -> None:
        """Containers are systemd's: they run on, and their harnesses wait for the next daemon."""


def make_containers(config: Config) -> Containers:
    return ProcessContainers(config) if config.containers == "process" else NixosContainers(config)


# ──────────────────────────────────────────────────────────────────────────────
# Agents
# ──────────────────────────────────────────────────────────────────────────────
# Life cycle. `wanted` in the table says what should be; the watch compares it with what runs. A stop of
# ours clears `wanted` first, so that it can never be taken for a crash; a restart keeps the watch out by its lock.


class Agents:
    """Start, stop, watch, destroy. `doors` opens and closes an agent's socket."""

    LIVE_DEPLOY: Final = "SELECT 1 FROM deploys WHERE agent = ? AND phase IN (?, ?, ?)"

    def __init__(
        self, config: Config, store: Store, broker: Broker, approvals: Approvals, containers: Containers
    ) -> None:
        self._config, self._store, self._broker, self._approvals = config, store, broker, approvals
        self.containers = containers
        self.open_door: Callable[[str], None] = lambda name: None
        self.close_door: Callable[[str], None] = lambda name: None
        self.connected: dict[str, set[object]] = defaultdict(set)  # connections on which a harness said hello
        self.running: frozenset[str] = frozenset()
        self.busy: set[str] = set()  # being deployed: not the watch's business
        self.starting: dict[str, threading.Thread] = {}  # nor are these
        self.attached: dict[str, threading.Event] = {}  # somebody is at its keyboard; set: its loop holds still
        self._leaving = False
        self._locks: dict[str, threading.RLock] = defaultdict(threading.RLock)
        self._looking = threading.Lock()  # or what was seen before would take the place of what is seen now
        self._crashes: dict[str, deque[int]] = defaultdict(deque)
        self._near = now_ms() + SIGN_IN_ENDS_MS
        self._heard: dict[str, float] = {}  # of those that run, when their harness last showed that it lives

    def hold(self, name: str) -> threading.RLock:
        """One at a time starts and stops an agent."""
        return self._locks[name]

    def prepare(self, name: str) -> None:
        """Folders, page token and socket; harmless to repeat. They exist before the agent does."""
        for folder, mode in ((self._config.shared_dir, 0o770), (self._config.operator_dir, 0o755)):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(mode)
        for leaf in ("claude", "state"):
            (self._config.agent_dir(name) / leaf).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._config.agent_dir(name).chmod(0o700)
        runtime = self._config.agent_runtime(name)
        runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (runtime / "ui-token").exists():
            write_atomically(runtime / "ui-token", secrets.token_urlsafe(32))
        self.open_door(name)
        self._pass_environment(runtime / "environment")

    def _pass_environment(self, target: Path) -> None:
        source = self._config.environment_file
        if not source:
            target.unlink(missing_ok=True)
            return
        try:
            write_atomically(target, Path(source).read_text())
        except (OSError, ValueError) as error:
            hint = "the setting environment_file names it"
            raise Refused("storage", f"{source} can't be passed on to agents: {error}", hint) from None

    def page_url(self, name: str) -> str:
        try:
            token = (self._config.agent_runtime(name) / "ui-token").read_text()
        except OSError:
            token = ""
        return self._config.page_url(name) + (f"#token={token}" if token else "")

    def living(self, name: str) -> sqlite3.Row:
        return self.known(name, kept=False)

    def known(self, name: str, *, kept: bool = True) -> sqlite3.Row:
        """The row of an agent; one that was destroyed with its state kept counts, unless told otherwise."""
        row = self._store.row("SELECT * FROM agents WHERE name = ? AND (NOT kept OR ?)", name, int(kept))
        if row is None:
            raise Refused("unknown_agent", f"there is no agent {name!r}", "`list` shows who is there")
        return row

    def _ready(self, name: str) -> None:
        row = self.living(name)
        under_way = "SELECT 1 FROM deploys WHERE agent = ? AND phase IN (?, ?)"
        if row["deployed_sha"] is None or self._store.row(under_way, name, *UNDER_WAY):
            raise Refused("conflict", f"{name} is being deployed", "try again when that is over")

    def start(self, actor: Actor, name: str) -> None:
        self._ready(name)
        with self._locks[name]:
            self._want(actor, name, "start", wanted=True)
            self._crashes[name].clear()
            self.prepare(name)
            self.containers.start(name)
        self.look()

    def stop(self, actor: Actor, name: str, *, graceful: bool = True) -> None:
        self._ready(name)
        with self._locks[name]:
            self._want(actor, name, "stop" if graceful else "kill", wanted=False)
            self.containers.stop(name, graceful=graceful)
            self._until_disconnected(name)
        self.look()

    def _until_disconnected(self, name: str) -> None:
        """Once its connections have ended, the mail that it had leased is back."""
        end = time.monotonic() + 5.0
        while self.connected[name] and time.monotonic() < end:
            time.sleep(0.01)

    def restart(self, actor: Actor, name: str) -> None:
        self._ready(name)
        with self._locks[name]:
            self._want(actor, name, "restart", wanted=True)  # all along: if we die now, the next daemon starts it
            self.containers.stop(name, graceful=True)
            self._crashes[name].clear()
            self.prepare(name)
            told = "You were restarted; your notes are in /state."
            self._store.write(lambda tx: self._broker.tell(tx, name, "restarted", told))
            self.containers.start(name)
        self.look()

    def _want(self, actor: Actor, name: str, what: str, *, wanted: bool) -> None:
        def work(tx: Tx) -> None:
            tx.execute("UPDATE agents SET wanted = ?, failed = NULL WHERE name = ?", int(wanted), name)
            tx.audit(actor, what, name)
            tx.changed("agent", name)

        self._store.write(work)

    def attach(self, actor: Actor, name: str) -> threading.Event:
        """Hold an agent's loop still, for a person at its session; the event says that it does."""
        self.living(name)
        if not self.connected[name]:
            raise Refused("conflict", f"{name} is not connected", "start it first")
        event = threading.Event()
        if self.attached.setdefault(name, event) is not event:
            raise Refused("conflict", f"somebody is at the keyboard of {name} already")
        self._store.write(lambda tx: self._tell_attached(tx, actor, name, Control.ATTACH))
        return event

    def detach(self, actor: Actor, name: str) -> None:
        if self.attached.pop(name, None) is not None:
            self._store.write(lambda tx: self._tell_attached(tx, actor, name, Control.DETACH))

    def _tell_attached(self, tx: Tx, actor: Actor, name: str, do: Control) -> None:
        tx.audit(actor, str(do), name)
        tx.changed("agent", name)
        self._broker.control(tx, name, do)

    def destroy(self, actor: Actor, name: str, *, purge: bool) -> None:
        """Remove the container; keep notes, sign-in, config and mail, or with `purge` wipe all of it."""
        if name == MANAGER:
            raise Refused("forbidden", "the manager can't be destroyed", "stop it, if it should rest")
        self.known(name, kept=purge or self.containers.exists(name))
        self._refuse_deployed(self._store.row(self.LIVE_DEPLOY, name, *LIVE_PHASES), name)  # before we wait for it
        with self._locks[name]:
            self._store.write(lambda tx: self._retire(tx, actor, name, purge=purge))
            self.take_down(name, wipe=purge)
            if purge:
                self._store.write(lambda tx: self._forget(tx, name))
        self.look()

    def take_down(self, name: str, *, wipe: bool) -> None:
        """Its container, its socket, and with `wipe` all of its files."""
        self.containers.destroy(name)
        self.close_door(name)
        remove_tree(self._config.agent_runtime(name))
        if wipe:
            remove_tree(self._config.agent_dir(name))
            remove_tree(self._config.repository(name))
            for suffix in ("log", "log.1"):
                self._config.agent_log(name).with_suffix(f".{suffix}").unlink(missing_ok=True)

    def _forget(self, tx: Tx, name: str) -> None:
        """After its files: if we die before this, the row still says that the name has something to wipe."""
        self._broker.close_mail(tx, name)
        tx.execute("DELETE FROM events WHERE agent = ?", name)
        tx.execute("DELETE FROM agents WHERE name = ?", name)
        tx.changed("agent", name)

    @staticmethod
    def _refuse_deployed(deploy: sqlite3.Row | None, name: str) -> None:
        if deploy is not None:
            raise Refused("conflict", f"{name} is being deployed", "try again when that is over")

    def _retire(self, tx: Tx, actor: Actor, name: str, *, purge: bool) -> None:
        self._refuse_deployed(tx.one(self.LIVE_DEPLOY, name, *LIVE_PHASES), name)
        tx.execute(
            "UPDATE agents SET kept = 1, wanted = 0, failed = NULL, state = 'offline', state_since = ?,"
            " status_text = NULL, status_set_at = NULL, state_reason = NULL WHERE name = ?",
            now_ms(),
            name,
        )
        self._approvals.fail_all(tx, name, "agent destroyed")
        tx.audit(actor, "purge" if purge else "destroy", name)
        tx.changed("agent", name)

    def recover(self) -> None:
        """At start: open every door, start what should run. What takes long goes on behind our back."""
        states = self.containers.states()
        for row in self._store.rows("SELECT * FROM agents WHERE NOT kept AND deployed_sha NOT NULL ORDER BY name"):
            name = row["name"]
            try:
                self.prepare(name)
            except (Refused, OSError) as error:
                log.error("can't prepare %s: %s", name, error)
            if row["wanted"] and not states.get(name, ContainerState(False)).running:
                self._soon(name, self._start_wanted)
        for row in self._store.rows("SELECT name FROM agents WHERE kept"):
            if self.containers.exists(row["name"]):  # its destruction was broken off
                self._soon(row["name"], self._take_down_kept)
        self._join_starts(10.0)
        self.look()

    def _soon(self, name: str, work: Callable[[str], None]) -> None:
        """A container may take a minute to start or to stop: nothing else waits for it."""
        thread = threading.Thread(target=self._try, args=(name, work), name=f"start-{name}", daemon=True)
        self.starting[name] = thread
        thread.start()

    def _try(self, name: str, work: Callable[[str], None]) -> None:
        try:
            with self._locks[name]:
                if name not in self.busy and not self._leaving:
                    work(name)
        except (Refused, OSError) as error:
            log.error("can't bring %s to where it should be: %s", name, error)
        finally:
            self.starting.pop(name, None)

    def _start_wanted(self, name: str) -> None:
        if self._store.row("SELECT 1 FROM agents WHERE name = ? AND wanted AND NOT kept", name):
            self.prepare(name)
            self.containers.start(name)

    def _take_down_kept(self, name: str) -> None:
        if self._store.row("SELECT 1 FROM agents WHERE name = ? AND kept", name):
            self.take_down(name, wipe=False)

    def _join_starts(self, limit_s: float) -> None:
        end = time.monotonic() + limit_s
        for thread in list(self.starting.values()):
            thread.join(max(0.0, end - time.monotonic()))

    def leave(self) -> None:
        """The daemon ends."""
        self._leaving = True
        self._join_starts(2.0)
        self.containers.leave()

    def look(self) -> None:
        """Compare what runs with what should: called each tick, and after each change of ours."""
        with self._looking:
            states = self.containers.states()
            running = frozenset(name for name, state in states.items() if state.running)
            changed, self.running = running ^ self.running, running
        if changed:
            self._store.write(lambda tx: tx.changes.extend(("agent", name) for name in sorted(changed)))
        for row in self._store.rows("SELECT name FROM agents WHERE wanted AND NOT kept AND deployed_sha NOT NULL"):
            name = row["name"]
            if name in running or name in self.busy or name in self.starting:
                continue
            if self._locks[name].acquire(blocking=False):
                try:
                    self._crashed(name, states.get(name))
                finally:
                    self._locks[name].release()

    def hear(self, name: str) -> None:
        """Its harness has asked for something."""
        self._heard[name] = time.monotonic()

    def watch_silence(self) -> None:
        """Called each tick. A harness that lives waits for mail, also in a turn; else it hangs, or is gone."""
        moment = time.monotonic()
        for name in self._heard.keys() - self.running:
            self._heard.pop(name, None)
        for name in self.running:
            if name in self.busy or name in self.starting or self._broker.is_waited_on(name):
                self.hear(name)
            elif self._heard.setdefault(name, moment) < moment - self._config.silent_s:
                self._heard[name] = math.inf  # told once
                self._store.write(functools.partial(self._report_silence, name=name))

    def _report_silence(self, tx: Tx, name: str) -> None:
        text = f"{name} runs, but nothing was heard of its harness for {self._config.silent_s:g} s."
        tx.audit(SYSTEM_ACTOR, "silent", name, text)
        self._broker.tell(tx, OPERATOR, "silent", f"{text} `logs {name}` shows its last words.", agent=name)
        if name != MANAGER:
            self._broker.tell_manager(tx, "silent", text, agent=name)

    def watch_sign_ins(self) -> None:
        """Called each tick: the end of a sign-in comes near though nothing happens, and that is news."""
        near = now_ms() + SIGN_IN_ENDS_MS
        before, self._near = self._near, near
        ending = "SELECT name FROM agents WHERE signed_in_until >= ? AND signed_in_until < ?"
        if rows := self._store.rows(ending, before, near):
            self._store.write(lambda tx: tx.changes.extend(("agent", row["name"]) for row in rows))

    def _crashed(self, name: str, state: ContainerState | None) -> None:
        row = self._store.row("SELECT wanted FROM agents WHERE name = ?", name)
        if row is None or not row["wanted"] or self.containers.states().get(name, ContainerState(False)).running:
            return  # somebody was faster
        recent = self._crashes[name]
        recent.append(now_ms())
        while recent and recent[0] < now_ms() - CRASH_WINDOW_MS:
            recent.popleft()
        give_up = len(recent) >= self._config.limits.crashes
        status = f" ({state.ended})" if state is not None and state.ended else ""
        self._store.write(lambda tx: self._report_crash(tx, name, status, give_up=give_up, count=len(recent)))
        if not give_up:
            self._soon(name, self._start_wanted)

    def _report_crash(self, tx: Tx, name: str, status: str, *, give_up: bool, count: int) -> None:
        if give_up:
            reason = f"its container was found down {count} times in ten minutes{status}"
            tx.execute("UPDATE agents SET wanted = 0, failed = ? WHERE name = ?", reason, name)
            text = f"{name} is stopped: {reason}. `logs {name}` shows its last words."
        else:
            text = f"The container of {name} should run and did not{status}: it is started again."
        tx.audit(SYSTEM_ACTOR, "container_crash", name, text)
        tx.changed("agent", name)
        self._broker.tell(tx, OPERATOR, "container_crash", text, agent=name)
        if name != MANAGER:
            self._broker.tell_manager(tx, "container_crash", text, agent=name)


# ──────────────────────────────────────────────────────────────────────────────
# Attachments
# ──────────────────────────────────────────────────────────────────────────────
# Files that the operator sends along with a message. They lie in a folder that agents can only read, so
# that one of them is the same for all whom it was sent to; the message names its path.


class Attachments:
    NAME_BYTES: Final = 120

    def __init__(self, config: Config, store: Store, seen_at: str) -> None:
        self._config, self._store, self._seen_at = config, store, seen_at
        self.max_bytes = config.limits.attachment_bytes

    def add(self, actor: Actor, name: str, content: IO[bytes]) -> Json:
        """Keep a copy under this name, or one like it where that is taken: {name, path, size in bytes}."""
        folder = self._folder()
        try:
            with tempfile.NamedTemporaryFile(dir=self._config.scratch_dir, prefix="attachment-") as file:
                size = self._fill(file, content)
                kept = self._link(Path(file.name), folder, self._safe(name))
        except OSError as error:
            raise Refused("storage", f"the file can't be kept: {error}") from None
        self._store.write(lambda tx: tx.audit(actor, "attached", kept, f"{size} bytes"))
        return {"name": kept, "path": f"{self._seen_at}/{kept}", "size": size}

    def rows(self) -> list[Json]:
        """The newest first."""
        found = []
        for entry in os.scandir(self._folder()):
            with contextlib.suppress(FileNotFoundError):  # it was deleted meanwhile
                if entry.is_file(follow_symlinks=False):
                    found.append((entry.name, entry.stat()))
        found.sort(key=lambda one: one[1].st_mtime, reverse=True)
        return [
            {
                "name": name,
                "path": f"{self._seen_at}/{name}",
                "size": status.st_size,
                "at": rfc3339(int(status.st_mtime * 1000)),
            }
            for name, status in found
        ]

    def delete(self, actor: Actor, name: str) -> None:
        if name not in (row["name"] for row in self.rows()):
            raise Refused("not_found", f"there is no attached file {name[:200]!r}")
        (self._folder() / name).unlink(missing_ok=True)
        self._store.write(lambda tx: tx.audit(actor, "attachment_deleted", name))

    def _folder(self) -> Path:
        self._config.operator_dir.mkdir(parents=True, exist_ok=True)
        return self._config.operator_dir

    def _fill(self, file: IO[bytes], content: IO[bytes]) -> int:
        while chunk := content.read(1024 * 1024):
            if file.tell() + len(chunk) > self.max_bytes:
                raise Refused("too_large", f"a file may have at most {self.max_bytes} bytes")
            file.write(chunk)
        size = file.tell()
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
        return size

    def _safe(self, name: str) -> str:
        """What a message can name and a shell takes as one word; its ending is kept."""
        plain = re.sub(r"[^\w.-]+", "-", name.replace("\\", "/").rpartition("/")[2]).strip("-.") or "file"
        stem, dot, ending = plain.rpartition(".")
        if not dot or len(ending.encode()) > 16:
            stem, dot, ending = plain, "", ""
        most = self.NAME_BYTES - len((dot + ending).encode())
        return stem.encode()[:most].decode(errors="ignore") + dot + ending

    @staticmethod
    def _link(file: Path, folder: Path, name: str) -> str:
        stem, dot, ending = name.rpartition(".") if "." in name else (name, "", "")
        for number in itertools.count(1):
            kept = name if number == 1 else f"{stem}-{number}{dot}{ending}"
            with contextlib.suppress(FileExistsError):
                os.link(file, folder / kept)
                sync_folder(folder)
                return kept
        raise AssertionError


# ──────────────────────────────────────────────────────────────────────────────
# Deploys
# ──────────────────────────────────────────────────────────────────────────────
# A deploy is a row: queued → building → switching → deployed | failed. Workers take the oldest whose
# agent has none running; a daemon that starts puts back what its predecessor left half done, so each
# step must be harmless to repeat. `main` moves only when the agent's harness has said hello.

DEPLOYS_AT_ONCE: Final = 2


class Deploys:
    def __init__(
        self,
        config: Config,
        store: Store,
        broker: Broker,
        approvals: Approvals,
        repositories: Repositories,
        agents: Agents,
    ) -> None:
        self._config, self._store, self._broker = config, store, broker
        self._approvals, self._repositories, self._agents = approvals, repositories, agents
        self._wake = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """Put back what was under way, then work."""
        again = "UPDATE deploys SET phase = 'queued' WHERE phase IN (?, ?)"
        self._store.write(lambda tx: tx.execute(again, *UNDER_WAY))
        for number in range(DEPLOYS_AT_ONCE):
            thread = threading.Thread(target=self._work, name=f"deploy-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._agents.containers.end_builds()
        for thread in self._threads:
            thread.join(5)

    def _is_closed(self) -> bool:
        return self._closed

    def wake(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def spawn(self, actor: Actor, name: str, description: str = "") -> int:
        """The operator's own: no approval. Returns the deploy's id."""

        def work(tx: Tx) -> int:
            self._approvals.admit(tx, name, description, actor.name)
            tx.audit(actor, "spawn", name)
            return queue_deploy(tx, name, "spawn")

        deploy = self._store.write(work)
        self.wake()
        return deploy

    def rebuild(self, actor: Actor, name: str) -> int:
        row = self._agents.living(name)
        return self._again(actor, name, "rebuild", row["deployed_sha"])

    def rollback(self, actor: Actor, name: str) -> int:
        """Deploy what was deployed before the present config, or before its present inputs."""
        self._agents.living(name)
        now = self._last_deployed(name)
        before = now and self._store.row(
            "SELECT d.* FROM deploys d JOIN agents g ON g.name = d.agent WHERE g.name = ? AND d.phase = 'deployed'"
            " AND d.requested_at >= g.created_at AND (d.sha != ? OR coalesce(d.pins, '') != ?) ORDER BY d.id DESC",
            name,
            now["sha"],
            now["pins"] or "",
        )
        if before is None:
            raise Refused("not_found", f"{name} has no earlier config to go back to")
        return self._again(actor, name, "rollback", before["sha"], before["pins"])

    def _again(self, actor: Actor, name: str, kind: str, sha: str | None, pins: str | None = None) -> int:
        if sha is None:
            raise Refused("conflict", f"{name} was never deployed")

        def work(tx: Tx) -> int:
            tx.audit(actor, kind, name, sha)
            return queue_deploy(tx, name, kind, sha=sha, pins=pins)

        deploy = self._store.write(work)
        self.wake()
        return deploy

    # -- the workers

    def _work(self) -> None:
        while (row := until_done(self._next, self._is_closed)) is not None:
            try:
                self._carry_out(row)
            except Exception as error:  # the worker must live on; the row says what happened
                log.exception("deploy %d", row["id"])
                self._fail(row, f"internal error: {error}")
            finally:
                with self._wake:
                    self._agents.busy.discard(row["agent"])
                    self._wake.notify_all()

    def _next(self) -> sqlite3.Row | None:
        with self._wake:
            while not self._closed:
                soonest = None
                for row in self._store.rows("SELECT * FROM deploys WHERE phase = 'queued' ORDER BY id"):
                    wait_s = ((row["not_before"] or 0) - now_ms()) / 1000
                    if wait_s > 0:
                        soonest = min(wait_s, soonest or wait_s)
                    elif row["agent"] not in self._agents.busy:
                        self._agents.busy.add(row["agent"])
                        return row
                self._wake.wait(soonest)
        return None

    def _carry_out(self, row: sqlite3.Row) -> None:
        name = row["agent"]
        if not self._begin(row):
            return
        switched = False
        try:
            sha = self._build(row)
            self._phase(row, Phase.SWITCHING)
            switched = True
            with self._agents.hold(name):
                self._switch(row)
            self._repositories.mark_deployed(name, sha, row["id"])
        except (Refused, OSError) as error:
            if self._closed:
                return  # not its fault: the next start does it again
            with self._agents.hold(name):
                self._fall_back(row, switched=switched)
            self._fail(row, str(error))
            return
        for step in (
            lambda: self._compare_again(name, sha),  # before anybody hears of the deploy and looks at what is older
            self._agents.look,
            lambda: self._store.write(lambda tx: self._succeed(tx, row, sha)),
            lambda: self._compare_again(name, sha, late=True),
            self._agents.look,
        ):
            until_done(step, self._is_closed)

    def _build(self, row: sqlite3.Row) -> str:
        """Make everything that the container needs; returns the sha that it will run."""
        name = row["agent"]
        self._agents.prepare(name)
        self._repositories.create(name)
        sha = row["sha"] or self._first_commit(row)
        self._store.write(lambda tx: tx.execute("UPDATE deploys SET sha = ? WHERE id = ?", sha, row["id"]))
        self._say(row, f"config {sha[:12]}")
        pins = row["pins"]
        if pins is None:
            pins = self.pins_of(name)
        pins = self._make(row, sha, pins, update=row["kind"] == "update")
        self._store.write(lambda tx: tx.execute("UPDATE deploys SET pins = ? WHERE id = ?", pins, row["id"]))
        return str(sha)

    def _make(self, row: sqlite3.Row, sha: str, pins: str | None, *, update: bool = False) -> str:
        self._repositories.hold(row["agent"], sha)
        say = functools.partial(self._say_lines, row)
        return self._agents.containers.build(row["agent"], sha, pins or "", say, update=update)

    def pins_of(self, name: str) -> str:
        """The flake inputs that an agent was last built with; empty where there are none yet."""
        before = self._last_deployed(name)
        return (before["pins"] or "") if before else ""

    def _last_deployed(self, name: str) -> sqlite3.Row | None:
        """What an agent runs. Deploys of a namesake that was purged are not its own."""
        return self._store.row(
            "SELECT d.* FROM deploys d JOIN agents g ON g.name = d.agent"
            " WHERE g.name = ? AND d.phase = 'deployed' AND d.requested_at >= g.created_at ORDER BY d.id DESC",
            name,
        )

    def _first_commit(self, row: sqlite3.Row) -> str:
        """Of a spawn: the proposed config with the operator's edit on top, else what was kept, else the template."""
        name, head = row["agent"], self._repositories.head(row["agent"])
        approval = self._store.row("SELECT detail FROM approvals WHERE id = ?", row["approval"])
        detail = json.loads(approval["detail"]) if approval else {}
        if "config" not in detail and head is not None:
            return head
        text = detail.get("config") or agent_template()
        original = detail.get("proposed", text) or agent_template()
        head = self._repositories.commit(name, Change(head, original, f"The first config of {name}"))
        if text != original:
            message = "Edited by the operator before the first deploy"
            head = self._repositories.commit(name, Change(head, text, message, author=OPERATOR))
        return head

    def _switch(self, row: sqlite3.Row) -> None:
        name = row["agent"]
        containers = self._agents.containers
        containers.switch(name, functools.partial(self._say_lines, row))
        self._agents.connected.pop(name, None)
        self._say(row, "starting")
        try:
            containers.start(name)
            self._await_hello(name)
        except Refused:
            with contextlib.suppress(Refused, OSError):
                self._say_lines(row, containers.log(name, 20, None)[0])
            raise
        self._say(row, "the harness said hello")

    def _await_hello(self, name: str) -> None:
        end = time.monotonic() + self._config.hello_s
        while not self._agents.connected[name]:
            state = self._agents.containers.states().get(name, ContainerState(False))
            if not state.running:
                how = f" ({state.ended})" if state.ended else ""
                raise Refused("internal", f"the container of {name} ended{how} before its harness said hello")
            if self._closed or time.monotonic() > end:
                raise Refused("internal", f"{name} did not say hello within {self._config.hello_s:g} s")
            time.sleep(0.05)

    def _compare_again(self, name: str, sha: str, *, late: bool = False) -> None:
        """What still waits for this agent is now a change to something else than was shown: show that.

        `late` is what was asked for while the others were compared.
        """
        waiting = "SELECT * FROM approvals WHERE agent = ? AND status = 'pending' AND kind IN (?, ?)"
        for row in self._store.rows(waiting, name, *BASED):
            if late and row["base_sha"] == sha:
                continue
            try:
                diff = self._repositories.diff(name, sha, row["fetched_sha"]) if row["fetched_sha"] else Diff()
                request = Request(Kind(row["kind"]), name, sha=row["fetched_sha"], base_sha=sha, diff=diff)
                self._approvals.revise(SYSTEM_ACTOR, row["id"], request, None)
            except (Refused, OSError) as error:  # decided meanwhile, or what is shown stays older and is refused
                log.warning("request %d is not compared with what %s runs now: %s", row["id"], name, error)

    def _succeed(self, tx: Tx, row: sqlite3.Row, sha: str) -> None:
        name = row["agent"]
        tx.execute("UPDATE deploys SET phase = 'deployed', ended_at = ? WHERE id = ?", now_ms(), row["id"])
        source = self._agents.containers.source
        tx.execute(
            "UPDATE agents SET deployed_sha = ?, source = ?, wanted = 1, failed = NULL WHERE name = ?",
            sha,
            source,
            name,
        )
        tx.audit(SYSTEM_ACTOR, "deployed", name, sha)
        for kind, key in (("deploy", row["id"]), ("agent", name), ("approval", row["approval"])):
            tx.changed(kind, key)
        asked_by = tx.value("SELECT requested_by FROM approvals WHERE id = ?", row["approval"])
        if asked_by is not None and asked_by != OPERATOR:
            text = f"{name} is deployed and running ({row['kind']}, {sha[:12]})."
            self._broker.tell(tx, asked_by, "deployed", text, agent=name, sha=sha, approval=row["approval"])
        if row["kind"] != "spawn":
            self._broker.tell(tx, name, "restarted", "You were restarted with a new config; your notes are in /state.")

    def _fail(self, row: sqlite3.Row, error: str) -> None:
        """However long it takes: while it is not stored, nobody may start, stop or destroy the agent."""

        def work(tx: Tx) -> None:
            last = "SELECT line FROM deploy_log WHERE deploy = ? ORDER BY n DESC LIMIT 20"
            lines = [line["line"] for line in tx.execute(last, row["id"])]
            text = error[:2000] + "\n" + "\n".join(reversed(lines))[-2000:]
            tx.execute(
                "UPDATE deploys SET phase = 'failed', error = ?, ended_at = ? WHERE id = ?", text, now_ms(), row["id"]
            )
            tx.audit(SYSTEM_ACTOR, "deploy_failed", row["agent"], error)
            tx.changed("deploy", row["id"])
            if row["approval"] is not None:
                self._approvals.fail(tx, row["approval"], text)
            if row["kind"] == "spawn":
                self._approvals.unadmit(tx, row["agent"])

        until_done(lambda: self._store.write(work), self._is_closed)

    def _fall_back(self, row: sqlite3.Row, *, switched: bool) -> None:
        """Run what ran before; of an agent that never ran, no container stays. A build that failed touched nothing."""
        name, containers = row["agent"], self._agents.containers
        try:
            if row["kind"] == "spawn":
                self._agents.take_down(name, wipe=self._agents.living(name)["deployed_sha"] is None)
                return
            before = self._last_deployed(name)
            if before is not None and switched:
                self._say(row, f"falling back to config {before['sha'][:12]}")
                self._make(row, before["sha"], before["pins"])
                containers.switch(name, functools.partial(self._say_lines, row))
            if self._agents.living(name)["wanted"]:
                containers.start(name)
        except (Refused, OSError) as error:
            log.error("falling back after deploy %d: %s", row["id"], error)
            self._say(row, f"falling back failed: {error}")

    def _begin(self, row: sqlite3.Row) -> bool:
        """False for a deploy that was undone in the last moment."""

        def work(tx: Tx) -> bool:
            if tx.one("SELECT 1 FROM deploys WHERE id = ?", row["id"]) is None:
                return False
            tx.execute("UPDATE deploys SET started_at = coalesce(started_at, ?) WHERE id = ?", now_ms(), row["id"])
            if row["approval"] is not None:
                self._approvals.begin(tx, row["approval"])
            return True

        going = self._store.write(work)
        if going:
            self._phase(row, Phase.BUILDING)
        return going

    def _phase(self, row: sqlite3.Row, phase: Phase) -> None:
        def work(tx: Tx) -> None:
            tx.execute("UPDATE deploys SET phase = ? WHERE id = ?", phase, row["id"])
            tx.changed("deploy", row["id"])
            tx.changed("approval", row["approval"])

        self._store.write(work)
        self._say(row, str(phase))

    def _say(self, row: sqlite3.Row, line: str) -> None:
        self._say_lines(row, [line])

    def _say_lines(self, row: sqlite3.Row, lines: Sequence[str]) -> None:
        def work(tx: Tx) -> None:
            first = tx.value("SELECT coalesce(max(n), 0) + 1 FROM deploy_log WHERE deploy = ?", row["id"])
            for number, line in enumerate(lines, start=first):
                tx.insert("deploy_log", deploy=row["id"], n=number, line=line)
            tx.changed("deploy_log", (row["id"], first, tuple(lines)))

        try:
            self._store.write(work)
        except Refused as error:  # what is lost is a line, not the deploy
            log.warning("a line of the log of deploy %d is lost: %s", row["id"], error)


# ──────────────────────────────────────────────────────────────────────────────
# Pre-checks
# ──────────────────────────────────────────────────────────────────────────────
# While a request waits, the host finds out whether it evaluates, whether it builds, and what that would
# change. One at a time, at low priority, in a folder that is thrown away; a verdict never decides. It is
# for what was shown: an edit, or another deploy beneath it, makes it begin again.

ANSI: Final = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours in the output of Nix
PRECHECKED: Final = (Kind.SPAWN, Kind.APPLY, Kind.INPUTS)
SIZES: Final = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
CLOSURE_LINE: Final = re.compile(
    r"(?P<name>[^:]+): (?:(?P<from>[^→]+) → (?P<to>.+?))?(?:(?:, )?(?P<size>[+-][0-9.]+) (?P<unit>[KMG]?i?B))?"
)
ERROR_PLACE: Final = re.compile(r"at \S*?(?:-source|»)/(?P<path>[^\s:]+):(?P<line>\d+)")
ERROR_WORDS: Final = re.compile(r"\s*error: (?P<words>\S.*)")
STORE_PATH: Final = re.compile(r"/\S*/[0-9a-z]{32}-")


def package_changes(lines: Iterable[str]) -> list[Json]:
    """What `nix store diff-closures` says, as [{name, from?, to?, bytes}]; ∅ is its word for "not there"."""
    found = []
    for line in lines:
        match = CLOSURE_LINE.fullmatch(ANSI.sub("", line).strip())
        if match:
            size, unit = float(match["size"] or 0), match["unit"] or "B"
            versions = {key: match[key] for key in ("from", "to") if match[key] and match[key] != "∅"}
            found.append({"name": match["name"], **versions, "bytes": int(size * SIZES.get(unit, 1))})
    return found


def what_nix_says(lines: Iterable[str], paths: Collection[str]) -> Json:
    """Its first error, and where in these files that is: {error?, at?: {path, line}}.

    Places stand before the error or, from older versions of Nix, behind it, and most are in nixpkgs: of those in
    these files the nearest counts.
    """
    plain = [ANSI.sub("", line) for line in lines]
    errors = [(number, match["words"]) for number, line in enumerate(plain) if (match := ERROR_WORDS.fullmatch(line))]
    if not errors:
        return {}
    begin, words = errors[0]
    found = [(number, match) for number, line in enumerate(plain) if (match := ERROR_PLACE.search(line))]
    places = [(abs(number - begin), match) for number, match in found if match["path"] in paths]
    said: Json = {"error": STORE_PATH.sub("", words)}
    if places:
        _, place = min(places, key=lambda place: place[0])
        said["at"] = {"path": place["path"], "line": int(place["line"])}
    return said


class Prechecks:
    def __init__(
        self, config: Config, store: Store, repositories: Repositories, deploys: Deploys, agents: Agents
    ) -> None:
        self._config, self._store, self._repositories = config, store, repositories
        self._deploys, self._agents = deploys, agents
        self._wake, self._stop = threading.Event(), threading.Event()
        self._closed = False
        self._now: tuple[int, str] | None = None  # the request that is being tried, and its digest
        self._thread = threading.Thread(target=self._work, name="precheck", daemon=True)

    @property
    def is_on(self) -> bool:
        return self._config.containers == "nixos" and self._config.precheck != "off"

    def begin(self) -> None:
        if self.is_on:
            self._store.write(self._forget_unfinished)
            self._thread.start()

    @staticmethod
    def _forget_unfinished(tx: Tx) -> None:
        unfinished = "SELECT id FROM approvals WHERE json_extract(precheck, '$.state') = 'running'"
        for row in tx.execute(unfinished).fetchall():
            tx.execute("UPDATE approvals SET precheck = NULL WHERE id = ?", row["id"])
            tx.changed("approval", row["id"])

    def close(self) -> None:
        self._closed = True
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def look(self) -> None:
        """Called each tick: is there something to try, and does anybody still want what is being tried?"""
        if not self.is_on:
            return
        if (now := self._now) is not None:
            shown = "SELECT id, status, fingerprint, fetched_sha, base_sha FROM approvals WHERE id = ?"
            row = self._store.row(shown, now[0])
            if row is None or row["status"] != Status.PENDING or digest_of(row) != now[1]:
                self._stop.set()
        elif self._next() is not None:
            self._wake.set()

    def _is_closed(self) -> bool:
        return self._closed

    def _next(self) -> sqlite3.Row | None:
        kinds = ", ".join(f"'{kind}'" for kind in PRECHECKED)
        return self._store.row(
            f"SELECT * FROM approvals WHERE status = 'pending' AND precheck IS NULL AND kind IN ({kinds})"  # noqa: S608
            " AND agent != '*' ORDER BY id"
        )

    def _work(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            self._try_all()

    def _try_all(self) -> None:
        while not self._closed and (row := until_done(self._next, self._is_closed)) is not None:
            self._now = row["id"], digest_of(row)
            self._stop.clear()
            try:
                if not self._closed:  # or it was set before we cleared it
                    self._try(row)
            except Exception as error:  # the thread must live on; the request says what happened
                log.exception("the pre-check of request %d", row["id"])
                verdict = {"state": "failed", "error": f"internal error: {error}"}
                until_done(functools.partial(self._note, row, verdict), self._is_closed)
            if self._stop.is_set():  # it may be wanted again: by an undo, say
                until_done(lambda: self._store.write(self._forget_unfinished), self._is_closed)
            self._now = None

    def _try(self, row: sqlite3.Row) -> None:
        begun = time.monotonic()
        self._store.write(lambda tx: tx.execute("DELETE FROM precheck_log WHERE approval = ?", row["id"]))
        self._note(row, {"state": "running"})
        with tempfile.TemporaryDirectory(dir=self._config.scratch_dir, prefix="precheck-") as scratch:
            verdict = self._verdict(row, Path(scratch), begun + self._config.precheck_timeout_s)
        if not self._stop.is_set():
            self._note(row, verdict | {"seconds": round(time.monotonic() - begun, 1)})

    def _verdict(self, row: sqlite3.Row, folder: Path, deadline: float) -> Json:
        verdict: Json = {}
        paths: list[str] = []
        try:
            trial = self._trial(row, folder, deadline)
            paths = self._repositories.paths(trial.repository, trial.sha)
            for verdict in self._stages(row, trial):
                self._note(row, {"state": "running"} | verdict)
        except (Refused, OSError) as error:
            if time.monotonic() >= deadline:
                limit_s = self._config.precheck_timeout_s
                return verdict | {"state": "timed_out", "error": f"it did not end within {limit_s:g} s"}
            return verdict | {"state": "failed", "error": str(error)} | what_nix_says(self.log(row["id"]), paths)
        return verdict | {"state": "ok"}

    def _stages(self, row: sqlite3.Row, trial: Trial) -> Iterator[Json]:
        """What is known after each."""
        containers, say = self._agents.containers, functools.partial(self._say, row)
        containers.evaluate(trial, say, self._stop)
        yield {"evaluates": True}
        if self._config.precheck == "build":
            changes = containers.try_build(trial, say, self._stop)
            yield {"evaluates": True, "builds": True, "packages": package_changes(changes)}

    def _trial(self, row: sqlite3.Row, folder: Path, deadline: float) -> Trial:
        """Where the config comes from: a proposal, a kept agent's repository, or only the text of a spawn."""
        name, sha, repository = row["agent"], row["fetched_sha"], self._config.repository(row["agent"])
        text = json.loads(row["detail"]).get("config")
        if row["kind"] == Kind.SPAWN and self._repositories.head(name) is None:
            repository = folder / "repository"
            sha = self._repositories.trial(repository, text or agent_template())
        elif row["kind"] == Kind.SPAWN and text is not None:
            sha = self._repositories.commit(name, Change(self._repositories.head(name), text, "A trial"))
        sha = sha or self._repositories.head(name)
        if sha is None:
            raise Refused("not_found", f"{name} has no config yet")
        if repository == self._config.repository(name):
            self._repositories.hold(name, sha)
        return Trial(folder, name, repository, sha, self._deploys.pins_of(name), row["kind"] == Kind.INPUTS, deadline)

    def log(self, approval: int) -> list[str]:
        rows = self._store.rows("SELECT line FROM precheck_log WHERE approval = ? ORDER BY n", approval)
        return [row["line"] for row in rows]

    def _note(self, row: sqlite3.Row, verdict: Json) -> None:
        def work(tx: Tx) -> None:
            now = tx.one("SELECT * FROM approvals WHERE id = ? AND status = 'pending'", row["id"])
            if now is not None and digest_of(now) == digest_of(row):
                tx.execute("UPDATE approvals SET precheck = ? WHERE id = ?", json.dumps(verdict), row["id"])
                tx.changed("approval", row["id"])

        self._store.write(work)

    def _say(self, row: sqlite3.Row, lines: Sequence[str]) -> None:
        def work(tx: Tx) -> None:
            last = tx.value("SELECT coalesce(max(n), 0) FROM precheck_log WHERE approval = ?", row["id"])
            for number, line in enumerate(lines, start=last + 1):
                tx.insert("precheck_log", approval=row["id"], n=number, line=line)

        self._store.write(work)


# ──────────────────────────────────────────────────────────────────────────────
# Views
# ──────────────────────────────────────────────────────────────────────────────
# Rows of the tables as the JSON that sockets, dashboard and live streams share. Only reading here.

AGENT_SQL: Final = """
    SELECT g.*,
        (SELECT count(*) FROM messages WHERE recipient = g.name AND state IN ('queued', 'leased')) AS unread,
        (SELECT count(*) FROM reminders WHERE agent = g.name) AS pending_reminders,
        (SELECT coalesce(sum(cost_usd), 0) FROM usage WHERE day = ? AND agent = g.name) AS cost_today
    FROM agents g
"""
# Without what is large, the diff above all: a list of requests shows none of it.
APPROVAL_SQL: Final = """
    SELECT a.id, a.agent, a.kind, a.commit_ref, a.fetched_sha, a.base_sha, a.first_base_sha, a.proposed_sha,
        a.requested_at, a.requested_by, a.status, a.resolved_at, a.resolved_by, a.note, a.description, a.error,
        a.fingerprint, a.precheck, d.id AS deploy, d.phase, d.not_before,
        CASE WHEN a.kind = 'schedule_prompt' THEN a.detail END AS schedule,
        a.proposed_sha NOT NULL OR json_type(a.detail, '$.proposed') NOT NULL AS edited,
        (SELECT max(b.id) FROM approvals b WHERE a.status = 'pending' AND b.status = 'pending' AND b.id > a.id
            AND b.agent = a.agent AND b.kind = a.kind AND a.kind = 'apply_commit') AS superseded_by
    FROM approvals a LEFT JOIN deploys d ON d.id =
        (SELECT e.id FROM deploys e WHERE e.approval = a.id
            ORDER BY e.phase = 'deployed', e.phase = 'failed', e.id LIMIT 1)
"""
WORRIES: Final = {  # system messages to the operator that stay on the screen until they are read
    "dead_letter": "dead_letter",
    "container_crash": "crashed",
    "silent": "silent",
    "paused": "paused",
    "budget_reached": "budget",
    "budget_near": "budget",
}


THREAD_SQL: Final = """
    WITH RECURSIVE thread (id) AS (
        SELECT ?
        UNION SELECT messages.in_reply_to FROM messages JOIN thread USING (id) WHERE messages.in_reply_to NOT NULL
        UNION SELECT messages.id FROM messages JOIN thread ON messages.in_reply_to = thread.id
        LIMIT 500)
    SELECT messages.* FROM messages JOIN thread USING (id) ORDER BY id
"""


def like_pattern(words: str) -> str:
    """For LIKE, whose escape is a backslash: the JSON that holds these words; all does if there are none."""
    as_stored = json.dumps(words)[1:-1]
    return "%" + re.sub(r"[\\%_]", r"\\\g<0>", as_stored) + "%"


class Views:
    def __init__(self, config: Config, store: Store, agents: Agents) -> None:
        self._config, self._store, self._agents = config, store, agents
        self._begun = rfc3339(now_ms())

    # -- agents

    def agents(self, name: str | None = None, *, kept: bool = False) -> list[Json]:
        where = " WHERE (? IS NULL OR g.name = ?) AND (g.kept = 0 OR ?) ORDER BY g.name != 'manager', g.name"
        rows = self._store.rows(AGENT_SQL + where, day_of(now_ms()), name, name, int(kept))
        return [self._agent(row) for row in rows]

    def _agent(self, row: sqlite3.Row) -> Json:
        running = row["name"] in self._agents.running
        state, since = self._state(row, running)
        return self._status_fields(row, running) | without_none(
            state=state,
            state_since=rfc3339(since),
            state_reason=row["failed"] or (row["pause_reason"] if state == "paused" else None) or row["state_reason"],
            until=when(row["state_until"]),
            description=row["description"] or None,
            port=self._config.port_of(row["name"]),
            unread=row["unread"],
            cost_today_usd=round(row["cost_today"], 6),
            daily_budget_usd=self._config.daily_budget_usd or None,
            context_tokens=row["context_tokens"],
            context_window=row["context_window"],
            login=None if row["login"] is None else json.loads(row["login"]),
            signed_in_until=when(row["signed_in_until"]),
            signed_in_renews=True if row["signed_in_renews"] else None,
            paused_by=row["paused_by"],
            attached=True if row["name"] in self._agents.attached else None,
            manager=row["name"] == MANAGER,
            kept=bool(row["kept"]),
            rehearsal=self._config.rehearsal or None,
        )

    def _status_fields(self, row: sqlite3.Row, running: bool) -> Json:
        """A row of `agent_status`, exactly: desktop clients read it."""
        return without_none(
            name=row["name"],
            running=running,
            failed=bool(row["failed"]) or (running and row["state"] == HarnessState.FAILED),
            needs_update=row["deployed_sha"] is not None and self._agents.containers.source not in ("", row["source"]),
            needs_login=row["state"] in (HarnessState.NEEDS_LOGIN, HarnessState.SIGNING_IN),
            deployed_sha=None if row["deployed_sha"] is None else row["deployed_sha"][:12],
            pending_reminders=row["pending_reminders"],
            paused=bool(row["paused"]),
            parent=row["parent"],
            active_model=row["active_model"],
            status_text=row["status_text"] if running else None,
            status_set_at=when(row["status_set_at"]) if running else None,
            url=self._agents.page_url(row["name"]),
        )

    def _state(self, row: sqlite3.Row, running: bool) -> tuple[str, int]:
        """One word for a person, by urgency; the flags beside it are independent of each other."""
        said, since = row["state"], row["state_since"]
        if row["failed"] or (running and said == HarnessState.FAILED):
            return "failed", since
        if said in (HarnessState.NEEDS_LOGIN, HarnessState.SIGNING_IN, HarnessState.RATE_LIMITED) and running:
            return said, since
        if row["paused"]:
            return "paused", since
        if not running:
            soon = row["name"] in self._agents.busy or row["name"] in self._agents.starting
            return ("starting" if soon else "stopped"), since
        at_keyboard = row["name"] in self._agents.attached
        return ("idle" if said == HarnessState.PAUSED and not at_keyboard else said), since

    def agent_statuses(self, name: str | None = None) -> list[Json]:
        rows = self._store.rows(
            AGENT_SQL + " WHERE (? IS NULL OR g.name = ?) AND g.kept = 0 ORDER BY g.name", day_of(now_ms()), name, name
        )
        return [self._status_fields(row, row["name"] in self._agents.running) for row in rows]

    def peers(self) -> list[Json]:
        """What agents may know of each other."""
        keys = ("name", "state", "status_text", "description")
        return [{key: row[key] for key in keys if key in row} for row in self.agents()]

    # -- approvals, questions, messages

    def approvals(self, status: str | None = None, *, most: int = 500) -> list[Json]:
        where = " WHERE ?1 IS NULL OR a.status = ?1 ORDER BY a.id DESC LIMIT ?2"
        return [self._approval(row) for row in self._store.rows(APPROVAL_SQL + where, status, most)]

    def open_approvals(self) -> list[Json]:
        where = " WHERE a.status = 'pending' OR (a.status = 'approved' AND d.phase IN (?, ?, ?)) ORDER BY a.id"
        return [self._approval(row) for row in self._store.rows(APPROVAL_SQL + where, *LIVE_PHASES)]

    def approval(self, approval: int, *, diff: bool = False) -> Json:
        """One request; with `diff` all that helps to decide."""
        with self._store.read() as connection:  # the diff is that of the digest
            found = connection.execute(APPROVAL_SQL + " WHERE a.id = ?", (approval,)).fetchone()
            row = found_request(approval, found)
            if not diff:
                return self._approval(row)
            large = "SELECT diff, touches, cause FROM approvals WHERE id = ?"
            more = connection.execute(large, (approval,)).fetchone()
        return self._approval(row) | {
            "diff": more["diff"],
            "files": diff_files(more["diff"]),
            **without_none(cut_bytes=cut_bytes(more["diff"])),
            "touches": json.loads(more["touches"]),
            "thread": self._thread(json.loads(more["cause"])),
            "earlier": self._earlier(row),
        }

    def _thread(self, cause: list[int]) -> list[Json]:
        """The messages that led to a request, and what those answered; oldest first."""
        found: dict[int, sqlite3.Row] = {}
        wanted = list(cause)
        while wanted and len(found) < 30:
            number = wanted.pop()
            row = None if number in found else self._store.row("SELECT * FROM messages WHERE id = ?", number)
            if row is not None:
                found[number] = row
                wanted += [row["in_reply_to"]] if row["in_reply_to"] else []
        return [self._message(found[number]) for number in sorted(found)]

    def _earlier(self, row: sqlite3.Row) -> list[Json]:
        """How requests for the same agent were decided before, newest first."""
        where = " WHERE a.agent = ? AND a.id < ? AND a.status != 'pending' ORDER BY a.id DESC LIMIT 10"
        return [self._approval(other) for other in self._store.rows(APPROVAL_SQL + where, row["agent"], row["id"])]

    def _approval(self, row: sqlite3.Row) -> Json:
        schedule = None if row["schedule"] is None else json.loads(row["schedule"])
        if schedule is not None:
            schedule["first"] = rfc3339(schedule.pop("first_at"))
        return without_none(
            id=row["id"],
            agent=row["agent"],
            kind=row["kind"],
            commit_ref=row["commit_ref"],
            fetched_sha=row["fetched_sha"],
            base_sha=row["base_sha"],
            first_base_sha=row["first_base_sha"] if row["first_base_sha"] != row["base_sha"] else None,
            requested_at=rfc3339(row["requested_at"]),
            requested_by=row["requested_by"],
            status=row["status"],
            resolved_at=when(row["resolved_at"]),
            resolved_by=row["resolved_by"],
            note=row["note"],
            description=row["description"],
            phase=row["phase"],
            error=row["error"],
            deploy_id=row["deploy"],
            schedule=schedule,
            digest=digest_of(row),
            superseded_by=row["superseded_by"],
            proposed_sha=row["proposed_sha"],
            edited=True if row["edited"] else None,
            precheck=self._precheck(row),
            undo_until=when(row["not_before"]) if row["phase"] == Phase.QUEUED else None,
        )

    def _precheck(self, row: sqlite3.Row) -> Json | None:
        if row["precheck"] is not None:
            return typing.cast(Json, json.loads(row["precheck"]))
        if self._config.containers != "nixos" or row["kind"] not in PRECHECKED or row["agent"] == EVERYONE:
            return None
        if self._config.precheck == "off":
            return {"state": "off"}
        return {"state": "waiting"} if row["status"] == Status.PENDING else None

    def questions(self, *, status: str | None = None, who: str | None = None, number: int | None = None) -> list[Json]:
        rows = self._store.rows(
            "SELECT * FROM questions WHERE (?1 IS NULL OR status = ?1) AND (?2 IS NULL OR asker = ?2 OR target = ?2)"
            " AND (?3 IS NULL OR id = ?3) ORDER BY id DESC LIMIT 500",
            status,
            who,
            number,
        )
        return [self._question(row) for row in rows]

    def _question(self, row: sqlite3.Row) -> Json:
        return without_none(
            id=row["id"],
            **{"from": row["asker"]},
            to=row["target"],
            question=row["question"],
            options=None if row["options"] is None else json.loads(row["options"]),
            multi=True if row["multi"] else None,
            asked_at=rfc3339(row["asked_at"]),
            expires_at=when(row["expires_at"]),
            status=row["status"],
            answer=row["answer"],
            answered_by=row["answered_by"],
            answered_at=when(row["answered_at"]),
        )

    def reminders(self, agent: str) -> list[Json]:
        rows = self._store.rows("SELECT * FROM reminders WHERE agent = ? ORDER BY due_at, id", agent)
        return [{"id": row["id"], "body": row["body"], "due_at": rfc3339(row["due_at"])} for row in rows]

    def schedules(self) -> list[Json]:
        return [
            without_none(
                id=row["id"],
                to=row["recipient"],
                body=row["body"],
                first=rfc3339(row["first_at"]),
                every_s=None if row["every_ms"] is None else row["every_ms"] / 1000,
                next=when(row["next_at"]),
                created_by=row["created_by"],
            )
            for row in self._store.rows("SELECT * FROM schedules ORDER BY id")
        ]

    def messages(self, *, before: int | None = None, most: int = 100, who: str | None = None) -> list[Json]:
        """The newest below an id, oldest first."""
        rows = self._store.rows(
            "SELECT * FROM messages WHERE (?1 IS NULL OR id < ?1) AND (?2 IS NULL OR sender = ?2 OR recipient = ?2)"
            " ORDER BY id DESC LIMIT ?3",
            before,
            who,
            most,
        )
        return [self._message(row) for row in reversed(rows)]

    def thread(self, message: int) -> list[Json]:
        """All that hangs together with a message by what answers what, oldest first."""
        rows = self._store.rows(THREAD_SQL, message)
        if not rows:
            raise Refused("not_found", f"there is no message {message}")
        return [self._message(row) for row in rows]

    @staticmethod
    def _message(row: sqlite3.Row) -> Json:
        return message_json(row) | without_none(state=row["state"], acked_at=when(row["resolved_at"]))

    def inbox(self, name: str, *, most: int, unread: bool) -> list[Json]:
        where = "recipient = ? AND state = 'queued'" if unread else "recipient = ?"
        rows = self._store.rows(f"SELECT * FROM messages WHERE {where} ORDER BY id DESC LIMIT ?", name, most)  # noqa: S608
        return [self._message(row) for row in reversed(rows)]

    # -- deploys, usage, audit, events

    def deploys(self, *, agent: str | None = None, before: int | None = None, most: int = 50) -> list[Json]:
        where = "(?1 IS NULL OR agent = ?1) AND (?2 IS NULL OR id < ?2)"
        rows = self._store.rows(f"SELECT * FROM deploys WHERE {where} ORDER BY id DESC LIMIT ?3", agent, before, most)  # noqa: S608
        return [self._deploy(row) for row in rows]

    def deploy(self, deploy: int) -> Json:
        row = self._store.row("SELECT * FROM deploys WHERE id = ?", deploy)
        if row is None:
            raise Refused("not_found", f"there is no deploy {deploy}")
        lines = self._store.rows("SELECT line FROM deploy_log WHERE deploy = ? ORDER BY n", deploy)
        return self._deploy(row) | {"log": [line["line"] for line in lines]}

    def _deploy(self, row: sqlite3.Row) -> Json:
        return without_none(
            id=row["id"],
            agent=row["agent"],
            sha=row["sha"],
            approval_id=row["approval"],
            kind=row["kind"],
            phase=row["phase"],
            started_at=rfc3339(row["started_at"] or row["requested_at"]),
            ended_at=when(row["ended_at"]),
            error=row["error"],
        )

    def usage(self, days: int) -> list[Json]:
        sums = (
            "input_tokens",
            "output_tokens",
            "cache_read_tokens",
            "cache_creation_tokens",
            "cost_usd",
            "duration_ms",
        )
        columns = ", ".join(f"sum({name}) AS {name}" for name in sums)
        rows = self._store.rows(
            f"SELECT agent, day, count(*) AS turns, {columns} FROM usage"  # noqa: S608 - our own names
            " WHERE day > ? GROUP BY day, agent ORDER BY day, agent",
            day_of(now_ms() - days * DAY_MS),
        )
        return [dict(row) for row in rows]

    def spent_today(self) -> float:
        row = self._store.row("SELECT coalesce(sum(cost_usd), 0) FROM usage WHERE day = ?", day_of(now_ms()))
        return round(float(row[0]), 6) if row else 0.0

    def audit(self, *, before: int | None = None, most: int = 100) -> list[Json]:
        rows = self._store.rows(
            "SELECT * FROM audit WHERE ?1 IS NULL OR id < ?1 ORDER BY id DESC LIMIT ?2", before, most
        )
        return [dict(row) | {"at": rfc3339(row["at"])} for row in rows]

    def events(
        self,
        *,
        agent: str | None = None,
        before: int | None = None,
        after: int | None = None,
        most: int = 300,
        words: str = "",
    ) -> list[Json]:
        """An agent's events below its own id `before`; or any agent's above our number `after`. Oldest first.

        With `words` only those whose data hold them, in either case. Fewer than `most` where they are large.
        """
        query = (
            "SELECT * FROM events WHERE (?1 IS NULL OR agent = ?1) AND (?2 IS NULL OR id < ?2)"  # noqa: S608
            " AND (?3 IS NULL OR n > ?3) AND data LIKE ?5 ESCAPE '\\'"
            f" ORDER BY n {'DESC' if after is None else 'ASC'} LIMIT ?4"
        )
        shown: list[Json] = []
        size = 0
        with self._store.read() as connection:
            for row in connection.execute(query, (agent, before, after, most, like_pattern(words))):
                size += len(row["data"])
                if shown and size > EVENTS_BYTES:
                    break
                shown.append(
                    {key: row[key] for key in ("id", "turn", "kind")}
                    | {"at": rfc3339(row["at"]), "data": json.loads(row["data"]), "agent": row["agent"], "n": row["n"]}
                )
        return shown if after is not None else shown[::-1]

    def oldest_event(self, agent: str) -> int | None:
        row = self._store.row("SELECT min(id) AS id FROM events WHERE agent = ?", agent)
        return row["id"] if row else None

    # -- does anything need the operator?

    def attention(self, agents: list[Json] | None = None) -> list[Json]:
        """What waits for the operator; `agents` are the rows of all of them, if they were read already."""
        agents = self.agents() if agents is None else agents
        found = [*self._waiting_requests(), *self._waiting_questions(), *self._troubled(agents)]
        found += [*self._ending_sign_ins(agents), *self._worries()]
        if not any(agent["manager"] for agent in agents):
            text = "No manager yet: it is the agent that you talk to, and it asks you before anything changes."
            found.insert(0, {"key": "start_manager", "kind": "start_manager", "text": text, "since": self._begun})
        return found

    def _waiting_requests(self) -> Iterator[Json]:
        told = "SELECT id, kind, agent, requested_by, requested_at FROM approvals WHERE status = ? ORDER BY id"
        for row in self._store.rows(told, Status.PENDING):
            text = f"{row['requested_by']} asks: {row['kind'].replace('_', ' ')} {row['agent']}"
            yield _worry("approval", row["id"], row["agent"], text, rfc3339(row["requested_at"]))

    def _waiting_questions(self) -> Iterator[Json]:
        for row in reversed(self.questions(status=QuestionStatus.OPEN, who=OPERATOR)):
            yield _worry("question", row["id"], row["from"], f"{row['from']} asks: {row['question']}", row["asked_at"])

    def _troubled(self, agents: list[Json]) -> Iterator[Json]:
        words = {"failed": "has failed", "needs_login": "is signed out", "rate_limited": "waits"}
        for row in agents:
            if row["state"] in words:
                reason = f": {row['state_reason']}" if "state_reason" in row else ""
                yield _worry(
                    row["state"],
                    row["name"],
                    row["name"],
                    f"{row['name']} {words[row['state']]}{reason}",
                    row["state_since"],
                )

    def _ending_sign_ins(self, agents: list[Json]) -> Iterator[Json]:
        soon = rfc3339(now_ms() + SIGN_IN_ENDS_MS)
        for row in agents:
            until = row.get("signed_in_until", soon)
            if until < soon and not row.get("signed_in_renews") and row["state"] != HarnessState.NEEDS_LOGIN:
                text = f"{row['name']}'s sign-in ends at {until}: sign in again before that"
                ends = datetime.datetime.fromisoformat(until).timestamp() * 1000
                yield _worry("needs_login", row["name"], row["name"], text, rfc3339(int(ends) - SIGN_IN_ENDS_MS)) | {
                    "key": f"sign_in_ends-{row['name']}"
                }

    def _worries(self) -> Iterator[Json]:
        for row in self.inbox(OPERATOR, most=500, unread=True):
            kind = WORRIES.get(row.get("kind", "")) if row["from"] == SYSTEM else None
            if kind:
                yield _worry(kind, row["id"], row["data"].get("agent"), row["body"], row["at"]) | without_none(
                    key=f"message-{row['id']}", message=row["data"].get("message")
                )

    # -- the whole

    def snapshot(self) -> Json:
        agents = self.agents()
        return {
            "version": VERSION,
            "now": rfc3339(now_ms()),
            "hive": {
                "name": socket.gethostname(),
                "containers": self._agents.containers.label,
                "rehearsal": self._config.rehearsal,
                "domain": self._config.page_host,
                "home": self._config.home_url,
            },
            "agents": agents,
            "approvals": self.open_approvals(),
            "questions": self.questions(status=QuestionStatus.OPEN)[::-1],
            "messages": self.messages(),
            "deploys": self.deploys(most=20),
            "usage": without_none(today_usd=self.spent_today(), budget_usd=self._config.hive_daily_budget_usd or None),
            "attention": self.attention(agents),
            "paused_all": bool(agents) and all(agent["paused"] for agent in agents),
        }

    def change(self, kind: str, key: Any) -> Json | None:
        """A live change, read afresh; None for what no stream shows."""
        if kind == "agent" and key not in (OPERATOR, EVERYONE):  # these have mail and requests, too, but no row
            rows = self.agents(key)
            return {"kind": "agent", "row": rows[0]} if rows else {"kind": "agent_gone", "name": key}
        if kind == "approval" and key is not None:
            return {"kind": kind, "row": self.approval(key)}
        if kind == "question":
            return {"kind": kind, "row": self.questions(number=key)[0]}
        if kind == "message":
            row = self._store.row("SELECT * FROM messages WHERE id = ?", key)
            return {"kind": kind, "row": self._message(row)} if row else None
        if kind == "deploy":
            deploy = self._store.row("SELECT * FROM deploys WHERE id = ?", key)
            return {"kind": kind, "row": self._deploy(deploy)} if deploy else {"kind": "deploy_gone", "id": key}
        if kind == "deploy_log":
            return {"kind": kind, "id": key[0], "first": key[1], "lines": list(key[2])}
        if kind == "usage":
            return {"kind": kind, "today_usd": self.spent_today()}
        return None


def _worry(kind: str, key: Any, agent: str | None, text: str, since: str) -> Json:
    number = key if isinstance(key, int) else None
    return without_none(key=f"{kind}-{key}", kind=kind, id=number, agent=agent, text=text[:500], since=since)


# ──────────────────────────────────────────────────────────────────────────────
# Live
# ──────────────────────────────────────────────────────────────────────────────
# One thread serves every live stream, of browsers and of desktop clients: it owns duplicates of their
# sockets, so that none holds a thread of the web server. Commits only leave marks here; rows are read
# once for all streams, at most every 20 ms, and not at all while nobody looks.

BACKLOG_BYTES: Final = 256 * 1024
REPLAY: Final = 2000
REPLAY_BYTES: Final = 8 * 1024 * 1024
PAUSE_S: Final = 0.02
SNAPSHOT_S: Final = 0.2  # it tells the time, and must not tell it wrong
FLOOD: Final = 500  # more marks than this at once: a snapshot is cheaper


@dataclasses.dataclass(eq=False)
class Stream:
    """A client of the hub. `after` is the last sequence number it has seen, `agent` whose events it wants."""

    sock: socket.socket
    dialect: Literal["sse", "status"]
    after: str = ""
    agent: str = ""
    is_admitted: Callable[[], bool] = lambda: True  # no longer, once the token that opened it is void
    outbox: bytearray = dataclasses.field(default_factory=bytearray)
    allowed: int = BACKLOG_BYTES


class Hub:
    def __init__(self, views: Views, heartbeat_s: float) -> None:
        self._views, self._heartbeat_s = views, heartbeat_s
        self._epoch = secrets.token_hex(4)
        self._seq = 0
        self._marks: dict[tuple[str, Any], None] = {}
        self._events: list[tuple[str, bytes]] = []  # (agent, the change as JSON)
        self._events_bytes = 0
        self._arrivals: list[Stream] = []
        self._lock = threading.Lock()
        self._ring: deque[tuple[int, str, bytes]] = deque()  # (seq, agent it is for, frame)
        self._ring_bytes = 0
        self._streams: set[Stream] = set()
        self._worries: list[Json] | None = None  # as they were told last; None: to nobody who still listens
        self._statuses: dict[str, Json] = {}
        self._last_snapshot: tuple[int, float, bytes] = (-1, 0.0, b"")  # its number, until when it serves, the frame
        self._closed = self._revoked = False
        self._gap = False  # something was not told: whoever listens gets a snapshot
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="live", daemon=True)
        self._thread.start()

    @property
    def seq(self) -> str:
        return f"{self._epoch}-{self._seq}"

    # -- called by other threads

    def mark(self, changes: list[tuple[str, Any]]) -> None:
        with self._lock:
            self._marks.update(dict.fromkeys(changes))
        self._wake()

    def events(self, agent: str, events: list[Json]) -> None:
        """A snapshot holds none of them: whoever gets one asks for them. So they may be dropped when they flood in."""
        change = encode_line({"kind": "events", "agent": agent, "events": events})
        with self._lock:
            self._events.append((agent, change))
            self._events_bytes += len(change)
            if self._events_bytes > REPLAY_BYTES:
                self._events, self._events_bytes, self._gap = [], 0, True
        self._wake()

    def join(self, stream: Stream) -> None:
        """Hand a connected socket over; the hub closes it."""
        stream.sock.setblocking(False)
        with self._lock:
            self._arrivals.append(stream)
        self._wake()

    def end_revoked(self) -> None:
        """Hang up on every browser whose token is void. One that is still on its way here is not let in."""
        self._revoked = True
        self._wake()

    def close(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            self._closed = True
            os.write(self._wake_w, b"!")
        self._thread.join(5)
        self._selector.close()
        os.close(self._wake_r)
        os.close(self._wake_w)

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if not self._closed:  # the last connections are still ending then
                os.write(self._wake_w, b"!")

    # -- the thread

    def _run(self) -> None:
        beat = time.monotonic() + self._heartbeat_s
        while not self._closed:
            for key, mask in self._selector.select(max(0.0, beat - time.monotonic())):
                self._ready(key, mask)
            if self._revoked:
                self._revoked = False
                for stream in [stream for stream in self._streams if not stream.is_admitted()]:
                    self._drop(stream)
            try:
                self._publish()
            except Exception:
                log.exception("live streams")
                self._gap = True
            self._welcome()
            if time.monotonic() >= beat:
                beat = time.monotonic() + self._heartbeat_s
                self._each(lambda stream: b": still here\n\n" if stream.dialect == "sse" else b"")
        for stream in list(self._streams):
            self._drop(stream)

    def _ready(self, key: selectors.SelectorKey, mask: int) -> None:
        if key.fd == self._wake_r:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_r, 4096)
            return
        stream = typing.cast(Stream, key.data)
        if mask & selectors.EVENT_READ:
            try:
                over = not stream.sock.recv(4096)  # nobody speaks on a stream: this is only how its end shows
            except BlockingIOError:
                over = False
            except OSError:
                over = True
            if over:
                self._drop(stream)
                return
        if mask & selectors.EVENT_WRITE:
            self._flush(stream)

    def _take(self) -> tuple[list[tuple[str, Any]], list[tuple[str, bytes]], bool]:
        with self._lock:
            marks, events, gap = list(self._marks), self._events, self._gap
            self._marks, self._events, self._events_bytes, self._gap = {}, [], 0, False
        return marks, events, gap

    def _publish(self) -> None:
        marks, events, gap = self._take()
        if not marks and not events and not gap:
            return
        if not self._streams:
            self._forget()
            self._worries = None
            return
        if gap or len(marks) > FLOOD:
            self._forget()
            frame = self._snapshot()
            self._each(lambda stream: frame if stream.dialect == "sse" else b"")
            self._status_rows()
        else:
            self._publish_rows(marks)
        for agent, change in events:
            self._frame(change, agent)
        time.sleep(PAUSE_S)  # what comes meanwhile is read together

    def _forget(self) -> None:
        """Whoever comes back with an older number gets a snapshot."""
        self._seq += 1
        self._ring.clear()
        self._ring_bytes = 0

    def _publish_rows(self, marks: list[tuple[str, Any]]) -> None:
        for kind, key in marks:
            if (change := self._views.change(kind, key)) is not None:
                self._frame(encode_line(change))
        if any(stream.dialect == "status" for stream in self._streams):
            self._status_rows()
        worries = self._views.attention()
        if worries != self._worries:
            self._worries = worries
            self._frame(encode_line({"kind": "attention", "rows": worries}))

    def _status_rows(self) -> list[Json]:
        """The rows as they are; who follows them is told of each that is new."""
        rows = self._views.agent_statuses()
        known, self._statuses = self._statuses, {row["name"]: row for row in rows}
        for row in rows:
            if known.get(row["name"]) != row:
                line = encode_line(ok_answer(agent_statuses=[row]))
                self._each(lambda stream, line=line: line if stream.dialect == "status" else b"")  # type: ignore[misc]
        return rows

    def _frame(self, change: bytes, agent: str = "") -> None:
        self._seq += 1
        frame = self._sse("change", change)
        self._ring.append((self._seq, agent, frame))
        self._ring_bytes += len(frame)
        while len(self._ring) > REPLAY or self._ring_bytes > REPLAY_BYTES:
            self._ring_bytes -= len(self._ring.popleft()[2])
        self._each(lambda stream: frame if stream.dialect == "sse" and agent in ("", stream.agent) else b"")

    def _sse(self, event: str, line: bytes) -> bytes:
        return f"id: {self.seq}\nevent: {event}\ndata: ".encode() + line + b"\n"

    def _snapshot(self) -> bytes:
        """Many who come at once get the same; what has changed since is on its way to them as changes."""
        moment = time.monotonic()
        seq, until, frame = self._last_snapshot
        if seq != self._seq or moment > until:
            frame = self._sse("snapshot", encode_line({"seq": self.seq} | self._views.snapshot()))
            self._last_snapshot = (self._seq, moment + SNAPSHOT_S, frame)
        return frame

    def _welcome(self) -> None:
        with self._lock:
            arrivals, self._arrivals = self._arrivals, []
        for stream in arrivals:
            if not stream.is_admitted():
                stream.sock.close()
                continue
            try:
                first = self._first(stream)
                self._selector.register(stream.sock, selectors.EVENT_READ, stream)
            except Exception:
                log.exception("a live stream can't begin")
                stream.sock.close()
                continue
            self._streams.add(stream)
            self._send(stream, first)

    def _first(self, stream: Stream) -> bytes:
        if stream.dialect == "sse":
            return self._missed(stream)
        return encode_line(ok_answer(agent_statuses=self._status_rows()))

    def _missed(self, stream: Stream) -> bytes:
        """What a stream has not seen since `after`; a snapshot where that can't be told any more."""
        epoch, _, number = stream.after.rpartition("-")
        oldest = self._ring[0][0] if self._ring else self._seq + 1
        if epoch == self._epoch and re.fullmatch("[0-9]{1,15}", number) and oldest - 1 <= int(number) <= self._seq:
            return b"".join(f for seq, agent, f in self._ring if seq > int(number) and agent in ("", stream.agent))
        return self._snapshot()

    def _each(self, frame_for: Callable[[Stream], bytes]) -> None:
        for stream in list(self._streams):
            self._send(stream, frame_for(stream))

    def _send(self, stream: Stream, frame: bytes) -> None:
        if not frame:
            return
        stream.outbox += frame if stream.dialect == "status" else b"%x\r\n%s\r\n" % (len(frame), frame)
        stream.allowed = max(stream.allowed, BACKLOG_BYTES + 2 * len(frame))  # one large frame makes no slow reader
        if len(stream.outbox) > stream.allowed:
            log.info("dropping a live stream whose reader is too slow")
            self._drop(stream)
        else:
            self._flush(stream)

    def _flush(self, stream: Stream) -> None:
        try:
            sent = stream.sock.send(stream.outbox) if stream.outbox else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(stream)
            return
        del stream.outbox[:sent]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if stream.outbox else 0)
        if self._selector.get_key(stream.sock).events != wanted:
            self._selector.modify(stream.sock, wanted, stream)

    def _drop(self, stream: Stream) -> None:
        if stream in self._streams:
            self._streams.discard(stream)
            self._selector.unregister(stream.sock)
            stream.sock.close()


# ──────────────────────────────────────────────────────────────────────────────
# Notifications
# ──────────────────────────────────────────────────────────────────────────────
# The same list that the page shows is watched for what is new, and told to one address: an ntfy topic, or
# any webhook. What waited already when the daemon started was told before.

NOTIFY_TRIES: Final = 5
NOTIFY_TIMEOUT_S: Final = 10.0


class Notifier:
    def __init__(self, config: Config, views: Views) -> None:
        self._config, self._views = config, views
        self._seen = {row["key"] for row in views.attention()}
        self._changed, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)
        if config.notify_url:
            self._thread.start()

    def mark(self) -> None:
        self._changed.set()

    def close(self) -> None:
        self._closed.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(NOTIFY_TIMEOUT_S + 1)

    def test(self) -> None:
        self._send("hyperhive: a test", "This is a test: notifications reach you.", self._config.home_url, 0)

    def _send(self, title: str, text: str, link: str, count: int) -> None:
        """One notification, once; `Refused` says why it could not be delivered."""
        import http.client  # only who notifies pays for it
        import urllib.request

        if not self._config.notify_url:
            raise Refused("unsupported", "no notify_url is set", "set notify_url to an ntfy topic or a webhook")
        if self._config.notify_format == "ntfy":
            data = text.encode()
            headers = {"Title": title, "Click": link, "Content-Type": "text/plain; charset=utf-8"}
        else:
            data = json.dumps({"title": title, "text": text, "link": link, "count": count}).encode()
            headers = {"Content-Type": "application/json"}
        # load_config lets only http addresses pass
        request = urllib.request.Request(self._config.notify_url, data, headers, method="POST")  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=NOTIFY_TIMEOUT_S):  # noqa: S310
                pass
        except (OSError, ValueError, http.client.HTTPException) as error:  # a URLError is an OSError
            words = str(error).strip() or type(error).__name__
            raise Refused("unreachable", f"the notification was not delivered: {words}") from None

    def link_to(self, row: Json) -> str:
        """The very thing in the dashboard. It holds no token: the browser has that."""
        if row["kind"] == "approval":
            return f"{self._config.home_url}#/approvals/{row['id']}"
        return f"{self._config.home_url}#/call/{row['key']}"

    def _run(self) -> None:
        while not self._closed.is_set():
            self._changed.wait()
            self._changed.clear()
            try:
                rows = self._views.attention()
                self._seen &= {row["key"] for row in rows}
                for row in rows:
                    if row["key"] not in self._seen:
                        self._seen.add(row["key"])
                        self._tell(row, len(rows))
            except Exception:
                log.exception("notifications")
            self._closed.wait(1.0)  # what comes together is told together

    def _tell(self, row: Json, count: int) -> None:
        title = f"hyperhive: {count} wait for you" if count != 1 else "hyperhive: one thing waits for you"
        for attempt in range(NOTIFY_TRIES):
            try:
                return self._send(title, row["text"], self.link_to(row), count)
            except Refused as error:
                log.warning("%s", error)
            if self._closed.wait(2.0**attempt):
                return None
        return None


# ──────────────────────────────────────────────────────────────────────────────
# Machine
# ──────────────────────────────────────────────────────────────────────────────
# What the hive runs on, what a user can get wrong there, and what the daemon said last.

PACKAGES: Final = ("bottle", "waitress")  # all that is needed beside the standard library
CLOCK_IS_NOT_KEPT: Final = 5  # TIME_ERROR of <sys/timex.h>


def check_packages() -> None:
    """Before anything is made."""
    missing = [module for module in PACKAGES if not importlib_has(module)]
    if missing:
        words = " and no ".join(missing)
        raise Refused("unsupported", f"this Python has no {words}", f"pip install {' '.join(missing)}")


def importlib_has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def version_of(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a copy that nobody installed
        return "unknown"


class LastWords(logging.Handler):
    """The end of the daemon's own log, for the page."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[Json] = deque(maxlen=500)

    def emit(self, record: logging.LogRecord) -> None:
        line = {"at": rfc3339(int(record.created * 1000)), "level": record.levelname.lower()}
        self._lines.append(line | {"text": self.format(record)[:4000]})

    def rows(self) -> list[Json]:
        return list(self._lines)


def describe_machine(config: Config) -> Json:
    disk, database = shutil.disk_usage(config.state_dir), config.state_dir.glob(f"{config.database.name}*")
    return {
        "versions": {
            "hyperhive": VERSION,
            "python": sys.version.split()[0],
            "sqlite": sqlite3.sqlite_version,
            **{package: version_of(package) for package in PACKAGES},
            "linux": os.uname().release,
        },
        "disk": {
            "folder": str(config.state_dir),
            "free_bytes": disk.free,
            "total_bytes": disk.total,
            "database_bytes": sum(path.stat().st_size for path in database),
        },
    }


class Verdict(NamedTuple):
    """What a check found, and the remedy where that is not well."""

    ok: bool
    found: str
    fix: str


def doctor(config: Config, ask_for_agents: Callable[[], Json]) -> Iterator[Json]:
    """What a user can get wrong. That a check can't be made is a finding, too.

    `ask_for_agents` answers as the verb `agents` of the host's socket does, or raises `Refused` if nobody is there.
    """
    for check, look in doctors_checks(config, ask_for_agents).items():
        try:
            verdict = look()
        except (OSError, Refused) as error:
            verdict = Verdict(False, f"can't be checked: {error}", getattr(error, "hint", "") or "try it as root")
        shown = verdict._asdict()
        if verdict.ok:
            del shown["fix"]
        yield {"check": check} | shown


def doctors_checks(config: Config, ask_for_agents: Callable[[], Json]) -> dict[str, Callable[[], Verdict]]:
    checks: dict[str, Callable[[], Verdict]] = {"Python": check_python}
    checks |= {module: functools.partial(check_module, module) for module in PACKAGES}
    checks["git"] = check_git
    agents, containers = None, config.containers
    try:
        answer = ask_for_agents()
        agents, containers = answer["agents"], answer["containers"]  # it knows better than a file that we may not have
        checks["daemon"] = functools.partial(Verdict, True, f"answers; {len(agents)} agents", "")
        checks["sign-in"] = lambda: check_sign_ins(agents)
        checks["agents' ports"] = lambda: check_agent_ports(config, agents)
    except Refused as error:
        checks["daemon"] = functools.partial(Verdict, False, error.message, error.hint or "see its log")
        checks["port"] = lambda: check_port(config)
    if containers == "process":
        rehearsal = any(row.get("rehearsal") for row in agents or [])
        checks["Claude Code"] = lambda: check_claude(config, rehearsal=rehearsal)
    else:
        checks |= {"nixos-container": check_nixos_container, "flakes": check_flakes}
        if agents is not None:
            checks["leftover containers"] = lambda: check_leftovers(config, agents)
    return checks | {
        "disk": lambda: check_disk(config),
        "clock": check_clock,
        "token file": lambda: check_token_file(config),
    }


def check_python() -> Verdict:
    return Verdict(sys.version_info >= (3, 11), sys.version.split()[0], "use Python 3.11 or newer")


def check_module(module: str) -> Verdict:
    found = importlib_has(module)
    return Verdict(found, "present" if found else "missing", f"pip install {module}")


def check_git() -> Verdict:
    path = git_program()
    return Verdict(bool(path), path or "missing", "install git, or set HYPERHIVE_GIT to its absolute path")


def check_sign_ins(agents: list[Json]) -> Verdict:
    names = [row["name"] for row in agents if row["needs_login"]]
    found = f"wanted by {', '.join(names)}" if names else "nobody waits for one"
    return Verdict(not names, found, "sign in from the dashboard or the agent's page")


def is_free(address: str, port: int) -> bool:
    listener = listen_if_free(address, port)
    if listener is not None:
        listener.close()
    return listener is not None


def check_port(config: Config) -> Verdict:
    """Of the dashboard, while no daemon answers."""
    free = is_free(config.listen_address, config.port)
    found = f"{config.port} is {'free' if free else f'taken{port_holder(config.port)}'}"
    return Verdict(free, found, "end that process, or choose another port with --port")


def check_agent_ports(config: Config, agents: list[Json]) -> Verdict:
    """Nobody else may listen where the page of an agent that is stopped will."""
    import urllib.parse

    ports = {row["name"]: urllib.parse.urlsplit(row["url"]).port or 0 for row in agents if not row["running"]}
    taken = [
        f"{port} of {name} is taken{port_holder(port)}"
        for name, port in ports.items()
        if not is_free(config.listen_address, port)
    ]
    return Verdict(not taken, ", ".join(taken) or "none is taken by others", "end that process: a name has one port")


def check_claude(config: Config, *, rehearsal: bool) -> Verdict:
    if rehearsal:
        return Verdict(True, "played by a rehearsal", "")
    path = shutil.which(words_of(config.claude)[0])
    return Verdict(bool(path), path or f"{config.claude} is missing", "install it, or set `claude`")


def check_nixos_container() -> Verdict:
    path = shutil.which("nixos-container")
    remedy = "set boot.enableContainers on NixOS; elsewhere say --containers process"
    return Verdict(bool(path), path or "missing", remedy)


def check_flakes() -> Verdict:
    if not shutil.which("nix"):
        return Verdict(False, "there is no nix", "install Nix")
    shown = run(["nix", "show-config"], env=dict(os.environ), timeout_s=20, accept=range(256))  # 1: not enabled
    words = shown.text.partition("experimental-features =")[2].partition("\n")[0].split()
    enabled = {"flakes", "nix-command"} <= set(words)
    remedy = 'set nix.settings.experimental-features = [ "nix-command" "flakes" ]'
    return Verdict(enabled, "enabled" if enabled else "not enabled", remedy)


def check_leftovers(config: Config, agents: list[Json]) -> Verdict:
    there = {path.stem.removeprefix("h-") for path in config.conf_dir.glob("h-*.conf")}
    left = [f"h-{name}" for name in sorted(there - {row["name"] for row in agents})]
    return Verdict(not left, ", ".join(left) or "none", "nixos-container destroy NAME, if nobody needs it")


def check_disk(config: Config) -> Verdict:
    folder = next(path for path in (config.state_dir, *config.state_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free / 1e9
    return Verdict(free > 1, f"{free:.1f} GB free at {folder}", "make room: nothing can be stored on a full disk")


def check_clock() -> Verdict:
    """Budgets, schedules and sign-ins go by it. The kernel knows whether somebody keeps it, see adjtimex(2)."""
    import ctypes

    kept = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(256)) != CLOCK_IS_NOT_KEPT
    found = f"{rfc3339(now_ms())}{'' if kept else ', but nothing keeps it right'}"
    return Verdict(kept, found, "run a time service (timedatectl set-ntp true)")


def check_token_file(config: Config) -> Verdict:
    try:
        mode = stat.S_IMODE(config.token_file.stat().st_mode)
    except FileNotFoundError:
        return Verdict(True, "none yet", "")
    except PermissionError:
        return Verdict(True, "kept from you by its folder", "")
    return Verdict(not mode & 0o077, f"mode {mode:o}", f"chmod 600 {config.token_file}")


# ──────────────────────────────────────────────────────────────────────────────
# Sockets
# ──────────────────────────────────────────────────────────────────────────────
# Unix sockets, one JSON object a line. Who speaks is decided by the socket, never by a field. Answers
# come in order; a request that follows a waiting `lease` on the same connection ends that wait first.
# A thread waiting in a Condition sees no EOF: so a connection's thread always reads, a waiting lease is
# an entry in the broker, and the broker's answer is sent from the writer thread without blocking it.
#
# Every answer: {"version": 1, "ok": true, …} or {"version": 1, "ok": false, "error", "code", "hint"?}.
#
# Agent sockets (unknown keys are refused):
#   hello            harness_version, last_event, model?, session?   → name, manager, paused, page, settings, …
#   lease            max?, wait_s?                        → messages, control
#   ack              ids                                  → acked
#   nack             ids, blameless?, reason?             → returned
#   send             to, body, in_reply_to?, client_id?, via?        → id, ids? (`*`)
#   inbox            max?                                 → messages (unread ones; a look, no lease)
#   ask              question, options?, multi?, to?, ttl_s?         → id
#   answer           id, text
#   remind           body, delay_s | at                   → id
#   cancel           question | reminder
#   open_threads                                          → asked, to_answer, reminders
#   set_status       text
#   report           events?, usage?, state?
#   list_agents                                           → agents
#   page_control     do (pause | resume | set_model), model?         what was asked for at the agent's own page
# and of the manager alone:
#   checkout_config  agent                                → bundle (base64), sha
#   request_spawn    name, description, config?           → id
#   request_apply_commit  agent, sha, description, bundle → id
#   request_update_inputs agent, description?             → id
#   request_schedule to, body, first, every_s?, description?         → id
#   cancel_request   id
#   list_approvals   status?                              → approvals
#   start_agent, stop_agent, restart_agent  name
#   get_logs         name, lines?                         → lines
#
# host.sock (unknown keys are ignored; desktop clients speak it):
#   list → agents · agent_status → agent_statuses · subscribe_agent_status → the same, then each changed row
#   agents {kept?} → agents, containers
#   urls → urls {domain, home} · pending → approvals, questions, attention · show {id} → approval
#   approve, deny {id, note?} · set_paused {name, paused} · pause_all {paused?} · start, stop {scope, graceful?}
#   restart, kill {name} · destroy {name, purge?} · rebuild, rollback {name} → deploy
#   spawn {name, description?} → deploy · request_spawn {name, description?} → id
#   send {to, body, in_reply_to?, client_id?} → id, ids? (`*`) · answer {id, text}
#   inbox {max?, unread?, mark_read?} → messages · logs {name, lines?, after?} → lines, cursor
#   events {name?, after?, max?} → events · deploys {name?, id?} → deploys
#   attach {name, now?} → argv, env: its loop holds still until this connection ends
#   schedules → schedules · usage {days?} → usage · backup {path} → path · token {rotate?} → token

SEND_TIMEOUT_S: Final = 30.0
DROP_HEAVY_SQL: Final = """
    DELETE FROM events WHERE agent = ?1 AND id <= (
        SELECT id FROM (SELECT id, sum(length(data)) OVER (ORDER BY id DESC) AS bytes FROM events WHERE agent = ?1)
        WHERE bytes > ?2 ORDER BY id DESC LIMIT 1)
"""


class LineReader:
    """Lines of at most `max_bytes` from a socket."""

    def __init__(self, sock: socket.socket, max_bytes: int) -> None:
        self._sock, self._max_bytes = sock, max_bytes
        self._buffer = bytearray()
        self._searched = 0

    def read(self) -> bytes | None:
        """The next line without its newline; None at the end. A half line at the end is dropped."""
        while (end := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            if len(self._buffer) > self._max_bytes:
                raise Refused("too_large", f"a line may have at most {self._max_bytes} bytes")
            try:
                chunk = self._sock.recv(256 * 1024)
            except OSError:
                return None
            if not chunk:
                return None
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        if len(line) > self._max_bytes:
            raise Refused("too_large", f"a line may have at most {self._max_bytes} bytes")
        return line


class Connection:
    """One client. `handle` turns a request into an answer, or into None when the answer comes later."""

    def __init__(self, sock: socket.socket, max_bytes: int) -> None:
        self.sock = sock
        self._reader = LineReader(sock, max_bytes)
        self._late: threading.Thread | None = None  # still sends an answer that was too large to go at once
        self._over = False  # nobody is served here any more, whatever was sent already

    def serve(self) -> None:
        try:
            while not self._over:
                answer = self._next_answer()
                if answer is not None:
                    self.send(answer)
        finally:
            self.closed()
            self.sock.close()

    def _next_answer(self) -> Json | None:
        """To what is read next. Where that was no request at all, or can't be answered in order, it is the last."""
        line = self._read()
        if line is None or self._over:
            self._over = True
            return None
        try:
            self._finish_answers()
            if isinstance(line, Refused):
                raise line
            request = parse_object(line)
        except Exception as error:
            self._over = True
            return self._failure(error)
        try:
            return self.handle(request)
        except Exception as error:
            return self._failure(error)

    def _read(self) -> bytes | Refused | None:
        try:
            return self._reader.read()
        except Refused as error:
            return error

    @staticmethod
    def _failure(error: Exception) -> Json:
        if isinstance(error, Refused):
            return failed_answer(error)
        log.error("answering a socket", exc_info=error)
        return failed_answer(Refused("internal", "something went wrong here; the daemon's log says what"))

    def _finish_answers(self) -> None:
        """Answers come in order: the one before this request is out, down to its last byte."""
        self.before_request()
        if self._late is not None:
            self._late.join()
            self._late = None

    def before_request(self) -> None: ...

    def handle(self, request: Json) -> Json | None:
        raise NotImplementedError

    def closed(self) -> None: ...

    def send(self, answer: Json) -> None:
        """From the thread that reads, which may wait for a slow client."""
        self._write(encode_line(answer))

    def send_soon(self, answer: Json) -> None:
        """From a thread that must not wait: what the kernel does not take at once goes to a thread of its own."""
        data, sent = encode_line(answer), 0
        try:
            sent = self.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except OSError:
            self.hang_up()
            return
        if sent < len(data):
            self._late = threading.Thread(target=self._write, args=(data[sent:],), name="late-answer", daemon=True)
            self._late.start()

    def _write(self, data: bytes) -> None:
        """Non-blocking writes and a poll: a socket time-out would also hit the thread that reads."""
        rest, poll = memoryview(data), select.poll()
        try:
            poll.register(self.sock, select.POLLOUT)
            while rest:
                if not poll.poll(SEND_TIMEOUT_S * 1000):
                    raise TimeoutError
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self.sock.send(rest, socket.MSG_DONTWAIT) :]
        except (OSError, ValueError):
            self.hang_up()

    def hang_up(self) -> None:
        """What was read already is not answered any more, nor carried out."""
        self._over = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class Doors:
    """Listening unix sockets: one thread accepts for all, each connection has its own."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.RLock()
        self._open: dict[Path, tuple[socket.socket, Callable[[socket.socket], Connection], int]] = {}
        self._connections: dict[Path, set[Connection]] = defaultdict(set)
        self._closed = False
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._accept, name="doors", daemon=True)
        self._thread.start()

    def open(self, path: Path, make: Callable[[socket.socket], Connection], *, most: int) -> None:
        """Listen at `path`, for our own user alone. Closes an older socket there and its connections first."""
        self.close_one(path)
        path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.fchmod(server.fileno(), 0o600)  # the file gets it from here, less the umask, which other threads share
        server.bind(str(path))
        path.chmod(0o600)
        server.listen(64)
        server.setblocking(False)
        with self._lock:
            self._open[path] = (server, make, most)
            self._selector.register(server, selectors.EVENT_READ, path)
        os.write(self._wake_w, b"!")

    def is_open(self, path: Path) -> bool:
        return path in self._open and path.exists()

    def in_use(self) -> list[Json]:
        with self._lock:
            return [{"path": str(path), "connections": len(self._connections[path])} for path in sorted(self._open)]

    def close_one(self, path: Path) -> None:
        with self._lock:
            if path not in self._open:
                return
            server = self._open.pop(path)[0]
            self._selector.unregister(server)
            server.close()
            connections = self._connections.pop(path, set())
            path.unlink(missing_ok=True)
        for connection in connections:
            connection.hang_up()

    def close(self) -> None:
        self._closed = True
        os.write(self._wake_w, b"!")
        self._thread.join(5)
        for path in list(self._open):
            self.close_one(path)
        self._selector.close()
        os.close(self._wake_r)
        os.close(self._wake_w)

    def _accept(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.fd == self._wake_r:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_r, 4096)
                else:
                    self._accept_one(key.data)

    def _accept_one(self, path: Path) -> None:
        with self._lock:
            if path not in self._open:
                return
            server, make, most = self._open[path]
            try:
                sock, _ = server.accept()
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                    log.warning("accepting at %s: %s", path, error)
                    time.sleep(0.05)  # out of descriptors, say: don't spin
                return
            try:
                self._admit(path, sock, make, most)
            except Exception:  # this thread accepts for all: it goes on
                log.exception("accepting at %s", path)
                sock.close()

    def _admit(self, path: Path, sock: socket.socket, make: Callable[[socket.socket], Connection], most: int) -> None:
        sock.setblocking(True)
        if len(self._connections[path]) >= most:
            with contextlib.suppress(OSError):
                refusal = Refused("too_many", f"{most} connections are open here already", "close one first")
                sock.send(encode_line(failed_answer(refusal)), socket.MSG_DONTWAIT)
            sock.close()
            return
        connection = make(sock)
        name = f"socket-{path.parent.name}"
        threading.Thread(target=self._serve, args=(path, connection), name=name, daemon=True).start()
        self._connections[path].add(connection)

    def _serve(self, path: Path, connection: Connection) -> None:
        try:
            connection.serve()
        finally:
            with self._lock:
                self._connections[path].discard(connection)


@dataclasses.dataclass(frozen=True)
class Services:
    """Everything that a door may need; the daemon puts it together."""

    config: Config
    store: Store
    broker: Broker
    budgets: Budgets
    repositories: Repositories
    approvals: Approvals
    agents: Agents
    deploys: Deploys
    prechecks: Prechecks
    attachments: Attachments
    views: Views
    hub: Hub
    notifier: Notifier
    doors: Doors
    token: OperatorToken
    last_words: LastWords


class OperatorToken:
    """The dashboard's secret, in a file that only its owner reads. A new one makes the old one void at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._value = path.read_text().strip()
        except FileNotFoundError:
            self._value = ""
        if not self._value:
            self.rotate()

    @property
    def value(self) -> str:
        return self._value

    def rotate(self) -> str:
        value = secrets.token_urlsafe(32)
        write_atomically(self._path, value + "\n")
        self._value = value
        return value

    def is_in(self, header: str) -> bool:
        """Whether this `Authorization` header gives the token."""
        scheme, _, given = header.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._value.encode())


class Requests:
    """Filing requests: what the manager's socket, the operator's socket and the dashboard have in common."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def spawn(self, actor: Actor, name: str, description: str | None, config: str | None) -> int:
        return self._s.approvals.request(actor, self._spawn_request(name, description, without_none(config=config)))

    def _spawn_request(self, name: str, description: str | None, detail: Json) -> Request:
        kept, config = self._s.repositories.head(name), detail.get("config")
        if kept is None:
            diff = first_diff(config or agent_template())
        elif config is None:
            diff = Diff()
        else:
            sha = self._s.repositories.commit(name, Change(kept, config, f"Proposed for {name}"))
            diff = self._s.repositories.diff(name, kept, sha)
        return Request(Kind.SPAWN, name, description, detail, base_sha=kept, diff=diff)

    def apply(self, actor: Actor, name: str, sha: str, description: str, bundle: str) -> int:
        deployed = self._s.agents.living(name)["deployed_sha"]
        try:
            raw = base64.b64decode(bundle, validate=True)
        except (binascii.Error, ValueError):
            raise Refused("bad_request", "the field 'bundle' is no base64") from None
        if sha == deployed:
            raise Refused("conflict", f"{sha[:12]} is what {name} runs already", "commit a change first")
        request, repositories = Request(Kind.APPLY, name, description, sha=sha, base_sha=deployed), self._s.repositories
        with repositories.proposing:
            same = self._s.approvals.same(actor, request)
            if same is not None:
                return same
            repositories.accept_bundle(name, sha, deployed, raw)
            try:
                shown = dataclasses.replace(request, diff=repositories.diff(name, deployed, sha))
                approval = self._s.approvals.request(actor, shown)
                repositories.keep_proposal(name, approval, sha)
            finally:
                repositories.release(name, sha)
        return approval

    def update_inputs(self, actor: Actor, target: str, description: str | None) -> int:
        deployed = None if target == EVERYONE else self._s.agents.living(target)["deployed_sha"]
        return self._s.approvals.request(actor, Request(Kind.INPUTS, target, description, base_sha=deployed))

    def files(self, approval: int) -> dict[str, str]:
        """The texts that a request would deploy, by path."""
        row = self._s.approvals.pending(approval)
        if row["fetched_sha"]:
            return self._s.repositories.files(row["agent"], row["fetched_sha"])
        if row["kind"] != Kind.SPAWN:
            raise Refused("unsupported", f"request {approval} has no config")
        config = json.loads(row["detail"]).get("config")
        if config is None and row["base_sha"]:
            return self._s.repositories.files(row["agent"], row["base_sha"])
        return {"agent.nix": config or agent_template()}

    def edit(self, actor: Actor, approval: int, path: str, text: str, digest: str) -> None:
        """The operator betters a proposal before deciding: a commit of theirs on top; both stay on record."""
        row, limit = self._s.approvals.pending(approval), self._s.config.limits.config_file_bytes
        if path not in self.files(approval):
            raise Refused("not_found", f"the config has no file {path[:80]!r}")
        if len(text.encode()) > limit:
            raise Refused("too_large", f"a file of a config may have at most {limit} bytes")
        name = row["agent"]
        if row["kind"] == Kind.SPAWN:
            if path != "agent.nix":
                raise Refused("unsupported", "of an agent that is spawned, agent.nix can be edited here")
            detail = json.loads(row["detail"])
            detail = {"proposed": detail.get("config", "")} | detail | {"config": text}
            request = self._spawn_request(name, row["description"], detail)
        else:
            message = f"Edited by the operator before deciding on request {approval}"
            sha = self._s.repositories.commit(name, Change(row["fetched_sha"], text, message, path, OPERATOR))
            diff = self._s.repositories.diff(name, row["base_sha"], sha)
            request = Request(Kind.APPLY, name, row["description"], sha=sha, base_sha=row["base_sha"], diff=diff)
            self._s.repositories.keep_proposal(name, approval, sha)
        self._s.approvals.revise(actor, approval, request, digest)

    def schedule_request(self, fields: Fields, description: str | None) -> Request:
        body = fields.text("body", max_bytes=self._s.config.limits.body_bytes)
        first = fields.moment("first")
        every = fields.number("every_s", least=60, most=366 * 86_400, default=None)
        to = fields.address("to")
        if to == OPERATOR:
            raise Refused("bad_request", "a schedule writes to an agent, or to all of them")
        detail = without_none(to=to, body=body, first_at=first, every_s=every)
        return Request(Kind.SCHEDULE, to, description, detail)


class AgentConnection(Connection):
    """An agent at its own socket."""

    def __init__(self, sock: socket.socket, name: str, services: Services) -> None:
        super().__init__(
            sock, services.config.limits.bundle_line_bytes if name == MANAGER else services.config.limits.line_bytes
        )
        self.name, self._s = name, services
        self._actor = Actor(name)
        self._waiting = self._greeted = False
        self._unweighed = WEIGH_BYTES  # of events: the first that are reported here make us look
        self._requests = Requests(services)

    def before_request(self) -> None:
        self._s.agents.hear(self.name)
        if self._waiting:
            self._s.broker.end_waits(self.name, self)

    def deliver(self, answer: Json) -> None:
        self.send_soon(ok_answer(**answer))
        self._waiting = False  # only now may the answer to another request follow

    def closed(self) -> None:
        self._s.broker.connection_closed(self.name, self)
        if self._greeted:
            self._leave()

    def handle(self, request: Json) -> Json | None:
        verb = request.get("cmd")
        handler = AGENT_VERBS.get(verb) if isinstance(verb, str) else None
        if handler is None and self.name == MANAGER and isinstance(verb, str):
            handler = MANAGER_VERBS.get(verb)
        if handler is None:
            if verb in MANAGER_VERBS:
                raise Refused("forbidden", f"only the manager may {verb}", "ask the manager")
            raise Refused("unknown_verb", f"unknown command {str(verb)[:60]!r}", f"known: {', '.join(AGENT_VERBS)}")
        result = handler(self, Fields(request))
        return None if result is None else ok_answer(**result)

    # -- connection and mail

    def hello(self, f: Fields) -> Json:
        f.text("harness_version", max_bytes=40)
        last, model = f.integer("last_event"), f.text("model", max_bytes=200, default=None)
        f.text("session", max_bytes=100, default=None)
        f.done()
        self._greeted = True
        known = self._s.store.write(lambda tx: self._greet(tx, last, model))
        config, row = self._s.config, self._s.agents.living(self.name)
        page = {"host": config.listen_address, "port": config.port_of(self.name), "hosts": list(config.known_hosts)}
        settings = without_none(
            warm_s=config.warm_s,
            stall_s=config.stall_s,
            wait_for_limit=config.wait_for_limit,
            daily_budget_usd=config.daily_budget_usd or None,
        )
        peers = [{key: peer[key] for key in ("name", "description") if key in peer} for peer in self._s.views.peers()]
        return without_none(
            name=self.name,
            manager=self.name == MANAGER,
            manager_name=MANAGER,
            paused=bool(row["paused"]),
            pause_reason=row["pause_reason"],
            model=row["model"] or config.model or None,
            page=page,
            last_event=known,
            settings=settings,
            agents=[peer for peer in peers if peer["name"] != self.name],
        )

    def _greet(self, tx: Tx, last_event: int, model: str | None) -> int:
        """Take note of a harness; the number of its last event that we hold."""
        tx.execute(
            "UPDATE agents SET state = 'idle', state_since = ?, state_reason = NULL, state_until = NULL,"
            " active_model = coalesce(?, active_model) WHERE name = ? AND state = 'offline'",
            now_ms(),
            model,
            self.name,
        )
        tx.changed("agent", self.name)
        tx.after_commit(self._met)
        known = int(tx.value("SELECT coalesce(max(id), 0) FROM events WHERE agent = ?", self.name))
        if known > last_event:  # its store is new: its numbers begin again
            tx.execute("DELETE FROM events WHERE agent = ?", self.name)
            known = 0
        return known

    def _met(self) -> None:
        """From now on it can be told what to do; what was meant for the one before is not for this one."""
        self._s.broker.drop_controls(self.name)
        self._s.agents.connected[self.name].add(self)

    def _leave(self) -> None:
        connected = self._s.agents.connected
        connected[self.name].discard(self)

        def work(tx: Tx) -> None:
            if connected[self.name]:
                return
            tx.execute("UPDATE agents SET state = 'offline', state_since = ? WHERE name = ?", now_ms(), self.name)
            tx.changed("agent", self.name)

        with contextlib.suppress(Refused):
            self._s.store.write(work)

    def lease(self, f: Fields) -> None:
        most, wait_s = f.integer("max", least=1, most=100, default=16), f.number("wait_s", most=300, default=30)
        f.done()
        self._waiting = True
        self._s.broker.lease(self.name, self, most, wait_s)

    def ack(self, f: Fields) -> Json:
        ids = f.items("ids", int, most=1000)
        f.done()
        return {"acked": self._s.broker.acknowledge(self.name, ids)}

    def nack(self, f: Fields) -> Json:
        ids, blameless = f.items("ids", int, most=1000), f.flag("blameless")
        f.text("reason", default=None, blank=True)
        f.done()
        return {"returned": self._s.broker.give_back(self.name, self, ids, blameless=blameless)}

    def send_message(self, f: Fields) -> Json:
        via = f.text("via", default=None)
        draft = draft_from(f, self.name, self._s.config.limits)
        f.done()
        if via is not None:
            if via != "page" or draft.to != self.name:
                raise Refused("bad_request", "via is for what was typed at this agent's own page: 'page', to itself")
            draft = dataclasses.replace(draft, via=via)
        return send_draft(self._s.broker, draft)

    def inbox(self, f: Fields) -> Json:
        most = f.integer("max", least=1, most=100, default=20)
        f.done()
        return {"messages": self._s.views.inbox(self.name, most=most, unread=True)}

    # -- questions and reminders

    def ask(self, f: Fields) -> Json:
        question, multi, to = f.text("question"), f.flag("multi"), f.address("to", default=OPERATOR)
        options = f.items("options", str, most=10, default=[])
        ttl_s = f.number("ttl_s", least=1, most=366 * 86_400, default=None)
        f.done()
        if any(not option.strip() or len(option) > 200 for option in options):
            raise Refused("bad_request", "an option is text of 1 to 200 characters")
        return {"id": self._s.broker.ask(self.name, to, question, options, multi=multi, ttl_s=ttl_s)}

    def answer(self, f: Fields) -> Json:
        number, text = f.integer("id"), f.text("text", max_bytes=self._s.config.limits.body_bytes)
        f.done()
        self._s.broker.answer(self._actor, number, text)
        return {}

    def remind(self, f: Fields) -> Json:
        body = f.text("body", max_bytes=self._s.config.limits.body_bytes)
        if f.has("delay_s") == f.has("at"):
            raise Refused("bad_request", "give exactly one of 'delay_s' and 'at'")
        due = f.moment("at") if f.has("at") else now_ms() + int(f.number("delay_s", most=366 * 86_400) * 1000)
        f.done()
        return {"id": self._s.broker.remind(self.name, body, due)}

    def cancel(self, f: Fields) -> Json:
        if f.has("question") == f.has("reminder"):
            raise Refused("bad_request", "give exactly one of 'question' and 'reminder'")
        if f.has("question"):
            number = f.integer("question")
            f.done()
            self._s.broker.cancel_question(self._actor, number)
        else:
            number = f.integer("reminder")
            f.done()
            self._s.broker.cancel_reminder(self.name, number)
        return {}

    def open_threads(self, f: Fields) -> Json:
        f.done()
        questions = self._s.views.questions(status=QuestionStatus.OPEN, who=self.name)
        return {
            "asked": [row for row in questions if row["from"] == self.name],
            "to_answer": [row for row in questions if row["to"] == self.name],
            "reminders": self._s.views.reminders(self.name),
        }

    def set_status(self, f: Fields) -> Json:
        text = f.text("text", max_bytes=800, blank=True)
        f.done()
        if len(text) > 200:
            raise Refused("too_large", f"the status has {len(text)} characters; at most 200 are allowed")

        def work(tx: Tx) -> None:
            at = now_ms() if text.strip() else None
            tx.execute(
                "UPDATE agents SET status_text = ?, status_set_at = ? WHERE name = ?",
                text.strip() or None,
                at,
                self.name,
            )
            tx.changed("agent", self.name)

        self._s.store.write(work)
        return {}

    def list_agents(self, f: Fields) -> Json:
        f.done()
        return {"agents": self._s.views.peers()}

    def page_control(self, f: Fields) -> Json:
        do = f.choice("do", Control)
        model = f.text("model", max_bytes=100) if do is Control.SET_MODEL else ""
        f.done()
        if do not in (Control.PAUSE, Control.RESUME, Control.SET_MODEL):
            raise Refused("bad_request", f"{do} is no matter of the host's", "known: pause, resume, set_model")
        if do is Control.SET_MODEL:
            self._s.store.write(lambda tx: choose_model(tx, self._s.broker, Actor(self.name, "page"), self.name, model))
        else:
            paused = do is Control.PAUSE
            self._s.store.write(lambda tx: self._s.broker.pause_from_page(tx, self.name, paused=paused))
        return {}

    # -- reports

    def report(self, f: Fields) -> Json:
        events = [_event_from(Fields(item)) for item in f.items("events", dict, most=1000, default=[])]
        usage = _usage_from(Fields(f.mapping("usage"))) if f.has("usage") else None
        state = _state_from(Fields(f.mapping("state"))) if f.has("state") else None
        f.done()
        self._s.store.write(lambda tx: self._take_report(tx, events, usage, state))
        if events:
            shown = [event | {"at": rfc3339(event["at"]), "agent": self.name} for event in events]
            self._s.hub.events(self.name, shown)
        return {}

    def _take_report(self, tx: Tx, events: list[Json], usage: Json | None, state: Json | None) -> None:
        # Shown and forgotten: text still being written (id 0), and older events that a page asked for.
        known = tx.value("SELECT coalesce(max(id), 0) FROM events WHERE agent = ?", self.name)
        stored = [event for event in events if event["id"] > known]
        for event in stored:
            data = json.dumps(event["data"])
            self._unweighed += len(data)
            tx.execute(
                "INSERT OR IGNORE INTO events (agent, id, at, turn, kind, data) VALUES (?, ?, ?, ?, ?, ?)",
                self.name,
                event["id"],
                event["at"],
                event["turn"],
                event["kind"],
                data,
            )
        if any(event["kind"] == "turn_end" and event["data"].get("outcome") == "done" for event in stored):
            self._end_trouble(tx)
        if stored:
            self._drop_events(tx)
        if usage is not None:
            self._take_usage(tx, usage)
        if state is not None:
            self._take_state(tx, state)

    def _drop_events(self, tx: Tx) -> None:
        """The oldest, when there are too many; and when they are too large, which is not looked up each time."""
        newest = tx.value("SELECT max(id) FROM events WHERE agent = ?", self.name)
        tx.execute("DELETE FROM events WHERE agent = ? AND id <= ?", self.name, newest - EVENTS_KEPT)
        if self._unweighed > WEIGH_BYTES:
            self._unweighed = 0
            tx.execute(DROP_HEAVY_SQL, self.name, EVENTS_KEPT_BYTES)

    def _take_usage(self, tx: Tx, usage: Json) -> None:
        context = {key: usage.pop(key) for key in ("context_tokens", "context_window")}
        known = tx.one("SELECT 1 FROM usage WHERE agent = ? AND turn = ?", self.name, usage["turn"])
        if known is None:
            tx.insert("usage", agent=self.name, at=now_ms(), day=day_of(now_ms()), **usage)
        tx.execute(
            "UPDATE agents SET context_tokens = coalesce(?, context_tokens),"
            " context_window = coalesce(?, context_window) WHERE name = ?",
            context["context_tokens"],
            context["context_window"],
            self.name,
        )
        tx.changed("usage", None)
        tx.changed("agent", self.name)
        if known is None:
            self._s.budgets.charge(tx, self.name, usage["cost_usd"])

    def _take_state(self, tx: Tx, state: Json) -> None:
        if state.pop("attached") and (holding := self._s.agents.attached.get(self.name)):
            tx.after_commit(holding.set)
        row = tx.one("SELECT state FROM agents WHERE name = ?", self.name)
        before = row["state"] if row else None
        since = {} if state["state"] == before else {"state_since": now_ms()}
        values = state | since
        columns = ", ".join(f"{name} = ?" for name in values)
        tx.execute(f"UPDATE agents SET {columns} WHERE name = ?", *values.values(), self.name)  # noqa: S608
        tx.changed("agent", self.name)
        if since:
            tx.audit(self._actor, f"state_{state['state']}", self.name, state["state_reason"] or "ok")
            self._spread(tx, before, state)

    def _spread(self, tx: Tx, before: str | None, state: Json) -> None:
        """The manager is told of what stops an agent: once, however often it tries in vain, till a turn ends well."""
        said, reason = state["state"], f": {state['state_reason']}" if state["state_reason"] else "."
        if said == HarnessState.IDLE and before in (HarnessState.NEEDS_LOGIN, HarnessState.SIGNING_IN):
            self._end_trouble(tx, only=HarnessState.NEEDS_LOGIN)
        words = {HarnessState.NEEDS_LOGIN: "is signed out", HarnessState.RATE_LIMITED: "waits"}.get(said)
        known = tx.value("SELECT trouble FROM agents WHERE name = ?", self.name).split()
        if words and said not in known:
            tx.execute("UPDATE agents SET trouble = ? WHERE name = ?", " ".join([*known, said]), self.name)
            until = when(state["state_until"]) if said == HarnessState.RATE_LIMITED else None
            self._tell_manager(tx, said, f"{self.name} {words}{reason}", **without_none(until=until))

    def _end_trouble(self, tx: Tx, *, only: str | None = None) -> None:
        known = tx.value("SELECT trouble FROM agents WHERE name = ?", self.name).split()
        if not known:
            return
        if HarnessState.NEEDS_LOGIN in known:
            self._tell_manager(tx, "logged_in", f"{self.name} is signed in again.")
        left = " ".join(kind for kind in known if only and kind != only)
        tx.execute("UPDATE agents SET trouble = ? WHERE name = ?", left, self.name)

    def _tell_manager(self, tx: Tx, kind: str, text: str, **data: Any) -> None:
        if self.name != MANAGER:
            self._s.broker.tell_manager(tx, kind, text, agent=self.name, **data)

    # -- the manager's verbs

    def checkout_config(self, f: Fields) -> Json:
        name = f.name("agent")
        f.done()
        self._s.agents.living(name)
        bundle, sha = self._s.repositories.bundle(name)
        return {"bundle": base64.b64encode(bundle).decode(), "sha": sha}

    def request_spawn(self, f: Fields) -> Json:
        name, description = f.name(), f.text("description")
        config = f.text("config", max_bytes=self._s.config.limits.config_file_bytes, default=None)
        f.done()
        return {"id": self._requests.spawn(self._actor, name, description, config)}

    def request_apply_commit(self, f: Fields) -> Json:
        name, sha, description = f.name("agent"), check_sha(f.text("sha")), f.text("description")
        bundle = f.text("bundle", max_bytes=self._s.config.limits.bundle_line_bytes)
        f.done()
        return {"id": self._requests.apply(self._actor, name, sha, description, bundle)}

    def request_update_inputs(self, f: Fields) -> Json:
        target, description = f.text("agent"), f.text("description", default=None)
        f.done()
        target = EVERYONE if target == "all" else check_name(target)
        return {"id": self._requests.update_inputs(self._actor, target, description)}

    def request_schedule(self, f: Fields) -> Json:
        request = self._requests.schedule_request(f, f.text("description", default=None))
        f.done()
        return {"id": self._s.approvals.request(self._actor, request)}

    def cancel_request(self, f: Fields) -> Json:
        approval = f.integer("id")
        f.done()
        self._s.approvals.cancel(self._actor, approval)
        return {}

    def list_approvals(self, f: Fields) -> Json:
        status = f.choice("status", Status, default=None)
        f.done()
        return {"approvals": self._s.views.approvals(status, most=100)}

    def _other(self, f: Fields) -> str:
        name = f.name()
        f.done()
        if name == self.name:
            raise Refused("forbidden", "the manager can't start, stop or restart itself", "ask the operator")
        return name

    def start_agent(self, f: Fields) -> Json:
        self._s.agents.start(self._actor, self._other(f))
        return {}

    def stop_agent(self, f: Fields) -> Json:
        self._s.agents.stop(self._actor, self._other(f))
        return {}

    def restart_agent(self, f: Fields) -> Json:
        self._s.agents.restart(self._actor, self._other(f))
        return {}

    def get_logs(self, f: Fields) -> Json:
        name, lines = f.name(), f.integer("lines", least=1, most=LOG_LINES_MAX, default=100)
        f.done()
        self._s.agents.living(name)
        return {"lines": self._s.agents.containers.log(name, lines, None)[0]}


def choose_model(tx: Tx, broker: Broker, actor: Actor, name: str, model: str) -> None:
    """It lasts: a harness hears it now if it is there, and else when it says hello."""
    tx.execute("UPDATE agents SET model = ? WHERE name = ?", model, name)
    tx.audit(actor, str(Control.SET_MODEL), name, model)
    broker.control(tx, name, Control.SET_MODEL, model=model)


def draft_from(f: Fields, sender: str, limits: Limits) -> Draft:
    """A message as every door takes it."""
    body = f.text("body", max_bytes=limits.body_bytes)
    in_reply_to, client_id = f.integer("in_reply_to", default=None), f.text("client_id", max_bytes=64, default=None)
    return Draft(sender, f.address(), body, in_reply_to, client_id)


def send_draft(broker: Broker, draft: Draft) -> Json:
    """The answer as every door gives it: {id}, and the `ids` of all copies of a message to everyone."""
    ids = broker.send(draft)
    return {"id": ids[0]} | ({"ids": ids} if draft.to == EVERYONE else {})


def _event_from(f: Fields) -> Json:
    event = {
        "id": f.integer("id"),
        "at": f.moment("at"),
        "turn": f.integer("turn"),
        "kind": f.text("kind", max_bytes=40),
        "data": f.mapping("data"),
    }
    f.done()
    if len(encode_line(f.mapping("data"))) > EVENT_BYTES:
        raise Refused("too_large", f"an event may have at most {EVENT_BYTES} bytes of data")
    return event


def _usage_from(f: Fields) -> Json:
    counts = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_creation_tokens", "duration_ms")
    usage = {name: f.integer(name, most=10**10) for name in counts} | {  # sums must fit into sqlite's integers
        "turn": f.text("turn", max_bytes=64),
        "model": f.text("model", max_bytes=200, default=None),
        "cost_usd": f.number("cost_usd", most=1e6),
        "context_tokens": f.integer("context_tokens", default=None),
        "context_window": f.integer("context_window", default=None),
    }
    f.done()
    return usage


def _state_from(f: Fields) -> Json:
    """Columns of the agents table; what a report leaves out of model and context stays as it was."""
    columns: Json = {
        "state": str(f.choice("state", HarnessState)),
        "state_reason": f.text("reason", max_bytes=2000, default=None, blank=True),
        "state_until": f.moment("until", default=None),
        "login": json.dumps(_login_from(Fields(f.mapping("login")))) if f.has("login") else None,
        "signed_in_until": f.moment("signed_in_until", default=None),
        "signed_in_renews": int(f.flag("signed_in_renews")),
        "attached": f.flag("attached"),  # no column: whoever waits for it is told
    }
    f.text("session", max_bytes=100, default=None)
    optional = {
        "active_model": f.text("model", max_bytes=200, default=None),
        "context_tokens": f.integer("context_tokens", default=None),
        "context_window": f.integer("context_window", default=None),
    }
    f.done()
    return columns | without_none(**optional)


def _login_from(f: Fields) -> Json:
    login = without_none(
        phase=f.text("phase", max_bytes=40),
        url=f.text("url", default=None),
        error=f.text("error", default=None, blank=True),
    )
    f.done()
    return login


AGENT_VERBS: Final[dict[str, Callable[[AgentConnection, Fields], Json | None]]] = {
    "hello": AgentConnection.hello,
    "lease": AgentConnection.lease,
    "ack": AgentConnection.ack,
    "nack": AgentConnection.nack,
    "send": AgentConnection.send_message,
    "inbox": AgentConnection.inbox,
    "ask": AgentConnection.ask,
    "answer": AgentConnection.answer,
    "remind": AgentConnection.remind,
    "cancel": AgentConnection.cancel,
    "open_threads": AgentConnection.open_threads,
    "set_status": AgentConnection.set_status,
    "report": AgentConnection.report,
    "list_agents": AgentConnection.list_agents,
    "page_control": AgentConnection.page_control,
}

MANAGER_VERBS: Final[dict[str, Callable[[AgentConnection, Fields], Json | None]]] = {
    "checkout_config": AgentConnection.checkout_config,
    "request_spawn": AgentConnection.request_spawn,
    "request_apply_commit": AgentConnection.request_apply_commit,
    "request_update_inputs": AgentConnection.request_update_inputs,
    "request_schedule": AgentConnection.request_schedule,
    "cancel_request": AgentConnection.cancel_request,
    "list_approvals": AgentConnection.list_approvals,
    "start_agent": AgentConnection.start_agent,
    "stop_agent": AgentConnection.stop_agent,
    "restart_agent": AgentConnection.restart_agent,
    "get_logs": AgentConnection.get_logs,
}


class HostConnection(Connection):
    """The operator at `host.sock`: the command line, and desktop clients."""

    def __init__(self, sock: socket.socket, services: Services) -> None:
        super().__init__(sock, services.config.limits.line_bytes)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self._actor = Actor(OPERATOR, f"host.sock, uid {struct.unpack('3i', credentials)[1]}")
        self._s = services
        self._requests = Requests(services)
        self._at_keyboard_of = ""

    def closed(self) -> None:
        if self._at_keyboard_of:
            with contextlib.suppress(Refused):  # the daemon ends, and with it the harness's connection
                self._s.agents.detach(self._actor, self._at_keyboard_of)

    def handle(self, request: Json) -> Json | None:
        verb = request.get("cmd")
        handler = HOST_VERBS.get(verb) if isinstance(verb, str) else None
        if handler is None:
            raise Refused("unknown_verb", f"unknown command {str(verb)[:60]!r}", f"known: {', '.join(HOST_VERBS)}")
        result = handler(self, Fields(request, strict=False))
        return None if result is None else ok_answer(**result)

    # -- looking

    def list_names(self, f: Fields) -> Json:
        return {"agents": [row["name"] for row in self._s.views.agent_statuses()]}

    def agent_status(self, f: Fields) -> Json:
        return {"agent_statuses": self._s.views.agent_statuses()}

    def subscribe(self, f: Fields) -> None:
        """The hub answers with the rows as they are, then sends each that changes and watches for the client's end."""
        self._s.hub.join(Stream(self.sock.dup(), "status"))
        self._over = True

    def agents(self, f: Fields) -> Json:
        rows = self._s.views.agents(kept=f.flag("kept"))
        return {"agents": rows, "containers": self._s.agents.containers.label}

    def urls(self, f: Fields) -> Json:
        return {"urls": {"domain": self._s.config.page_host, "home": self._s.config.home_url}}

    def pending(self, f: Fields) -> Json:
        """What the operator decides and answers, and all that the dashboard counts: those, and every trouble."""
        self._s.approvals.fail_orphans()
        views = self._s.views
        questions = views.questions(status=QuestionStatus.OPEN, who=OPERATOR)[::-1]
        waiting = {"approvals": views.approvals(Status.PENDING)[::-1], "questions": questions}
        return waiting | {"attention": views.attention()}

    def show(self, f: Fields) -> Json:
        return {"approval": self._s.views.approval(f.integer("id"), diff=True)}

    def inbox(self, f: Fields) -> Json:
        most, unread = f.integer("max", least=1, most=1000, default=50), f.flag("unread")
        messages = self._s.views.inbox(OPERATOR, most=most, unread=unread)
        if f.flag("mark_read"):
            self._s.broker.mark_read([message["id"] for message in messages if message["state"] == MessageState.QUEUED])
        return {"messages": messages}

    def logs(self, f: Fields) -> Json:
        name, lines = f.name(), f.integer("lines", least=1, most=LOG_LINES_MAX, default=100)
        after = f.text("after", max_bytes=200, default=None)
        self._s.agents.known(name)
        text, cursor = self._s.agents.containers.log(name, lines, after)
        return {"lines": text, "cursor": cursor}

    def events(self, f: Fields) -> Json:
        agent = f.name() if f.has("name") else None
        if agent is not None:
            self._s.agents.known(agent)
        after, most = f.integer("after", default=None), f.integer("max", least=1, most=2000, default=100)
        return {"events": self._s.views.events(agent=agent, after=after, most=most)}

    def list_deploys(self, f: Fields) -> Json:
        if f.has("id"):
            return {"deploys": [self._s.views.deploy(f.integer("id"))]}
        return {"deploys": self._s.views.deploys(agent=f.name() if f.has("name") else None)}

    def schedules(self, f: Fields) -> Json:
        return {"schedules": self._s.views.schedules()}

    def usage(self, f: Fields) -> Json:
        return {"usage": self._s.views.usage(f.integer("days", least=1, most=366, default=7))}

    # -- deciding

    def approve(self, f: Fields) -> Json:
        approval, note = f.integer("id"), f.text("note", default=None, blank=True)
        self._s.approvals.fail_orphans()
        self._s.approvals.approve(self._actor, approval, Decision(note or None))
        return {}

    def deny(self, f: Fields) -> Json:
        self._s.approvals.deny(self._actor, f.integer("id"), f.text("note", default=None, blank=True) or None)
        return {}

    def answer(self, f: Fields) -> Json:
        self._s.broker.answer(self._actor, f.integer("id"), f.text("text", max_bytes=self._s.config.limits.body_bytes))
        return {}

    def send_message(self, f: Fields) -> Json:
        return send_draft(self._s.broker, draft_from(f, OPERATOR, self._s.config.limits))

    # -- agents

    def _scope(self, f: Fields) -> list[str]:
        """Whom a command is for: an empty scope is refused, never taken for everybody."""
        scope = Fields(f.mapping("scope"), strict=False)
        names = [check_name(name) for name in scope.items("agent_names", str, most=1000)]
        if not names:
            raise Refused("bad_request", "the scope names no agent", "list at least one name in agent_names")
        for name in names:
            self._s.agents.living(name)
        return names

    def start(self, f: Fields) -> Json:
        for name in self._scope(f):
            self._s.agents.start(self._actor, name)
        return {}

    def stop(self, f: Fields) -> Json:
        graceful = f.flag("graceful", default=True)
        for name in self._scope(f):
            self._s.agents.stop(self._actor, name, graceful=graceful)
        return {}

    def restart(self, f: Fields) -> Json:
        self._s.agents.restart(self._actor, f.name())
        return {}

    def kill(self, f: Fields) -> Json:
        self._s.agents.stop(self._actor, f.name(), graceful=False)
        return {}

    def attach(self, f: Fields) -> Json:
        """Answered when the agent's loop holds still, which it does until this connection ends, however it ends."""
        name, now = f.name(), f.flag("now")
        if self._at_keyboard_of:
            raise Refused("conflict", f"this connection is attached to {self._at_keyboard_of} already")
        still = self._s.agents.attach(self._actor, name)
        self._at_keyboard_of = name
        if now:
            self._s.store.write(lambda tx: self._s.broker.control(tx, name, Control.INTERRUPT))
        while not still.wait(0.1):
            if self._has_hung_up() or not self._s.agents.connected[name]:
                raise Refused("conflict", f"{name} went away before its turn ended", "try again when it is back")
        argv, env = self._s.agents.containers.command(name, "attach")
        return {"argv": argv, "env": env}

    def _has_hung_up(self) -> bool:
        try:
            return not self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def set_paused(self, f: Fields) -> Json:
        name, paused = f.name(), f.flag("paused", default=MISSING)
        self._s.store.write(lambda tx: self._s.broker.pause(tx, self._actor, name, paused=paused))
        return {}

    def pause_all(self, f: Fields) -> Json:
        pause_everyone(self._s, self._actor, paused=f.flag("paused", default=True))
        return {}

    def spawn(self, f: Fields) -> Json:
        return {"deploy": self._s.deploys.spawn(self._actor, f.name(), f.text("description", default=""))}

    def request_spawn(self, f: Fields) -> Json:
        return {"id": self._requests.spawn(self._actor, f.name(), f.text("description", default=None), None)}

    def rebuild(self, f: Fields) -> Json:
        return {"deploy": self._s.deploys.rebuild(self._actor, f.name())}

    def rollback(self, f: Fields) -> Json:
        return {"deploy": self._s.deploys.rollback(self._actor, f.name())}

    def destroy(self, f: Fields) -> Json:
        self._s.agents.destroy(self._actor, f.name(), purge=f.flag("purge"))
        return {}

    # -- the hive

    def backup(self, f: Fields) -> Json:
        path = Path(f.text("path"))
        if not path.is_absolute() or "\0" in str(path):
            raise Refused("bad_request", "the path of a backup must be absolute, and without a NUL")
        self._s.store.backup(path)
        write_atomically(self._s.config.database.with_name("last-backup"), f"{path}\n")
        self._s.store.write(lambda tx: tx.audit(self._actor, "backup", path))
        return {"path": str(path)}

    def operator_token(self, f: Fields) -> Json:
        if f.flag("rotate"):
            self._s.token.rotate()
            self._s.hub.end_revoked()
            self._s.store.write(lambda tx: tx.audit(self._actor, "rotate_token", "dashboard"))
        return {"token": self._s.token.value}


def pause_everyone(services: Services, actor: Actor, *, paused: bool) -> None:
    def work(tx: Tx) -> None:
        for row in tx.execute("SELECT name FROM agents WHERE NOT kept ORDER BY name").fetchall():
            services.broker.pause(tx, actor, row["name"], paused=paused)

    services.store.write(work)


HOST_VERBS: Final[dict[str, Callable[[HostConnection, Fields], Json | None]]] = {
    "list": HostConnection.list_names,
    "agent_status": HostConnection.agent_status,
    "subscribe_agent_status": HostConnection.subscribe,
    "agents": HostConnection.agents,
    "urls": HostConnection.urls,
    "pending": HostConnection.pending,
    "show": HostConnection.show,
    "approve": HostConnection.approve,
    "deny": HostConnection.deny,
    "set_paused": HostConnection.set_paused,
    "pause_all": HostConnection.pause_all,
    "attach": HostConnection.attach,
    "start": HostConnection.start,
    "stop": HostConnection.stop,
    "restart": HostConnection.restart,
    "kill": HostConnection.kill,
    "spawn": HostConnection.spawn,
    "request_spawn": HostConnection.request_spawn,
    "rebuild": HostConnection.rebuild,
    "rollback": HostConnection.rollback,
    "destroy": HostConnection.destroy,
    "send": HostConnection.send_message,
    "inbox": HostConnection.inbox,
    "answer": HostConnection.answer,
    "logs": HostConnection.logs,
    "events": HostConnection.events,
    "deploys": HostConnection.list_deploys,
    "schedules": HostConnection.schedules,
    "usage": HostConnection.usage,
    "backup": HostConnection.backup,
    "token": HostConnection.operator_token,
}


# ──────────────────────────────────────────────────────────────────────────────
# Dashboard
# ──────────────────────────────────────────────────────────────────────────────
# Routes and their guards, no logic. Agents share the host's network, so anyone of them can reach this
# port: everything but `/healthz` and the static files (which hold no data) wants the operator's token,
# in a header; never a cookie, since cookies ignore ports. A right token passes even when wrong ones have
# come too often from the same address: on a shared loopback anyone could else lock the operator out.

SECURITY_HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self';"
        " connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
CONTENT_TYPES: Final[Mapping[str, str]] = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
    ".json": "application/json",
}
BODY_MAX: Final = 1024 * 1024
HANDOVER_S: Final = 5.0
FIND_MAX: Final = 200
# What a harness is told with no more than the word.
PLAIN_CONTROLS: Final = (
    Control.INTERRUPT,
    Control.COMPACT,
    Control.NEW_SESSION,
    Control.SEND_NOTES,
    Control.LOGIN_BEGIN,
    Control.LOGIN_CANCEL,
)


class TooManyGuesses(Refused):
    def __init__(self, wait_s: int) -> None:
        super().__init__("too_many", "too many wrong tokens from this address", f"wait {wait_s} s")
        self.wait_s = wait_s


class Gate:
    """Who may pass: host name, origin, token, and how often an address may guess."""

    def __init__(self, config: Config, token: OperatorToken) -> None:
        self._hosts, self._token = frozenset(config.known_hosts), token
        self._limit = config.limits.wrong_tokens_per_minute
        self._wrong: dict[str, deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()

    def check_host(self, header: str) -> None:
        if host_of(header) not in self._hosts:
            raise Refused("bad_host", f"this is not {header[:80]!r}", "add the name to `domains` if it should be")

    @staticmethod
    def check_origin(origin: str, host: str) -> None:
        if origin and origin.partition("://")[2] != host:
            raise Refused("bad_origin", f"requests from {origin[:80]!r} are not taken")

    def check_token(self, header: str, address: str) -> None:
        if self._token.is_in(header):
            return
        if header:
            self._count_wrong(address)
        raise Refused("unauthorized", "this needs the operator's token", f"`{COMMAND} url` prints a link that holds it")

    def _count_wrong(self, address: str) -> None:
        moment = time.monotonic()
        with self._lock:
            if len(self._wrong) > 10_000:
                self._wrong.clear()
            recent = self._wrong[address]
            while recent and recent[0] < moment - 60:
                recent.popleft()
            if self._limit and len(recent) >= self._limit:
                raise TooManyGuesses(int(61 - (moment - recent[0])))
            recent.append(moment)


def header_of(request: Any, name: str) -> str:
    """As the bytes came; bottle itself fails on those that are no UTF-8."""
    return str(request.environ.get(f"HTTP_{name.upper().replace('-', '_')}", ""))


def host_of(header: str) -> str:
    """The name in a Host header, without its port, in lower case; an IPv6 address keeps its brackets."""
    name = header.strip().lower()
    return name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]


class Guard:
    """Around every route: who may come in, and one shape for every answer. It is a bottle plugin."""

    def __init__(self, gate: Gate, request: Any, response: Any) -> None:
        self._gate, self._request, self._response = gate, request, response

    def __call__(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(callback)
        def guarded(*arguments: Any, **named: Any) -> Any:
            try:
                self._admit()
                if "name" in named:
                    check_name(named["name"])
                result = callback(*arguments, **named)
                return self._json(result) if isinstance(result, dict) else result
            except Refused as error:
                return self._error(error)
            except Exception:
                log.exception("%s %s", self._request.method, self._request.path)
                return self._error(Refused("internal", "something went wrong here; the daemon's log says what"))

        return guarded

    def _admit(self) -> None:
        request, host = self._request, header_of(self._request, "Host")
        self._gate.check_host(host)
        if not request.route.config["open"]:
            self._gate.check_token(header_of(request, "Authorization"), request.remote_addr or "")
            self._check_query(request.route.config["query"])
        if header_of(request, "Transfer-Encoding"):  # of HTTP/1.1 waitress has taken it away
            raise Refused("bad_request", "HTTP/1.0 knows no chunks")
        if request.method not in ("GET", "HEAD"):
            self._gate.check_origin(header_of(request, "Origin"), host)
            self._check_type(request.route.config["takes"])

    def _check_type(self, wanted: str) -> None:
        """Neither type is one that a foreign page can send without asking first."""
        given = (self._request.content_type or "").partition(";")[0].strip().lower()
        if given != wanted:
            raise Refused("bad_type", f"the body must be {wanted}, not {given[:80]!r}", f"send Content-Type: {wanted}")

    def _check_query(self, known: Sequence[str]) -> None:
        """A parameter that nobody reads is a mistake of the caller's: a page of rows would begin anew, say."""
        query = self._request.query
        for key in query:
            if key not in known:
                hint = f"the parameters here: {', '.join(known) or 'none'}"
                raise Refused("bad_request", f"unknown parameter {key[:60]!r}", hint)
            if len(query.getall(key)) > 1:
                raise Refused("bad_request", f"the parameter {key!r} stands twice")
            if query.getunicode(key) is None:
                raise Refused("bad_request", f"the parameter {key!r} is no UTF-8")

    def add_headers(self) -> None:
        for name, value in SECURITY_HEADERS.items():
            self._response.set_header(name, value)

    def on_failure(self, failure: Any) -> bytes:
        """Bottle's own refusals: no such route, wrong method, a body that is too large."""
        words = {
            404: ("not_found", "there is nothing at this address"),
            405: ("bad_method", "this address takes another method"),
            413: ("too_large", f"a body may have at most {BODY_MAX} bytes"),
        }
        code, text = words.get(failure.status_code, ("bad_request", str(failure.body)[:200]))
        self.add_headers()
        allow = failure.headers.get("Allow")
        if allow:
            self._response.set_header("Allow", allow)
        return self._json(Refused(code, text).as_json(), failure.status_code)

    def _json(self, value: Json, status: int = 200) -> bytes:
        self._response.status = status
        self._response.content_type = "application/json"
        self._response.set_header("Cache-Control", "no-store")
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

    def _error(self, error: Refused) -> bytes:
        if isinstance(error, TooManyGuesses):
            self._response.set_header("Retry-After", str(error.wait_s))
        if error.code == "unauthorized":
            self._response.set_header("WWW-Authenticate", "Bearer")
        return self._json(error.as_json(), STATUS_OF.get(error.code, 400))


def make_app(services: Services) -> Any:
    """The bottle application."""
    import bottle  # the command line never pays for it

    bottle.BaseRequest.MEMFILE_MAX = BODY_MAX
    app = bottle.Bottle()
    app.config["json.enable"] = False
    app.router.add_filter("int", lambda _: (r"[0-9]{1,15}", int, None))  # a longer number is no id of ours
    guard = Guard(Gate(services.config, services.token), bottle.request, bottle.response)
    app.install(guard)
    app.add_hook("after_request", guard.add_headers)
    app.default_error_handler = guard.on_failure
    app.add_hook("before_request", lambda: refuse_bad_utf8(bottle))
    for route in Routes(services, bottle.request, bottle.response).table():
        options = {"open": route.open, "query": route.query, "takes": route.takes}
        app.route(route.path, route.method, route.handler, **options)
    return app


def refuse_bad_utf8(bottle: Any) -> None:
    """Bottle drops bytes of a path that are no UTF-8, so that `/api/st%FFate` would be `/api/state`."""
    environ = bottle.request.environ
    if environ["PATH_INFO"].encode() != environ["bottle.raw_path"].encode("latin-1"):
        raise bottle.HTTPError(404)


class Route(NamedTuple):
    method: str
    path: str
    handler: Callable[..., Any]
    query: tuple[str, ...] = ()  # what may stand behind the `?`
    takes: str = "application/json"  # of which type its body is
    open: bool = False  # to whoever comes, without the token


class Routes:
    """Every address of the dashboard. A handler returns a JSON object, or raises `Refused`."""

    def __init__(self, services: Services, request: Any, response: Any) -> None:
        self._s, self._request, self._response = services, request, response
        self._requests = Requests(services)
        self._files = {path.name: path for path in (HERE / "static").iterdir() if path.suffix in CONTENT_TYPES}
        self._actor = Actor(OPERATOR, "dashboard")

    def table(self) -> list[Route]:
        get, post = functools.partial(Route, "GET"), functools.partial(Route, "POST")
        return [
            get("/", lambda: self.static("index.html"), open=True),
            get("/static/<file>", self.static, open=True),
            get("/healthz", lambda: {"ok": True}, open=True),
            get("/metrics", self.metrics),
            get("/api/state", self.state),
            get("/api/stream", self.stream, ("agent",)),
            get("/api/agents", lambda: {"agents": self._s.views.agents(kept=True)}),
            get("/api/agents/<name>", self.agent),
            get("/api/agents/<name>/events", self.events, ("before", "find", "max")),
            get("/api/agents/<name>/diff", self.diff, ("from", "to")),
            get("/api/approvals", self.approvals, ("status",)),
            get("/api/approvals/<number:int>", self.approval),
            get("/api/approvals/<number:int>/precheck", self.precheck),
            get("/api/approvals/<number:int>/files", lambda number: {"files": self._requests.files(number)}),
            get("/api/messages", self.messages, ("before", "max", "with")),
            get("/api/messages/<number:int>/thread", lambda number: {"messages": self._s.views.thread(number)}),
            get("/api/questions", self.questions, ("status",)),
            get("/api/deploys", self.deploys, ("agent", "before", "max")),
            get("/api/deploys/<number:int>", lambda number: {"deploy": self._s.views.deploy(number)}),
            get("/api/schedules", lambda: {"schedules": self._s.views.schedules()}),
            get("/api/files", self.files),
            get("/api/usage", self.usage, ("days",)),
            get("/api/audit", self.audit, ("before", "max")),
            get("/api/system", self.system),
            get("/api/doctor", self.doctor),
            post("/api/approvals/<number:int>/approve", self.approve),
            post("/api/approvals/<number:int>/undo", self.undo),
            post("/api/approvals/<number:int>/edit", self.edit),
            post("/api/approvals/<number:int>/deny", self.deny),
            post("/api/agents", self.spawn),
            *(post(f"/api/agents/<name>/{action}", handler) for action, handler in self._actions().items()),
            post("/api/messages", self.send),
            post("/api/messages/read", self.read),
            post("/api/messages/<number:int>/give_again", self.give_again),
            post("/api/files", self.add_file, ("name",), takes="application/octet-stream"),
            post("/api/files/delete", self.delete_file),
            post("/api/questions/<number:int>/answer", self.answer),
            post("/api/questions/<number:int>/cancel", self.cancel_question),
            post("/api/schedules", self.schedule),
            post("/api/schedules/<number:int>/cancel", self.cancel_schedule),
            post("/api/pause_all", self.pause_all),
            post("/api/notify/test", self.test_notification),
        ]

    def _actions(self) -> dict[str, Callable[[str], Json]]:
        """What can be done with an agent. All but the last three want nothing but its name."""
        plain: dict[str, Callable[[str], Json | None]] = {
            "start": lambda name: self._s.agents.start(self._actor, name),
            "stop": lambda name: self._s.agents.stop(self._actor, name),
            "restart": lambda name: self._s.agents.restart(self._actor, name),
            "kill": lambda name: self._s.agents.stop(self._actor, name, graceful=False),
            "pause": lambda name: self._pause(name, paused=True),
            "resume": lambda name: self._pause(name, paused=False),
            "rebuild": lambda name: {"deploy_id": self._s.deploys.rebuild(self._actor, name)},
            "rollback": lambda name: {"deploy_id": self._s.deploys.rollback(self._actor, name)},
            **{str(do): functools.partial(self._control, do=do) for do in PLAIN_CONTROLS},
        }
        return {action: functools.partial(self._act, handler) for action, handler in plain.items()} | {
            "destroy": self.destroy,
            "model": self.choose_model,
            "login_finish": self.finish_login,
        }

    # -- what the routes read

    def _query(self, key: str, default: int, most: int) -> int:
        text = self._request.query.get(key)
        if text is None:
            return default
        if not re.fullmatch("[0-9]{1,16}", text) or not 1 <= int(text) <= most:
            raise Refused("bad_request", f"{key}={text[:40]!r} must be a whole number from 1 to {most}")
        return int(text)

    def _word(self, key: str, choices: type[enum.StrEnum]) -> str | None:
        word: str | None = Fields(dict(self._request.query), strict=False).choice(key, choices, default=None)
        return word

    def _agent(self, key: str) -> str | None:
        name = self._request.query.get(key)
        return None if name is None else check_name(name)

    def _before(self) -> int:
        return self._query("before", EXACT, EXACT)

    def _body(self) -> Fields:
        raw = self._request.body.read(BODY_MAX + 1)
        if len(raw) > BODY_MAX:
            raise Refused("too_large", f"a body may have at most {BODY_MAX} bytes")
        return Fields(parse_object(raw or b"{}", "the body"))

    # -- GET

    def static(self, file: str) -> bytes:
        """Browsers keep it and ask whether it is still the same: a phone fetches the page once."""
        path = self._files.get(file)
        if path is None:
            raise Refused("not_found", "there is nothing at this address")
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        self._response.content_type = CONTENT_TYPES[path.suffix]
        self._response.set_header("Cache-Control", "no-cache")
        self._response.set_header("ETag", tag)
        if tag not in header_of(self._request, "If-None-Match"):
            return content
        self._response.status = 304
        return b""

    def state(self) -> Json:
        seq = self._s.hub.seq  # before reading: a change that falls in between is replayed, not lost
        self._s.approvals.fail_orphans()
        return {"seq": seq} | self._s.views.snapshot()

    def agent(self, name: str) -> Json:
        self._s.agents.known(name)
        return {
            "agent": self._s.views.agents(name, kept=True)[0],
            "events": self._s.views.events(agent=name),
            "questions": self._s.views.questions(status=QuestionStatus.OPEN, who=name),
            "reminders": self._s.views.reminders(name),
        }

    def events(self, name: str) -> Json:
        """Older events, or those of them that hold the words of `find`.

        What the host no longer keeps is asked of the harness and comes over the stream: `rest` says below
        which id, and whether there was a harness to ask. An event of the kind `history` ends it. `more`
        says that large ones left no room for others that the host still keeps.
        """
        self._s.agents.known(name)
        before, most = self._before(), self._query("max", 300, 1000)
        words = self._request.query.getunicode("find", "")
        if len(words) > FIND_MAX:
            raise Refused("too_large", f"the words to find may have at most {FIND_MAX} characters")
        found = self._s.views.events(agent=name, before=before, most=most, words=words)
        if 0 < len(found) < most and self._s.views.events(agent=name, before=found[0]["id"], most=1, words=words):
            return {"events": found, "more": True}
        oldest = min(before, self._s.views.oldest_event(name) or 1)
        if len(found) == most or oldest <= 1:
            return {"events": found}
        asked = bool(self._s.agents.connected[name])
        if asked:
            wanted = {"before": oldest, "max": most - len(found)} | ({"find": words} if words else {})
            self._s.store.write(lambda tx: self._s.broker.control(tx, name, Control.SEND_HISTORY, **wanted))
        return {"events": found, "rest": {"before": oldest, "asked": asked}}

    def diff(self, name: str) -> Json:
        """What changed between two commits that were deployed."""
        shas = [check_sha(self._request.query.get(key, "")) for key in ("from", "to")]
        for sha in shas:
            if self._s.store.row("SELECT 1 FROM deploys WHERE agent = ? AND sha = ?", name, sha) is None:
                raise Refused("not_found", f"{name} never had the config {sha[:12]}")
        diff = self._s.repositories.diff(name, *shas).text
        return {"diff": diff, "files": diff_files(diff), **without_none(cut_bytes=cut_bytes(diff))}

    def approvals(self) -> Json:
        status = self._word("status", Status)
        self._s.approvals.fail_orphans()
        return {"approvals": self._s.views.approvals(status)}

    def approval(self, number: int) -> Json:
        return {"approval": self._s.views.approval(number, diff=True)}

    def precheck(self, number: int) -> Json:
        self._s.approvals.row(number)
        return {"log": self._s.prechecks.log(number)}

    def messages(self) -> Json:
        who = self._request.query.get("with")
        if who not in (None, OPERATOR, SYSTEM):
            check_name(who)
        return {"messages": self._s.views.messages(before=self._before(), most=self._query("max", 100, 1000), who=who)}

    def questions(self) -> Json:
        return {"questions": self._s.views.questions(status=self._word("status", QuestionStatus))}

    def deploys(self) -> Json:
        agent, most = self._agent("agent"), self._query("max", 50, 1000)
        return {"deploys": self._s.views.deploys(agent=agent, before=self._before(), most=most)}

    def files(self) -> Json:
        return {"files": self._s.attachments.rows(), "max_bytes": self._s.attachments.max_bytes}

    def usage(self) -> Json:
        return {"today": day_of(now_ms()), "usage": self._s.views.usage(self._query("days", 30, 366))}

    def audit(self) -> Json:
        return {"audit": self._s.views.audit(before=self._before(), most=self._query("max", 100, 1000))}

    def system(self) -> Json:
        machine = describe_machine(self._s.config)
        return machine | {"sockets": self._s.doors.in_use(), "log": self._s.last_words.rows()}

    def doctor(self) -> Json:
        agents = {"agents": self._s.views.agents(), "containers": self._s.config.containers}
        return {"findings": list(doctor(self._s.config, lambda: agents))}

    def metrics(self) -> bytes:
        self._response.content_type = "text/plain; version=0.0.4; charset=utf-8"
        self._response.set_header("Cache-Control", "no-store")
        return metrics_text(self._s).encode()

    def stream(self) -> Iterator[bytes]:
        agent = self._agent("agent") or ""
        after = header_of(self._request, "Last-Event-ID")
        if self._request.environ.get("SERVER_PROTOCOL") != "HTTP/1.1":
            raise Refused("bad_request", "the stream needs HTTP/1.1")
        channel = self._request.environ["waitress.client_disconnected"].__self__
        self._response.content_type = "text/event-stream; charset=utf-8"
        self._response.set_header("Cache-Control", "no-store")
        is_admitted = functools.partial(self._s.token.is_in, header_of(self._request, "Authorization"))
        return self._hand_over(channel, lambda sock: Stream(sock, "sse", after, agent, is_admitted))

    def _hand_over(self, channel: Any, make: Callable[[socket.socket], Stream]) -> Iterator[bytes]:
        """Waitress writes status and headers with the first chunk; then the socket becomes the hub's.

        Waitress closes its own descriptor, with no terminator and no FIN, since ours is open still.
        """
        from waitress.channel import ClientDisconnected

        yield b": hyperhive\n\n"
        end = time.monotonic() + HANDOVER_S
        while channel.connected and channel.total_outbufs_len and time.monotonic() < end:
            time.sleep(0.001)
        if channel.connected and not channel.total_outbufs_len:
            self._s.hub.join(make(channel.socket.dup()))
        raise ClientDisconnected

    # -- POST

    def approve(self, number: int) -> Json:
        f = self._body()
        note, sha, digest = (f.text(key, default=None, blank=True) for key in ("note", "sha", "digest"))
        undo_s = self._s.config.undo_s if f.flag("undo") else 0.0
        f.done()
        self._s.approvals.fail_orphans()
        self._s.approvals.approve(self._actor, number, Decision(note or None, sha, digest, undo_s))
        return {"approval": self._s.views.approval(number)}

    def edit(self, number: int) -> Json:
        f = self._body()
        path, digest = f.text("path"), f.text("digest")
        text = f.text("text", max_bytes=self._s.config.limits.config_file_bytes)
        f.done()
        self._requests.edit(self._actor, number, path, text, digest)
        return {"approval": self._s.views.approval(number, diff=True)}

    def undo(self, number: int) -> Json:
        self._body().done()
        self._s.approvals.undo(self._actor, number)
        return {"approval": self._s.views.approval(number)}

    def deny(self, number: int) -> Json:
        f = self._body()
        note = f.text("note", default=None, blank=True)
        f.done()
        self._s.approvals.deny(self._actor, number, note or None)
        return {"approval": self._s.views.approval(number)}

    def spawn(self) -> Json:
        f = self._body()
        name, description = f.name(), f.text("description", default="", blank=True)
        f.done()
        return {"deploy_id": self._s.deploys.spawn(self._actor, name, description)}

    def _act(self, handler: Callable[[str], Json | None], name: str) -> Json:
        self._body().done()
        return handler(name) or {}

    def _pause(self, name: str, *, paused: bool) -> None:
        self._s.store.write(lambda tx: self._s.broker.pause(tx, self._actor, name, paused=paused))

    def destroy(self, name: str) -> Json:
        f = self._body()
        confirm, purge = f.text("confirm"), f.flag("purge")
        f.done()
        if confirm != name:
            raise Refused("bad_request", f"to destroy {name}, its name must be typed again", 'send {"confirm": NAME}')
        self._s.agents.destroy(self._actor, name, purge=purge)
        return {}

    def choose_model(self, name: str) -> Json:
        f = self._body()
        model = f.text("model", max_bytes=100)
        f.done()
        self._control(name, do=Control.SET_MODEL, model=model)
        return {}

    def finish_login(self, name: str) -> Json:
        f = self._body()
        code = f.text("code")
        f.done()
        self._control(name, do=Control.LOGIN_FINISH, code=code)
        return {}

    def _control(self, name: str, *, do: Control, **fields: Any) -> None:
        control_agent(self._s, self._actor, name, do, fields)

    def send(self) -> Json:
        f = self._body()
        draft = draft_from(f, OPERATOR, self._s.config.limits)
        f.done()
        return send_draft(self._s.broker, draft)

    def read(self) -> Json:
        f = self._body()
        ids = f.items("ids", int, most=1000)
        f.done()
        return {"read": self._s.broker.mark_read(ids)}

    def give_again(self, number: int) -> Json:
        self._body().done()
        self._s.broker.give_again(self._actor, number)
        return {}

    def add_file(self) -> Json:
        name = self._request.query.getunicode("name", "")
        if not name or not name.isprintable():
            raise Refused("bad_request", f"{name[:200]!r} is no file's name", "POST /api/files?name=NAME")
        return self._s.attachments.add(self._actor, name, self._request.body)

    def delete_file(self) -> Json:
        f = self._body()
        name = f.text("name")
        f.done()
        self._s.attachments.delete(self._actor, name)
        return {}

    def answer(self, number: int) -> Json:
        f = self._body()
        text = f.text("text", max_bytes=self._s.config.limits.body_bytes)
        f.done()
        self._s.broker.answer(self._actor, number, text)
        return {"question": self._s.views.questions(number=number)[0]}

    def cancel_question(self, number: int) -> Json:
        self._body().done()
        self._s.broker.cancel_question(self._actor, number)
        return {}

    def schedule(self) -> Json:
        f = self._body()
        detail = self._requests.schedule_request(f, None).detail
        f.done()
        to, every = detail["to"], detail.get("every_s")
        number = self._s.store.write(
            lambda tx: self._s.broker.add_schedule(tx, self._actor, to, detail["body"], detail["first_at"], every)
        )
        return {"id": number}

    def cancel_schedule(self, number: int) -> Json:
        self._body().done()
        self._s.broker.cancel_schedule(self._actor, number)
        return {}

    def pause_all(self) -> Json:
        f = self._body()
        paused = f.flag("paused", default=MISSING)
        f.done()
        pause_everyone(self._s, self._actor, paused=paused)
        return {}

    def test_notification(self) -> Json:
        self._body().done()
        self._s.notifier.test()
        return {}


def control_agent(services: Services, actor: Actor, name: str, do: Control, fields: Json) -> None:
    """Hand a control item to a harness that is there to take it."""
    services.agents.living(name)
    if not services.agents.connected[name]:
        raise Refused("conflict", f"{name} is not connected", "start it first")

    def work(tx: Tx) -> None:
        if do is Control.SET_MODEL:
            choose_model(tx, services.broker, actor, name, fields["model"])
        else:
            tx.audit(actor, str(do), name)
            services.broker.control(tx, name, do, **fields)

    services.store.write(work)


def metrics_text(services: Services) -> str:
    """Prometheus text format, version 0.0.4."""
    agents = services.views.agents()
    states = defaultdict(int, {"working": 0, "idle": 0, "failed": 0})
    for row in agents:
        states[row["state"]] += 1
    mail = {
        row["state"]: row["n"]
        for row in services.store.rows("SELECT state, count(*) AS n FROM messages GROUP BY state")
    }
    lines = ["# TYPE hyperhive_agents gauge"]
    lines += [f'hyperhive_agents{{state="{state}"}} {count}' for state, count in sorted(states.items())]
    lines += ["# TYPE hyperhive_messages gauge"]
    lines += [f'hyperhive_messages{{state="{state}"}} {mail.get(state, 0)}' for state in MessageState]
    lines += ["# TYPE hyperhive_attention gauge", f"hyperhive_attention {len(services.views.attention())}"]
    lines += ["# TYPE hyperhive_cost_today_usd gauge", f"hyperhive_cost_today_usd {services.views.spent_today()}"]
    lines += ["# TYPE hyperhive_unread gauge"]
    lines += [f'hyperhive_unread{{agent="{row["name"]}"}} {row["unread"]}' for row in agents]
    return "\n".join(lines) + "\n"


def refuse_early(task: Any) -> None:
    """What waitress refuses before the application sees it (headers or a body too large, no HTTP), in our shape."""
    error = task.request.error
    code = {413: "too_large", 431: "too_large", 500: "internal", 501: "unsupported"}.get(error.code, "bad_request")
    body = json.dumps(Refused(code, f"{error.reason}: {error.body}").as_json()).encode()
    headers = {**SECURITY_HEADERS, "Content-Type": "application/json", "Cache-Control": "no-store"}
    task.status = f"{error.code} {error.reason}"
    task.response_headers.extend(headers.items())
    task.set_close_on_finish()
    task.content_length = len(body)
    task.write(body)


class Dashboard:
    """The application on waitress, in a thread of its own."""

    def __init__(self, services: Services, listener: socket.socket) -> None:
        import waitress
        from waitress.channel import HTTPChannel
        from waitress.parser import HTTPRequestParser
        from waitress.task import ErrorTask

        self._server: Any = waitress.create_server(
            make_app(services),
            sockets=[listener],
            threads=8,
            asyncore_use_poll=True,  # with select() the process dies at descriptor 1024
            connection_limit=min(1000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2),  # they need no token
            channel_request_lookahead=1,
            channel_timeout=30,
            cleanup_interval=5,
            max_request_header_size=16 * 1024,
            max_request_body_size=BODY_MAX,
            ident="",
        )
        roomy = copy.copy(self._server.adj)
        roomy.max_request_body_size = services.attachments.max_bytes + 1

        class Parser(HTTPRequestParser):  # type: ignore[misc]
            """Waitress keeps a body before the application sees its headers: a long one only from the operator."""

            path = ""  # a request that is refused has none, but is asked for it when its client has gone

            def parse_header(self, header_plus: bytes) -> None:
                super().parse_header(header_plus)
                if self.path == "/api/files" and services.token.is_in(self.headers.get("AUTHORIZATION", "")):
                    self.adj = roomy

        class Errors(ErrorTask):  # type: ignore[misc]
            execute = refuse_early

        class Channel(HTTPChannel):  # type: ignore[misc]
            error_task_class, parser_class = Errors, Parser

        self._server.channel_class = Channel
        logging.getLogger("waitress").setLevel(logging.WARNING)  # it reports each stream handed over as a disconnect
        self._thread = threading.Thread(target=self._server.run, name="dashboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """`close()` alone does not end `run()` while a keep-alive connection is open."""

        def close_all() -> None:
            for channel in list(self._server._map.values()):
                with contextlib.suppress(OSError):
                    channel.close()

        logging.getLogger("waitress").setLevel(logging.CRITICAL)  # requests under way find their connection closed
        with contextlib.suppress(OSError):
            self._server.trigger.pull_trigger(close_all)
        self._thread.join(5)
        self._server.task_dispatcher.shutdown(timeout=2)


# ──────────────────────────────────────────────────────────────────────────────
# Daemon
# ──────────────────────────────────────────────────────────────────────────────


OPEN_FILES: Final = 65_536


class Systemd:
    """Tells the service manager how we are, see sd_notify(3). Silent where nobody listens."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # an abstract socket
            self._address = "\0" + self._address[1:]
        mine = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environment.get("WATCHDOG_USEC", "") if mine else ""
        self.beat_s = int(usec) / 1e6 / 3 if usec.isdigit() else 0.0  # how often it wants to hear of us
        self._beaten = 0.0

    def tell(self, **fields: object) -> None:
        if not self._address:
            return
        text = "\n".join(f"{key}={value}" for key, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(text.encode(), self._address)
        except OSError as error:
            log.warning("the service manager can't be told %s: %s", text, error)

    def beat(self) -> None:
        """We are alive. Called each tick."""
        if self.beat_s and time.monotonic() > self._beaten + self.beat_s:
            self._beaten = time.monotonic()
            self.tell(WATCHDOG=1)


class Daemon:
    """Puts the rooms together, keeps time, and takes them apart again in order."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._stop = threading.Event()
        self._closers = contextlib.ExitStack()
        self._systemd = Systemd(os.environ)
        self._last_words = LastWords()

    def run(self, on_ready: Callable[[Services], None] = lambda services: None) -> None:
        """Serve until SIGINT or SIGTERM. `on_ready` is called once, when everything answers."""
        check_packages()
        self._hear_signals()
        log.addHandler(self._last_words)
        with self._closers:
            services = self._begin()
            if services is not None:
                log.info("ready: %s", self.config.home_url)
                self._systemd.tell(READY=1, STATUS=f"serving {self.config.home_url}")
                on_ready(services)
                self._keep_time(services)
                log.info("stopping")
                self._systemd.tell(STOPPING=1, STATUS="stopping")

    def _hear_signals(self) -> None:
        """A handler runs in the main thread: not while that waits, or inside `Event.wait`, whose lock `set` needs.

        The wakeup descriptor is written to at once, whatever the main thread does.
        """
        ears, mouth = socket.socketpair()
        mouth.setblocking(False)
        signal.set_wakeup_fd(mouth.detach(), warn_on_full_buffer=False)

        def hear() -> None:
            while ears.recv(1):
                self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=hear, name="signals", daemon=True).start()

    def _begin(self) -> Services | None:
        """None when a signal came while we waited for the port."""
        config = self.config
        raise_file_limit()
        make_folders(config)
        self._closers.enter_context(only_daemon(config))
        listener = self._listen()
        if listener is None:
            return None
        store = Store(config.database)
        self._closers.callback(store.close)
        services = self._assemble(store)
        self._closers.callback(services.agents.leave)
        services.approvals.fail_orphans()
        services.repositories.unlock()
        services.agents.recover()
        services.deploys.begin()
        self._closers.callback(services.deploys.close)
        services.prechecks.begin()
        self._closers.callback(services.prechecks.close)
        make = functools.partial(HostConnection, services=services)
        services.doors.open(config.host_socket, make, most=config.limits.connections)
        self._give_to_admins(config.host_socket)
        dashboard = Dashboard(services, listener)
        self._closers.callback(dashboard.close)
        if config.manager_autostart and store.row("SELECT 1 FROM agents WHERE name = ?", MANAGER) is None:
            services.deploys.spawn(SYSTEM_ACTOR, MANAGER, "Talks with the operator, and asks before anything changes.")
        return services

    def _listen(self) -> socket.socket | None:
        try:
            listener = listen_on(self.config.listen_address, self.config.port, self._stop)
        except Refused:
            if self._stop.is_set():
                return None
            raise
        self._closers.callback(listener.close)
        return listener

    def _assemble(self, store: Store) -> Services:
        config = self.config
        broker = Broker(store, config.limits)
        budgets = Budgets(config, store, broker)
        repositories = Repositories(config)
        approvals = Approvals(config, store, broker)
        agents = Agents(config, store, broker, approvals, make_containers(config))
        deploys = Deploys(config, store, broker, approvals, repositories, agents)
        prechecks = Prechecks(config, store, repositories, deploys, agents)
        views = Views(config, store, agents)
        hub, notifier, doors = Hub(views, config.heartbeat_s), Notifier(config, views), Doors()
        self._closers.callback(notifier.close)
        self._closers.callback(hub.close)
        self._closers.callback(doors.close)
        self._closers.callback(broker.leave)
        token = OperatorToken(config.token_file)
        services = Services(
            config=config,
            store=store,
            broker=broker,
            budgets=budgets,
            repositories=repositories,
            approvals=approvals,
            agents=agents,
            deploys=deploys,
            prechecks=prechecks,
            attachments=Attachments(config, store, agents.containers.operator_dir),
            views=views,
            hub=hub,
            notifier=notifier,
            doors=doors,
            token=token,
            last_words=self._last_words,
        )

        def on_changes(changes: list[tuple[str, Any]]) -> None:
            hub.mark(changes)
            notifier.mark()

        store.on_changes = on_changes
        approvals.on_deploy = deploys.wake
        agents.open_door = functools.partial(open_agent_door, services)
        agents.close_door = lambda name: doors.close_one(config.agent_socket(name))
        store.write(
            lambda tx: tx.execute(
                "UPDATE agents SET state = 'offline', state_since = ? WHERE state != 'offline'", now_ms()
            )
        )
        return services

    def _keep_time(self, services: Services) -> None:
        cleaned = -math.inf
        while not self._stop.wait(TICK_S):
            self._systemd.beat()
            chores: list[Callable[[], None]] = [
                services.broker.expire_waits,
                services.broker.return_late,
                services.broker.fire_due,
                services.budgets.begin_day,
                services.approvals.remind_waiting,
                services.prechecks.look,
                services.agents.look,
                services.agents.watch_silence,
                services.agents.watch_sign_ins,
            ]
            if time.monotonic() - cleaned > 3600:
                cleaned = time.monotonic()
                chores.append(services.broker.forget_old)
                chores.append(functools.partial(services.approvals.forget_old, services.repositories))
            for chore in chores:
                try:
                    chore()
                except Exception:
                    log.exception("a chore failed; the next tick tries again")

    def _give_to_admins(self, path: Path) -> None:
        group = group_id(self.config.admin_group)
        if group is None:
            return
        try:
            os.chown(path, -1, group)
        except PermissionError:
            log.warning("%s is not for the group %s: we are no member", path, self.config.admin_group)
        else:
            path.chmod(0o660)  # only now: of another group nobody shall get in


def open_agent_door(services: Services, name: str) -> None:
    """Idempotent: a door that is open and still there stays; anything else is closed and opened anew."""
    path = services.config.agent_socket(name)
    if not services.doors.is_open(path):
        make = functools.partial(AgentConnection, name=name, services=services)
        services.doors.open(path, make, most=services.config.limits.connections)


def group_id(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def raise_file_limit() -> None:
    """Who opens connections must not keep us from opening files: the usual 1024 are soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def make_folders(config: Config) -> None:
    try:
        config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        config.runtime_dir.mkdir(mode=0o751, parents=True, exist_ok=True)
        config.runtime_dir.chmod(0o751)  # whatever the umask is: `hive-admin` reaches host.sock through it
        (config.runtime_dir / "agents").mkdir(mode=0o700, exist_ok=True)
        for folder in (config.state_dir / "applied", config.state_dir / "agents", config.scratch_dir):
            folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise Refused(
            "usage", f"can't make {error.filename}: {error.strerror}", "run as root, or choose folders with --dir"
        ) from None


@contextlib.contextmanager
def only_daemon(config: Config) -> Iterator[None]:
    """One daemon a state folder. The lock goes with its process, however that ends."""
    with (config.state_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise Refused("conflict", f"another hyperhive (pid {holder}) serves {config.state_dir} already") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for left in config.scratch_dir.iterdir():  # by one that was killed
            if left.is_dir():
                remove_tree(left)
            else:
                left.unlink()
        yield


# ──────────────────────────────────────────────────────────────────────────────
# Command line
# ──────────────────────────────────────────────────────────────────────────────
# A client of `host.sock`, as any other. Only serve and demo run a daemon, restore wants none, and doctor
# looks at this machine as well. Standard library alone, so that `list` answers at once. What agents wrote
# is shown with its control characters made visible.

DEMO_DIR: Final = "hyperhive-demo"
DEMO_ID: Final = "demo"
DEMO_REQUEST: Final = (
    "Please get me somebody who writes short reports about this place: an agent called alice."
    " Let her ask me what the first one shall be about."
)
DOCTOR_PATIENCE_S: Final = 10.0


def ask_daemon(config: Config, timeout_s: float | None = None, **request: Any) -> Json:
    """One request at `host.sock`; `Refused` when the daemon says no, or is not there.

    It may take minutes, where containers start and stop. Whoever waits at a terminal has Ctrl-C.
    """
    with dial(config) as sock:
        sock.settimeout(timeout_s)
        return ask_on(sock, **request)


def dial(config: Config) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(config.host_socket))
    except OSError as error:
        sock.close()
        raise _no_answer(config, error) from None
    return sock


def ask_on(sock: socket.socket, **request: Any) -> Json:
    try:
        question = encode_line(without_none(**request))
    except UnicodeEncodeError:
        raise Refused("usage", "an argument is no UTF-8") from None
    try:
        with contextlib.suppress(ConnectionError):  # what is too long is refused before all of it was read
            sock.sendall(question)
        with sock.makefile("rb") as answers:
            line = answers.readline()
    except TimeoutError:
        raise Refused("unreachable", f"the daemon did not answer within {sock.gettimeout():g} s") from None
    except OSError:
        line = b""
    if not line.endswith(b"\n"):
        hint = "its log says why; what was asked for may have happened, or not"
        raise Refused("unreachable", "the daemon went away before it answered", hint)
    answer = parse_object(line, "the daemon's answer")
    if not answer.get("ok"):
        raise Refused(
            str(answer.get("code", "internal")), str(answer.get("error", "refused")), str(answer.get("hint", ""))
        )
    return {key: value for key, value in answer.items() if key not in ("ok", "version")}


def _no_answer(config: Config, error: OSError) -> Refused:
    if isinstance(error, PermissionError):
        hint = f"become a member of {config.admin_group}, or root"
        return Refused("forbidden", f"you may not open {config.host_socket}", hint)
    return Refused(
        "not_found",
        f"no hive answers at {config.host_socket}: {error.strerror or error}",
        f"start it with `{COMMAND} serve` (a service: `systemctl start hyperhive`), or say where it is with --dir",
    )


def visible(text: object) -> str:
    """One line that can't drive a terminal: control and direction characters are shown as escapes."""
    hidden = "\u200e\u200f\u061c"
    return "".join(
        char.encode("unicode_escape").decode()
        if ord(char) < 32
        or 127 <= ord(char) < 160
        or "\u202a" <= char <= "\u202e"
        or "\u2066" <= char <= "\u2069"
        or char in hidden
        else char
        for char in str(text)
    )


def show_lines(text: str) -> None:
    for line in text.splitlines():
        print(visible(line.replace("\t", "    ")))


def table(rows: list[Json], *columns: str, empty: str) -> None:
    """Rows as aligned columns; a cell is one line of at most 60 characters."""
    if not rows:
        print(empty)
        return
    cells = [[visible(row.get(column, ""))[:60] for column in columns] for row in rows]
    titles = [column.replace("_", " ") for column in columns]
    widths = [max(len(line[n]) for line in [titles, *cells]) for n in range(len(columns))]
    for line in [titles, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def age(at: str) -> str:
    seconds = max(0, int(time.time() - datetime.datetime.fromisoformat(at).timestamp()))
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


@dataclasses.dataclass(frozen=True)
class Cli:
    """What a verb gets: its arguments, the settings, and how to answer."""

    args: argparse.Namespace
    config: Config

    @property
    def text(self) -> str:
        return sys.stdin.read() if self.args.text == "-" else str(self.args.text)

    def ask(self, cmd: str, **fields: Any) -> Json:
        return ask_daemon(self.config, cmd=cmd, **fields)

    def json(self, answer: Json) -> bool:
        """Print the answer for a program, if that is wanted."""
        if self.args.json:
            print(json.dumps(answer, indent=2))  # in ASCII: on a terminal it can't do anything either
        return bool(self.args.json)

    def done(self, answer: Json, text: str) -> None:
        if not self.json(answer):
            print(text)

    def follow_deploy(self, deploy: int | None) -> None:
        """Show a deploy's log until its end, where somebody watches or asked for it."""
        if deploy is None or not (self.args.wait or (sys.stderr.isatty() and not self.args.json)):
            return
        shown = 0
        while True:
            row = self.ask("deploys", id=deploy)["deploys"][0]
            for line in row["log"][shown:]:
                print(visible(line), file=sys.stderr, flush=True)
            shown = len(row["log"])
            if row["phase"] == Phase.FAILED:
                raise Refused("internal", f"the deploy failed: {row.get('error', '')}")
            if row["phase"] == Phase.DEPLOYED:
                return
            time.sleep(0.2)


def cli_serve(cli: Cli) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    Daemon(cli.config).run()


def cli_demo(cli: Cli) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    rehearsal = not cli.args.claude
    command = cli.args.claude or shlex.join([sys.executable, str(HERE / "harness.py"), "rehearsal"])
    config = dataclasses.replace(cli.config, containers="process", claude=command, rehearsal=rehearsal)

    def ready(services: Services) -> None:
        link = f"{config.home_url}#token={services.token.value}"
        asked = services.store.row("SELECT 1 FROM messages WHERE client_id = ?", DEMO_ID)
        services.broker.send(Draft(OPERATOR, MANAGER, DEMO_REQUEST, client_id=DEMO_ID))
        here = shlex.join([sys.executable, str(HERE / "hyperhive.py"), "--dir", cli.args.dir])
        if rehearsal:
            print("A rehearsal: a scripted stand-in plays Claude. No account, no network, nothing reaches a model.")
        print(f"\n  {link}\n")
        if asked:
            print(f"It goes on where it was. What waits for you:\n  {here} status")
        else:
            print("Soon the manager asks to spawn alice. Look at the request, and decide:")
            print(f"  {here} pending\n  {here} approve 1")
        print("Ctrl-C ends it.", flush=True)
        if not cli.args.no_browser:
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()

    Daemon(config).run(ready)


def cli_list(cli: Cli) -> None:
    answer = cli.ask("agents")
    if cli.json(answer):
        return
    rows = [
        row | {"cost_today": f"${row['cost_today_usd']:.2f}", "age": age(row["state_since"])}
        for row in answer["agents"]
    ]
    table(rows, "name", "state", "age", "unread", "cost_today", "status_text", empty="No agents yet.")


def cli_status(cli: Cli) -> None:
    if cli.args.name:
        rows = [row for row in cli.ask("agents", kept=True)["agents"] if row["name"] == check_name(cli.args.name)]
        if not rows:
            raise Refused("unknown_agent", f"there is no agent {cli.args.name!r}", "`list` shows who is there")
        if not cli.json({"agent": rows[0]}):
            for key, value in rows[0].items():
                print(f"{key.replace('_', ' '):18} {visible(value)}")
        return
    agents, waiting = cli.ask("agent_status"), cli.ask("pending")
    if cli.json(agents | waiting):
        return
    rows = agents["agent_statuses"]
    running, paused = (sum(row[flag] for row in rows) for flag in ("running", "paused"))
    print(f"{len(rows)} agents, {running} running, {paused} paused")
    count = len(waiting["attention"])
    print(f"{count or 'nothing'} {'wait' if count > 1 else 'waits'} for you{':' if count else ''}")
    for row in waiting["attention"]:
        print(f"  {visible(row['text'])}")
    if waiting["approvals"] or waiting["questions"]:
        print("`pending` lists the requests and the questions, with their numbers.")


def cli_pending(cli: Cli) -> None:
    """Requests and questions are numbered each for themselves: number 1 may be both."""
    answer = cli.ask("pending")
    if cli.json(answer):
        return
    requests = [
        row | {"request": row["id"], "age": age(row["requested_at"]), "by": row["requested_by"]}
        for row in answer["approvals"]
    ]
    if requests:
        print("Requests (show ID, approve ID, deny ID):")
    table(requests, "request", "kind", "agent", "by", "age", "description", empty="No request waits for you.")
    if answer["questions"]:
        print("\nQuestions (answer ID TEXT):")
        rows = [
            row
            | {"age": age(row["asked_at"]), "options": ", ".join(row.get("options", [])), "question": row["id"]}
            | {"text": row["question"]}
            for row in answer["questions"]
        ]
        table(rows, "question", "from", "age", "text", "options", empty="")


def cli_show(cli: Cli) -> None:
    answer = cli.ask("show", id=cli.args.id)
    if cli.json(answer):
        return
    row = answer["approval"]
    for key in (
        "id",
        "kind",
        "agent",
        "status",
        "phase",
        "requested_by",
        "requested_at",
        "description",
        "fetched_sha",
        "note",
    ):
        if key in row:
            print(f"{key.replace('_', ' '):13} {visible(row[key])}")
    if "schedule" in row:
        print(f"{'schedule':13} {visible(json.dumps(row['schedule'], ensure_ascii=False))}")
    if "first_base_sha" in row:
        print(f"{'compared with':13} {row['base_sha']}, deployed after this was asked for")
    if "precheck" in row:
        show_precheck(row["precheck"])
    if row["diff"]:
        print()
        show_lines(row["diff"])
    if "error" in row:
        print("\nWhat went wrong:")
        show_lines(row["error"])


def show_precheck(found: Json) -> None:
    where = " at {path}:{line}".format(**found["at"]) if "at" in found else ""
    why = f": {found['error']}" if "error" in found else ""
    print(f"{'pre-check':13} {visible(found['state'].replace('_', ' ') + where + why)}")
    for package in found.get("packages", []):
        versions = f"{package.get('from', '–')} → {package.get('to', '–')}"
        print(f"{'':13} {visible(package['name'])} {visible(versions)}, {package['bytes'] / 1024**2:+.1f} MiB")


def cli_approve(cli: Cli) -> None:
    answer = cli.ask("approve", id=cli.args.id, note=cli.args.note)
    cli.done(answer, f"approved {cli.args.id}")
    cli.follow_deploy(cli.ask("show", id=cli.args.id)["approval"].get("deploy_id"))


def cli_deny(cli: Cli) -> None:
    cli.done(cli.ask("deny", id=cli.args.id, note=cli.args.note), f"denied {cli.args.id}")


def cli_deploy(cli: Cli) -> None:
    """spawn, rebuild, rollback."""
    fields = {"description": cli.args.description} if cli.args.verb == "spawn" else {}
    answer = cli.ask(cli.args.verb, name=cli.args.name, **fields)
    cli.done(answer, f"{cli.args.verb} of {cli.args.name} begins (deploy {answer['deploy']})")
    cli.follow_deploy(answer["deploy"])


def cli_start_stop(cli: Cli) -> None:
    fields = {"graceful": not cli.args.now} if cli.args.verb == "stop" else {}
    answer = cli.ask(cli.args.verb, scope={"agent_names": cli.args.names}, **fields)
    past = {"start": "started", "stop": "stopped"}[cli.args.verb]
    cli.done(answer, f"{past} {', '.join(cli.args.names)}")


def cli_restart(cli: Cli) -> None:
    cli.done(cli.ask("restart", name=cli.args.name), f"restarted {cli.args.name}")


def cli_pause(cli: Cli) -> None:
    """pause and resume, of one agent or of all."""
    paused = cli.args.verb == "pause"
    if cli.args.all == bool(cli.args.name):
        raise Refused("usage", "name an agent, or say --all")
    answer = (
        cli.ask("pause_all", paused=paused)
        if cli.args.all
        else cli.ask("set_paused", name=cli.args.name, paused=paused)
    )
    cli.done(answer, f"{cli.args.verb}d {cli.args.name or 'everyone'}")


def cli_attach(cli: Cli) -> None:
    name = check_name(cli.args.name)
    with dial(cli.config) as line:
        if not cli.args.now:
            print(f"Waiting for {name} to end its turn, if it is in one; --now interrupts it.", file=sys.stderr)
        place = ask_on(line, cmd="attach", name=name, now=cli.args.now)
        status = run_at_terminal(place["argv"], place["env"], line)
    cli.done({"status": status}, f"{name} goes on by itself.")


def cli_destroy(cli: Cli) -> None:
    name = check_name(cli.args.name)
    if not cli.args.yes:
        loss = (
            "its notes, sign-in, config and mail are wiped" if cli.args.purge else "its notes, config and mail are kept"
        )
        print(f"This destroys {name}; {loss}. Type its name to go on: ", end="", file=sys.stderr, flush=True)
        try:
            typed = input()
        except EOFError:
            raise Refused("usage", "nobody typed the name", "scripts say --yes") from None
        if typed.strip() != name:
            raise Refused("usage", "that is not its name; nothing was done")
    cli.done(cli.ask("destroy", name=name, purge=cli.args.purge), f"destroyed {name}")


def cli_send(cli: Cli) -> None:
    answer = cli.ask("send", to=cli.args.to, body=cli.text)
    cli.done(answer, f"sent to {cli.args.to} (message {answer['id']})")


def cli_inbox(cli: Cli) -> None:
    answer = cli.ask("inbox", max=cli.args.max, unread=cli.args.unread, mark_read=not cli.args.keep)
    if cli.json(answer):
        return
    for message in answer["messages"]:
        mark = "*" if message["state"] == MessageState.QUEUED else " "
        print(f"{mark} {message['id']}  {message['from']}, {age(message['at'])} ago")
        for line in message["body"].splitlines():
            print(f"    {visible(line)}")
    if not answer["messages"]:
        print("Nothing for you.")


def cli_answer(cli: Cli) -> None:
    cli.done(cli.ask("answer", id=cli.args.id, text=cli.text), f"answered question {cli.args.id}")


def cli_logs(cli: Cli) -> None:
    answer = cli.ask("logs", name=cli.args.name, lines=cli.args.lines)
    while True:
        if (answer["lines"] or not cli.args.follow) and not cli.json(answer):
            show_lines("\n".join(answer["lines"]))
        if not cli.args.follow:
            return
        sys.stdout.flush()
        time.sleep(0.5)
        answer = cli.ask("logs", name=cli.args.name, lines=LOG_LINES_MAX, after=answer["cursor"])


def cli_events(cli: Cli) -> None:
    answer = cli.ask("events", name=cli.args.name, max=cli.args.lines)
    last = 0
    while True:
        for event in answer["events"]:
            last = max(last, event["n"])
            if not cli.args.json:
                data = visible(json.dumps(event["data"], ensure_ascii=False))[:300]
                print(f"{event['at']}  {event['agent']:9}  {visible(event['kind']):11}  {data}")
        if answer["events"] or not cli.args.follow:
            cli.json(answer)
        if not cli.args.follow:
            return
        sys.stdout.flush()
        time.sleep(0.5)
        answer = cli.ask("events", name=cli.args.name, after=last, max=2000)


def cli_usage(cli: Cli) -> None:
    answer = cli.ask("usage", days=cli.args.days)
    if not cli.json(answer):
        rows = [row | {"cost": f"${row['cost_usd']:.4f}"} for row in answer["usage"]]
        table(rows, "day", "agent", "turns", "input_tokens", "output_tokens", "cost", empty="Nothing used yet.")


def cli_url(cli: Cli) -> None:
    home, token = cli.ask("urls")["urls"]["home"], cli.ask("token")["token"]
    cli.done({"url": f"{home}#token={token}"}, f"{home}#token={token}")


def cli_token(cli: Cli) -> None:
    answer = cli.ask("token", rotate=cli.args.rotate)
    cli.done(answer, answer["token"])


def cli_backup(cli: Cli) -> None:
    answer = cli.ask("backup", path=str(Path(cli.args.file).absolute()))
    cli.done(answer, f"wrote {answer['path']}")


def cli_restore(cli: Cli) -> None:
    """With the daemon stopped: the present database is set aside, the backup takes its place."""
    source = Path(cli.args.file)
    if not source.is_file():
        raise Refused("not_found", f"there is no file {source}")
    make_folders(cli.config)
    with only_daemon(cli.config):
        scratch = cli.config.scratch_dir / "restore.sqlite"
        try:
            copy_database(source, scratch)
            _open_database(scratch).close()
        except (OSError, sqlite3.Error, Refused) as error:
            scratch.unlink(missing_ok=True)
            raise Refused("storage", f"{source} can't be restored: {error}", "nothing was changed") from None
        aside = cli.config.database.with_name(f"hive.sqlite.before-restore-{now_ms()}")
        for suffix in ("", "-wal", "-shm"):
            old = Path(f"{cli.config.database}{suffix}")
            if old.exists():
                old.rename(f"{aside}{suffix}")
        scratch.rename(cli.config.database)
    cli.done({"restored": str(source), "before": str(aside)}, f"restored {source}; what was there is {aside}")


def cli_doctor(cli: Cli) -> None:
    ask = functools.partial(ask_daemon, cli.config, timeout_s=DOCTOR_PATIENCE_S, cmd="agents")
    findings = list(doctor(cli.config, ask))
    if not cli.json({"findings": findings}):
        for finding in findings:
            print(f"{'ok  ' if finding['ok'] else 'FIX '} {finding['check']}: {visible(finding['found'])}")
            if not finding["ok"]:
                print(f"     {visible(finding['fix'])}")
    if not all(finding["ok"] for finding in findings):
        raise Refused("conflict", "some of this wants your attention")


def some_path(text: str) -> str:
    if not text:  # it would mean the machine's own hive
        raise argparse.ArgumentTypeError("is empty: a variable that is not set?")
    return text


def make_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for flag, text in (
        ("--dir", "a folder that holds both state/ and run/"),
        ("--state-dir", "where state is kept (default $HYPERHIVE_STATE_DIR, else /var/lib/hyperhive)"),
        ("--runtime-dir", "where sockets are (default $HYPERHIVE_RUNTIME_DIR, else /run/hyperhive)"),
        ("--config", "a TOML file with settings (default $HYPERHIVE_CONFIG)"),
    ):
        common.add_argument(flag, type=some_path, help=text)
    common.add_argument("--json", action="store_true", help="answer for programs")
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        parents=[common],
        description="A swarm of Claude Code agents, and the operator's gate in front of it.",
    )
    parser.add_argument("--version", action="version", version=f"hyperhive {VERSION}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, handler: Callable[[Cli], None], text: str, *arguments: tuple[str, Json]) -> None:
        sub = verbs.add_parser(name, parents=[common], help=text, description=text)
        sub.set_defaults(handler=handler)
        for flag, options in arguments:
            short = ("-f",) if flag == "--follow" else ()
            sub.add_argument(*short, flag, **options)

    for add in (add_hive_verbs, add_agent_verbs, add_operator_verbs):
        add(verb)
    return parser


Argument = tuple[str, Json]
AN_AGENT: Final[Argument] = ("name", {"metavar": "NAME", "help": "an agent, as `list` shows it"})
A_REQUEST: Final[Argument] = ("id", {"metavar": "ID", "type": int, "help": "of a request: `pending` shows it"})
PORT: Final[Argument] = ("--port", {"type": int, "help": "of the dashboard (default 7000)"})
FOLLOW: Final[Argument] = ("--follow", {"action": "store_true", "help": "go on as more comes"})
NOTE: Final[Argument] = ("--note", {"help": "words for whoever asked"})
WAIT: Final[Argument] = ("--wait", {"action": "store_true", "help": "show the deploy until its end"})


def an_agent_or(everything: str) -> Argument:
    return ("name", {"metavar": "NAME", "nargs": "?", "help": f"an agent; without it {everything}"})


def how_many(flag: str, default: int, text: str) -> Argument:
    return (flag, {"type": int, "default": default, "metavar": "N", "help": f"{text} (default {default})"})


def add_hive_verbs(verb: Callable[..., None]) -> None:
    """Verbs that are about the hive as a whole."""
    listen: Argument = ("--listen", {"dest": "listen_address", "help": "address to listen on (default 127.0.0.1)"})
    kind: Argument = ("--containers", {"choices": CONTAINER_KINDS, "help": "how agents run (default nixos)"})
    browser: Argument = ("--no-browser", {"action": "store_true", "help": "only print the link"})
    claude: Argument = ("--claude", {"metavar": "PATH", "help": "a real Claude Code, instead of the rehearsal"})
    days = how_many("--days", 7, "so many, until today")
    copy_file: Argument = ("file", {"metavar": "FILE", "help": "where to write it; it must not exist yet"})
    back_file: Argument = ("file", {"metavar": "FILE", "help": "the backup; what is there now is kept beside it"})
    rotate: Argument = ("--rotate", {"action": "store_true", "help": "make a new one; the old is void"})
    verb("serve", cli_serve, "run the daemon", PORT, listen, kind)
    verb("demo", cli_demo, f"a hive to try, in ./{DEMO_DIR} unless --dir names another folder", PORT, browser, claude)
    verb("usage", cli_usage, "tokens and cost, by day and agent", days)
    verb("url", cli_url, "the dashboard's link, with the token")
    verb("token", cli_token, "the dashboard's token", rotate)
    verb("backup", cli_backup, "write a copy of the database", copy_file)
    verb("restore", cli_restore, "put a backup back (the daemon must be stopped)", back_file)
    verb("doctor", cli_doctor, "check what can be wrong, and name the fix")


def add_agent_verbs(verb: Callable[..., None]) -> None:
    names: Argument = ("names", {"metavar": "NAME", "nargs": "+", "help": "agents"})
    now_help = "kill them, instead of interrupting their turns and letting them end in order"
    now: Argument = ("--now", {"action": "store_true", "help": now_help})
    interrupt: Argument = ("--now", {"action": "store_true", "help": "interrupt its turn, instead of waiting"})
    everyone: Argument = ("--all", {"action": "store_true", "help": "every agent"})
    purge: Argument = ("--purge", {"action": "store_true", "help": "wipe notes, sign-in, config and mail, too"})
    yes: Argument = ("--yes", {"action": "store_true", "help": "don't ask"})
    description: Argument = ("--description", {"default": "", "help": "what it is for"})
    new_help = f"at most {NAME_MAX} of a-z, 0-9 and -; it begins with a letter and does not end with -"
    new: Argument = ("name", {"metavar": "NAME", "help": new_help})
    lines = how_many("--lines", 100, "so many of the last")
    verb("list", cli_list, "the agents")
    verb("status", cli_status, "does anything need me? or all of one agent", an_agent_or("what waits for you"))
    verb("spawn", cli_deploy, "make an agent, or revive a destroyed one", new, description, WAIT)
    verb("rebuild", cli_deploy, "deploy an agent's present config again", AN_AGENT, WAIT)
    verb("rollback", cli_deploy, "deploy the config before the present one", AN_AGENT, WAIT)
    verb("start", cli_start_stop, "start agents", names)
    verb("stop", cli_start_stop, "stop agents", names, now)
    verb("restart", cli_restart, "restart an agent", AN_AGENT)
    verb("pause", cli_pause, "give an agent no more mail", an_agent_or("say --all"), everyone)
    verb("resume", cli_pause, "the reverse of pause", an_agent_or("say --all"), everyone)
    verb("attach", cli_attach, "talk to an agent's Claude yourself, on its session", AN_AGENT, interrupt)
    verb("destroy", cli_destroy, "remove an agent", AN_AGENT, purge, yes)
    verb("logs", cli_logs, "what an agent's harness logged", AN_AGENT, lines, FOLLOW)
    verb("events", cli_events, "what agents do, event by event", an_agent_or("all"), lines, FOLLOW)


def add_operator_verbs(verb: Callable[..., None]) -> None:
    """Verbs that decide, write and read."""
    to: Argument = ("to", {"metavar": "TO", "help": "an agent, or * for all"})
    text: Argument = ("text", {"metavar": "TEXT", "help": "- reads it from standard input"})
    question: Argument = ("id", {"metavar": "ID", "type": int, "help": "of a question: `pending` shows it"})
    most = how_many("--max", 50, "so many of the last")
    unread: Argument = ("--unread", {"action": "store_true", "help": "only what is new"})
    keep: Argument = ("--keep", {"action": "store_true", "help": "don't mark them as read"})
    verb("pending", cli_pending, "requests and questions that wait for you")
    verb("show", cli_show, "one request, with its diff", A_REQUEST)
    verb("approve", cli_approve, "let a request happen", A_REQUEST, NOTE, WAIT)
    verb("deny", cli_deny, "refuse a request", A_REQUEST, NOTE)
    verb("send", cli_send, "write to an agent, or to all", to, text)
    verb("inbox", cli_inbox, "what agents wrote to you", most, unread, keep)
    verb("answer", cli_answer, "answer a question", question, text)


def config_from(args: argparse.Namespace) -> Config:
    """Settings: the command line over the environment over the file over the defaults."""
    folder = getattr(args, "dir", None)
    if folder is None and args.verb == "demo":
        folder = args.dir = DEMO_DIR
    state = getattr(args, "state_dir", None) or (f"{folder}/state" if folder else os.environ.get("HYPERHIVE_STATE_DIR"))
    runtime = getattr(args, "runtime_dir", None) or (
        f"{folder}/run" if folder else os.environ.get("HYPERHIVE_RUNTIME_DIR")
    )
    overrides = {key: getattr(args, key, None) for key in ("port", "listen_address", "containers")}
    file = getattr(args, "config", None) or os.environ.get("HYPERHIVE_CONFIG")
    return load_config(file, state_dir=state, runtime_dir=runtime, **overrides)


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows fewer characters than agents do
    args = make_parser().parse_args(argv)
    args.json = getattr(args, "json", False)
    try:
        args.handler(Cli(args, config_from(args)))
        sys.stdout.flush()
    except Refused as error:
        report_error(error, as_json=args.json)
        return 2 if error.code == "usage" else 1
    except UnicodeDecodeError:
        report_error(Refused("usage", "standard input is no UTF-8"), as_json=args.json)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def report_error(error: Refused, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(error.as_json()), file=sys.stderr)
        return
    print(f"hyperhive: {visible(error.message)}", file=sys.stderr)
    for line in error.hint.splitlines():
        print(f"  {visible(line)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
