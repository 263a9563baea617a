"""Custom operators as function bodies or as kernels: what TensorRT is given, what is chosen, what is refused.

There is no TensorRT here: its compile call, its runs and its registry of plugins are stand-ins.
"""

import importlib
import os
import sys
import types
from dataclasses import dataclass

import liteframe.engines
import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from liteframe.engines import compile_bundle, compile_tensorrt, operators
from liteframe.engines.compile_tensorrt import Compiled
from liteframe.engines.device import Gpu
from liteframe.engines.operators import LIBRARY, compile_either_way
from liteframe.engines.package import (
    GateError,
    InputError,
    Operators,
    Profile,
    TensorSpec,
    describe_file,
    open_package,
    write_manifest,
)
from liteframe.engines.proof import Proof

INPUTS = [
    TensorSpec(name="x", dtype="float32", shape=["clips", 4, 24, 8], profile=Profile(
        min=[1, 4, 24, 8], opt=[2, 4, 24, 8], max=[4, 4, 24, 8]
    ))
]  # fmt: skip


@pytest.fixture
def graph(tmp_path, save_graph):
    """A strided convolution, its weights beside it."""
    path = tmp_path / "graphs" / "encoder.plain.onnx"
    model = save_graph("convolution", path.parent).model
    (path.parent / "convolution.onnx").unlink()
    onnx.save(model, path, save_as_external_data=True, location="encoder.data", size_threshold=0)
    return path


@dataclass
class Device:
    """Stands for TensorRT: `seen` holds the graphs it compiled, `loaded` the libraries it was given."""

    version: str
    times: dict
    outputs: dict
    takes_library: bool = True
    stands_alone: bool = True
    found: str = "fp16"

    def __post_init__(self):
        self.seen, self.loaded, self.known = [], [], None

    def get_plugin_registry(self):
        return self

    def get_creator(self, name, version, namespace):
        assert (name, version, namespace) == ("DepthwiseTemporalConv", "1", "liteframe")
        return self.known

    def load_library(self, path):
        self.loaded.append(path)
        self.known = self.takes_library or None
        return self.known

    def compile_graph(self, path, inputs, flavour, capabilities, max_workspace=None):
        model = onnx.load(path)  # with its weights, which must be found
        self.seen.append(model)
        way = "bodies" if model.functions else "kernels"
        assert way == "bodies" or self.known, "kernels are looked for before anyone has them"
        return Compiled(way.encode(), Proof(found={self.found: 3}, integer_products=0, wrong=[]), self.version)

    def run(self, engine, inputs):
        return {"y": self.outputs[engine.decode()]}, self.times[engine.decode()]


@pytest.fixture
def device(monkeypatch):
    def make(version="11.4.1", bodies=2.0, kernels=1.0, difference=0.0, **others):
        expected = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
        outputs = {"bodies": expected, "kernels": expected + np.float32(difference)}
        made = Device(version, {"bodies": bodies, "kernels": kernels}, outputs, **others)
        made.__version__ = version
        monkeypatch.setattr(compile_tensorrt, "load", lambda flavour: made)
        monkeypatch.setattr(compile_tensorrt, "compile_graph", made.compile_graph)
        monkeypatch.setattr(operators, "run", made.run)

        def check(graph, engine):
            assert engine == b"kernels"
            if not made.stands_alone:
                raise GateError("alone")

        monkeypatch.setattr(operators, "check_stands_alone", check)
        plugins = types.ModuleType("aot_plugins")
        plugins.register = lambda capability: setattr(made, "known", capability)
        monkeypatch.setitem(sys.modules, "liteframe.engines.aot_plugins", plugins)
        monkeypatch.setattr(liteframe.engines, "aot_plugins", plugins, raising=False)
        return made

    return make


@pytest.fixture
def library(tmp_path):
    path = tmp_path / LIBRARY
    path.write_bytes(b"a library")
    return path


def left_behind(graph):
    return {path.name for path in graph.parent.iterdir()} - {graph.name, "encoder.data"}


