"""Artifacts: what is read equals what transformers and peft make of the same files; what is damaged is refused.

Every refusal is one or two sentences that start with the file.
"""

import copy
import functools
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import published
import pytest
import torch
from liteframe.engines.package import InputError
from liteframe.export.artifact import load_artifact
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.vit import ViTConfig
from peft import LoraConfig, get_peft_model
from published import MODELS, TEMPLATE, TEXT, build_model, build_student, randomised
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Tokenizer

ROOT = Path(__file__).parents[2]
every_model = pytest.mark.parametrize("name", MODELS)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",  # peft 0.21 with transformers 5.23
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:The following alpha_pattern keys did not match:RuntimeWarning",
    "ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape",
)


@pytest.fixture
def publish(tmp_path, small_bpe):
    return lambda layout, name="qwen2": published.publish(tmp_path / layout, layout, small_bpe, name)


def edit_json(path, **changes):
    """Sets fields of a JSON file; None removes one. `a__b` is field b of object a."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = functools.reduce(lambda found, part: found[part], outer, content)
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(content))


def edit_tensors(path, **changes):
    """Replaces tensors, each by what a function makes of it; None removes one. `__` stands for a dot."""
    tensors = load_file(path)
    for name, change in changes.items():
        name = name.replace("__", ".")
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors.get(name)).contiguous()
    save_file(tensors, path)


def write_vocabulary(folder, bpe):
    """The same tokenizer as Qwen2 publishes it beside OpenGVLab's checkpoints: vocab.json, merges.txt, added tokens."""
    vocabulary, merges = bpe
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    added = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")
    config = {
        "added_tokens_decoder": {
            str(len(vocabulary) + i): {"content": token, "special": token != "<think>", "normalized": False}
            for i, token in enumerate(added)
        },
        "chat_template": TEMPLATE,
        "eos_token": "<|im_end|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def random_frames(size=56):
    return torch.randint(0, 256, (2, 4, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def assert_close_to_scale(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def assert_equal_encoder(encoder, model, frames):
    """Without a reducer the encoder gives transformers' image features, frame after frame."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((frames.flatten(0, 1).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
        assert_close_to_scale(encoder(frames), expected.reshape(frames.shape[0], -1, expected.shape[-1]))


def assert_equal_decoder(decoder, model):
    """Token ids through the decoder's own embeddings give transformers' logits."""
    ids = torch.randint(0, TEXT["vocab_size"], (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits, _ = decoder(decoder.model.embed_tokens(ids), torch.tensor([0]), decoder.empty_caches(20))
        assert_close_to_scale(logits, model(input_ids=ids).logits[:, -1])


# what is read


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, name) for layout in ("hf", "shards") for name in MODELS]
    + [("original", name) for name in ("qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "rms-and-qk-norms")],
)
def test_internvl_equals_transformers(publish, layout, name):
    artifact = load_artifact(publish(layout, name), reducer="none")
    assert_equal_encoder(artifact.encoder, build_model(name), random_frames())
    assert_equal_decoder(artifact.decoder, build_model(name))


def test_the_shards_are_several(publish):
    assert len(list(publish("shards").glob("*.safetensors"))) > 3


@every_model
def test_internvl_keys_may_be_nested_in_one_more_model(publish, name):
    folder = publish("hf", name)
    tensors = {key: tensor.clone() for key, tensor in build_model(name).state_dict().items()}
    assert "model.vision_tower.embeddings.cls_token" in tensors
    if name.endswith("-tied"):
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    artifact = load_artifact(folder, reducer="none")
    assert_equal_encoder(artifact.encoder, build_model(name), random_frames())
    assert_equal_decoder(artifact.decoder, build_model(name))


@pytest.mark.parametrize("size", [28, 84])
def test_positions_are_resampled_to_the_forced_image_size(publish, size):
    folder = publish("original")
    edit_json(folder / "config.json", force_image_size=size)
    assert_equal_encoder(load_artifact(folder, reducer="none").encoder, build_model("qwen2"), random_frames(size))


def test_half_precision_weights_become_float32(publish):
    folder = publish("hf")
    model = copy.deepcopy(build_model("qwen2")).bfloat16()
    model.save_pretrained(folder)
    artifact = load_artifact(folder, reducer="none")
    assert {tensor.dtype for tensor in artifact.encoder.state_dict().values()} == {torch.float32}
    assert_equal_encoder(artifact.encoder, model.float(), random_frames())


def test_a_head_in_the_file_is_used_although_the_config_ties_it(publish):
    folder = publish("original")
    edit_json(folder / "config.json", llm_config__tie_word_embeddings=True)
    assert_equal_decoder(load_artifact(folder).decoder, build_model("qwen2"))


def test_internvl_gets_wap_16x_by_default(publish):
    artifact = load_artifact(publish("hf"))
    assert (artifact.encoder.config.reducer, artifact.encoder.config.window) == ("wap", (4, 2, 2))
    assert artifact.encoder(random_frames()).shape == (2, 1, 24)
    assert artifact.prompt.unit_prefix == "Frames {first}-{last}: <img>"


@pytest.mark.parametrize(
    ("ratio", "window", "units", "prefix"),
    [(4, (1, 2, 2), 4, "Frame{first}: <img>"), (8, (2, 2, 2), 2, "Frames {first}-{last}: <img>")],
)
def test_the_ratio_chooses_the_window(publish, ratio, window, units, prefix):
    artifact = load_artifact(publish("hf"), ratio=ratio)
    assert (artifact.encoder.config.window, artifact.encoder.units_per_clip) == (window, units)
    assert artifact.prompt.unit_prefix == prefix


@pytest.mark.parametrize(("name", "units"), [("tome", 1), ("prumerge", 4), ("fastvid", 1)])
def test_a_token_method_takes_the_ratio_as_it_is(publish, name, units):
    folder = publish("hf")
    edit_json(folder / "config.json", downsample_ratio=1)
    edit_tensors(
        folder / "model.safetensors",
        multi_modal_projector__layer_norm__weight=lambda w: w[: len(w) // 4],
        multi_modal_projector__layer_norm__bias=lambda b: b[: len(b) // 4],
        multi_modal_projector__linear_1__weight=lambda w: w[:, : w.shape[1] // 4],
    )
    artifact = load_artifact(folder, name, 2 if name == "prumerge" else 4)
    assert artifact.encoder.units_per_clip == units
    assert artifact.encoder.config.ratio == (2 if name == "prumerge" else 4)


def test_a_liteframe_folder_gives_back_what_was_saved(publish):
    artifact = load_artifact(publish("liteframe"))
    encoder, language_model = build_student()
    assert artifact.encoder.config == encoder.config
    for ours, saved in ((artifact.encoder, encoder), (artifact.decoder, language_model)):
        assert ours.state_dict().keys() == saved.state_dict().keys()
        for name, tensor in saved.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name
    assert_equal_decoder(artifact.decoder, language_model)
    assert not artifact.encoder.training and not artifact.decoder.training
    assert artifact.prompt.unit_prefix == "Clip {first} to {last}: "
    assert artifact.notice == "not trained"
    assert artifact.name == "liteframe"


def test_a_liteframe_folder_may_hold_a_frame_wise_tower_and_other_pixels(publish):
    folder = publish("liteframe")
    _, language_model = build_student()
    config = EncoderConfig(
        backbone=ViTConfig(
            image_size=(28, 84), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
        ),
        output_size=24,
        reducer="average",
        window=(2, 2, 2),
        shuffle=1,
        mean=(0.5, 0.4, 0.3),
    )
    encoder = randomised(VideoEncoder(config))
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    tensors |= {f"decoder.{name}": tensor for name, tensor in language_model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", encoder=msgspec.to_builtins(config))
    frames = random_frames()[:, :, :28, :28].repeat(1, 1, 1, 3, 1)
    with torch.no_grad():
        assert torch.equal(load_artifact(folder).encoder(frames), encoder(frames))


def add_merge_connector(folder, **shapes):
    """A second connector of the projector's sizes in the checkpoint, or of others."""
    sizes = {"norm.weight": 80, "norm.bias": 80, "fc1.weight": (24, 80), "fc1.bias": 24}
    sizes |= {"fc2.weight": (24, 24), "fc2.bias": 24} | {name.replace("__", "."): size for name, size in shapes.items()}
    generator = torch.Generator().manual_seed(5)
    made = {f"encoder.merge_connector.{name}": torch.randn(size, generator=generator) for name, size in sizes.items()}
    path = folder / "model.safetensors"
    save_file(load_file(path) | made, path)
    return made


def test_a_liteframe_folder_may_hold_a_second_connector(publish):
    folder = publish("liteframe")
    without = load_artifact(folder)
    assert without.encoder.merger.connector is None
    made = add_merge_connector(folder)
    edit_json(folder / "config.json", encoder__merge_connector=True)
    artifact = load_artifact(folder)
    state = artifact.encoder.merger.connector.state_dict()
    assert {f"encoder.merge_connector.{name}" for name in state} == made.keys()
    assert all(torch.equal(state[name.removeprefix("encoder.merge_connector.")], made[name]) for name in made)
    with torch.no_grad():
        tokens, features = artifact.encoder.with_features(random_frames())
        assert torch.equal(tokens, without.encoder(random_frames()))
    assert features.shape == (*tokens.shape[:2], 80)


def test_a_second_connector_that_does_not_fit_is_refused(publish):
    folder = publish("liteframe")
    edit_json(folder / "config.json", encoder__merge_connector=True)
    assert_refused(folder, "encoder.merge_connector.norm.weight is missing")
    add_merge_connector(folder, fc1__weight=(24, 20))
    assert_refused(
        folder, "encoder.merge_connector.fc1.weight has shape [24, 20], expected [24, 80]", file="model.safetensors"
    )
    add_merge_connector(folder)
    edit_json(folder / "config.json", encoder__merge_connector=False)
    assert_refused(folder, "encoder.merge_connector.fc1.bias has no place", file="model.safetensors")


@pytest.mark.parametrize(
    "changed", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_the_hash_covers_every_file_that_is_read(publish, changed):
    folder = publish("hf")
    before = load_artifact(folder).sha256
    assert load_artifact(folder.rename(folder.with_name("renamed"))).sha256 == before
    folder = folder.with_name("renamed")
    if changed.endswith(".json"):
        (folder / changed).write_text((folder / changed).read_text() + "\n")
    else:
        edit_tensors(folder / changed, multi_modal_projector__linear_1__bias=lambda bias: bias + 1)
    assert load_artifact(folder).sha256 != before
    (folder / "README.md").write_text("not read")
    after = load_artifact(folder).sha256
    (folder / "README.md").unlink()
    assert load_artifact(folder).sha256 == after


# text


def test_vocabulary_and_merges_make_qwen2s_tokenizer(publish, small_bpe):
    folder = write_vocabulary(publish("original"), small_bpe)
    (folder / "tokenizer.json").unlink()
    text = load_artifact(folder).text
    theirs = Qwen2Tokenizer.from_pretrained(folder)
    for sentence in (
        "<|im_start|>what's in the video?<|im_end|>\n",
        "<think>20244  cats</think>",
        "cafe\u0301\n\n I'LL",
    ):
        ids = text.tokenizer.encode(sentence, add_special_tokens=False).ids
        assert ids == theirs(sentence, add_special_tokens=False)["input_ids"]
    assert text.end_of_turn == [theirs.convert_tokens_to_ids("<|im_end|>")]
    assert text.chat_template == TEMPLATE


def test_special_tokens_are_read_from_strings_and_objects(publish):
    text = load_artifact(publish("hf")).text
    assert text.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_the_answer_ends_at_any_of_the_end_tokens(publish):
    folder = publish("hf")
    edit_json(folder / "config.json", text_config__eos_token_id=7)
    edit_json(folder / "generation_config.json", eos_token_id=[9, 7])
    text = load_artifact(folder).text
    assert text.end_of_turn == sorted([7, 9, text.tokenizer.token_to_id("<|im_end|>")])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "the template"),
        ("chat_template.json", '{"chat_template": "the template"}'),
        ("tokenizer_config.json", '{"chat_template": "the template", "eos_token": "<|im_end|>"}'),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "tool_use", "template": "another"},'
            ' {"name": "default", "template": "the template"}], "eos_token": "<|im_end|>"}',
        ),
    ],
)
def test_the_chat_template_is_found_wherever_it_is_kept(publish, file, content):
    folder = publish("hf")
    (folder / file).write_text(content)
    assert load_artifact(folder).text.chat_template == "the template"


