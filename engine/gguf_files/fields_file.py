"""A GGUF file of another one's fields alone, for transformers' older reader.

That reader makes several arrays of each token of a vocabulary, some hundred megabytes and seconds
for what only becomes their number; here they are left out, and the number is said.
"""

from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType

from .header import Header

TOKENS = "tokenizer.ggml.tokens"


def write_fields(header: Header, path: Path, tensors: Iterable[str]) -> None:
    """Without arrays of texts, and with `tensors` by their names only. Raises OSError."""
    writer = gguf.GGUFWriter(path, header.architecture)
    try:
        for key, value in header.fields.items():
            _add(writer, header.architecture, key, value)
        size = f"{header.architecture}.vocab_size"
        if size not in header.fields and TOKENS in header.fields:
            _add(writer, header.architecture, size, header.fields[TOKENS])
        for name in tensors:
            writer.add_tensor(name, np.zeros(1, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, architecture: str, key: str, value: object) -> None:
    """Of the model; of the tokenizer its whole numbers: ids of tokens."""
    group = key.partition(".")[0]
    own = (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.ALIGNMENT)  # the writer says them
    if key in own or group not in (architecture, "general", "tokenizer"):
        return
    if isinstance(value, bool):
        writer.add_key_value(key, value, GGUFValueType.BOOL)
    elif isinstance(value, int):
        kind = GGUFValueType.INT64 if value < 0 else GGUFValueType.UINT64
        if group != "tokenizer" or key.endswith("_id"):  # the others are lengths of arrays
            writer.add_key_value(key, value, kind)
    elif isinstance(value, float):
        writer.add_key_value(key, value, GGUFValueType.FLOAT64)
    elif isinstance(value, str) and group != "tokenizer":
        writer.add_key_value(key, value, GGUFValueType.STRING)
    elif isinstance(value, list) and group == architecture and value:
        writer.add_array(key, value)
