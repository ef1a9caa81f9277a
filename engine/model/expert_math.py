"""What one expert computes: first product, activation, second product, in its codec's products.

Shape letters: H width of the experts' input and output, n rows, k experts per token, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from moestro.engine.formats import Codec, Span, as_tile, per_row
from moestro.engine.kernels import (
    Activation,
    ExpertTable,
    Groups,
    OpenTable,
    Routed,
    Scratch,
    TileExpert,
    energies_of,
    known_activation,
    multiply_experts,
)

VECTOR = 32  # numbers: an activation of rows of whole vectors does not depend on their company


class _Expert(NamedTuple):
    """One expert's weights as the codec wants them: views into its slot, valid as those are."""

    first: Any
    first_bias: torch.Tensor | None
    down: Any
    down_bias: torch.Tensor | None
    tensors: dict[str, torch.Tensor]  # keeps the identity that this was found by


class ExpertMath:
    """What experts modules with the same flags compute, whatever the layer."""

    def __init__(self, module: torch.nn.Module, codec: Codec) -> None:
        self.codec = codec
        self._gated = bool(module.has_gate)
        self._first = "gate_up_proj" if self._gated else "up_proj"
        self._biased, self._transposed = bool(module.has_bias), bool(module.is_transposed)
        self._normed = bool(module.has_post_expert_norm)
        self._opened: dict[int, _Expert] = {}  # by the identity of a slot's views, which stay
        self._tiled: dict[int, tuple[TileExpert, _Expert]] = {}
        self._tables: dict[int, tuple[ExpertTable, object]] = {}  # by a layer's views, which stay
        self._open_tables: dict[int, OpenTable] = {}  # by the number of experts of a layer
        self._scratch, self._results = Scratch(), Scratch()
        self._groups: Groups | None = None  # of the sizes of the last call

    def open(self, tensors: dict[str, torch.Tensor]) -> _Expert:
        """Views are made once per slot: each would cost a microsecond."""
        found = self._opened.get(id(tensors))
        if found is None:
            first, down = self._first, "down_proj"
            found = self._opened[id(tensors)] = _Expert(
                self.codec.open(tensors, first, self._transposed),
                tensors[f"{first}_bias"] if self._biased else None,
                self.codec.open(tensors, down, self._transposed),
                tensors[f"{down}_bias"] if self._biased else None,
                tensors,
            )
        return found

    @property
    def tiled(self) -> bool:
        """One call computes all experts of a layer that are here: `together`."""
        return self.codec.tiled

    def known_activation(self, module: torch.nn.Module, inputs: int) -> Activation | None:
        """The library's, that gives what the module's own function makes of [n, inputs]."""
        alpha, limit = (float(getattr(module, name, 0.0)) for name in ("alpha", "limit"))
        with torch.inference_mode():
            return known_activation(
                lambda inner: self._activate(module, inner), inputs, alpha, limit
            )

    def results(self, count: int, width: int, *, complete: bool) -> torch.Tensor:
        """fp32 [count, width] for `together`, until the next call; zeros unless `complete`."""
        results = self._results.rows(count, width)
        return results if complete else results.zero_()

    def groups(self, ids: torch.Tensor, weights: torch.Tensor, experts: int) -> Groups:
        """The places of each expert, until the next call; `weights` fp32."""
        shape = (*ids.shape, experts)
        if self._groups is None or self._groups.shape != shape:
            self._groups = Groups(*shape)
        self._groups.take(ids.contiguous(), weights)
        return self._groups

    def together(
        self,
        module: torch.nn.Module,
        tensors: Sequence[dict[str, torch.Tensor]] | Mapping[int, dict[str, torch.Tensor]],
        routed: Routed | Groups,
        hidden: torch.Tensor,
        results: torch.Tensor,
        activation: Activation | None,
        energies: torch.Tensor | None = None,
    ) -> None:
        """Rows of `hidden` [T, H] through the experts with these views, into `results` [T * k, H].

        Of `Groups` the views are those of the whole layer, and stay, or of all experts in a group,
        by their numbers. `energies` fp32 [T * k],
        where wanted, gets the squared norms of the activations. A row's result does not depend on
        who else is in the call by a bit.
        """
        table: ExpertTable | OpenTable
        if isinstance(tensors, Mapping):
            table = self._open_table(routed, tensors)
        elif isinstance(routed, Groups):
            table = self._whole_table(tensors)
        else:
            table = ExpertTable([self._tile_expert(each) for each in tensors])
        own = activation or partial(self._activate_apart, module)
        multiply_experts(table, routed, hidden, results, own, self._scratch, energies)
        if self._normed:
            places = torch.tensor(routed.places)
            normed = module.post_expert_norm(results.index_select(0, places))  # type: ignore[operator]
            results.index_copy_(0, places, normed)

    def _whole_table(self, tensors: Sequence[dict[str, torch.Tensor]]) -> ExpertTable:
        found = self._tables.get(id(tensors))
        if found is None:
            table = ExpertTable([self._tile_expert(each) for each in tensors])
            found = self._tables[id(tensors)] = (table, tensors)
        return found[0]

    def _open_table(
        self, groups: Routed | Groups, tensors: Mapping[int, dict[str, torch.Tensor]]
    ) -> OpenTable:
        assert isinstance(groups, Groups)
        count = groups.shape[2]
        table = self._open_tables.get(count)
        if table is None:
            table = self._open_tables[count] = OpenTable(count)
        known, make = self._tiled.get, self._tile_expert
        experts = [
            found[0] if (found := known(id(each))) else make(each) for each in tensors.values()
        ]
        table.put(tensors, experts)
        return table

    def _tile_expert(self, tensors: dict[str, torch.Tensor]) -> TileExpert:
        found = self._tiled.get(id(tensors))
        if found is None:
            opened = self.open(tensors)
            first, down = as_tile(opened.first), as_tile(opened.down)
            expert = TileExpert.of(first, opened.first_bias, down, opened.down_bias)
            found = self._tiled[id(tensors)] = (expert, opened)
        return found[0]

    def one(
        self,
        module: torch.nn.Module,
        rows: Any,
        expert: _Expert,
        energies: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[n, H] -> [n, H] through one expert, as the module's own flags say.

        `energies` fp32 [n], where wanted, gets the squared norms of the activations.
        """
        inner = self.codec.multiply(rows, expert.first)
        if expert.first_bias is not None:
            inner += expert.first_bias
        inner = self._activate(module, inner)
        if energies is not None:
            energies.copy_(energies_of(inner))
        out = self.codec.multiply(self.codec.begin(inner), expert.down)
        if expert.down_bias is not None:
            out += expert.down_bias
        return module.post_expert_norm(out) if self._normed else out  # type: ignore[operator]

    def each(
        self,
        module: torch.nn.Module,
        rows: Any,
        spans: Sequence[Span],
        experts: Sequence[_Expert],
        energies: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Like `one`, the rows of each span through an expert of their own -> [n, H].

        `spans` as `Codec.multiply_each` wants them. A row's result does not depend on who else is
        in the call by a bit: whoever is resident, the sum must be the same.
        """
        counts = [end - start for start, end in spans]

        def multiply(rows: Any, matrices: Sequence[Any]) -> torch.Tensor:
            return self.codec.multiply_each(rows, spans, matrices)

        return self._through(module, rows, experts, multiply, counts, energies)

    def apart(
        self,
        module: torch.nn.Module,
        rows: Any,
        experts: Sequence[_Expert],
        energies: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Like `each`, for one token: its row through every expert -> [n, H]."""
        return self._through(module, rows, experts, self.codec.multiply_apart, None, energies)

    def _through(
        self,
        module: torch.nn.Module,
        rows: Any,
        experts: Sequence[_Expert],
        multiply: Callable[[Any, Sequence[Any]], torch.Tensor],
        counts: Sequence[int] | None,
        energies: torch.Tensor | None,
    ) -> torch.Tensor:
        """`counts` rows of each expert; None: one of each."""
        inner = multiply(rows, [expert.first for expert in experts])
        if self._biased:
            inner += per_row([expert.first_bias for expert in experts], counts)  # type: ignore[misc]
        inner = self._activate_apart(module, inner, counts)
        if energies is not None:
            energies.copy_(energies_of(inner))
        out = multiply(self.codec.begin(inner), [expert.down for expert in experts])
        if self._biased:
            out += per_row([expert.down_bias for expert in experts], counts)  # type: ignore[misc]
        return module.post_expert_norm(out) if self._normed else out  # type: ignore[operator]

    def _activate_apart(
        self, module: torch.nn.Module, inner: torch.Tensor, counts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Of `counts` rows of each expert, or of one: no row depends on its company."""
        if inner.shape[1] % (2 * VECTOR) == 0:
            return self._activate(module, inner)
        parts = torch.split(inner, 1 if counts is None else list(counts))
        return torch.cat([self._activate(module, part) for part in parts])

    def _activate(self, module: torch.nn.Module, inner: torch.Tensor) -> torch.Tensor:
        return module._apply_gate(inner) if self._gated else module.act_fn(inner)  # type: ignore[no-any-return,operator]


class MathByFlags:
    """One ExpertMath for all modules of the same flags: they borrow the same slots."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._made: dict[tuple[object, ...], ExpertMath] = {}

    def of(self, module: torch.nn.Module) -> ExpertMath:
        names = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
        flags = tuple(getattr(module, name) for name in names)
        if flags not in self._made:
            self._made[flags] = ExpertMath(module, self._codec)
        return self._made[flags]
