"""The recipe that turns one dense model into one model with experts: an order and routers.

Applying it moves weights and computes nothing that could round differently elsewhere.
Letters: L layers, I neurons of one FFN, E experts, H hidden size.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from moestro.cache import read_fields

from .described_file import read_described, replace_file
from .errors import FactorizeError, SourceRefused
from .options import AFTER_FORMAT_2, COUNTS, FIRST_FORMAT, SplitOptions, with_defaults
from .router_weights import ACTIVATIONS, RouterWeights, narrow, widen
from .work_folder import tensors_sha256

PLAN_FORMAT = 2
BYTES_FORMAT = 3  # the same with linear routers in eight bits a number: see `narrow`
READABLE_FORMATS = (1, PLAN_FORMAT, BYTES_FORMAT)
OF_FORMAT_2 = ("router_activation", "sha256")
OF_BYTES_FORMAT = ("routers", "router_exponents")
METADATA_KEY = "moestro.plan"  # one key: the writer's order of several keys is random


@dataclass(frozen=True, slots=True)
class _Said:
    """What a plan tells in words and numbers."""

    source: str  # the dense model, in words
    source_sha256: str  # DenseModel.content_sha256
    texts_sha256: str
    method: str
    command: str  # that repeats it
    router_hit: float  # share of a token's largest experts that the routers find, while fitting


@dataclass(frozen=True, slots=True)
class PlanFacts(_Said):
    """What a plan remembers about its making; `options` are all that the result depends on."""

    options: SplitOptions


@dataclass(frozen=True, slots=True)
class Plan:
    """`order[l]` lists layer l's neurons: the shared ones first, then expert by expert."""

    order: torch.Tensor  # [L, I] int16, int32 for an FFN of 32,768 neurons and more
    router_weights: RouterWeights
    facts: PlanFacts
    scales: torch.Tensor  # [L] float32, for the sum of a token's experts; ones carry it exactly
    format: int = PLAN_FORMAT  # of the file that it came from: its bytes stay what they were

    @property
    def routers(self) -> torch.Tensor:
        """[L, E, H] float16, about 1 in size. Raises FactorizeError like `check_carried`."""
        self.check_carried()
        return self.router_weights.last

    @property
    def needs_router_file(self) -> bool:
        """Its routers are more than a stock checkpoint carries, but for the layers' numbers."""
        return self.facts.options.tau < 1 or any(self.router_weights.beyond_stock())

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """Experts per token of each layer."""
        return self.facts.options.layer_counts(len(self.order))

    def check_recoverable(self) -> None:
        """Raises FactorizeError where there are no linear routers, whose choices are practised."""
        if self.facts.options.router == "none":
            raise FactorizeError(
                "the plan has no routers, whose choices recovery practises; make one with --router "
                "ridge, and recover it in --recover-mode sequence for choices by the prompt"
            )
        self.check_carried()

    def check_carried(self) -> None:
        """Raises FactorizeError where the routers are more than linear ones of top_k experts."""
        needed = [*self.router_weights.beyond_stock()]
        if self.facts.options.tau < 1:
            needed.append(f"a threshold tau of {self.facts.options.tau:g}")
        if needed:
            raise FactorizeError(
                f"the plan's routers have {' and '.join(needed)}, which no stock checkpoint "
                "carries and recovery does not practise; make a plan with linear routers "
                "(router_hidden 0, router_bias 0, tau 1)"
            )

    def to_bytes(self) -> bytes:
        said = asdict(self.facts)
        tensors = {"order": self.order, "routers": self.router_weights.last}
        if self.format == 1:
            options = said.pop("options")
            said |= {"options": {name: options[name] for name in FIRST_FORMAT}}
        else:
            options, newer = said["options"], AFTER_FORMAT_2
            said["options"] = {n: v for n, v in options.items() if newer.get(n, ...) != v}
            tensors |= {"scales": self.scales}
            rest = self.router_weights.tensors().items()
            tensors |= {f"router_{name}": part for name, part in rest if name != "last"}
            said["router_activation"] = self.router_weights.activation
            if self.format == BYTES_FORMAT:
                tensors |= dict(zip(OF_BYTES_FORMAT, narrow(tensors["routers"]), strict=True))
            said["sha256"] = _checksum(said, tensors)
        return save(tensors, {METADATA_KEY: json.dumps({"format": self.format, **said})})

    def check_layers_free(self) -> None:
        """Raises FactorizeError where the sums' scale is one of the layers' own numbers."""
        if self.facts.options.scale != "one":
            raise FactorizeError(
                f"the plan's scale {self.facts.options.scale} was made for its layers' numbers of "
                "experts; make a plan with these numbers, or with the scale one"
            )

    def with_layers(self, layer_top_k: str, how: str) -> "Plan":
        """The same with other numbers of experts per token, written as in the options.

        `how` they were found, in words. Raises FactorizeError where they do not fit.
        """
        self.check_layers_free()
        layers, neurons = self.order.shape
        options = replace(self.facts.options, layer_top_k=layer_top_k)
        options.expert_neurons(neurons)
        options.check_layers(layers)
        method = f"{self.facts.method}; experts per token by layer, {how}"
        facts = replace(self.facts, method=method)
        return replace(
            self, facts=replace(facts, options=options), format=max(self.format, PLAN_FORMAT)
        )

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def write(self, path: Path) -> None:
        replace_file(path, self.to_bytes())

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Raises FactorizeError when it is not a plan, or not one that this version reads."""
        try:
            facts, tensors = read_described(path, METADATA_KEY)
            if facts["format"] not in READABLE_FORMATS:
                raise FactorizeError(
                    f"{path} is a plan of a format that this version does not read"
                )
            return _first_format(facts, tensors) if facts["format"] == 1 else _plan(facts, tensors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FactorizeError(f"{path} is not a plan of moestro: {error}") from error

    def check_fits(self, layers: int, neurons: int, hidden: int, source_sha256: str) -> None:
        """Raises SourceRefused unless the plan was made from this very model."""
        options, routers = self.facts.options, self.router_weights
        experts = options.experts
        width = hidden if routers.first is None else routers.first.shape[1]
        found = {"order": self.order, "scales": self.scales} | routers.tensors()
        wanted: dict[str, tuple[int, ...]] = {
            "order": (layers, neurons),
            "scales": (layers,),
            "last": (layers, experts, width),
            "first": (layers, width, hidden),
            "bias": (layers, experts),
        }
        fits = all(tuple(tensor.shape) == wanted[name] for name, tensor in found.items())
        if not fits or len(options.layer_counts(layers)) != layers:
            raise SourceRefused(
                f"the plan was made for {self.facts.source}, whose shapes are others"
            )
        if source_sha256 != self.facts.source_sha256:
            raise SourceRefused(
                f"the plan was made for other weights ({self.facts.source}); make one for these"
            )
        whole = torch.arange(neurons).expand(layers, neurons)
        if not torch.equal(self.order.long().sort(dim=1).values, whole):
            raise SourceRefused("the plan does not name every neuron once; make it anew")


def _first_format(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Plan:
    """Linear routers, and the sum of a token's experts as it is."""
    if isinstance(facts["options"], dict):
        facts = facts | {"options": with_defaults(facts["options"])}
    ones = {"scales": torch.ones(len(tensors["order"]))}
    return _of_parts(facts, tensors | ones, "")


