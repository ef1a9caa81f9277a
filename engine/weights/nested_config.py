"""What a config.json says twice, outside and inside its text_config, and not the same.

Stock transformers decides which one counts, by the model's class; the log says which it was.
"""

import logging
from pathlib import Path

from transformers import PreTrainedModel

from .damage import json_object

log = logging.getLogger("moestro.engine")


def warn_disagreements(folder: Path, model: PreTrainedModel) -> None:
    """One line for each value. `model` is as transformers has built it, nothing untied yet."""
    raw = json_object(folder / "config.json", "a config")
    inner = raw.get("text_config")
    if not isinstance(inner, dict):
        return
    used = {
        "tie_word_embeddings": bool(model.all_tied_weights_keys),
        "vocab_size": model.config.get_text_config().vocab_size,
    }
    for name, value in used.items():
        if name in raw and name in inner and raw[name] != inner[name]:
            warn_disagreement(folder, name, raw[name], inner[name], value)


def warn_disagreement(folder: Path, name: str, outer: object, inner: object, used: object) -> None:
    log.warning(
        "%s: config.json has %s %r, and in its text_config %r; %r counts, as in transformers",
        folder,
        name,
        outer,
        inner,
        used,
    )
