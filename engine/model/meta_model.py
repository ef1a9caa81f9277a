"""The class that transformers has for a checkpoint, built without weights and with our hooks."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from moestro.engine.weights import Checkpoint, refusing

from . import attention, experts


def build_meta_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model's own class without weights; both of moestro's hooks are selected."""
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
            attn_implementation=attention.NAME,
            experts_implementation=experts.NAME,
        )
    model.train(False)
    checkpoint.untie(model)
    return model