@pytest.mark.parametrize(("bodies", "kernels", "way"), [(2.0, 1.0, "embedded"), (1.0, 2.0, "bodies")])
def test_the_faster_way_is_taken_and_both_times_are_told(graph, device, bodies, kernels, way):
    trt = device(bodies=bodies, kernels=kernels)
    chosen = compile_either_way(graph, INPUTS, "8.0", None, "auto", None)
    assert chosen.way == way
    assert chosen.compiled.engine == (b"bodies" if way == "bodies" else b"kernels")
    assert chosen.milliseconds == {"bodies": bodies, "embedded": kernels}
    assert trt.known == "8.0" and not trt.loaded and not left_behind(graph)


def test_each_way_leaves_the_parser_no_other(graph, device):
    device()
    trt = device()
    compile_either_way(graph, INPUTS, "8.0", None, "auto", None)
    bodies, kernels = trt.seen
    (with_body,), (bare,) = bodies.graph.node, kernels.graph.node
    names = {attribute.name for attribute in onnx.load(graph).graph.node[0].attribute}
    assert {a.name for a in with_body.attribute} == names - {"plugin_namespace"} and len(bodies.functions) == 1
    numbers = {"rows": 4, "columns": 6, "stride_of_time": 2, "stride_of_rows": 2, "stride_of_columns": 3}
    assert {a.name for a in bare.attribute} == names | {"aot"} | {*numbers} and not kernels.functions
    assert numbers.items() <= {a.name: onnx.helper.get_attribute_value(a) for a in bare.attribute}.items()
    assert [*bodies.graph.initializer] == [*kernels.graph.initializer] == [*onnx.load(graph).graph.initializer]


def test_the_graph_of_bodies_computes_what_the_graph_does(graph, save_graph):
    reference = save_graph("convolution").reference
    with operators._variant(graph, "bodies") as path:
        x = np.random.default_rng(0).standard_normal((2, 4, 24, 8)).astype(np.float32)
        (found,) = ort.InferenceSession(path).run(None, {"x": x})
    np.testing.assert_allclose(found, reference(x), atol=1e-4)


def test_never_compiles_bodies_and_registers_nothing(graph, device):
    trt = device()
    chosen = compile_either_way(graph, INPUTS, "8.0", None, "never", None)
    assert (chosen.way, chosen.milliseconds, chosen.why) == ("bodies", {}, "")
    assert len(trt.seen) == 1 and trt.known is None


def test_required_kernels_are_taken_though_slower(graph, device):
    device(bodies=1.0, kernels=2.0)
    chosen = compile_either_way(graph, INPUTS, "8.0", None, "require", None)
    assert chosen.way == "embedded" and chosen.milliseconds == {"bodies": 1.0, "embedded": 2.0}


def test_an_old_tensorrt_takes_the_library(graph, device, library):
    trt = device(version="10.3.0")
    chosen = compile_either_way(graph, INPUTS, "8.7", None, "auto", library)
    assert chosen.way == "library" and chosen.milliseconds == {"bodies": 2.0, "library": 1.0}
    assert trt.loaded == [str(library)]
    assert "aot" not in {a.name for a in trt.seen[1].graph.node[0].attribute}
    compile_either_way(graph, INPUTS, "8.7", None, "auto", library)
    assert trt.loaded == [str(library)]  # once in a process


def test_an_old_tensorrt_without_the_library_takes_bodies_and_says_why(graph, device):
    trt = device(version="10.3.0")
    chosen = compile_either_way(graph, INPUTS, "8.7", None, "auto", None)
    assert chosen.way == "bodies" and "TensorRT 10.3.0 takes them from a library, which was not named" in chosen.why
    assert len(trt.seen) == 1
    with pytest.raises(InputError, match=r"kernels are required, and TensorRT 10\.3\.0 .*--plugin-library"):
        compile_either_way(graph, INPUTS, "8.7", None, "require", None)
    assert len(trt.seen) == 1


