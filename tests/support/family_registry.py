"""Which model types of the installed transformers are language models with experts.

Found in transformers itself: every type that its tables map to a model that writes text, whose
modelling file uses the experts decorator or defines a class of experts, or whose default
configuration (parts included) counts experts. What is not checked is named here with its reason.
"""

import logging
import re
from collections.abc import Iterator
from functools import cache
from inspect import getfile
from pathlib import Path
from typing import Any

import transformers as hf
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers.models.auto import modeling_auto
from transformers.utils import logging as hf_logging

# The class of the whole model comes first, its text half second: real checkpoints hold the whole.
TABLES = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
)
LEFT_OUT = {
    "diffusion_gemma": "writes by block diffusion, not token by token",
    "nemo_speechlm": "transcribes speech, with the language model of nemotron_h",
    "qwen3_omni_moe": "speaks through a second model; its thinker is a type of its own",
}
DECORATOR = "@use_experts_implementation"
EXPERTS_CLASS = re.compile(r"^class \w*Experts?(?=[A-Z(])\w*\(", re.MULTILINE)
EXPERTS_FIELD = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")


def text_model_types() -> dict[str, str]:
    """Name of the class by model type, for all that transformers can write text with."""
    found: dict[str, str] = {}
    for table in TABLES:
        for kind, names in getattr(modeling_auto, table).items():
            found.setdefault(kind, names if isinstance(names, str) else names[0])
    return found


@cache
def moe_model_types() -> dict[str, str]:
    """Name of the class by model type, for those with experts, sorted; LEFT_OUT included."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)  # default configurations warn of their own token ids
    try:
        return {kind: name for kind, name in sorted(text_model_types().items()) if _is_moe(kind)}
    finally:
        hf_logging.set_verbosity(verbosity)


def decorated(kind: str) -> bool:
    """Whether transformers lets the experts of this type be replaced by a function."""
    return any(DECORATOR in source for source in _sources(kind))


def _is_moe(kind: str) -> bool:
    if any(DECORATOR in source or EXPERTS_CLASS.search(source) for source in _sources(kind)):
        return True
    return any(EXPERTS_FIELD.fullmatch(name) for name in _default_fields(kind))


def _sources(kind: str) -> list[str]:
    """Text of the modelling files beside the type's configuration."""
    folder = Path(getfile(hf.CONFIG_MAPPING[kind])).parent
    return [path.read_text("utf-8") for path in sorted(folder.glob("modeling_*.py"))]


def _default_fields(kind: str) -> set[str]:
    """Fields of the default configuration and its parts; of the class alone where none is valid."""
    configuration = hf.CONFIG_MAPPING[kind]
    try:
        return set(_fields(configuration()))
    except StrictDataclassClassValidationError:  # a type whose sizes depend on another model's
        return {name for base in configuration.__mro__ for name in vars(base)}


def _fields(config: Any) -> Iterator[str]:
    for name, value in vars(config).items():
        if isinstance(value, hf.PreTrainedConfig):
            yield from _fields(value)
        else:
            yield name
