"""Graphs optimised by ONNX Runtime: the same numbers, nothing of ours left in them, nothing overwritten."""

import contextlib
import math
import resource
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.engines.package import InputError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
both_providers = pytest.mark.parametrize("provider", [CPU, CUDA])


def run(path, feed):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=[CPU]).run(["y"], feed)[0]


def clips(graph, number):
    shape = [number if d == "clips" else d for d in graph.inputs[0].shape]
    return np.random.default_rng(number).normal(size=shape).astype(np.float32)


def refusal(graph, output):
    with pytest.raises(InputError) as caught:
        compile_graph(graph, output, CPU)
    message = str(caught.value)
    assert "\n" not in message
    return message


@both_providers
@pytest.mark.parametrize("name", ["convolution", "pool", "mlp"])
def test_the_engine_computes_what_the_reference_does(save_graph, tmp_path, name, provider):
    graph = save_graph(name)
    engine, *_ = compile_graph(graph.path, tmp_path / "engine.onnx", provider)
    for number in (1, 3):
        x = clips(graph, number)
        np.testing.assert_allclose(run(engine, {"x": x}), graph.reference(x), rtol=0, atol=1e-4)


@both_providers
def test_attention_in_an_engine_equals_attention_written_out(save_graph, tmp_path, provider):
    engine, *_ = compile_graph(save_graph("attention").path, tmp_path / "engine.onnx", provider)
    rng = np.random.default_rng(0)
    past, new, size = 3, 2, 16
    cache, x = (rng.normal(size=(1, 2, n, size)).astype(np.float32) for n in (8, new))
    got = run(engine, {"x": x, "write_index": np.array([past]), "cache": cache})
    keys = np.concatenate([cache[:, :, :past], x], axis=2).astype(np.float64)
    scores = x @ keys.swapaxes(2, 3) / math.sqrt(size)
    scores[..., np.triu(np.ones((new, past + new), bool), k=past + 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ keys
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@both_providers
@pytest.mark.parametrize("name", ["convolution", "pool"])
def test_custom_operators_are_inlined(save_graph, tmp_path, name, provider):
    graph = save_graph(name)
    assert "liteframe" in {node.domain for node in graph.model.graph.node}
    engine = onnx.load(compile_graph(graph.path, tmp_path / "engine.onnx", provider)[0])
    assert "liteframe" not in {node.domain for node in engine.graph.node}
    assert not engine.functions


def test_operators_of_the_cpu_provider_stay_out_of_other_engines(save_graph, tmp_path):
    graph = save_graph("mlp", opset=17)  # before ONNX had a Gelu of its own
    operators = {}
    for provider in (CPU, CUDA):
        engine = onnx.load(compile_graph(graph.path, tmp_path / f"{provider}.onnx", provider)[0])
        operators[provider] = {(node.domain, node.op_type) for node in engine.graph.node}
    assert ("com.microsoft", "Gelu") in operators[CPU]  # the GELU that was written out
    assert {domain for domain, _ in operators[CUDA]} == {""}


def test_weights_are_stored_beside_the_engine_and_move_with_it(save_graph, tmp_path):
    graph = save_graph("mlp")
    (tmp_path / "made").mkdir()
    files = compile_graph(graph.path, tmp_path / "made" / "engine.onnx", CPU)
    assert files == [tmp_path / "made" / "engine.onnx", tmp_path / "made" / "engine.data"]
    assert sorted((tmp_path / "made").iterdir()) == sorted(files)
    assert files[1].stat().st_size >= 2 * 8 * 64 * 4
    graph.path.unlink()
    shutil.move(tmp_path / "made", tmp_path / "moved")
    x = clips(graph, 2)
    got = run(tmp_path / "moved" / "engine.onnx", {"x": x})
    np.testing.assert_allclose(got, graph.reference(x), rtol=0, atol=1e-4)


def test_an_engine_without_large_weights_is_one_file(save_graph, tmp_path):
    assert compile_graph(save_graph("pool").path, tmp_path / "engine.onnx", CPU) == [tmp_path / "engine.onnx"]
    assert not (tmp_path / "engine.data").exists()


@both_providers
def test_the_same_graph_gives_the_same_bytes(save_graph, tmp_path, provider):
    content = []
    for folder in ("one", "two"):
        graph = save_graph("mlp", tmp_path / folder)
        content.append([f.read_bytes() for f in compile_graph(graph.path, tmp_path / folder / "engine.onnx", provider)])
    assert content[0] == content[1]


# what is refused


def save_with_data(graph, path, data):
    onnx.save(graph.model, path, save_as_external_data=True, location=data, size_threshold=0)


def test_the_graphs_own_weights_are_not_overwritten(save_graph, tmp_path):
    graph = save_graph("mlp")
    source, data = tmp_path / "source.onnx", tmp_path / "engine.data"
    save_with_data(graph, source, data.name)
    before = data.read_bytes()
    message = refusal(source, tmp_path / "engine.onnx")
    assert message == f"{data}: already exists, and the engine made of {source} would overwrite it; move it away"
    assert data.read_bytes() == before
    x = clips(graph, 1)
    np.testing.assert_allclose(run(source, {"x": x}), graph.reference(x), rtol=0, atol=1e-4)


def test_the_graph_itself_is_not_overwritten(save_graph):
    path = save_graph("mlp").path
    before = path.read_bytes()
    assert refusal(path, path).startswith(f"{path}: already exists")
    assert path.read_bytes() == before


def unknown_operator(graph, path):
    del graph.model.functions[:]
    onnx.save(graph.model, path)


def wrong_type(graph, path):
    graph.model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT8
    onnx.save(graph.model, path)


def missing_weights(graph, path):
    save_with_data(graph, path, "weights")
    (path.parent / "weights").unlink()


def truncated(graph, path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unknown_operator, "liteframe:DepthwiseTemporalConv"),
        (wrong_type, "tensor(int8)"),
        (missing_weights, "weights"),
        (truncated, "corrupt"),
        (lambda graph, path: path.unlink(), "No such file"),
    ],
)
def test_a_graph_that_onnx_runtime_does_not_take_is_named_with_the_reason(save_graph, tmp_path, change, reason):
    graph = save_graph("convolution")
    change(graph, graph.path)
    message = refusal(graph.path, tmp_path / "engine.onnx")
    assert message.startswith(f"{graph.path}: ONNX Runtime {ort.__version__} cannot compile it to ")
    assert reason in message
    assert not (tmp_path / "engine.onnx").exists()
    assert not (tmp_path / "engine.data").exists()


@contextlib.contextmanager
def files_of_at_most(size):
    """Writing beyond it fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("name", "size"), [("mlp", 100), ("mlp", 3000), ("pool", 100)])
def test_an_engine_that_does_not_fit_on_the_disk_is_refused_and_leaves_nothing(save_graph, tmp_path, name, size):
    graph = save_graph(name)
    with files_of_at_most(size):
        message = refusal(graph.path, tmp_path / "engine.onnx")
    assert f"cannot compile it to {tmp_path / 'engine.onnx'}" in message
    assert [path.name for path in tmp_path.iterdir()] == [graph.path.name]


def test_an_output_in_a_folder_that_is_not_there_is_refused(save_graph, tmp_path):
    assert str(tmp_path / "nowhere" / "engine.onnx") in refusal(
        save_graph("pool").path, tmp_path / "nowhere" / "engine.onnx"
    )
