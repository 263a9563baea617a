"""An artifact's query encoder: a text encoder, as ONNX, whose vectors can be compared with the video's features.

query_encoder/model.onnx        input_ids int64 [1, tokens] -> query float32 [1, C]
query_encoder/tokenizer.json    which makes the ids, special tokens included
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from tokenizers import Tokenizer

from ..engines.package import InputError
from ..runtime.ort_engine import OrtQueryEncoder
from .models.encoder import VideoEncoder

DIMENSION = "tokens"
TRIED = "Where is the cat?"


@dataclass
class QueryEncoder:
    """
    Attributes:
        graph: whose dimension that varies is named DIMENSION.
    """

    graph: ir.Model
    tokenizer: Tokenizer


def load_query_encoder(folder: Path, encoder: VideoEncoder) -> tuple[QueryEncoder, list[Path]]:
    """Reads and checks a query encoder; also returns its files.

    Raises:
        InputError: a file is missing or damaged, inputs or outputs are others than above, or the query is not as wide
            as the video's features; it fails on a question.
    """
    graph, tokenizer = folder / "model.onnx", folder / "tokenizer.json"
    for path in (graph, tokenizer):
        if not path.is_file():
            raise InputError(f"{path}: missing; a query encoder is model.onnx with tokenizer.json")
    try:
        model = ir.load(graph)
    except Exception as error:  # the library's errors share no base class
        raise InputError(f"{graph}: not an ONNX model ({error}); export it again") from None
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    names = [[value.name for value in values] for values in (inputs, outputs)]
    if names != [["input_ids"], ["query"]]:
        raise InputError(f"{graph}: inputs {names[0]}, outputs {names[1]}; expected input_ids and query")
    ids = inputs[0].shape
    for value, dtype in ((inputs[0], ir.DataType.INT64), (outputs[0], ir.DataType.FLOAT)):
        if value.dtype != dtype:
            raise InputError(f"{graph}: {value.name} is {value.dtype}, expected {dtype}; export it again")
    if ids is None or len(ids) != 2 or isinstance(ids[1], int) or _is_batch(ids):
        found = "of unknown shape" if ids is None else str([str(side) for side in ids])
        raise InputError(f"{graph}: input_ids {found}; expected [1, tokens], the number of tokens left open")
    shape = outputs[0].shape
    if shape is None or len(shape) != 2 or _is_batch(shape) or shape[1] != encoder.merger.config.feature_size:
        found = "of unknown shape" if shape is None else f"of shape {[str(side) for side in shape]}"
        raise InputError(
            f"{graph}: query {found}, the video's features are {encoder.merger.config.feature_size} wide; expected "
            f"[1, {encoder.merger.config.feature_size}], a query encoder trained with this video encoder"
        )
    external = {
        folder / str(value.const_value.location)
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    if external:
        raise InputError(f"{graph}: weights in {min(external).name}; save the model with its weights inside")
    inputs[0].shape = ir.Shape([1, DIMENSION])
    outputs[0].shape = ir.Shape([1, encoder.merger.config.feature_size])
    try:
        loaded = QueryEncoder(model, Tokenizer.from_file(str(tokenizer)))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{tokenizer}: not a tokenizer ({error}); fetch it again") from None
    _try_out(loaded, graph, encoder.merger.config.feature_size)
    return loaded, [graph, tokenizer]


def _is_batch(shape: ir.Shape) -> bool:
    return isinstance(shape[0], int) and shape[0] != 1


def _try_out(query_encoder: QueryEncoder, graph: Path, width: int) -> None:
    try:
        tokens = query_encoder.tokenizer.encode(TRIED).ids
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"{graph.with_name('tokenizer.json')}: can't encode {TRIED!r} ({error}); save it again"
        ) from None
    try:
        query = OrtQueryEncoder(graph, threads=1).encode(tokens)
    except InputError as error:
        raise InputError(f"{graph}: fails on {TRIED!r} ({error}); does its tokenizer.json belong to it?") from None
    if query.shape != (width,) or not np.isfinite(query).all():
        found = "NaN or infinity" if query.shape == (width,) else f"a vector of shape {query.shape}"
        raise InputError(f"{graph}: makes {found} of {TRIED!r}, expected {width} numbers; export it again")
