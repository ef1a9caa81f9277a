"""How much of a real model is measured where not all of it fits."""

import pytest

from moestro.engine.gpu_check.found import CannotRun
from moestro.engine.gpu_check.geometry import GPT_OSS, MIXTRAL, QWEN3, REAL_WIDTHS, fitted

GIB = 1 << 30


def test_experts_are_as_large_as_the_real_ones() -> None:
    megabytes = [round(real.expert_bytes / 1e6, 1) for real in (MIXTRAL, QWEN3, GPT_OSS)]
    assert megabytes == [352.3, 9.4, 49.8]


@pytest.mark.parametrize("real", REAL_WIDTHS, ids=lambda real: real.name)
@pytest.mark.parametrize("room_bytes", [3 * GIB, 6 * GIB, 24 * GIB])
def test_what_is_measured_fits(real, room_bytes: int) -> None:
    shape = fitted(real, room_bytes, most_layers=4)
    assert shape.experts_bytes <= room_bytes
    assert 2 <= shape.layers <= 4
    assert shape.experts >= 2 * shape.experts_per_token
    assert (shape.hidden, shape.inner) == (real.hidden, real.inner)


def test_all_experts_stay_where_two_layers_of_them_fit() -> None:
    assert fitted(MIXTRAL, 6 * GIB, 4).experts == 8
    assert fitted(MIXTRAL, 5 * GIB, 4).experts == 4


def test_too_little_room_is_said() -> None:
    with pytest.raises(CannotRun, match="two layers of 4 experts take 2.7 GiB, .* for 1 GiB"):
        fitted(MIXTRAL, GIB, 4)
