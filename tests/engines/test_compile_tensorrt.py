"""Graphs compiled by TensorRT-RTX without a GPU: what is found in them, for what they are, and what is said otherwise.

Engines can't run here, so what they compute is compared nowhere; the parsed network's types and shapes are.
"""

import argparse
import subprocess
import sys

import msgspec
import onnx
import onnx.helper as oh
import polygraphy.backend.trt
import pytest
from liteframe.engines import compile_tensorrt
from liteframe.engines.compile_tensorrt import compile_graph, load
from liteframe.engines.package import InputError, Profile
from onnx import numpy_helper

RTX = "tensorrt-rtx"
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX")  # polygraphy's timing cache
every_graph = pytest.mark.parametrize("name", ["convolution", "pool", "mlp", "attention"])


@pytest.fixture
def built(monkeypatch):
    """What the last build was asked for: the network's inputs and outputs, and figures of its configuration."""
    asked = {}
    build = polygraphy.backend.trt.EngineBytesFromNetwork

    def note(network, config):
        trt = load(RTX)

        def configure(builder, network):
            made = config(builder, network)
            asked["capabilities"] = [made.get_compute_capability(i).name for i in range(made.num_compute_capabilities)]
            asked["tf32"] = made.get_flag(trt.BuilderFlag.TF32)
            asked["profiles"] = made.num_optimization_profiles
            asked["workspace"] = made.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
            return made

        _, parsed, _ = network
        asked["strongly typed"] = parsed.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        tensors = [parsed.get_input(i) for i in range(parsed.num_inputs)]
        tensors += [parsed.get_output(i) for i in range(parsed.num_outputs)]
        asked["tensors"] = {tensor.name: (tensor.dtype.name, tuple(tensor.shape)) for tensor in tensors}
        return build(network, config=configure)

    monkeypatch.setattr(polygraphy.backend.trt, "EngineBytesFromNetwork", note)
    return asked


def compiled(graph, capabilities=("8.0",)):
    return compile_graph(graph.path, graph.inputs, RTX, capabilities)


def refusal(graph, inputs, capabilities=("8.0",)):
    with pytest.raises(InputError) as caught:
        compile_graph(graph, inputs, RTX, capabilities)
    message = str(caught.value)
    assert message.startswith(f"{graph}: ")
    assert "\n" not in message
    assert "cudaError" not in message  # that there is no GPU is not why
    return message.removeprefix(f"{graph}: ")


# what is compiled


@every_graph
def test_a_graph_is_compiled_in_fp32_without_a_gpu(save_graph, built, name):
    graph = save_graph(name)
    made = compiled(graph)
    assert len(made.engine) > 10_000
    assert set(made.proof.found) == {"fp32"}
    assert made.proof.found["fp32"] >= len(graph.model.graph.node)
    assert made.version == load(RTX).__version__
    assert built["capabilities"] == ["SM80"]
    assert built["strongly typed"]
    assert not built["tf32"]
    assert built["profiles"] == 1


def test_the_workspace_is_limited_where_asked(save_graph, built):
    graph = save_graph("mlp")
    compile_graph(graph.path, graph.inputs, RTX, ["8.0"], 64 << 20)
    assert built["workspace"] == 64 << 20


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1G", "a"])
def test_a_workspace_is_a_whole_number_of_mebibytes(text):
    assert compile_tensorrt.mebibytes("2") == 2 << 20
    with pytest.raises(argparse.ArgumentTypeError, match="MiB"):
        compile_tensorrt.mebibytes(text)


@every_graph
def test_the_network_has_the_inputs_and_outputs_of_the_graph(save_graph, built, name):
    graph = save_graph(name)
    compiled(graph)
    types = {"float32": "FLOAT", "int64": "INT64"}
    assert built["tensors"] == {
        spec.name: (types[spec.dtype], tuple(-1 if isinstance(size, str) else size for size in spec.shape))
        for spec in (*graph.inputs, *graph.outputs)
    }


@pytest.mark.parametrize("opset", [20, 24])
@pytest.mark.parametrize("name", ["convolution", "pool"])
def test_a_custom_operators_body_is_parsed_in_both_dialects(save_graph, built, name, opset):
    compiled(save_graph(name, opset=opset))
    (spec,) = save_graph(name, opset=opset).outputs
    assert built["tensors"]["y"][1][1:] == tuple(spec.shape[1:])


