"""Layer by layer: figures against NumPy in double precision, values against torch modules, and how the command ends."""

import json
import math
import subprocess
import sys

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from liteframe.calib import layers
from liteframe.calib.drift import compare_graphs, first_broken
from liteframe.calib.layers import BROKEN_COSINE, BROKEN_SNR_DB, LayerDrift, LayerGraph
from liteframe.engines.package import InputError
from liteframe.runtime import cli
from onnx import numpy_helper

FLOAT, HALF, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
WIDTH = 8
VALUES = [f"layers.{i}/{operator}" for i in range(3) for operator in ("MatMul", "Add", "Tanh")]


def save_graph(path, nodes, weights, inputs=None, outputs=("y",), kind=FLOAT, **saving):
    inputs = inputs or {"x": (FLOAT, ["rows", WIDTH])}
    graph = oh.make_graph(
        nodes,
        "small",
        [oh.make_tensor_value_info(name, *info) for name, info in inputs.items()],
        [oh.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path, **saving)
    return path


def weights_of(seed):
    draw = np.random.default_rng(seed)
    shapes = {**{f"w{i}": (WIDTH, WIDTH) for i in range(3)}, **{f"b{i}": (WIDTH,) for i in range(3)}}
    return {name: (draw.normal(size=shape) * 0.4).astype(np.float32) for name, shape in shapes.items()}


def save_layers(path, weights, **saving):
    """x -> three times tanh(x W + b) -> y, the last of them under a name of its own."""
    nodes, x = [], "x"
    for i in range(3):
        names = [f"layers.{i}/{operator}" for operator in ("MatMul", "Add", "Tanh")]
        nodes += [
            oh.make_node("MatMul", [x, f"w{i}"], [names[0]], names[0]),
            oh.make_node("Add", [names[0], f"b{i}"], [names[1]], names[1]),
            oh.make_node("Tanh", [names[1]], [names[2]], names[2]),
        ]
        x = names[2]
    nodes.append(oh.make_node("Neg", [x], ["y"], "head/Neg"))
    return save_graph(path, nodes, weights, **saving)


def numpy_layers(x, weights):
    """What `save_layers` computes, in double precision."""
    values, x = {}, x.astype(np.float64)
    for i in range(3):
        product = x @ weights[f"w{i}"].astype(np.float64)
        added = product + weights[f"b{i}"].astype(np.float64)
        x = np.tanh(added)
        values |= {f"layers.{i}/MatMul": product, f"layers.{i}/Add": added, f"layers.{i}/Tanh": x}
    return {**values, "y": -x}


def numpy_figures(r, c):
    with np.errstate(divide="ignore"):
        snr = 10 * np.log10(np.sum(r**2) / np.sum((r - c) ** 2))
    return np.sum(r * c) / np.linalg.norm(r) / np.linalg.norm(c), np.abs(r - c).max(), snr


def feeds(count=1, rows=5):
    return [{"x": np.random.default_rng(i).normal(size=(rows + i, WIDTH)).astype(np.float32)} for i in range(count)]


@pytest.fixture
def pair(tmp_path):
    """A graph, and one whose second layer's weights are others."""
    weights = weights_of(0)
    damaged = weights | {"w1": weights["w1"] + np.random.default_rng(9).normal(size=(WIDTH, WIDTH)).astype(np.float32)}
    return save_layers(tmp_path / "a.onnx", weights), save_layers(tmp_path / "b.onnx", damaged)


# -- figures ---------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), layer=st.integers(0, 2), level=st.floats(0.01, 3.0), steps=st.sampled_from([4, 16, 0]))
def test_figures_are_numpys_and_the_worst_over_all_feeds(tmp_path_factory, seed, layer, level, steps):
    """Noise on one layer's weights, or weights rounded to a grid."""
    folder, weights, name = tmp_path_factory.mktemp("drift"), weights_of(seed), f"w{layer}"
    noise = np.random.default_rng(seed + 1).normal(size=(WIDTH, WIDTH)) * level
    changed = np.rint(weights[name] * steps) / steps if steps else weights[name] + noise
    damaged = weights | {name: changed.astype(np.float32)}
    paths = save_layers(folder / "a.onnx", weights), save_layers(folder / "b.onnx", damaged)
    rows = compare_graphs(*paths, iter(feeds(3)))

    assert [row.value for row in rows] == [*VALUES, "y"]
    assert [row.module for row in rows] == [*(value.rpartition("/")[0] for value in VALUES), "head"]
    assert [row.operator for row in rows] == ["MatMul", "Add", "Tanh"] * 3 + ["Neg"]
    runs = [(numpy_layers(feed["x"], weights), numpy_layers(feed["x"], damaged)) for feed in feeds(3)]
    for index, row in enumerate(rows):
        figures = [numpy_figures(r[row.value], c[row.value]) for r, c in runs]
        if index < 3 * layer:
            assert row.cosine == pytest.approx(1, abs=1e-12)
            assert (row.max_abs_error, row.snr_db) == (0, math.inf)
        else:
            assert row.cosine == pytest.approx(min(cosine for cosine, _, _ in figures), abs=1e-6)
            assert row.max_abs_error == pytest.approx(max(error for _, error, _ in figures), rel=1e-4)
            assert row.snr_db == pytest.approx(min(snr for _, _, snr in figures), abs=1e-3)


def test_the_first_broken_layer_is_the_damaged_one(pair):
    rows = compare_graphs(*pair, feeds())
    assert first_broken(rows).value == "layers.1/MatMul"
    assert first_broken(rows[:3]) is None
    assert first_broken([]) is None


@given(st.lists(st.tuples(st.floats(0.98, 1), st.floats(18, 22) | st.just(math.inf) | st.just(-math.inf)), max_size=6))
def test_broken_is_below_either_threshold(figures):
    rows = [LayerDrift(f"m/{i}", "m", "Add", cosine, 0.0, snr) for i, (cosine, snr) in enumerate(figures)]
    whole = [cosine >= BROKEN_COSINE and snr >= BROKEN_SNR_DB for cosine, snr in figures]
    assert first_broken(rows) is (rows[whole.index(False)] if False in whole else None)


def test_groups_make_no_difference_and_progress_is_told(pair, monkeypatch):
    expected = compare_graphs(*pair, feeds(2))
    monkeypatch.setattr(layers, "GROUP_BYTES", 2 * 4 * 6 * WIDTH)  # two values
    told = []
    assert compare_graphs(*pair, feeds(2), lambda *counts: told.append(counts)) == expected
    assert told == [(done, 10) for done in range(1, 11)]  # 10 values, 2 feeds


def test_weights_are_found_beside_the_graph_and_nothing_is_written(pair, tmp_path, monkeypatch):
    expected = compare_graphs(*pair, feeds())
    options = {"save_as_external_data": True, "location": "weights.data", "size_threshold": 0}
    (tmp_path / "apart").mkdir()
    reference = save_layers(tmp_path / "apart" / "a.onnx", weights_of(0), **options)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir("/")
    assert compare_graphs(reference, pair[1], feeds()) == expected
    assert sorted(tmp_path.rglob("*")) == before


def mixed(path, factor, other, shape):
    nodes = [
        oh.make_node("Mul", ["x", "factor"], ["m/Mul"], "m/Mul"),
        oh.make_node("Shape", ["x"], ["m/Shape"], "m/Shape"),  # integers
        oh.make_node("Mul", ["m/Mul", "other"], ["val_3"], "m/Mul_2"),  # nobody's name
        oh.make_node("Reshape", ["val_3", "shape"], ["m/Reshape"], "m/Reshape"),
        oh.make_node("Slice", ["m/Mul", "none", "none"], ["m/Slice"], "m/Slice"),  # empty
        oh.make_node("Sub", ["m/Mul", "m/Mul"], ["m/Sub"], "m/Sub"),  # zero throughout
        oh.make_node("Identity", ["m/Sub"], ["y"], "m/Identity"),
    ]
    weights = {
        "factor": np.array(factor, np.float32),
        "other": np.array(other, np.float32),
        "shape": np.array(shape, np.int64),
        "none": np.zeros(1, np.int64),
    }
    return save_graph(path, nodes, weights, outputs=("y", "m/Reshape", "m/Slice"))


def test_what_can_not_be_compared_is_left_out(tmp_path):
    paths = mixed(tmp_path / "a.onnx", 2, 1, [-1]), mixed(tmp_path / "b.onnx", 2.5, 7, [-1, 2])
    rows = {row.value: row for row in compare_graphs(*paths, feeds())}
    assert [*rows] == ["m/Mul", "m/Sub", "y"]
    assert rows["m/Mul"].snr_db == pytest.approx(20 * math.log10(4), abs=1e-5)
    assert rows["m/Mul"].cosine == pytest.approx(1)
    assert rows["m/Sub"] == LayerDrift("m/Sub", "m", "Sub", 1.0, 0.0, math.inf)


def quotient(path, divisor):
    nodes = [
        oh.make_node("Div", ["x", "divisor"], ["m/Div"], "m/Div"),
        oh.make_node("Where", ["hidden", "infinity", "m/Div"], ["m/Where"], "m/Where"),
        oh.make_node("Softmax", ["m/Where"], ["y"], "m/Softmax"),
    ]
    weights = {
        "divisor": np.array(divisor, np.float32),
        "hidden": np.arange(WIDTH) < 3,
        "infinity": np.array(-np.inf, np.float32),
    }
    return save_graph(path, nodes, weights)


def test_what_is_not_finite_is_as_bad_as_can_be_and_a_mask_is_no_error(tmp_path):
    whole, near, broken = (quotient(tmp_path / f"{d}.onnx", d) for d in (1.0, 1.25, 0.0))
    rows = {row.value: row for row in compare_graphs(whole, broken, feeds(2))}
    for row in rows.values():
        assert (row.cosine, row.max_abs_error, row.snr_db) == (0, math.inf, -math.inf)
    assert first_broken(rows.values()).value == "m/Div"
    rows = {row.value: row for row in compare_graphs(whole, near, feeds())}
    assert rows["m/Where"].snr_db == pytest.approx(20 * math.log10(5), abs=1e-4)
    same = {row.value: row for row in compare_graphs(broken, broken, feeds())}
    assert same["m/Div"].snr_db == math.inf


def test_fp16_is_rounded_at_every_operator(tmp_path):
    """ONNX Runtime's CPU provider, left to itself, rounds at the end only."""
    weights = {"a": np.array(1.2345, np.float32), "b": np.array(100.1, np.float32), "c": np.array(3.21, np.float32)}
    chain = [("Mul", "a"), ("Add", "b"), ("Sub", "b"), ("Mul", "c")]

    def save(path, kind):
        dtype, x = oh.tensor_dtype_to_np_dtype(kind), "m/Cast"
        nodes = [oh.make_node("Cast", ["x"], ["m/Cast"], "m/Cast", to=kind)]
        for i, (operator, weight) in enumerate(chain):
            nodes.append(oh.make_node(operator, [x, weight], [f"m/{i}"], f"m/{i}"))
            x = f"m/{i}"
        nodes.append(oh.make_node("Cast", [x], ["y"], "m/Cast_2", to=FLOAT))
        return save_graph(path, nodes, {name: array.astype(dtype) for name, array in weights.items()})

    (feed,) = feeds(rows=40)
    rows = {row.value: row for row in compare_graphs(save(tmp_path / "a", FLOAT), save(tmp_path / "b", HALF), [feed])}
    functions = {"Mul": np.multiply, "Add": np.add, "Sub": np.subtract}
    full, half = feed["x"], feed["x"].astype(np.float16)
    for i, (operator, weight) in enumerate(chain):
        full = functions[operator](full, weights[weight])
        half = functions[operator](half.astype(np.float64), weights[weight].astype(np.float16)).astype(np.float16)
        cosine, error, snr = numpy_figures(full.astype(np.float64), half.astype(np.float64))
        assert rows[f"m/{i}"].max_abs_error == pytest.approx(error, rel=1e-6)
        assert rows[f"m/{i}"].snr_db == pytest.approx(snr, abs=1e-6)
        assert rows[f"m/{i}"].cosine == pytest.approx(cosine, abs=1e-9)


def test_a_build_can_compile_after_a_comparison(pair, tmp_path):
    """Polygraphy decides once a process which TensorRT it drives."""
    program = f"""
from pathlib import Path
import numpy as np
from liteframe.calib.drift import compare_graphs
from liteframe.engines import compile_tensorrt
compare_graphs(Path({str(pair[0])!r}), Path({str(pair[1])!r}), [{{"x": np.ones((2, {WIDTH}), np.float32)}}])
print(compile_tensorrt.load("tensorrt-rtx").__name__)
"""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("tensorrt_rtx\n", "")


# -- graphs of the project -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced(tiny_artifact, tmp_path_factory):
    """The tiny artifact's encoder module, its `fused` graph, and one with a damaged temporal convolution."""
    import onnx_ir as ir
    from liteframe.export.artifact import load_artifact
    from liteframe.export.trace import WeightsFile, trace_encoder

    folder = tmp_path_factory.mktemp("traced")
    encoder = load_artifact(tiny_artifact).encoder
    model = trace_encoder(encoder, "fused")
    with WeightsFile(folder / "encoder.data") as weights:
        weights.save(model, folder / "encoder.onnx")
    (convolution,) = [n for n in model.graph if n.name == "backbone.vit.blocks.1.temporal/DepthwiseTemporalConv"]
    weight = convolution.inputs[1]
    weight.const_value = ir.tensor(-weight.const_value.numpy(), name=weight.name)
    ir.save(model, folder / "damaged.onnx")
    return encoder, folder / "encoder.onnx", folder / "damaged.onnx"


def clips(count=2):
    return np.random.default_rng(0).integers(0, 256, (count, 4, 56, 56, 3), dtype=np.uint8)


def test_custom_operators_are_compared_and_the_damaged_one_is_found(traced):
    rows = compare_graphs(*traced[1:], [{"frames": clip[None]} for clip in clips()])
    operators = {row.value: row.operator for row in rows}
    assert operators["backbone.vit.blocks.0.temporal/DepthwiseTemporalConv"] == "DepthwiseTemporalConv"
    assert operators["backbone.downsampling.1/DepthwiseTemporalConv"] == "DepthwiseTemporalConv"
    assert rows[-1].value == "visual_tokens"
    assert first_broken(rows).value == "backbone.vit.blocks.1.temporal/DepthwiseTemporalConv"


def test_values_are_what_their_modules_compute(traced):
    import torch

    encoder, path, _ = traced
    modules = ["backbone.vit.blocks.0.mlp.fc1", "backbone.vit.blocks.1.attn.proj", "projector.fc2"]
    seen = {}
    hooks = [
        encoder.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
        for name in modules
    ]
    with torch.no_grad():
        encoder(torch.from_numpy(clips(1)))
    for hook in hooks:
        hook.remove()
    (values,) = LayerGraph.load(path).runs([f"{name}/Add" for name in modules], [{"frames": clips(1)}])
    for name in modules:
        np.testing.assert_allclose(values[f"{name}/Add"], seen[name].numpy(), rtol=1e-4, atol=1e-5)


def test_caches_of_fixed_and_of_growing_capacity_are_compared(tiny_artifact, tiny_package, tmp_path, call):
    from liteframe.export.artifact import load_artifact
    from liteframe.export.trace import WeightsFile, trace_decoder

    fixed = tmp_path / "decoder.onnx"
    with WeightsFile(tmp_path / "decoder.data") as weights:
        weights.save(trace_decoder(load_artifact(tiny_artifact).decoder, "fused", capacity=512), fixed)
    for order in ((fixed, tiny_package.folder / "decoder.onnx"), (tiny_package.folder / "decoder.onnx", fixed)):
        code, out, err = call("drift", *order, "--output", tmp_path / f"report-{order[0].parent.name}", "--json")
        assert (code, err) == (0, "")
        rows = json.loads(out.splitlines()[-1])["graphs"]["decoder"]["rows"]
        assert "model.layers.1.mlp.down_proj/MatMul" in {row["value"] for row in rows}
        assert min(row["cosine"] for row in rows) > 1 - 1e-9


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys, monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["liteframe", *map(str, arguments)])
        return cli.main(), *capsys.readouterr()

    return call


