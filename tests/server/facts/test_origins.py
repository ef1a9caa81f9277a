"""Origins are those that a browser would send; all else is refused at the start."""

import pytest

from moestro.server.facts.refusal import Refused
from moestro.server.facts.settings import load_settings


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "http://localhost:3000",
        "https://app.example",
        "http://[::1]:8080",
        "https://127.0.0.1:80",
        "chrome-extension://abcdef",
        "app://obsidian.md",
    ],
)
def test_origins(origin):
    assert load_settings({"model": "demo", "allow_origin": [origin]}).allow_origin == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        *("", "foo", "null", "http://", "http://a/b", "http://a/", "http://a?x", "http://u@a"),
        *("http://*.example", "https://App.example", "https://app.example:443", "http://a:80"),
        *("http://a:0", "http://a:99999", "http://a:", "http://bücher.example", "file://x"),
        *("http://a, http://b", "http://a\n", "x" * 5000),
    ],
)
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(Refused, match="^--allow-origin: .* is no origin as browsers") as caught:
        load_settings({"model": "demo", "allow_origin": ["http://localhost:3000", origin]})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_variable_has_them_between_commas(monkeypatch):
    monkeypatch.setenv("MOESTRO_ALLOW_ORIGIN", "http://a, http://b,")
    assert load_settings({"model": "demo"}).allow_origin == ("http://a", "http://b")
    monkeypatch.setenv("MOESTRO_ALLOW_ORIGIN", "http://a b")
    with pytest.raises(Refused, match="^MOESTRO_ALLOW_ORIGIN: 'http://a b' is no origin"):
        load_settings({"model": "demo"})
