"""Offline toolbox: makes checkpoints that the engine serves. Knows no request and no HTTP."""
