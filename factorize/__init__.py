"""Offline toolbox: makes checkpoints that the engine serves. Knows no request and no HTTP."""

from moestro.factorize.facts import (
    Deltas,
    DownloadCorrupt,
    FactorizeError,
    Plan,
    PlanFacts,
    SourceRefused,
    SplitOptions,
)
from moestro.factorize.methods import make_plan
from moestro.factorize.recovery import RecoverOptions, recovery_modes, recovery_stages

from .apply import apply_plan
from .commands import Inputs, Outputs, run_dry, run_evaluate, run_factorize, show_plan
from .demo import demo_deltas, demo_plan, find_demo, prepare_demo, prepare_dense
from .demo_sketch import sketch_demo
from .evaluate import Perplexity, perplexity
from .export import run_export

__all__ = [
    "DownloadCorrupt",
    "FactorizeError",
    "Deltas",
    "Inputs",
    "Outputs",
    "Perplexity",
    "Plan",
    "PlanFacts",
    "RecoverOptions",
    "SourceRefused",
    "SplitOptions",
    "apply_plan",
    "demo_deltas",
    "demo_plan",
    "find_demo",
    "make_plan",
    "perplexity",
    "prepare_demo",
    "prepare_dense",
    "recovery_modes",
    "recovery_stages",
    "run_dry",
    "run_evaluate",
    "run_export",
    "run_factorize",
    "show_plan",
    "sketch_demo",
]
