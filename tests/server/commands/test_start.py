"""What is said around a start."""

import contextlib
import logging
import os
import shlex
import socket

import pytest

from moestro.server.commands import cli, start
from moestro.server.commands.start import prepare_of, ready_text, warn_if_open
from moestro.server.facts.refusal import refusal_line
from moestro.server.facts.settings import ALLOCATOR_VARIABLES, Settings


def test_ready_text_can_be_copied():
    settings = Settings(model="demo", served_model_name="it's")
    text = ready_text(settings, "http://127.0.0.1:8000", 1.25)
    words = shlex.split(text[text.index("curl") : text.index("\n\n  pieces")].replace("\\\n", " "))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    assert '"model": "it\'s"' in words[-1]
    assert "http://127.0.0.1:8000/metrics" in text
    assert "Authorization" not in text


def test_ready_text_never_shows_the_key():
    text = ready_text(Settings(model="demo", api_key="hidden"), "http://h:1", 1)
    assert "hidden" not in text
    assert "$MOESTRO_API_KEY" in text


def test_a_refusal_is_one_line_whatever_its_cause_says():
    assert refusal_line("first\n  second\t third\n") == "moestro: first second third"


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "k", False)],
)
def test_an_open_door_is_said(caplog, host, key, warns):
    with caplog.at_level(logging.WARNING, "moestro"):
        warn_if_open(Settings(model="demo", host=host, api_key=key))
    assert ("without a key" in caplog.text) is warns


def test_a_hub_name_is_fetched_and_the_demo_made():
    for model in ("org/name@v1", "demo"):
        assert prepare_of(Settings(model=model)) is not None


def test_a_folder_needs_no_preparation(tmp_path):
    assert prepare_of(Settings(model=str(tmp_path))) is None


def test_a_gpu_s_allocator_is_set_before_the_big_imports(monkeypatch):
    monkeypatch.setenv(ALLOCATOR_VARIABLES[0], "")  # to be put back
    monkeypatch.delenv(ALLOCATOR_VARIABLES[0])
    found = []

    def imports():
        found.append(os.environ.get(ALLOCATOR_VARIABLES[0]))
        return contextlib.nullcontext()

    monkeypatch.setattr(cli, "_big_imports", imports)
    monkeypatch.setattr(start, "run_server", lambda *_: 0)
    with socket.socket() as listener:
        cli._serve(Settings(model="demo", device="cuda"), listener)
    assert found == ["expandable_segments:True"]
