"""The engine package: to be written."""


class InputError(Exception):
    """Wrong use or bad input. The message says what happened, where, what was expected and what to do; exit code 2."""
