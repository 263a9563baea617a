"""Videos in, answers out: engine packages run by a thin runtime. Needs neither torch nor onnx."""

from ..engines.package import InputError, open_package
from .engine import EngineError
from .pipeline import Stats
from .session import VideoSession
from .trace import Trace

__all__ = ["EngineError", "InputError", "Stats", "Trace", "VideoSession", "open_package"]
