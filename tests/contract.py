"""static/openapi.json, and what an answer of the dashboard must be by it. `Hive.api` asks this of every answer."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs

DOCUMENT = json.loads((Path(__file__).resolve().parent.parent / "static/openapi.json").read_text())
METHODS = ("get", "post", "put", "patch", "delete")
OPERATIONS: dict[tuple[str, str], dict[str, Any]] = {
    (method.upper(), path): operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method in METHODS
}


def template_of(method: str, path: str) -> str | None:
    """The documented path that this one is an instance of; one without variables goes first."""
    path = path.partition("?")[0]
    for template in sorted((template for known, template in OPERATIONS if known == method), key=lambda it: "{" in it):
        if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template)), path):
            return template
    return None


def resolved(part: dict[str, Any]) -> dict[str, Any]:
    """What a reference leads to."""
    found = DOCUMENT if "$ref" in part else part
    for step in part.get("$ref", "").split("/")[1:]:
        found = found[step]
    return found


@cache
def validator(schema: str) -> Any:
    whole = {"components": DOCUMENT["components"], **json.loads(schema)}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True)


def conforms(value: Any, schema: dict[str, Any] | str) -> bool:
    """`schema` may be the name of one; a failed assertion says where the value differs."""
    if isinstance(schema, str):
        schema = {"$ref": f"#/components/schemas/{schema}"}
    errors = [
        f"{'/'.join(map(str, error.instance_path))}: {error.message}"
        for error in validator(json.dumps(schema)).iter_errors(value)
    ]
    assert not errors, f"not as static/openapi.json says: {errors[:5]}"
    return True


def check(method: str, path: str, status: int, content_type: str, body: Any) -> None:
    """An answer to this request: its status is documented, and its body is of the schema."""
    template = template_of(method, path)
    if template is None:
        refused = method == "HEAD" or status in (400, 403, 404, 405, 431)
        assert refused, f"{method} {path} gave {status}, and is not documented"
        assert method == "HEAD" or conforms(body, "Error")
        return
    responses = OPERATIONS[method, template]["responses"]
    assert str(status) in responses, f"{method} {template} gave {status}, which is not documented: {body}"
    content = resolved(responses[str(status)]).get("content")
    if content is None:
        assert body == "", f"{method} {template} gave {status} with a body, which is not documented"
        return
    assert content_type in content, f"{method} {template} gave {content_type}, which is not documented"
    conforms(body, content[content_type]["schema"])
