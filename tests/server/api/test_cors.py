"""Web pages of the allowed origins may read answers and errors; others may not."""

import httpx
import pytest

from fake_engine import FakeTokenizer

PAGE = "https://app.example"
URL = "/v1/completions"


def preflight(client: httpx.AsyncClient, origin: str = PAGE, method: str = "POST"):
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    return client.options(URL, headers=headers)


def allowed(response: httpx.Response) -> dict[str, str]:
    """The headers that allow something."""
    prefix = "access-control-allow-"
    given = response.headers.items()
    return {name.removeprefix(prefix): value for name, value in given if name.startswith(prefix)}


async def test_closed_by_default(client):
    response = await preflight(client)
    assert (response.status_code, allowed(response)) == (405, {})
    response = await client.post(URL, json={"prompt": "x"}, headers={"origin": PAGE})
    assert (response.status_code, allowed(response)) == (200, {})


async def test_a_preflight_needs_no_key(client_for):
    client = client_for(api_key="right", allow_origin=("http://other", PAGE))
    response = await preflight(client)
    assert response.status_code == 200
    assert allowed(response) == {
        "origin": PAGE,
        "methods": "GET, HEAD, POST",
        "headers": "authorization,content-type,x-stainless-lang",
    }
    assert "Origin" in response.headers["vary"]


@pytest.mark.parametrize("key", ["right", None])
@pytest.mark.parametrize("origin", ["https://evil.example", "https://app.example.evil", "null"])
async def test_a_foreign_preflight_hears_nothing(client_for, key, origin):
    response = await preflight(client_for(api_key=key, allow_origin=(PAGE,)), origin)
    assert response.status_code == (405 if key is None else 401)
    assert response.json()["error"]
    assert not [name for name in response.headers if name.startswith("access-control")]


async def test_a_preflight_for_another_method_is_refused_in_our_shape(client_for):
    response = await preflight(client_for(allow_origin=(PAGE,)), method="DELETE")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "cors_refused"
    assert "method" in response.json()["error"]["message"]


async def test_answers_and_errors_can_be_read_by_the_page(client_for, worker):
    client = client_for(api_key="right", allow_origin=(PAGE,), max_body="1KiB")
    key = {"authorization": "Bearer right", "origin": PAGE}
    body = {"prompt": "x"}

    class Broken(FakeTokenizer):
        def encode(
            self, text: str, most_tokens: int | None = None, *, add_special_tokens: bool = True
        ) -> list[int]:
            raise ValueError

    responses = [
        await client.post(URL, json=body, headers=key),
        await client.post(URL, json={}, headers=key),
        await client.post(URL, json=body, headers={"origin": PAGE}),
        await client.get("/nowhere", headers=key),
        await client.get(URL, headers=key),
        await client.post(URL, json={"prompt": "x" * 2000}, headers=key),
    ]
    worker.tokens = Broken()
    responses.append(await client.post(URL, json=body, headers=key))
    assert [r.status_code for r in responses] == [200, 400, 401, 404, 405, 413, 500]
    for response in responses:
        assert allowed(response) == {"origin": PAGE}
        assert "x-request-id" in response.headers["access-control-expose-headers"]
        assert "Origin" in response.headers["vary"]
        assert response.headers["x-request-id"]


async def test_a_foreign_page_reads_nothing(client_for):
    client = client_for(allow_origin=(PAGE,))
    response = await client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert (response.status_code, allowed(response)) == (200, {})
    assert response.headers["vary"] == "Origin"


async def test_the_star_is_for_all_and_never_with_credentials(client_for):
    client = client_for(api_key="right", allow_origin=("*",))
    response = await preflight(client, "https://anyone.example")
    assert response.status_code == 200
    assert allowed(response)["origin"] == "*"
    assert "credentials" not in allowed(response)
    response = await client.get("/v1/models", headers={"origin": PAGE, "cookie": "a=b"})
    assert (response.status_code, allowed(response)) == (401, {"origin": "*"})
