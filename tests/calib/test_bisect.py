"""Sets of modules against brute force, what a kept module computes against NumPy, and how the command ends."""

import json
import shutil
import sys
from itertools import combinations

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from liteframe.calib import bisect as module
from liteframe.calib.bisect import bisect, measure, smallest
from liteframe.calib.placement import plan
from liteframe.calib.ranges import choose_range
from liteframe.calib.rewrite import apply
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.engines.package import InputError
from liteframe.runtime import cli
from onnx import numpy_helper

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
WIDTH, LAYERS, TOKENS = 12, 5, 6
NAMES = [f"layers.{i}" for i in range(LAYERS)]


def subsets(items):
    return [frozenset(s) for n in range(len(items) + 1) for s in combinations(items, n)]


# -- the search ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.floats(0, 0.999))
def test_where_costs_add_up_no_set_is_smaller(costs, share):
    order = sorted(range(len(costs)), key=lambda i: -costs[i])

    def enough(kept):
        return sum(costs[i] for i in order if i not in kept) <= share * sum(costs)

    kept = smallest(order, enough)
    assert enough(kept)
    assert len(kept) == min(len(s) for s in subsets(order) if enough(s))


@given(st.integers(1, 6), st.randoms(use_true_random=False))
def test_no_set_has_one_to_spare_whatever_holds(count, random):
    """Even where keeping one more makes it worse."""
    order = list(range(count))
    holding = {s for s in subsets(order) if random.random() < 0.4} - {frozenset()} | {frozenset(order)}
    kept = smallest(order, lambda units: frozenset(units) in holding)
    assert frozenset(kept) in holding
    assert kept == sorted(kept)
    assert all(frozenset(kept) - {unit} not in holding for unit in kept)


# -- quantised layers ------------------------------------------------------------------------------------------------


def network(seed):
    rng = np.random.default_rng(seed)
    weights = [(rng.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH) * 1.5).astype(np.float32) for _ in range(LAYERS)]
    feeds = [{"x": rng.normal(size=(1, TOKENS, WIDTH)).astype(np.float32)} for _ in range(3)]
    return weights, feeds


def save(path, nodes, weights, kind=FLOAT, x="x"):
    graph = oh.make_graph(
        nodes,
        "small",
        [oh.make_tensor_value_info(x, FLOAT, [1, TOKENS, WIDTH])],
        [oh.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10), path)
    return path


def rounded_weights(weight):
    scale = np.abs(weight).max(axis=0) / np.float32(127)
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


def save_network(path, weights, steps=None, factors=None):
    """x -> five times tanh(x W) -> y; with `steps` of activations in INT8, with `factors` (K,) also smoothed."""
    nodes, held, x = [], {}, "x"
    for i, (name, weight) in enumerate(zip(NAMES, weights, strict=True)):
        w = f"{name}/w"
        if steps is None:
            held[w] = weight
        else:
            if factors is not None:
                weight = weight * factors[i][:, None]
                held[f"{name}/inverse"] = 1 / factors[i]
                nodes.append(oh.make_node("Mul", [x, f"{name}/inverse"], [f"{name}/Mul"], f"{name}/Mul"))
                x = f"{name}/Mul"
            held[f"{w}_int8"], held[f"{w}_scale"] = rounded_weights(weight)
            held[f"{name}/step"], held[f"{name}/zero"] = np.float32(steps[i]), np.int8(0)
            step = [f"{name}/step", f"{name}/zero"]
            nodes += [
                oh.make_node("QuantizeLinear", [x, *step], [f"{name}/q"], f"{name}/q"),
                oh.make_node("DequantizeLinear", [f"{name}/q", *step], [f"{name}/dq"], f"{name}/dq"),
                oh.make_node("DequantizeLinear", [f"{w}_int8", f"{w}_scale"], [w], f"{name}/dqw", axis=1),
            ]
            x = f"{name}/dq"
        nodes.append(oh.make_node("MatMul", [x, w], [f"{name}/MatMul"], f"{name}/MatMul"))
        nodes.append(oh.make_node("Tanh", [f"{name}/MatMul"], [f"{name}/Tanh"], f"{name}/Tanh"))
        x = f"{name}/Tanh"
    return save(path, [*nodes, oh.make_node("Identity", [x], ["y"], "y/Identity")], held)


def numpy_figures(weights, steps, feeds, kept):
    """Of the network with all but `kept` quantised, in double precision."""
    cosines = []
    for feed in feeds:
        exact = found = feed["x"].astype(np.float64)
        for name, weight, step in zip(NAMES, weights, steps, strict=True):
            exact, wide = np.tanh(exact @ weight), weight.astype(np.float64)
            if name not in kept:
                integers, scale = rounded_weights(weight)
                found = np.clip(np.rint(found / np.float32(step)), -128, 127) * np.float32(step)
                wide = integers * scale.astype(np.float64)
            found = np.tanh(found @ wide)
        norms = np.linalg.norm(exact, axis=-1) * np.linalg.norm(found, axis=-1)
        cosines.append(((exact * found).sum(-1) / norms).mean())
    return {"mean_cosine": np.mean(cosines), "worst_cosine": np.min(cosines)}


