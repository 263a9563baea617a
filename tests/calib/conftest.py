"""Tiny graphs in both dialects, feeds for them, and what runs a graph in memory."""

from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from liteframe.calib.observe import observe
from liteframe.calib.placement import linear_layers, plan
from liteframe.calib.ranges import choose_range
from liteframe.calib.rewrite import apply
from liteframe.engines.package import Profile, TensorSpec


@pytest.fixture(scope="session")
def tiny_graphs(tiny_artifact, small_decoder, tmp_path_factory):
    """(name, dialect) -> path of the graph in FP32, its weights beside it; tests leave them as they are.

    encoder, decoder: of the tiny artifact. wide: a `small_decoder` with biases for Q, K and V.
    """
    from liteframe.export.artifact import load_artifact
    from liteframe.export.trace import WeightsFile, trace_decoder, trace_encoder

    artifact, folder = load_artifact(tiny_artifact), tmp_path_factory.mktemp("graphs")
    modules = {"encoder": artifact.encoder, "decoder": artifact.decoder, "wide": small_decoder(qkv_bias=True)}
    paths = {}
    for name, module in modules.items():
        trace = trace_encoder if name == "encoder" else trace_decoder
        with WeightsFile(folder / f"{name}.data") as weights:
            for dialect in ("fused", "plain"):
                paths[name, dialect] = folder / f"{name}.{dialect}.onnx"
                weights.save(trace(module, dialect), paths[name, dialect])
    return paths


@pytest.fixture(params=product(("encoder", "decoder", "wide"), ("fused", "plain")), ids="-".join)
def key(request):
    """(name, dialect) of each tiny graph in turn."""
    return request.param


@pytest.fixture(scope="session")
def observed(tiny_graphs, feeds):
    """(name, dialect) -> what `observe` sees of a tiny graph's feeds."""
    return {key: observe(path, feeds[key]) for key, path in tiny_graphs.items()}


@pytest.fixture(scope="session")
def feeds(tiny_graphs):
    """(name, dialect) -> three calls of the graph, decoders' into empty caches."""
    made = {}
    for (name, dialect), path in tiny_graphs.items():
        rng = np.random.default_rng(0)
        sizes = {"clips": 2, "sequence": 7, "past": 0, "capacity": 16}
        made[name, dialect] = []
        for _ in range(3):
            feed = {}
            for value in ir.load(path).graph.inputs:
                shape = [size if isinstance(size, int) else sizes[size.value] for size in value.shape]
                if "cache" in value.name or value.name == "write_index":
                    feed[value.name] = np.zeros(shape, value.dtype.numpy())
                elif value.dtype == ir.DataType.FLOAT:
                    feed[value.name] = rng.normal(size=shape).astype(np.float32)
                else:
                    feed[value.name] = rng.integers(0, 256, shape, np.uint8)
            made[name, dialect].append(feed)
    return made


@pytest.fixture(scope="session")
def run():
    """Runs a graph, a file or in memory, and returns the values asked for; the outputs, unless told otherwise."""

    def run(model, feed, values=(), level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        model = ir.load(model) if isinstance(model, Path) else model
        ir.external_data.load_to_model(model)
        proto = ir.to_proto(model)
        have = {value.name for value in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in have)
        options = ort.SessionOptions()
        options.log_severity_level, options.graph_optimization_level = 4, level
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = ort.InferenceSession(proto.SerializeToString(), options)
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        fed = {i.name: feed[i.name].astype(kinds.get(i.type, feed[i.name].dtype)) for i in session.get_inputs()}
        names = values or [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, fed), strict=True))

    return run


@pytest.fixture(scope="session")
def answers(run):
    """What a graph puts out, one call after the other; a decoder goes on with the caches that it wrote itself, which
    are its own affair."""

    def answers(model, calls):
        made, state = [], {}
        for done, feed in enumerate(calls):
            length = next(iter(feed.values())).shape[1]
            now = feed | state | ({"write_index": np.array([done * length])} if "write_index" in feed else {})
            results = run(model, now)
            made.append(next(iter(results.values())))
            state = {name.removesuffix("_out"): cache for name, cache in results.items() if name.endswith("_out")}
        return np.concatenate(made)

    return answers


@pytest.fixture
def edited(tiny_graphs, tmp_path):
    """Writes the tiny graph of (name, dialect) with some weights changed, each by a function of its array."""

    def edit(key, weights):
        model = ir.load(tiny_graphs[key])
        ir.external_data.load_to_model(model)
        for weight, change in weights.items():
            value = model.graph.initializers[weight]
            value.const_value = ir.tensor(change(value.const_value.numpy().copy()), name=weight)
        ir.save(model, tmp_path / "edited.onnx")
        return tmp_path / "edited.onnx"

    return edit


@pytest.fixture
def save(tmp_path):
    """Writes a graph that was edited in memory, its weights beside it."""

    def save(model):
        ir.save(model, tmp_path / "saved.onnx", external_data="saved.data")
        return tmp_path / "saved.onnx"

    return save


@pytest.fixture
def in_int8(save):
    """A graph, or one layer of it, after an edit in place, in INT8 with the ranges of its feeds; and its plan."""

    def in_int8(path, feeds, edit, beside, signed=True, only=None):
        model = ir.load(path)
        edit(model)
        histograms = observe(save(model), feeds).histograms
        others = {str(n.name): "" for n in linear_layers(model) if only not in (None, str(n.name))}
        made = plan(model, beside, "int8", {}, others, signed=signed)
        apply(model, made, {name: choose_range(found, "minmax") for name, found in histograms.items()}, signed)
        return model, made

    return in_int8


@pytest.fixture(scope="session")
def specs():
    """What TensorRT is told of a tiny graph's inputs, with profiles; fixes the capacity of caches in place."""
    sizes = {"clips": (1, 2, 2), "sequence": (1, 8, 16), "past": (0, 8, 15)}

    def specs(model):
        for value in model.graph.inputs:
            if "capacity" in str(value.shape):  # which TensorRT wants fixed
                for cache in (*model.graph.inputs[2:], *model.graph.outputs[1:]):
                    cache.shape = ir.Shape([*cache.shape[:2], 16, cache.shape[3]])
        made = []
        for value in model.graph.inputs:
            shape = [size if isinstance(size, int) else size.value for size in value.shape]
            low, common, high = ([sizes[size][i] if size in sizes else size for size in shape] for i in range(3))
            profile = Profile(min=low, opt=common, max=high) if low != high else None
            made.append(TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape, profile=profile))
        return made

    return specs
