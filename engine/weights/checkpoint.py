"""A Hugging Face folder as tensors: which keys are experts, and how to load either kind.

No table of key names: transformers' own weight conversions say where a tensor of the file goes.
Files are read with `pread`, never mapped, so that a loaded page is counted once and can be freed.
Knows no request, no budget and no pack.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from moestro.cache import human_bytes
from moestro.engine.facts import ModelRefused
from moestro.engine.formats import Codes, ExpertsModule, is_experts_module
from moestro.engine.gguf_files import GgufSource
from moestro.engine.quantized import Grid, GridForm, Quantization, plain_slices

from .completeness import Renamed, refuse_missing
from .config import read_config, read_quantization, refusing, warn_disagreements
from .conversion import arranged, conversions, meta_parameter, only_orders, parts_of, with_grids
from .damage import few, one_line, readable, reading
from .linears import placeholders
from .routers import RouterFacts
from .tying import same_numbers, tied_twice, untie, warn_untied
from .weight_files import fingerprint, gguf_source, open_weights, weight_files

log = logging.getLogger("moestro.engine")

# safetensors' names for the dtypes that are weights as they stand
PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Checkpoint:
    """The files of one model. Opens and checks them; holds no weights.

    Raises ModelNotFound or ModelRefused with a line that names the file and the reason.
    """

    gguf: GgufSource | None = None  # where the weights are in such files
    routers: RouterFacts | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._untied: set[str] = set()  # names that the config ties and the files do not
        self.config = read_config(folder)
        self.gguf = gguf_source(folder)
        if self.gguf is not None:
            with refusing(str(self.gguf.paths[0])):
                found = self.gguf.tensors(self.config)
        else:
            self.routers = RouterFacts.of(folder)
            routers = self.routers
            beside = [routers.checked_file(folder)] if routers and routers.has_file else []
            found = open_weights([*weight_files(folder), *beside])
        self._file_of_key = {key: path for key, (path, _) in found.items()}
        self._slices: dict[str, Any] = {key: part for key, (_, part) in found.items()}
        self.quantization = read_quantization(folder)
        if self.quantization is not None:
            self._decode(self.quantization)

    def _decode(self, quantization: Quantization) -> None:
        """From here on the quantized tensors have the names, shapes and numbers of plain ones."""
        dtype = getattr(self.config.get_text_config(), "dtype", None) or torch.bfloat16
        if dtype not in PLAIN_DTYPES.values():
            raise ModelRefused(f"{self.folder}: weights in {dtype} are not carried")
        plain = plain_slices(self._slices, quantization, dtype)
        whole = sorted(set(self._file_of_key.values()))
        self._slices = plain
        self._file_of_key = {key: self._file_of_key.get(key, whole[0]) for key in plain}
        kind = str(dtype).removeprefix("torch.")
        log.info("weights: %s, decoded to %s", quantization.method, kind)

    def close(self) -> None:
        self._slices.clear()  # the last that holds the files open

    def fingerprint(self) -> str:
        """Changes when the config or any weight file does (names, sizes, headers, times)."""
        if self.gguf is not None:
            return fingerprint(b"GGUF", self.gguf.paths)
        config = (self.folder / "config.json").read_bytes()
        return fingerprint(config, set(self._file_of_key.values()))

    def dtype_of(self, key: str) -> torch.dtype:
        name = self._slices[key].get_dtype()
        if name not in PLAIN_DTYPES:
            raise ModelRefused(
                f"{self._file_of_key[key]}: tensor {key} is {name}, and weights must be"
                f" {', '.join(PLAIN_DTYPES)}; what is quantized needs a quantization_config in"
                " config.json that says how"
            )
        return PLAIN_DTYPES[name]

    def stored_dtype(self, key: str) -> torch.dtype | None:
        """Of a tensor that has the same name in the files; None where conversion renames it."""
        return self.dtype_of(key) if key in self._slices else None

    def untie(self, model: PreTrainedModel) -> None:
        """Give `model`, on meta, parameters of their own where only the config ties them."""
        untie(model, self._untied & model.all_tied_weights_keys.keys())

    def split_keys(self, model: PreTrainedModel) -> tuple[list[ExpertsModule], list[str]]:
        """Experts modules in the order the model holds them, and the keys of everything else."""
        mapping = conversions(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        meta = model.state_dict()
        parameters = {
            f"{path}.{name}": path
            for path, module in model.named_modules()
            if is_experts_module(module)
            for name, _ in module.named_parameters(recurse=False)
        }
        prefix = model.base_model_prefix
        renamed = {
            key: rename_source_key(key, renamings, converters, prefix, meta) for key in self._slices
        }
        renamed = self._used(renamed, meta)
        refuse_missing(self.folder, model, converters, renamed)
        self._refuse_misfits(renamed, meta, parameters)
        warn_disagreements(self.folder, model)
        spare = self._settle_ties(model, {key: target for key, (target, _) in renamed.items()})
        keys_of_path: dict[str, dict[str, list[str]]] = {}
        dense = []
        for key, (target, _) in renamed.items():
            if target in parameters:
                sources = keys_of_path.setdefault(parameters[target], {})
                sources.setdefault(target, []).append(key)
            elif key not in spare:
                dense.append(key)
        modules = [
            self._experts_module(model, path, keys_of_path[path])
            for path in dict.fromkeys(parameters.values())
            if path in keys_of_path
        ]
        return modules, dense

    def _used(self, renamed: dict[str, Renamed], wanted: Collection[str]) -> dict[str, Renamed]:
        """Without what the model has no place for: it is named once, and never read."""
        spare = {key for key, (target, _) in renamed.items() if target not in wanted}
        if spare:
            size_bytes = sum(_stored_bytes(self._slices[key]) for key in spare)
            log.info(
                "not read: %d tensors (%s) that a text pass of the model's class does not use: %s",
                len(spare),
                human_bytes(size_bytes),
                few(spare),
            )
        return {key: found for key, found in renamed.items() if key not in spare}

    def _refuse_misfits(
        self,
        renamed: Mapping[str, Renamed],
        wanted: Mapping[str, Any],
        experts: Collection[str],
    ) -> None:
        """Of what the headers can say before anything is read: dtypes, the shapes of tensors that
        become parameters as they stand, and of experts beside each other. Raises ModelRefused.
        """
        first: dict[Renamed, str] = {}
        for key, (target, pattern) in renamed.items():
            meta = wanted[target]
            if not isinstance(meta, torch.Tensor):
                continue  # a module's extra state
            if meta.is_floating_point():
                self.dtype_of(key)
            found = tuple(self._slices[key].get_shape())
            if pattern is None and target not in experts and found != tuple(meta.shape):
                raise ModelRefused(
                    f"{self._file_of_key[key]}: {key} is {found} in the file,"
                    f" {tuple(meta.shape)} in the config; the two are not of one model"
                )
            other = first.setdefault((target, pattern), key)
            if target in experts and found != tuple(self._slices[other].get_shape()):
                raise ModelRefused(
                    f"{self._file_of_key[key]}: {key} is {found}, and {other}"
                    f" {tuple(self._slices[other].get_shape())}; fetch the files again"
                )

    def _settle_ties(self, model: PreTrainedModel, targets: dict[str, str]) -> set[str]:
        """Keys that say again what another one says. Models built from now on tie the rest."""
        spare: set[str] = set()
        for name, key, source in tied_twice(model, targets):
            with readable(self._file_of_key[key]), reading(self.folder):
                same = same_numbers(self._slices[key], self._slices[source])
            if same:
                spare.add(key)
            else:
                warn_untied(self.folder, name, model.all_tied_weights_keys[name])
                self._untied.add(name)
        untie(model, self._untied & model.all_tied_weights_keys.keys())
        return spare

    def _experts_module(
        self, model: PreTrainedModel, path: str, sources: dict[str, list[str]]
    ) -> ExpertsModule:
        module = model.get_submodule(path)
        tensors = {}
        for name, parameter in module.named_parameters(recurse=False):
            dtypes = [self.dtype_of(key) for key in sources.get(f"{path}.{name}", [])]
            if sources and not dtypes:
                raise ModelRefused(f"{self.folder}: the files hold no weights for {path}.{name}")
            # Of several the widest, as stacking them in transformers gives: no bit is lost.
            dtype = reduce(torch.promote_types, dtypes) if dtypes else parameter.dtype
            tensors[name] = (dtype, tuple(parameter.shape))
        keys = tuple(key for group in sources.values() for key in group)
        empty = {name: meta_parameter(shape, dtype) for name, (dtype, shape) in tensors.items()}
        as_seen = {
            name: (each.dtype, tuple(each.shape)) for name, each in arranged(module, empty).items()
        }
        num_experts = next(iter(as_seen.values()))[1][0]
        transposed = bool(module.is_transposed)
        entry = ExpertsModule(path, num_experts, as_seen, tensors, keys, transposed)
        if self.quantization is None and self.gguf is None:
            return entry
        forms = {
            target.removeprefix(f"{path}."): [self.grid_form(key) for key in group]
            for target, group in sources.items()
        }
        return with_grids(entry, model, forms)

    def grid_form(self, key: str) -> GridForm | str:
        """How the numbers of one tensor lie in the files, or why no tile can hold them so."""
        none = "not all of them are quantized"
        grid: Grid | GridForm | str = getattr(self._slices[key], "grid", none)
        return grid.form if isinstance(grid, Grid) else grid

    def dense_bytes(self, keys: list[str], itemsize_bytes: int) -> int:
        """Bytes of the tensors `keys` when each number takes `itemsize_bytes`."""
        return sum(
            torch.Size(self._slices[key].get_shape()).numel() * itemsize_bytes for key in keys
        )

    def load_experts(self, model: PreTrainedModel, entry: ExpertsModule) -> dict[str, torch.Tensor]:
        """All experts of one module as {parameter: [E, ...]} in the checkpoint's dtype.

        `model` stays without weights. Raises ModelRefused where the file does not fit the model.
        """
        slices = {key: self._slices[key] for key in entry.source_keys}
        loaded = self._load_parameters(model, entry.path, entry.stored, slices)
        return arranged(model.get_submodule(entry.path), loaded)

    def load_codes(
        self, model: PreTrainedModel, entry: ExpertsModule
    ) -> tuple[dict[str, torch.Tensor], dict[str, Codes]]:
        """The same of a module with `grids`: its matrices are not decoded, the rest is as above.

        Codes, scales and zeros go the same way through transformers' conversion, which joins and
        stacks outputs.
        """
        slices = {key: self._slices[key] for key in entry.source_keys}
        each = ((key, getattr(part, "grid", None)) for key, part in slices.items())
        grids = {key: grid for key, grid in each if isinstance(grid, Grid)}
        for grid in grids.values():
            grid.check()
        codes, scales, zeros, each_order = (
            self._load_parameters(model, entry.path, wanted, parts) if wanted else {}
            for wanted, parts in parts_of(entry, grids)
        )
        orders = only_orders(self.folder, entry, each_order)
        rest = {name: each for name, each in entry.stored.items() if name not in entry.grids}
        plain = {key: part for key, part in slices.items() if key not in grids}
        others = self._load_parameters(model, entry.path, rest, plain) if rest else {}
        return others, {
            name: Codes(codes[name], scales[name], zeros.get(name), orders.get(name))
            for name in entry.grids
        }

    def _load_parameters(
        self,
        model: PreTrainedModel,
        path: str,
        wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        slices: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        """Parameters of the module at `path`, of those dtypes and shapes, out of `slices`."""
        module = model.get_submodule(path)
        # A conversion may fill other experts' parameters from the same tensors.
        metas = [
            (each, dict(each.named_parameters(recurse=False)))
            for each in model.modules()
            if is_experts_module(each)
        ]
        for name, (dtype, shape) in wanted.items():
            module.register_parameter(name, meta_parameter(shape, dtype))
        try:
            self._load(model, slices, torch.device("cpu"))
            loaded = {name: getattr(module, name).detach() for name in wanted}
        finally:
            for each, parameters in metas:
                for name, parameter in parameters.items():
                    each.register_parameter(name, parameter)
        for name, tensor in loaded.items():
            if tensor.is_meta:
                raise ModelRefused(f"{self.folder}: {path}.{name} is missing in the files")
        return loaded

    def load_dense(
        self,
        model: PreTrainedModel,
        keys: list[str],
        after_group: Callable[[int, int], None],
        device: torch.device = torch.device("cpu"),  # noqa: B008  # a value like any other
    ) -> None:
        """Give `model` everything but its experts, whose parameters it loses for good.

        On `device`, in the dtype that `model` has, or where its class says so (fp16, bf16) in fp32.
        Layer after layer; `after_group(done, total)` may replace modules that have their weights.
        """
        drop_experts(model)
        missing, unexpected = set(model.state_dict()), set()
        groups = _by_layer(keys)
        for done, group in enumerate(groups, start=1):
            info = self._load(model, {key: self._slices[key] for key in group}, device)
            missing &= info.missing_keys
            unexpected |= info.unexpected_keys
            after_group(done, len(groups))
        info.missing_keys, info.unexpected_keys = missing & set(model.state_dict()), unexpected
        with placeholders(model):
            model._finalize_model_loading(model, _load_config(model, device), info)
        if info.missing_keys:
            raise ModelRefused(
                f"{self.folder}: tensors are missing in the files: {few(info.missing_keys)}"
            )

    def _load(self, model: PreTrainedModel, slices: dict[str, Any], device: torch.device) -> Any:
        load_config = _load_config(model, device)
        try:
            info, _ = convert_and_load_state_dict_in_model(model, slices, load_config)
        except torch.OutOfMemoryError:  # which is no fault of the checkpoint's
            raise
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ModelRefused(f"{self.folder}: {one_line(error)}") from error
        if info.mismatched_keys:
            key, found, wanted = sorted(info.mismatched_keys)[0]
            raise ModelRefused(
                f"{self.folder}: {key} is {tuple(found)} in the file, {tuple(wanted)} in the config"
            )
        if info.conversion_errors:
            raise ModelRefused(f"{self.folder}: {one_line(next(iter(info.conversion_errors)))}")
        return info


def drop_experts(model: PreTrainedModel) -> None:
    """All experts modules lose their parameters for good."""
    for module in model.modules():
        if is_experts_module(module):
            names = [name for name, _ in module.named_parameters(recurse=False)]
            module.__dict__["moestro_dropped"] = tuple(names)
            for name in names:
                del module._parameters[name]
            module._is_hf_initialized = True  # type: ignore[assignment]  # nothing left to init


def _load_config(model: PreTrainedModel, device: torch.device) -> LoadStateDictConfig:
    return LoadStateDictConfig(
        device_map={"": device},
        dtype_plan=model._get_dtype_plan(model.dtype),
        weight_mapping=conversions(model),
    )


def _stored_bytes(part: Any) -> int:
    """Of a tensor in the files, of whatever dtype: F8_E4M3, BF16, I64, BOOL."""
    bits = re.search(r"\d+", part.get_dtype())
    numbers = torch.Size(part.get_shape()).numel()
    return numbers * (int(bits.group()) // 8 if bits else 1)


def _by_layer(keys: list[str]) -> list[list[str]]:
    """Keys of one numbered layer together, every other key alone."""
    found: dict[str, list[str]] = {}
    for key in keys:
        parts = key.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        found.setdefault(".".join(parts[: place + 1]), []).append(key)
    return list(found.values())
