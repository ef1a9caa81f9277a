"""`moestro plan` as a user meets it: the text, the object, the refusals."""

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import tiny
from engine_kit import opened
from moestro.server.commands.cli import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("plan") / "tiny-mixtral")


@pytest.fixture
def plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """Runs `moestro plan …` in this process: exit code, stdout, stderr."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level

    def run(model: object, *arguments: str) -> tuple[int, str, str]:
        common = ("--cache-dir", str(tmp_path / "cache"), "--threads", "1")
        monkeypatch.setattr(sys, "argv", ["moestro", "plan", str(model), *common, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out, err

    yield run
    root.handlers = before
    root.setLevel(level)
    logging.getLogger("moestro").setLevel(logging.NOTSET)
    logging.captureWarnings(False)


BUDGETS = ("--host-memory", "600KiB", "--kv-memory", "1MiB", "--disk-speed", "1GB")


def without_interpreter(lines: list[str]) -> list[str]:
    """What moves with the interpreter: the total and the fixed sum."""
    return [
        re.sub(r"(memory plan: | +fixed +).*interpreter [\d.]+ \w+|plan: [\d.]+ \w+", "", x)
        for x in lines
    ]


def test_the_text_has_the_start_s_own_plan(plan: Command, folder: Path, tmp_path: Path) -> None:
    code, out, err = plan(folder, *BUDGETS)
    assert (code, err) == (0, "")
    assert "mixtral: 4 layers of 8 experts of 48 KiB (native), 2 per token" in out
    assert "12 of 32 experts (37.5 %), 3.0 of 8 per layer" in out
    assert "bounds, not promises" in out
    gains = [line for line in out.splitlines() if line.startswith("formats: ")]
    assert len(gains) == 1 and "--expert-format int8 --dense-format int8 would read" in gains[0]
    assert "--host-memory 2MiB: all experts are resident" in out
    budgets = {"host_memory_bytes": 600 << 10, "kv_memory_bytes": 1 << 20}
    with opened(folder, tmp_path / "cache", **budgets) as loaded:
        started = without_interpreter(loaded.plan.lines())
    assert "\n".join(started[1:]) in "\n".join(without_interpreter(out.splitlines()))


def test_the_object_has_the_promised_keys(plan: Command, folder: Path) -> None:
    code, out, err = plan(folder, *BUDGETS, "--json", "--expert-format", "int8")
    assert (code, err) == (0, "")
    found = json.loads(out)
    parts = {name: part for name, part in found.items() if name != "changes"}
    assert {name: " ".join(sorted(part)) for name, part in parts.items()} == {
        "model": "dense_format expert_bytes expert_format expert_format_reason experts_per_layer"
        " experts_per_token family lane lane_reason layers quantized stored_dtype weights",
        "memory": "dense_bytes experts_bytes interpreter_bytes kv_bytes kv_tokens limit"
        " limit_bytes max_model_len_tokens max_step_reason max_step_tokens packing_bytes"
        " total_bytes workspace_bytes",
        "experts": "resident_share slots slots_per_layer total",
        "link": "ordered_bytes_per_s scattered_bytes_per_s source",
        "compute": "products threads",
        "formats": "smaller token_bytes",
        "decode": "high low routing tokens",
        "prefill": "high low routing tokens",
    }
    model = found["model"]
    assert (model["expert_format"], model["expert_format_reason"]) == ("int8", None)
    names = ("interpreter", "dense", "workspace", "experts", "kv", "packing")
    assert sum(found["memory"][f"{name}_bytes"] for name in names) == found["memory"]["total_bytes"]
    for one in found["formats"]["smaller"]:
        assert one["ratio"] == one["token_bytes"] / found["formats"]["token_bytes"] < 1
        assert one["demo_perplexity"] > 1
    assert found["prefill"]["tokens"] == found["memory"]["max_step_tokens"] == 512
    for step in (found["decode"], found["prefill"]):
        assert step["low"]["tokens_per_s"] <= step["high"]["tokens_per_s"]
        assert step["low"]["limit"] in ("disk", "compute")
        assert step["routing"] == "uniform"
    assert all(sorted(change) == ["effect", "flags"] for change in found["changes"])


def test_where_nothing_is_native_nothing_is_to_be_gained(plan: Command, folder: Path) -> None:
    small = ("--expert-format", "int8", "--dense-format", "int8")
    code, out, _ = plan(folder, *BUDGETS, *small)
    assert code == 0 and "formats: " not in out
    code, out, _ = plan(folder, *BUDGETS, *small, "--json")
    assert (code, json.loads(out)["formats"]) == (0, None)


def test_given_steps_are_planned(plan: Command, folder: Path) -> None:
    code, out, _ = plan(folder, *BUDGETS, "--max-step-tokens", "64", "--json")
    small = json.loads(out)
    assert (code, small["prefill"]["tokens"]) == (0, 64)
    assert (small["memory"]["max_step_tokens"], small["memory"]["max_step_reason"]) == (
        64,
        "as given",
    )
    code, out, _ = plan(folder, *BUDGETS, "--max-step-tokens", "4096")
    assert code == 0
    assert re.search(r"^  step +4096  tokens \(--max-step-tokens\): as given$", out, re.M)
    assert "per 4096 tokens" in out


def test_a_folder_with_only_a_config_will_do(plan: Command, folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    code, out, _ = plan(bare, *BUDGETS)
    assert code == 0
    assert "the weights are not here" in out
    assert not (tmp_path / "cache").exists()


def test_a_trace_replaces_the_guess(plan: Command, folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    layers = [{"name": str(n), "num_experts": 8, "stride_bytes": 49152} for n in range(4)]
    head = {"moestro_trace": 1, "model": "tiny", "layers": layers}
    events = [[step, "d", layer, [0, 1]] for step in range(100) for layer in range(4)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in (head, *events)))
    code, out, _ = plan(folder, *BUDGETS, "--trace", str(trace), "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["decode"]["routing"], found["prefill"]["routing"]) == ("trace", "uniform")
    assert found["decode"]["low"]["hit_rate"] == pytest.approx(0.99)
    trace.write_text(json.dumps(head | {"layers": layers[:3]}) + "\n")
    code, out, err = plan(folder, *BUDGETS, "--trace", str(trace))
    assert (code, out) == (2, "") and "other experts" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host-memory", "50KiB"), "the nearest plan that fits: --host-memory 96KiB"),
        (("--max-model-len", "9999"), "the nearest plan that fits: --max-model-len 512"),
        (
            ("--max-step-tokens", "99999999999"),
            "with --max-step-tokens 99999999999, the model needs at least",
        ),
        (
            ("--max-step-tokens", "99999999999"),
            "the nearest plan that fits: --max-step-tokens 512",
        ),
        (("--device-memory", "1GiB"), "--device-memory: device cpu has no memory of its own"),
        (("--disk-speed", "quick"), "--disk-speed: 'quick' is not a size"),
        (("--disk-speed", "0"), "--disk-speed: '0' is not above 0"),
        (("--trace", "/no/trace"), "--trace /no/trace"),
        (("--threads", "0"), "--threads: '0' is not a whole number above 0"),
    ],
)
def test_refusals_are_one_line(
    arguments: tuple[str, ...], words: str, plan: Command, folder: Path
) -> None:
    code, out, err = plan(folder, *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"moestro: [^\n]+\n", err)
    assert words in err


def test_the_demo_is_planned_before_it_is_fetched(plan: Command, tmp_path: Path) -> None:
    budgets = ("--host-memory", "40MiB", "--kv-memory", "64MiB", "--disk-speed", "1GB")
    code, out, err = plan("demo", *budgets, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    model = found["model"]
    assert (model["layers"], model["experts_per_layer"], model["experts_per_token"]) == (30, 24, 12)
    assert (model["stored_dtype"], model["weights"]) == ("float16", "absent")
    assert not (tmp_path / "cache" / "models").exists()


CARD = ("--device", "cuda", "--device-memory", "3GiB", "--disk-speed", "1GB")


def test_a_card_need_not_be_here(plan: Command, folder: Path) -> None:
    code, out, err = plan(folder, *CARD)
    assert (code, err) == (0, "")
    assert "of 2 GiB (free of 3 GiB on the card that is planned for)" in out
    assert "on the card 32 of 32 experts (100 %)" in out
    assert "25 GB/s (PCIe 4 x16, assumed: --link)" in out
    assert "decode      not limited by link or disk: every expert is on the card" in out
    assert "not measured on a GPU" in out


def test_the_object_of_a_card(plan: Command, folder: Path) -> None:
    code, out, err = plan(folder, *CARD, "--link", "1GB", "--json", "--kv-memory", "1MiB")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["measured_on_a_gpu"] is False
    assert found["link"] == {"bytes_per_s": 1e9, "source": "--link"}
    assert found["experts"]["slots"] == found["experts"]["total"] == 32
    assert found["decode"]["low"]["tokens_per_s"] is None
    parts = [name for name in found["memory"] if name.startswith("device_")]
    assert found["memory"]["total_bytes"] == sum(found["memory"][name] for name in parts)
    formats = {row["expert_format"] for row in found["formats"]}
    assert formats == {"int8", "nf4"}


def test_a_format_to_be_chosen_is_named_with_its_reason(plan: Command, folder: Path) -> None:
    code, out, err = plan(folder, *CARD, "--expert-format", "auto")
    assert (code, err) == (0, "")
    reason = "expert format: native (auto): 100 % of the experts fit the card's slots; native"
    assert reason in out
    code, out, _ = plan(folder, *BUDGETS, "--expert-format", "auto", "--json")
    model = json.loads(out)["model"]
    assert code == 0 and model["expert_format"] == "native"
    assert model["expert_format_reason"].startswith("expert format: native (auto): the CPU")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "cuda"), "say how much memory it has: --device-memory 12GiB"),
        (("--device", "cuda", "--device-memory", "500MiB"), "a card's driver alone takes about"),
        (("--link", "25GB"), "--link: it is into a card, and this plan is for the CPU"),
        (("--device-memory", "12GiB"), "device cpu has no memory of its own"),
        ((*CARD, "--trace", "trace.jsonl"), "--trace: hit rates of a card"),
        ((*CARD, "--expert-format", "int4"), "is for the CPU's kernels alone; on cuda use nf4"),
    ],
)
def test_what_a_card_cannot_be_planned_with(
    plan: Command, folder: Path, arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    if "--device-memory" not in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code, out, err = plan(folder, *arguments)
    assert code != 0 and not out
    assert words in " ".join(err.split())
