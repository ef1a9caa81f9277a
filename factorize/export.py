"""Turns a factorized folder back into its dense model, where nothing was trained or scaled.

A FFN does not mind the order of its neurons; with the plan they also lie as they did. Routers and
what the twin's class needed in addition are left out. Letters: H hidden size, I neurons of an FFN,
S shared ones, E experts, M neurons of one expert.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moestro.engine import Manifest, Progress, ProgressFn, StartError, read_config
from moestro.factorize.facts import FactorizeError, Plan, disk_errors, require_free, staged
from moestro.factorize.families import FAMILIES, SINKS, Parts, stored_name
from moestro.factorize.sources import TensorReader, tensor_files

from .apply import CARRIED, COPIED, DENSE_CONFIG_NAME, DENSE_PARTS, Tensors, write_weights

# what the manifest of an untouched split says; anything more is a change of the weights
UNTOUCHED = frozenset(
    (
        "experts_per_token",
        "num_experts",
        "output_factor",
        "source",
        "method",
        "plan_sha256",
        "sequence_density",
        "neurons",
    )
)
SCALED = "; scale "  # how the manifest's method names a scale other than one
UNREADABLE = (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError, StartError)
TYPES = (torch.bfloat16, torch.float16, torch.float32)  # the first that holds all weights


@dataclass(frozen=True, slots=True)
class _Twin:
    """A factorized folder, read by Llama's names."""

    reader: TensorReader
    config: Any
    kinds: list[Any]
    factor: float
    neurons: int  # of an FFN; what the experts have places for beyond them are zeros
    back: torch.Tensor | None  # [L, I] where each neuron of the dense model lies; None: as they lie

    def names(self) -> list[str]:
        """Llama's, of all that the dense model has."""
        kept = [n for n in self.reader.names() if not n.endswith(SINKS)]
        outside = [n for n in kept if ".block_sparse_moe." not in n and ".shared_mlp." not in n]
        layers = range(int(self.config.num_hidden_layers))
        ffn = [f"model.layers.{i}.mlp.{part}.weight" for i in layers for part in DENSE_PARTS]
        return outside + ffn

    def get(self, name: str) -> torch.Tensor:
        if ".mlp." not in name:
            return self.reader.get(name)
        layer, part = int(name.split(".")[2]), name.split(".")[4]
        neurons = self._neurons(layer, part)
        if self.back is not None:
            neurons = neurons[self.back[layer]]
        return neurons.T.contiguous() if part == "down_proj" else neurons

    def _neurons(self, layer: int, part: str) -> torch.Tensor:
        """[I, H] a row per neuron, the shared ones first, as they lie in the twin."""
        kind = "output_linear" if part == "down_proj" else "input_linear"
        experts = self._stored(layer, f"block_sparse_moe.{kind}")
        shared_neurons = int(self.config.shared_intermediate_size)
        shared = self._stored(layer, f"shared_mlp.{kind}") if shared_neurons else None
        if part == "down_proj":  # [E, H, M], [H, S]
            rows = self._rows(experts.transpose(1, 2)).float() / self.factor
            return rows if shared is None else torch.cat([shared.T.float(), rows])
        half = 0 if part == "gate_proj" else 1
        rows = self._rows(experts.chunk(2, dim=1)[half])  # [E, 2M, H], [2S, H]
        return rows if shared is None else torch.cat([shared.chunk(2)[half], rows])

    def _rows(self, experts: torch.Tensor) -> torch.Tensor:
        """[E, M, H] -> [N, H], without what stands for no neuron."""
        routed = self.neurons - int(self.config.shared_intermediate_size)
        least, more = divmod(routed, len(experts))
        return torch.cat([x[: least + (number < more)] for number, x in enumerate(experts)])

    def _stored(self, layer: int, part: str) -> torch.Tensor:
        return self.reader.get(stored_name(f"model.layers.{layer}.{part}.weight", self.kinds))


