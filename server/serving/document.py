"""What FastAPI's OpenAPI document lacks: the key, headers, and answers given before any route."""

from typing import Any

from moestro.server.api import OPEN_PATHS
from moestro.server.contract import DOCUMENTED

SCHEME = "ApiKey"
# The connection's answers: to a head or body that is late or no HTTP, to one connection too many;
# and a bug's.
ANYWHERE = ("400", "408", "500", "503")
ALL = "*"
_HEADERS: dict[str, dict[str, str]] = {
    ALL: {"x-request-id": "The client's own if it is sane, else a new one"},
    "401": {"WWW-Authenticate": "Bearer"},
    "503": {"Retry-After": "Seconds"},
}


def complete(schema: dict[str, Any], *, has_keys: bool) -> None:
    """Adds it in place. FastAPI's 422 goes: here they are 400s."""
    for path, operations in schema["paths"].items():
        needs_key = has_keys and path not in OPEN_PATHS
        for operation in operations.values():
            _complete_operation(operation, needs_key)
    components = schema.setdefault("components", {})
    for name in ("HTTPValidationError", "ValidationError"):
        components.get("schemas", {}).pop(name, None)
    if has_keys:
        components["securitySchemes"] = {SCHEME: {"type": "http", "scheme": "bearer"}}


def _complete_operation(operation: dict[str, Any], needs_key: bool) -> None:
    responses: dict[str, Any] = operation["responses"]
    responses.pop("422", None)
    responses.pop("401", None)
    added = [*ANYWHERE, *(["401"] if needs_key else [])]
    added += ["413"] if "requestBody" in operation else []
    for status in added:
        responses.setdefault(status, _error(status))
    if "requestBody" not in operation:
        responses.pop("413", None)  # a body that nobody reads is never too large
    if needs_key:
        operation["security"] = [{SCHEME: []}]
    for status, response in responses.items():
        headers = _HEADERS[ALL] | _HEADERS.get(status, {})
        response["headers"] = {
            name: {"description": words, "schema": {"type": "string"}}
            for name, words in headers.items()
        }


def _error(status: str) -> dict[str, Any]:
    reference = {"$ref": "#/components/schemas/ErrorResponse"}
    return {
        "description": DOCUMENTED[int(status)]["description"],
        "content": {"application/json": {"schema": reference}},
    }