@pytest.fixture
def sources(tmp_path):
    np.save(tmp_path / "clips.npy", clips(6))
    return tmp_path / "clips.npy"


def test_a_package_does_not_drift_from_itself(call, tiny_package, tmp_path, sources):
    output = tmp_path / "report"
    code, out, err = call("drift", tiny_package.folder, tiny_package.folder, sources, "--output", output, "--json")
    assert (code, err) == (0, "")
    assert sorted(path.name for path in output.iterdir()) == ["drift-decoder.png", "drift-encoder.png", "drift.html"]
    document = json.loads(out.splitlines()[-1])
    assert document["report"] == str(output / "drift.html")
    assert [*document["graphs"]] == ["encoder", "decoder"]
    for graph in document["graphs"].values():
        assert graph["first_broken"] is None
        assert {row["snr_db"] for row in graph["rows"]} == {None}  # infinite
        assert {row["max_abs_error"] for row in graph["rows"]} == {0}
        assert min(row["cosine"] for row in graph["rows"]) == pytest.approx(1, abs=1e-12)
    assert {row["value"] for row in document["graphs"]["encoder"]["rows"]} >= {"visual_tokens", "projector/Gelu"}
    assert {row["value"] for row in document["graphs"]["decoder"]["rows"]} >= {"logits", "k_cache_1_out"}


