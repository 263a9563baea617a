"""Module -> ONNX graph in a dialect, written with its weights beside it.

    encoder   frames uint8 [clips, T, H, W, 3]  ->  visual_tokens [clips, tokens_per_clip, D], and with a second
              connector features [clips, tokens_per_clip, C]
    decoder   inputs_embeds [1, sequence, D], write_index int64 [1], caches  ->  logits [1, vocabulary], caches
    merger    features [clips, tokens_per_clip, C], query [1, C], key_features [1, tokens_per_clip, C],
              redundancy_weight [1], temperature [1]  ->  merged_tokens [clips, D]; C is D without a second connector

The caches are k_cache_0, v_cache_0, k_cache_1, ... [1, kv_heads, length, head_dim], their updates carry the suffix
`_out`. `length` is the capacity in the `fused` dialect, where a runtime may bind an update to its cache's own buffer,
and the number of past positions in `plain`, where each update is longer than its cache by `sequence`.

Graphs are reproducible: the same weights give the same bytes. Nodes are named after the module they come from.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from .models.attention import Dialect, use_dialect
from .models.decoder import Decoder
from .models.encoder import EncoderWithFeatures, VideoEncoder
from .models.merge import FeatureMerger
from .ops import DOMAIN, depthwise_temporal_conv, weighted_average_pool

OPSETS: dict[Dialect, int] = {"fused": 24, "plain": 20}
OPERATORS = {op.NAME: op for op in (depthwise_temporal_conv, weighted_average_pool)}

MAX_CLIPS = 1 << 16
MAX_POSITIONS = 1 << 24


def cache_names(layers: int) -> list[str]:
    """Graph inputs of the KV cache in order; outputs add the suffix `_out`."""
    return [f"{kind}_cache_{i}" for i in range(layers) for kind in ("k", "v")]


def trace_encoder(encoder: VideoEncoder, dialect: Dialect) -> ir.Model:
    """The encoder graph; see the head of this file."""
    shape = (encoder.config.clip_length, *encoder.config.vit.image_size)
    if encoder.config.merge_connector:
        return trace_frames(EncoderWithFeatures(encoder), shape, ["visual_tokens", "features"], dialect)
    return trace_frames(encoder, shape, ["visual_tokens"], dialect)


def trace_frames(module: nn.Module, shape: tuple[int, int, int], outputs: list[str], dialect: Dialect) -> ir.Model:
    """The graph of any module that takes frames uint8 (clips, T, H, W, 3) of one `shape` (T, H, W)."""
    frames = torch.zeros((2, *shape, 3), dtype=torch.uint8)
    clips = torch.export.Dim("clips", min=1, max=MAX_CLIPS)
    return _trace(module, (frames,), ({0: clips},), ["frames"], outputs, dialect)


def trace_merger(merger: FeatureMerger, dialect: Dialect) -> ir.Model:
    """The merger graph; see the head of this file."""
    size = merger.config.feature_size
    clips, patches = (torch.export.Dim(name, min=1, max=MAX_CLIPS) for name in ("clips", "patches"))
    shapes = {
        "features": (2, 5, size),
        "query": (1, size),
        "key_features": (1, 5, size),
        "redundancy_weight": (1,),
        "temperature": (1,),
    }
    return _trace(
        merger,
        tuple(torch.ones(shape) for shape in shapes.values()),
        ({0: clips, 1: patches}, None, {1: patches}, None, None),
        [*shapes],
        ["merged_tokens"],
        dialect,
    )


def trace_decoder(decoder: Decoder, dialect: Dialect, capacity: int | None = None) -> ir.Model:
    """The decoder graph; see the head of this file.

    Args:
        capacity: fixes the capacity of `fused` caches, as TensorRT demands; None leaves it to run time.
    """
    caches = decoder.empty_caches(16)
    names = cache_names(decoder.config.num_hidden_layers)
    sequence = torch.export.Dim("sequence", min=1, max=MAX_POSITIONS)
    if dialect == "fused":
        length = torch.export.Dim("capacity", min=1, max=MAX_POSITIONS)
    else:
        length = torch.export.Dim("past", min=0, max=MAX_POSITIONS)
    model = _trace(
        decoder,
        (torch.zeros(1, 5, decoder.config.hidden_size), torch.tensor([3]), caches),
        ({1: sequence}, None, [{2: length}] * len(caches)),
        ["inputs_embeds", "write_index", *names],
        ["logits", *(f"{name}_out" for name in names)],
        dialect,
    )
    if capacity is not None and dialect == "fused":
        fix_capacity(model, capacity)
    return model


def fix_capacity(decoder: ir.Model, capacity: int) -> None:
    """Gives the caches of a `fused` decoder graph a size."""
    for value in (*decoder.graph.inputs[2:], *decoder.graph.outputs[1:]):
        assert value.shape is not None
        value.shape = ir.Shape([*value.shape[:2], capacity, value.shape[3]])


def _trace(
    module: nn.Module,
    arguments: tuple[Tensor | list[Tensor], ...],
    dynamic_shapes: tuple,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dialect: Dialect,
) -> ir.Model:
    opset = OPSETS[dialect]
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), use_dialect(dialect), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                arguments,
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    model = program.model
    # transposed weights are folded whatever their size: engines and quantisers want them as plain initializers
    onnxscript.optimizer.fold_constants(model, input_size_limit=1 << 40, output_size_limit=1 << 40)
    onnxscript.optimizer.remove_unused_nodes(model)
    if dialect == "plain":
        _take_shapes_after_casts(model)
    _add_functions(model, opset)
    _name_after_modules(model)
    model.producer_name, model.producer_version = "liteframe", version("liteframe")
    return model


def _take_shapes_after_casts(model: ir.Model) -> None:
    """TensorRT 10's first parsers document UINT8 for Cast alone, not for Shape."""
    for value in model.graph.inputs:
        readers = [user for user, _ in value.uses()]
        cast = next((user for user in readers if user.op_type == "Cast"), None)
        for user in readers:
            if cast is not None and user.op_type == "Shape":
                user.replace_input_with(0, cast.outputs[0])
    model.graph.sort()


