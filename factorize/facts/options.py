"""What a user may choose about a factorization, by name and number. No tensors."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from .errors import FactorizeError

SPLITS = ("coactivation", "kmeans", "importance", "contiguous", "random")
ROUTERS = ("ridge", "prior", "norm", "moefication", "none")
SCALES = ("one", "calibrated", "inverse-k")
PLACES_STEP = 8
COUNTS = ("experts", "top_k", "calibration_tokens", "window_tokens")
FIRST_FORMAT = (  # what plans of format 1 say; the others had their defaults then
    "experts",
    "shared_neurons",
    "top_k",
    "calibration_tokens",
    "window_tokens",
    "ridge",
    "seed",
)

AFTER_FORMAT_2: dict[str, object] = {"tau": 1.0, "layer_top_k": ""}
"""Plans of format 2 say these only where they are something else."""


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
    split: str = "coactivation"
    router: str = "ridge"
    scale: str = "one"  # what the sum of a token's experts is multiplied with
    router_steps: int = 300  # of Adam; a ridge router is solved, not trained
    router_hidden: int = 0  # neurons of a trained router's first layer; 0: it has none
    router_bias: int = 0  # 1: a trained router has a bias
    tau: float = 1.0  # experts run from (1 - tau) of the largest foretold norm on; 1: all top_k
    layer_top_k: str = ""  # "24 12 8": experts per token of each layer, where they differ

    @property
    def layers(self) -> tuple[int, ...]:
        """Experts per token of each layer; empty where all have top_k."""
        return tuple(int(word) for word in self.layer_top_k.split())

    @property
    def mean_top_k(self) -> float:
        """Over the layers."""
        return sum(self.layers) / len(self.layers) if self.layers else float(self.top_k)

    def layer_counts(self, layers: int) -> tuple[int, ...]:
        """Experts per token of each of so many layers."""
        return self.layers or (self.top_k,) * layers

    @property
    def experts_per_token(self) -> int:
        """Where no router chooses, a token of a prompt takes all."""
        return self.experts if self.router == "none" else self.top_k

    @property
    def sequence_density(self) -> float:
        """The share of the experts that a prompt keeps where no router chooses; 0 elsewhere."""
        return self.top_k / self.experts if self.router == "none" else 0.0

    def check_layers(self, layers: int) -> None:
        """Raises FactorizeError where it counts the experts of another number of layers."""
        if len(self.layer_counts(layers)) != layers:
            raise FactorizeError(
                f"{len(self.layers)} layers' experts per token are given, and the model has "
                f"{layers} layers"
            )

    def expert_neurons(self, neurons: int) -> int:
        """Places for neurons in each routed expert of an FFN's `neurons`. Raises FactorizeError.

        Where they are more than neurons, zeros fill them up: to the largest expert's size, and to
        whole steps, since torch's grouped product wants rows of whole 16 bytes.
        """
        for reason in self._unknown():
            raise FactorizeError(reason)
        routed = neurons - self.shared_neurons
        if self.experts < 2 or not 1 <= self.top_k <= self.experts:
            raise FactorizeError(
                f"{self.top_k} of {self.experts} experts per token does not work: take at least "
                "2 experts, and between 1 and all of them per token"
            )
        if self.shared_neurons < 0 or routed < self.experts:
            raise FactorizeError(
                f"{neurons} neurons less {self.shared_neurons} shared ones leave {routed}, which "
                f"is not enough for {self.experts} experts; change either number"
            )
        largest = -(-routed // self.experts)
        return -(-largest // PLACES_STEP) * PLACES_STEP

    def expert_sizes(self, neurons: int) -> tuple[int, ...]:
        """Neurons of each routed expert: as many in all, or one more in the first ones."""
        least, more = divmod(neurons - self.shared_neurons, self.experts)
        return (least + 1,) * more + (least,) * (self.experts - more)

    def has_empty_places(self, neurons: int) -> bool:
        """Raises FactorizeError."""
        return self.shared_neurons + self.experts * self.expert_neurons(neurons) != neurons

    def _unknown(self) -> Iterator[str]:
        for word, names in (("split", SPLITS), ("router", ROUTERS), ("scale", SCALES)):
            chosen = getattr(self, word)
            if chosen not in names:
                yield f"there is no {word} {chosen!r}; choose one of {', '.join(names)}"
        yield from self.layer_faults()
        if self.router_steps < 1 or self.router_hidden < 0 or self.router_bias not in (0, 1):
            yield "a router is trained for at least one step, with no or some hidden neurons"
        if not 0 <= self.tau <= 1:
            yield f"tau is between 0 (the largest expert alone) and 1 (all top-k), not {self.tau}"
        if self.tau < 1 and (self.router, self.scale) != ("norm", "one"):
            yield (
                "tau compares foretold norms, and experts that run weigh 1: it needs the router "
                f"norm and the scale one, not {self.router} and {self.scale}"
            )
        if self.router == "none" and self.scale != "one":
            yield (
                "without a router all experts run in a prompt, whose sum is the dense model's with "
                f"the scale one alone, not {self.scale}"
            )
        if self.router in ("ridge", "none") and (self.router_hidden or self.router_bias):
            yield "only trained routers have hidden neurons or a bias, not ridge and none"

    def layer_faults(self) -> Iterator[str]:
        """What is wrong with the layers' own numbers, in words."""
        words = self.layer_top_k.split()
        if not words:
            return
        if not all(word.isdecimal() and 1 <= int(word) <= self.experts for word in words):
            yield (
                f"each layer takes 1 to {self.experts} experts per token, not {self.layer_top_k!r}"
            )
        elif self.router == "none":
            yield "without a router the prompt chooses, in all layers alike; leave out layers' own"
        elif round(self.mean_top_k) != self.top_k:
            yield (
                f"the layers take {self.mean_top_k:.2f} experts per token on average, which is "
                f"not the {self.top_k} that the model is said to take"
            )


def with_defaults(options: dict[str, object]) -> dict[str, object]:
    """The options of a plan of format 1 as those of today. Raises ValueError for foreign ones."""
    for name in options.keys() - set(FIRST_FORMAT):
        raise ValueError(f"{name!r} is no field of it")
    later = {f.name: f.default for f in fields(SplitOptions) if f.name not in FIRST_FORMAT}
    return options | later
