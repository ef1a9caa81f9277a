"""What a format promises, for each of them; and what int8 promises beyond."""

import pytest
import torch

from moestro.engine.facts import StartError
from moestro.engine.formats import matrices
from moestro.engine.formats.matrices import (
    SCALE,
    Codec,
    dtype_name,
    multiply_fine,
    multiply_int8,
    quantize_fine,
    quantize_rows,
)
from moestro.engine.formats.named import FORMATS, TILED, TILES_ALONE, codec_of

EXPERTS, OUT, IN = 3, 48, 32
ROWS = " rows"  # for torch's products, as where there is no library
CODECS = (*FORMATS, *(name + ROWS for name in TILED if name not in TILES_ALONE))


def codec_named(name: str) -> Codec:
    return codec_of(name.removesuffix(ROWS), torch.float32, rows=name.endswith(ROWS))


def source(transposed: bool, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shape = (EXPERTS, IN, OUT) if transposed else (EXPERTS, OUT, IN)
    return {
        "up_proj": torch.randn(shape, dtype=dtype),
        "up_proj_bias": torch.randn(EXPERTS, OUT, dtype=dtype),
    }


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_encoded_tensors_are_what_the_layout_says(name: str, transposed: bool) -> None:
    codec, tensors = codec_named(name), source(transposed)
    kinds = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    layout = codec.layout(kinds, transposed)
    encoded = codec.encode(tensors, transposed)
    assert {
        key: (dtype_name(tensor.dtype), tuple(tensor.shape[1:])) for key, tensor in encoded.items()
    } == layout
    assert all(tensor.shape[0] == EXPERTS for tensor in encoded.values())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        *(("native", 1e-6), ("native rows", 1e-6), ("int8", 0.02), ("int8 rows", 0.02)),
        *(("int4", 0.12), ("int4 rows", 0.12), ("mxfp4", 0.15), ("nf4", 0.12)),
    ],
)
def test_products_are_near_those_of_the_source(name: str, error: float, transposed: bool) -> None:
    codec, tensors = codec_named(name), source(transposed)
    encoded = codec.encode(tensors, transposed)
    rows = torch.randn(5, IN)
    for expert in range(EXPERTS):
        one = {key: tensor[expert] for key, tensor in encoded.items()}
        found = codec.multiply(codec.begin(rows), codec.open(one, "up_proj", transposed))
        weight = tensors["up_proj"][expert].float()
        wanted = rows @ (weight if transposed else weight.t())
        assert (found - wanted).norm() <= error * wanted.norm()


@pytest.mark.parametrize("name", CODECS)
def test_taken_rows_are_the_rows(name: str) -> None:
    codec = codec_named(name)
    one = {key: tensor[0] for key, tensor in codec.encode(source(False), False).items()}
    matrix = codec.open(one, "up_proj", False)
    rows, places = torch.randn(6, IN), torch.tensor([4, 1, 5])
    taken = codec.multiply(codec.take(codec.begin(rows), places), matrix)
    wanted = codec.multiply(codec.begin(rows[places]), matrix)
    assert torch.equal(taken, wanted)


@pytest.mark.parametrize("name", CODECS)
def test_many_matrices_at_once_are_each_alone_bit_for_bit(name: str) -> None:
    codec = codec_named(name)
    encoded = codec.encode(source(False), False)
    matrices = [
        codec.open({key: tensor[expert] for key, tensor in encoded.items()}, "up_proj", False)
        for expert in (2, 0, 1)
    ]
    rows = codec.begin(torch.randn(6, IN))
    spans = [(0, 3), (3, 4), (4, 6)]
    together = codec.multiply_each(rows, spans, matrices)
    for (start, end), matrix in zip(spans, matrices, strict=True):
        alone = codec.take(rows, torch.arange(start, end))
        assert torch.equal(
            together[start:end], codec.multiply_each(alone, [(0, end - start)], [matrix])
        )
        near = codec.multiply(alone, matrix)
        assert (together[start:end] - near).abs().max() <= 1e-5 * near.abs().max()
    shared = codec.take(rows, torch.tensor([2]))
    three = codec.take(rows, torch.arange(3))
    for some, width in ((shared, 1), (three, 3)):
        apart = codec.multiply_apart(some, matrices)
        for index, matrix in enumerate(matrices):
            row = codec.take(some, torch.tensor([index % width]))
            assert torch.equal(apart[index : index + 1], codec.multiply_apart(row, [matrix]))
            near = codec.multiply(row, matrix)
            assert (apart[index : index + 1] - near).abs().max() <= 1e-5 * near.abs().max()


