import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.cache import human_bytes


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (4096, "4 KiB"),
        (110_592, "108 KiB"),
        (16 << 20, "16 MiB"),
        ((16 << 20) + 1, "16.1 MiB"),
        (3 << 30, "3 GiB"),
    ],
)
def test_bytes_read_like_a_budget(count: int, words: str) -> None:
    assert human_bytes(count) == words


@given(st.integers(0, 1 << 42))
def test_a_budget_copied_from_a_message_is_never_too_small(count: int) -> None:
    number, unit = human_bytes(count).split()
    size = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]
    assert round(float(number) * 10) * size >= count * 10
