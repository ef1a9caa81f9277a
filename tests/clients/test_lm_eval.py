"""lm-evaluation-harness over HTTP gives what its own Hugging Face backend gives."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from client_environments import HERE, environment, run_command
from moestro.factorize import apply_plan, demo_deltas, demo_plan, prepare_dense
from server_process import ServerProcess, serving

TASKS = HERE / "lm_eval_tasks"
PER_TOKEN = 1e-4
COMPLETIONS = "local_choices,local_rolling,local_generate"

Evaluate = Callable[..., tuple[dict[str, Any], dict[str, list[Any]]]]


@pytest.fixture(scope="module")
def demo(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With as many experts in every layer: what transformers' own class, the oracle, carries."""
    plan, folder = demo_plan(), tmp_path_factory.mktemp("even") / "demo"
    even = replace(plan.facts.options, layer_top_k="")
    plan = replace(plan, facts=replace(plan.facts, options=even))
    dense = prepare_dense(cache_dir, lambda _: None)
    apply_plan(plan, dense, folder, lambda _: None, demo_deltas().of_plan(plan.sha256))
    return folder


@pytest.fixture(scope="module")
def server(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ("--expert-format", "native", "--host-memory", "200MiB")
    cache = tmp_path_factory.mktemp("even-cache")
    with serving(demo, *flags, "--cache-dir", str(cache)) as running:
        yield running


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """Results by task, and what each request of each task was answered."""

    def run(model: str, arguments: str, tasks: str, *flags: str) -> Any:
        out = tmp_path_factory.mktemp("lm_eval")
        command = [str(environment("lm-eval").parent / "lm_eval"), "run", "--model", model]
        command += ["--model_args", arguments, "--tasks", tasks, "--include_path", "."]
        command += ["--output_path", str(out), "--log_samples", *flags]
        offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hub")}
        run_command(command, cwd=TASKS, **offline)
        (results,) = out.rglob("results_*.json")
        answers = {
            task: [
                json.loads(line)["resps"]
                for line in next(out.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
            ]
            for task in tasks.split(",")
        }
        return json.loads(results.read_text())["results"], answers

    return run


def test_scores_are_those_of_plain_transformers(
    server: ServerProcess, demo: Path, evaluate: Evaluate
) -> None:
    over_http = (
        f"base_url={server.url}/v1/completions,model=demo,num_concurrent=4,"
        "tokenizer_backend=remote,max_length=2048"
    )
    ours, our_answers = evaluate("local-completions", over_http, COMPLETIONS, "--batch_size", "4")
    stock, stock_answers = evaluate(
        "hf", f"pretrained={demo},dtype=float32", COMPLETIONS, "--device", "cpu"
    )
    assert ours["local_choices"]["acc,none"] == stock["local_choices"]["acc,none"]
    assert ours["local_choices"]["acc_norm,none"] == stock["local_choices"]["acc_norm,none"]
    assert 0 < ours["local_choices"]["acc,none"] < 1, "neither all nor nothing"
    assert our_answers["local_generate"] == stock_answers["local_generate"]
    count = _token_counter(demo)
    for ours_one, stock_one, asked in zip(
        our_answers["local_choices"],
        stock_answers["local_choices"],
        _lines("choices.jsonl"),
        strict=True,
    ):
        for ((score, greedy),), ((wanted, wanted_greedy),), choice in zip(
            ours_one, stock_one, asked["choices"], strict=True
        ):
            assert greedy == wanted_greedy
            within = PER_TOKEN * count(f" {choice}")
            assert float(score) == pytest.approx(float(wanted), abs=within)
    for ours_one, stock_one, line in zip(
        our_answers["local_rolling"],
        stock_answers["local_rolling"],
        _lines("texts.jsonl"),
        strict=True,
    ):
        within = PER_TOKEN * count(line["text"])
        assert _number(ours_one) == pytest.approx(_number(stock_one), abs=within)


def test_chat_is_that_of_plain_transformers(
    server: ServerProcess, demo: Path, evaluate: Evaluate
) -> None:
    over_http = f"base_url={server.url}/v1/chat/completions,model=demo,num_concurrent=4"
    _, ours = evaluate(
        "local-chat-completions", over_http, "local_generate", "--apply_chat_template"
    )
    _, stock = evaluate(
        "hf",
        f"pretrained={demo},dtype=float32",
        "local_generate",
        "--device",
        "cpu",
        "--apply_chat_template",
    )
    assert ours == stock
    assert any(text for one in ours["local_generate"] for (text,) in one)


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


def _token_counter(demo: Path) -> Callable[[str], int]:
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text).ids)


def _number(answer: Any) -> float:
    while isinstance(answer, list):
        answer = answer[0]
    return float(answer)
