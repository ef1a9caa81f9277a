"""`moestro trace`: what is recorded can be replayed, and tells `plan` what to expect."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny
from moestro.server.cli import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moestro(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """Runs `moestro …` in this process: exit code, stdout, stderr."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moestro", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out, err

    yield run
    root.handlers[:], root.level = before, level


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("first prompt\n\nanother one\n")
    return path


def test_record_replay_plan(tmp_path: Path, prompts: Path, moestro: Command) -> None:
    folder, trace = tiny.build("mixtral", tmp_path / "tiny"), tmp_path / "tiny.trace"
    cache = ("--cache-dir", tmp_path / "cache", "--threads", 1)
    code, out, _ = moestro(
        "trace", "record", folder, trace, "--prompts", prompts, "--tokens", 8, *cache
    )
    assert code == 0
    assert "2 prompts, 16 tokens" in out
    code, out, _ = moestro("trace", "replay", trace, "--json")
    table = json.loads(out)
    assert (code, table["experts"]) == (0, 32)
    rates = {row["policy"]: row["hit_rates"] for row in table["rows"]}
    ceiling = rates.pop("Belady (ceiling)")
    assert all(0 < rate <= 1 for rate in ceiling[1:])
    assert all(
        mine <= best for row in rates.values() for mine, best in zip(row, ceiling, strict=True)
    )
    code, out, _ = moestro("trace", "replay", trace)
    assert "hit rates of decode in percent" in out and "LRU" in out
    code, out, _ = moestro("plan", folder, "--trace", trace, "--disk-speed", "1GB", *cache)
    assert code == 0 and "in the trace" in out


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), ("", "no prompt in it"), ("x" * 600, "prompt 1: ")],
)
def test_prompts_that_cannot_be_run(
    content: str | None, words: str, tmp_path: Path, moestro: Command
) -> None:
    folder, file = tiny.build("mixtral", tmp_path / "tiny"), tmp_path / "p.txt"
    if content is not None:
        file.write_text(content)
    cache = ("--cache-dir", tmp_path / "cache", "--threads", 1)
    code, _, err = moestro("trace", "record", folder, tmp_path / "t", "--prompts", file, *cache)
    assert code == 2
    assert words in err.splitlines()[-1]


@pytest.mark.parametrize("content", [None, "", "nonsense\n"])
def test_what_is_no_trace_is_refused(content: str | None, tmp_path: Path, moestro: Command) -> None:
    path = tmp_path / "t"
    if content is not None:
        path.write_text(content)
    code, _, err = moestro("trace", "replay", path)
    assert code == 2
    assert len(err.splitlines()) == 1 and err.startswith("moestro: ")
