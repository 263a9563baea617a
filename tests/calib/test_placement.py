"""The rules of precision on real graphs: what is an island and why, what becomes INT8, what range the audit saves."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from liteframe.calib.observe import observe
from liteframe.calib.placement import FP16_LIMIT, INT4_BLOCK, linear_layers, plan
from liteframe.calib.rewrite import apply
from liteframe.engines.compile_onnxruntime import compile_graph

HEAD = "lm_head/Gemm"
PATCHES = "backbone.vit.patch_embedding/MatMul"
# an FP32 residual beyond 65504, by a weight scaled
OVERFLOWS = {
    "encoder": ("backbone.vit.blocks.0.mlp.fc2/MatMul:1", 1e6, "backbone.vit.blocks.0/Add_2"),
    "decoder": ("model.layers.0.mlp.down_proj/MatMul:1", 1e6, "model.layers.0/Add_2"),
}


@pytest.fixture
def model(tiny_graphs, key):
    return ir.load(tiny_graphs[key])


def reasons(model):
    """Node -> why it is FP32, from the operators' names and the modules of the PyTorch model."""
    found = {}
    for node in model.graph:
        name, operator = str(node.name), str(node.op_type)
        module = name.rpartition("/")[0]
        if node.outputs[0].dtype != ir.DataType.FLOAT:
            continue
        if "norm" in module.rpartition(".")[2]:
            found[name] = "norm"
        elif operator == "Softmax" or (operator == "Where" and "self_attn" in module):
            found[name] = "softmax"
        elif module == "model" and operator in ("Cast", "Mul", "Concat", "Cos", "Sin"):
            found[name] = "angles"
        elif name in ("graph/Cast", "graph/Reshape", "graph/Sub", "graph/Div") or (
            module == "backbone.vit.patch_embedding" and operator in ("Reshape", "Transpose")
        ):
            found[name] = "pixels"
    return found


def test_islands_are_norms_softmax_angles_and_pixels_and_nothing_else(model, key):
    made = plan(model, "fp16", "fp16", {})
    expected = reasons(model)
    differing = {
        node: (made.islands.get(node), expected.get(node))
        for node in {*made.islands, *expected}
        if made.islands.get(node) != expected.get(node)
    }
    assert differing == {}
    floats = {str(node.name) for node in model.graph if node.outputs[0].dtype == ir.DataType.FLOAT}
    assert made.types == {name: "fp32" if name in expected else "fp16" for name in floats}
    counts = Counter(made.islands.values())
    assert counts["norm"] >= 5
    assert bool(counts["pixels"]) == (key[0] == "encoder")
    assert bool(counts["angles"]) == (key[0] != "encoder")
    assert bool(counts["softmax"]) == (key[1] == "plain")
    assert not (made.int8 or made.weights or made.kept)


def test_in_fp32_there_are_no_islands(model):
    made = plan(model, "fp32", "fp32", {"graph/Div": 1e9})
    assert {*made.types.values()} == {"fp32"}
    assert not made.islands


def test_a_value_beyond_the_limit_puts_what_computes_and_reads_it_into_fp32(model, key):
    value = OVERFLOWS["encoder" if key[0] == "encoder" else "decoder"][2]
    node = next(node for node in model.graph if node.name == value)
    involved = {value, *(str(user.name) for user, _ in node.outputs[0].uses())}
    before = plan(model, "fp16", "fp16", {value: FP16_LIMIT}).islands
    after = plan(model, "fp16", "fp16", {value: 70000.0}).islands
    added = {name: after[name] for name in after.keys() - before.keys()}
    assert added.keys() == involved - before.keys()
    assert {*added.values()} == {f"range: {value} reaches 7e+04"}


def test_inputs_and_outputs_keep_float32_but_caches_become_fp16(model):
    before = {v.name: v.dtype for v in (*model.graph.inputs, *model.graph.outputs)}
    apply(model, plan(model, "fp16", "fp16", {}), {}, True)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.dtype == (ir.DataType.FLOAT16 if "cache" in value.name else before[value.name])


@pytest.mark.parametrize("beside", ["fp32", "fp16"])
def test_int8_takes_every_layer_but_patches_and_the_head(model, key, beside):
    layers = {str(node.name) for node in linear_layers(model)}
    assert layers == {
        str(node.name) for node in model.graph if node.op_type == "Gemm" or any(
            node.op_type == "MatMul" and v.is_initializer() for v in node.inputs
        )
    }  # fmt: skip
    made = plan(model, beside, "int8", {})
    assert set(made.int8) == layers - {PATCHES, HEAD}
    assert made.weights == ({} if key[0] == "encoder" else {HEAD: 8})
    assert made.kept == ({PATCHES: "pixels"} if key[0] == "encoder" else {})


def test_layers_that_are_kept_are_named_with_reasons(model):
    names = [str(node.name) for node in linear_layers(model)][1:3]
    kept = dict.fromkeys(names, "it costs")
    made = plan(model, "fp16", "int8", {}, kept)
    assert kept.items() <= made.kept.items()
    assert not set(names) & {*made.int8, *made.weights}
    made = plan(model, "fp16", "int8", {}, kept, weights_of_kept=True)
    assert kept.items() <= made.kept.items()
    assert [made.weights[name] for name in names] == [8, 8]


@pytest.mark.parametrize(("asked", "bits"), [("int8-weights", 8), ("int4-weights", 4)])
def test_weights_alone(model, key, asked, bits):
    made = plan(model, "fp16", asked, {})
    fits = {str(node.name): bool(node.inputs[1].shape[0] % INT4_BLOCK == 0) for node in linear_layers(model)}
    assert made.weights == {
        name: bits if whole and name != HEAD else 8 for name, whole in fits.items() if name != PATCHES
    }
    assert not made.int8


@pytest.mark.parametrize("dialect", ["fused", "plain"])
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_checkpoint_that_overflows_fp16_is_saved_by_the_audit(edited, feeds, answers, tmp_path, name, dialect):
    weight, factor, value = OVERFLOWS[name]
    path, calls = edited((name, dialect), {weight: lambda array: array * np.float32(factor)}), feeds[name, dialect]
    largest = observe(path, calls).largest
    assert largest[value] > 65504
    expected = answers(path, calls[:1]).astype(np.float64).ravel()
    cosines = {}
    for audit, known in {"with": largest, "without": {}}.items():
        model = ir.load(path)
        made = plan(model, "fp16", "fp16", known)
        apply(model, made, {}, True)
        ir.save(model, tmp_path / f"{audit}.onnx", external_data=f"{audit}.weights")
        engine, *_ = compile_graph(
            tmp_path / f"{audit}.onnx", tmp_path / f"{audit}.engine.onnx", "CPUExecutionProvider"
        )
        found = answers(engine, calls[:1]).astype(np.float64).ravel()
        cosines[audit] = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
        assert made.islands.get(value, "").startswith("range: ") == (audit == "with")
    assert cosines["with"] >= 0.999
    assert not cosines["without"] >= 0.999  # NaN, for the most part
