"""Rewrites of a graph into what ONNX Runtime's CPU provider does best. Its own optimiser does none of them.

x DQ(W)                                      -> MatMulNBits of com.microsoft
DQ(x) DQ(W) + bias                           -> MatMulIntegerToFloat of com.microsoft. Left to itself, the optimiser
                                                makes a Gemm of product and bias, which then runs in FP32
x W, cut in three                            -> three products: no copies
heads apart, Attention, heads together again -> MultiHeadAttention of com.microsoft: blockwise (flash) attention
                                                that never holds the scores of all pairs, and no transposes
attention over a KV cache                    -> GroupQueryAttention of com.microsoft; see cpu_attention.py
an operator on FP16                          -> the operator on FP32 between Casts. There are no FP16 kernels; left to
                                                itself, ONNX Runtime drops the rounding between operators, too
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase, RewriteRuleSet

from .cpu_attention import MICROSOFT, use_group_query_attention
from .graph_edits import add_cast, add_initializer, bias_behind

BLOCKS = (128, 64, 32, 16)  # along the inputs of MatMulNBits
WIDENED = "_widened"  # ends the names of FP16 values in FP32
INT8_ACCURACY = 4  # its `accuracy_level` that multiplies integers


class _ThreeProducts(RewriteRuleClassBase):
    def pattern(self, op, x, weight, bias):
        product = op.MatMul(x, weight, _outputs=["product"])
        return op.Split(op.Add(product, bias), num_outputs=3, _allow_other_attributes=True, _outputs=["q", "k", "v"])

    def check(self, op, weight: ir.Value, bias: ir.Value, q: ir.Value, **_) -> MatchResult:
        result, split = MatchResult(), q.producer()
        axis = split.attributes.get_int("axis", 0) if split is not None else 0
        if not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
            return result.fail("not a matrix of weights")
        if bias.shape is None or bias.shape.dims != weight.shape.dims[1:]:
            return result.fail("not a bias for each column")
        if q.shape is None or axis not in (-1, len(q.shape) - 1) or weight.shape.numpy()[1] % 3:
            return result.fail("not cut in three along the last axis")
        return result

    def rewrite(self, op, x: ir.Value, weight: ir.Value, bias: ir.Value, product: ir.Value, **_):
        third = weight.shape.numpy()[1] // 3  # type: ignore[union-attr]

        def part(value: ir.Value, axis: int, number: int) -> ir.Value:
            bounds = [number * third], [(number + 1) * third], [axis]
            return op.Slice(value, *(op.Constant(value_ints=bound) for bound in bounds))  # of constants: it is folded

        return tuple(
            op.Add(_named(op.MatMul(x, part(weight, 1, i)), product, f"MatMul_{'qkv'[i]}"), part(bias, 0, i))
            for i in range(3)
        )


class _MultiHeadAttention(RewriteRuleClassBase):
    def pattern(self, op, q, k, v, apart, together):
        q, k, v = (op.Transpose(op.Reshape(x, apart), perm=[0, 2, 1, 3]) for x in (q, k, v))
        # no scale, no mask, not causal
        attended = op.Attention(q, k, v, _allow_other_attributes=False, _outputs=["attended"])
        return op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), together)

    def check(self, op, q: ir.Value, apart: ir.Value, together: ir.Value, **_) -> MatchResult:
        sizes, joined = ir.convenience.get_const_tensor(apart), ir.convenience.get_const_tensor(together)
        if sizes is None or joined is None or sizes.size != 4 or joined.size != 3:
            return MatchResult().fail("heads are not cut out of one axis")
        if q.shape is not None and isinstance(q.shape[1], int) and sizes.numpy()[1] not in (0, q.shape[1]):
            return MatchResult().fail("sequences are joined on the way")
        return MatchResult()

    def rewrite(self, op, q, k, v, apart: ir.Value, attended: ir.Value, **_):
        heads = int(apart.const_value.numpy()[2])  # type: ignore[union-attr]
        fused = op.MultiHeadAttention(q, k, v, num_heads=heads, _domain=MICROSOFT, _version=1)
        return _named(fused, attended, "MultiHeadAttention")


def _named(value: ir.Value, replaced: ir.Value, operator: str) -> ir.Value:
    """Names the node behind `value` after the module whose node it replaces."""
    module = str(replaced.producer().name).rpartition("/")[0]  # type: ignore[union-attr]
    value.producer().name = f"{module}/{operator}"  # type: ignore[union-attr]
    return value


class _ThreeIntegerProducts(RewriteRuleClassBase):
    def pattern(self, op, x, weight, x_scale, scale, x_zero, zero, bias):
        product = op.MatMulIntegerToFloat(
            x, weight, x_scale, scale, x_zero, zero, bias, _domain=MICROSOFT, _outputs=["product"]
        )
        return op.Split(product, num_outputs=3, _allow_other_attributes=True, _outputs=["q", "k", "v"])

    def check(self, op, q: ir.Value, **_) -> MatchResult:
        axis = q.producer().attributes.get_int("axis", 0)  # type: ignore[union-attr]
        if q.shape is None or axis not in (-1, len(q.shape) - 1):
            return MatchResult().fail("not cut in three along the last axis")
        return MatchResult()

    def rewrite(self, op, x, weight, x_scale, scale, x_zero, zero, bias, product: ir.Value, **_):
        third = weight.shape.numpy()[1] // 3

        def part(value: ir.Value, axis: int, number: int) -> ir.Value:
            bounds = [number * third], [(number + 1) * third], [axis]
            return op.Slice(value, *(op.Constant(value_ints=bound) for bound in bounds))

        parts = []
        for i in range(3):
            columns = (part(value, axis, i) for value, axis in ((weight, 1), (scale, 0), (zero, 0), (bias, 0)))
            w, s, z, b = columns
            made = op.MatMulIntegerToFloat(x, w, x_scale, s, x_zero, z, b, _domain=MICROSOFT, _version=1)
            parts.append(_named(made, product, f"MatMul_{'qkv'[i]}"))
        return tuple(parts)


def _use_integer_products(model: ir.Model) -> int:
    """Products of a dequantised activation with dequantised weights, and the bias behind them, in one kernel."""
    count = 0
    for product in list(model.graph):
        if product.op_type != "MatMul":
            continue
        x, weight = (value.producer() if value is not None else None for value in product.inputs)
        if x is None or weight is None or not x.op_type == weight.op_type == "DequantizeLinear":
            continue
        if len(x.inputs) != 3 or len(weight.inputs) != 3 or weight.attributes.get_int("axis", 1) != 1:
            continue
        inputs = [x.inputs[0], weight.inputs[0], x.inputs[1], weight.inputs[1], x.inputs[2], weight.inputs[2]]
        replaced = [product]
        if (found := bias_behind(product)) is not None:
            add, position = found
            inputs.append(add.inputs[position])
            replaced.append(add)
        made = ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=product.name)
        ir.convenience.replace_nodes_and_values(
            model.graph, replaced[-1], replaced, [made], replaced[-1].outputs, made.outputs
        )
        count += 1
    return count


def _use_block_products(model: ir.Model) -> int:
    """Products of an activation with dequantised weights: MatMulNBits, which quantises each token's activation by
    blocks as it runs."""
    count = 0
    for product in list(model.graph):
        weight = product.inputs[1].producer() if product.op_type == "MatMul" and product.inputs[1] is not None else None
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        stored, scale = weight.inputs[:2]
        if stored is None or scale is None or stored.const_value is None or scale.const_value is None:
            continue
        integers = stored.const_value.numpy().astype("int8")  # (K, N)
        scales = scale.const_value.numpy().astype("float32")
        bits = 4 if stored.dtype == ir.DataType.INT4 else 8
        rows, columns = integers.shape
        block = weight.attributes.get_int("block_size", 0) or next((b for b in BLOCKS if rows % b == 0), BLOCKS[-1])
        count_of_blocks = -(-rows // block)
        if scales.ndim == 1:  # a scale for each channel is one for each of its blocks
            scales = np.broadcast_to(scales, (count_of_blocks, columns))
        padded = np.pad(integers, ((0, count_of_blocks * block - rows), (0, 0)))
        unsigned = (padded.T.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
        packed = unsigned.reshape(columns, count_of_blocks, block)
        if bits == 4:
            packed = (packed[..., ::2] | packed[..., 1::2] << 4).astype(np.uint8)
        inputs = [
            product.inputs[0],
            add_initializer(model.graph, f"{product.name}:1_packed", packed),
            add_initializer(model.graph, f"{product.name}:1_scales", np.ascontiguousarray(scales.T)),
        ]
        attributes = {"K": rows, "N": columns, "bits": bits, "block_size": block, "accuracy_level": INT8_ACCURACY}
        made = ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=product.name)
        ir.convenience.replace_nodes_and_values(model.graph, product, [product], [made], product.outputs, made.outputs)
        count += 1
    return count


def rewrite_for_cpu(model: ir.Model) -> int:
    """Applies all rewrites wherever they fit, and says how often; everything else stays as it is."""
    functions = dict(model.functions)
    model.functions.clear()  # their attribute references are more than the matcher takes
    count = _use_integer_products(model) + _use_block_products(model) + use_group_query_attention(model)
    if count:
        model.graph.opset_imports.setdefault(MICROSOFT, 1)
        ir.passes.common.RemoveUnusedNodesPass()(model)
    rules = [_ThreeProducts.rule(), _ThreeIntegerProducts.rule(), _MultiHeadAttention.rule()]
    count += RewriteRuleSet(rules).apply_to_model(model)
    model.functions.update(functions)
    return count + make_half_explicit(model)


# they move values about without computing, in any type
MOVES = frozenset(
    """Cast Concat Expand Gather Identity Reshape Shape Slice Split Squeeze TensorScatter Transpose Unsqueeze
    QuantizeLinear DequantizeLinear""".split()
)


def make_half_explicit(model: ir.Model) -> int:
    """Every operator that computes in FP16 becomes one that computes in FP32, between Casts; returns how many.

    Weights become FP32 with the same values. A result is thus rounded to FP16 once an operator, as on a GPU that
    accumulates in FP32.
    """
    graph, half, full = model.graph, ir.DataType.FLOAT16, ir.DataType.FLOAT
    widened: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in list(graph):
        for output in node.outputs:
            if output.dtype is None:  # made by a rewrite
                made_from = next((v.dtype for v in node.inputs if v is not None), None)
                output.type = None if made_from is None else ir.TensorType(made_from)
        if node.op_type in MOVES or not any(v is not None and v.dtype == half for v in (*node.inputs, *node.outputs)):
            continue
        count += 1
        for position, value in enumerate(node.inputs):
            if value is None or value.dtype != half:
                continue
            if value not in widened:
                widened[value] = _widen(graph, value)
            node.replace_input_with(position, widened[value])
        for output in node.outputs:
            if output.dtype != half:
                continue
            cast = ir.node("Cast", [output], {"to": int(half)}, name=f"{node.name}_round")
            rounded = cast.outputs[0]
            output.replace_all_uses_with(rounded, replace_graph_outputs=True)
            cast.replace_input_with(0, output)
            rounded.name, rounded.dtype, rounded.shape = output.name, half, output.shape
            output.name, output.dtype = f"{output.name}_unrounded", full
            graph.insert_after(node, cast)
    if count:
        for value in [v for v in graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
            del graph.initializers[str(value.name)]
    return count


def _widen(graph: ir.Graph, value: ir.Value) -> ir.Value:
    name = f"{value.name}{WIDENED}"
    if value.is_initializer():
        assert value.const_value is not None
        return add_initializer(graph, name, value.const_value.numpy().astype("float32"))
    return add_cast(graph, value, ir.DataType.FLOAT, name)
