"""ONNX graph -> ONNX graph optimised by ONNX Runtime, for its CPU and CUDA providers.

Function bodies are inlined, constants folded, patterns fused. What depends on the processor (blocked layouts) is left
to the moment of loading, so that the engine runs on any machine with the same ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from .package import InputError

SESSION_DATA = "session.optimized_model_external_initializers_file_name"
SESSION_DATA_FROM = "session.optimized_model_external_initializers_min_size_in_bytes"


def compile_graph(graph: Path, output: Path, provider: str) -> list[Path]:
    """Writes `output` and, beside it, its weights; returns both paths.

    Args:
        provider: the execution provider the engine is for. What a CPU can fold is folded for all; fusions into
            operators of the CPU provider only for that.

    Raises:
        InputError: ONNX Runtime does not take the graph.
    """
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        level.ORT_ENABLE_EXTENDED if provider == "CPUExecutionProvider" else level.ORT_ENABLE_BASIC
    )
    options.optimized_model_filepath = str(output)
    options.log_severity_level = 3
    data = output.with_suffix(".data")
    options.add_session_config_entry(SESSION_DATA, data.name)
    options.add_session_config_entry(SESSION_DATA_FROM, "1024")
    try:
        ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no base class
        raise InputError(f"{graph}: ONNX Runtime {ort.__version__} cannot compile it: {error}") from None
    return [output, *([data] if data.exists() else [])]