def _add_functions(model: ir.Model, opset: int) -> None:
    """Gives every custom node its body. Function bodies passed to the exporter would be inlined, so they come after."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name in sorted(used):
        function = ir.serde.deserialize_function(OPERATORS[name].function_body(opset))
        model.functions[function.identifier()] = function


def _name_after_modules(model: ir.Model) -> None:
    """Nodes become `module.path/OpType`, anonymous weights `module.path/OpType:input`; stack traces are dropped."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
        path = [s for s in _parse_list(scopes)[:-1] if s and not s.startswith("_empty")]
        name = f"{path[-1] if path else 'graph'}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.name = f"{node.name}:{value.index()}" if len(node.outputs) > 1 else node.name
    for node in model.graph:
        for position, weight in enumerate(node.inputs):
            if weight is not None and weight.is_initializer() and str(weight.name).startswith(("val_", "_", "permute")):
                between = ":" if len(node.outputs) == 1 else ":input"  # ":1" is the second output of TopK
                weight.name = f"{node.name}{between}{position}"
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "main_graph"


def _parse_list(text: str) -> list[str]:
    return [item.strip().strip("'\"") for item in text.strip("[]").split(",")]


class WeightsFile:
    """External data shared by several graphs: equal tensors are stored once, however many graphs hold them."""

    ALIGNMENT = 4096
    INLINE_BYTES = 1024

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("wb")
        self._offsets: dict[bytes, int] = {}

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def save(self, model: ir.Model, path: Path) -> None:
        """Writes `model` to `path`, its larger weights to this file, which must lie in the same folder."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes <= self.INLINE_BYTES:
                value.const_value = ir.tensor(np.array(tensor.numpy()), name=value.name)
                continue
            data = tensor.tobytes()
            digest = hashlib.sha256(data).digest()
            if digest not in self._offsets:
                self._file.seek(-self._file.tell() % self.ALIGNMENT, 1)
                self._offsets[digest] = self._file.tell()
                self._file.write(data)
            value.const_value = ir.ExternalTensor(
                location=self.path.name,
                offset=self._offsets[digest],
                length=len(data),
                dtype=tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
                base_dir=self.path.parent,
            )
        self._file.flush()
        ir.save(model, path)
