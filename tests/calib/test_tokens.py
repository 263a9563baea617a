"""Layers with scaled tokens compute what they did, and quantise small tokens as finely as large ones."""

import numpy as np
import onnx_ir as ir
import pytest
from liteframe.calib.layers import compare_graphs
from liteframe.calib.observe import layers_by_activation, observe, observe_channels
from liteframe.calib.outliers import set_apart
from liteframe.calib.placement import linear_layers
from liteframe.calib.tokens import LAYERS, could_be_scaled, scale_tokens
from liteframe.engines.compile_tensorrt import compile_graph
from liteframe.engines.graph_edits import add_initializer, output_like

DOWN = "model.layers.0.mlp.down_proj/MatMul"


@pytest.fixture(
    params=[(name, dialect) for name in ("decoder", "wide") for dialect in ("fused", "plain")], ids="-".join
)
def decoder(request):
    return request.param


def test_the_graph_computes_the_same_under_the_same_names(tiny_graphs, feeds, answers, save, decoder):
    path = tiny_graphs[decoder]
    model = ir.load(path)
    scaled = scale_tokens(model)
    assert scaled == [n.name for n in linear_layers(ir.load(path)) if any(f".{kind}/" in n.name for kind in LAYERS)]
    before, after = (answers(graph, feeds[decoder][:2]) for graph in (path, model))
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()
    edited = save(model)
    names = [{str(v.name) for node in ir.load(graph).graph for v in node.outputs} for graph in (path, edited)]
    assert names[0] <= names[1]
    assert min(row.snr_db for row in compare_graphs(path, edited, feeds[decoder][:1])) > 80


def test_encoders_are_left_alone(tiny_graphs):
    model = ir.load(tiny_graphs["encoder", "fused"])
    before = [node.name for node in model.graph]
    assert scale_tokens(model) == []
    assert [node.name for node in model.graph] == before


def test_others_are_scaled_where_they_are_named(tiny_graphs, feeds, answers, key):
    path = tiny_graphs[key]
    layers = [str(layer.name) for layer in linear_layers(ir.load(path))]
    others = could_be_scaled(ir.load(path), layers)
    left = {layer.rpartition("/")[0].rpartition(".")[2] for layer in {*layers} - others}
    assert left == ({"patch_embedding"} if key[0] == "encoder" else {"lm_head", *LAYERS})
    model = ir.load(path)
    scaled = scale_tokens(model, others)
    assert {*scaled} == {layer for layer in layers if not layer.startswith("lm_head") and "patch" not in layer}
    scales = [node for node in model.graph if str(node.name).endswith("_token_scale")]
    assert len(scales) == len(layers_by_activation(ir.load(path))) - 1  # one for each activation
    before, after = (answers(graph, feeds[key][:2]) for graph in (path, model))
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


def test_what_is_quantised_is_within_one(tiny_graphs, feeds, save, decoder):
    model = ir.load(tiny_graphs[decoder])
    scaled = scale_tokens(model)
    found = observe(save(model), feeds[decoder]).histograms
    for layer in scaled:
        assert found[layer].absmax == pytest.approx(1)


def test_tokens_of_zeros_stay_zeros(tiny_graphs, feeds, run, decoder):
    model = ir.load(tiny_graphs[decoder])
    scale_tokens(model)
    feed = feeds[decoder][0] | {"inputs_embeds": np.zeros_like(feeds[decoder][0]["inputs_embeds"])}
    for path in (tiny_graphs[decoder], model):
        results = run(path, feed)
        assert all(np.isfinite(array).all() for array in results.values())


def test_channels_that_are_set_apart_do_not_count(edited, feeds, answers, run):
    def stand_out(array):
        array[:, 5] *= 40
        return array

    key = "wide", "fused"
    path = edited(key, {"model.layers.0.mlp.up_proj/MatMul:1": stand_out})
    model = ir.load(path)
    assert DOWN in set_apart(model, observe_channels(path, feeds[key]))
    unused = np.flatnonzero(~next(n for n in model.graph if n.name == DOWN).inputs[1].const_value.numpy().any(axis=1))
    assert 5 in unused
    scale_tokens(model)
    before, after = (answers(graph, feeds[key][:2]) for graph in (path, model))
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()
    product = next(n for n in ir.load(path).graph if n.name == DOWN).inputs[0].name
    values = run(model, feeds[key][0], [product, f"{DOWN}_scaled_tokens", f"{DOWN}_token_scale"])
    whole, scaled, scale = values.values()
    assert not scaled[..., unused].any()
    expected = np.abs(np.delete(whole, unused, axis=-1)).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    assert np.abs(whole).max() > 4 * scale.max()


@pytest.mark.parametrize("signed", [True, False])
def test_small_tokens_err_less(edited, feeds, run, in_int8, signed):
    """The up layer multiplies the token that is a hundred times as large as the others; the first of each feed."""
    key = "wide", "fused"
    path = edited(key, {})
    model = ir.load(path)
    layer = next(n for n in model.graph if n.name == DOWN)
    product = layer.inputs[0].producer()  # act(gate) up
    factor = np.ones((1, 7, 1), np.float32)
    factor[:, 0] = 100
    larger = ir.node("Mul", [product.outputs[0], add_initializer(model.graph, "factor", factor)], name="larger")
    output_like(larger, product.outputs[0])
    model.graph.insert_after(product, larger)
    layer.replace_input_with(0, larger.outputs[0])
    ir.save(model, path)
    errors = []
    for edit in (lambda _: None, scale_tokens):
        quantised, made = in_int8(path, feeds[key], edit, "fp32", signed, DOWN)
        assert made.int8 == [DOWN]
        expected, found = (run(graph, feeds[key][0], [DOWN])[DOWN] for graph in (path, quantised))
        errors.append(np.square(found - expected)[:, 1:].mean() / np.square(expected)[:, 1:].mean())
    assert errors[1] < 1e-3 < errors[0]


@pytest.mark.parametrize("dialect", ["fused", "plain"])
def test_tensorrt_compiles_scaled_products_in_int8(tiny_graphs, feeds, specs, save, in_int8, dialect):
    key = "wide", dialect
    model, made = in_int8(tiny_graphs[key], feeds[key], scale_tokens, "fp16")
    inputs = specs(model)
    proof = compile_graph(save(model), inputs, "tensorrt-rtx", ["8.0"]).proof
    assert proof.wrong == []
    assert proof.integer_products == len(made.int8) + len(made.weights)
