"""ONNX graph -> ONNX graph optimised by ONNX Runtime, for its CPU and CUDA providers.

For a CPU the graph is first rewritten (cpu_rewrites.py). Function bodies are inlined, constants folded, patterns fused.
What depends on the processor (blocked layouts) is left to the moment of loading, so that the engine runs on any machine
with the same ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from .cpu_rewrites import rewrite_for_cpu
from .package import InputError

SESSION_DATA = "session.optimized_model_external_initializers_file_name"
SESSION_DATA_FROM = "session.optimized_model_external_initializers_min_size_in_bytes"


def compile_graph(graph: Path, output: Path, provider: str) -> list[Path]:
    """Writes `output` and, beside it, its weights; returns both paths.

    Args:
        provider: the execution provider the engine is for. What a CPU can fold is folded for all; fusions into
            operators of the CPU provider only for that.

    Raises:
        InputError: a file of either name exists, ONNX Runtime does not take the graph, or the engine can't be written.
    """
    data = output.with_suffix(".data")
    for path in (output, data):  # the graph's own weights, perhaps, which writing would destroy before they are read
        if path.exists():
            raise InputError(f"{path}: already exists, and the engine made of {graph} would overwrite it; move it away")
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        level.ORT_ENABLE_EXTENDED if provider == "CPUExecutionProvider" else level.ORT_ENABLE_BASIC
    )
    options.optimized_model_filepath = str(output)
    options.log_severity_level = 3
    options.add_session_config_entry(SESSION_DATA, data.name)
    options.add_session_config_entry(SESSION_DATA_FROM, "1024")
    source = graph
    try:
        if provider == "CPUExecutionProvider":
            model = ir.load(graph)
            if rewrite_for_cpu(model):
                source = graph.with_name(f".{graph.name}.rewritten")  # beside the weights that both refer to
                ir.save(model, source)
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no base class
        for path in (output, data):
            path.unlink(missing_ok=True)
        reason = " ".join(str(error).split())
        raise InputError(f"{graph}: ONNX Runtime {ort.__version__} cannot compile it to {output}: {reason}") from None
    finally:
        if source != graph:
            source.unlink(missing_ok=True)
    return [output, *([data] if data.exists() else [])]
