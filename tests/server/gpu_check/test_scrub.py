"""What a report may be pasted with, and what must not be left of a machine's names."""

import socket

import pytest

from moestro.server.gpu_check.scrub import scrubbed


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('File "/home/ann/.venv/lib/python3.11/x.py", line 3', 'File "…/x.py", line 3'),
        ("cannot open ~/.cache/moestro/a.pack: full", "cannot open …/a.pack: full"),
        ("/home/ann: no such folder", "~: no such folder"),
        ("12 GB/s, 3/4 of 8 tokens/s", "12 GB/s, 3/4 of 8 tokens/s"),
        (
            "see https://pytorch.org/docs/stable/x.html",
            "see https://pytorch.org/docs/stable/x.html",
        ),
    ],
)
def test_folders_are_left_out(text: str, left: str) -> None:
    assert scrubbed(text) == left


def test_the_host_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "anns-tower")
    assert scrubbed("on anns-tower, once") == "on HOST, once"
