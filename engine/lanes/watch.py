"""Watches a pass on the meta device: which modules run, who routes, who reads whose output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from moestro.engine.formats import is_experts_module
from moestro.engine.model import RouterPlace, bind


class Watch:
    """Remembers which module made which storage, while one pass runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.made_by: dict[int, tuple[str, int]] = {}  # storage -> (module path, output index)
        self.read_by: dict[str, torch.Tensor] = {}  # module path -> its only input that changes
        self.constants: dict[str, dict[str, str]] = {}  # module path -> names of its other inputs
        self.runs: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # experts path, hidden, ids
        self.touched: set[int] = set()  # parameters that some operation took, by identity
        self.read_in_place: set[str] = set()  # layers whose weights others read
        self.inputs_unchanged = True
        self._versions: dict[int, int] = {}  # of linear layers' inputs, by identity
        self._own = {id(each): name for name, each in _tensors_of(model)}
        self._alive: list[torch.Tensor] = []  # keeps storages from being reused under our keys

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Passes inside are watched; the model's experts answer nothing."""
        handles, watched = [], list[torch.nn.Module]()
        for path, module in self.model.named_modules():
            if type(module) in _OBSERVED:
                watched.append(module)
                module.__dict__["moestro_note"] = partial(self.read_in_place.add, path)
                module.__class__ = _OBSERVED[type(module)]
            if is_experts_module(module):
                bind(module, self.experts)
            elif path:
                handles.append(module.register_forward_hook(self._hook(path), with_kwargs=True))
            if isinstance(module, torch.nn.Linear):
                handles.append(module.register_forward_pre_hook(self._before_linear))
        try:
            with _Touches(self.touched):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for module in watched:
                del module.__dict__["moestro_note"]
                module.__class__ = _STOCK[type(module)]

    def _hook(self, path: str) -> Callable[..., None]:
        def after(
            module: torch.nn.Module,
            inputs: tuple[object, ...],
            named: dict[str, object],
            output: object,
        ) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            for index, tensor in enumerate(outputs):
                if isinstance(tensor, torch.Tensor):
                    self._alive.append(tensor)
                    self.made_by.setdefault(_storage(tensor), (path, index))
            given = _by_name(module, inputs, named)
            constants = {name: self._own.get(id(each)) for name, each in given[1:]}
            if given and isinstance(given[0][1], torch.Tensor) and None not in constants.values():
                self.read_by[path] = given[0][1]
                self.constants[path] = {name: own for name, own in constants.items() if own}

        return after

    def _before_linear(self, _: torch.nn.Module, inputs: tuple[object, ...]) -> None:
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

    def never_run(self) -> tuple[str, ...]:
        """Modules that a text pass has no use for, as towers of other kinds of input.

        Of the modules around the decoder's layers, those of whose parameters nothing is taken.
        """
        ran = {path for path, _, _ in self.runs}
        first = next(iter(ran), "").split(".")
        depth = next((place for place, part in enumerate(first) if part.isdigit()), 0)
        around = {".".join(first[:place]) for place in range(depth)}
        found: list[str] = []
        for path, module in self.model.named_modules():
            if path and path.rpartition(".")[0] in around:
                parameters = list(module.parameters())
                runs = any(other == path or other.startswith(f"{path}.") for other in ran)
                if parameters and not runs and self.touched.isdisjoint(map(id, parameters)):
                    found.append(path)
        return tuple(found)

    def _answers(self, place: RouterPlace, read: torch.Tensor, ids: torch.Tensor) -> bool:
        """Whether the module there gives ids for rows [T, H] of `read` alone."""
        module, own = self.model.get_submodule(place.path), place.given_too(self.model)
        try:
            found = module(read.reshape(-1, read.shape[-1]), **own)[place.ids_index]
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
        return isinstance(found, torch.Tensor) and found.numel() == ids.numel()

    def router(self, hidden: torch.Tensor, ids: torch.Tensor) -> RouterPlace | None:
        """Who chose `ids`, where it can be asked again for rows of what it read."""
        made = self.made_by.get(_storage(ids))
        if made is None or made[0] not in self.read_by:
            return None
        path, index = made
        read = self.read_by[path]
        norm_path, _ = self.made_by.get(_storage(read), (None, 0))
        if norm_path is not None:
            weight = getattr(self.model.get_submodule(norm_path), "weight", None)
            if weight is None or weight.dim() != 1:
                norm_path = None
        as_experts = _storage(read) == _storage(hidden)
        place = RouterPlace(path, index, norm_path, as_experts, self.constants[path])
        return place if self._answers(place, read, ids) else None


class _Touches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every parameter that an operation takes; answers what depends on numbers by shapes."""

    def __init__(self, found: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        self._found.update(id(each) for each in leaves if isinstance(each, torch.nn.Parameter))
        if func is torch.ops.aten.nonzero.default:  # as many as could be
            (tensor,) = args
            return torch.empty((tensor.numel(), tensor.dim()), dtype=torch.long, device="meta")
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        if func in _INDEXED and any(_is_mask(index) for index in args[1]):
            args = (args[0], _all_places(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype == torch.bool


def _all_places(indices: Any) -> list[Any]:
    """A mask as indices of as many places as it could choose."""
    found: list[Any] = []
    for index in indices:
        if _is_mask(index):
            places = torch.empty(index.numel(), dtype=torch.long, device="meta")
            found += [places] * index.dim()
        else:
            found.append(index)
    return found


class _ObservedLinear(torch.nn.Linear):
    """Notes when something else than its own `forward` asks for its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        parameters = self._parameters
        return F.linear(input, parameters["weight"], parameters.get("bias"))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.__dict__["moestro_note"]()
        return super().__getattr__(name)


class _ObservedEmbedding(torch.nn.Embedding):
    """The same of an embedding."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self._parameters["weight"]
        return F.embedding(input, weight, self.padding_idx)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.__dict__["moestro_note"]()
        return super().__getattr__(name)


_OBSERVED: dict[type, type] = {
    torch.nn.Linear: _ObservedLinear,
    torch.nn.Embedding: _ObservedEmbedding,
}
_STOCK = {observed: stock for stock, observed in _OBSERVED.items()}


def _by_name(
    module: torch.nn.Module, given: tuple[object, ...], named: dict[str, object]
) -> list[tuple[str, object]]:
    """What a module was called with and is not None, the first argument first."""
    names = list(signature(module.forward).parameters)
    both = [*zip(names, given, strict=False), *named.items()]
    return [(name, each) for name, each in both if each is not None]


def _tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
