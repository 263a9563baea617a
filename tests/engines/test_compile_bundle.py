"""`liteframe compile`: engines and manifest are replaced when all went well, and stay as they were when not.

There is no TensorRT here and no GPU: its compile call, its version and the driver's answer are stand-ins. In the slow
test TensorRT-RTX compiles in its place.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from liteframe.engines import compile_bundle, compile_tensorrt, operators
from liteframe.engines.compile_tensorrt import Compiled
from liteframe.engines.device import Gpu
from liteframe.engines.package import GateError, InputError, Package, describe_file, open_package, write_manifest
from liteframe.engines.proof import Proof

pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX")  # polygraphy's timing cache
ORIN, A100 = Gpu("Orin", "8.7", 32 << 30), Gpu("NVIDIA A100", "8.0", 80 << 30)


@pytest.fixture
def device(monkeypatch):
    """Sets what this machine pretends to be; the list holds what TensorRT was asked to compile."""
    calls = []

    def pretend(gpu=ORIN, version="11.4.1", found=({"fp32": 3}, {"fp32": 5}), fail_at=None):
        def compile_graph(graph, inputs, flavour, capabilities, max_workspace=None):
            calls.append((graph, inputs, flavour, capabilities, max_workspace))
            if fail_at == len(calls):
                raise InputError(f"{graph}: tensorrt {version} cannot compile it: out of memory")
            proof = Proof(found=found[len(calls) - 1], integer_products=0, wrong=[])
            return Compiled(engine=b"compiled " + graph.read_bytes(), proof=proof, version=version)

        monkeypatch.setattr(compile_tensorrt, "load", lambda flavour: SimpleNamespace(__version__=version))
        monkeypatch.setattr(compile_tensorrt, "compile_graph", compile_graph)
        monkeypatch.setattr(operators, "has_operators", lambda graph: False)  # see test_operators_in_engines.py
        gpus = [gpu] if gpu else []
        monkeypatch.setattr(compile_bundle, "find_gpus", lambda: (gpus, "" if gpus else "no NVIDIA driver (Missing)"))
        return calls

    return pretend


def write_bundle(folder, manifest, target="jetson-orin", **changes):
    """A package's manifest becomes that of a bundle with graphs in both dialects."""
    plain = []
    for graph in manifest.graphs:
        path = folder / "graphs" / f"{graph.name}.plain.onnx"
        path.write_bytes(f"{graph.name}'s plain graph".encode())
        files = [describe_file(folder, path), graph.files[1]]
        plain.append(msgspec.structs.replace(graph, dialect="plain", opset=20, files=files))
    changes = {"target": target, "graphs": [*manifest.graphs, *plain], "engines": [], **changes}
    write_manifest(folder, msgspec.structs.replace(manifest, **changes))
    return folder


@pytest.fixture
def bundle(tmp_path, tiny_manifest):
    folder = tmp_path / "bundle"
    manifest = tiny_manifest(folder)
    for name in ("encoder", "decoder"):
        (folder / f"{name}.engine").unlink()
    return write_bundle(folder, manifest)


@pytest.fixture
def a100(tmp_path, tiny_manifest):
    """A package that has engines already, compiled ahead of time."""
    folder = tmp_path / "a100"
    write_manifest(folder, tiny_manifest(folder))
    return folder


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(folder, *fragments, error=InputError):
    before = content(folder)
    with pytest.raises(error) as caught:
        compile_bundle.compile_bundle(folder)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content(folder) == before
    return str(caught.value)


# what is compiled


