"""Found at the same character however the text is cut, and read once."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.engine.text.stop_strings import Found, StopStrings, _fallbacks

FEW = st.text("ab", max_size=30)


@given(text=FEW, stop=st.lists(st.text("ab", min_size=1, max_size=6), max_size=3).map(tuple))
@settings(max_examples=300, deadline=None)
def test_the_first_to_be_complete_is_found(text: str, stop: tuple[str, ...]) -> None:
    stops = StopStrings(stop)
    for end in range(1, len(text) + 1):
        complete = [len(one) for one in stop if text[:end].endswith(one)]
        found = stops.push(text[end - 1])
        assert found == (Found(1, max(complete)) if complete else None)
        if found:
            return
        begun = [n for one in stop for n in range(len(one)) if text[:end].endswith(one[:n])]
        assert stops.open_chars == max(begun, default=0)


@given(text=FEW, cut=st.integers(0, 30), stop=st.text("ab", min_size=1, max_size=6))
def test_a_cut_in_the_text_changes_nothing(text: str, cut: int, stop: str) -> None:
    whole, pieces = StopStrings((stop,)), StopStrings((stop,))
    first = pieces.push(text[:cut])
    second = None if first else pieces.push(text[cut:])
    begin = cut if second else 0
    found = first or second
    assert whole.push(text) == (found and Found(begin + found.end_chars, found.length_chars))


def test_a_long_stop_string_costs_steps_for_its_length_only() -> None:
    """The fallbacks are what keeps a character from being read again and again."""
    assert _fallbacks("aabaaab") == [0, 1, 0, 1, 2, 2, 3]
    stops = StopStrings(("a" * 50_000 + "b",))
    assert stops.push("a" * 200_000) is None and stops.open_chars == 50_000
    assert stops.push("b") == Found(1, 50_001)
