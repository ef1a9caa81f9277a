"""The dense part as int8: fewer bytes, nearly the same logits, routers untouched."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import opened, run_logits
from moestro.engine.facts.config import EngineConfig
from moestro.engine.kernels import Scratch, TileFormat, linear
from moestro.engine.lanes import choose_lane
from moestro.engine.model.meta_model import build_meta_model
from moestro.engine.planning.blueprint import inspect
from moestro.engine.weights.linears import (
    CompactLinear,
    Int8Weights,
    LastRows,
    StoredEmbedding,
    TileLinear,
    beside,
    settle,
)

PROMPT = list(range(20, 40))


def logits(folder: Path, cache: Path, **formats: Any) -> torch.Tensor:
    with opened(folder, cache, **formats) as loaded:
        return run_logits(loaded, [[(1, PROMPT)], [(1, [7])]])


@pytest.mark.parametrize(
    "family",
    [
        "granitemoeshared",
        "gpt_oss",
        *(pytest.param(family, marks=pytest.mark.slow) for family in ("mixtral", "olmoe")),
    ],
)
def test_int8_logits_are_near_the_native_ones(family: str, tmp_path: Path) -> None:
    """With all experts active: a rounding that turns a random router's choice is no error."""
    folder = tiny.build(family, tmp_path / family)
    native = logits(folder, tmp_path / "cache", experts_per_token=8)
    for formats, most in (
        ({"expert_format": "int8"}, 0.2),
        ({"dense_format": "int8"}, 0.2),
        ({"expert_format": "int8", "dense_format": "int8"}, 0.2),
        ({"expert_format": "int4"}, 0.4),
    ):
        found = logits(folder, tmp_path / "cache", experts_per_token=8, **formats)
        error = (found - native).norm() / native.norm()
        assert 0 < error < most, (formats, float(error))