def numpy_holds(figures):
    return figures["mean_cosine"] >= 0.99 and figures["worst_cosine"] >= 0.97


def test_the_two_layers_that_were_made_bad_are_found(tmp_path):
    weights, feeds = network(0)
    steps = np.full(LAYERS, 4 / 127)
    steps[[1, 3]] = 100 / 127  # as one outlier of 100 would have it
    paths = save_network(tmp_path / "a.onnx", weights), save_network(tmp_path / "b.onnx", weights, steps)
    told = []
    found = bisect("encoder", *paths, feeds, progress=lambda what, runs: told.append(runs))
    assert {kept.module for kept in found.kept} == {NAMES[1], NAMES[3]}
    assert found.kept[0].cost >= found.kept[1].cost > 0
    assert (found.asked, found.gate) == ("int8", {"mean_cosine": 0.99, "worst_cosine": 0.97})
    assert (found.modules, found.runs) == (LAYERS, told[-1])
    assert found.before == pytest.approx(numpy_figures(weights, steps, feeds, ()), abs=1e-4)
    assert found.after == pytest.approx(numpy_figures(weights, steps, feeds, {NAMES[1], NAMES[3]}), abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.lists(st.sampled_from([2, 4, 20, 40, 80]), min_size=LAYERS, max_size=LAYERS))
def test_the_gate_holds_with_what_is_kept_and_without_any_one_it_does_not(tmp_path_factory, seed, ranges):
    folder, (weights, feeds), steps = tmp_path_factory.mktemp("bisect"), network(seed), np.array(ranges) / 127
    paths = save_network(folder / "a.onnx", weights), save_network(folder / "b.onnx", weights, steps)
    kept = {row.module for row in bisect("encoder", *paths, feeds).kept}
    figures = {subset: numpy_figures(weights, steps, feeds, subset) for subset in subsets(NAMES)}
    near = [
        f for s, f in figures.items() if abs(f["mean_cosine"] - 0.99) < 1e-4 or abs(f["worst_cosine"] - 0.97) < 1e-4
    ]
    if not near:  # where double precision and single agree about each set
        assert numpy_holds(figures[frozenset(kept)])
        assert not any(numpy_holds(figures[frozenset(kept - {name})]) for name in kept)
        assert len(kept) <= 1 + min(len(s) for s, f in figures.items() if numpy_holds(f))


def test_weights_that_were_smoothed_are_found_again(tmp_path, monkeypatch):
    """Rows scaled over two decades. All are kept, for no gate holds."""
    weights, feeds = network(1)
    rng = np.random.default_rng(2)
    factors = [10 ** rng.uniform(-1, 1, WIDTH).astype(np.float32) for _ in range(LAYERS)]
    steps = np.full(LAYERS, 40 / 127)
    paths = save_network(tmp_path / "a.onnx", weights), save_network(tmp_path / "b.onnx", weights, steps, factors)
    monkeypatch.setitem(module.MEAN_COSINE, "int8", 1.1)
    found = bisect("encoder", *paths, feeds)
    assert found.kept is None
    assert 1 - found.before["mean_cosine"] > 0.1
    assert 1 - found.after["mean_cosine"] < 1e-3


def test_products_that_the_reference_multiplies_in_three_parts_are_found(tmp_path):
    """As its CPU engine does with queries, keys and values, where the candidate's layer was left whole."""
    weights, feeds = network(0)
    steps = np.full(LAYERS, 4 / 127)
    steps[[1, 3]] = 100 / 127
    paths = save_network(tmp_path / "a.onnx", weights), save_network(tmp_path / "b.onnx", weights, steps)
    whole = bisect("encoder", *paths, feeds)
    reference = ir.load(paths[0])
    for node in [node for node in reference.graph if node.op_type == "MatMul"]:
        x, weight = node.inputs
        products = []
        for letter, part in zip("qkv", np.split(weight.const_value.numpy(), 3, axis=1), strict=True):
            name = f"{node.name}_{letter}"
            value = ir.Value(name=f"{name}:1", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(part.shape))
            value.const_value = ir.tensor(part, name=value.name)
            reference.graph.initializers.add(value)
            products.append(ir.node("MatMul", [x, value], name=name))
        joined = ir.node("Concat", [p.outputs[0] for p in products], {"axis": -1}, name=f"{node.name}_joined")
        nodes = [*products, joined]
        ir.convenience.replace_nodes_and_values(reference.graph, node, [node], nodes, node.outputs, joined.outputs)
    ir.save(reference, tmp_path / "split.onnx")
    split = bisect("encoder", tmp_path / "split.onnx", paths[1], feeds)
    assert [row.module for row in split.kept] == [row.module for row in whole.kept]
    assert split.after == pytest.approx(whole.after, abs=1e-6)


