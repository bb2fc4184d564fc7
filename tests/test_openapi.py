"""static/openapi.json: it is valid, it names exactly what the dashboard serves, and a real hive speaks as it says."""

import re
import subprocess
import sys
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import contract
import openapi_spec_validator
import pytest
from fakes.receiver import Receiver
from hive import ROOT, Answer, Hive, Line, wait_for
from test_approvals import CONFIG, Source, approve, proposed
from test_dashboard import TABLE, Stream

NOW = "2030-01-31T08:00:00Z"
# What a hive of process containers never says.
ELSEWHERE = {
    "Precheck": {"state", "evaluates", "builds", "packages", "error", "at", "seconds"},
    "Package": {"name", "bytes", "from", "to"},
    "Approval": {"precheck"},
}


def test_the_document_is_valid_and_says_what_everything_means() -> None:
    openapi_spec_validator.validate(contract.DOCUMENT)
    for name, schema in contract.DOCUMENT["components"]["schemas"].items():
        assert "description" in schema, name
        for key, field in schema.get("properties", {}).items():
            assert "description" in contract.resolved(field), (name, key)
    for where, operation in contract.OPERATIONS.items():
        assert operation["summary"] and operation["operationId"], where
        assert all(contract.resolved(parameter)["description"] for parameter in operation.get("parameters", [])), where


def test_it_names_every_route_with_what_it_takes() -> None:
    documented, served = {}, {}
    for where, operation in contract.OPERATIONS.items():
        parameters = map(contract.resolved, operation.get("parameters", []))
        query = {parameter["name"] for parameter in parameters if parameter["in"] == "query"}
        body = set(operation.get("requestBody", {}).get("content", []))
        documented[where] = (query, body, operation.get("security") == [])
    for route in TABLE:
        path = re.sub(r"<(\w+)(:int)?>", r"{\1}", route.path)
        body = {route.takes} if route.method == "POST" else set()
        served[route.method, path] = (set(route.query), body, route.open)
    assert documented == served


def test_each_operation_has_the_refusals_that_all_have() -> None:
    for (method, path), operation in contract.OPERATIONS.items():
        expected = {"200", "400", "403", "431", "500"}
        expected |= set() if operation.get("security") == [] else {"401", "429"}
        expected |= {"413", "415", "507"} if method == "POST" else set()
        assert expected <= operation["responses"].keys(), (method, path)
        assert method == "GET" or operation["requestBody"]["required"], path  # a type must be named at least


def test_a_daemon_serves_each_path_by_the_methods_that_are_documented(crew: Hive) -> None:
    methods = defaultdict(set)
    for method, path in contract.OPERATIONS:
        methods[path].add(method)
    for path, expected in methods.items():
        real = path.replace("/static/{file}", "/static/app.css").replace("{name}", "alice").replace("{number}", "1")
        for method in ("PUT", "OPTIONS", *({"GET", "POST"} - expected)):
            answer = crew.api(method, real, {} if method == "POST" else None)
            assert answer.status == 405, (method, path)
            assert set(answer.headers["Allow"].split(",")) - {"HEAD"} == expected, path


# ── a hive in which things happened ──


