"""Keys from flags, a variable and a file: all count, none is shown."""

import os

import pytest

from moestro.server.facts import keys
from moestro.server.facts.refusal import Refused
from moestro.server.facts.settings import load_settings


def test_keys_of_flags_and_of_the_file_count_together(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# whose\n\n  third  \nsecond\r\n#fourth\n")
    settings = load_settings(
        {"model": "demo", "api_key": ["first", "second"], "api_key_file": str(file)}
    )
    assert settings.keys == {"first", "second", "third"}
    assert not any(key in repr(settings) for key in settings.keys)


def test_the_variables_hold_one_key_and_one_file(monkeypatch, tmp_path):
    (tmp_path / "keys").write_text("a\nb")
    monkeypatch.setenv("MOESTRO_API_KEY", '["x",1]')  # a key of these characters, no list
    monkeypatch.setenv("MOESTRO_API_KEY_FILE", str(tmp_path / "keys"))
    assert load_settings({"model": "demo"}).keys == {'["x",1]', "a", "b"}
    assert load_settings({"model": "demo", "api_key": ["c"]}).keys == {"a", "b", "c"}


@pytest.mark.parametrize("given", [["good", "two words"], ["good", ""], ["ключ"], ["good\n"]])
def test_one_bad_key_is_enough_and_none_is_shown(given):
    with pytest.raises(Refused, match="^--api-key: a key must be of visible ASCII") as caught:
        load_settings({"model": "demo", "api_key": given})
    assert not any(key and key.strip() in str(caught.value) for key in given)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "the file has no key"),
        (b"\n# secret\n", "the file has no key"),
        (b"good\n\nsecret two words\n", "line 3 is no key"),
        ("sécret".encode(), "line 1 is no key"),
        (b"secret\0", "line 1 is no key"),
        (b"secret\n" * 1001, "the file has 1001 keys, the most is 1000"),
        (b"x" * ((1 << 20) + 1), "the file is larger than 1048576 bytes"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, content, line):
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(Refused, match=f"^--api-key-file: {line}") as caught:
        load_settings({"model": "demo", "api_key_file": str(tmp_path / "keys")})
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name, reason in (
        (str(tmp_path / "none"), "No such file or directory"),
        (str(tmp_path), "Is a directory"),
        ("~nosuchuser/keys", "no such file"),
        ("a\0b", "no such file"),
        ("", "Is a directory"),
    ):
        with pytest.raises(Refused, match=f"^--api-key-file: cannot read .*: {reason}$"):
            load_settings({"model": "demo", "api_key_file": name})
    monkeypatch.setenv("MOESTRO_API_KEY_FILE", str(tmp_path))
    with pytest.raises(Refused, match="^MOESTRO_API_KEY_FILE: cannot read"):
        load_settings({"model": "demo"})


def test_a_file_without_an_end_is_read_to_the_limit(monkeypatch):
    monkeypatch.setattr(keys, "MOST_FILE_BYTES", 100)
    with pytest.raises(Refused, match="larger than 100 bytes"):
        load_settings({"model": "demo", "api_key_file": "/dev/zero"})


def test_a_pipe_is_a_file_too():
    reading, writing = os.pipe()
    os.write(writing, b"from-a-shell\n")
    os.close(writing)
    settings = load_settings({"model": "demo", "api_key_file": f"/dev/fd/{reading}"})
    os.close(reading)
    assert settings.keys == {"from-a-shell"}
