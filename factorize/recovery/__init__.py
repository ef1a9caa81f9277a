"""Brings a factorized model nearer to the dense one that it is made of."""