@pytest.mark.parametrize("name", ["int8", "int8 rows", "int4"])
def test_company_cannot_change_a_row(name: str) -> None:
    """One scale for a whole tensor would: a large neighbour would coarsen this row."""
    codec = codec_named(name)
    one = {key: tensor[0] for key, tensor in codec.encode(source(False), False).items()}
    matrix = codec.open(one, "up_proj", False)
    row, giants = torch.randn(1, IN), 1000 * torch.randn(7, IN)
    alone = codec.multiply(codec.begin(row), matrix)
    company = codec.multiply(codec.begin(torch.cat([giants, row])), matrix)
    assert torch.equal(company[-1:], alone)


def test_int8_rounds_to_half_a_step_and_keeps_zeros() -> None:
    rows = torch.cat([torch.randn(4, IN), torch.zeros(1, IN)])
    values, scale = quantize_rows(rows)
    assert values.dtype == torch.int8
    assert int(values.abs().max()) == 127
    assert ((values * scale - rows).abs() <= scale / 2 + 1e-7).all()
    assert torch.equal(values[4], torch.zeros(IN, dtype=torch.int8))


def test_two_digits_keep_small_numbers_beside_large_ones() -> None:
    """One int8 digit loses everything below 1/254 of a row's largest number; two do not."""
    torch.manual_seed(1)
    rows = torch.randn(3, IN)
    rows[:, 5] = 500.0
    weight, scale = quantize_rows(torch.randn(OUT, IN))
    exact = rows @ (weight * scale).t()
    fine = multiply_fine(quantize_fine(rows), weight.t(), scale[:, 0])
    coarse = multiply_int8(quantize_rows(rows), (weight.t(), scale[:, 0]))
    assert (fine - exact).abs().max() < 2e-4 * exact.abs().max()
    assert (fine - exact).norm() < (coarse - exact).norm() / 50
    alone = multiply_fine(quantize_fine(rows[1:2]), weight.t(), scale[:, 0])
    assert torch.equal(alone, fine[1:2]), "company cannot change a row"
    nothing = quantize_fine(torch.zeros(1, IN))
    assert torch.equal(multiply_fine(nothing, weight.t(), scale[:, 0]), torch.zeros(1, OUT))


def test_int8_takes_half_the_bytes_of_bf16() -> None:
    codec = codec_named("int8 rows")
    layout = codec.layout({"up_proj": (torch.bfloat16, (8, 1024, 512))}, False)
    assert layout == {
        "up_proj": ("int8", (1024, 512)),
        f"up_proj.{SCALE}": ("float32", (1024,)),
    }


def test_what_tiles_alone_can_is_refused_elsewhere() -> None:
    for name in TILES_ALONE:
        with pytest.raises(StartError, match="install a C compiler"):
            codec_of(name, torch.float32, rows=True)
        with pytest.raises(StartError, match="for the CPU's kernels alone"):
            codec_of(name, torch.float16, "cuda")


def test_int8_is_exact_where_torchs_product_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "int_mm_is_exact", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    rows = torch.randint(-127, 128, (5, 2100), dtype=torch.int8)
    rows[0], rows[1] = 127, -127
    weight = torch.randint(-127, 128, (2100, 48), dtype=torch.int8)
    weight[:, 0], weight[:, 1] = 127, -127
    wanted = (rows.long() @ weight.long()).int()
    assert torch.equal(matrices.int_mm(rows, weight), wanted)
    codec = matrices.Int8Codec(torch.float32, "cpu")
    ones, pair = torch.ones(5, 1), [(weight, torch.ones(48))] * 2
    together = codec.multiply_each((rows, ones), [(0, 2), (2, 5)], pair)
    assert torch.equal(together, wanted.float())
    apart = codec.multiply_apart((rows[:2], ones[:2]), pair)
    assert torch.equal(apart, wanted[:2].float())
