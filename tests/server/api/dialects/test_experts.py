"""The field `experts`: who chooses the experts of an answer; against a fake and a real engine."""

from dataclasses import replace
from typing import Any

import pytest

from chat_kit import HERMES, chatting
from exposition import samples
from fake_engine import FakeWorker

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Gravity is a force", "max_tokens": 8},
    CHAT: {"messages": [{"role": "user", "content": "Gravity is a force"}], "max_tokens": 8},
}


@pytest.fixture
def worker() -> FakeWorker:
    return chatting(HERMES)


HEADER = "x-moestro-experts"
BOTH = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


@BOTH
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("experts", "density", "told"),
    [
        (None, None, "token"),
        ({"mode": "token"}, None, "token"),
        ({"mode": "sequence"}, 0.5, "sequence; density=0.5"),
        ({"mode": "sequence", "density": 0.25}, 0.25, "sequence; density=0.25"),
        ({"mode": "sequence", "density": 1}, 1.0, "sequence; density=1"),
    ],
)
async def test_what_is_asked_for_reaches_the_engine_and_the_header(
    client, worker, path, stream, experts, density, told
):
    response = await client.post(path, json={**BODIES[path], "experts": experts, "stream": stream})
    assert response.status_code == 200
    assert worker.submitted[0].params.expert_density == density
    assert response.headers[HEADER] == told


@BOTH
async def test_the_header_says_where_neurons_are_chosen_too(client, worker, path):
    worker.info = replace(worker.info, neuron_layers=27)
    for experts, told in (
        ({"mode": "sequence", "density": 0.25}, "sequence; density=0.25; neuron-layers=27"),
        ({"mode": "token"}, "token"),
    ):
        response = await client.post(path, json={**BODIES[path], "experts": experts})
        assert response.headers[HEADER] == told


@BOTH
async def test_a_density_whose_copies_leave_no_room_is_refused_by_name(client, worker, path):
    def most(prompt_tokens: int, n: int = 1, density: float | None = None) -> int:
        return 100 if density is None or density < 0.5 else 0

    worker.most_new_tokens = most
    wanted = [(None, 200), (0.25, 200), (0.5, 400)]
    for density, status in wanted:
        experts = None if density is None else {"mode": "sequence", "density": density}
        response = await client.post(path, json={**BODIES[path], "experts": experts})
        assert response.status_code == status
    assert "density 0.5" in response.json()["error"]["message"]


@BOTH
async def test_the_servers_own_mode_holds_where_a_request_does_not_say(client_for, worker, path):
    client = client_for(experts_mode="sequence", experts_density=0.75)
    for experts in (None, {"mode": "sequence"}, {"mode": "sequence", "density": 0.5}):
        await client.post(path, json={**BODIES[path], "experts": experts})
    response = await client.post(path, json={**BODIES[path], "experts": {"mode": "token"}})
    assert response.headers[HEADER] == "token"
    found = [each.params.expert_density for each in worker.submitted]
    assert found == [0.75, 0.75, 0.5, None]


@BOTH
async def test_a_model_without_a_router_has_its_own_mode_and_density(client_for, worker, path):
    worker.info = replace(worker.info, sequence_density=0.25)
    for settings, told in (
        ({}, 0.25),
        ({"experts_density": 0.75}, 0.75),
        ({"experts_mode": "token"}, None),
        ({"experts_mode": "sequence"}, 0.25),
    ):
        await client_for(**settings).post(path, json=BODIES[path])
        assert worker.submitted[-1].params.expert_density == told
    asked = {"mode": "sequence"}, {"mode": "token"}, {"mode": "sequence", "density": 0.5}
    for experts, told in zip(asked, (0.25, None, 0.5), strict=True):
        await client_for().post(path, json={**BODIES[path], "experts": experts})
        assert worker.submitted[-1].params.expert_density == told


@BOTH
@pytest.mark.parametrize(
    ("experts", "word"),
    [
        ({"mode": "sequence", "density": 0}, "density"),
        ({"mode": "sequence", "density": -0.5}, "density"),
        ({"mode": "sequence", "density": 1.01}, "density"),
        ({"mode": "sequence", "density": "0.5"}, "density"),
        ({"mode": "sequence", "density": True}, "density"),
        ({"mode": "token", "density": 0.5}, "density"),
        ({"mode": "layer"}, "mode"),
        ({"mode": None}, "mode"),
        ({"density": 0.5}, "mode"),
        ({}, "mode"),
        ({"mode": "sequence", "tau": 0.5}, "tau"),
        ("sequence", "experts"),
        ([], "experts"),
        (0.5, "experts"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(client, worker, path, experts, word):
    response = await client.post(path, json={**BODIES[path], "experts": experts})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "experts")
    assert word in error["message"]
    assert not worker.submitted


@BOTH
async def test_a_real_engine_says_what_it_kept(tiny_client, path):
    async def page() -> dict[Any, float]:
        return samples((await tiny_client.get("/metrics")).text)

    async def text(experts: dict[str, Any] | None, stream: bool = False) -> str:
        more = {"temperature": 0, "ignore_eos": True, "max_tokens": 24, "stream": stream}
        response = await tiny_client.post(path, json={**BODIES[path], **more, "experts": experts})
        assert response.status_code == 200
        if stream:
            assert response.headers[HEADER].startswith("sequence")
            return response.text
        choice = response.json()["choices"][0]
        return str(choice["text"] if path == COMPLETIONS else choice["message"]["content"])

    kept, offered = "moestro_sequence_experts_kept_total", "moestro_sequence_experts_offered_total"
    before = await page()
    own = await text(None)
    assert await text({"mode": "sequence", "density": 1}) == own
    assert await text({"mode": "sequence", "density": 0.125}) != own
    assert "[DONE]" in await text({"mode": "sequence", "density": 0.5}, stream=True)
    short = {**BODIES[path], "experts": {"mode": "sequence"}}
    short |= {"prompt": "a"} if path == COMPLETIONS else {}
    short |= {"messages": [{"role": "user", "content": "a"}]} if path == CHAT else {}
    assert (await tiny_client.post(path, json=short)).status_code == 200
    after = await page()
    modes = {
        mode: after[key] - before[key]
        for mode in ("token", "sequence", "short_prompt")
        for key in [("moestro_sequence_experts_requests_total", (("mode", mode),))]
    }
    assert modes == {"token": 1, "sequence": 3, "short_prompt": 1}
    assert after[kept, ()] - before[kept, ()] == 4 * (8 + 1 + 4)  # of 4 layers with 8 experts
    assert after[offered, ()] - before[offered, ()] == 4 * 3 * 8
