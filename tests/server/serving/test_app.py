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
    assert set(responses) == {"200", "400", "401", "404", "413", "500", "503"}
    for status in ("400", "401", "404", "413", "500", "503"):
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


async def test_no_pages_that_load_scripts_from_elsewhere(client):
    for path in ("/docs", "/redoc"):
        assert (await client.get(path)).status_code == 404
    assert (await client.get("/openapi.json")).status_code == 200
