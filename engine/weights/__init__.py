"""A checkpoint's tensors: found, complete, loaded; the dense part in compact form."""

from .checkpoint import PLAIN_DTYPES, Checkpoint
from .config import read_config, read_quantization, refusing, warn_disagreement
from .conversion import said_form
from .damage import is_there, json_object, refuse_stand_in
from .dense import (
    DENSE_FORMATS,
    ON_HOST,
    Replacement,
    kept_on_host,
    load_dense,
    replacements,
    saved_bytes,
)
from .dense_file import DenseFile
from .linears import (
    CompactLinear,
    Int8Weights,
    LastRows,
    Shared,
    Sides,
    TileLinear,
    beside,
    settle,
)
from .manifest import MANIFEST_NAME, Manifest
from .routers import ROUTERS_NAME, RouterFacts, in_proportion, name_routers
from .weight_files import INDEX_NAME, gguf_source, weight_files

__all__ = [
    "Checkpoint",
    "CompactLinear",
    "DENSE_FORMATS",
    "DenseFile",
    "INDEX_NAME",
    "Int8Weights",
    "LastRows",
    "MANIFEST_NAME",
    "Manifest",
    "ON_HOST",
    "PLAIN_DTYPES",
    "ROUTERS_NAME",
    "Replacement",
    "RouterFacts",
    "Shared",
    "Sides",
    "TileLinear",
    "beside",
    "gguf_source",
    "is_there",
    "json_object",
    "kept_on_host",
    "load_dense",
    "in_proportion",
    "name_routers",
    "read_config",
    "read_quantization",
    "refuse_stand_in",
    "refusing",
    "replacements",
    "said_form",
    "saved_bytes",
    "settle",
    "warn_disagreement",
    "weight_files",
]
