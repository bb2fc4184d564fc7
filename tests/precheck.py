"""What the host must find out about a proposed config, in any hive with the real Nix: configs, and what to expect."""

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import psutil
from hive import wait_for

LAST = ("ok", "failed", "timed_out")
FOR_EVER = str(100_000_000 + os.getpid())  # seconds; nobody else's process sleeps as long


class Asked(Protocol):
    """A hive, or a box with one in it."""

    def ask(self, **request: Any) -> dict[str, Any]: ...


class Case(NamedTuple):
    """A config with one line of its own, or whose build runs a script, and the verdict on it."""

    line: str = ""
    script: str = ""
    state: str = "failed"
    stages: tuple[str, ...] = ()
    at: dict[str, Any] | None = None
    error: str = ""
    log: str = ""

    def config(self, built_by: Callable[[str], str]) -> str:
        line = built_by(self.script) if self.script else self.line
        return f"{{ pkgs, ... }}:\n{{\n  {line}\n}}\n"

    def check(self, found: dict[str, Any], log: str) -> None:
        assert found["state"] == self.state, (found, log)
        assert [stage for stage in ("evaluates", "builds") if stage in found] == [*self.stages]
        assert found.get("at") == self.at, (found, log)
        assert self.error in found.get("error", "") and self.log in log, (found, log)
        assert found["seconds"] > 0


BUILDS = Case(script="mkdir -p $out; head -c 3000000 /dev/zero > $out/big", state="ok", stages=("evaluates", "builds"))
HANGS = Case(script=f"sleep {FOR_EVER}", state="timed_out", stages=("evaluates",), error="did not end within")
DOES_NOT_BUILD = Case(
    script="echo these are its last words; exit 7",
    stages=("evaluates",), error="exit code 7", log="these are its last words",
)  # fmt: skip
CASES = {
    "builds": BUILDS,
    "syntax error": Case(
        line="networking.hostName = ;", at={"path": "agent.nix", "line": 3}, error="syntax error, unexpected ';'"
    ),
    "does not build": DOES_NOT_BUILD,
    "reads a host file": Case(
        line="networking.hostName = builtins.readFile /etc/shadow;",
        at={"path": "agent.nix", "line": 3},
        error="access to absolute path '/etc",
    ),
}


def verdict(hive: Asked, approval: int, *states: str) -> dict[str, Any]:
    """The pre-check of a request when it has come to one of these states, by default any last one."""

    def look() -> Any:
        found = hive.ask(cmd="show", id=approval)["approval"]["precheck"]
        return found if found["state"] in (states or LAST) else None

    return wait_for(look, f"{' or '.join(states or LAST)} of request {approval}", timeout_s=100)


def line_of(diff: str, at: dict[str, Any]) -> str:
    """Where the page marks the diff: the line of the new file with this number."""
    number = 0
    for line in diff.partition(f"+++ b/{at['path']}\n")[2].partition("\ndiff --git ")[0].splitlines():
        if place := re.match(r"@@ -\S+ \+(\d+)", line):
            number = int(place[1]) - 1
        elif not line.startswith("-"):
            number += 1
            if number == at["line"]:
                return line
    raise AssertionError(f"no line {at} in the diff:\n{diff}")


def builders() -> list[psutil.Process]:
    """Of what would build for ever, with what is known of them."""
    found = psutil.process_iter(["cmdline", "nice"])
    return [process for process in found if process.info["cmdline"] == ["sleep", FOR_EVER]]
