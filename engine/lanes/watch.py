"""Watches a pass on the meta device: which modules run, who routes, who reads whose output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from moestro.engine.formats import is_experts_module
from moestro.engine.model import RouterPlace, bind


class Watch:
    """Remembers which module made which storage, while one pass runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.made_by: dict[int, tuple[str, int]] = {}  # storage -> (module path, output index)
        self.read_by: dict[str, int] = {}  # module path -> storage of its only input
        self.runs: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # experts path, hidden, ids
        self.called: set[str] = set()  # paths of modules
        self.inputs_unchanged = True
        self._versions: dict[int, int] = {}  # of linear layers' inputs, by identity
        self._alive: list[torch.Tensor] = []  # keeps storages from being reused under our keys

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Passes inside are watched; the model's experts answer nothing."""
        handles = []
        for path, module in self.model.named_modules():
            if is_experts_module(module):
                bind(module, self.experts)
            elif path:
                handles.append(module.register_forward_hook(self._hook(path)))
            if isinstance(module, torch.nn.Linear):
                handles.append(module.register_forward_pre_hook(self._before_linear))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Callable[..., None]:
        def after(_: torch.nn.Module, inputs: tuple[object, ...], output: object) -> None:
            self.called.add(path)
            outputs = output if isinstance(output, tuple) else (output,)
            for index, tensor in enumerate(outputs):
                if isinstance(tensor, torch.Tensor):
                    self._alive.append(tensor)
                    self.made_by.setdefault(_storage(tensor), (path, index))
            if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor):
                self._alive.append(inputs[0])
                self.read_by[path] = _storage(inputs[0])

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
