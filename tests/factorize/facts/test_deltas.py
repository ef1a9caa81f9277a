"""Deltas: the same after a file, the same bits on every machine, refused where they do not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moestro.factorize.facts import (
    BITS,
    DeltaFacts,
    Deltas,
    FactorizeError,
    SourceRefused,
    low_rank,
)

LAYERS, NEURONS, HIDDEN, RANK = 2, 12, 8, 3
FACTS = DeltaFacts("plan", "texts", "distilled", "the command", 7, 3584)


def thin(part: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = (HIDDEN, NEURONS) if part == "down" else (NEURONS, HIDDEN)
    return (
        torch.randn(LAYERS, outputs, RANK, generator=generator),
        torch.randn(LAYERS, RANK, inputs, generator=generator),
    )


def some(bits: int = 8) -> Deltas:
    tensors: dict[str, torch.Tensor] = {}
    for seed, part in enumerate(("gate", "up", "down")):
        tensors |= low_rank(part, *thin(part, seed), RANK, bits)
    tensors["down.whole"] = torch.randn(LAYERS, HIDDEN, NEURONS).half()
    return Deltas(tensors, FACTS)


@pytest.mark.parametrize("bits", BITS)
def test_a_file_gives_them_back(bits: int, tmp_path: Path) -> None:
    deltas = some(bits)
    deltas.write(tmp_path / "deltas")
    found = Deltas.read(tmp_path / "deltas")
    assert found.facts == FACTS and found.sha256 == deltas.sha256 and found.bits == bits
    found.check_fits(LAYERS, NEURONS, HIDDEN, "plan")
    weight = torch.randn(HIDDEN, NEURONS)
    assert torch.equal(found.add_to(weight, "down", 1), deltas.add_to(weight, "down", 1))


@pytest.mark.parametrize(("bits", "lost"), [(8, 0.02), (4, 0.25)])
@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_whole_rank_is_the_product_up_to_its_bits(part: str, bits: int, lost: float) -> None:
    into, out_of = thin(part, seed=5)
    deltas = Deltas(low_rank(part, into, out_of, RANK, bits), FACTS)
    for layer in range(LAYERS):
        product = into[layer] @ out_of[layer]
        found = deltas.add_to(torch.zeros_like(product), part, layer)
        assert (found - product).norm() < lost * product.norm()


def test_a_lower_rank_keeps_the_largest_singular_values() -> None:
    """Eckart-Young: what is lost is the tail, but for the rounding."""
    into, out_of = thin("up", seed=6)
    product = (into[0] @ out_of[0]).double()
    tail = torch.linalg.svdvals(product)[2]
    found = Deltas(low_rank("up", into, out_of, 2), FACTS).add_to(
        torch.zeros_like(product), "up", 0
    )
    assert (found.double() - product).norm() == pytest.approx(float(tail), rel=0.05)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_four_bits_lie_in_half_the_bytes(rank: int) -> None:
    """Each number is where it belongs, an odd rank's last vector alone in its bytes."""
    into, out_of = thin("gate", seed=8)
    wide, narrow = (Deltas(low_rank("gate", into, out_of, rank, bits), FACTS) for bits in (8, 4))
    assert narrow.tensors["gate.into"].shape == (LAYERS, NEURONS, (rank + 1) // 2)
    assert narrow.tensors["gate.out_of"].shape == (LAYERS, (rank + 1) // 2, HIDDEN)
    for layer in range(LAYERS):
        for exact, rounded in zip(shown(wide, layer), shown(narrow, layer), strict=True):
            assert rounded.shape == exact.shape
            assert ((rounded - exact).norm(dim=1) < 0.2 * exact.norm(dim=1)).all()


def shown(deltas: Deltas, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors of one layer's gate, each of length about one: [r, outputs], [r, inputs]."""
    found = deltas.thin("gate", layer)
    assert found is not None
    into, out_of, _ = found
    columns, rows = into.T.double(), out_of.double()
    return columns / columns.norm(dim=1, keepdim=True), rows / rows.norm(dim=1, keepdim=True)


def test_four_bits_cut_what_stands_far_out() -> None:
    """One number ten times as large as the rest would leave the rest none of fifteen steps."""
    row = torch.ones(1, 1, 64)
    row[..., ::2] = -1.0
    row[..., 0] = 10.0
    into = torch.ones(1, 4, 1)
    found = Deltas(low_rank("up", into, row, 1, bits=4), FACTS).add_to(torch.zeros(4, 64), "up", 0)
    assert (found[0, 1:].abs() > 0.5).all()


def test_a_matrix_and_a_product_add_up() -> None:
    deltas, weight = some(), torch.randn(HIDDEN, NEURONS)
    product = Deltas({k: v for k, v in deltas.tensors.items() if "whole" not in k}, FACTS)
    wanted = product.add_to(weight, "down", 0) + deltas.tensors["down.whole"][0].float()
    assert torch.allclose(deltas.add_to(weight, "down", 0), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "neurons", "plan", "words"),
    [
        (LAYERS, NEURONS, "other", "made for another plan"),
        (LAYERS + 1, NEURONS, "plan", "does not fit the model"),
        (LAYERS, NEURONS + 1, "plan", "does not fit the model"),
    ],
)
def test_what_does_not_fit_is_refused(layers: int, neurons: int, plan: str, words: str) -> None:
    with pytest.raises(SourceRefused, match=words):
        some().check_fits(layers, neurons, HIDDEN, plan)


def test_an_unknown_tensor_is_refused() -> None:
    deltas = Deltas({"gate.more": torch.zeros(1)}, FACTS)
    with pytest.raises(SourceRefused, match=r"gate\.more"):
        deltas.check_fits(LAYERS, NEURONS, HIDDEN, "plan")


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"order": torch.zeros(1)}, tmp_path / "plan")
    (tmp_path / "words").write_text("no tensors")
    for name in ("plan", "words", "none"):
        with pytest.raises(FactorizeError, match="has no deltas of moestro"):
            Deltas.read(tmp_path / name)