def run_export(folder: Path, out: Path, plan: Path | None, progress: ProgressFn) -> str:
    """Writes the dense model of the factorized `folder` to `out`, whole or not at all.

    Returns a summary. With the `plan` that made `folder`, the neurons get their places back. Raises
    FactorizeError, which says what was changed, where there is no way back.
    """
    if out.exists():
        raise FactorizeError(f"{out} exists already; name a new folder")
    manifest = _untouched_manifest(folder)
    recipe = None if plan is None else Plan.read(plan)
    if recipe is not None:
        _check_plan(recipe, manifest, plan)
    config = _dense_config(folder, manifest.neurons)
    family = FAMILIES[config.model_type]
    back = None if recipe is None else recipe.order.long().argsort(dim=1)
    files = tensor_files(folder)
    with TensorReader(files) as reader, disk_errors(out.parent):
        twin_config, kinds = read_config(folder), family.layers(config)
        neurons = manifest.neurons or _places(twin_config)
        twin = _Twin(reader, twin_config, kinds, manifest.output_factor, neurons, back)
        parts = family.dense_parts(twin.names(), config)
        dtype, weights = _smallest_type(twin, parts, progress)
        out.parent.mkdir(parents=True, exist_ok=True)
        require_free(out.parent, int(weights * dtype.itemsize * 1.02), "the dense model")
        with staged(out) as new:
            write_weights(new, _dense_tensors(twin, parts, dtype, progress))
            config.dtype = dtype
            config.save_pretrained(new)
            for name in COPIED:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, new / name)
    order = "in their old places" if back is not None else "grouped as the experts were"
    return (
        f"{out}: a dense {family.title} model ({config.model_type}) in {str(dtype)[6:]}, its "
        f"neurons {order}"
    )


def _untouched_manifest(folder: Path) -> Manifest:
    try:
        manifest = Manifest.read(folder)
    except StartError as error:
        raise FactorizeError(str(error)) from error
    if manifest is None:
        raise FactorizeError(
            f"{folder} was not made by `moestro factorize` (it has no moestro.json): only its "
            "models have a way back to a dense one"
        )
    changed = changes(asdict(manifest))
    if changed:
        raise FactorizeError(
            f"{folder} has no way back to its dense model: {changed}; its source was "
            f"{manifest.source}"
        )
    return manifest


def changes(manifest: dict[str, Any]) -> str:
    """What was done to the weights beside splitting them, in words; nothing where nothing was."""
    if SCALED in manifest["method"]:
        scale = manifest["method"].partition(SCALED)[2]
        return f"the sum of its experts was scaled (scale {scale}) for fewer of them"
    told = [name for name, value in manifest.items() if name not in UNTOUCHED and value]
    return f"its weights were changed after the split ({', '.join(told)})" if told else ""


def _check_plan(recipe: Plan, manifest: Manifest, path: Path | None) -> None:
    if recipe.sha256 != manifest.plan_sha256:
        raise FactorizeError(
            f"{path} is not the plan that made this model; without --plan the neurons stay "
            "grouped, which computes the same"
        )
    if not bool((recipe.scales == 1).all()):
        raise FactorizeError("the plan's scales are not one; there is no way back")


def _dense_config(folder: Path, neurons: int) -> Any:
    """The source's own where the twin keeps it; else Llama's, by the twin's fields.

    Raises FactorizeError.
    """
    kept = folder / DENSE_CONFIG_NAME
    try:
        if not kept.is_file():
            return _llama_config(read_config(folder), neurons)
        said = json.loads(kept.read_text("utf-8"))
        said.pop("auto_map", None)
        config: Any = type(AutoConfig.for_model(said["model_type"])).from_dict(said)
    except UNREADABLE as error:
        raise FactorizeError(f"{folder} does not tell its dense model: {error}") from error
    if config.model_type not in FAMILIES:
        raise FactorizeError(f"{kept} is of the type {config.model_type!r}, which is not carried")
    return config


def _llama_config(twin: PreTrainedConfig, neurons: int) -> LlamaConfig:
    said: dict[str, Any] = {name: getattr(twin, name) for name in CARRIED}
    said |= {"head_dim": twin.head_dim, "attention_bias": twin.attention_bias}
    said["intermediate_size"] = neurons or _places(twin)
    config = LlamaConfig(**said)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llama"]]
    return config


def _places(twin: Any) -> int:
    """For neurons, in the shared expert and in all routed ones."""
    routed: int = twin.num_local_experts * twin.intermediate_size
    return routed + int(twin.shared_intermediate_size)


def _smallest_type(twin: _Twin, parts: Parts, progress: ProgressFn) -> tuple[torch.dtype, int]:
    """Of TYPES, the first that holds every weight exactly; and how many weights there are.

    What was rounded when it was folded does not count: it goes back to what it came from.
    """
    left, weights = list(TYPES), 0
    for done, part in enumerate(parts.values()):
        progress(Progress("look for the smallest type", done, len(parts), "tensors"))
        for source in part.sources:
            tensor = twin.get(source).float()
            weights += tensor.numel()
            if not part.rounds:
                left = [t for t in left if torch.equal(tensor.to(t).float(), tensor)]
    return left[0], weights


def _dense_tensors(
    twin: _Twin, parts: Parts, dtype: torch.dtype, progress: ProgressFn
) -> Iterator[Tensors]:
    for done, (name, part) in enumerate(sorted(parts.items())):
        made = part.make([twin.get(source) for source in part.sources])
        yield {name: made.to(dtype).contiguous()}
        progress(Progress("export", done + 1, len(parts), "tensors"))