def test_a_library_that_tensorrt_refuses_is_named(graph, device, library):
    device(version="10.3.0", takes_library=False)
    with pytest.raises(InputError, match=rf"{LIBRARY}: TensorRT 10\.3\.0 does not load it"):
        compile_either_way(graph, INPUTS, "8.7", None, "auto", library)
    assert not left_behind(graph)


@pytest.mark.parametrize("difference", [1.0, np.nan])
@pytest.mark.parametrize("choice", ["auto", "require"])
def test_kernels_that_compute_something_else_fail_the_gate(graph, device, difference, choice):
    device(difference=difference)
    with pytest.raises(GateError, match=r"with kernels y differs .*--plugins never"):
        compile_either_way(graph, INPUTS, "8.0", None, choice, None)
    assert not left_behind(graph)


def test_in_fp32_they_must_agree_more_closely(graph, device):
    device(difference=0.02)
    compile_either_way(graph, INPUTS, "8.0", None, "auto", None)
    device(difference=0.02, found="fp32")
    with pytest.raises(GateError, match=r"expected 0\.99999"):
        compile_either_way(graph, INPUTS, "8.0", None, "auto", None)


def test_an_engine_that_needs_plugins_to_load_is_not_taken(graph, device):
    device(stands_alone=False)
    chosen = compile_either_way(graph, INPUTS, "8.0", None, "auto", None)
    assert (chosen.way, chosen.why) == ("bodies", "with kernels: alone")
    device(stands_alone=False)
    with pytest.raises(GateError, match="alone"):
        compile_either_way(graph, INPUTS, "8.0", None, "require", None)


def test_polygraphy_is_told_where_cudas_runtime_is(monkeypatch):
    found = types.SimpleNamespace(load_nvidia_dynamic_lib=lambda name: types.SimpleNamespace(abs_path=f"/cu/{name}.so"))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", found)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/a:/cu:/b")
    operators._name_cudart()
    assert os.environ["LD_LIBRARY_PATH"] == "/cu:/a:/b"
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    operators._name_cudart()
    assert os.environ["LD_LIBRARY_PATH"] == "/cu:/a:/b"


def test_without_nvrtc_bodies_are_taken_and_the_reason_is_told(graph, device, monkeypatch):
    device()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    chosen = compile_either_way(graph, INPUTS, "8.0", None, "auto", None)
    assert chosen.way == "bodies" and chosen.why.startswith("NVRTC, which compiles the CUDA kernels, is not here")
    with pytest.raises(InputError, match="kernels are required, and NVRTC"):
        compile_either_way(graph, INPUTS, "8.0", None, "require", None)


def test_kernels_that_tensorrt_does_not_compile_are_not_taken_and_the_reason_is_told(graph, device, monkeypatch):
    trt = device()

    def refuse(path, *others):
        if not onnx.load(path).functions:
            raise InputError(f"{path.name}: tensorrt cannot compile it: unsupported PTX version")
        return trt.compile_graph(path, *others)

    monkeypatch.setattr(compile_tensorrt, "compile_graph", refuse)
    chosen = compile_either_way(graph, INPUTS, "8.0", None, "auto", None)
    assert chosen.way == "bodies" and not chosen.milliseconds and "unsupported PTX version" in chosen.why
    with pytest.raises(InputError, match="unsupported PTX version"):
        compile_either_way(graph, INPUTS, "8.0", None, "require", None)
    assert not left_behind(graph)


def test_a_graph_without_custom_operators_is_known(graph, save_graph):
    assert operators.has_operators(graph)
    assert not operators.has_operators(save_graph("mlp").path)


# in a package


@pytest.fixture
def bundle(tmp_path, tiny_manifest, graph):
    """Its encoder graph is the convolution, its decoder one without custom operators."""
    folder = tmp_path / "bundle"
    manifest = tiny_manifest(folder)
    decoder = folder / "graphs" / "decoder.plain.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), decoder)
    model = onnx.load(graph)
    onnx.save(model, folder / "graphs" / "encoder.plain.onnx")
    graphs = [
        msgspec.structs.replace(
            one, dialect="plain", opset=20, files=[describe_file(folder, folder / "graphs" / f"{one.name}.plain.onnx")]
        )
        for one in manifest.graphs
    ]
    for name in ("encoder", "decoder"):
        (folder / f"{name}.engine").unlink()
    write_manifest(folder, msgspec.structs.replace(manifest, target="jetson-orin", graphs=graphs, engines=[]))
    return folder