# LoRA


ADAPTERS = {
    "two-modules": {"target_modules": ["q_proj", "v_proj"]},
    "every-linear-layer": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "rank-stabilised": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "down_proj": 5, "proj": 11},
    },
    "anchored-pattern": {"target_modules": ["q_proj"], "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 32}},
    "one-layer": {"target_modules": ["gate_proj"], "layers_to_transform": [1]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


def save_adapter(model, folder, **fields):
    """Trains nothing: random halves, saved by peft. Returns the weights of peft's own merge."""
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 4, "lora_alpha": 8, **fields}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=generator)
    adapted.save_pretrained(folder / "adapter")
    return adapted.merge_and_unload().state_dict()


def assert_merged(decoder, merged):
    changed = 0
    for name, tensor in decoder.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6)
        changed += not torch.equal(tensor, build_student()[1].state_dict()[name])
    assert changed


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_of_the_language_model_is_merged_as_peft_does(publish, adapter):
    folder = publish("liteframe")
    merged = save_adapter(build_student()[1], folder, **ADAPTERS[adapter])
    assert_merged(load_artifact(folder).decoder, merged)


def test_an_adapter_on_a_tied_head_changes_the_embedding_as_in_peft(publish):
    folder = publish("liteframe")
    language_model = copy.deepcopy(build_student()[1])
    language_model.config.tie_word_embeddings = True
    language_model.tie_weights()
    edit_tensors(folder / "model.safetensors", decoder__lm_head__weight=None)
    edit_json(folder / "config.json", decoder__tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = save_adapter(language_model, folder, target_modules=["lm_head"])
    assert_merged(load_artifact(folder).decoder, merged)


VIDEO_ADAPTERS = {
    "plain": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "patterns-that-name-the-language-model": {
        "target_modules": r".*language_model.*\.q_proj",
        "alpha_pattern": {r"language_model\.(model\.)?layers\.0\.self_attn\.q_proj": 32},
        "rank_pattern": {r"language_model\.(model\.)?layers\.1\.self_attn\.q_proj": 2},
    },
}


@pytest.mark.parametrize("adapter", VIDEO_ADAPTERS)
def test_an_adapter_of_transformers_video_model_is_merged_as_peft_does(publish, adapter):
    folder = publish("hf")
    merged = save_adapter(build_model("qwen2"), folder, **VIDEO_ADAPTERS[adapter])
    for name, tensor in load_artifact(folder).decoder.state_dict().items():
        their = re.sub(r"^model\.", "model.language_model.", name)
        torch.testing.assert_close(tensor, merged[their], rtol=1e-6, atol=1e-6)


class VideoModel(nn.Module):
    """As OpenGVLab nests a language model."""

    def __init__(self, language_model):
        super().__init__()
        self.language_model = language_model


@pytest.mark.parametrize("adapter", VIDEO_ADAPTERS)
def test_an_adapter_of_opengvlabs_video_model_is_merged_as_peft_does(publish, adapter):
    folder = publish("liteframe")
    merged = save_adapter(VideoModel(build_student()[1]), folder, **VIDEO_ADAPTERS[adapter])
    assert_merged(
        load_artifact(folder).decoder,
        {name.removeprefix("language_model."): tensor for name, tensor in merged.items()},
    )


def test_the_hash_covers_the_adapter(publish):
    folder = publish("liteframe")
    hashes = {load_artifact(folder).sha256}
    save_adapter(build_student()[1], folder, target_modules=["q_proj"])
    hashes.add(load_artifact(folder).sha256)
    edit_json(folder / "adapter" / "adapter_config.json", lora_alpha=9)
    hashes.add(load_artifact(folder).sha256)
    assert len(hashes) == 3


# what is refused


def assert_refused(folder, *fragments, file="", **options):
    """One clear sentence or two, that start with the file."""
    with pytest.raises(InputError) as caught:
        load_artifact(folder, **options)
    message = str(caught.value)
    assert message.startswith(str(folder / file))
    for fragment in fragments:
        assert fragment in message
    bare = message.replace(str(folder), "")
    assert "\n" not in bare
    assert len(bare) <= 300
    assert bare.count(". ") <= 1
    assert not re.search(r"\w(Error|Exception)\b|Traceback", bare)


TARGETS = {"target_modules": ["q_proj"]}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"use_dora": True}, ["use_dora = True", "merge the adapter with peft"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save = ['lm_head']"]),
        ({"trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
        ({"bias": "lora_only"}, ["bias = 'lora_only'"]),
        ({"lora_bias": True}, ["lora_bias = True"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights = 'pissa'", "changed the base weights"]),
        ({"init_lora_weights": "olora"}, ["init_lora_weights = 'olora'"]),
    ],
    ids=str,
)
def test_features_of_peft_that_change_the_merge_are_refused(publish, fields, fragments):
    folder = publish("liteframe")
    save_adapter(build_student()[1], folder, **TARGETS, **fields)
    assert_refused(folder, *fragments, file="adapter/adapter_config.json")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"peft_type": "LOHA"}, ["peft_type is 'LOHA', expected 'LORA'"]),
        ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"kasa_config": {}}, ["kasa_config"]),
        ({"r": 0}, ["`int` >= 1", "$.r"]),
        ({"r": "4"}, ["$.r"]),
        ({"lora_alpha": "8"}, ["$.lora_alpha"]),
        ({"alpha_pattern": ["q_proj"]}, ["$.alpha_pattern"]),
        ({"rank_pattern": {"(": 4}}, ["unterminated"]),
    ],
    ids=str,
)
def test_a_config_that_is_not_an_adapters_is_refused(publish, changes, fragments):
    folder = publish("liteframe")
    save_adapter(build_student()[1], folder, **TARGETS)
    edit_json(folder / "adapter" / "adapter_config.json", **changes)
    assert_refused(folder, *fragments, file="adapter/adapter_config.json")


