"""ONNX graph -> ONNX graph optimised by ONNX Runtime, for its CPU and CUDA providers.

For a CPU the graph is first rewritten (cpu_rewrites.py). Function bodies are inlined, constants folded, patterns fused.
What depends on the processor (blocked layouts) is left to the moment of loading, so that the engine runs on any machine
with the same ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from .cpu_rewrites import WIDENED, rewrite_for_cpu
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
    if source != graph:
        _store_half(output, data)
    return [output, *([data] if data.exists() else [])]


def _store_half(engine: Path, data: Path) -> None:
    """Weights that became FP32 for the lack of FP16 kernels are stored as the FP16 that they were, and widened when the
    engine is loaded: half the file, the same numbers."""
    model = ir.load(engine)
    count = 0
    for value in list(model.graph.initializers.values()):
        name = str(value.name)
        if value.dtype != ir.DataType.FLOAT or not name.endswith(WIDENED) or value.const_value is None:
            continue
        half = ir.Value(name=f"{name}_stored")
        half.const_value = ir.tensor(value.const_value.numpy().astype("float16"), name=half.name)
        half.dtype, half.shape = ir.DataType.FLOAT16, value.shape
        widen = ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_Cast")
        widen.outputs[0].dtype, widen.outputs[0].shape = value.dtype, value.shape
        value.replace_all_uses_with(widen.outputs[0])
        model.graph.initializers.pop(name)
        widen.outputs[0].name = name
        model.graph.register_initializer(half)
        model.graph.insert_before(model.graph[0], widen)
        count += 1
    if count:
        ir.external_data.load_to_model(model)
        ir.save(model, engine, external_data=data.name)
