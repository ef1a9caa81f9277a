from pathlib import Path

import pytest
import torch

from moestro.engine import Progress
from moestro.factorize.methods import sampling
from moestro.factorize.methods.calibration import load_dense
from moestro.factorize.methods.sampling import sample_windows


def quiet(_: Progress) -> None:
    pass


def test_the_model_writes_what_it_foretells(dense: Path) -> None:
    model = load_dense(dense)
    ids = sample_windows(model, 259, tokens=100, window=24, seed=0, progress=quiet)
    assert tuple(ids.shape) == (4, 24)  # whole windows
    assert 0 <= int(ids.min()) <= int(ids.max()) < 259
    with torch.inference_mode():
        foretold = model(ids).logits[:, :, :259].argmax(dim=2)
    likeliest = ids[:, 1:] == foretold[:, :-1]
    assert likeliest[:, :3].all(), "the first few are the likeliest"
    assert not likeliest[:, 3:].all(), "the others are drawn"


def test_the_seed_decides(dense: Path) -> None:
    model = load_dense(dense)
    first, again, other = (sample_windows(model, 259, 64, 16, seed, quiet) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_windows_than_are_written_at_once(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "SAMPLED_AT_ONCE", 2)
    seen: list[Progress] = []
    ids = sample_windows(load_dense(dense), 259, 80, 16, 0, seen.append)
    assert len({tuple(row) for row in ids.tolist()}) == 5
    assert (seen[0].phase, seen[0].total, len(seen)) == ("sample a text", 15, 45)


def test_one_window_at_least(dense: Path) -> None:
    assert tuple(sample_windows(load_dense(dense), 259, 3, 8, 0, quiet).shape) == (1, 8)
