"""Videos in, answers out: engine packages run by a thin runtime. Needs neither torch nor onnx."""

from ..engines.package import InputError, open_package
from .session import Stats, VideoSession

__all__ = ["InputError", "Stats", "VideoSession", "open_package"]