def _plan(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Plan:
    said = {name: value for name, value in facts.items() if name not in ("format", "sha256")}
    rest = {name: value for name, value in facts.items() if name not in OF_FORMAT_2}
    if isinstance(facts["options"], dict):
        rest["options"] = AFTER_FORMAT_2 | facts["options"]
    parts = dict(tensors)
    if facts["format"] == BYTES_FORMAT:
        parts["routers"] = widen(parts["routers"], parts.pop("router_exponents"))
    plan = _of_parts(rest, parts, facts["router_activation"])
    if facts["sha256"] != _checksum(said, tensors):
        raise ValueError("it has another checksum than when written; it is damaged or was edited")
    return plan


def _checksum(said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(f"{json.dumps(said)}\n{tensors_sha256(tensors)}".encode()).hexdigest()


def _of_parts(facts: dict[str, Any], tensors: dict[str, torch.Tensor], activation: str) -> Plan:
    """Raises ValueError, TypeError or KeyError for what is no plan."""
    said = {name: value for name, value in facts.items() if name not in ("format", "options")}
    options = read_fields(SplitOptions, facts["options"], COUNTS)
    if faults := [*options.layer_faults()]:
        raise ValueError(faults[0])
    parts = dict(tensors)
    routers = _router_weights(parts, activation)
    order, scales = parts.pop("order"), parts.pop("scales")
    if order.dtype.is_floating_point or scales.dtype != torch.float32 or parts:
        raise TypeError(f"an order in {order.dtype}, scales in {scales.dtype}, {[*parts]}")
    if not bool((scales > 0).all() and scales.isfinite().all()):
        raise ValueError("its scales are not all above 0")
    facts_read = PlanFacts(**asdict(read_fields(_Said, said)), options=options)
    return Plan(order, routers, facts_read, scales, facts["format"])


def _router_weights(tensors: dict[str, torch.Tensor], activation: object) -> RouterWeights:
    """Takes them out of `tensors`. Raises TypeError or KeyError for what is no router."""
    routers = RouterWeights(
        tensors.pop("routers"),
        tensors.pop("router_first", None),
        tensors.pop("router_bias", None),
        str(activation),
    )
    if (routers.first is not None) != (activation in ACTIVATIONS):
        raise TypeError(f"an activation {activation!r} that does not fit the router's layers")
    for part in routers.tensors().values():
        if not part.dtype.is_floating_point:
            raise TypeError(f"routers in {part.dtype}")
    return routers
