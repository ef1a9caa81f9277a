"""moestro.json is read by value: what the engine divides by cannot be nothing, or text."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from moestro.engine import Manifest, ModelRefused

GOOD = Manifest(2, 8, 2.0, "a model", "a method", "0" * 64)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) is None
    GOOD.write(tmp_path)
    assert Manifest.read(tmp_path) == GOOD


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output_factor": 0}, "output_factor is 0, not above 0"),
        ({"output_factor": "zz"}, "output_factor is 'zz', not a number"),
        ({"experts_per_token": [2]}, "experts_per_token is"),
        ({"plan_sha256": None}, "plan_sha256 is None, not text"),
        ({"more": 1}, "'more' is no field"),
        ({"format": 9}, "of a format that this version does not read"),
    ],
)
def test_file_and_field_are_named(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "moestro.json"
    path.write_text(json.dumps({"format": 1} | asdict(GOOD) | changes))
    with pytest.raises(ModelRefused, match=words) as caught:
        Manifest.read(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "moestro.json").write_bytes(content)
    with pytest.raises(ModelRefused, match="not a manifest of moestro"):
        Manifest.read(tmp_path)
