"""Costs against double precision and against layers quantised by hand; the layers left out against all subsets."""

from itertools import combinations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.calib.observe import layers_by_activation
from liteframe.calib.placement import Plan
from liteframe.calib.ranges import choose_range
from liteframe.calib.rewrite import apply
from liteframe.calib.sensitivity import divergence, noise, scan, too_costly

QKV = [f"model.layers.0.self_attn.{part}_proj/MatMul" for part in "qkv"]


def pair(seed, scale):
    rng = np.random.default_rng(seed)
    shapes = [(int(rng.integers(1, 6)), 30) for _ in range(3)]
    reference = [(rng.normal(size=shape) * 5).astype(np.float32) for shape in shapes]
    return reference, [a + (rng.normal(size=a.shape) * scale).astype(np.float32) for a in reference]


@given(st.integers(0, 2**32), st.floats(1e-2, 10))
def test_noise_is_numpys(seed, scale):
    reference, candidate = pair(seed, scale)
    a, b = (np.concatenate(arrays).astype(np.float64) for arrays in (reference, candidate))
    assert noise(reference, candidate) == pytest.approx(((a - b) ** 2).sum() / (a**2).sum(), rel=1e-9)


@given(st.integers(0, 2**32), st.floats(1e-1, 10), st.floats(-1e4, 1e4))
def test_divergence_is_numpys_whatever_is_added_to_all_logits(seed, scale, constant):
    reference, candidate = pair(seed, scale)
    a, b = (np.concatenate(arrays).astype(np.float64) for arrays in (reference, candidate))
    p, q = (np.exp(x - x.max(axis=-1, keepdims=True)) for x in (a, b))
    p, q = (x / x.sum(axis=-1, keepdims=True) for x in (p, q))
    expected = (p * np.log(p / q)).sum(axis=-1).mean()
    assert divergence(reference, candidate) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    moved = [x + np.float32(constant) for x in candidate]
    assert divergence(reference, moved) == pytest.approx(expected, rel=0.05, abs=1e-2)


def test_nothing_changed_costs_nothing():
    reference, _ = pair(0, 1)
    assert noise(reference, reference) == divergence(reference, reference) == 0


@given(st.lists(st.integers(0, 64), min_size=1, max_size=8, unique=True), st.integers(0, 200))
def test_the_fewest_and_costliest_layers_are_left_out(values, budget):
    costs = {f"layer {i}": value / 64 for i, value in enumerate(values)}  # sums of which are exact
    budget /= 64
    kept = too_costly(costs, budget)

    def rest(left_out):
        return sum(cost for layer, cost in costs.items() if layer not in left_out)

    enough = [s for n in range(len(costs) + 1) for s in combinations(costs, n) if rest(s) <= budget]
    fewest = [s for s in enough if len(s) == len(enough[0])]
    assert len(kept) == len(fewest[0])
    assert rest(kept) == min(rest(s) for s in fewest)
    assert all(why.startswith(f"sensitivity: alone it costs {costs[layer]:.3g}, ") for layer, why in kept.items())


def test_layers_that_share_an_activation_stay_together_and_count_once():
    costs = {"q": 0.5, "k": 0.5, "v": 0.5, "o": 0.25, "up": 0.125}
    assert too_costly(costs, 0.875).keys() == set()
    assert too_costly(costs, 0.5).keys() == {"q", "k", "v"}
    assert too_costly(costs, 0.125).keys() == {"q", "k", "v", "o"}


def test_a_layers_cost_is_that_of_quantising_it_alone(tiny_graphs, feeds, observed, run):
    key = "decoder", "fused"
    path, told = tiny_graphs[key], []
    ranges = {layer: choose_range(h, "minmax") for layer, h in observed[key].histograms.items()}
    costs = scan(path, feeds[key], "logits", ranges, True, divergence, lambda done, total: told.append((done, total)))
    groups = [group for group in layers_by_activation(ir.load(path)).values() if group != ["lm_head/Gemm"]]
    assert costs.keys() == {layer for group in groups for layer in group}
    assert told == [(i + 1, len(groups)) for i in range(len(groups))]
    model = ir.load(path)
    types = {str(node.name): "fp32" for node in model.graph if node.outputs[0].dtype == ir.DataType.FLOAT}
    apply(model, Plan(types, int8=QKV), ranges, True)
    reference, candidate = ([run(g, feed, ["logits"])["logits"] for feed in feeds[key]] for g in (path, model))
    expected = divergence(reference, candidate)
    assert [costs[layer] for layer in QKV] == pytest.approx([expected] * 3, rel=1e-3)
    assert min(costs.values()) > 0
    some = scan(path, feeds[key], "logits", ranges, True, divergence, only={QKV[1]})
    assert some == {layer: costs[layer] for layer in QKV}