class Recorded(Hive):
    """Which operations were answered with which status, and which fields of which schema were seen."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self.statuses: dict[tuple[str, str], set[int]] = defaultdict(set)
        self.fields: dict[str, set[str]] = defaultdict(set)

    def api(self, method: str, path: str, body: Any = None, **more: Any) -> Answer:
        answer = super().api(method, path, body, **more)
        if (method, template := contract.template_of(method, path)) in contract.OPERATIONS:
            self.statuses[method, template].add(answer.status)  # type: ignore[index]
            responses = contract.OPERATIONS[method, template]["responses"]  # type: ignore[index]
            content = contract.resolved(responses[str(answer.status)])["content"]
            self.note(answer.body, content[answer.headers.get_content_type()]["schema"])
        return answer

    def note(self, value: Any, schema: dict[str, Any]) -> None:
        name = schema.get("$ref", "").rpartition("/")[2]
        schema = contract.resolved(schema)
        if isinstance(value, list):
            for entry in value:
                self.note(entry, schema.get("items", {}))
        elif isinstance(value, dict):
            self.fields[name] |= value.keys()
            for key, entry in value.items():
                self.note(entry, schema.get("properties", {}).get(key, {}))

    def good(self, path: str, /, **body: Any) -> Any:
        answer = self.api("POST", path, body)
        assert answer.status == 200, (path, answer.body)
        return answer.body


def test_everything_that_a_hive_says_is_documented_and_the_other_way_round(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"undo_s": 600.0, "daily_budget_usd": 5.0, "hive_daily_budget_usd": 50.0}
    with Receiver() as receiver, Recorded(folder, notify_url=receiver.url, **settings) as hive:
        hive.spawn("manager", "alice", "bob", "gone")
        with hive.agent("manager") as manager, hive.agent("alice") as alice, hive.agent("bob") as bob:
            mail_of_each_kind(hive, manager, alice, bob)
            reports_of_each_kind(alice, bob)
            look_at_everything(hive)
            requests_of_each_kind(hive, manager, Source(folder / "source"))
            look_at_everything(hive)
        a_life(hive)
        a_deploy_that_fails(hive, monkeypatch)
        look_at_everything(hive)
        mistakes(hive)
    for where in contract.OPERATIONS.keys() - {("GET", "/api/stream")}:
        assert 200 in hive.statuses[where], where
        documented = contract.OPERATIONS[where]["responses"].keys() & {"400", "404", "409"}
        assert where[0] == "GET" or {int(status) for status in documented} & hive.statuses[where], where
    for name, schema in contract.DOCUMENT["components"]["schemas"].items():
        unseen = schema.get("properties", {}).keys() - hive.fields[name] - ELSEWHERE.get(name, set())
        assert not unseen, f"{name} is said to have {unseen}, which nobody sent"


def mail_of_each_kind(hive: Recorded, manager: Line, alice: Line, bob: Line) -> None:
    first = hive.good("/api/messages", to="bob", body="hello", client_id="one")["id"]
    hive.good("/api/messages", to="*", body="hello, all of you")
    hive.good("/api/messages", to="operator", body="a note to myself", in_reply_to=first)
    bob.ask("send", to="bob", body="typed", via="page")
    for _ in range(5):  # given back too often
        bob.ask("nack", ids=[row["id"] for row in bob.ask("lease", max=1, wait_s=0)["messages"]])
    hive.good(f"/api/messages/{first}/give_again")
    with hive.agent("alice") as other:
        other.ask("lease", max=1, wait_s=0)  # it hangs up: that message comes again
    wait_for(lambda: "redelivered" in str(alice.ask("lease", max=1, wait_s=0)), "a message to come again")
    reply = bob.ask("send", to="operator", body="done", in_reply_to=first)["id"]
    assert hive.good("/api/messages/read", ids=[reply])["read"] == 1
    asked = [
        alice.ask("ask", question="Which?", options=["a", "b"], multi=True, ttl_s=600),
        alice.ask("ask", question="Why?"),
        alice.ask("ask", question="When?"),
        alice.ask("ask", question="Where?", to="bob"),
    ]
    hive.good(f"/api/questions/{asked[1]['id']}/answer", text="because")
    hive.good(f"/api/questions/{asked[2]['id']}/cancel")
    alice.ask("remind", body="look again", delay_s=3600)
    numbers = [hive.good("/api/schedules", to="bob", body="look", first=NOW, every_s=60)["id"] for _ in "ab"]
    hive.good(f"/api/schedules/{numbers[0]}/cancel")
    octets = {"Content-Type": "application/octet-stream"}
    kept = [hive.api("POST", "/api/files?name=a%20plan.txt", "a plan", headers=octets).body["name"] for _ in "ab"]
    hive.good("/api/files/delete", name=kept[0])
    hive.good("/api/notify/test")


def reports_of_each_kind(alice: Line, bob: Line) -> None:
    counts = dict.fromkeys(("input_tokens", "output_tokens", "cache_read_tokens", "cache_creation_tokens"), 10)
    usage = {"turn": "t", "cost_usd": 4.5, "duration_ms": 1, "context_tokens": 10, "context_window": 100, **counts}
    event = {"id": 10**6, "at": NOW, "turn": 1, "kind": "text", "data": {"text": "hi"}}
    login = {"phase": "failed", "url": "https://claude.example/", "error": "wrong code"}
    state = {"state": "needs_login", "reason": "signed out", "login": login, "model": "m", "session": "s"}
    assert alice.ask("report", events=[event], usage=usage, state=state)["ok"]
    limited = {"state": "rate_limited", "reason": "wait", "until": NOW}
    assert bob.ask("report", state={**limited, "signed_in_until": NOW, "signed_in_renews": True})["ok"]
    alice.ask("set_status", text="reading")


def requests_of_each_kind(hive: Recorded, manager: Line, source: Source) -> None:
    def ask(verb: str, **fields: Any) -> str:
        answer = manager.ask(verb, **fields)
        assert answer["ok"], answer
        return f"/api/approvals/{answer['id']}"

    def digest(path: str) -> str:
        return str(hive.api("GET", path).body["approval"]["digest"])

    manager.ask("lease", max=1, wait_s=0)  # what it has in hand is why it asks
    spawn = ask("request_spawn", name="carol", description="helps", config=CONFIG)
    assert hive.api("GET", f"{spawn}/files").body["files"] == {"agent.nix": CONFIG}
    assert hive.api("GET", f"{spawn}/precheck").body == {"log": []}
    with Stream(hive) as stream:
        stream.next()
        hive.good(f"{spawn}/approve", undo=True, digest=digest(spawn))
        look_at_everything(hive)
        hive.good(f"{spawn}/undo")
        stream.until("deploy_gone")
    hive.good(f"{spawn}/edit", path="agent.nix", text="{ }\n", digest=digest(spawn))
    hive.good(f"{spawn}/deny", note="not now")
    ask("request_spawn", name="carol", description="once more")
    proposed(hive, source, {"agent.nix": b"{ older }\n"})
    newer, _ = proposed(hive, source, {"agent.nix": b"{ newer }\n"})
    apply = f"/api/approvals/{newer}"
    hive.good(f"{apply}/edit", path="agent.nix", text="{ mine }\n", digest=digest(apply))
    look_at_everything(hive)
    approve(hive, newer, note="good")
    shas = [row["sha"] for row in hive.api("GET", "/api/deploys?agent=alice").body["deploys"]]
    assert hive.api("GET", f"/api/agents/alice/diff?from={shas[1]}&to={shas[0]}").body["files"]
    schedule = ask("request_schedule", to="bob", body="look", first=NOW, every_s=60)
    look_at_everything(hive)
    hive.good(f"{schedule}/approve")
    ask("request_schedule", to="gone", body="look", first=NOW)
    cancelled = ask("request_spawn", name="dave", description="helps")
    manager.ask("cancel_request", id=int(cancelled.rpartition("/")[2]))
    long, _ = proposed(hive, source, dict.fromkeys(("agent.nix", "b", "c", "d"), b"x\n" * 2**19))
    assert hive.api("GET", f"/api/approvals/{long}").body["approval"]["cut_bytes"]
    hive.good(f"/api/approvals/{long}/deny")


def a_life(hive: Recorded) -> None:
    """All that can be done with an agent, whose Claude is the rehearsal."""

    def is_idle() -> bool:
        return bool(hive.api("GET", "/api/agents/eve").body["agent"]["state"] == "idle")

    deploy = hive.good("/api/agents", name="eve", description="explores")["deploy_id"]
    wait_for(lambda: hive.phase(deploy) == "deployed", "the deploy")
    hive.good("/api/agents/eve/model", model="other")
    for action in ("pause", "resume", "stop", "start", "kill", "restart"):
        hive.good(f"/api/agents/eve/{action}")
        look_at_everything(hive)
    wait_for(is_idle, "eve to be idle")
    for action in ("interrupt", "compact", "new_session", "send_notes", "login_begin"):
        hive.good(f"/api/agents/eve/{action}")
    hive.good("/api/agents/eve/login_finish", code="right#code")
    hive.good("/api/agents/eve/login_cancel")
    with closing(Line(hive.run / "host.sock")) as keyboard:
        assert keyboard.ask("attach", name="eve", now=True)["ok"]
        look_at_everything(hive)
    hive.good("/api/agents/alice/rollback")
    deploy = hive.good("/api/agents/eve/rebuild")["deploy_id"]
    wait_for(lambda: hive.phase(deploy) == "deployed", "the rebuild")
    hive.good("/api/agents/gone/destroy", confirm="gone")
    for paused in (True, False):
        hive.good("/api/pause_all", paused=paused)


def a_deploy_that_fails(hive: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    pending = hive.api("GET", "/api/approvals?status=pending").body["approvals"]
    (carol,) = (row["id"] for row in pending if row["agent"] == "carol")
    hive.stop()
    monkeypatch.setenv("HYPERHIVE_BACKOFF_S", "soon")  # no number: a harness ends at once
    hive.start()
    approve(hive, carol)


def look_at_everything(hive: Recorded) -> None:
    for path in ("/", "/static/openapi.json", "/static/app.js", "/static/icon.svg", "/healthz", "/metrics"):
        assert hive.api("GET", path).status == 200, path
    lists = ("agents", "approvals", "messages", "questions", "deploys", "schedules", "files", "usage", "audit")
    rows = {name: hive.api("GET", f"/api/{name}").body[name] for name in lists}
    for path in ("/api/state", "/api/system", "/api/doctor"):
        assert hive.api("GET", path).status == 200, path
    paths = [f"/api/agents/{agent['name']}" for agent in rows["agents"]]
    paths += [f"{path}/events" for path in paths]
    paths += [f"/api/approvals/{row['id']}" for row in rows["approvals"]]
    paths += [f"/api/deploys/{row['id']}" for row in rows["deploys"]]
    paths += [f"/api/messages/{row['id']}/thread" for row in rows["messages"]]
    for path in paths:
        assert hive.api("GET", path).status == 200, path


def mistakes(hive: Recorded) -> None:
    """Each change with something unknown or of the wrong type in it, and for something that is not there."""
    for (method, template), operation in contract.OPERATIONS.items():
        if method == "POST":
            headers = {"Content-Type": next(iter(operation["requestBody"]["content"]))}
            for name, number in (("bob", 1), ("nobody", 9999), ("NO", 0)):
                path = template.replace("{name}", name).replace("{number}", str(number))
                for body in ({"surprise": 1}, {"name": 7}):
                    assert hive.api("POST", path, body, headers=headers).status in (400, 404, 409), path


# ── fuzzing ──

SEED = 2030
# What a schema can't say: a name that stands twice, which characters are printable, how many bytes a text has.
FUZZING = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 409, 413, 415, 422, 431]
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 401, 403, 404, 409, 413, 422, 429]
[[operations]]
include-path-regex = "/destroy$|/api/files$"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 401, 403, 404, 409, 413]
"""