@every_graph
def test_one_engine_is_compiled_for_several_capabilities(save_graph, built, name):
    compiled(save_graph(name), ["8.6", "8.9", "12.0", "12.1"])
    assert built["capabilities"] == ["SM86", "SM89", "SM120", "SM121"]


def test_engines_depend_on_the_capability_and_are_the_same_every_time(save_graph):
    graph = save_graph("mlp")
    assert compiled(graph).engine == compiled(graph).engine
    assert compiled(graph).engine != compiled(graph, ["8.9"]).engine


def test_a_profile_holds_for_the_engine(save_graph):
    graph = save_graph("mlp")
    wide = [msgspec.structs.replace(graph.inputs[0], profile=Profile(min=[1, 8], opt=[2, 8], max=[1000, 8]))]
    assert compiled(graph).engine != compile_graph(graph.path, wide, RTX, ["8.0"]).engine


# types found


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_fp16_is_found_where_the_graph_has_it(save_graph, name):
    assert set(compiled(save_graph(name, kind=HALF)).proof.found) == {"fp16"}


def save_nodes(path, nodes, weights=(), inputs=(("x", FLOAT, [2, 8]),), output=FLOAT):
    infos = [oh.make_tensor_value_info(*value) for value in inputs]
    outputs = [oh.make_tensor_value_info("y", output, None)]
    graph = oh.make_graph(nodes, "tiny", infos, outputs, [numpy_helper.from_array(w, n) for n, w in weights])
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_one_half_precision_tensor_among_others_is_found(tmp_path):
    nodes = [
        oh.make_node("Relu", ["x"], ["a"]),
        oh.make_node("Cast", ["a"], ["b"], to=HALF),
        oh.make_node("Cast", ["b"], ["y"], to=FLOAT),
    ]
    found = compile_graph(save_nodes(tmp_path / "cast.onnx", nodes), [], RTX, ["8.0"]).proof.found
    assert found == {"fp16": 1, "fp32": 2}


def test_quantised_tensors_are_found(tmp_path, save_graph):
    scale = numpy_helper.to_array(onnx.helper.make_tensor("s", FLOAT, [], [0.1]))
    zero = numpy_helper.to_array(onnx.helper.make_tensor("z", onnx.TensorProto.INT8, [], [0]))
    nodes = [
        oh.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        oh.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        oh.make_node("Relu", ["d"], ["y"]),
    ]
    path = save_nodes(tmp_path / "quantised.onnx", nodes, [("scale", scale), ("zero", zero)])
    assert compile_graph(path, [], RTX, ["8.0"]).proof.found == {"fp32": 2, "int8": 1}


def test_integers_are_no_precision(tmp_path):
    nodes = [oh.make_node("Shape", ["x"], ["s"]), oh.make_node("Cast", ["s"], ["y"], to=onnx.TensorProto.INT32)]
    path = save_nodes(tmp_path / "shape.onnx", nodes, output=onnx.TensorProto.INT32)
    assert compile_graph(path, [], RTX, ["8.0"]).proof.found == {}


# graphs that are refused


def test_an_operator_that_is_not_known_is_named(tmp_path):
    node = oh.make_node("Unique", ["x"], ["y"], name="encoder.layer/Unique")
    reason = refusal(save_nodes(tmp_path / "unique.onnx", [node]), [])
    assert reason.startswith(f"tensorrt-rtx {load(RTX).__version__} cannot compile it: ")
    assert "encoder.layer/Unique" in reason
    assert "UNSUPPORTED_NODE" in reason


def test_a_custom_operator_without_its_body_is_named(save_graph):
    graph = save_graph("pool")
    del graph.model.functions[:]
    onnx.save(graph.model, graph.path)
    assert "WeightedAveragePool" in refusal(graph.path, graph.inputs)


def test_shapes_that_do_not_fit_are_named(tmp_path):
    inputs = [("x", FLOAT, [4, 4]), ("z", FLOAT, [5, 4])]
    node = oh.make_node("MatMul", ["x", "z"], ["y"], name="mlp/MatMul")
    reason = refusal(save_nodes(tmp_path / "shapes.onnx", [node], inputs=inputs), [])
    assert "mlp/MatMul: last dimension of input0 = 4 and second to last dimension of input1 = 5" in reason


