"""`moestro trace`: what is recorded can be replayed, and tells `plan` what to expect."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny
from moestro.server.commands.cli import main

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
    last = json.loads(trace.read_text().splitlines()[-1])["live_decode"]
    assert last["slots"] == 32
    assert 0 < last["hits"] <= last["lookups"]
    # 7 decode steps a prompt (the prompt's own step gives the first token), 4 layers, 2 experts
    assert last["lookups"] == 2 * 7 * 4 * 2
    code, out, _ = moestro("trace", "replay", trace, "--json")
    table = json.loads(out)
    assert (code, table["experts"]) == (0, 32)
    assert table["live"] == {"slots": 32, "hit_rate": last["hits"] / last["lookups"]}
    rates = {row["policy"]: row["hit_rates"] for row in table["rows"]}
    ceiling = rates.pop("Belady (ceiling)")
    assert all(0 < rate <= 1 for rate in ceiling[1:])
    assert all(
        mine <= best for row in rates.values() for mine, best in zip(row, ceiling, strict=True)
    )
    code, out, _ = moestro("trace", "replay", trace)
    assert "hit rates of decode in percent" in out and "LRU" in out
    assert "recorded with 32 slots: " in out
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


@pytest.fixture
def small_trace(tmp_path: Path) -> Path:
    """Written by hand: two layers, three steps, and what its recorder counted."""
    path = tmp_path / "small.trace"
    layers = [{"name": f"l{n}", "num_experts": 8, "stride_bytes": 4096} for n in range(2)]
    events = [[step, "d", layer, [step, 7]] for step in range(3) for layer in range(2)]
    live = {"live_decode": {"slots": 16, "hits": 4, "lookups": 12}}
    lines = [{"moestro_trace": 1, "model": "m", "layers": layers}, *events, live]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("suffix", [".svg", ".png", ".SVG"])
def test_a_picture_of_it(small_trace: Path, suffix: str, moestro: Command) -> None:
    path = small_trace.with_suffix(suffix)
    plain = moestro("trace", "replay", small_trace)
    assert moestro("trace", "replay", small_trace, "--plot", path) == plain
    assert plain[0] == 0
    content = path.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
        return
    for label in (
        "next use (default)",
        "decayed frequency",
        "LRU",
        "Belady (ceiling)",
        "live, while recording",
        "hit rate of decode, %",
        "room for experts, MiB",
        "share of all experts, %",
        "3 steps, 16 experts",
    ):
        assert f">{label}" in content.decode(), label


def test_no_live_point_where_none_was_recorded(small_trace: Path, moestro: Command) -> None:
    lines = small_trace.read_text().splitlines(keepends=True)
    small_trace.write_text("".join(lines[:-1]))
    path = small_trace.with_suffix(".svg")
    code, out, _ = moestro("trace", "replay", small_trace, "--plot", path)
    assert code == 0 and "recorded with" not in out
    assert "live, while recording" not in path.read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plot.pdf", "must end in .svg or .png"),
        ("plot", "must end in .svg or .png"),
        ("nowhere/plot.svg", "there is no folder"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_at_once(
    name: str, words: str, tmp_path: Path, moestro: Command
) -> None:
    # The trace is not even looked for.
    code, out, err = moestro("trace", "replay", tmp_path / "none", "--plot", tmp_path / name)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert words in err and err.startswith("moestro: --plot ")


def test_a_picture_needs_the_extra(
    tmp_path: Path, moestro: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    code, _, err = moestro("trace", "replay", tmp_path / "none", "--plot", tmp_path / "p.svg")
    assert code == 2
    assert err == (
        "moestro: --plot needs matplotlib, which is not installed: pip install 'moestro[plot]'\n"
    )


def test_a_picture_on_a_path_that_refuses(small_trace: Path, moestro: Command) -> None:
    folder = small_trace.with_suffix(".svg")
    folder.mkdir()
    code, _, err = moestro("trace", "replay", small_trace, "--plot", folder)
    assert code == 2
    assert "Is a directory" in err


def test_a_mixture_from_a_trace_is_served(tmp_path: Path, prompts: Path, moestro: Command) -> None:
    folder, trace = tiny.build("mixtral", tmp_path / "tiny"), tmp_path / "tiny.trace"
    cache = ("--cache-dir", tmp_path / "cache", "--threads", 1)
    record = ("trace", "record", folder, trace, "--prompts", prompts, "--tokens", 4, *cache)
    assert moestro(*record)[0] == 0
    mixture = tmp_path / "mix.json"
    formats = ("--fine", "int8", "--coarse", "int4")
    code, out, _ = moestro("trace", "mix", trace, mixture, *formats, "--share", 0.25)
    assert code == 0
    assert out == f"{mixture}: 8 experts in int8, all others in int4\n"
    code, out, _ = moestro(*record, "--expert-format", f"mixed:{mixture}")
    assert code == 0 and "2 prompts, 8 tokens" in out
    code, out, _ = moestro("plan", folder, "--expert-format", f"mixed:{mixture}", "--json", *cache)
    assert code == 0
    assert json.loads(out)["model"]["expert_format"] == "mixed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--fine", "int3", "--coarse", "int8"), "--fine int3: this build has native, int8, int4"),
        (("--fine", "int8", "--coarse", "mixed"), "--coarse mixed: this build has native, int8"),
        (("--fine", "int8", "--coarse", "int8"), "nothing would be mixed"),
        (("--fine", "native", "--coarse", "int8", "--share", "2"), "--share"),
    ],
)
def test_a_mixture_that_is_none_is_refused(
    arguments: tuple[str, ...], words: str, small_trace: Path, moestro: Command
) -> None:
    code, _, err = moestro("trace", "mix", small_trace, small_trace.with_suffix(".m"), *arguments)
    assert code == 2
    assert words in err and len(err.splitlines()) == 1
    assert not small_trace.with_suffix(".m").exists()


def test_a_mixture_on_a_path_that_refuses(small_trace: Path, moestro: Command) -> None:
    out = small_trace.parent / "nowhere" / "mix.json"
    arguments = ("--fine", "native", "--coarse", "int8")
    code, _, err = moestro("trace", "mix", small_trace, out, *arguments)
    assert code == 2 and "No such file" in err
    code, _, err = moestro("trace", "mix", out, small_trace.with_suffix(".m"), *arguments)
    assert code == 2 and "No such file" in err
