import math
import re
from pathlib import Path
from typing import Any

import pytest

from moestro.engine import Manifest, Progress
from moestro.factorize import FactorizeError, Plan, perplexity, run_evaluate, run_factorize
from tiny_llama import write_text, write_tiny_llama

SPLIT: dict[str, Any] = {"experts": 4, "shared": 16, "top_k": 3, "calibration_tokens": 1024}


def quiet(_: Progress) -> None:
    pass


@pytest.fixture
def long_dense(tmp_path: Path) -> Path:
    """A context of 512, the window that the commands use."""
    return write_tiny_llama(tmp_path / "dense", max_position_embeddings=512)


def test_make_write_and_apply(long_dense: Path, texts: list[Path], tmp_path: Path) -> None:
    said = run_factorize(
        str(long_dense),
        tmp_path / "out",
        calibration=texts,
        plan=None,
        write_plan=tmp_path / "plan.safetensors",
        seed=3,
        progress=quiet,
        **SPLIT,
    )
    assert "3 layers, each 16 neurons always on and 4 experts of 8, 3 per token (83.3%" in said
    plan = Plan.read(tmp_path / "plan.safetensors")
    assert re.fullmatch(
        rf"OMP_NUM_THREADS=1 moestro factorize {long_dense} OUT --calibration \S+0.txt "
        r"--calibration \S+1.txt --experts 4 --shared 16 --top-k 3 --seed 3 "
        r"--calibration-tokens 1024 --write-plan \S+plan.safetensors",
        plan.facts.command,
    )
    run_factorize(
        str(long_dense),
        tmp_path / "again",
        calibration=[],
        plan=tmp_path / "plan.safetensors",
        write_plan=None,
        seed=0,
        progress=quiet,
        **SPLIT,
    )
    first, again = (Manifest.read(tmp_path / name) for name in ("out", "again"))
    assert first == again is not None
    weights = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_existing_folder_is_left_alone(long_dense: Path, tmp_path: Path) -> None:
    with pytest.raises(FactorizeError, match="exists already"):
        run_factorize(
            str(long_dense),
            tmp_path,
            calibration=[],
            plan=None,
            write_plan=None,
            seed=0,
            progress=quiet,
            **SPLIT,
        )


def test_evaluate(long_dense: Path, tmp_path: Path, texts: list[Path]) -> None:
    text = write_text(tmp_path / "held-out.txt", seed=9)
    run_factorize(
        str(long_dense),
        tmp_path / "out",
        calibration=texts,
        plan=None,
        write_plan=None,
        seed=0,
        progress=quiet,
        **SPLIT,
    )
    dense = perplexity(long_dense, text, 1024, quiet)
    assert (dense.tokens, dense.value > 1) == (1022, True)
    whole = perplexity(tmp_path / "out", text, 1024, quiet, experts_per_token=4)
    assert math.isclose(whole.value, dense.value, rel_tol=1e-4)
    fewer = perplexity(tmp_path / "out", text, 1024, quiet)
    assert not math.isclose(fewer.value, dense.value, rel_tol=1e-3)
    said = run_evaluate(tmp_path / "out", [text], 1024, None, quiet)
    assert said == f"{text}: perplexity {fewer.value:.3f} over 1022 tokens"


def test_what_cannot_be_evaluated(long_dense: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    with pytest.raises(FactorizeError, match="not made by `moestro factorize`"):
        run_evaluate(long_dense, [text], 1024, 2, quiet)
    with pytest.raises(FactorizeError, match="not a model that loads"):
        run_evaluate(tmp_path, [text], 1024, None, quiet)
    with pytest.raises(FactorizeError, match="no text given"):
        run_evaluate(long_dense, [], 1024, None, quiet)
