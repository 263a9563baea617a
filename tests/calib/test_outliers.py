"""Layers with outliers set apart compute what they did, and what is left to quantise has no outliers."""

import numpy as np
import onnx_ir as ir
import pytest
from liteframe.calib.layers import compare_graphs
from liteframe.calib.observe import observe, observe_channels
from liteframe.calib.outliers import SHARE, set_apart
from liteframe.calib.placement import OF_OUTLIERS, linear_layers
from liteframe.engines.compile_tensorrt import compile_graph

NORM = "model.layers.0.input_layernorm"
ATTENTION = "model.layers.0.self_attn"
GELU = "backbone.vit.blocks.0.mlp"


def stand_out(array):
    array[..., 5] = 40
    return array


@pytest.fixture
def outlier(edited):
    """A graph with a channel of large activations before the query, key and value layers, or behind a GELU."""

    def outlier(key):
        if key[0] != "encoder":
            return edited(key, {f"{NORM}.weight": stand_out}), f"{ATTENTION}.q_proj/MatMul"
        return edited(key, {f"{GELU}.fc1/MatMul:1": stand_out, f"{GELU}.fc1.bias": stand_out}), f"{GELU}.fc2/MatMul"

    return outlier


def test_the_graph_computes_the_same_under_the_same_names(outlier, feeds, answers, save, key):
    path, layer = outlier(key)
    model = ir.load(path)
    split = set_apart(model, observe_channels(path, feeds[key]))
    assert layer in split
    before, after = (answers(graph, feeds[key][:2]) for graph in (path, model))
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()
    edited = save(model)
    names = [{str(v.name) for node in ir.load(graph).graph for v in node.outputs} for graph in (path, edited)]
    assert len(names[0] - names[1]) <= len(split)  # products whose bias is added before the outliers' part
    common = [row.snr_db for row in compare_graphs(path, edited, feeds[key][:1])]
    assert min(common) > 80


def test_outliers_meet_zeros_and_their_rows_are_whole_apart(outlier, feeds):
    path, layer = outlier(("decoder", "fused"))
    channels = observe_channels(path, feeds["decoder", "fused"])
    before, model = ir.load(path), ir.load(path)
    set_apart(model, channels)
    whole, rest, rows = (
        next(n for n in graph.graph if n.name == name).inputs[1].const_value.numpy()
        for graph, name in ((before, layer), (model, layer), (model, f"{layer}_of_outliers"))
    )
    index = next(n for n in model.graph if n.op_type == "Gather" and str(n.name).endswith("_outliers"))
    chosen = index.inputs[1].const_value.numpy()
    np.testing.assert_array_equal(chosen, np.sort(np.argsort(-channels[layer])[: len(whole) // SHARE]))
    assert 5 in chosen
    np.testing.assert_array_equal(rows, whole[chosen])
    assert not rest[chosen].any()
    others = np.delete(np.arange(len(whole)), chosen)
    np.testing.assert_array_equal(rest[others], whole[others])


def test_ranges_are_those_of_the_other_channels(outlier, feeds, run, save, key):
    path, layer = outlier(key)
    model = ir.load(path)
    set_apart(model, observe_channels(path, feeds[key]))
    rows = next(n for n in model.graph if n.name == layer).inputs
    value, unused = str(rows[0].name), ~rows[1].const_value.numpy().any(axis=1)
    found = observe(save(model), feeds[key]).histograms[layer]
    others = np.concatenate([run(path, call, [value])[value][..., ~unused].ravel() for call in feeds[key]])
    assert found.minimum == pytest.approx(others.min(), rel=1e-4)
    assert found.maximum == pytest.approx(others.max(), rel=1e-4)
    everything = np.concatenate([run(path, call, [value])[value].ravel() for call in feeds[key]])
    assert found.absmax < np.abs(everything).max() / 2


def setting_apart(path, calls):
    return lambda model: set_apart(model, observe_channels(path, calls))


def test_rounding_errs_less(outlier, feeds, answers, in_int8, key):
    path, layer = outlier(key)
    expected = answers(path, feeds[key][:1])
    errors = []
    for edit in (lambda _: None, setting_apart(path, feeds[key])):
        model, made = in_int8(path, feeds[key], edit, "fp32", only=layer)
        assert made.int8 == [layer]
        errors.append(np.square(answers(model, feeds[key][:1]) - expected).mean())
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("dialect", ["fused", "plain"])
def test_tensorrt_compiles_both_products(outlier, feeds, specs, save, in_int8, dialect):
    path, layer = outlier(("encoder", dialect))
    calls = feeds["encoder", dialect]
    model, made = in_int8(path, calls, setting_apart(path, calls), "fp16")
    inputs = specs(model)
    proof = compile_graph(save(model), inputs, "tensorrt-rtx", ["8.0"]).proof
    assert proof.wrong == []
    assert proof.integer_products == len(made.int8) + len(made.weights)
    products = [node for node in model.graph if node.name in (layer, f"{layer}{OF_OUTLIERS}")]
    assert [node.inputs[1].dtype for node in products] == [ir.DataType.FLOAT16] * 2
    assert [node.inputs[1].is_initializer() for node in products] == [False, True]


def test_channels_that_are_alike_stay_together(tiny_graphs, key):
    model = ir.load(tiny_graphs[key])
    widths = {str(n.name): n.inputs[1].shape[0 if n.op_type == "MatMul" else 1] for n in linear_layers(model)}
    assert set_apart(model, {name: np.ones(width, np.float32) for name, width in widths.items()}) == []
