"""Shapes in docstrings: F frames, N tokens, C channels, S positions, D width of a head or of the language model."""
