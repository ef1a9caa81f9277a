"""How many experts a density keeps, and which."""

import pytest

from moestro.engine.selection import kept_count, largest


@pytest.mark.parametrize(
    ("num_experts", "density", "count"),
    [(8, 1.0, 8), (8, 0.5, 4), (8, 0.01, 1), (5, 0.5, 3), (7, 0.5, 4), (60, 0.33, 20), (1, 0.1, 1)],
)
def test_the_nearest_number_and_at_least_one(num_experts, density, count):
    assert kept_count(num_experts, density) == count


def test_the_largest_come_first_and_equals_by_their_numbers():
    assert largest([0.1, 0.4, 0.0, 0.4, 0.1, 0.0], 0.5) == (1, 3, 0)
    assert largest([0.0] * 4, 1.0) == (0, 1, 2, 3)