@pytest.mark.parametrize("content", ["", "[]", "{", '"LORA"', "\udcff"])
def test_an_adapter_config_that_is_not_json_is_refused(publish, content):
    folder = publish("liteframe")
    save_adapter(build_student()[1], folder, **TARGETS)
    (folder / "adapter" / "adapter_config.json").write_text(content, errors="surrogateescape")
    assert_refused(folder, "JSON", "PEFT's adapter config", file="adapter/adapter_config.json")


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({f"{KEY}B.weight": None}, ["model.layers.0.self_attn.q_proj has only one of lora_A and lora_B"]),
        ({f"{KEY}A.weight": lambda a: a[:3]}, ["lora_A of model.layers.0.self_attn.q_proj", "[3, 24]", "[4, 24]"]),
        ({f"{KEY}A.weight": lambda a: a[:, 1:]}, ["lora_A", "[4, 23]", "[4, 24]"]),
        ({f"{KEY}B.weight": lambda b: b[1:]}, ["lora_B", "[23, 4]", "[24, 4]"]),
        ({f"{KEY}B.weight": lambda b: b[:, 0]}, ["lora_B", "[24]", "[24, 4]"]),
        ({f"{KEY}A.weight": lambda a: a * float("nan")}, [f"{KEY}A.weight", "NaN or infinity"]),
        ({f"{KEY}A.weight": lambda a: a.to(torch.int8)}, [f"{KEY}A.weight", "torch.int8"]),
        (
            {"base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": lambda _: torch.zeros(4, 24)},
            ["layers.2.self_attn.q_proj.lora_A.weight matches no weight of the decoder"],
        ),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": lambda _: torch.zeros(4, 24)}, ["matches no weight"]),
        ({"base_model.model.model.norm.lora_A.weight": lambda _: torch.zeros(4, 24)}, ["model.norm", "no weight"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_adapter_tensors_that_do_not_fit_are_refused(publish, change, fragments):
    folder = publish("liteframe")
    save_adapter(build_student()[1], folder, **TARGETS)
    edit_tensors(folder / "adapter" / "adapter_model.safetensors", **change)
    assert_refused(folder, *fragments, file="adapter/adapter_model.safetensors")


def test_an_adapter_of_another_rank_than_its_config_says_is_refused(publish):
    folder = publish("liteframe")
    save_adapter(build_student()[1], folder, **TARGETS)
    edit_json(folder / "adapter" / "adapter_config.json", r=5)
    assert_refused(folder, "[4, 24]", "[5, 24]", "adapter_config.json", file="adapter/adapter_model.safetensors")


def test_an_adapter_of_the_vision_tower_is_refused(publish):
    folder = publish("hf")
    save_adapter(build_model("qwen2"), folder, target_modules=r".*vision_tower.*q_proj")
    assert_refused(folder, "vision_tower", "matches no weight of the decoder", file="adapter/adapter_model.safetensors")


def test_an_empty_adapter_is_refused(publish):
    folder = publish("liteframe")
    save_adapter(build_student()[1], folder, **TARGETS)
    save_file({}, folder / "adapter" / "adapter_model.safetensors")
    assert_refused(folder, "holds no LoRA tensors", file="adapter/adapter_model.safetensors")


def test_an_adapter_without_its_config_is_refused(publish):
    folder = publish("liteframe")
    save_adapter(build_student()[1], folder, **TARGETS)
    (folder / "adapter" / "adapter_config.json").unlink()
    assert_refused(folder, "No such file", file="adapter/adapter_config.json")


class Marker:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("weights", "pickled"),
    [
        ("model.safetensors", "pytorch_model.bin"),
        ("adapter/adapter_model.safetensors", "adapter/adapter_model.bin"),
    ],
)
def test_pickled_weights_are_never_read(publish, tmp_path, weights, pickled):
    folder = publish("liteframe")
    save_adapter(build_student()[1], folder, **TARGETS)
    (folder / weights).unlink()
    (folder / pickled).write_bytes(pickle.dumps(Marker(tmp_path / "unpickled")))
    name = Path(weights).name
    assert_refused(folder, f"no {name} or {name}.index.json", file=Path(weights).parent)
    assert not (tmp_path / "unpickled").exists()


FC1 = "vision_tower.encoder.layer.1.mlp.fc1.weight"
QUERY, VALUE = (f"vision_tower.encoder.layer.1.attention.{part}_proj.weight" for part in "qv")
PLACES = "vision_tower.embeddings.position_embeddings"


@pytest.mark.parametrize(
    ("tensor", "change", "fragments"),
    [
        (FC1, None, ["is missing"]),
        ("language_model.model.norm.weight", None, ["is missing"]),
        ("language_model.lm_head.weight", None, ["is missing"]),
        ("vision_tower.layernorm.weight", lambda _: torch.ones(32), ["has no place"]),
        ("language_model.model.layers.2.mlp.up_proj.weight", lambda _: torch.ones(40, 24), ["has no place"]),
        (FC1, lambda fc1: fc1[:, 1:], ["[48, 31]", "expected [48, 32]"]),
        (FC1, lambda fc1: fc1.T, ["[32, 48]", "expected [48, 32]"]),
        (QUERY, lambda q: q[1:], ["[31, 32]", "expected [32, 32]"]),
        (VALUE, lambda v: v[:, 1:], ["[32, 31]", "expected [32, 32]"]),
        (PLACES, lambda p: p[:, 1:], ["[16, 32]", "expected [17, 32]"]),
        ("language_model.model.embed_tokens.weight", lambda e: e[1:], ["[339, 24]", "expected [340, 24]"]),
        (FC1, lambda fc1: fc1.index_fill(1, torch.tensor(3), float("nan")), ["NaN or infinity", "damaged"]),
        ("language_model.lm_head.weight", lambda head: head / 0, ["NaN or infinity"]),
        (FC1, lambda fc1: fc1.double() * 1e300, ["NaN or infinity"]),
        (FC1, lambda fc1: fc1.to(torch.int8), ["torch.int8", "expected floating point"]),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(publish, tensor, change, fragments):
    folder = publish("hf")
    edit_tensors(folder / "model.safetensors", **{tensor: change})
    assert_refused(folder, f"tensor {tensor} ", *fragments, file="model.safetensors")


def test_two_parts_that_only_fit_together_are_refused(publish):
    folder = publish("hf")
    longer = {QUERY: lambda q: torch.cat([q, q[:1]]), VALUE: lambda v: v[1:]}
    edit_tensors(folder / "model.safetensors", **longer)
    assert_refused(folder, QUERY, "[33, 32]", "expected [32, 32]", file="model.safetensors")


@pytest.mark.parametrize("change", [lambda p: p[:, 1:], lambda p: p[:, :, 1:], lambda p: p[0, :, 0]])
def test_positions_that_can_not_be_resampled_are_refused(publish, change):
    folder = publish("original")
    edit_json(folder / "config.json", force_image_size=84)
    edit_tensors(folder / "model.safetensors", vision_model__embeddings__position_embedding=change)
    message = "tensor vision_model.embeddings.position_embedding has shape"
    assert_refused(folder, message, file="model.safetensors", reducer="none")


@pytest.mark.parametrize("keep", [0, 7, 100, -1, "text"])
def test_a_truncated_weights_file_is_refused(publish, keep):
    folder = publish("hf")
    path = folder / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" if keep == "text" else path.read_bytes()[:keep])
    assert_refused(folder, "truncated or not a safetensors file", "fetch it again", file="model.safetensors")


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def test_a_missing_shard_is_named(publish):
    folder = publish("shards")
    shard = first_shard(folder)
    shard.unlink()
    assert_refused(folder, "this shard", "is missing", "model.safetensors.index.json", file=shard.name)


def test_a_truncated_shard_is_named(publish):
    folder = publish("shards")
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(folder, "truncated", file=shard.name)


def test_a_shard_that_lacks_what_the_index_lists_is_named(publish):
    folder = publish("shards")
    shard = first_shard(folder)
    tensor = sorted(load_file(shard))[0]
    edit_tensors(shard, **{tensor: None})
    assert_refused(folder, f"tensor {tensor} is missing", "model.safetensors.index.json", file=shard.name)


def test_a_shard_with_more_than_the_index_lists_is_named(publish):
    folder = publish("shards")
    shard = first_shard(folder)
    edit_tensors(shard, surplus=lambda _: torch.zeros(1))
    assert_refused(folder, "tensor surplus has no place", file=shard.name)


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/passwd", "a/../../x", "..", "link", "\0", ""])
def test_an_index_that_points_outside_the_folder_is_refused(publish, tmp_path, target):
    folder = publish("shards")
    (tmp_path / "model.safetensors").touch()
    (folder / "link").symlink_to(tmp_path / "model.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], target)
    path.write_text(json.dumps(index))
    assert_refused(folder, repr(target), "outside the folder")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(publish, content):
    folder = publish("shards")
    (folder / "model.safetensors.index.json").write_text(content)
    assert_refused(folder, "not an index", file="model.safetensors.index.json")


@pytest.mark.parametrize(
    ("layout", "changes", "fragments"),
    [
        ("hf", {"model_type": "llava"}, ["model_type 'llava'", "expected liteframe, internvl or internvl_chat"]),
        ("hf", {"model_type": None}, ["model_type None"]),
        ("hf", {"text_config__model_type": "gemma3"}, ["language model 'gemma3'", "qwen2, qwen3, llama"]),
        ("original", {"llm_config__model_type": "internlm2"}, ["language model 'internlm2'"]),
        ("hf", {"vision_config": None}, ["field 'vision_config' is missing"]),
        ("hf", {"text_config": None}, ["field 'text_config' is missing"]),
        ("hf", {"vision_config__hidden_size": None}, ["field 'hidden_size' is missing"]),
        ("hf", {"text_config__vocab_size": None}, ["field 'vocab_size' is missing"]),
        ("original", {"llm_config__num_hidden_layers": None}, ["field 'num_hidden_layers' is missing"]),
        ("original", {"vision_config__patch_size": None}, ["field 'patch_size' is missing"]),
        ("hf", {"vision_config": "vit"}, ["vision_config is 'vit'"]),
        ("hf", {"text_config": []}, ["text_config is []"]),
        ("hf", {"vision_config__hidden_size": "32"}, ["Expected `int`, got `str`", "$.hidden_size"]),
        ("hf", {"vision_config__num_hidden_layers": 1.5}, ["$.num_hidden_layers"]),
        ("hf", {"vision_config__image_size": "56"}, ["image_size is '56'"]),
        ("hf", {"vision_config__image_size": [56, 56, 56]}, ["image_size is [56, 56, 56]"]),
        ("hf", {"vision_config__image_size": 57}, ["image size", "not a multiple of patch_size 14"]),
        ("hf", {"text_config__hidden_size": "24"}, ["hidden_size is '24'"]),
        ("hf", {"text_config__num_attention_heads": 0}, ["num_attention_heads is 0"]),
        ("hf", {"text_config__num_key_value_heads": 3}, ["not a multiple of num_key_value_heads 3"]),
        ("hf", {"text_config__vocab_size": "340"}, ["$.vocab_size"]),
        ("hf", {"text_config__intermediate_size": -40}, ["below zero"]),
        ("hf", {"text_config__vocab_size": 2**45}, ["sizes of the decoder", "memory"]),
        ("hf", {"vision_config__patch_size": 0}, ["is 0"]),
        ("hf", {"vision_config__num_attention_heads": 0}, ["is 0"]),
        ("hf", {"vision_config__num_attention_heads": 5}, ["not a multiple of num_attention_heads 5"]),
        ("hf", {"vision_config__norm_type": "batch_norm"}, ["norm is 'batch_norm'"]),
        ("hf", {"vision_config__hidden_act": "relu"}, ["activation 'relu'"]),
        ("hf", {"vision_config__use_absolute_position_embeddings": False}, ["absolute position embeddings"]),
        ("hf", {"vision_feature_layer": -2}, ["vision layer -2"]),
        ("hf", {"vision_feature_select_strategy": "full"}, ["vision_feature_select_strategy"]),
        ("hf", {"projector_hidden_act": "relu"}, ["projector activation 'relu'"]),
        ("hf", {"downsample_ratio": 0}, ["downsample_ratio 0"]),
        ("hf", {"downsample_ratio": "0.5"}, ["downsample_ratio '0.5'"]),
        ("original", {"select_layer": -4}, ["vision layer -4"]),
        ("original", {"ps_version": "v1"}, ["ps_version 'v1'"]),
        ("original", {"ps_version": None}, ["ps_version 'v1'"]),
        ("original", {"force_image_size": 50}, ["image size", "not a multiple of patch_size 14"]),
        ("original", {"llm_config__hidden_act": "gelu"}, ["activation 'gelu'"]),
        ("original", {"llm_config__use_sliding_window": True}, ["sliding-window"]),
        ("original", {"llm_config__rope_scaling": {"type": "longrope"}}, ["'longrope'"]),
        ("liteframe", {"version": 2}, ["version 2", "reads 1"]),
        ("liteframe", {"version": None}, ["missing required field `version`"]),
        ("liteframe", {"surplus": 1}, ["unknown field `surplus`"]),
        ("liteframe", {"encoder__surplus": 1}, ["unknown field `surplus`", "$.encoder"]),
        ("liteframe", {"encoder__output_size": None}, ["missing required field `output_size`", "$.encoder"]),
        ("liteframe", {"encoder__output_size": "24"}, ["Expected `int`, got `str`", "$.encoder.output_size"]),
        ("liteframe", {"encoder__backbone__type": "resnet"}, ["resnet", "$.encoder.backbone.type"]),
        ("liteframe", {"encoder__backbone__vit__patch_size": 0}, ["is 0"]),
        ("liteframe", {"encoder__shuffle": 0}, ["is 0"]),
        ("liteframe", {"encoder__shuffle": -1}, ["shuffle is -1, expected 1 or more"]),
        ("liteframe", {"encoder__window": [4, -2, -2]}, ["window is -2, expected 1 or more"]),
        ("liteframe", {"encoder__clip_length": 0}, ["clip_length is 0, expected 1 or more"]),
        ("liteframe", {"encoder__backbone__vit__num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
        ("liteframe", {"encoder__backbone__downsampling": [{"after": 1, "stride": [2, -1, 1]}]}, ["stride is -1"]),
        ("liteframe", {"encoder__shuffle": 3}, ["pixel shuffle 3 does not divide the grid [2, 2]"]),
        ("liteframe", {"encoder__clip_length": 8}, ["clip_length is 8"]),
        ("liteframe", {"encoder__reducer": "median"}, ["reducer is 'median'"]),
        ("liteframe", {"encoder__ratio": 4}, ["ratio is 4, which is for tome, prumerge, fastvid; wap has a window"]),
        ("liteframe", {"encoder__backbone__head_size": -1}, ["below zero"]),
        ("liteframe", {"encoder__backbone__downsampling": [{"after": 9, "stride": [2, 2, 2]}]}, ["blocks [9]"]),
        ("liteframe", {"prompt__unit_suffix": None}, ["missing required field `unit_suffix`", "$.prompt"]),
        ("liteframe", {"decoder__model_type": "mamba"}, ["language model 'mamba'"]),
        ("liteframe", {"decoder__vocab_size": None}, ["field 'vocab_size' is missing"]),
        ("liteframe", {"decoder": []}, ["$.decoder"]),
        ("liteframe", {"decoder": {"gguf": 5}}, ["wrong type"]),
    ],
)
def test_a_config_that_can_not_be_meant_is_refused(publish, layout, changes, fragments):
    folder = publish(layout)
    edit_json(folder / "config.json", **changes)
    assert_refused(folder, *fragments, file="config.json")


def test_an_encoder_of_another_width_than_the_language_model_is_refused(publish):
    folder = publish("liteframe")
    edit_json(folder / "config.json", encoder__output_size=26)
    edit_tensors(
        folder / "model.safetensors",
        encoder__projector__fc1__weight=lambda _: torch.zeros(26, 80),
        encoder__projector__fc1__bias=lambda _: torch.zeros(26),
        encoder__projector__fc2__weight=lambda _: torch.zeros(26, 26),
        encoder__projector__fc2__bias=lambda _: torch.zeros(26),
    )
    assert_refused(folder, "encoder.output_size 26", "hidden size 24", file="config.json")


@pytest.mark.parametrize("options", [{"reducer": "none"}, {"ratio": 4}])
def test_a_student_takes_no_other_reducer(publish, options):
    assert_refused(publish("liteframe"), "compresses inside", file="config.json", **options)


@pytest.mark.parametrize("file", ["../lm.gguf", "/lm.gguf", "a/../../lm.gguf"])
def test_a_gguf_file_outside_the_folder_is_refused(publish, file):
    folder = publish("liteframe")
    edit_tensors(folder / "model.safetensors", decoder__lm_head__weight=None)
    edit_json(folder / "config.json", decoder={"gguf": file})
    assert_refused(folder, repr(file), "outside the folder")


def test_a_missing_gguf_file_is_refused(publish):
    folder = publish("liteframe")
    edit_json(folder / "config.json", decoder={"gguf": "lm.gguf"})
    assert_refused(folder, "no such file", "config.json names it", file="lm.gguf")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "cannot be read as JSON"),
        (b"model_type: internvl", "cannot be read as JSON"),
        (b'{"model_type": "internvl"', "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b'{"a":' * 100_000, "cannot be read as JSON"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else None,
)
def test_a_config_that_is_not_a_json_object_is_refused(publish, content, fragment):
    folder = publish("hf")
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, fragment, file="config.json")


def test_a_folder_without_config_is_refused(publish):
    folder = publish("hf")
    (folder / "config.json").unlink()
    assert_refused(folder, "no such file", file="config.json")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert_refused(tmp_path / "nowhere", "no such folder", "expected an artifact")


@pytest.mark.parametrize(
    ("file", "content", "fragments"),
    [
        ("tokenizer.json", b'{"version": "1.0"', ["not a tokenizer"]),
        ("tokenizer.json", b"\xff", ["not a tokenizer"]),
        ("tokenizer.json", b"[]", ["not a tokenizer"]),
        ("tokenizer_config.json", b"[]", ["expected a JSON object"]),
        ("tokenizer_config.json", b'{"eos_token": 5}', ["$.eos_token"]),
        ("tokenizer_config.json", b'{"chat_template": [1]}', ["$.chat_template"]),
        ("chat_template.jinja", b"\xff", ["not text"]),
        ("chat_template.jinja", b"{% if", ["the chat template does not parse"]),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', ["$.eos_token_id"]),
        ("generation_config.json", b"{", ["cannot be read as JSON"]),
    ],
)
def test_a_damaged_tokenizer_file_is_named(publish, file, content, fragments):
    folder = publish("hf")
    (folder / file).write_bytes(content)
    assert_refused(folder, *fragments, file=file)


@pytest.mark.parametrize(
    ("file", "content", "fragments"),
    [
        ("merges.txt", "Ġ t h\n", ["merge 'Ġ t h' is not two tokens"]),
        ("merges.txt", "Ġ\n", ["merge 'Ġ' is not two tokens"]),
        ("vocab.json", "{}", ["do not make a tokenizer", "merges.txt"]),
        ("vocab.json", '{"a": "b"}', ["Expected `int`, got `str`"]),
        ("vocab.json", "[]", ["expected a JSON object"]),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"999": {"content": "<|im_end|>"}}}',
            ["<|im_end|> is number 999, but 329"],
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', ["$.added_tokens_decoder"]),
        ("tokenizer_config.json", '{"tokenizer_class": 1}', ["$.tokenizer_class"]),
    ],
)
def test_a_damaged_vocabulary_is_named(publish, small_bpe, file, content, fragments):
    folder = write_vocabulary(publish("original"), small_bpe)
    (folder / "tokenizer.json").unlink()
    (folder / file).write_text(content, encoding="utf-8")
    assert_refused(folder, *fragments, file=file)


def test_a_tokenizer_of_another_family_is_refused_without_its_fast_form(publish, small_bpe):
    folder = write_vocabulary(publish("original"), small_bpe)
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", tokenizer_class="InternLM2Tokenizer")
    assert_refused(folder, "InternLM2Tokenizer without a tokenizer.json")


@pytest.mark.parametrize(
    ("removed", "fragments"),
    [
        ({"tokenizer.json": ()}, ["no tokenizer.json", "vocab.json"]),
        ({"tokenizer_config.json": ()}, ["no chat template"]),
        ({"tokenizer_config.json": ("chat_template",)}, ["no chat template"]),
        ({"tokenizer_config.json": ("eos_token",)}, ["no eos_token_id"]),
    ],
    ids=str,
)
def test_text_files_that_are_missing_are_asked_for(publish, removed, fragments):
    folder = publish("original")
    for file, fields in removed.items():
        if fields:
            edit_json(folder / file, **dict.fromkeys(fields))
        else:
            (folder / file).unlink()
    assert_refused(folder, *fragments)


def test_the_command_says_what_is_wrong_in_one_line_and_leaves_nothing(publish, tmp_path):
    folder = publish("hf")
    edit_tensors(folder / "model.safetensors", **{FC1: lambda fc1: fc1 * float("nan")})
    place = tmp_path / "packages"
    place.mkdir()
    command = [sys.executable, "export/build_engine.py", folder, "--target", "cpu", "--output", place / "package"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"liteframe: {folder / 'model.safetensors'}: tensor {FC1} ")
    assert list(place.iterdir()) == []