@pytest.fixture
def orin(device, monkeypatch):
    trt = device(version="10.3.0", found="fp32")
    compile_graph = trt.compile_graph
    monkeypatch.setattr(
        compile_tensorrt, "compile_graph",
        lambda path, *rest: compile_graph(path, *rest) if "encoder" in path.name else Compiled(
            b"decoder", Proof(found={"fp32": 1}, integer_products=0, wrong=[]), trt.version
        ),
    )  # fmt: skip
    monkeypatch.setattr(compile_bundle, "find_gpus", lambda: ([Gpu("Orin", "8.7", 1)], ""))
    return trt


def test_the_library_goes_into_the_package_with_its_hash(bundle, orin, library, capsys):
    arguments = [str(bundle), "--plugins", "require", "--plugin-library", str(library)]
    assert compile_bundle.main(arguments) == 0
    assert "encoder: 0 MB, plain, TensorRT 10.3.0; custom operators: library (bodies 2.00 ms, library 1.00 ms)" in (
        capsys.readouterr().out
    )
    package = open_package(bundle)
    told = package.engine("encoder").operators
    assert told == Operators(
        way="library", milliseconds={"bodies": 2.0, "library": 1.0}, library=describe_file(bundle, bundle / LIBRARY)
    )
    assert package.engine("decoder").operators is None
    (bundle / LIBRARY).write_bytes(b"b library")
    with pytest.raises(InputError, match=rf"{LIBRARY}: SHA-256 differs from manifest\.json"):
        open_package(bundle)


def test_a_library_that_is_not_needed_any_more_goes(bundle, orin, library):
    compile_bundle.compile_bundle(bundle, plugins="require", library=library)
    compile_bundle.compile_bundle(bundle, plugins="never")
    assert not (bundle / LIBRARY).exists()
    assert open_package(bundle).engine("encoder").operators == Operators(way="bodies", milliseconds={}, library=None)