@pytest.fixture(params=["tiles", "rows"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How linear layers lie: in rows where there is no library."""
    if request.param == "rows":
        monkeypatch.setattr("moestro.engine.formats.named.library", lambda: None)
    return str(request.param)


def test_every_linear_layer_but_the_routers_becomes_int8(tmp_path: Path, layout: str) -> None:
    compact = TileLinear if layout == "tiles" else CompactLinear
    folder = tiny.build("granitemoeshared", tmp_path / "model")  # its head is tied
    with opened(folder, tmp_path / "cache", dense_format="int8") as loaded:
        model = loaded.engine.runner.lane.model
        kinds = {path: type(module) for path, module in model.named_modules()}
        assert torch.nn.Linear not in kinds.values()
        assert kinds["lm_head"] is compact
        assert kinds["model.layers.0.self_attn.q_proj"] is compact
        router = model.get_submodule("model.layers.0.block_sparse_moe.router")
        assert router.weight.dtype == torch.float32
        assert not list(model.get_submodule("lm_head").parameters())


def test_the_plan_counts_the_smaller_weights(tmp_path: Path, layout: str) -> None:
    folder = tiny.build("mixtral", tmp_path / "model", torch.bfloat16)
    dense = {}
    for name in ("native", "int8"):
        with opened(folder, tmp_path / "cache", dense_format=name) as loaded:
            dense[name] = loaded.plan.demand.dense_bytes
            model = loaded.engine.runner.lane.model
            held = sum(p.numel() * 4 for p in model.parameters())
            for module in model.modules():
                if isinstance(module, CompactLinear):
                    held += module.weights.size_bytes
                if isinstance(module, TileLinear):
                    held += module.tiles.nbytes
                if isinstance(module, StoredEmbedding):
                    held += module.rows.nbytes
            assert held == dense[name]
    assert dense["int8"] < (0.8 if layout == "tiles" else 0.6) * dense["native"]


@pytest.mark.parametrize("family", ["mixtral", "granitemoeshared"])
@pytest.mark.parametrize("dense_format", ["native", "int8"])
def test_an_embedding_keeps_the_checkpoints_bytes_and_every_bit(
    family: str, dense_format: str, tmp_path: Path, layout: str
) -> None:
    """But for one that a native head in rows is tied to: it is multiplied with, in fp32."""
    folder = tiny.build(family, tmp_path / "model", torch.bfloat16)
    wanted = tiny.oracle(folder).get_input_embeddings().weight
    with opened(folder, tmp_path / "cache", dense_format=dense_format) as loaded:
        found = loaded.engine.runner.lane.model.get_input_embeddings()
        shared = family == "granitemoeshared" and dense_format == "native" and layout == "rows"
        assert isinstance(found, StoredEmbedding) != shared
        ids = torch.arange(50)
        assert found(ids).dtype == torch.float32
        assert torch.equal(found(ids), wanted[:50].float())


def test_rows_are_prepared_once_for_layers_that_read_the_same_tensor() -> None:
    class Counting(Int8Weights):
        begun = 0

        def begin(self, rows: torch.Tensor) -> Any:
            Counting.begun += 1
            return super().begin(rows)

    torch.manual_seed(0)
    last = LastRows()
    linears = [torch.nn.Linear(32, 48), torch.nn.Linear(32, 16)]
    made = [CompactLinear(each, Counting.encode(each.weight.detach()), last) for each in linears]
    one, other = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    with torch.inference_mode():
        for rows, begun in ((one, 1), (other, 2), (one, 3)):
            for compact, linear in zip(made, linears, strict=True):
                assert (compact(rows) - linear(rows)).abs().max() < 0.03
            assert Counting.begun == begun
        del rows, one
        again = torch.randn(1, 3, 32)  # may lie where the freed tensor lay
        assert (made[0](again) - linears[0](again)).abs().max() < 0.03


def test_a_model_that_changes_its_inputs_in_place_is_noticed(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    blueprint = inspect(EngineConfig(folder, tmp_path / "cache"))
    assert blueprint.topology.inputs_unchanged
    model = build_meta_model(blueprint.checkpoint, torch.float32)

    def double(_: torch.nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> None:
        inputs[0].mul_(2)

    query = model.get_submodule("model.layers.1.self_attn.q_proj")
    query.register_forward_hook(double)
    assert not choose_lane(model, lambda: model).inputs_unchanged


@pytest.mark.parametrize("slots", [32, 5, 2])
def test_int8_logits_do_not_depend_on_the_budget_either(slots: int, tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    formats = {"expert_format": "int8", "dense_format": "int8"}
    wanted = logits(folder, tmp_path / "cache", **formats)
    with opened(folder, tmp_path / "cache", host_memory_bytes=slots * 16384, **formats) as loaded:
        assert loaded.cache.plan.slots == slots
        assert torch.equal(run_logits(loaded, [[(1, PROMPT)], [(1, [7])]]), wanted)


def two_layers() -> tuple[TileLinear, TileLinear]:
    torch.manual_seed(0)
    form, scratch = TileFormat("int8"), Scratch()
    first, second = (torch.nn.Linear(64, 32, bias=False) for _ in range(2))
    return TileLinear.encode(first, form, scratch), TileLinear.encode(second, form, scratch)


def test_settled_layers_lie_one_behind_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """They give what they gave, and what joins two of them copies nothing."""
    monkeypatch.setattr("moestro.engine.weights.linears.huge_memory", bytearray)
    first, second = two_layers()
    rows, calls = torch.randn(3, 64), list[int]()
    wanted = [first.forward(rows), second.forward(rows)]
    apart = beside(*two_layers())
    settle(torch.nn.ModuleList([first, second]), lambda: calls.append(1))
    assert len(calls) == 2
    assert first.tiles.data_ptr() + first.tiles.nbytes == second.tiles.data_ptr()
    before = first.tiles.data_ptr()
    joined = beside(first, second)
    assert first.tiles.data_ptr() == before == joined.struct.tiles
    assert torch.equal(torch.cat(wanted, dim=1), linear(rows, joined, None, Scratch()))
    assert torch.equal(linear(rows, apart, None, Scratch()), linear(rows, joined, None, Scratch()))
    assert torch.equal(first.forward(rows), wanted[0])
    assert torch.equal(second.forward(rows), wanted[1])


def test_without_huge_pages_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.engine.weights.linears.huge_memory", lambda _: None)
    layers = two_layers()
    before = [each.tiles.data_ptr() for each in layers]
    settle(torch.nn.ModuleList(layers), lambda: pytest.fail("nothing has moved"))
    assert [each.tiles.data_ptr() for each in layers] == before
