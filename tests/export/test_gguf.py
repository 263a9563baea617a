"""Language models from GGUF files, written by the gguf library: equal to the weights they were made from, and to
what transformers reads from the same file. llama.cpp's converter interleaves the rotary rows of Llama models, so this
does."""

import functools
import json
import re

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from liteframe.engines.package import InputError
from liteframe.export.artifact import load_artifact
from liteframe.export.gguf_decoder import GGUFFile
from liteframe.export.models.decoder import Decoder
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.vit import ViTConfig
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LAYERS, WIDTH, HEADS, KV_HEADS, POSITIONS, EPS, THETA = 2, 64, 4, 2, 128, 1e-2, 100.0
SPECIAL = {"<|im_start|>": TokenType.CONTROL, "<|im_end|>": TokenType.CONTROL, "<think>": TokenType.USER_DEFINED}
VOCABULARY = 330  # of the fixture small_bpe, made to this size here
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    # not hidden_size / heads; the only size that transformers, which ignores key_length here, reads from GGUF
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 128}),
}
every_model = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@functools.cache
def build_model(name):
    model, config, own = MODELS[name]
    made = model(
        config(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            intermediate_size=96,
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            rms_norm_eps=EPS,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            **{"tie_word_embeddings": False, **own},
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return made.eval()


def interleave(weight, heads):
    """The rows of each head, as llama.cpp's convert_hf_to_gguf.py permutes them."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def model_tensors(name):
    """Tensors as the file holds them, by their names in GGUF, which the gguf library knows."""
    architecture = name.removesuffix("-tied")
    number = next(number for number, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    names = gguf.get_tensor_name_map(number, LAYERS)
    tensors = {}
    for theirs, tensor in build_model(name).state_dict().items():
        if theirs == "lm_head.weight" and name.endswith("-tied"):
            continue
        values = tensor.numpy()
        if architecture == "llama" and re.search("[qk]_proj", theirs):
            values = interleave(values, HEADS if "q_proj" in theirs else KV_HEADS)
        tensors[names.get_name(theirs, try_suffixes=(".weight", ".bias"))] = values
    return tensors


def model_fields(name, bpe):
    """Metadata by method of GGUFWriter, as llama.cpp's converter writes it."""
    vocabulary, merges = bpe
    tokens = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    tokens, kinds = [*tokens[: VOCABULARY - len(SPECIAL)], *SPECIAL], [TokenType.NORMAL] * VOCABULARY
    kinds[-len(SPECIAL) :] = SPECIAL.values()
    known = set(tokens)
    head_dim = MODELS[name][2].get("head_dim", WIDTH // HEADS)
    return {
        "add_block_count": LAYERS,
        "add_context_length": POSITIONS,
        "add_embedding_length": WIDTH,
        "add_feed_forward_length": 96,
        "add_head_count": HEADS,
        "add_head_count_kv": KV_HEADS,
        "add_key_length": head_dim,
        "add_value_length": head_dim,
        "add_layer_norm_rms_eps": EPS,
        "add_rope_freq_base": THETA,
        "add_vocab_size": VOCABULARY,
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": "qwen2",
        "add_token_list": tokens,
        "add_token_types": kinds,
        "add_token_merges": [f"{a} {b}" for a, b in merges if {a, b, a + b} <= known],
        "add_eos_token_id": VOCABULARY - 2,
        "add_chat_template": "the template",
    }


@pytest.fixture
def write(tmp_path, small_bpe):
    """Writes a model's file; `fields` and `tensors` change what it holds, None removes one."""

    def write_file(name, fields=None, tensors=None, quantised=None, architecture=None, folder=tmp_path):
        path = folder / "model.gguf"
        writer = GGUFWriter(path, architecture or name.removesuffix("-tied"))
        for method, value in (model_fields(name, small_bpe) | (fields or {})).items():
            if value is not None:
                getattr(writer, method)(value)
        for key, values in (model_tensors(name) | (tensors or {})).items():
            if values is None:
                continue
            kind = (quantised or {}).get(key)
            if kind is None:
                writer.add_tensor(key, np.ascontiguousarray(values))
            else:
                writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write_file


def load(path):
    file = GGUFFile(path)
    decoder = Decoder(file.config()).eval()
    file.load(decoder)
    return decoder


def last_logits(decoder, ids):
    with torch.no_grad():
        embedded = decoder.model.embed_tokens(ids)
        return decoder(embedded, torch.tensor([0]), decoder.empty_caches(ids.shape[1]))[0]


def random_ids():
    return torch.randint(0, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))


# what is read


@every_model
def test_the_weights_are_those_the_file_was_made_from(write, name):
    decoder, model = load(write(name)), build_model(name)
    assert decoder.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(decoder.state_dict()[key], tensor), key
    with torch.no_grad():
        expected = model(input_ids=random_ids()).logits[:, -1]
    assert (last_logits(decoder, random_ids()) - expected).abs().max() <= 1e-4 * expected.abs().max()


@every_model
def test_the_logits_equal_those_of_transformers_from_the_same_file(write, name):
    path = write(name)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(input_ids=random_ids()).logits[:, -1]
    assert (last_logits(load(path), random_ids()) - expected).abs().max() <= 1e-4 * expected.abs().max()


@every_model
def test_the_config_is_the_models(write, name):
    config, theirs = GGUFFile(write(name)).config(), build_model(name).config
    for field in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        assert getattr(config, field) == getattr(theirs, field), field
    assert config.head_dim == MODELS[name][2].get("head_dim", WIDTH // HEADS)
    assert (config.rms_norm_eps, config.rope_theta) == pytest.approx((EPS, THETA))


def test_what_a_file_may_leave_out_gets_llama_cpps_defaults(write):
    left_out = ("add_head_count_kv", "add_key_length", "add_value_length", "add_rope_freq_base")
    full = {"blk.0.attn_k.weight": None, "blk.1.attn_k.weight": None}
    config = GGUFFile(write("llama", dict.fromkeys(left_out), full)).config()
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (HEADS, WIDTH // HEADS, 10000.0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_quantised_tensors_are_within_a_step_of_the_original(write, name, kind):
    query, embedding = "blk.0.attn_q.weight", "token_embd.weight"
    quantised = dict.fromkeys((query, embedding, "blk.1.ffn_down.weight"), GGMLQuantizationType[kind])
    decoder, model = load(write(name, quantised=quantised)), build_model(name)
    steps = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254, "Q4_0": 1 / 7, "Q4_1": 1 / 14}  # of a block's magnitude
    for theirs in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",
    ):
        got, exact = decoder.state_dict()[theirs], model.state_dict()[theirs]
        largest = exact.reshape(-1, 32).abs().amax(1, keepdim=True)
        error = (got - exact).reshape(-1, 32).abs()
        assert (error <= largest * steps[kind] + 2e-3).all(), theirs
        assert error.max() > 0
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(decoder.state_dict()[untouched], model.state_dict()[untouched])


def test_loaded_weights_do_not_depend_on_the_file_any_more(write):
    path = write("qwen2")
    decoder = load(path)
    before = {key: tensor.clone() for key, tensor in decoder.state_dict().items()}
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[key]) for key, tensor in decoder.state_dict().items())


