"""What smaller formats gain and cost, as one line; and where there is nothing to say."""

from moestro.engine.facts.units import MIB
from moestro.engine.forecasts.gains import DEMO_PERPLEXITY, Reading, gains_over

NOW = Reading("native", "native", 500 * MIB)
INT8 = Reading("int8", "int8", 250 * MIB)
INT4 = Reading("int4", "int8", 155 * MIB)


def test_the_line_names_bytes_ratios_and_costs() -> None:
    gains = gains_over(NOW, [INT8, INT4])
    assert gains is not None
    assert gains.line() == (
        "formats: native reads 500 MiB a token; --expert-format int8 --dense-format int8 would"
        " read 250 MiB (0.50 x) and costs the demo 0.8 % perplexity; --expert-format int4"
        " --dense-format int8 155 MiB (0.31 x), 1.7 %"
    )
    assert [gains.ratio(one) for one in gains.smaller] == [0.5, 0.31]


def test_half_native_is_named_by_both_parts() -> None:
    gains = gains_over(Reading("int8", "native", 300 * MIB), [INT8, INT4])
    assert gains is not None
    assert gains.line().startswith("formats: int8 (dense: native) reads 300 MiB a token; ")


def test_what_reads_no_less_is_not_named() -> None:
    now = Reading("int4", "native", INT8.token_bytes)
    gains = gains_over(now, [INT8, INT4])
    assert gains is not None and gains.smaller == (INT4,)
    assert gains_over(Reading("native", "native", INT4.token_bytes), [INT8, INT4]) is None


def test_where_nothing_is_native_nothing_is_said() -> None:
    assert gains_over(INT8, [INT4]) is None


def test_every_cost_is_one() -> None:
    assert set(DEMO_PERPLEXITY) == {INT8.formats, INT4.formats}
    assert all(1 < ratio < 1.06 for ratio in DEMO_PERPLEXITY.values())