def test_a_broken_candidate_exits_with_0_and_is_told(call, traced, tmp_path, sources):
    code, out, err = call("drift", *traced[1:], sources, "--output", tmp_path / "report", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out.splitlines()[-1])["graphs"]["encoder"]
    name = "backbone.vit.blocks.1.temporal/DepthwiseTemporalConv"
    number = 1 + [row["value"] for row in document["rows"]].index(name)
    assert document["first_broken"] == document["rows"][number - 1]
    assert f"the first that breaks is number {number}, {name}: " in out
    assert name in (tmp_path / "report/drift.html").read_text()


def renamed(path, **names):
    """x -> m/Neg -> y, with other names."""
    x, value, y = ({"x": "x", "value": "m/Neg", "y": "y"} | names).values()
    nodes = [oh.make_node("Neg", [x], [value], "m/Neg"), oh.make_node("Abs", [value], [y], "m/Abs")]
    return save_graph(path, nodes, {}, {x: (FLOAT, ["rows", WIDTH])}, (y,))


@pytest.mark.parametrize(
    ("names", "fragments"),
    [
        ({"x": "z"}, ["input x is ['rows', 8]", "and not there in", "expected two graphs of one model"]),
        ({"value": "n/Neg", "y": "z"}, ["no floating-point value of one name"]),
    ],
)
def test_graphs_that_do_not_belong_together_are_refused(tmp_path, names, fragments):
    paths = renamed(tmp_path / "a.onnx"), renamed(tmp_path / "b.onnx", **names)
    with pytest.raises(InputError) as refused:
        compare_graphs(*paths, feeds())
    for fragment in (*fragments, *map(str, paths)):
        assert fragment in str(refused.value)


