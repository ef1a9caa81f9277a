"""The table of other servers' fields: each row of it, through a request."""

from pathlib import Path
from typing import Any

import pytest

import field_table
from moestro.server.api.fields import (
    ALIASES,
    NEUTRAL,
    NEUTRAL_ON_COMPLETIONS,
    WINDOWS,
    is_neutral,
)

URL = "/v1/completions"
TABLE = {**NEUTRAL, **NEUTRAL_ON_COMPLETIONS}
MEANT: list[Any] = ["x", 3, 0.5, True, ["x"], {"a": 1}]

# What a web UI sends whether or not anybody touched a control.
WEB_UI = {
    "cache_prompt": True,
    "timings_per_token": True,
    "samplers": [],
    "temperature": 0.8,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "xtc_probability": 0,
    "xtc_threshold": 0.1,
    "typ_p": 1,
    "repeat_last_n": 64,
    "repeat_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "mirostat": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "max_tokens": -1,
    "grammar": "",
    "n_probs": 0,
    "logprobs": False,
    "min_keep": 0,
    "image_data": [],
    "id_slot": -1,
    "stop": [],
    "seed": -1,
}


async def test_the_web_ui_s_body_changes_nothing(client):
    assert (await client.post(URL, json={"prompt": "x", **WEB_UI})).status_code == 200


@pytest.mark.parametrize("name", list(TABLE))
async def test_neutral_values_pass_and_others_are_refused_by_name(client, worker, name):
    for value in (None, *TABLE[name]):
        response = await client.post(URL, json={"prompt": "x", name: value})
        assert response.status_code == 200, (value, response.text)
    worker.submitted.clear()
    meant = [value for value in MEANT if not is_neutral(value, TABLE[name])]
    for value in meant:
        response = await client.post(URL, json={"prompt": "x", name: value})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, name), (value, response.text)
        assert error["code"] == "unsupported_parameter"
    assert not worker.submitted


async def test_a_window_matters_where_something_is_penalized(client):
    for name in WINDOWS:
        assert (await client.post(URL, json={"prompt": "x", name: 64})).status_code == 200
        body = {"prompt": "x", name: 64, "repeat_penalty": 1.1}
        response = await client.post(URL, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)
        assert (await client.post(URL, json={**body, name: -1})).status_code == 200


@pytest.mark.parametrize("alias", list(ALIASES))
async def test_aliases_are_checked_as_what_they_mean(client, alias):
    response = await client.post(URL, json={"prompt": "x", alias: {"no": "value"}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] in (alias, ALIASES[alias])


async def test_two_names_for_one_thing_must_agree(client, worker):
    body = {"prompt": "x", "max_tokens": 3, "n_predict": 4}
    response = await client.post(URL, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n_predict")
    assert (await client.post(URL, json={**body, "n_predict": 3})).status_code == 200
    assert worker.submitted[0].params.max_tokens == 3


def test_the_readme_has_this_table():
    readme = Path(__file__).parents[3] / "README.md"
    assert field_table.table() in readme.read_text("utf-8")


def test_no_field_is_in_two_tables():
    assert not set(ALIASES) & set(TABLE)
    assert not set(NEUTRAL) & set(NEUTRAL_ON_COMPLETIONS)