@pytest.mark.parametrize(("version", "dialect"), [("10.3.0", "plain"), ("10.15.1", "fused"), ("11.4.1", "fused")])
def test_a_bundle_gets_engines_from_the_dialect_of_its_tensorrt(bundle, device, version, dialect):
    before = open_package(bundle).manifest
    calls = device(version=version)
    made = compile_bundle.compile_bundle(bundle)
    assert isinstance(made, Package)
    assert made == open_package(bundle)
    assert [call[0] for call in calls] == [bundle / f"graphs/{name}.{dialect}.onnx" for name in ("encoder", "decoder")]
    assert all(flavour == "tensorrt" for _, _, flavour, *_ in calls)
    for name, (graph, inputs, *_) in zip(("encoder", "decoder"), calls, strict=True):
        assert inputs == before.graphs[0].inputs
        assert (bundle / f"{name}.engine").read_bytes() == b"compiled " + graph.read_bytes()
    for engine, name, count in zip(made.manifest.engines, ("encoder", "decoder"), (3, 5), strict=True):
        assert msgspec.to_builtins(engine) | {"files": None, "inputs": None, "outputs": None} == {
            "name": name,
            "dialect": dialect,
            "files": None,
            "inputs": None,
            "outputs": None,
            "precision": {
                "asked": "fp32",
                "found": {"fp32": count},
                "kept": [{"node": "norm/LayerNormalization", "type": "fp32", "reason": "norm"}],
            },
            "compiler": "tensorrt",
            "compiler_version": version,
            "capabilities": ["8.7"],
            "operators": None,
            "parity": None,
        }
        assert [file.path for file in engine.files] == [f"{name}.engine"]
        assert (engine.inputs, engine.outputs) == (before.graphs[0].inputs, before.graphs[0].outputs)
    assert msgspec.structs.replace(made.manifest, engines=[], sha256="") == msgspec.structs.replace(before, sha256="")


def test_nothing_but_engines_and_manifest_changes(bundle, device):
    before = content(bundle)
    device()
    compile_bundle.compile_bundle(bundle)
    after = content(bundle)
    assert after.keys() - before.keys() == {"encoder.engine", "decoder.engine"}
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}


def test_engines_compiled_ahead_of_time_are_replaced(a100, device):
    device(gpu=A100)
    made = compile_bundle.compile_bundle(a100)
    assert (a100 / "decoder.engine").read_bytes() == b"compiled decoder's graph"
    assert [engine.compiler_version for engine in made.manifest.engines] == ["11.4.1"] * 2
    assert "." not in {name[0] for name in content(a100)}


def test_compiling_twice_gives_the_same_package(bundle, device):
    device()
    compile_bundle.compile_bundle(bundle)
    before = content(bundle)
    device(found=({}, {}, {"fp32": 3}, {"fp32": 5}))
    compile_bundle.compile_bundle(bundle)
    assert content(bundle) == before


