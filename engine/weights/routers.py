"""Routers that no stock class has: what config.json says of them, and maybe a file beside it.

Such a config.json names a type that stock transformers does not know and therefore refuses; the
config of the stock class, which has everything but the routers, stands inside. Knows no module.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moestro.cache import read_fields
from moestro.engine.facts import ModelRefused

from .damage import json_object, readable, refuse_stand_in

ROUTED_TYPE = "moestro_routed"
ROUTERS_NAME = "moestro_routers.safetensors"
STOCK_KEY = "moestro_stock"  # of config.json: the stock class's own config, without its type:
TYPE_KEY = "moestro_stock_type"  # a class that is named by hand would find a config of its type
FACTS_KEY = "moestro_routers"
ACTIVATIONS = ("relu", "tanh")
LATER = {"top_k": 0, "layer_top_k": ""}  # what folders did not say at first
AGAIN = "make the folder anew with `moestro factorize`, or copy all of its files again"


def in_proportion(own: int, usual: int, asked: int, num_experts: int) -> int:
    """Experts per token of a layer that has `own` where `usual` are, where `asked` are instead.

    In a line from none to its own, and in another one from there to all, where all are asked.
    """
    if asked <= usual:
        return max(1, round(own * asked / usual))
    return own + round((num_experts - own) * (asked - usual) / (num_experts - usual))


@dataclass(frozen=True, slots=True)
class RouterFacts:
    """logits = last @ activation(first @ x) + bias, in all layers; each chosen expert weighs 1/k.

    Of the k experts with the largest logits those run whose r = max(logit, 0) is at least
    (1 - tau) times the largest one (D2DMoE, arXiv 2310.04361); with tau 1 all k do.

    Layers may differ in k: `layer_top_k` has it for each, written as "24 12 8", where a token is
    said to have `top_k` experts. Without a `sha256` there is no file: the routers are the stock
    ones, and `layer_top_k` is all that is not.
    """

    module: str  # how the paths of the routers end
    target: str  # what the logits were trained on: `norm` is in proportion to outputs' norms
    hidden: int  # outputs of `first`; 0: there is none, and `last` reads x
    activation: str  # behind `first`, of ACTIVATIONS; else empty
    bias: int  # 1: there is one
    tau: float  # 0 to 1
    sha256: str = ""  # of the file
    top_k: int = 0  # experts per token, in words; in truth so many only where layers do not differ
    layer_top_k: str = ""  # empty: they do not

    @classmethod
    def of(cls, folder: Path) -> "RouterFacts | None":
        """None for a checkpoint with routers of its own. Raises ModelRefused."""
        path = folder / "config.json"
        raw = json_object(path, "a config")
        if raw.get("model_type") != ROUTED_TYPE:
            return None
        try:
            said = raw.get(FACTS_KEY)
            facts = read_fields(cls, LATER | said if isinstance(said, dict) else said)
            facts._check_layers()
            if (facts.hidden > 0) != (facts.activation in ACTIVATIONS) or facts.hidden < 0:
                raise ValueError(f"{facts.hidden} hidden neurons, activation {facts.activation!r}")
            if facts.bias not in (0, 1) or not 0 <= facts.tau <= 1:
                raise ValueError(f"bias {facts.bias}, tau {facts.tau}")
        except ValueError as error:
            raise ModelRefused(f"{path}: {FACTS_KEY}: {error}; {AGAIN}") from error
        return facts

    @property
    def has_file(self) -> bool:
        return bool(self.sha256)

    @property
    def layers(self) -> tuple[int, ...]:
        """k of each layer; empty where they do not differ."""
        return tuple(int(word) for word in self.layer_top_k.split())

    def experts_of(self, layer: int, asked: int, num_experts: int) -> int:
        """k of a layer where `asked` experts per token are."""
        if not self.layer_top_k:
            return asked
        return in_proportion(self.layers[layer], self.top_k, asked, num_experts)

    def weight_of(self, layer: int, asked: int) -> float:
        """What each chosen expert of a layer weighs where `asked` experts per token are.

        The outputs are stored times the layer's own k, and an engine multiplies the sums of all
        layers with asked / top_k.
        """
        return self.top_k / (asked * self.layers[layer]) if self.layer_top_k else 1 / asked

    def density_of(self, layer: int, density: float, num_experts: int) -> float:
        """Which share of a layer's experts a sequence keeps that keeps `density` of all.

        From none over the layer's own k at top_k of `num_experts` to all at 1, in lines.
        """
        if not self.layer_top_k:
            return density
        own, usual = self.layers[layer] / num_experts, self.top_k / num_experts
        if density <= usual:
            return density * own / usual
        return own + (density - usual) * (1 - own) / (1 - usual)

    def _check_layers(self) -> None:
        """Raises ValueError."""
        words = self.layer_top_k.split()
        counts = all(word.isdecimal() and int(word) > 0 for word in words)
        if self.layer_top_k and (not words or not counts or self.top_k < 1):
            raise ValueError(f"layer_top_k {self.layer_top_k!r}, top_k {self.top_k}")

    @property
    def words(self) -> str:
        """For people, in one line."""
        parts = ["linear"] if not self.hidden else [f"{self.hidden} neurons ({self.activation})"]
        parts += ["a bias"] if self.bias else []
        if self.layer_top_k:
            least, most = min(self.layers), max(self.layers)
            parts.append(f"{least} to {most} experts per token, by layer")
        share = f"experts run from {1 - self.tau:g} of the largest norm on"
        return ", ".join([*parts, share] if self.tau < 1 else parts)

    def checked_file(self, folder: Path) -> Path:
        """Raises ModelRefused where it is missing or is not the file that was written."""
        path = folder / ROUTERS_NAME
        if not path.exists():
            raise ModelRefused(
                f"{folder} has no {ROUTERS_NAME}, without which its experts cannot be chosen;"
                f" {AGAIN}"
            )
        refuse_stand_in(path)
        with readable(path):
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise ModelRefused(
                f"{path} is damaged or of another model (its checksum is not the one in"
                f" config.json); {AGAIN}"
            )
        return path


def stock_config(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """`raw`, or the stock class's config inside it. Raises ModelRefused where that is none."""
    if raw.get("model_type") != ROUTED_TYPE:
        return raw
    inner = raw.get(STOCK_KEY)
    if not isinstance(inner, dict) or not isinstance(raw.get(TYPE_KEY), str):
        raise ModelRefused(f"{path} has no {STOCK_KEY!r} and {TYPE_KEY!r}; {AGAIN}")
    return {"model_type": raw[TYPE_KEY], **inner}


def name_routers(folder: Path, facts: RouterFacts) -> None:
    """Makes the stock config.json of `folder`, which has the file already, one of ours."""
    path, file = folder / "config.json", folder / ROUTERS_NAME
    stock = json.loads(path.read_text("utf-8"))
    written = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""
    outer = {
        "model_type": ROUTED_TYPE,
        # a class that is named by hand asks for no type, but for its sizes
        "hidden_size": "see moestro_stock: only moestro serves this folder",
        FACTS_KEY: asdict(replace(facts, sha256=written)),
        TYPE_KEY: stock.pop("model_type"),
        STOCK_KEY: stock,
    }
    path.write_text(json.dumps(outer, indent=2) + "\n", "utf-8")
