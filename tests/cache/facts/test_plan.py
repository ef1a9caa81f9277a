import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.cache import CacheConfig, DoesNotFit, HostMode, plan_slots, plan_tiers
from tiny_packs import tiny_spec

SPEC = tiny_spec(6, 6, 6)  # slots of 8192 bytes, 18 experts


@given(capacity=st.integers(0, 300_000), least=st.integers(1, 18), staging=st.integers(0, 20_000))
def test_a_plan_stays_within_its_budget_or_says_what_would_do(
    capacity: int, least: int, staging: int
) -> None:
    try:
        plan = plan_slots(capacity, SPEC, least, staging)
    except DoesNotFit as error:
        assert error.needed_bytes > capacity
        assert plan_slots(error.needed_bytes, SPEC, least, staging).slots == least
        with pytest.raises(DoesNotFit):
            plan_slots(error.needed_bytes - 1, SPEC, least, staging)
    else:
        assert plan.used_bytes == plan.arena_bytes + staging <= capacity
        assert least <= plan.slots <= 18
        assert plan.holds_all == (capacity - staging >= 18 * 8192)


def test_the_refusal_has_the_sums() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan_slots(20_000, SPEC, 4)
    assert "holds 2 experts of 8 KiB" in str(caught.value)
    assert "4 must fit" in str(caught.value)
    assert "32 KiB (32768 bytes)" in str(caught.value)


def test_a_step_never_needs_more_than_the_model_has() -> None:
    assert plan_slots(18 * 8192, SPEC, 999).holds_all


def test_a_plan_reads_as_one_line() -> None:
    line = str(plan_slots(9 * 8192, SPEC, 1))
    assert line == "9 slots of 8 KiB for 18 experts (50 %), 72 KiB of 72 KiB"


@pytest.mark.parametrize("wrong", [{"readers": 0}, {"staging_bytes": -1}])
def test_a_config_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="not"):
        CacheConfig(capacity_bytes=1 << 20, **wrong)


@given(
    device=st.none() | st.integers(0, 300_000),
    host=st.integers(0, 300_000),
    least=st.integers(1, 18),
    staging=st.integers(0, 20_000),
)
def test_tiers_stay_within_both_budgets_or_say_which_is_too_small(
    device: int | None, host: int, least: int, staging: int
) -> None:
    try:
        plan = plan_tiers(device, host, SPEC, least, staging)
    except DoesNotFit as error:
        if device is not None:
            tier, given = (
                str(error).partition(":")[0],
                {"the device": device, "the host tier": host},
            )
            assert error.needed_bytes > given[tier]
        else:
            assert error.needed_bytes > host
        return
    assert plan.host.used_bytes <= host
    assert (plan.device is None) == (plan.mode is None) == (device is None)
    if plan.device is not None and device is not None:
        assert plan.device.used_bytes <= device
        assert plan.device.slots >= least
        assert plan.host.slots >= 2
        whole = plan.mode is HostMode.WHOLE
        assert whole == plan.host.holds_all
        assert whole or plan.mode is HostMode.EXCLUSIVE


def test_a_plan_of_tiers_names_both() -> None:
    text = str(plan_tiers(2 * 8192, 5 * 8192, SPEC, 1))
    assert text.startswith("device: 2 slots of 8 KiB")
    assert "host (exclusive): 5 slots" in text
    assert str(plan_tiers(None, 5 * 8192, SPEC, 1)).startswith("5 slots of 8 KiB")