def test_the_command_reports_and_ends_with_one_json_document(bundle, device, capsys):
    device()
    assert compile_bundle.main([str(bundle), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: 0 MB, fused, TensorRT 11.4.1" for name in ("encoder", "decoder")]
    assert json.loads(last) == json.loads((bundle / "manifest.json").read_text())


def test_both_compiles_keep_within_the_workspace(bundle, device):
    calls = device()
    assert compile_bundle.main([str(bundle), "--max-workspace", "512"]) == 0
    assert [call[-1] for call in calls] == [512 << 20] * 2


# what is refused


def test_without_tensorrt_it_is_said_where_that_comes_from(bundle, device, monkeypatch):
    device()
    monkeypatch.undo()
    monkeypatch.setattr(compile_tensorrt.importlib.util, "find_spec", lambda name: None)
    assert_refused(bundle, "tensorrt is not installed here; on a Jetson it comes with JetPack")


def test_without_a_gpu_it_is_said_why_there_is_none(bundle, device):
    calls = device(gpu=None)
    message = assert_refused(bundle, "there is no GPU here: no NVIDIA driver (Missing)")
    assert message.startswith(f"{bundle}: ")
    assert not calls


@pytest.mark.parametrize("gpu", [A100, Gpu("Thor", "11.0", 1), Gpu("Orin's neighbour", "8.6", 1)])
def test_on_another_gpu_both_are_named(bundle, device, gpu):
    calls = device(gpu=gpu)
    assert_refused(
        bundle, "Jetson Orin (JetPack 6.1 or later) (compute capability 8.7)", f"{gpu.name} ({gpu.capability})"
    )
    assert not calls


def test_a_package_that_lacks_the_dialect_says_which_tensorrt_takes_it(a100, device):
    calls = device(gpu=A100, version="10.3.0")
    message = assert_refused(a100, "TensorRT 10.3.0 takes graphs in the plain dialect", "carry fused ones")
    assert message.endswith("install TensorRT 10.15 or later")
    assert not calls


@pytest.mark.parametrize(
    ("target", "reason"),
    [("cpu", "run it with: liteframe run"), ("cuda", "run it with: liteframe run"), ("rtx", "compiled ahead of time")],
)
def test_a_package_for_another_compiler_is_refused(a100, device, target, reason):
    device()
    write_manifest(a100, msgspec.structs.replace(open_package(a100).manifest, target=target))
    assert_refused(a100, f"{a100}: a package for {target}", reason)


def test_a_bundle_without_the_graph_is_refused(bundle, device):
    device(version="10.3.0")
    manifest = open_package(bundle).manifest
    fused = [graph for graph in manifest.graphs if graph.dialect == "fused"]
    write_manifest(bundle, msgspec.structs.replace(manifest, graphs=fused))
    assert_refused(bundle, f"{bundle}: holds no encoder graph in the plain dialect; build the package again")


def test_a_tampered_graph_is_refused_before_it_is_compiled(bundle, device):
    calls = device()
    (bundle / "graphs" / "encoder.fused.onnx").write_bytes(b"encoder's grapH")
    assert_refused(bundle, "encoder.fused.onnx: SHA-256 differs")
    assert not calls


@pytest.mark.parametrize("fail_at", [1, 2])
@pytest.mark.parametrize(("package", "gpu"), [("bundle", ORIN), ("a100", A100)])
def test_a_failed_compile_leaves_the_package_as_it_was(request, device, package, gpu, fail_at):
    folder = request.getfixturevalue(package)
    calls = device(gpu=gpu, fail_at=fail_at)
    failed = folder / "graphs" / f"{('encoder', 'decoder')[fail_at - 1]}.fused.onnx"
    assert_refused(folder, f"{failed}: tensorrt 11.4.1 cannot compile it: out of memory")
    assert len(calls) == fail_at
    open_package(folder)


@pytest.mark.parametrize("found", [{"fp32": 3, "fp16": 1}, {"fp16": 3}, {}])
def test_another_precision_than_asked_for_fails_the_gate(a100, device, found):
    device(gpu=A100, found=({"fp32": 1}, found))
    assert_refused(a100, f"decoder: asked for fp32, the compiled network computes tensors of {found}", error=GateError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupt_or_a_full_disk_leaves_the_package_as_it_was(a100, device, monkeypatch, error):
    device(gpu=A100)
    write = Path.write_bytes

    def fail(path, engine):
        write(path, engine[:5])
        if "decoder" in path.name:
            raise error

    before = content(a100)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises((KeyboardInterrupt, OSError)):
            compile_bundle.compile_bundle(a100)
    assert content(a100) == before


# a whole one


@pytest.mark.slow
@pytest.mark.parametrize(("version", "dialect"), [("10.3.0", "plain"), ("11.4.1", "fused")])
def test_a_built_bundle_is_finished(orin, tmp_path, device, monkeypatch, version, dialect):
    bundle = tmp_path / "bundle"
    shutil.copytree(orin.folder, bundle)
    compile_graph = compile_tensorrt.compile_graph
    load = compile_tensorrt.load
    device(version=version)

    def compile_for_ampere(graph, inputs, flavour, capabilities, max_workspace):
        with monkeypatch.context() as patch:
            patch.setattr(compile_tensorrt, "load", load)
            return replace(compile_graph(graph, inputs, "tensorrt-rtx", ["8.6"]), version=version)

    monkeypatch.setattr(compile_tensorrt, "compile_graph", compile_for_ampere)
    made = compile_bundle.compile_bundle(bundle)
    assert [(engine.name, engine.dialect) for engine in made.manifest.engines] == [
        ("encoder", dialect),
        ("decoder", dialect),
    ]
    assert {engine.compiler_version for engine in made.manifest.engines} == {version}
    assert all(made.path(engine.files[0]).stat().st_size > 10_000 for engine in made.manifest.engines)


@pytest.fixture(scope="module")
def orin(tiny_artifact, tmp_path_factory):
    from liteframe.export.build_engine import build

    return build(tiny_artifact, "jetson-orin", tmp_path_factory.mktemp("orin") / "bundle", frames=16)