def test_missing_and_truncated_weights_are_named(save_graph):
    graph = save_graph("mlp")
    onnx.save(graph.model, graph.path, save_as_external_data=True, location="weights", size_threshold=0)
    weights = graph.path.parent / "weights"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert f"length out of range for file: {weights}" in refusal(graph.path, graph.inputs)
    weights.unlink()
    assert f"Failed to open file: {weights}" in refusal(graph.path, graph.inputs)


def test_a_file_that_is_no_graph_is_named(tmp_path):
    path = tmp_path / "graph.onnx"
    assert "Input file cannot be found" in refusal(path, [])
    path.write_bytes(b"junk")
    assert "Failed to parse the ONNX model" in refusal(path, [])


def test_an_input_that_varies_needs_a_profile(save_graph):
    graph = save_graph("mlp")
    bare = [msgspec.structs.replace(graph.inputs[0], profile=None)]
    assert refusal(graph.path, bare) == "input x varies and has no profile of shapes; build the graph again"


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (([4, 8], [2, 8], [1, 8]), "MIN<=OPT<=MAX"),
        (([1, 9], [2, 9], [4, 9]), "tensor has 8"),
        (([1], [2], [4]), "profile 0 has 1 dimensions"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(save_graph, sizes, reason):
    graph = save_graph("mlp")
    profile = Profile(min=sizes[0], opt=sizes[1], max=sizes[2])
    assert reason in refusal(graph.path, [msgspec.structs.replace(graph.inputs[0], profile=profile)])


@pytest.mark.parametrize("capability", ["8.7", "9.0", "11.0"])
def test_a_capability_that_it_does_not_compile_for_is_refused(save_graph, capability):
    graph = save_graph("mlp")
    assert f"Compute capability {capability} " in refusal(graph.path, graph.inputs, [capability])


# compilers


@pytest.mark.parametrize(
    ("flavour", "hint"),
    [("tensorrt", "on a Jetson it comes with JetPack"), (RTX, "install liteframe[export] on x86-64 Linux")],
)
def test_a_compiler_that_is_not_installed_is_named_with_where_it_comes_from(save_graph, monkeypatch, flavour, hint):
    monkeypatch.setattr(compile_tensorrt.importlib.util, "find_spec", lambda name: None)
    assert not compile_tensorrt.available(flavour)
    graph = save_graph("mlp")
    with pytest.raises(InputError) as caught:
        compile_graph(graph.path, graph.inputs, flavour, ["8.0"])
    assert str(caught.value).startswith(f"{flavour} is not installed here; {hint}")


@pytest.mark.parametrize("flavour", ["tensorrt", RTX])
def test_a_compiler_without_polygraphy_says_what_to_install(monkeypatch, flavour):
    monkeypatch.setattr(
        compile_tensorrt.importlib.util, "find_spec", lambda name: None if name == "polygraphy" else name
    )
    with pytest.raises(InputError) as caught:
        load(flavour)
    assert str(caught.value) == (
        f"polygraphy, which drives {flavour}, is not installed; run: pip install 'liteframe[tensorrt]'"
    )


def test_only_an_installed_compiler_is_available():
    assert compile_tensorrt.available(RTX)
    assert load(RTX).__name__ == "tensorrt_rtx"


FIRST = """
import os
from liteframe.engines.compile_tensorrt import InputError, load
from liteframe.engines import compile_tensorrt
compile_tensorrt.available = lambda flavour: True
import polygraphy.config
try:
    load({other!r})
except InputError as error:
    print(error)
print(os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX"))
"""


@pytest.mark.parametrize(("environment", "other"), [("1", "tensorrt"), ("0", RTX)])
def test_a_process_keeps_to_the_compiler_it_began_with(monkeypatch, environment, other):
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", environment)
    script = FIRST.format(other=other)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    refused, variable = done.stdout.splitlines()
    assert refused == f"this process already uses the other TensorRT; compile with {other} in a new one"
    assert variable == environment


def test_the_compiler_decides_over_the_environment(monkeypatch):
    """Where polygraphy is not imported yet."""
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "0")
    script = "from liteframe.engines.compile_tensorrt import load; print(load('tensorrt-rtx').__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tensorrt_rtx"]


def test_importing_the_module_imports_no_compiler():
    script = (
        "import sys, liteframe.engines.compile_bundle; print({'polygraphy', 'tensorrt_rtx', 'onnx'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