@pytest.mark.parametrize(
    ("runs", "fragment"),
    [
        ([], "takes x; expected runs with an array for each"),
        ([{}], "takes x; expected"),
        ([feeds()[0] | {"z": np.zeros(1)}], "and no more"),
        ([{"x": np.zeros((2, 3), np.float32)}], "cannot run it"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(pair, runs, fragment):
    with pytest.raises(InputError, match=fragment):
        compare_graphs(*pair, runs)


def test_damaged_files_are_refused(pair, tmp_path):
    faults = {
        "nowhere": "no such file",
        "text": "not an ONNX graph",
        "empty": "not an ONNX graph",
        "cut": "",
        "no-weights": "cannot run it",
    }
    (tmp_path / "text").write_text("not a graph")
    (tmp_path / "empty").touch()
    (tmp_path / "cut").write_bytes(pair[1].read_bytes()[:-200])
    options = {"save_as_external_data": True, "location": "weights.data", "size_threshold": 0}
    save_layers(tmp_path / "no-weights", weights_of(0), **options)
    (tmp_path / "weights.data").unlink()
    for name, fragment in faults.items():
        for paths in ((tmp_path / name, pair[1]), (pair[0], tmp_path / name)):
            with pytest.raises(InputError) as refused:
                compare_graphs(*paths, feeds())
            assert str(tmp_path / name) in str(refused.value) and fragment in str(refused.value)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"candidate": "nowhere"}, ["nowhere: no such file"]),
        ({"candidate": "decoder"}, ["encoder", "decoder", "expected two graphs of one kind"]),
        ({"candidate": "layers"}, ["takes x; expected a graph that takes frames or inputs_embeds"]),
        ({"reference": "folder"}, ["folder: not an engine package"]),
        ({"clips": None}, ["0 sources"]),
        ({"clips": "nowhere.npy"}, ["nowhere.npy"]),
        ({"output": "folder"}, ["folder: already exists; remove it or choose another --output"]),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing(
    call, tiny_package, traced, pair, tmp_path, sources, changes, fragments
):
    (tmp_path / "folder").mkdir()
    paths = {
        "encoder": traced[1],
        "decoder": tiny_package.folder / "decoder.onnx",
        "layers": pair[0],
        "clips.npy": sources,
    }
    given = {"reference": "encoder", "candidate": "encoder", "clips": "clips.npy", "output": "report", **changes}
    reference, candidate, *clips, output = (
        paths.get(name, tmp_path / name) for name in given.values() if name is not None
    )
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call("drift", reference, candidate, *clips, "--output", output)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("liteframe: ")
    for fragment in fragments:
        assert fragment in line
    assert sorted(tmp_path.rglob("*")) == before
