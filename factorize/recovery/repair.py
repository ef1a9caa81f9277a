"""Closed-form repair: layer after layer, a ridge update of the down projection that brings the

student's residual stream back to the dense model's. What each layer is fitted on is what the
student, repaired so far, really sees there. How strong the ridge is, windows decide that no fit has
seen; where nothing helps them the layer stays as it is.
Letters: N windows of S tokens, H hidden size, I neurons, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moestro.engine import Progress, ProgressFn

from .student import Student

BATCH = 4  # windows at a time
CHECK_EVERY = 8  # one batch in so many only judges


@dataclass(frozen=True, slots=True)
class RepairOptions:
    ridges: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the neurons' mean square


@dataclass(slots=True)
class _Moments:
    """Sums over tokens: of neurons with neurons, of neurons with what is missing, of its square."""

    inner: torch.Tensor  # [I, I]
    outer: torch.Tensor  # [I, H]
    square: float = 0.0

    def add(self, neurons: torch.Tensor, missing: torch.Tensor) -> None:
        """`neurons` [T, I], `missing` [T, H]."""
        self.inner.addmm_(neurons.T, neurons)
        self.outer.addmm_(neurons.T, missing)
        self.square += float(missing.square().sum())

    def left(self, update: torch.Tensor) -> float:
        """What is still missing, squared, after `update` [H, I]."""
        gained = 2 * float((update.T * self.outer).sum())
        return self.square - gained + float(((update @ self.inner) * update).sum())


@torch.no_grad()
def repair(
    student: Student,
    windows: torch.Tensor,
    top_k: int,
    options: RepairOptions,
    progress: ProgressFn,
) -> list[float]:
    """Updates the student's down projections, fitted on `windows` [N, S] at `top_k` experts.

    Returns, layer by layer, the share of what was missing on judging windows that still is.
    """
    inner = student.model.model
    wanted = inner.embed_tokens(windows)
    found = wanted.clone()
    positions = torch.arange(windows.shape[1])[None]
    angles = inner.rotary_emb(wanted[:1], positions)
    left = []
    for number, layer in enumerate(inner.layers):

        def run(hidden: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            # without a mask, sdpa is causal
            output: torch.Tensor = layer(
                hidden, attention_mask=None, position_ids=positions, position_embeddings=angles
            )
            return output

        with student.active(None):
            wanted = torch.cat([run(part) for part in torch.split(wanted, BATCH)])
        with student.active(top_k):
            found, share = _repair_layer(layer, run, found, wanted, options)
        left.append(share)
        progress(Progress("repair", number + 1, len(inner.layers), "layers"))
    return left


def _repair_layer(
    layer: Any,
    run: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    wanted: torch.Tensor,
    options: RepairOptions,
) -> tuple[torch.Tensor, float]:
    """(what the repaired layer makes of `hidden` [N, S, H], the share that it leaves)."""
    neurons: list[torch.Tensor] = []
    hook = layer.mlp.down.register_forward_pre_hook(lambda _, given: neurons.append(given[0]))
    outputs = [run(part) for part in torch.split(hidden, BATCH)]
    hook.remove()
    width, hidden_size = neurons[0].shape[-1], hidden.shape[-1]
    fit, judge = (
        _Moments(torch.zeros(width, width), torch.zeros(width, hidden_size)) for _ in range(2)
    )
    for number, (active, output, target) in enumerate(
        zip(neurons, outputs, torch.split(wanted, BATCH), strict=True)
    ):
        judging = number % CHECK_EVERY == CHECK_EVERY - 1
        # the first token of a window is the attention's sink, tens of times as large as others
        rows, missing = active[:, 1:].flatten(0, 1), (target - output)[:, 1:].flatten(0, 1)
        (judge if judging else fit).add(rows, missing)
    update, share = _best_update(fit, judge, options.ridges)
    layer.mlp.down.add(update)
    repaired = [output + active @ update.T for output, active in zip(outputs, neurons, strict=True)]
    return torch.cat(repaired), share


def _best_update(
    fit: _Moments, judge: _Moments, ridges: tuple[float, ...]
) -> tuple[torch.Tensor, float]:
    """(the update [H, I] that leaves least on `judge`, the share that it leaves)."""
    best, share = torch.zeros_like(fit.outer.T), 1.0
    mean = float(fit.inner.diagonal().mean())
    for ridge in ridges:
        inner = fit.inner.clone()
        inner.diagonal().add_(ridge * mean)
        update = torch.linalg.solve(inner, fit.outer).T
        left = judge.left(update) / max(judge.square, 1e-30)
        if left < share:
            best, share = update.contiguous(), left
    return best, share
