"""What the tests of the kernels share."""

from instruction_sets import instruction_set

__all__ = ["instruction_set"]
