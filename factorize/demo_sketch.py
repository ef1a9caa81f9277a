"""The demo model as its plan and its dense model's config foretell it, before anything is fetched.

For planning alone: a folder with a config, and no weights.
"""

import json
from importlib import resources
from pathlib import Path

import torch
from transformers import LlamaConfig

from moestro.engine import StoredWeights
from moestro.factorize.sources import DenseModel

from .apply import manifest, stored_dtype, twin_config
from .demo import demo_deltas, demo_plan
from .sidecar import name_own_routers

DENSE_NAME = "demo_dense.json"  # the config.json that the demo's dense model is converted with
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
ROUTER = "router"  # in the names of tensors that are kept in fp32: their rows are tiny


def sketch_demo(folder: Path) -> StoredWeights:
    """Writes into `folder` what `prepare_demo` would of shapes; returns how it would store them."""
    plan, deltas = demo_plan(), demo_deltas()
    fields = json.loads((resources.files("moestro.factorize") / DENSE_NAME).read_text("utf-8"))
    dense = DenseModel(folder, LlamaConfig.from_dict(fields), {}, torch.bfloat16)
    twin_config(dense, plan).save_pretrained(folder)
    name_own_routers(plan, folder)
    manifest(plan, deltas).write(folder)
    return StoredWeights(dtype_name=NAMES[stored_dtype(dense.dtype, plan, deltas)], wide=(ROUTER,))
