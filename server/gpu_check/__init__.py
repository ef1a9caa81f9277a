"""`moestro gpu-check`: the report of the engine's checks of a GPU, in two files and on a page."""

from .run import run_gpu_check

__all__ = ["run_gpu_check"]
