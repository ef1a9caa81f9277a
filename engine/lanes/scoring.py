"""Logits of more rows than the last ones of a pass, a block of rows at a time.

A model's head is more than a matrix (soft caps, scales, a compact format), so it is not imitated:
the stock model runs again with its backbone replaced by what the backbone gave.
"""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel


class HeldStates:
    """A context around one pass. Afterwards `logits` runs the head on any rows of that pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._backbone: torch.nn.Module = model.base_model
        self._output: Any = None

    def __enter__(self) -> "HeldStates":
        self._handle = self._backbone.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _keep(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        self._handle.remove()  # the head alone does not count as a pass
        self._output = output

    def logits(self, rows: list[int]) -> torch.Tensor:
        """[n, V] in fp32 of the packed row's positions `rows`, where the model is."""
        part = copy.copy(self._output)
        part.last_hidden_state = self._output.last_hidden_state[:, rows]
        self._backbone.forward = lambda *_, **__: part
        try:
            ids = torch.zeros((1, len(rows)), dtype=torch.long, device=self._model.device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        finally:
            del self._backbone.forward  # the class's own is there again
        return logits.float()
