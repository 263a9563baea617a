"""Rewrites of a graph into what ONNX Runtime's CPU provider does best. Its own optimiser knows neither.

x W, cut in three                            -> three products: no copies
heads apart, Attention, heads together again -> MultiHeadAttention of com.microsoft: blockwise (flash) attention
                                                that never holds the scores of all pairs, and no transposes
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase, RewriteRuleSet


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

    def check(self, op, apart: ir.Value, together: ir.Value, **_) -> MatchResult:
        sizes, joined = ir.convenience.get_const_tensor(apart), ir.convenience.get_const_tensor(together)
        if sizes is None or joined is None or sizes.size != 4 or joined.size != 3:
            return MatchResult().fail("heads are not cut out of one axis")
        return MatchResult()

    def rewrite(self, op, q, k, v, apart: ir.Value, attended: ir.Value, **_):
        heads = int(apart.const_value.numpy()[2])  # type: ignore[union-attr]
        fused = op.MultiHeadAttention(q, k, v, num_heads=heads, _domain="com.microsoft", _version=1)
        return _named(fused, attended, "MultiHeadAttention")


def _named(value: ir.Value, replaced: ir.Value, operator: str) -> ir.Value:
    """Names the node behind `value` after the module whose node it replaces."""
    module = str(replaced.producer().name).rpartition("/")[0]  # type: ignore[union-attr]
    value.producer().name = f"{module}/{operator}"  # type: ignore[union-attr]
    return value


def rewrite_for_cpu(model: ir.Model) -> int:
    """Applies both rewrites wherever they fit, and says how often; everything else stays as it is."""
    functions = dict(model.functions)
    model.functions.clear()  # their attribute references are more than the matcher takes
    count = RewriteRuleSet([_ThreeProducts.rule(), _MultiHeadAttention.rule()]).apply_to_model(model)
    model.functions.update(functions)
    return count