def test_a_gate_that_holds_needs_nothing(tmp_path):
    weights, feeds = network(0)
    steps = np.full(LAYERS, 3 / 127)
    paths = save_network(tmp_path / "a.onnx", weights), save_network(tmp_path / "b.onnx", weights, steps)
    found = bisect("encoder", *paths, feeds)
    assert found.kept == [] and found.before == found.after
    assert found.runs == 2 * len(feeds)


# -- graphs of the project -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "signed", "beside", "engine"),
    [
        ("encoder", "int8", False, "fp32", False),
        ("encoder", "int8", False, "fp32", True),
        ("encoder", "int8", True, "fp16", False),  # with centred activations
        ("encoder", "fp16", True, "fp16", False),
        ("encoder", "fp16", True, "fp16", True),
        ("wide", "int8", False, "fp32", True),
        ("wide", "int8-weights", False, "fp32", False),
        ("wide", "int4-weights", False, "fp32", True),
        ("wide", "int8", True, "fp16", False),
    ],
)
def test_all_kept_compute_what_the_reference_does(
    tiny_graphs, feeds, observed, tmp_path, monkeypatch, name, asked, signed, beside, engine
):
    key = name, "fused"
    reference, candidate = tiny_graphs[key], tmp_path / "candidate.onnx"
    model = ir.load(reference)
    ranges = {layer: choose_range(h, "minmax") for layer, h in observed[key].histograms.items()}
    apply(model, plan(model, beside, asked, {}, signed=signed), ranges, signed)
    ir.external_data.load_to_model(model)
    ir.save(model, candidate)
    if engine:
        reference, candidate = (
            compile_graph(graph, tmp_path / f"{number}.engine.onnx", "CPUExecutionProvider")[0]
            for number, graph in enumerate((copied(reference, tmp_path), candidate))
        )
    kind = "encoder" if name == "encoder" else "decoder"
    monkeypatch.setattr(module, "holds", lambda gate, figures: False)
    found = bisect(kind, reference, candidate, feeds[key])
    assert found.asked == asked and found.kept is None
    figure = "mean_cosine" if kind == "encoder" else "divergence"
    before, after = (abs(f[figure] - (kind == "encoder")) for f in (found.before, found.after))
    assert after < 1e-5 and after < before / 4


def copied(graph, folder):
    """Compilers write beside a graph, and this one belongs to all tests."""
    for path in (graph, graph.with_name(f"{graph.name.partition('.')[0]}.data")):
        shutil.copy(path, folder)
    return folder / graph.name


# -- FP16 ------------------------------------------------------------------------------------------------------------


def save_scaled(path, kind):
    """x -> small.W -> big.times 1e5 -> back.times 1e-5 -> last.W; FP16 reaches to 65504."""
    dtype = oh.tensor_dtype_to_np_dtype(kind)
    matrix = (np.random.default_rng(3).normal(size=(WIDTH, WIDTH)) / 4).astype(np.float32)
    weights = {"w": matrix, "v": matrix.T, "up": np.float32(300), "down": np.float32(1 / 300)}
    steps = [("small", "MatMul", "w"), ("big", "Mul", "up"), ("bigger", "Mul", "up"), ("back", "Mul", "down")]
    steps += [("further", "Mul", "down"), ("last", "MatMul", "v")]
    nodes, x = [], "x"
    if kind == HALF:
        nodes.append(oh.make_node("Cast", [x], ["x_fp16"], "x_fp16", to=HALF))
        x = "x_fp16"
    for name, operator, weight in steps:
        nodes.append(oh.make_node(operator, [x, weight], [f"{name}/{operator}"], f"{name}/{operator}"))
        x = f"{name}/{operator}"
    nodes.append(oh.make_node("Cast", [x], ["y"], "y/Cast", to=FLOAT))
    return save(path, nodes, {name: np.asarray(array, dtype) for name, array in weights.items()})


def test_modules_that_leave_fp16s_range_are_kept_with_those_that_read_them(tmp_path):
    """300 * 300 x overflows where it is computed, and where another module reads it as FP16."""
    paths = save_scaled(tmp_path / "a.onnx", FLOAT), save_scaled(tmp_path / "b.onnx", HALF)
    found = bisect("encoder", *paths, network(0)[1])
    assert found.asked == "fp16" and found.gate == {"mean_cosine": 0.9995, "worst_cosine": 0.9995}
    assert {kept.module for kept in found.kept} == {"bigger", "back"}
    assert np.isnan(found.before["mean_cosine"]) and found.after["worst_cosine"] > 0.9995
    assert found.modules == 6


