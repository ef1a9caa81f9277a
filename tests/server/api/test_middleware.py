"""Ids, keys and sizes, before any route."""

import hmac

import httpx
import pytest

URL = "/v1/completions"
BODY = {"prompt": "x"}
KEY = {"authorization": "Bearer right"}


async def test_a_sane_id_is_kept_and_others_are_replaced(client):
    async def id_for(given: str) -> str:
        response = await client.get("/health", headers={"x-request-id": given})
        return response.headers["x-request-id"]

    assert await id_for("abc-1.2_3") == "abc-1.2_3"
    for given in ("", "a b", "x" * 129, "a/b", "{}"):
        assert await id_for(given) != given
    assert await id_for("") != await id_for("")


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer righ", "Bearer right ", "Basic right"],
)
@pytest.mark.parametrize("path", [URL, "/v1/models", "/openapi.json", "/nowhere", "/health/"])
async def test_everything_needs_the_key(client_for, worker, authorization, path):
    headers = {} if authorization is None else {"authorization": authorization}
    client = client_for(api_key="right")
    response = await client.post(path, json=BODY, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert not worker.submitted


async def test_the_key_opens(client_for):
    client = client_for(api_key="right")
    assert (await client.post(URL, json=BODY, headers=KEY)).status_code == 200


async def test_each_key_opens_and_nothing_made_of_them(client_for):
    client = client_for(api_key=("first", "second"))
    for given, status in (
        *(("first", 200), ("second", 200), ("third", 401), ("", 401)),
        *(("firstsecond", 401), ("first,second", 401), ("first second", 401), ("fïrst", 401)),
    ):
        headers = {"authorization": f"Bearer {given}".encode("latin-1")}
        assert (await client.post(URL, json=BODY, headers=headers)).status_code == status


async def test_every_key_is_compared_with_equal_lengths(client_for, monkeypatch):
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    client = client_for(api_key=("first", "right", "third"))
    assert (await client.post(URL, json=BODY, headers=KEY)).status_code == 200
    assert len(compared) == 3
    assert {len(side) for pair in compared for side in pair} == {32}


@pytest.mark.parametrize("authorization", ["Bearer ", "Bearer", "Bearer any", "Basic eA=="])
async def test_where_no_key_is_set_none_is_looked_at(client, authorization):
    """lm-eval sends `Bearer ` when it has none."""
    headers = {"authorization": authorization}
    assert (await client.post(URL, json=BODY, headers=headers)).status_code == 200


PATHS = {
    "/v1/completions": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/v1/models": "GET, HEAD",
    "/v1/models/demo": "GET, HEAD",
    "/tokenizer_info": "GET, HEAD",
    "/version": "GET, HEAD",
    "/health": "GET, HEAD",
    "/ready": "GET, HEAD",
    "/metrics": "GET, HEAD",
}


async def test_a_wrong_method_is_told_the_right_ones(client):
    for path, methods in PATHS.items():
        known = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
        for method in set(known) - set(methods.split(", ")):
            response = await client.request(method, path)
            assert (response.status_code, response.headers["allow"]) == (405, methods)
            if method != "HEAD":
                assert response.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", [path for path, methods in PATHS.items() if "HEAD" in methods])
async def test_head_is_get_without_a_body(serving, worker, path):
    async with serving(worker) as url, httpx.AsyncClient(base_url=url) as client:
        head, whole = await client.head(path), await client.get(path)
    assert head.status_code == whole.status_code == 200
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert (head.content, whole.content != b"") == (b"", True)


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "bEaReR"])
async def test_the_case_of_the_scheme_does_not_count(client_for, scheme):
    client = client_for(api_key="right")
    for key, status in (("right", 200), ("Right", 401)):
        headers = {"authorization": f"{scheme} {key}"}
        assert (await client.post(URL, json=BODY, headers=headers)).status_code == status


async def test_two_keys_are_none(client_for):
    headers = [("authorization", "Bearer right"), ("authorization", "Bearer wrong")]
    response = await client_for(api_key="right").post(URL, json=BODY, headers=headers)
    assert response.status_code == 401


@pytest.mark.parametrize("host", ["x/?", "x#", "x/health?", "health"])
async def test_host_header_opens_nothing(client_for, host):
    headers = {"host": host}
    response = await client_for(api_key="right").get("/v1/models", headers=headers)
    assert response.status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
async def test_watchers_need_no_key(client_for, path):
    assert (await client_for(api_key="right").get(path)).status_code == 200


async def test_large_body_by_its_length(client_for, worker):
    client = client_for(max_body="1KiB")
    response = await client.post(URL, json={"prompt": "x" * 1100})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert "1024 bytes" in response.json()["error"]["message"]
    page = (await client.get("/metrics")).text
    assert 'moestro_admission_rejections_total{reason="body_too_large"} 1.0' in page
    assert not worker.submitted


async def test_large_body_while_it_is_read(serving, worker):
    async def pieces():
        yield b'{"prompt": "'
        for _ in range(20):
            yield b"x" * 100

    async with serving(worker, max_body="1KiB") as url, httpx.AsyncClient(base_url=url) as client:
        headers = {"content-type": "application/json"}
        response = await client.post(URL, content=pieces(), headers=headers)
    assert response.status_code == 413


async def test_a_body_of_the_limit_passes(client_for):
    content = b'{"prompt": "x"}'.ljust(1024)
    headers = {"content-type": "application/json"}
    response = await client_for(max_body=1024).post(URL, content=content, headers=headers)
    assert response.status_code == 200
