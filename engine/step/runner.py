"""The only file that turns a batch into tensors and runs the model."""

import torch
from transformers import PreTrainedModel

from moestro.cache import Phase
from moestro.engine.model import PackedCache, SequenceKV, StepPhase, run_packed

from .sequence import Batch, Sequence


class Runner:
    """Owns the KV of running sequences. `run` commits; `forget` frees."""

    def __init__(self, model: PreTrainedModel, cache: PackedCache, step: StepPhase) -> None:
        self._model = model
        self._cache = cache
        self._step = step
        self._kv: dict[int, SequenceKV] = {}

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits [n, V] in fp32 of the parts that end their pending tokens, in batch order.

        On the host: a device is waited for here, once, and before anything counts as computed.

        Either every sequence of the batch is advanced, or (on an exception) none.
        """
        lists, starts, keep, end = [], [], [], 0
        for part in batch.parts:
            sequence = part.sequence
            first = sequence.computed_tokens
            lists.append(sequence.token_ids[first : first + part.tokens])
            starts.append(first)
            end += part.tokens
            if part.ends_pending:
                keep.append(end - 1)
        parts = [(self._kv_of(part.sequence), part.tokens) for part in batch.parts]
        self._step.phase = Phase.PREFILL if batch.is_prefill else Phase.DECODE
        self._cache.begin(parts)
        done = False
        try:
            with torch.inference_mode():
                logits = run_packed(
                    self._model, self._cache, lists, starts, keep or [end - 1]
                ).cpu()
            done = True
        finally:
            self._cache.end(commit=done)
        for part in batch.parts:
            part.sequence.computed_tokens += part.tokens
        return logits if keep else logits[:0]

    def forget(self, sequence: Sequence) -> None:
        self._kv.pop(sequence.number, None)

    @property
    def held_sequences(self) -> int:
        return len(self._kv)

    def _kv_of(self, sequence: Sequence) -> SequenceKV:
        if sequence.number not in self._kv:
            self._kv[sequence.number] = SequenceKV(sequence.capacity_tokens)
        return self._kv[sequence.number]
