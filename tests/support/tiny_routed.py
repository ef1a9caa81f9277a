"""A tiny factorized model whose routers are random and more than its stock class has."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM

from moestro.engine import Progress, read_config
from moestro.factorize import Plan, PlanFacts, SplitOptions, apply_plan
from moestro.factorize.facts import RouterWeights
from moestro.factorize.sources import DenseModel
from tiny_llama import write_tiny_llama

LAYERS, EXPERTS, TOP_K, HIDDEN, NEURONS = 3, 8, 3, 32, 80
KINDS = ("relu", "tanh-bias", "bias")


def quiet(_: Progress) -> None:
    pass


def routed_plan(dense: Path, kind: str, **options: Any) -> Plan:
    """`kind` of KINDS, or linear; `options` are fields of SplitOptions."""
    draw = torch.Generator().manual_seed(5)
    activation = next((name for name in ("relu", "tanh") if name in kind), "")
    width = 6 if activation else HIDDEN

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).half()

    routers = RouterWeights(
        numbers(LAYERS, EXPERTS, width),
        numbers(LAYERS, width, HIDDEN) if activation else None,
        numbers(LAYERS, EXPERTS) if "bias" in kind else None,
        activation,
    )
    chosen = SplitOptions(experts=EXPERTS, shared_neurons=16, top_k=TOP_K, router="norm")
    digest = DenseModel.open(dense).content_sha256()
    facts = PlanFacts("tiny", digest, "", "at random", "", 0.5, replace(chosen, **options))
    order = torch.stack([torch.randperm(NEURONS, generator=draw) for _ in range(LAYERS)])
    return Plan(order.to(torch.int16), routers, facts, torch.ones(LAYERS))


def build_routed(folder: Path, kind: str, **options: Any) -> Path:
    dense = write_tiny_llama(folder / "dense", intermediate_size=NEURONS)
    apply_plan(routed_plan(dense, kind, **options), dense, folder / "routed", quiet)
    return folder / "routed"


def plain_reference(folder: Path, kind: str, tau: float = 1.0, k: int = TOP_K) -> Any:
    """The stock class in fp32 whose routers are written out here, with none of the engine's code.

    `folder` was made for TOP_K experts; with `k` of them the sum of their outputs keeps its scale.
    """
    config = read_config(folder)
    assert isinstance(config, GraniteMoeSharedConfig)
    model: Any = GraniteMoeSharedForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32
    )
    with safe_open(folder / "moestro_routers.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}.block_sparse_moe.router."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        layer.block_sparse_moe.router.forward = _router(own, kind, tau, k)
    return model.eval()


def _router(own: dict[str, torch.Tensor], kind: str, tau: float, k: int) -> Any:
    def forward(x: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        if "relu" in kind:
            x = (x @ own["first"].T).clamp(min=0)
        elif "tanh" in kind:
            x = (x @ own["first"].T).tanh()
        logits = x @ own["last"].T + own.get("bias", torch.tensor(0.0))
        ids = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
        norms = logits.relu()
        runs = norms.gather(1, ids) >= (1 - tau) * norms.max(dim=1, keepdim=True).values
        return None, runs / TOP_K, ids

    return forward
