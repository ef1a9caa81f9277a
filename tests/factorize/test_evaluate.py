"""`moestro evaluate`: by plain transformers, whole windows or the second halves of them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moestro.engine import Progress
from moestro.factorize import (
    FactorizeError,
    Inputs,
    Outputs,
    SplitOptions,
    perplexity,
    run_evaluate,
    run_factorize,
)
from tiny_llama import write_text

SPLIT = SplitOptions(experts=4, shared_neurons=16, top_k=3, calibration_tokens=1024)


def quiet(_: Progress) -> None:
    pass


def test_evaluate(long_dense: Path, tmp_path: Path, texts: list[Path]) -> None:
    text = write_text(tmp_path / "held-out.txt", seed=9)
    given = Inputs(calibration=tuple(texts))
    run_factorize(str(long_dense), tmp_path / "out", SPLIT, given, Outputs(), quiet)
    dense = perplexity(long_dense, text, 1024, quiet)
    assert (dense.tokens, dense.value > 1) == (1022, True)
    whole = perplexity(tmp_path / "out", text, 1024, quiet, experts_per_token=4)
    assert math.isclose(whole.value, dense.value, rel_tol=1e-4)
    fewer = perplexity(tmp_path / "out", text, 1024, quiet)
    assert not math.isclose(fewer.value, dense.value, rel_tol=1e-3)
    said = run_evaluate(tmp_path / "out", [text], 1024, None, quiet)
    assert said == f"{text}: perplexity {fewer.value:.3f} over 1022 tokens"


def test_second_halves_are_scored_with_what_the_first_chose(
    long_dense: Path, tmp_path: Path, texts: list[Path]
) -> None:
    """With all experts kept it is the dense model on the same places."""
    text = write_text(tmp_path / "held-out.txt", seed=9)
    given = Inputs(calibration=tuple(texts))
    run_factorize(str(long_dense), tmp_path / "out", SPLIT, given, Outputs(), quiet)
    folders = (long_dense, tmp_path / "out", tmp_path / "out")
    found = [
        run_evaluate(folder, [text], 1024, experts, quiet, "sequence")
        for folder, experts in zip(folders, (None, 4, None), strict=True)
    ]
    assert all(said.endswith(" over 510 tokens") for said in found)
    values = [float(said.split("perplexity ")[1].split()[0]) for said in found]
    assert values[0] == pytest.approx(values[1], rel=1e-3) != pytest.approx(values[2], rel=1e-3)
    assert found[0] != run_evaluate(long_dense, [text], 1024, None, quiet)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "none"}, "has no router that chooses the same number"),
        ({"router": "norm", "tau": 0.5}, "has no router that chooses the same number"),
    ],
)
def test_whose_prompts_cannot_choose(
    options: dict[str, Any], words: str, long_dense: Path, tmp_path: Path, texts: list[Path]
) -> None:
    given = Inputs(calibration=tuple(texts))
    run_factorize(
        str(long_dense), tmp_path / "out", replace(SPLIT, **options), given, Outputs(), quiet
    )
    with pytest.raises(FactorizeError, match=words):
        run_evaluate(tmp_path / "out", texts[:1], 1024, None, quiet, "sequence")
    with pytest.raises(FactorizeError, match="modes token and sequence, not both"):
        run_evaluate(tmp_path / "out", texts[:1], 1024, None, quiet, "both")


def test_what_cannot_be_evaluated(long_dense: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    with pytest.raises(FactorizeError, match="not made by `moestro factorize`"):
        run_evaluate(long_dense, [text], 1024, 2, quiet)
    with pytest.raises(FactorizeError, match="not a model that loads"):
        run_evaluate(tmp_path, [text], 1024, None, quiet)
    with pytest.raises(FactorizeError, match="no text given"):
        run_evaluate(long_dense, [], 1024, None, quiet)
