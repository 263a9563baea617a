"""What a decoder's precision costs, in perplexity: how well its graph predicts a real text, token by token.

    ids ──cut into windows──▶ embeddings ──decoder, its logits at every position──▶ -log p(next token) ──▶ perplexity

A decoder gives the logits of its last position only, and the node that selects it is made to select all of them. Every
other node stays as it is, so that what is measured is the graph or the ONNX Runtime engine that will be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ..engines.package import InputError
from .observe import open_tapped
from .sensitivity import divergences

# between the last position and the logits; a row of what they compute depends on the same row of what they read only
ROW_BY_ROW = frozenset(
    """Gemm MatMul FusedMatMul MatMulNBits MatMulInteger MatMulIntegerToFloat QLinearMatMul QGemm QuantizeLinear
    DequantizeLinear Add Mul Cast Identity Reshape""".split()
)
ROWS = 32  # of logits taken to double precision at a time
CONFIDENCE = 0.95


def token_losses(
    decoder: Path,
    embeddings: NDArray,
    ids: NDArray[np.int64],
    window: int = 512,
    progress: Callable[[int], object] | None = None,
    threads: int | None = None,
) -> NDArray[np.float64]:
    """Negative log likelihood of tokens given those before them: nats, float64 (windows, window - 1).

    `ids` (tokens,) are cut into windows that do not overlap, what is left at the end is not used. Each window starts
    with an empty cache, and its first token is given. NaN where the decoder's logits are not finite.

    Args:
        decoder: a decoder graph of either dialect, or ONNX Runtime's engine, as docs/package.md specifies them; read
            only, its weights beside it.
        embeddings: (vocabulary, D), perhaps memory-mapped.
        progress: told how many windows are done, after each.
        threads: of ONNX Runtime; None leaves it to choose.

    Raises:
        InputError: the decoder is not such a graph, ids are not in the vocabulary or do not fill a window, or a window
            is longer than the decoder's cache.
    """
    losses = []
    for number, (tokens, logits) in enumerate(_window_logits(decoder, embeddings, ids, window, threads), start=1):
        losses.append(_negative_log_likelihoods(logits, tokens[1:]))
        if progress is not None:
            progress(number)
    return np.stack(losses)


def token_divergences(
    reference: Path, decoder: Path, embeddings: NDArray, ids: NDArray[np.int64], window: int = 512
) -> NDArray[np.float64]:
    """Kullback-Leibler divergence, in nats, of the decoder's next-token distributions from the reference's: float64
    (windows, window - 1), over windows as in `token_losses`.

    On text that was sampled from the reference, its mean is the expected increase of the mean loss. The increase itself
    varies with the tokens that happened to be drawn, this does not.

    Raises:
        InputError: as `token_losses`.
    """
    both = (_window_logits(path, embeddings, ids, window) for path in (reference, decoder))
    return np.stack([divergences(expected, found) for (_, expected), (_, found) in zip(*both, strict=True)])


def _window_logits(
    decoder: Path, embeddings: NDArray, ids: NDArray[np.int64], window: int, threads: int | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray]]:
    """The tokens of each window, and the logits (window - 1, vocabulary) at all but the last of them."""
    if window < 2 or ids.ndim != 1 or len(ids) < window:
        raise InputError(
            f"token ids of shape {ids.shape} can't be cut into windows of {window}; at least one window of two tokens "
            "or more was expected, give a longer text"
        )
    if ids.min() < 0 or ids.max() >= len(embeddings):
        raise InputError(
            f"token ids from {ids.min()} to {ids.max()} were given, but the embeddings hold tokens 0 to "
            f"{len(embeddings) - 1}; use the tokenizer that belongs to {decoder}"
        )
    session = _open(decoder, threads)
    feed = _empty_caches(decoder, session, window - 1)
    width, dtype = session.get_inputs()[0].shape[2], _dtype(session.get_inputs()[0])
    if embeddings.shape[1:] != (width,):
        raise InputError(f"{decoder}: takes embeddings of {width}, those given are of shape {embeddings.shape}")
    windows = ids[: len(ids) // window * window].reshape(-1, window)
    for tokens in windows:
        feed["inputs_embeds"] = embeddings[tokens[:-1]][None].astype(dtype)
        (logits,) = session.run(["logits"], feed)
        if logits.shape != (window - 1, len(embeddings)):
            raise InputError(
                f"{decoder}: gave logits of shape {logits.shape}, expected {(window - 1, len(embeddings))}; are the "
                "embeddings those of this decoder?"
            )
        yield tokens, logits


def perplexity(losses: NDArray[np.float64]) -> float:
    """exp of the mean loss, for losses in nats."""
    return float(np.exp(losses.mean()))


def cost(reference_losses: NDArray[np.float64], losses: NDArray[np.float64]) -> tuple[float, float]:
    """Relative increase of perplexity over a reference's on the same text, and the half-width of its 95 % confidence
    interval: 0.02 and 0.005 say that perplexity is 2 % higher, give or take half a percent.

    Losses are as of `token_losses`, (windows, window - 1). Both decoders read the same windows, so what counts is how
    the mean of their differences varies from window to window; the interval is normal (20 windows will do), its width
    carried from the mean m to exp(m) - 1 by the derivative. It is infinite for a single window.

    Raises:
        InputError: the losses are not of the same tokens.
    """
    if losses.shape != reference_losses.shape or losses.ndim != 2:
        raise InputError(
            f"losses of shape {losses.shape} can't be compared with a reference's of {reference_losses.shape}; measure "
            "both on the same tokens, in the same windows"
        )
    difference = (losses - reference_losses).mean(axis=1)
    mean, count = difference.mean(), len(difference)
    error = difference.std(ddof=1) / np.sqrt(count) if count > 1 else np.inf
    quantile = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return float(np.expm1(mean)), float(np.exp(mean) * quantile * error)


def _open(decoder: Path, threads: int | None) -> ort.InferenceSession:
    try:
        model = ir.load(decoder)
    except Exception as error:  # whatever a file that is no graph makes the parser stumble over
        raise InputError(f"{decoder}: not an ONNX graph ({error}); expected a decoder's") from None
    select_all_positions(model, decoder)
    try:
        return open_tapped(model, decoder.parent, [], threads)
    except Exception as error:  # the library's errors share no base class
        raise InputError(f"{decoder}: ONNX Runtime {ort.__version__} cannot load it: {error}") from None


def select_all_positions(model: ir.Model, decoder: Path) -> None:
    """Gather(x, -1) along axis 1 of (1, S, D) gives the last position (1, D), along axis 0 all of them, (S, D)."""
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    inputs = [value.name for value in model.graph.inputs[:2]]
    if logits is None or inputs != ["inputs_embeds", "write_index"]:
        raise InputError(f"{decoder}: not a decoder, whose inputs are inputs_embeds, write_index and caches")
    pending, selecting, passed = [logits], set(), set()
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None or node.op_type == "Constant" or value in passed:
            continue
        passed.add(value)
        if _selects_the_last_position(node):
            selecting.add(node)
        elif node.op_type in ROW_BY_ROW:
            pending += [v for v in node.inputs if v is not None]
        else:
            raise InputError(
                f"{decoder}: {node.name} ({node.op_type}) lies between the last position and the logits, where only "
                f"{', '.join(sorted(ROW_BY_ROW))} can be measured"
            )
    if len(selecting) != 1:
        raise InputError(f"{decoder}: no node selects the last position for the logits, expected a Gather along axis 1")
    selecting.pop().attributes["axis"] = ir.AttrInt64("axis", 0)
    for value in passed:
        value.shape = None  # told one position; ONNX Runtime works it out anew
    logits.shape = ir.Shape(["positions", None])


def _selects_the_last_position(node: ir.Node) -> bool:
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1:
        return False
    index = ir.convenience.get_const_tensor(node.inputs[1])  # type: ignore[arg-type]
    return index is not None and index.numpy().shape == () and int(index.numpy()) == -1


def _empty_caches(decoder: Path, session: ort.InferenceSession, positions: int) -> dict[str, NDArray]:
    """`write_index` and caches that hold nothing yet, of either dialect."""
    feed: dict[str, NDArray] = {"write_index": np.zeros(1, np.int64)}
    for cache in session.get_inputs()[2:]:
        _, heads, length, size = cache.shape
        if isinstance(length, int) and length < positions:
            raise InputError(
                f"{decoder}: its cache holds {length} positions, a window needs {positions}; use shorter windows"
            )
        capacity = length if isinstance(length, int) else 0 if length == "past" else positions
        feed[cache.name] = np.zeros((1, heads, capacity, size), _dtype(cache))
    return feed


def _dtype(value: ort.NodeArg) -> type:
    return np.float16 if value.type == "tensor(float16)" else np.float32


def _negative_log_likelihoods(logits: NDArray, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """log(sum(exp(logits))) - logits[target] of each row, in double precision."""
    losses = np.empty(len(targets))
    for start in range(0, len(targets), ROWS):
        block = slice(start, start + ROWS)
        rows = logits[block].astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinite logits make NaN, as they should
            rows -= rows.max(axis=1, keepdims=True)
            losses[block] = -np.take_along_axis(rows, targets[block, None], axis=1)[:, 0]
            losses[block] += np.log(np.exp(rows, out=rows).sum(axis=1))
    return losses
