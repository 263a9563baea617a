"""Smoothed graphs compute what they did, outliers move as SmoothQuant's equation 4 says, and activations calm down."""

import numpy as np
import onnx_ir as ir
import pytest
from liteframe.calib.layers import compare_graphs
from liteframe.calib.observe import observe_channels
from liteframe.calib.placement import linear_layers
from liteframe.calib.smooth import smooth

ATTENTION = "model.layers.0.self_attn"
NORM = "model.layers.0.input_layernorm"
GELU = "backbone.vit.blocks.0.mlp"


def smoothed(path, calls):
    """The smoothed graph, and which layers it reached."""
    model = ir.load(path)
    before = observe_channels(path, calls)
    after = smooth(model, before)
    return model, [layer for layer in before if (after[layer] != before[layer]).any()]


@pytest.fixture
def difference(answers):
    """Between what two graphs answer over two calls, relative to the largest value."""

    def difference(before, after, calls):
        a, b = (answers(model, calls[:2]) for model in (before, after))
        return np.abs(a - b).max() / np.abs(a).max()

    return difference


def weight(model, node, position):
    return next(n for n in model.graph if n.name == node).inputs[position].const_value.numpy()


def column(number, factor):
    def change(array):
        array[..., number] *= factor
        return array

    return change


def test_a_smoothed_graph_computes_the_same(tiny_graphs, feeds, difference, key):
    model, reached = smoothed(tiny_graphs[key], feeds[key])
    assert difference(tiny_graphs[key], model, feeds[key]) <= 1e-5
    layers = {str(node.name) for node in linear_layers(model)}
    assert set(reached) <= layers
    if key[0] == "encoder":
        assert {f"backbone.vit.blocks.{i}.{part}/MatMul" for i in (0, 1) for part in ("attn.qkv", "attn.proj")} <= {
            *reached
        }
    else:  # all but the head, which reads one position of the norm's result
        assert set(reached) >= layers - {"lm_head/Gemm"}


def test_the_values_that_are_scaled_are_listed(tiny_graphs, feeds, run, key):
    """Every value, of all that both graphs compute, that is not the same is on the list."""
    path, call = tiny_graphs[key], feeds[key][0]
    model, _ = smoothed(path, feeds[key])
    kinds = (ir.DataType.FLOAT,)
    values = [str(v.name) for node in ir.load(path).graph for v in node.outputs if v.dtype in kinds]
    before, after = run(path, call, values), run(model, call, values)
    changed = {v for v in values if np.abs(before[v] - after[v]).max() > 1e-4 * np.abs(before[v]).max()}
    assert changed
    assert changed <= {*model.metadata_props["smoothed"].splitlines()}


def test_no_division_passes_through_a_gelu(tiny_graphs, feeds):
    model, reached = smoothed(tiny_graphs["encoder", "fused"], feeds["encoder", "fused"])
    assert f"{GELU}.fc2/MatMul" not in reached
    assert [node.name for node in model.graph] == [node.name for node in ir.load(tiny_graphs["encoder", "fused"]).graph]


def test_factors_are_equation_4(tiny_graphs, feeds, run):
    path, calls = tiny_graphs["decoder", "fused"], feeds["decoder", "fused"]
    before, (after, _) = ir.load(path), smoothed(path, calls)
    names = [f"{ATTENTION}.{part}_proj/MatMul" for part in "qkv"]
    value = f"{NORM}/RMSNormalization"
    x = np.concatenate([run(path, call, [value])[value][0] for call in calls]).astype(np.float64)
    w = np.concatenate([weight(before, name, 1) for name in names], axis=1).astype(np.float64)
    s = np.abs(x).max(axis=0) ** 0.3 / np.abs(w).max(axis=1) ** 0.7
    np.testing.assert_allclose(weight(after, value, 1), weight(before, value, 1) / s, rtol=1e-5)
    for name in names[:2]:
        np.testing.assert_allclose(weight(after, name, 1), s[:, None] * weight(before, name, 1), rtol=1e-5)


def test_query_heads_that_share_a_key_value_head_share_factors(tiny_graphs, feeds, run):
    """4 query heads on 2 key-value heads: rows of the output layer in the order of query heads."""
    path, calls = tiny_graphs["decoder", "fused"], feeds["decoder", "fused"]
    before, (after, _) = ir.load(path), smoothed(path, calls)
    name, value = f"{ATTENTION}.o_proj/MatMul", f"{ATTENTION}/Reshape_4"
    x = np.concatenate([run(path, call, [value])[value][0] for call in calls]).astype(np.float64)
    w = weight(before, name, 1).astype(np.float64)
    x, w = (array.reshape(2, 2, 6).max(axis=1) for array in (np.abs(x).max(axis=0), np.abs(w).max(axis=1)))
    s = np.repeat((x**0.3 / w**0.7)[:, None], 2, axis=1).reshape(-1)
    np.testing.assert_allclose(weight(after, name, 1), s[:, None] * weight(before, name, 1), rtol=1e-5)


@pytest.mark.parametrize("dialect", ["fused", "plain"])
def test_an_outlier_channel_shrinks(edited, feeds, run, difference, dialect):
    path = edited(("decoder", dialect), {f"{NORM}.weight": column(5, 50)})
    model, _ = smoothed(path, feeds["decoder", dialect])
    layer = next(node for node in model.graph if node.name == f"{ATTENTION}.q_proj/MatMul")
    value = str(layer.inputs[0].name)
    before, after = (np.abs(run(g, feeds["decoder", dialect][0], [value])[value][0]).max(axis=0) for g in (path, model))
    assert before.argmax() == 5
    assert before.max() / np.median(before) > 30
    assert after.max() / np.median(after) < 15
    assert difference(path, model, feeds["decoder", dialect]) <= 1e-5


def test_a_channel_that_is_never_used_keeps_its_weights(edited, feeds, difference):
    path = edited(("decoder", "fused"), {f"{NORM}.weight": column(5, 0)})
    model, _ = smoothed(path, feeds["decoder", "fused"])
    name = f"{ATTENTION}.q_proj/MatMul"
    np.testing.assert_array_equal(weight(model, name, 1)[5], weight(ir.load(path), name, 1)[5])
    assert difference(path, model, feeds["decoder", "fused"]) <= 1e-5


def test_drift_compares_what_is_scaled_after_scaling_it_back(tiny_graphs, feeds, tmp_path, key):
    """So that in a smoothed graph nothing drifts, and a wrong factor in a layer still does."""
    path, calls = tiny_graphs[key], feeds[key][:1]
    model, _ = smoothed(path, feeds[key])
    ir.save(model, tmp_path / "smoothed.onnx", external_data="smoothed.data")
    assert min(row.snr_db for row in compare_graphs(path, tmp_path / "smoothed.onnx", calls)) > 80
    layer = next(n for n in model.graph if str(n.name).endswith(("down_proj/MatMul", "mlp.fc2/MatMul")))
    wrong = layer.inputs[1].const_value.numpy() * np.float32(1.2)
    layer.inputs[1].const_value = ir.tensor(wrong, name=layer.inputs[1].name)
    ir.save(model, tmp_path / "wrong.onnx", external_data="wrong.data")
    rows = {row.value: row.snr_db for row in compare_graphs(path, tmp_path / "wrong.onnx", calls)}
    assert rows[str(layer.outputs[0].name)] == pytest.approx(20 * np.log10(1 / 0.2), abs=0.1)