@pytest.mark.timeout(600)
def test_under_fuzz_the_daemon_keeps_to_the_document(folder: Path) -> None:
    """No 5xx, no answer but the documented ones, wrong data refused, no token 401, other methods 405."""
    settings = folder / "schemathesis.toml"
    settings.write_text(FUZZING)
    limits = {"wrong_tokens_per_minute": 10**6, "messages_per_minute": 0}
    with Hive(folder, limits=limits) as hive:
        hive.spawn("manager", "alice", "bob")
        with hive.agent("manager") as manager:
            manager.ask("request_spawn", name="carol", description="helps", config=CONFIG)
            manager.ask("ask", question="Which?")
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), "run"]
        command += [str(ROOT / "static/openapi.json"), "--url", hive.url, "--exclude-path", "/api/stream"]
        command += ["--header", f"Authorization: Bearer {hive.token}", "--warnings", "off", "--no-color"]
        command += ["--max-examples", "5", "--seed", str(SEED), "--request-timeout", "60"]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert ran.returncode == 0, f"{ran.stdout[-20_000:]}{ran.stderr[-2000:]}"
        assert "No issues found" in ran.stdout
        assert hive.api("GET", "/api/state").status == 200
        log = hive.log.read_text()
        assert "Traceback" not in log and "ERROR" not in log
