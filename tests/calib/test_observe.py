"""Observation equals NumPy's over values tapped from the unoptimised graph, and what is damaged has a name."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from liteframe.calib.observe import MOVES, layers_by_activation, observe, observe_channels
from liteframe.calib.placement import linear_layers

UNOPTIMISED = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


@pytest.fixture
def tapped(tiny_graphs, feeds, run):
    """Value -> its arrays, one for each feed."""

    def tap(key, values):
        calls = [run(tiny_graphs[key], feed, list(values), UNOPTIMISED) for feed in feeds[key]]
        return {value: [call[value] for call in calls] for value in values}

    return tap


def floats(model):
    return [v.name for node in model.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT]


def test_largest_values_are_numpys(tiny_graphs, observed, tapped, key):
    model = ir.load(tiny_graphs[key])
    nodes = {v.name: node for node in model.graph for v in node.outputs}
    arrays = tapped(key, floats(model))
    assert arrays.keys() - observed[key].largest.keys() <= {"backbone/Expand"}  # copies of a weight
    assert observed[key].largest.keys() <= arrays.keys()
    for value, calls in arrays.items():
        expected = max(float(np.abs(array).max()) for array in calls)
        found = observed[key].largest.get(value, expected)
        if nodes[value].op_type in MOVES:  # it may be part of what it was taken from
            assert found >= expected * (1 - 1e-5), value
        else:
            assert found == pytest.approx(expected, rel=1e-4), value


def test_histograms_are_numpys(tiny_graphs, observed, tapped, key):
    layers = {str(node.name): node.inputs[0].name for node in linear_layers(ir.load(tiny_graphs[key]))}
    arrays = tapped(key, sorted({*layers.values()}))
    assert observed[key].histograms.keys() == layers.keys()
    for layer, value in layers.items():
        histogram, values = observed[key].histograms[layer], np.concatenate([a.ravel() for a in arrays[value]])
        edges = histogram.edges()
        expected, _ = np.histogram(values.astype(np.float64), edges)
        assert histogram.counts.sum() == values.size
        # the optimised graph rounds otherwise: a value on an edge falls to either side
        assert np.abs(np.cumsum(histogram.counts) - np.cumsum(expected)).max() <= 0.01 * values.size
        np.testing.assert_allclose([histogram.minimum, histogram.maximum], [values.min(), values.max()], rtol=1e-4)


def test_channels_are_numpys(tiny_graphs, feeds, tapped, key):
    channels = observe_channels(tiny_graphs[key], feeds[key])
    layers = {str(node.name): node.inputs[0].name for node in linear_layers(ir.load(tiny_graphs[key]))}
    arrays = tapped(key, sorted({*layers.values()}))
    assert channels.keys() == layers.keys()
    for layer, found in channels.items():
        flat = np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays[layers[layer]]])
        expected = np.abs(flat).max(axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_layers_that_share_an_activation_share_counts(tiny_graphs, observed):
    key = "decoder", "fused"
    groups = list(layers_by_activation(ir.load(tiny_graphs[key])).values())
    qkv = [f"model.layers.0.self_attn.{part}_proj/MatMul" for part in "qkv"]
    assert qkv in groups
    assert len({id(observed[key].histograms[layer]) for layer in qkv}) == 1
    assert len({id(observed[key].histograms[group[0]]) for group in groups}) == len(groups)


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_damaged_weights_are_reported_by_the_first_value_that_shows_them(edited, feeds, strange):
    path = edited(("decoder", "fused"), {"model.layers.1.mlp.up_proj/MatMul:1": lambda w: w * 0 + strange})
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.mlp/?\S* is not finite in FP32; the weights or the input"
    ):
        observe(path, feeds["decoder", "fused"])


def test_progress_counts_feeds(tiny_graphs, feeds):
    told = []
    observe(tiny_graphs["decoder", "plain"], feeds["decoder", "plain"], told.append)
    assert told == [1, 2, 3]