# text


def test_the_tokenizer_is_the_files_own(write, small_bpe):
    path = write("qwen2")
    file = GGUFFile(path)
    tokenizer = file.tokenizer()
    tokens = model_fields("qwen2", small_bpe)["add_token_list"]
    assert [tokenizer.id_to_token(i) for i in range(VOCABULARY)] == tokens
    assert file.chat_template() == "the template"
    assert file.end_of_turn() == [tokens.index("<|im_end|>")]


def test_control_and_user_defined_tokens_are_matched_whole(write):
    tokenizer = GGUFFile(write("qwen2")).tokenizer()
    encoded = tokenizer.encode("<|im_start|>the cat<think>20<|im_end|>")
    assert [token for token in encoded.tokens if token in SPECIAL] == ["<|im_start|>", "<think>", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "<|im_start|>the cat<think>20<|im_end|>"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "the cat<think>20"


@pytest.mark.parametrize(
    ("family", "pieces"),
    [
        ("smollm", ["Ġin", "Ġ", "2", "0", "2", "4", "Ċ", "Ċ", "I", "'", "LL"]),
        ("qwen2", ["Ġin", "Ġ", "2", "0", "2", "4", "ĊĊ", "I", "'LL"]),
        ("gpt-2", ["Ġin", "Ġ2024", "Ċ", "Ċ", "I", "'", "LL"]),
        (None, ["Ġin", "Ġ2024", "Ċ", "Ċ", "I", "'", "LL"]),
    ],
)
def test_the_pre_tokenizer_is_that_of_the_family(write, family, pieces):
    tokenizer = GGUFFile(write("llama", {"add_tokenizer_pre": family})).tokenizer()
    found = tokenizer.pre_tokenizer.pre_tokenize_str(" in 2024\n\nI'LL")
    assert [piece for piece, _ in found] == pieces


# a whole artifact


def test_a_liteframe_folder_may_have_a_gguf_language_model(write, tmp_path):
    config = EncoderConfig(
        backbone=ViTConfig(
            image_size=(28, 28), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        ),
        output_size=WIDTH,
        reducer="none",
    )
    encoder = VideoEncoder(config)
    save_file({f"encoder.{key}": value for key, value in encoder.state_dict().items()}, tmp_path / "model.safetensors")
    content = {
        "model_type": "liteframe",
        "version": 1,
        "encoder": msgspec.to_builtins(config),
        "decoder": {"gguf": "model.gguf"},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    write("llama")
    artifact = load_artifact(tmp_path)
    expected = load(tmp_path / "model.gguf").state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in artifact.decoder.state_dict().items())
    assert (artifact.text.chat_template, artifact.text.end_of_turn) == ("the template", [VOCABULARY - 2])
    write("llama", tensors={"output.weight": model_tensors("llama")["output.weight"] + 1})
    assert load_artifact(tmp_path).sha256 != artifact.sha256


# what is refused


def assert_refused(path, *fragments):
    """Through everything that a build reads of the file."""
    with pytest.raises(InputError) as caught:
        file = GGUFFile(path)
        file.load(Decoder(file.config()))
        file.tokenizer(), file.chat_template(), file.end_of_turn()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for fragment in fragments:
        assert fragment in message
    assert "\n" not in message
    assert len(message.removeprefix(str(path))) <= 250
    assert not re.search(r"\w(Error|Exception)\b", message)


def test_the_fixture_itself_is_not_refused(write):
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_refused(write("qwen2"))


@pytest.mark.parametrize("keep", [0, 3, 20, 1000, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused(write, keep):
    path = write("qwen2")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    assert_refused(path, "truncated or not a GGUF file", "fetch it again")


@pytest.mark.parametrize("content", [b"GGML" * 100, b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert_refused(path, "not a GGUF file")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert_refused(tmp_path / "model.gguf", "no such file")


@pytest.mark.parametrize("architecture", ["gemma2", "bert"])
def test_an_unknown_architecture_is_refused(write, architecture):
    path = write("llama", architecture=architecture)
    assert_refused(path, f"architecture '{architecture}'", "llama, qwen2, qwen3")


UP = "blk.1.ffn_up.weight"


@pytest.mark.parametrize(
    ("name", "tensors", "fragments"),
    [
        ("qwen2", {UP: None}, [f"tensor {UP} is missing"]),
        ("qwen2", {"blk.1.attn_v.bias": None}, ["tensor blk.1.attn_v.bias is missing"]),
        ("qwen3", {"blk.1.attn_k_norm.weight": None}, ["tensor blk.1.attn_k_norm.weight is missing"]),
        ("qwen2", {"token_embd.weight": None}, ["tensor token_embd.weight is missing"]),
        ("qwen2", {"blk.2.ffn_up.weight": np.zeros((96, 64), np.float32)}, ["tensor blk.2.ffn_up.weight has no place"]),
        ("llama", {"blk.0.attn_output.bias": np.zeros(64, np.float32)}, ["tensor blk.0.attn_output.bias has no place"]),
        ("qwen2", {UP: np.zeros((96, 63), np.float32)}, [f"tensor {UP} has shape [96, 63], expected [96, 64]"]),
        ("qwen2", {UP: np.zeros((64, 96), np.float32)}, [f"tensor {UP} has shape [64, 96], expected [96, 64]"]),
        ("qwen2", {"token_embd.weight": np.zeros(330, np.float32)}, ["token_embd.weight has shape [330]"]),
        ("qwen2", {UP: np.full((96, 64), np.nan, np.float32)}, [f"tensor {UP} holds NaN or infinity"]),
        ("qwen2", {UP: np.full((96, 64), -np.inf, np.float16)}, [f"tensor {UP} holds NaN or infinity"]),
        ("qwen2", {UP: np.zeros((96, 64), np.int32)}, [f"tensor {UP} holds I32"]),
        ("llama", {"rope_freqs.weight": np.ones(8, np.float32)}, ["scaled RoPE"]),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(write, name, tensors, fragments):
    assert_refused(write(name, tensors=tensors), *fragments)


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"add_block_count": None}, ["qwen2.block_count is missing"]),
        ({"add_context_length": None}, ["qwen2.context_length is missing"]),
        ({"add_layer_norm_rms_eps": None}, ["qwen2.attention.layer_norm_rms_epsilon is missing"]),
        ({"add_head_count": 0, "add_key_length": None}, ["no decoder can have"]),
        ({"add_head_count": [4, 4]}, ["Expected `int`, got `array`", "$.num_attention_heads"]),
        ({"add_head_count_kv": 3}, ["not a multiple of num_key_value_heads 3"]),
        ({"add_rope_scaling_type": gguf.RopeScalingType.YARN}, ["scaled RoPE"]),
        ({"add_tokenizer_model": "llama"}, ["tokenizer 'llama', expected byte-level BPE"]),
        ({"add_tokenizer_model": None}, ["tokenizer.ggml.model is missing"]),
        ({"add_tokenizer_pre": "chatglm-bpe"}, ["tokenizer family 'chatglm-bpe'", "smollm, qwen2, gpt-2"]),
        ({"add_token_list": None}, ["tokenizer.ggml.tokens is missing"]),
        ({"add_token_types": [1, 1]}, ["not a tokenizer"]),
        ({"add_token_merges": ["a b c"]}, ["merge 'a b c' is not two tokens"]),
        ({"add_token_merges": ["nowhere atall"]}, ["do not make a tokenizer"]),
        ({"add_chat_template": None}, ["tokenizer.chat_template is missing"]),
        ({"add_eos_token_id": None}, ["tokenizer.ggml.eos_token_id is missing"]),
    ],
    ids=str,
)
def test_metadata_that_can_not_be_meant_is_refused(write, fields, fragments):
    assert_refused(write("qwen2", fields), *fragments)
