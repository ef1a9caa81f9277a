"""Each instruction set of the library in turn; the best again afterwards."""

from collections.abc import Iterator

import pytest

from moestro.engine.kernels import instruction_sets
from moestro.engine.kernels.library import choose


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    choose(request.param)
    yield request.param
    choose(instruction_sets()[0])
