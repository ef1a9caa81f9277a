"""compressed-tensors files as its own package writes and reads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moestro.engine.quantized.compressed import compressed_slices
from moestro.engine.quantized.config import Quantization
from moestro.engine.quantized.slices import Grid

OUTPUTS, INPUTS = 48, 128
EACH: dict[str, tuple[str, dict[str, Any]]] = {
    "groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "groups with zeros": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
    ),
    "rows of int4": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "groups of 8 bits": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 with zeros": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "fp8 rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 of one scale": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
}


def grouped(weight: torch.Tensor, said: dict[str, Any]) -> torch.Tensor:
    """[O, G, numbers with one scale]; a whole matrix is [1, 1, all]."""
    if said["strategy"] == "tensor":
        return weight.reshape(1, 1, -1)
    return weight.view(OUTPUTS, -1, said.get("group_size", INPUTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EACH)
def test_matrices_are_what_the_package_makes_of_them(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """To the bit, in the dtype of the scales."""
    package = pytest.importorskip("compressed_tensors", exc_type=ImportError)
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    form, said = EACH[kind]
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**said)
    )
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(5)).to(dtype)
    groups = grouped(weight, said)
    scale, zero = helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    if said["strategy"] == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    given = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    stored = compressor.compress(given, scheme)
    wanted = compressor.decompress(stored, scheme)["weight"]
    assert wanted.dtype is dtype, package.__version__
    parts = {f"x.{name}": part.contiguous() for name, part in stored.items()}
    save_file(parts, tmp_path / "one.safetensors")
    fields = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        said_here = Quantization(tmp_path / "config.json", fields)
        found, taken = compressed_slices(slices, said_here, dtype)
        assert found.keys() == {"x.weight"} and taken == parts.keys()
        assert torch.equal(found["x.weight"][...], wanted)
        grid = found["x.weight"].grid
        assert isinstance(grid, Grid) == (said["num_bits"] == 4 or said.get("type") == "float")
