"""What a model looks like from its experts: facts, found by watching passes without weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moestro.engine.facts import LaneChoice


@dataclass(frozen=True, slots=True)
class RouterPlace:
    """The module that routes for one experts module, and where its output holds the ids."""

    path: str
    ids_index: int  # position in the router's output tuple
    norm_path: str | None  # the norm whose output it reads, where there is one
    reads_as_experts: bool  # the very tensor that its experts read
    constants: Mapping[str, str]  # by argument: names of the model's tensors that it is given, too

    def given_too(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The tensors of `constants`."""
        found = {}
        for argument, name in self.constants.items():
            path, _, last = name.rpartition(".")
            found[argument] = getattr(model.get_submodule(path), last)
        return found


@dataclass(frozen=True, slots=True)
class Topology:
    """Facts of one model, independent of its weights."""

    experts_paths: tuple[str, ...]  # in the order in which a pass runs them
    routers: tuple[RouterPlace | None, ...]  # aligned; None: not a module of its own
    experts_per_token: tuple[int, ...]  # aligned
    rows_are_tokens: bool  # what experts modules read has one row for each token of the pass
    expanded_layers: frozenset[int]
    ruled_masks: bool  # some masks are rules of the model's own, not plain causality
    block_masks: bool  # the model reads its masks: tensors over the whole row
    kv_numbers_per_token: int  # numbers (not bytes) that all layers keep for one token
    attention_layers: int
    lane: LaneChoice
    kv_fixed_numbers: int  # numbers that all layers keep for one sequence, however long
    writes_scores: bool  # attention takes memory for every pair of tokens
    inputs_unchanged: bool  # no layer changes a tensor in place that a linear layer after it reads
    absent_paths: tuple[str, ...]  # modules that a text pass never runs: they get no weights
    read_in_place: frozenset[str]  # linear layers and embeddings whose weights others read

    @property
    def stock_paths(self) -> list[str]:
        """Modules whose weights have to stay as they are: routers, and what is read in place."""
        routers = [place.path for place in self.routers if place is not None]
        return [*routers, *sorted(self.read_in_place)]
