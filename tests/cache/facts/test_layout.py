import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.cache import BlobLayout, PackLayer, PackSpec, TensorSpec

SPECS = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.tuples(
        st.sampled_from(["float32", "bfloat16", "int8", "bool"]),
        st.lists(st.integers(0, 70), max_size=3),
    ),
    max_size=5,
)


@given(SPECS)
def test_tensors_are_aligned_apart_and_inside(tensors: dict[str, tuple[str, list[int]]]) -> None:
    layout = BlobLayout.of(tensors)
    end = 0
    for tensor, offset in zip(layout.tensors, layout.offsets, strict=True):
        assert offset % 64 == 0
        assert offset >= end
        end = offset + tensor.size_bytes
    assert layout.size_bytes == end <= layout.stride_bytes
    assert layout.stride_bytes % 4096 == 0
    assert layout.stride_bytes - max(1, end) < 4096


def test_the_demo_expert_needs_no_padding() -> None:
    layout = BlobLayout.of({"gate_up": ("bfloat16", (64, 576)), "down": ("bfloat16", (576, 32))})
    assert layout.size_bytes == layout.stride_bytes == 110_592


def test_a_dtype_that_cannot_be_packed_is_named() -> None:
    with pytest.raises(ValueError, match="complex64"):
        TensorSpec("up", "complex64", (2,))


def test_totals_are_sums_of_strides() -> None:
    small, large = BlobLayout.of({"a": ("int8", (1,))}), BlobLayout.of({"a": ("int8", (5000,))})
    spec = PackSpec("m", "native", (PackLayer("x", 3, small), PackLayer("y", 2, large)))
    assert spec.total_bytes == 3 * 4096 + 2 * 8192
    assert spec.num_experts == 5
    assert spec.slot_bytes == 8192
