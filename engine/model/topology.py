"""What a model looks like from its experts: found by watching one pass without weights.

The pass runs on the meta device, so it costs no memory and reads nothing. It finds the order of
the experts modules, the router and the norm in front of each, which layers expand their keys, and
how much attention state a token needs. No table of families; a model whose pass does not go
through the hooks is refused here, before anything is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moestro.engine.facts import ModelRefused
from moestro.engine.formats import is_experts_module

from .attention import UnknownKeyword, install
from .experts import bind
from .kv import KVStore, PackedCache, SequenceKV

TRACE_TOKENS = 3


@dataclass(frozen=True, slots=True)
class RouterPlace:
    """The module that routes for one experts module, and where its output holds the ids."""

    path: str
    ids_index: int  # position in the router's output tuple
    norm_path: str | None  # the norm whose output it reads, where there is one


@dataclass(frozen=True, slots=True)
class Topology:
    """Facts of one model, independent of its weights."""

    experts_paths: tuple[str, ...]  # in the order in which a pass runs them
    routers: tuple[RouterPlace | None, ...]  # aligned; None: not a module of its own
    experts_per_token: tuple[int, ...]  # aligned
    expanded_layers: frozenset[int]
    kv_numbers_per_token: int  # numbers (not bytes) that all layers keep for one token
    attention_layers: int
    inputs_unchanged: bool  # no layer changes a tensor in place that a linear layer after it reads

    @property
    def router_paths(self) -> list[str]:
        return [place.path for place in self.routers if place is not None]


class _Watch:
    """Remembers which module made which storage, while one pass runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.made_by: dict[int, tuple[str, int]] = {}  # storage -> (module path, output index)
        self.read_by: dict[str, int] = {}  # module path -> storage of its only input
        self.runs: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # experts path, hidden, ids
        self.inputs_unchanged = True
        self._versions: dict[int, int] = {}  # of linear layers' inputs, by identity
        self._alive: list[torch.Tensor] = []  # keeps storages from being reused under our keys

    def hook(self, path: str) -> Callable[..., None]:
        def after(_: torch.nn.Module, inputs: tuple[object, ...], output: object) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            for index, tensor in enumerate(outputs):
                if isinstance(tensor, torch.Tensor):
                    self._alive.append(tensor)
                    self.made_by.setdefault(_storage(tensor), (path, index))
            if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor):
                self._alive.append(inputs[0])
                self.read_by[path] = _storage(inputs[0])

        return after

    def before_linear(self, _: torch.nn.Module, inputs: tuple[object, ...]) -> None:
        for read in inputs:
            if isinstance(read, torch.Tensor):
                self._alive.append(read)
                version = self._versions.setdefault(id(read), read._version)
                self.inputs_unchanged &= version == read._version

    def experts(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        path = next(name for name, found in self.model.named_modules() if found is module)
        self._alive += [hidden, ids]
        self.runs.append((path, hidden, ids))
        return torch.empty_like(hidden)

    def router(self, ids: torch.Tensor) -> RouterPlace | None:
        made = self.made_by.get(_storage(ids))
        if made is None or made[0] not in self.read_by:
            return None
        path, index = made
        norm_path, _ = self.made_by.get(self.read_by[path], (None, 0))
        if norm_path is not None:
            weight = getattr(self.model.get_submodule(norm_path), "weight", None)
            if weight is None or weight.dim() != 1:
                norm_path = None
        return RouterPlace(path, index, norm_path)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def trace(model: PreTrainedModel) -> Topology:
    """Run `model` (on meta) once on a packed row of two sequences.

    Raises ModelRefused where the model needs something that the hooks do not carry.
    """
    watch, cache = _Watch(model), PackedCache()
    install(model, cache)
    handles = []
    for path, module in model.named_modules():
        if is_experts_module(module):
            bind(module, watch.experts)
        elif path:
            handles.append(module.register_forward_hook(watch.hook(path)))
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(watch.before_linear))
    first, second = SequenceKV.alone(TRACE_TOKENS), SequenceKV.alone(TRACE_TOKENS)
    try:
        cache.begin([(first, TRACE_TOKENS), (second, TRACE_TOKENS)])
        run_packed(model, cache, [[0] * TRACE_TOKENS] * 2, [0, 0])
    except (
        UnknownKeyword,
        NotImplementedError,
        RuntimeError,
        AttributeError,
        TypeError,
        ValueError,
        LookupError,
    ) as error:
        raise ModelRefused(
            f"models of type {model.config.model_type!r} are not carried yet: {error}"
        ) from error
    finally:
        cache.end(commit=False)
        for handle in handles:
            handle.remove()
    return _facts(model, watch, cache, first.store)


def _facts(model: PreTrainedModel, watch: _Watch, cache: PackedCache, kv: KVStore) -> Topology:
    paths = tuple(path for path, _, _ in watch.runs)
    present = {path for path, module in model.named_modules() if is_experts_module(module)}
    if len(set(paths)) != len(paths) or not paths:
        raise ModelRefused(
            f"models of type {model.config.model_type!r} are not carried yet: their experts do not"
            " run once per pass"
        )
    if silent := sorted(present - set(paths)):
        raise ModelRefused(
            f"models of type {model.config.model_type!r} are not carried yet: a text pass does not"
            f" run {silent[0]}"
        )
    return Topology(
        experts_paths=paths,
        routers=tuple(watch.router(ids) for _, _, ids in watch.runs),
        experts_per_token=tuple(ids.shape[1] for _, _, ids in watch.runs),
        expanded_layers=frozenset(cache.expanded_layers),
        kv_numbers_per_token=kv.numbers_per_token,
        attention_layers=len(kv.layers),
        inputs_unchanged=watch.inputs_unchanged,
    )


def run_packed(
    model: PreTrainedModel,
    cache: PackedCache,
    token_lists: list[list[int]],
    starts: list[int],
    keep: list[int] | None = None,
) -> torch.Tensor:
    """One forward pass over `token_lists` packed into one row; list i continues at `starts[i]`.

    `cache.begin` has been called with the same parts. Returns the logits [len(keep), vocabulary]
    of the packed positions `keep` (default: the last token of every list), in fp32 and where the
    model is.
    """
    device = model.device
    ids = [token for tokens in token_lists for token in tokens]
    positions = [
        position
        for start, tokens in zip(starts, token_lists, strict=True)
        for position in range(start, start + len(tokens))
    ]
    if keep is None:
        keep, end = [], 0
        for tokens in token_lists:
            end += len(tokens)
            keep.append(end - 1)
    output = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.tensor(keep, device=device),
    )
    logits: torch.Tensor = output.logits[0]
    return logits.float()