# -- gates and faults ------------------------------------------------------------------------------------------------


def test_figures_are_numpys_and_count_a_decoders_last_positions():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 3, 4)).astype(np.float32) for _ in range(2))
    cosines = [
        np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(*pair, strict=True)])
        for pair in zip(a.astype(float), b.astype(float), strict=True)
    ]
    expected = {"mean_cosine": np.mean(cosines), "worst_cosine": np.min(cosines)}
    assert measure("encoder", [a], [b]) == pytest.approx(expected)
    p, q = (np.exp(x[0].astype(float)) / np.exp(x[0].astype(float)).sum(-1, keepdims=True) for x in (a, b))
    assert measure("decoder", [a[0]], [b[0]])["divergence"] == pytest.approx((p * np.log(p / q)).sum(-1).mean())


def test_other_graphs_are_refused(tmp_path):
    weights, feeds = network(0)
    steps = np.full(LAYERS, 4 / 127)
    rounded = save_network(tmp_path / "rounded.onnx", weights, steps)
    others = save_network(tmp_path / "others.onnx", network(9)[0])
    with pytest.raises(InputError, match=r"layers\.0/MatMul: its weights are not those of .*others\.onnx"):
        bisect("encoder", others, rounded, feeds)
    with pytest.raises(InputError, match=r"layers\.0/MatMul is quantised, and .*b\.onnx has no weights"):
        bisect("encoder", save_scaled(tmp_path / "b.onnx", FLOAT), rounded, feeds)
    exact = save_network(tmp_path / "exact.onnx", weights)
    with pytest.raises(InputError, match="takes x; expected runs with an array for each"):
        bisect("encoder", exact, rounded, [])
    assert bisect("encoder", exact, exact, feeds) is None


@pytest.fixture
def call(capsys, monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["liteframe", "drift", *map(str, arguments)])
        return cli.main(), *capsys.readouterr()

    return call


@pytest.fixture
def rounded(tiny_graphs, observed, tmp_path):
    """The tiny encoder, and it with activations in two bits rather than eight."""
    reference, candidate = tiny_graphs["encoder", "fused"], tmp_path / "rounded.onnx"
    model = ir.load(reference)
    ranges = {layer: choose_range(h, "minmax") for layer, h in observed["encoder", "fused"].histograms.items()}
    apply(
        model,
        plan(model, "fp32", "int8", {}, signed=False),
        {k: (64 * a, 64 * b) for k, (a, b) in ranges.items()},
        False,
    )
    ir.external_data.load_to_model(model)
    ir.save(model, candidate)
    np.save(tmp_path / "clips.npy", np.random.default_rng(0).integers(0, 256, (4, 4, 56, 56, 3), dtype=np.uint8))
    return reference, candidate, tmp_path / "clips.npy"


def test_the_command_tells_what_to_keep(call, rounded, tmp_path):
    code, out, err = call(*rounded, "--bisect", "--output", tmp_path / "report", "--json")
    assert (code, err) == (0, "")
    bisection = json.loads(out.splitlines()[-1])["graphs"]["encoder"]["bisection"]
    assert 0 < len(bisection["kept"]) < bisection["modules"]
    assert bisection["before"]["mean_cosine"] < 0.99 <= bisection["after"]["mean_cosine"]
    page = (tmp_path / "report/drift.html").read_text()
    for row in bisection["kept"]:
        assert f" {row['module']} " in out and f">{row['module']}<" in page


def test_a_gate_out_of_reach_exits_with_1_and_leaves_a_report(call, rounded, tmp_path, monkeypatch):
    monkeypatch.setitem(module.WORST_COSINE, "int8", 1.1)
    code, out, err = call(*rounded, "--bisect", "--output", tmp_path / "report", "--json")
    assert code == 1
    assert err.startswith(f"liteframe: {rounded[1]}: even with every module kept in higher precision the gate of the ")
    assert json.loads(out.splitlines()[-1])["graphs"]["encoder"]["bisection"]["kept"] is None
    assert "does not hold even with all" in (tmp_path / "report/drift.html").read_text()


def test_a_candidate_that_rounds_nothing_exits_with_2(call, rounded, tmp_path):
    reference, _, clips = rounded
    code, out, err = call(reference, reference, clips, "--bisect", "--output", tmp_path / "report")
    assert (code, out) == (2, "")
    assert "no quantised layers and nothing in FP16" in err and not (tmp_path / "report").exists()
