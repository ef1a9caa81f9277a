"""The application as a whole: its document and its independence."""

import pytest

from fake_engine import FakeWorker
from moestro.server.facts.settings import Settings
from moestro.server.serving.app import create_app


@pytest.fixture
def document() -> dict:
    return create_app(FakeWorker(), Settings(model="demo")).openapi()


def test_statuses_are_documented_with_the_error_model(document):
    responses = document["paths"]["/v1/completions"]["post"]["responses"]
    assert set(responses) == {"200", "400", "404", "408", "413", "500", "503"}
    for status in ("400", "404", "408", "413", "500", "503"):
        schema = responses[status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorResponse"}
    assert "text/event-stream" in responses["200"]["content"]


def test_nothing_answers_422(document):
    assert "422" not in str(document)
    assert "HTTPValidationError" not in str(document)


def test_refused_parameters_are_documented(document):
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["suffix"]["enum"] == [None, ""]
    assert fields["prompt"]["anyOf"][0] == {"type": "string", "minLength": 1}
    assert "max_tokens" in fields


def test_what_is_answered_before_a_route_is_documented_on_each(document):
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            assert {"400", "408", "500", "503"} <= responses.keys()
            assert ("413" in responses) is ("requestBody" in operation)
            assert "401" not in responses and "security" not in operation, path
            assert all("x-request-id" in response["headers"] for response in responses.values())
            assert "Retry-After" in responses["503"]["headers"]


def test_where_keys_are_set_they_are_documented_but_for_open_paths():
    app = create_app(FakeWorker(), Settings(model="demo", api_key="hidden"))
    document = app.openapi()
    assert document is app.openapi()
    assert document["components"]["securitySchemes"] == {
        "ApiKey": {"type": "http", "scheme": "bearer"}
    }
    closed = set()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) is ("401" in operation["responses"])
            if "security" in operation:
                closed.add(path)
                assert operation["security"] == [{"ApiKey": []}]
                assert "WWW-Authenticate" in operation["responses"]["401"]["headers"]
    assert document["paths"].keys() - closed == {"/health", "/ready", "/metrics"}
    assert "hidden" not in str(document)


async def test_no_pages_that_load_scripts_from_elsewhere(client):
    for path in ("/docs", "/redoc"):
        assert (await client.get(path)).status_code == 404
    assert (await client.get("/openapi.json")).status_code == 200
