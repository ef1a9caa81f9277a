"""A checkpoint's tensors: found, complete, loaded; the dense part in compact form."""

from .checkpoint import PLAIN_DTYPES, Checkpoint, read_config, refusing
from .dense import DENSE_FORMATS, Replacement, load_dense, replacements, saved_bytes
from .dense_file import DenseFile
from .linears import LastRows, Shared, TileLinear, beside
from .manifest import MANIFEST_NAME, Manifest
from .weight_files import INDEX_NAME, json_object, weight_files

__all__ = [
    "Checkpoint",
    "DENSE_FORMATS",
    "DenseFile",
    "INDEX_NAME",
    "LastRows",
    "MANIFEST_NAME",
    "Manifest",
    "PLAIN_DTYPES",
    "Replacement",
    "Shared",
    "TileLinear",
    "beside",
    "json_object",
    "load_dense",
    "read_config",
    "refusing",
    "replacements",
    "saved_bytes",
    "weight_files",
]
