"""How neurons are split into experts and routed to."""

from .calibration import load_tokenizer, quiet_bars, read_windows
from .fit import make_plan

__all__ = ["load_tokenizer", "make_plan", "quiet_bars", "read_windows"]
