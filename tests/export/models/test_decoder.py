"""Decoder against the language models of transformers, on small random checkpoints."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liteframe.export.models.attention import use_dialect
from liteframe.export.models.decoder import Decoder, DecoderConfig
from liteframe.export.models.rope import inverse_frequencies
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

CAPACITY, LENGTH, THETA, WIDTH = 48, 40, 100.0, 32
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
}
LLAMA_ROPES = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "dynamic": {"factor": 2.0},
}
# name: (model, its config, arguments that only its config has, arguments that only ours has)
CHECKPOINTS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}, {"head_dim": 8, "qkv_bias": True}),
    "qwen2-tied": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"tie_word_embeddings": True},
        {"head_dim": 8, "qkv_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}, {"head_dim": 16, "qk_norm": True}),
    "qwen3-tied": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 16, "tie_word_embeddings": True},
        {"head_dim": 16, "qk_norm": True, "tie_word_embeddings": True},
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, {}, {"head_dim": 8}),
    "llama-tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True},
        {"head_dim": 8, "tie_word_embeddings": True},
    ),
    "llama-one-head-each": (
        LlamaForCausalLM,
        LlamaConfig,
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 4, "head_dim": 8},
    ),
    "llama-biases": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 8, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
    ),
    **{
        f"llama-{kind}": (
            LlamaForCausalLM,
            LlamaConfig,
            {"head_dim": 16, "rope_parameters": {"rope_type": kind, "rope_theta": THETA, **scaling}},
            {"head_dim": 16, "rope_scaling": {"rope_type": kind, **scaling}},
        )
        for kind, scaling in LLAMA_ROPES.items()
    },
}
every_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)
both_dialects = pytest.mark.parametrize("dialect", ["fused", "plain"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only wait for each other on tensors this small, and for long when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def load(name):
    """Our decoder with the weights of a random checkpoint, that checkpoint's inputs, and transformers' logits there."""
    model, config, theirs_only, ours_only = CHECKPOINTS[name]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    theirs = model(config(**(SIZES | rope | theirs_only), attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, LENGTH, WIDTH, generator=generator)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3, generator=generator)
        logits = theirs(inputs_embeds=inputs, use_cache=False).logits[0]
    ours = Decoder(DecoderConfig(**(SIZES | ours_only), rope_theta=THETA)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, inputs, logits


def assert_equal_logits(name, dialect, sizes):
    """Feeds the checkpoint's inputs in chunks of `sizes` and compares the logits at the end of each."""
    decoder, inputs, expected = load(name)
    with use_dialect(dialect), torch.no_grad():
        start, caches = 0, decoder.empty_caches(CAPACITY if dialect == "fused" else 0)
        for size in sizes:
            logits, caches = decoder(inputs[:, start : start + size], torch.tensor([start]), caches)
            start += size
            assert (logits[0] - expected[start - 1]).abs().max() <= 1e-4 * expected.abs().max()


@every_checkpoint
def test_parameter_names_are_the_checkpoints(name):
    model, config, theirs_only, ours_only = CHECKPOINTS[name]
    with torch.device("meta"):
        theirs, ours = model(config(**(SIZES | theirs_only))), Decoder(DecoderConfig(**(SIZES | ours_only)))
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name.endswith("-tied")])
def test_a_tied_head_is_the_embedding_itself(name):
    decoder = load(name)[0]
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight


@every_checkpoint
@both_dialects
def test_one_shot_prefill_equals_transformers(name, dialect):
    assert_equal_logits(name, dialect, [LENGTH])


@every_checkpoint
@both_dialects
def test_decoding_token_by_token_equals_transformers(name, dialect):
    assert_equal_logits(name, dialect, [1] * LENGTH)


@every_checkpoint
@both_dialects
@settings(max_examples=5, deadline=None)
@given(cuts=st.sets(st.integers(1, LENGTH - 1), min_size=1, max_size=6))
def test_prefill_in_chunks_equals_transformers(name, dialect, cuts):
    edges = [0, *sorted(cuts), LENGTH]
    assert_equal_logits(name, dialect, [b - a for a, b in itertools.pairwise(edges)])


@both_dialects
def test_caches_have_the_length_their_dialect_promises(dialect):
    decoder, inputs, _ = load("qwen2")
    with use_dialect(dialect), torch.no_grad():
        _, caches = decoder(inputs, torch.tensor([0]), decoder.empty_caches(CAPACITY if dialect == "fused" else 0))
    length = CAPACITY if dialect == "fused" else LENGTH
    assert [tuple(cache.shape) for cache in caches] == [(1, 2, length, 8)] * 4


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        LLAMA3,
        LLAMA3 | {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 16.0},
        YARN,
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
        YARN | {"attention_factor": 1.5, "truncate": False},
        YARN | {"factor": 1.0, "original_max_position_embeddings": 131072},
        {"rope_type": "yarn", "factor": 2.0},
    ],
    ids=str,
)
def test_rope_frequencies_equal_transformers(scaling, head_dim, theta):
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    initialise = ROPE_INIT_FUNCTIONS.get(scaling["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, expected_factor = initialise(config)
    frequencies, factor = inverse_frequencies(head_dim, theta, scaling, 131072)
    torch.testing.assert_close(frequencies, expected, rtol=1e-5, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_rope_type_may_be_under_its_older_name():
    older, _ = inverse_frequencies(64, 1e4, {"type": "linear", "factor": 4.0}, 2048)
    default, _ = inverse_frequencies(64, 1e4, {}, 2048)
    torch.testing.assert_close(older * 4, default)


@pytest.mark.parametrize("kind", ["longrope", "mrope", ""])
def test_an_unknown_rope_type_is_refused(kind):
    with pytest.raises(ValueError, match=f"'{kind}' is not supported"):
        inverse_frequencies(64, 1e4, {"rope_type": kind, "factor": 4.0}, 2048)


@pytest.mark.parametrize(
    ("scaling", "missing"),
    [({"rope_type": "linear"}, "factor"), ({"rope_type": "yarn"}, "factor")]
    + [
        ({key: value for key, value in LLAMA3.items() if key != missing}, missing)
        for missing in LLAMA3
        if missing != "rope_type"
    ],
)
def test_a_missing_rope_parameter_is_named(scaling, missing):
    with pytest.raises(ValueError, match=f"lacks the parameter '{missing}'"):
        inverse_frequencies(64, 1e4, scaling, 2048)
