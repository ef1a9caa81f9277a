"""What each layer loses with fewer or more experts than the others, measured on a text."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moestro.engine import Progress, ProgressFn
from moestro.factorize.facts import Deltas, FactorizeError, Plan, least_loss

from .student import Student

TRIES = 2  # numbers of experts that each layer is tried with, beside the usual one
SURE = 1.0  # standard error that a change loses in addition, for what is only the text's chance
SAME = 1e-3  # of the largest number behind the last layer
STRIDE = 4  # of the tokens whose predictions are compared


@torch.no_grad()
def measured_layers(
    model: Any,
    plan: Plan,
    windows: torch.Tensor,
    progress: ProgressFn,
    start: Deltas | None = None,
    *,
    by_prompt: bool = False,
) -> tuple[int, ...]:
    """Experts per token of each layer, as many in all as `plan` has, of the least loss.

    `model` is the dense model of `plan`, which this changes; `windows` [N, S] are token ids, and
    `start` what a recovery has added. Each layer is run alone with fewer and with all experts while
    the others take top_k: the loss is how far the next-token distribution diverges from the dense
    one's, plus its standard error over the windows. `by_prompt`: a window's first half chooses the
    experts of the second, which alone is judged. Raises FactorizeError for a model whose layers do
    more together than one after the other.
    """
    student = Student(model, plan, 1 if start is None else start.rank, start)
    options, k = plan.facts.options, plan.facts.options.top_k
    tries = sorted({max(1, k * 2 // 3), options.experts} - {k})
    assert len(tries) <= TRIES
    losses = _Losses(student, windows, k, windows.shape[1] // 2 if by_prompt else None)
    table: list[dict[int, float]] = []
    for layer in range(len(student.ffns)):
        progress(Progress("layers", layer, len(student.ffns), "layers"))
        table.append({k: 0.0} | {count: losses.of(layer, count) for count in tries})
    progress(Progress("layers", len(student.ffns), len(student.ffns), "layers"))
    return least_loss(table, k * len(student.ffns))


class _Losses:
    """Of one student. What comes before the layer in question is computed once."""

    def __init__(
        self, student: Student, windows: torch.Tensor, top_k: int, prompt_tokens: int | None
    ) -> None:
        self._student, self._top_k, self._prompt_tokens = student, top_k, prompt_tokens
        self._model = student.model.model
        places = torch.arange(windows.shape[1])[None]
        rows = self._model.embed_tokens(windows)
        self._turns = self._model.rotary_emb(rows, position_ids=places)
        dense = self._pass(rows, 0, None)[-1]
        self._check_whole(windows, dense)
        self._wanted = [*self._distributions(dense)]
        self._before = self._pass(rows, 0, [top_k] * len(student.ffns))
        self._usual = self._divergences(self._before[-1])

    def of(self, layer: int, count: int) -> float:
        """More than with the usual number in all layers, at most but for rare texts."""
        counts = [self._top_k] * len(self._student.ffns)
        counts[layer] = count
        found = self._divergences(self._pass(self._before[layer], layer, counts)[-1]) - self._usual
        error = found.std() / len(found) ** 0.5 if len(found) > 1 else torch.tensor(0.0)
        return float(found.mean() + SURE * error)

    def _check_whole(self, windows: torch.Tensor, rows: torch.Tensor) -> None:
        """`rows` [N, S, H] after the last layer are the model's own.

        All windows at once, as they were computed: another number of rows rounds otherwise.
        """
        wanted, found = self._student.hidden(windows, None), self._model.norm(rows)
        if (wanted - found).abs().max() > SAME * wanted.abs().max():
            raise FactorizeError(
                "this model's layers are not run one after the other alone, so that none can be "
                "measured; give each layer's number to --layer-top-k"
            )

    def _pass(
        self, rows: torch.Tensor, first: int, counts: Sequence[int] | None
    ) -> list[torch.Tensor]:
        """[N, S, H] before each layer from `first` on, and after the last. None: all neurons."""
        found = [rows]
        for place in range(first, len(self._student.ffns)):
            ffn = self._student.ffns[place]
            ffn.top_k = None if counts is None else counts[place]
            ffn.prompt_tokens = self._prompt_tokens
            layer = self._model.layers[place]
            found.append(layer(found[-1], position_embeddings=self._turns))
        return found

    def _divergences(self, rows: torch.Tensor) -> torch.Tensor:
        """[N], of each window."""
        pairs = zip(self._wanted, self._distributions(rows), strict=True)
        return torch.tensor(
            [float((wanted.exp() * (wanted - found)).sum(-1).mean()) for wanted, found in pairs]
        )

    def _distributions(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Of one window after the other, [its judged places, V]."""
        student = self._student
        judged = rows[:, self._prompt_tokens or 0 : -1 : STRIDE]
        return map(student.log_probabilities, self._model.norm(judged))
