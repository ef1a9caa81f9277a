"""Runs the dense model over calibration texts once, with one layer of it in memory.

All windows pass one layer before the next one is read. What each layer's FFN saw can be kept in a
work folder: a stopped run goes on where it stopped, and another split or router observes nothing.
Letters: N windows, S tokens of one, T = N * S, H hidden size, I neurons of one FFN.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moestro.factorize.facts import WorkFolder
from moestro.factorize.sources import DenseModel, TensorReader

from .calibration import LayerSample

WINDOWS_AT_ONCE = 4
HIDDEN = "hidden"


class LayerStack:
    """The dense model's layers, one at a time: a stock module with each layer's weights."""

    def __init__(self, dense: DenseModel, reader: TensorReader, window_tokens: int) -> None:
        config = copy.deepcopy(dense.config)
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM
            model = auto.from_config(
                config,
                dtype=torch.float32,
                attn_implementation="sdpa",
                trust_remote_code=False,
            )
        self._layers = model.model.layers.eval()
        self._layer = self._layers[0]
        self._reader = reader
        self._family = dense.family
        self._windows = [kind.window for kind in dense.family.layers(config)]
        self._window: int | None = None
        fields = dense.family.twin_fields(config)
        self._embedding_scale = float(fields.get("embedding_multiplier", 1.0))
        self._positions = torch.arange(window_tokens)[None]
        rotary = type(model.model.rotary_emb)(config=config)
        self._angles = rotary(torch.zeros(1, 1, 1), self._positions)

    def embedded(self, windows: torch.Tensor) -> torch.Tensor:
        """[N, S, H] from ids [N, S]."""
        rows = self._reader.get("model.embed_tokens.weight")[windows].float()
        return rows * self._embedding_scale

    def load(self, index: int) -> Any:
        """The layer's module, with its weights in fp32 until the next call."""
        prefix = f"model.layers.{index}."
        weights = {
            name.removeprefix(prefix): self._reader.get(name).float()
            for name in self._reader.names()
            if name.startswith(prefix)
        }
        self._layer = copy.deepcopy(self._layers[index])  # of no weights: layers may differ
        self._layer.load_state_dict(weights, assign=True)
        self._window = self._windows[index]
        return self._layer

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, S, H] behind the loaded layer. Without a mask, sdpa is causal."""
        mask = None
        if self._window is not None:
            behind = self._positions.T - self._positions  # [S, S] how far back a key lies
            mask = ((behind >= 0) & (behind < self._window))[None, None]
        out: torch.Tensor = self._layer(
            hidden,
            attention_mask=mask,
            position_ids=self._positions,
            position_embeddings=self._angles,
        )
        return out

    def sample(
        self, inputs: torch.Tensor, neurons: torch.Tensor, window_tokens: int
    ) -> LayerSample:
        """Of the loaded layer's FFN."""
        down = self._layer.mlp.down_proj.weight.detach()
        gate = self._family.gate_of(self._layer.mlp).detach()
        return LayerSample(inputs, neurons, down, gate, window_tokens)


def layer_samples(
    dense: DenseModel,
    windows: torch.Tensor,
    kept: WorkFolder | None = None,
    start: int = 0,
) -> Iterator[LayerSample]:
    """One sample per layer, in their order, from the layer `start` on. `windows` [N, S] ids.

    What `kept` has is not computed again, and gives the same bits. Raises SourceRefused, and
    FactorizeError when `kept` is damaged or full.
    """
    # no_grad stands at what it calls: its wrapper of a generator would hold each sample too long
    with dense.tensors() as reader:
        stack = LayerStack(dense, reader, windows.shape[1])
        if start == dense.layers:
            return
        first, hidden = 0, None
        if kept is not None:
            first = finished_layers(kept, dense.layers)
            for index in range(start, first):
                yield _again(stack, stack.load(index), kept.get(_name(index))["inputs"], windows)
            hidden = kept.get(HIDDEN)["hidden"] if 0 < first < dense.layers else None
        if hidden is None:
            hidden = stack.embedded(windows)
        for index in range(first, dense.layers):
            hidden, sample = _observed(stack, stack.load(index), hidden)
            if kept is not None:
                kept.put(_name(index), {"inputs": sample.inputs})
                kept.put(HIDDEN, {"hidden": hidden, "layer": torch.tensor([index])})
            if index >= start:
                yield sample
            del sample  # before the next layer's is made


def finished_layers(kept: WorkFolder, layers: int) -> int:
    """Of how many layers, from the first, nothing has to be computed again."""
    whole = next((i for i in range(layers) if not kept.has(_name(i))), layers)
    if whole in (0, layers) or not kept.has(HIDDEN):
        return whole if whole == layers else 0
    # a run stopped between the two files of a layer does that layer again
    behind = int(kept.get(HIDDEN)["layer"]) + 1
    return behind if behind <= whole else 0


def _name(index: int) -> str:
    return f"layer-{index:04}"


@torch.no_grad()
def _observed(
    stack: LayerStack, layer: Any, hidden: torch.Tensor
) -> tuple[torch.Tensor, LayerSample]:
    inputs: list[torch.Tensor] = []
    hook = layer.mlp.register_forward_pre_hook(_keep(inputs))
    with _neurons_of(layer) as neurons:
        behind = torch.cat([stack.run(part) for part in torch.split(hidden, WINDOWS_AT_ONCE)])
    hook.remove()
    return behind, stack.sample(torch.cat(inputs), torch.cat(neurons), hidden.shape[1])


@torch.no_grad()
def _again(
    stack: LayerStack, layer: Any, inputs: torch.Tensor, windows: torch.Tensor
) -> LayerSample:
    """The same products in the same batches, so that they round as they did."""
    with _neurons_of(layer) as neurons:
        for part in torch.split(inputs.view(*windows.shape, -1), WINDOWS_AT_ONCE):
            layer.mlp(part)
    return stack.sample(inputs, torch.cat(neurons), windows.shape[1])


@contextmanager
def _neurons_of(layer: Any) -> Iterator[list[torch.Tensor]]:
    """What goes into the down projection while the block runs, a tensor [t, I] per call."""
    neurons: list[torch.Tensor] = []
    hook = layer.mlp.down_proj.register_forward_pre_hook(_keep(neurons))
    try:
        yield neurons
    finally:
        hook.remove()


def _keep(into: list[torch.Tensor]) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    return lambda _module, arguments: into.append(arguments[0].flatten(0, -2))
