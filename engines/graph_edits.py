"""The edits that every rewrite of a graph is made of."""

from __future__ import annotations

import onnx_ir as ir
from numpy.typing import NDArray


def add_initializer(graph: ir.Graph, name: str, array: NDArray) -> ir.Value:
    """A weight for nodes to read."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def add_cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    """The value in another type, right behind where it is made; the node and its output have that name."""
    cast = ir.node("Cast", [value], {"to": int(to)}, name=name)
    insert_behind(graph, value, [cast])
    out = output_like(cast, value)
    out.dtype = to
    return out


def insert_behind(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Puts nodes behind the one that makes the value, or first, where it is an input of the graph."""
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)


def output_like(node: ir.Node, like: ir.Value) -> ir.Value:
    """The node's output, named after the node, with type and shape of another value."""
    assert like.dtype is not None
    out = node.outputs[0]
    # a type of its own: they are changed in place
    out.name, out.type, out.shape = node.name, ir.TensorType(like.dtype), like.shape
    return out


def bias_behind(layer: ir.Node) -> tuple[ir.Node, int] | None:
    """The Add behind a linear layer that nothing else follows, and which of its inputs is a vector of weights."""
    users = [user for user, _ in layer.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Add" or layer.outputs[0].is_graph_output():
        return None
    for position, value in enumerate(users[0].inputs):
        if value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == 1:
            return users[0], position
    return None
