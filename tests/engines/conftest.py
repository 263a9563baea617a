"""Tiny graphs, written down in ONNX: the custom operators with their bodies, and what decoders hold."""

import math
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from liteframe.engines.package import Profile, TensorSpec
from onnx import numpy_helper

FLOAT, HALF, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
CLIPS = (1, 2, 4)  # the profile of the axis that varies


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(math.prod(shape)).normal(size=shape).astype(dtype)


def make_model(nodes, inputs, outputs, weights=None, opset=24, functions=()):
    def infos(values):
        return [oh.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in values.items()]

    initializers = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    opsets = [oh.make_opsetid("", opset), *([oh.make_opsetid("liteframe", 1)] if functions else [])]
    model = oh.make_model(
        oh.make_graph(nodes, "tiny", infos(inputs), infos(outputs), initializers),
        functions=functions,
        opset_imports=opsets,
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def convolution(opset=24):
    """DepthwiseTemporalConv over time, height and width, with strides."""
    from liteframe.export.ops import depthwise_temporal_conv as op

    grid, strides, weight, bias = [4, 6], [2, 2, 3], normal(8, 1, 3, 3, 3), normal(8)
    node = oh.make_node(
        op.NAME,
        ["x", "weight", "bias"],
        ["y"],
        domain="liteframe",
        grid=grid,
        strides=strides,
        pads=[1] * 6,
        channels=8,
        to_channels_first=[0, 4, 1, 2, 3],
        to_channels_last=[0, 2, 3, 4, 1],
        plugin_namespace="liteframe",
    )
    inputs, outputs = {"x": (FLOAT, ["clips", 4, 24, 8])}, {"y": (FLOAT, ["clips", 2, 4, 8])}
    weights = {"weight": weight, "bias": bias}
    model = make_model([node], inputs, outputs, weights, opset, [op.function_body(opset)])
    return model, lambda x: op.numpy_reference(x, weight, bias, grid, strides)


def pool(opset=24):
    """WeightedAveragePool."""
    from liteframe.export.ops import weighted_average_pool as op

    blocks = [2, 2, 2, 1, 1, 3]
    node = oh.make_node(
        op.NAME, ["x"], ["y"], domain="liteframe", blocks=blocks, scale=8**-0.5, plugin_namespace="liteframe"
    )
    inputs, outputs = {"x": (FLOAT, ["clips", 4, 7, 8])}, {"y": (FLOAT, ["clips", 4, 8])}
    return make_model([node], inputs, outputs, None, opset, [op.function_body(opset)]), lambda x: op.numpy_reference(
        x, blocks
    )


def mlp(kind=FLOAT, opset=24):
    """Two products around a GELU written out, with weights large enough to be stored beside the graph."""
    dtype = oh.tensor_dtype_to_np_dtype(kind)
    first, second = normal(8, 64, dtype=dtype), normal(64, 8, dtype=dtype)
    weights = {
        "first": first,
        "second": second,
        "root": np.array(2**0.5, dtype),
        "one": np.array(1, dtype),
        "half": np.array(0.5, dtype),
    }
    nodes = [
        oh.make_node("MatMul", ["x", "first"], ["a"]),
        oh.make_node("Div", ["a", "root"], ["b"]),
        oh.make_node("Erf", ["b"], ["c"]),
        oh.make_node("Add", ["c", "one"], ["d"]),
        oh.make_node("Mul", ["a", "d"], ["e"]),
        oh.make_node("Mul", ["e", "half"], ["f"]),
        oh.make_node("MatMul", ["f", "second"], ["y"]),
    ]

    def reference(x):
        hidden = x.astype(np.float64) @ first.astype(np.float64)
        return hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) @ second.astype(np.float64)

    return make_model(nodes, {"x": (kind, ["clips", 8])}, {"y": (kind, ["clips", 8])}, weights, opset), reference


def attention(kind=FLOAT):
    """One layer's attention of the `fused` dialect: keys scattered into a cache of fixed capacity, then Attention."""
    nodes = [
        oh.make_node("TensorScatter", ["cache", "x", "write_index"], ["cache_out"], axis=2, mode="linear"),
        oh.make_node("Shape", ["x"], ["length"], start=2, end=3),
        oh.make_node("Add", ["write_index", "length"], ["valid"]),
        oh.make_node("Attention", ["x", "cache_out", "cache_out", "", "", "", "valid"], ["y"], is_causal=1),
    ]
    inputs = {"x": (kind, [1, 2, "clips", 16]), "write_index": (INT64, [1]), "cache": (kind, [1, 2, 8, 16])}
    outputs = {"y": (kind, [1, 2, "clips", 16]), "cache_out": (kind, [1, 2, 8, 16])}
    return make_model(nodes, inputs, outputs), None


def describe(values):
    """What a manifest says of inputs or outputs."""
    specs = []
    for value in values:
        kind = value.type.tensor_type
        shape = [d.dim_param or d.dim_value for d in kind.shape.dim]
        low, common, high = ([size if d == "clips" else d for d in shape] for size in CLIPS)
        specs.append(
            TensorSpec(
                name=value.name,
                dtype=oh.tensor_dtype_to_np_dtype(kind.elem_type).name,
                shape=shape,
                profile=Profile(min=low, opt=common, max=high) if "clips" in shape else None,
            )
        )
    return specs


GRAPHS = {"convolution": convolution, "pool": pool, "mlp": mlp, "attention": attention}


@pytest.fixture
def save_graph(tmp_path):
    """Writes the graph of a name: its path, what a manifest says of its inputs and outputs, and its reference."""

    def save(name, folder=tmp_path, **options):
        model, reference = GRAPHS[name](**options)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.onnx"
        onnx.save(model, path)
        return SimpleNamespace(
            path=path,
            model=model,
            inputs=describe(model.graph.input),
            outputs=describe(model.graph.output),
            reference=reference,
        )

    return save
