"""The class that transformers has for a checkpoint, built without weights and with our hooks."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from moestro.engine.facts import Lane, ModelRefused
from moestro.engine.weights import Checkpoint, refusing

from . import attention, experts

STOCK_ATTENTIONS = ("sdpa", "eager")  # the first that the class has


def build_meta_model(
    checkpoint: Checkpoint, dtype: torch.dtype, lane: Lane = Lane.PACKED
) -> PreTrainedModel:
    """The model's own class without weights, with moestro's hook for its experts.

    In the packed lane with that for its attention, too. Raises ModelRefused.
    """
    if lane is Lane.PACKED:
        return _build(checkpoint, dtype, attention.NAME)
    try:
        return _build(checkpoint, dtype, STOCK_ATTENTIONS[0])
    except ModelRefused:
        return _build(checkpoint, dtype, STOCK_ATTENTIONS[1])


def _build(checkpoint: Checkpoint, dtype: torch.dtype, attention_name: str) -> PreTrainedModel:
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    attention.register()
    experts.register()
    kind = checkpoint.config.model_type
    what = (
        f"{checkpoint.folder}: transformers cannot build a causal language model of type {kind!r}"
    )
    with refusing(what), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            checkpoint.config,
            dtype=dtype,
            attn_implementation=attention_name,
            experts_implementation=experts.NAME,
        )
    model.train(False)
    checkpoint.untie(model)
    return model
