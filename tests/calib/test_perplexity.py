"""Losses of every token: transformers' own on the same weights, and worked out by hand from the untouched graph, which
is asked for one position at a time."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from liteframe.calib.perplexity import cost, perplexity, token_divergences, token_losses
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.engines.package import InputError
from liteframe.export.models.decoder import Decoder, DecoderConfig
from liteframe.export.trace import WeightsFile, trace_decoder
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, WIDTH, WINDOW, CAPACITY = 50, 32, 12, 20
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
IDS = np.random.default_rng(0).integers(0, VOCABULARY, 3 * WINDOW + 5)
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def llama():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 100.0})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def table(llama):
    return llama.model.embed_tokens.weight.detach().numpy()


def save(model, path):
    with WeightsFile(path.with_suffix(".data")) as weights:
        weights.save(model, path)
    return path


@pytest.fixture(scope="module")
def graphs(llama, tmp_path_factory):
    """name: path, of one decoder in all the forms it comes in."""
    decoder = Decoder(DecoderConfig(**SIZES, head_dim=8, rope_theta=100.0))
    decoder.load_state_dict(llama.state_dict())
    folder = tmp_path_factory.mktemp("graphs")
    fused = save(trace_decoder(decoder, "fused"), folder / "fused.onnx")
    paths = {
        "fused": fused,
        "fixed": save(with_fixed_caches(ir.load(fused)), folder / "fixed.onnx"),
        "plain": save(trace_decoder(decoder, "plain"), folder / "plain.onnx"),
        "half caches": save(with_half_caches(ir.load(fused)), folder / "half.onnx"),
        "int8": save(with_quantised_head(ir.load(fused)), folder / "int8.onnx"),
    }
    for name, path in list(paths.items()):
        for provider in (CPU, CUDA):
            engine = folder / f"{path.stem}-{provider}.onnx"
            paths[f"{name}, {provider}"] = compile_graph(path, engine, provider)[0]
    return paths


def with_fixed_caches(model):
    for cache in (*model.graph.inputs[2:], *model.graph.outputs[1:]):
        cache.shape = ir.Shape([1, 2, CAPACITY, 8])
    return model


def with_half_caches(model):
    for cache in model.graph.inputs[2:]:
        cast = ir.node("Cast", [cache], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].name, cast.outputs[0].dtype = f"{cache.name}_full", ir.DataType.FLOAT
        cache.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, cache)
        cache.dtype = ir.DataType.FLOAT16
        model.graph.insert_before(model.graph[0], cast)
    return model


def constant(model, name, array):
    value = ir.Value(
        name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
    )
    value.shape = ir.Shape(array.shape)
    model.graph.register_initializer(value)
    return value


def with_quantised_head(model):
    """INT8 with a scale for the activation and one for each token, as a Q/DQ pair and a DQ."""
    head = model.graph.outputs[0].producer()
    weights = head.inputs[1].const_value.numpy().T  # (D, vocabulary)
    scale = np.abs(weights).max(axis=0) / 127
    quantised = constant(model, "weights", np.rint(weights / scale).astype(np.int8))
    step, zero = constant(model, "step", np.array(0.02, "f4")), constant(model, "zero", np.array(128, "u1"))
    zeros = constant(model, "zeros", np.zeros(VOCABULARY, np.int8))
    q = ir.node("QuantizeLinear", [head.inputs[0], step, zero], name="q")
    dq = ir.node("DequantizeLinear", [q.outputs[0], step, zero], name="dq")
    w = ir.node("DequantizeLinear", [quantised, constant(model, "scales", scale), zeros], {"axis": 1}, name="w")
    for node, dtype in ((q, ir.DataType.UINT8), (dq, ir.DataType.FLOAT), (w, ir.DataType.FLOAT)):
        node.outputs[0].name, node.outputs[0].dtype = node.name, dtype
    product = ir.node("MatMul", [dq.outputs[0], w.outputs[0]])
    logits = model.graph.outputs[0]
    model.graph.insert_before(head, [q, dq, w, product])
    product.outputs[0].name, product.outputs[0].shape, product.outputs[0].type = "logits", logits.shape, logits.type
    model.graph.outputs[0] = product.outputs[0]
    model.graph.remove(head, safe=True)
    return model


def open_session(path):
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(path, options, providers=[CPU])


def losses_by_hand(path, table, ids):
    """Each token's loss from a run of its own over the tokens before it, softmax written out in long doubles."""
    session, losses = open_session(path), []
    for end in range(1, len(ids)):
        feed = {"inputs_embeds": table[ids[:end]][None], "write_index": np.array([0])}
        for cache in session.get_inputs()[2:]:
            length = {"past": 0, "capacity": WINDOW}.get(cache.shape[2], cache.shape[2])
            dtype = np.float16 if cache.type == "tensor(float16)" else np.float32
            feed[cache.name] = np.zeros((1, 2, length, 8), dtype)
        ((logits,),) = session.run(["logits"], feed)
        exact = logits.astype(np.longdouble)
        losses.append(-np.log(np.exp(exact[ids[end]]) / np.exp(exact).sum()))
    return np.array(losses, np.float64)


