"""Routers of factorized models that their stock class cannot have, in the place of its own.

Shape letters: T tokens, H width, N outputs of a first layer, E experts, k experts per token.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import PreTrainedModel

from moestro.engine.facts import ModelRefused
from moestro.engine.formats import is_experts_module
from moestro.engine.kernels import Router, route
from moestro.engine.weights import RouterFacts

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}
AGREE = 1e-5  # of the largest logit: how far the library's products may be from torch's


class CarriedRouter(torch.nn.Module):
    """Rows [T, H] -> logits [T, E], weights and ids [T, k], the largest logit first.

    All chosen experts weigh the same. One that does not run (see RouterFacts) has weight 0 and the
    id E, which is no expert: it is neither loaded nor guessed. All in fp32.
    """

    last: torch.nn.Parameter  # [E, H], or [E, N] behind a first layer
    first: torch.nn.Parameter | None  # [N, H]
    bias: torch.nn.Parameter | None  # [E]

    def __init__(self, stock: torch.nn.Module, facts: RouterFacts, layer: int = 0) -> None:
        """In the shape of `stock`, and on its device; the weights are to be loaded.

        `layer` of those with experts.
        """
        super().__init__()
        weight, asked = stock._parameters.get("weight"), getattr(stock, "top_k", None)
        if weight is None or weight.dim() != 2 or not isinstance(asked, int):
            raise ModelRefused(f"{type(stock).__name__} is no router that another could stand for")
        self.num_experts, width = weight.shape
        self.top_k = facts.experts_of(layer, asked, self.num_experts)
        self.share, self.tau = facts.weight_of(layer, asked), facts.tau
        self._activate = ACTIVATIONS.get(facts.activation)
        self._product: Product = F.linear
        shapes = {
            "last": (self.num_experts, facts.hidden or width),
            "first": (facts.hidden, width) if facts.hidden else None,
            "bias": (self.num_experts,) if facts.bias else None,
        }
        for name, shape in shapes.items():
            empty = None
            if shape is not None:
                numbers = torch.empty(shape, dtype=torch.float32, device=weight.device)
                empty = torch.nn.Parameter(numbers, requires_grad=False)
            self.register_parameter(name, empty)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self._logits(rows.float(), self._product)
        best, ids = logits.sort(dim=-1, descending=True, stable=True)  # of equal ones the first
        best, ids = best[:, : self.top_k], ids[:, : self.top_k]
        weights = torch.full_like(best, self.share)
        if self.tau < 1:
            norms = best.clamp(min=0)
            runs = norms >= (1 - self.tau) * norms[:, :1]
            weights = torch.where(runs, weights, 0.0)
            ids = torch.where(runs, ids, self.num_experts)
        return logits, weights.to(rows.dtype), ids

    def take_rows_alone(self) -> bool:
        """With the library's products from now on, where they agree on random rows: there a row's

        logits do not depend on the rows beside it. The weights are loaded.
        """
        parameters = [each for each in self._parameters.values() if each is not None]
        if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in parameters):
            return False
        width = (self.last if self.first is None else self.first).shape[1]
        rows = torch.randn((4, width), generator=torch.Generator().manual_seed(0))
        found, wanted = (self._logits(rows, product) for product in (_row_by_row, F.linear))
        if bool((found - wanted).abs().max() > AGREE * wanted.abs().max().clamp(min=1e-30)):
            return False
        self._product = _row_by_row
        return True

    def _logits(self, rows: torch.Tensor, product: Product) -> torch.Tensor:
        if self.first is not None and self._activate is not None:
            rows = self._activate(product(rows, self.first, None))
        return product(rows, self.last, self.bias)


def _row_by_row(
    rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`rows` @ `matrix`.T + `bias`, each row by one fixed sequence of operations."""
    logits, _, _ = route(rows.contiguous(), Router(matrix.detach(), bias, 1, normalized=False))
    return logits


class EvenShares:
    """In place of a stock router's `forward`: each expert that it chooses weighs `share`."""

    def __init__(self, stock: Callable[..., Any], share: float) -> None:
        self._stock, self._share = stock, share

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, ids = self._stock(rows)
        return logits, torch.full_like(weights, self._share), ids


def carry_routers(model: PreTrainedModel, facts: RouterFacts | None) -> None:
    """Puts them where `facts` says; without, nothing changes. Raises ModelRefused."""
    if facts is None:
        return
    paths = [path for path, _ in model.named_modules() if path.endswith(f".{facts.module}")]
    layers = sum(is_experts_module(module) for module in model.modules())
    if not paths or {len(paths), len(facts.layers) or layers} != {layers}:
        counted = f" and {len(facts.layers)} numbers of experts" if facts.layers else ""
        raise ModelRefused(
            f"config.json: {len(paths)} modules are called {facts.module!r}{counted}, for {layers}"
            " layers of experts; the routers are not this model's"
        )
    for layer, path in enumerate(paths):
        stock: Any = model.get_submodule(path)
        if facts.layers and facts.layers[layer] > stock.num_experts:
            raise ModelRefused(
                f"config.json: layer_top_k {facts.layers[layer]} of {stock.num_experts} experts;"
                " the routers are not this model's"
            )
        if facts.has_file:
            model.set_submodule(path, CarriedRouter(stock, facts, layer))
        else:
            _count(stock, facts, layer)
    strict = set(model._keep_in_fp32_modules_strict or ())
    model._keep_in_fp32_modules_strict = strict | {facts.module}


def _count(stock: Any, facts: RouterFacts, layer: int) -> None:
    """Gives a stock router, whose k chosen experts weigh 1/k, the number of experts of `layer`."""
    asked = stock.top_k
    stock.top_k = facts.experts_of(layer, asked, stock.num_experts)
    share = facts.weight_of(layer, asked)
    if not math.isclose(share * stock.top_k, 1.0, rel_tol=1e-6):
        stock.forward = EvenShares(stock.forward, share)


def load_routers(model: PreTrainedModel, folder: Path) -> None:
    """Those of `folder`, where it has such, for a stock model with its weights.

    Raises ModelRefused.
    """
    facts = RouterFacts.of(folder)
    if facts is None:
        return
    carry_routers(model, facts)
    if not facts.has_file:
        return
    path = facts.checked_file(folder)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    wanted = {
        f"{path}.{name}": part
        for path, module in model.named_modules()
        if isinstance(module, CarriedRouter)
        for name, part in module.named_parameters()
    }
    if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in wanted.items()}:
        raise ModelRefused(f"{path} does not fit the model in config.json; make the folder anew")
    for name, part in wanted.items():
        part.data = tensors[name]
