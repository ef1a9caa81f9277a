"""The class that transformers has for a checkpoint, built without weights and with our hooks."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as hf_logging

from moestro.engine.facts import Lane, ModelRefused
from moestro.engine.routers import carry_routers
from moestro.engine.weights import Checkpoint, refusing

from . import attention, experts
from .adapters import adapt

# A text model alone where there is one; else the whole of which the text half is taken.
CLASSES = (
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
    (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, AutoModelForMultimodalLM),
)
STOCK_ATTENTIONS = ("sdpa", "eager")  # the first that the class has


def build_meta_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    lane: Lane = Lane.PACKED,
    absent_paths: Iterable[str] = (),
) -> PreTrainedModel:
    """The model's own class without weights, with moestro's hook for its experts.

    In the packed lane with that for its attention, too. Modules at `absent_paths` have no
    parameters. Raises ModelRefused.
    """
    if lane is Lane.PACKED:
        model = _build(checkpoint, dtype, attention.NAME)
    else:
        try:
            model = _build(checkpoint, dtype, STOCK_ATTENTIONS[0])
        except ModelRefused:
            model = _build(checkpoint, dtype, STOCK_ATTENTIONS[1])
    adapt(model)
    carry_routers(model, checkpoint.routers)
    for path in absent_paths:
        for module in model.get_submodule(path).modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # nothing to initialize
            module._parameters.clear()
            module._buffers.clear()
    checkpoint.untie(model)
    return model


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
        model: PreTrainedModel = _class_for(kind).from_config(
            checkpoint.config,
            dtype=dtype,
            attn_implementation=_for_text(checkpoint.config, attention_name),
            experts_implementation=experts.NAME,
        )
    model.train(False)
    return model


def _for_text(config: PreTrainedConfig, name: str) -> str | dict[str, str]:
    """`name` for the half of a model that writes text; its other parts are never run."""
    text = config.get_text_config()
    parts = {part: getattr(config, part, None) for part in config.sub_configs}
    others = {part: "eager" for part, found in parts.items() if found not in (None, text)}
    return {"": name, **dict.fromkeys(parts, name), **others} if others else name


def _class_for(kind: str) -> Any:
    return next((auto for names, auto in CLASSES if kind in names), AutoModelForCausalLM)
