"""Every error has OpenAI's shape, whoever raised it."""

import httpx
import pytest

from fake_engine import FakeTokenizer
from moestro.engine import EngineError, NotReady, PromptTooLong, RequestError, Unavailable
from moestro.server.contract.errors import MAX_MESSAGE_CHARS, problem_of

URL = "/v1/completions"
JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status
    assert response.headers["x-request-id"]
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] and error["code"]
    return error


async def test_unknown_path(client):
    assert error_of(await client.get("/nowhere"), 404)["code"] == "not_found"


async def test_wrong_method(client):
    response = await client.get(URL)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b'{"prompt": "secret',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
    ],
)
async def test_broken_json(client, content):
    response = await client.post(URL, content=content, headers=JSON)
    error_of(response, 400)
    assert "secret" not in response.text


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'"text"', b"3"])
async def test_body_that_is_no_object(client, content):
    error = error_of(await client.post(URL, content=content, headers=JSON), 400)
    assert "JSON object" in error["message"]


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}])
async def test_body_that_is_not_declared_json(client, headers):
    response = await client.post(URL, content=b'{"prompt": "x"}', headers=headers)
    assert "application/json" in error_of(response, 400)["message"]


async def test_missing_field(client):
    error = error_of(await client.post(URL, json={}), 400)
    assert (error["code"], error["param"]) == ("missing_required_parameter", "prompt")


async def test_values_are_not_echoed(client):
    response = await client.post(URL, json={"prompt": "x", "temperature": "secret"})
    error_of(response, 400)
    assert "secret" not in response.text


async def test_long_names_are_cut(client):
    error = error_of(await client.post(URL, json={"prompt": "x", "model": "m" * 10_000}), 404)
    assert len(error["message"]) < 300


async def test_a_bug_is_a_500_and_tells_nothing(client, worker):
    class Broken(FakeTokenizer):
        def encode(
            self, text: str, most_tokens: int | None = None, *, add_special_tokens: bool = True
        ) -> list[int]:
            raise ValueError("secret detail")

    worker.tokens = Broken()
    response = await client.post(URL, json={"prompt": "x"}, headers={"x-request-id": "r-7"})
    assert error_of(response, 500)["code"] == "internal_error"
    assert response.headers["x-request-id"] == "r-7"
    assert "secret" not in response.text


def test_new_leaves_are_answered_like_their_parent():
    class Leaf(NotReady):
        pass

    assert problem_of(Leaf("x")).row is problem_of(NotReady("x")).row


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PromptTooLong("x"), 400),
        (RequestError("x"), 400),
        (Unavailable("x"), 503),
        (EngineError("x"), 500),
    ],
)
def test_every_branch_of_the_tree_has_a_row(error, status):
    assert problem_of(error).row.status == status


def test_messages_are_bounded():
    body = problem_of(RequestError("x" * 10_000)).body()
    assert len(body["error"]["message"]) == MAX_MESSAGE_CHARS


@pytest.mark.parametrize(
    "path",
    [
        "/v1/v1/completions",
        "/v1/completions/",
        "/v1/embeddings",
        "/",
        "/x" * 600,
    ],
)
async def test_a_path_that_is_not_served_is_told_which_are(client, path):
    response = await client.post(path, json={"prompt": "x"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "not_found")
    assert path[:90] in error["message"]
    for served in ("/v1/completions,", "/v1/models,", "/health,", "/metrics"):
        assert served in error["message"]


async def test_a_path_of_two_slashes_is_another_path(serving, worker):
    async with serving(worker) as url, httpx.AsyncClient() as client:
        answer = await client.post(f"{url}//v1/completions", json={"prompt": "x"})
    assert answer.status_code == 404
    assert "'//v1/completions'" in answer.json()["error"]["message"]
