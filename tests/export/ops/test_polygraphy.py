"""polygraphy's operator references know both custom operators, by the attributes that exported nodes carry."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from liteframe.export.models.liteframe import StridedConv
from liteframe.export.models.reducers import WeightedAveragePooling
from liteframe.export.ops import polygraphy_reference  # noqa: F401 - registers
from liteframe.export.trace import _trace
from onnx_ir import serde
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.backend.pluginref import PluginRefRunner
from polygraphy.comparator import Comparator, SimpleCompareFunc

MODULES = {
    "DepthwiseTemporalConv": (StridedConv(8, (4, 4, 4), (2, 2, 2)), (4, 17, 8)),
    "WeightedAveragePool": (WeightedAveragePooling((4, 4, 4), (4, 2, 2)), (2, 4, 17, 8)),
}


@pytest.mark.parametrize("name", MODULES)
def test_pluginref_agrees_with_onnx_runtime_on_an_exported_node(name):
    module, shape = MODULES[name]
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    model = serde.serialize_model(_trace(module, (torch.zeros(shape),), (None,), ["x"], ["y"], "fused"))
    graph = gs.import_onnx(model)
    (node,) = [n for n in graph.nodes if n.op == name]
    assert node.domain == "liteframe"
    source, target = node.inputs[0], node.outputs[0]
    graph.nodes, graph.inputs, graph.outputs = [node], [source], [target]
    source.shape = (1, 4, 16, 8) if name == "DepthwiseTemporalConv" else shape
    source.dtype = target.dtype = np.float32
    feed = {source.name: np.random.default_rng(0).standard_normal(source.shape).astype(np.float32)}
    runners = [
        PluginRefRunner(graph),
        OnnxrtRunner(SessionFromOnnx(gs.export_onnx(graph).SerializeToString())),
    ]
    results = Comparator.run(runners, data_loader=[feed])
    assert bool(Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=1e-5, rtol=1e-5)))
