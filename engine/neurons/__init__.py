"""MLPs that every token runs, with the neurons that a sequence's prompt chose (GRIFFIN)."""

from .hook import NeuronMlp, install
from .mlp import Mlp, mlp_of

__all__ = ["Mlp", "NeuronMlp", "install", "mlp_of"]
