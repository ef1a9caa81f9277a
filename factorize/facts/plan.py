"""The recipe that turns one dense model into one model with experts: an order and routers.

Applying it moves weights and computes nothing that could round differently elsewhere.
Letters: L layers, I neurons of one FFN, E experts, H hidden size.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moestro.cache import read_fields

from .errors import FactorizeError, SourceRefused

PLAN_FORMAT = 1
COUNTS = ("experts", "top_k", "calibration_tokens", "window_tokens")
METADATA_KEY = "moestro.plan"  # one key: the writer's order of several keys is random


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """How a dense FFN becomes a shared expert and routed ones."""

    experts: int = 24
    shared_neurons: int = 768  # always on
    top_k: int = 12
    calibration_tokens: int = 32_768
    window_tokens: int = 512
    ridge: float = 1e-1  # of the mean diagonal of the inputs' second moment
    seed: int = 0

    def expert_neurons(self, neurons: int) -> int:
        """Neurons of one routed expert out of an FFN's `neurons`. Raises FactorizeError."""
        routed = neurons - self.shared_neurons
        if self.experts < 2 or not 1 <= self.top_k <= self.experts:
            raise FactorizeError(
                f"{self.top_k} of {self.experts} experts per token does not work: take at least "
                "2 experts, and between 1 and all of them per token"
            )
        if self.shared_neurons < 0 or routed <= 0 or routed % self.experts:
            raise FactorizeError(
                f"{neurons} neurons less {self.shared_neurons} shared ones leave {routed}, which "
                f"is not a positive multiple of {self.experts} experts; change either number"
            )
        return routed // self.experts


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
    routers: torch.Tensor  # [L, E, H] float16, about 1 in size
    facts: PlanFacts

    def to_bytes(self) -> bytes:
        metadata = {METADATA_KEY: json.dumps({"format": PLAN_FORMAT, **asdict(self.facts)})}
        return save({"order": self.order, "routers": self.routers}, metadata)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def write(self, path: Path) -> None:
        path.write_bytes(self.to_bytes())

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Raises FactorizeError when it is not a plan, or not one that this version reads."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()[METADATA_KEY])
                order, routers = file.get_tensor("order"), file.get_tensor("routers")
            if not isinstance(facts, dict):
                raise TypeError("its facts are no JSON object")
            if facts.pop("format") != PLAN_FORMAT:
                raise FactorizeError(
                    f"{path} is a plan of a format that this version does not read"
                )
            options = read_fields(SplitOptions, facts.pop("options"), COUNTS)
            said = read_fields(_Said, facts)
            if order.dtype.is_floating_point or not routers.dtype.is_floating_point:
                raise TypeError(f"an order in {order.dtype} and routers in {routers.dtype}")
            return cls(order, routers, PlanFacts(**asdict(said), options=options))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FactorizeError(f"{path} is not a plan of moestro: {error}") from error

    def check_fits(self, layers: int, neurons: int, hidden: int, source_sha256: str) -> None:
        """Raises SourceRefused unless the plan was made from this very model."""
        shapes = (tuple(self.order.shape), tuple(self.routers.shape))
        if shapes != ((layers, neurons), (layers, self.facts.options.experts, hidden)):
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
