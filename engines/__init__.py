"""Compilers, targets and the engine package."""