def test_a_failed_compile_leaves_no_library(bundle, orin, library):
    orin.outputs["kernels"] = -orin.outputs["bodies"]
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    with pytest.raises(GateError):
        compile_bundle.compile_bundle(bundle, plugins="auto", library=library)
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def test_a_library_that_is_not_there_is_refused(bundle, orin, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.so: no such file; expected libliteframe_plugins\.so"):
        compile_bundle.compile_bundle(bundle, library=tmp_path / "nowhere.so")
    assert not orin.seen


# ahead-of-time plugins


class Size:
    """A dimension: a number that is known when the engine is built, or not."""

    def __init__(self, value, known=True):
        self.value, self.known = value, known

    def constant_value(self):
        assert self.known, "TensorRT does not tell sizes that vary"
        return self.value

    def __mul__(self, other):
        return Size(self.value * other, self.known)


class Launch:
    grid_x = grid_y = grid_z = block_x = block_y = block_z = 1
    shared_mem = 0


@dataclass
class Desc:
    shape_expr: list
    dtype: str

    @property
    def ndim(self):
        return len(self.shape_expr)

    def like(self):
        return Desc([*self.shape_expr], self.dtype)


@pytest.fixture
def aot(monkeypatch):
    """What the module registers with a TensorRT that has the documented names: {what: {plugin: function}}."""
    trt, plugin = types.ModuleType("tensorrt"), types.ModuleType("tensorrt.plugin")
    registered = {what: {} for what in ("register", "autotune", "aot_impl")}

    def decorator(what):
        def named(identifier):
            def keep(function):
                # TensorRT compares annotations with its classes
                assert not any(isinstance(hint, str) for hint in function.__annotations__.values())
                return registered[what].setdefault(identifier, function)

            return keep

        return named

    for what in registered:
        setattr(plugin, what, decorator(what))
    plugin.TensorDesc, plugin.ShapeExpr, plugin.KernelLaunchParams = Desc, Size, Launch
    plugin.SymInt32 = lambda value: value.value if isinstance(value, Size) else int(value)
    plugin.SymIntExprs = type("SymIntExprs", (), {"from_tuple": staticmethod(list)})
    plugin.AutoTuneCombination = type(
        "Combination", (tuple,), {"__new__": lambda cls, *given: tuple.__new__(cls, given)}
    )
    plugin.cdiv = lambda a, b: Size(-(-a.value // b), a.known)
    plugin.from_shape_expr = lambda sizes, dtype: Desc([*sizes], dtype)
    trt.plugin, trt.DataType = plugin, str
    trt.float32, trt.float16, trt.bfloat16 = "float32", "float16", "bfloat16"
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    monkeypatch.delitem(sys.modules, "liteframe.engines.aot_plugins", raising=False)
    module = importlib.import_module("liteframe.engines.aot_plugins")
    module.register("8.0")
    yield registered
    del sys.modules["liteframe.engines.aot_plugins"], liteframe.engines.aot_plugins


def tensor(*sizes, dtype="float16"):
    first, *rest = sizes
    return Desc([Size(first, known=False), *map(Size, rest)], dtype)


def values(desc):
    return [size.value if isinstance(size, Size) else size for size in desc.shape_expr]


def test_embedded_kernels_are_launched_as_planned(aot):
    from liteframe.engines.kernels import ConvolutionShape, convolution, pooling

    assert all(
        {*functions} == {"liteframe::DepthwiseTemporalConv", "liteframe::WeightedAveragePool"}
        for functions in aot.values()
    )
    numbers = [np.array([number], np.int32) for number in (32, 32, 2, 2, 2)]
    x, weight, bias = tensor(7, 4, 1024, 768), tensor(768, 1, 3, 3, 3), tensor(768)
    name = "liteframe::DepthwiseTemporalConv"
    out = aot["register"][name](x, weight, bias, *numbers)
    assert (values(out), out.dtype) == ([7, 2, 256, 768], "float16")
    kernel = convolution("fp16", ConvolutionShape.of(4, (32, 32), 768, (3, 3, 3), (2, 2, 2)))
    entry, ptx, launch, integers = aot["aot_impl"][name](x, weight, bias, *numbers, (out,), 0)
    assert entry == kernel.name and f".entry {entry}(".encode() in ptx and b".target sm_80" in ptx
    assert (launch.grid_x.value, launch.grid_y, launch.block_x) == (*kernel.grid(7)[:2], kernel.threads)
    assert integers == [7, *kernel.integers]
    assert aot["autotune"][name](x, weight, bias, (out,)) == [(", ".join(["FP32|FP16|BF16"] * 4), "LINEAR")]

    name, blocks = "liteframe::WeightedAveragePool", (1, 4, 16, 2, 16, 2)
    numbers = [np.array([number], np.int32) for number in blocks]
    x = tensor(7, 4, 1025, 1024, dtype="bfloat16")
    out = aot["register"][name](x, *numbers)
    assert (values(out), out.dtype) == ([7, 256, 1024], "bfloat16")
    kernel = pooling("bf16", blocks, 1024)
    entry, ptx, launch, integers = aot["aot_impl"][name](x, *numbers, (out,), 0)
    assert entry == kernel.name and integers == [7, *kernel.integers]
    assert (launch.grid_x.value, launch.block_x) == (kernel.grid(7)[0], kernel.threads)


def test_what_plugins_ask_for_is_what_nodes_get(aot, save_graph):
    for name, model in (("DepthwiseTemporalConv", "convolution"), ("WeightedAveragePool", "pool")):
        asked = aot["register"][f"liteframe::{name}"].__annotations__
        asked = {argument: hint for argument, hint in asked.items() if hint is not Desc}
        (node,) = save_graph(model).model.graph.node
        assert asked.keys() == operators._one_by_one(node).keys() and {*asked.values()} == {np.typing.NDArray[np.int32]}