FORMS = [
    f"{name}{engine}"
    for name in ("fused", "fixed", "plain", "half caches", "int8")
    for engine in ("", f", {CPU}", f", {CUDA}")
]


@pytest.mark.parametrize("form", [form for form in FORMS if "int8" not in form])
def test_the_mean_of_a_window_is_transformers_loss(graphs, llama, table, form):
    losses = token_losses(graphs[form], table, IDS, WINDOW, threads=1)
    assert losses.shape == (3, WINDOW - 1) and losses.dtype == np.float64
    windows = torch.from_numpy(IDS[: 3 * WINDOW].reshape(3, WINDOW))
    with torch.no_grad():
        expected = [llama(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
        together = llama(input_ids=windows, labels=windows).loss.item()
    np.testing.assert_allclose(losses.mean(axis=1), expected, rtol=1e-5)
    assert perplexity(losses) == pytest.approx(np.exp(together), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_each_loss_is_that_of_the_untouched_graphs_last_position(graphs, table, form):
    (losses,) = token_losses(graphs[form], table, IDS[:WINDOW], WINDOW, threads=1)
    np.testing.assert_allclose(losses, losses_by_hand(graphs[form], table, IDS[:WINDOW]), rtol=1e-5, atol=1e-5)


def test_compiled_int8_is_not_what_was_written_down(graphs):
    """The form above is one of those that ONNX Runtime fuses."""
    written, compiled = (
        {node.op_type for node in ir.load(graphs[f"int8{engine}"]).graph} for engine in ("", f", {CPU}")
    )
    assert "MatMul" in written and compiled & {"MatMulIntegerToFloat", "QLinearMatMul"}


def test_the_folder_of_the_graph_stays_as_it_is(graphs, table):
    folder = graphs["fused"].parent
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
    token_losses(graphs["fused"], table, IDS, WINDOW)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()} == before


def test_progress_is_told_in_windows_and_embeddings_may_be_mapped(graphs, table, tmp_path):
    np.save(tmp_path / "table.npy", table.astype(np.float16))
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")
    told = []
    losses = token_losses(graphs["plain"], mapped, IDS, WINDOW, progress=told.append, threads=1)
    assert told == [1, 2, 3]
    np.testing.assert_allclose(losses, token_losses(graphs["plain"], table, IDS, WINDOW), rtol=0, atol=0.1)


def scaled_head(graphs, factor):
    model = ir.load(graphs["fused"])
    weights = model.graph.outputs[0].producer().inputs[1]
    weights.const_value = ir.tensor(weights.const_value.numpy() * np.float32(factor), name=weights.name)
    return model


def test_divergence_is_what_the_loss_rises_by_on_average_over_the_references_own_choices(graphs, table, tmp_path):
    """The last token of a window is made each of the vocabulary's in turn, and weighted by its probability."""
    other = save(scaled_head(graphs, 0.5), tmp_path / "other.onnx")
    window = IDS[:WINDOW].copy()
    (divergences,) = token_divergences(graphs["fused"], other, table, window, WINDOW)
    assert divergences.shape == (WINDOW - 1,) and divergences.min() > 0
    windows = np.repeat(window[None], VOCABULARY, axis=0)
    windows[:, -1] = np.arange(VOCABULARY)
    ours, theirs = (token_losses(graph, table, windows.ravel(), WINDOW)[:, -1] for graph in (graphs["fused"], other))
    assert divergences[-1] == pytest.approx(np.exp(-ours) @ (theirs - ours), rel=1e-5)
    np.testing.assert_array_equal(token_divergences(other, other, table, window, WINDOW), 0)


def test_a_decoder_that_knows_nothing_has_the_vocabulary_for_its_perplexity(graphs, table, tmp_path):
    path = save(scaled_head(graphs, 0), tmp_path / "decoder.onnx")
    assert perplexity(token_losses(path, table, IDS, WINDOW)) == pytest.approx(VOCABULARY, rel=1e-12)


def test_logits_far_beyond_what_exp_can_take_are_summed_right(graphs, table, tmp_path):
    path = save(scaled_head(graphs, 1000), tmp_path / "decoder.onnx")
    (losses,) = token_losses(path, table, IDS[:WINDOW], WINDOW)
    assert losses.max() > 1000
    np.testing.assert_allclose(losses, losses_by_hand(path, table, IDS[:WINDOW]), rtol=1e-4, atol=1e-3)


def test_logits_that_are_not_finite_make_no_number(graphs, table, tmp_path):
    path = save(scaled_head(graphs, np.inf), tmp_path / "decoder.onnx")
    assert np.isnan(perplexity(token_losses(path, table, IDS, WINDOW)))


# what is refused


@pytest.mark.parametrize(
    ("ids", "window", "message"),
    [
        (IDS[: WINDOW - 1], WINDOW, r"of shape \(11,\) can't be cut into windows of 12"),
        (IDS, 1, "can't be cut into windows of 1"),
        (IDS[None], WINDOW, r"of shape \(1, 41\)"),
        (IDS + VOCABULARY, WINDOW, "hold tokens 0 to 49; use the tokenizer"),
        (IDS - VOCABULARY, WINDOW, "token ids from -50 to"),
        (IDS, CAPACITY + 2, "its cache holds 20 positions, a window needs 21"),
    ],
)
def test_ids_that_do_not_fit_are_refused(graphs, table, ids, window, message):
    with pytest.raises(InputError, match=message):
        token_losses(graphs["fixed"], table, ids, window)


def test_a_window_may_fill_the_cache(graphs, table):
    assert token_losses(graphs["fixed"], table, IDS, CAPACITY + 1).shape == (1, CAPACITY)


def test_embeddings_of_another_decoder_are_refused(graphs, table):
    with pytest.raises(InputError, match=r"takes embeddings of 32, those given are of shape \(50, 16\)"):
        token_losses(graphs["fused"], table[:, :16], IDS, WINDOW)
    with pytest.raises(InputError, match=r"logits of shape \(11, 50\), expected \(11, 51\)"):
        token_losses(graphs["fused"], np.concatenate([table, table[:1]]), IDS, WINDOW)


def insert_before_the_logits(model, operator, **attributes):
    logits = model.graph.outputs[0]
    node = ir.node(operator, [logits], attributes, name=f"late/{operator}")
    model.graph.append(node)
    logits.name = "inner"
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "logits", logits.shape, logits.type
    model.graph.outputs[0] = node.outputs[0]


def test_a_tail_that_mixes_positions_is_refused(graphs, table, tmp_path):
    model = ir.load(graphs["fused"])
    insert_before_the_logits(model, "Softmax", axis=0)
    path = save(model, tmp_path / "decoder.onnx")
    with pytest.raises(InputError, match=r"decoder\.onnx: late/Softmax \(Softmax\) lies between the last position"):
        token_losses(path, table, IDS, WINDOW)


def test_a_graph_that_selects_another_position_is_refused(graphs, table, tmp_path):
    model = ir.load(graphs["fused"])
    (gather,) = (node for node in model.graph if node.op_type == "Gather")
    index = constant(model, "first", np.array(0))
    gather.replace_input_with(1, index)
    path = save(model, tmp_path / "decoder.onnx")
    with pytest.raises(InputError, match=r"graph/Gather \(Gather\) lies between"):
        token_losses(path, table, IDS, WINDOW)


def test_what_is_no_decoder_is_refused(graphs, table, tmp_path):
    with pytest.raises(InputError, match=r"none\.onnx: not an ONNX graph"):
        token_losses(tmp_path / "none.onnx", table, IDS, WINDOW)
    (tmp_path / "cut.onnx").write_bytes(graphs["fused"].read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cut\.onnx: "):
        token_losses(tmp_path / "cut.onnx", table, IDS, WINDOW)
    (tmp_path / "alone.onnx").write_bytes(graphs["fused"].read_bytes())
    with pytest.raises(InputError, match=r"alone\.onnx: .*fused\.data"):
        token_losses(tmp_path / "alone.onnx", table, IDS, WINDOW)
    model = ir.load(graphs["fused"])
    model.graph.inputs[0].name = "frames"
    with pytest.raises(InputError, match="not a decoder, whose inputs are"):
        token_losses(save(model, tmp_path / "other.onnx"), table, IDS, WINDOW)


# what a difference costs


def test_the_cost_worked_out_by_hand():
    reference = np.array([[1.0, 3.0], [2.0, 2.0], [0.0, 1.0], [4.0, 0.0]])
    losses = np.array([[1.1, 3.3], [2.0, 2.0], [0.1, 1.1], [4.2, -0.4]])  # means of the differences 0.2, 0, 0.1, -0.1
    increase, half_width = cost(reference, losses)
    assert increase == pytest.approx(np.exp(0.05) - 1, rel=1e-12)
    deviation = np.sqrt((0.15**2 + 0.05**2 + 0.05**2 + 0.15**2) / 3)
    assert half_width == pytest.approx(1.959964 * deviation / 2 * np.exp(0.05), rel=1e-6)
    assert perplexity(losses) == pytest.approx(perplexity(reference) * (1 + increase), rel=1e-12)


@given(st.floats(-2, 2), st.integers(2, 30), st.integers(1, 9))
def test_a_constant_difference_is_certain(shift, windows, predictions):
    reference = np.random.default_rng(0).exponential(size=(windows, predictions))
    increase, half_width = cost(reference, reference + shift)
    assert increase == pytest.approx(np.expm1(shift), rel=1e-9, abs=1e-12)
    assert half_width <= 1e-9


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """1000 texts of 40 windows that differ in how hard they are, and in what quantisation does to them."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        reference = rng.exponential(3, size=(40, 20)) + rng.normal(0, 0.5, size=(40, 1))
        losses = reference + 0.03 + rng.normal(0, 0.05, size=(40, 1)) + rng.normal(0, 0.3, size=(40, 20))
        increase, half_width = cost(reference, losses)
        held += abs(increase - np.expm1(0.03)) <= half_width
    assert 920 <= held <= 970


def test_one_window_says_nothing_of_how_sure_it_is():
    assert cost(np.zeros((1, 5)), np.ones((1, 5))) == (pytest.approx(np.e - 1), np.inf)


def test_losses_of_other_tokens_are_not_compared():
    with pytest.raises(InputError, match=r"\(2, 5\) can't be compared with a reference's of \(3, 5\)"):
        cost(np.zeros((3, 5)), np.zeros((2, 5)))
