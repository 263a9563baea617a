"""What training writes is the model it trained, before the language model it took, whatever layout that had."""

import json

import msgspec
import pytest
import torch
from liteframe.engines.package import InputError
from liteframe.export.artifact import load_artifact
from liteframe.export.models.encoder import VideoEncoder
from liteframe.training.align import add_lora
from liteframe.training.artifact import check_base, write_artifact
from published import publish
from safetensors import safe_open
from safetensors.torch import save_file


@pytest.mark.parametrize(
    ("layout", "name"),
    [("original", "qwen2"), ("original", "qwen3-tied"), ("hf", "qwen2-tied"), ("shards", "llama"), ("liteframe", "")],
)
def test_a_published_folder_becomes_one_of_ours(tmp_path, small_bpe, layout, name):
    base = publish(tmp_path / "base", layout, small_bpe, name)
    artifact = load_artifact(base)
    before = {n: p.clone() for n, p in artifact.decoder.state_dict().items()}
    with torch.no_grad():
        for parameter in artifact.encoder.parameters():
            parameter.mul_(1.25)
    lora = add_lora(artifact.decoder)
    write_artifact(base, artifact, lora, tmp_path / "out", notice="half done")
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    again = load_artifact(tmp_path / "out")  # the adapter, as it begins, changes nothing
    assert again.decoder.state_dict().keys() == before.keys()
    for parameter, value in again.decoder.state_dict().items():
        torch.testing.assert_close(value, before[parameter], rtol=0, atol=0)
    for one, other in zip(again.encoder.parameters(), artifact.encoder.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)  # stored in FP16
    assert again.notice == "half done" and again.prompt == artifact.prompt
    assert again.text.end_of_turn == artifact.text.end_of_turn
    assert again.text.chat_template == artifact.text.chat_template


def test_a_second_connector_is_written_under_its_name(tmp_path, small_bpe):
    base = publish(tmp_path / "base", "liteframe", small_bpe)
    artifact = load_artifact(base)
    config = msgspec.structs.replace(artifact.encoder.config, merge_connector=True)
    artifact.encoder = VideoEncoder(config)
    write_artifact(base, artifact, None, tmp_path / "out")
    assert "encoder.merge_connector.fc1.weight" in tensors(tmp_path / "out")
    again = load_artifact(tmp_path / "out").encoder
    assert again.config == config
    for one, other in zip(again.merger.parameters(), artifact.encoder.merger.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_language_model_keeps_its_type(tmp_path, small_bpe):
    base = publish(tmp_path / "base", "original", small_bpe)
    halve = {n: t.bfloat16() for n, t in tensors(base).items()}
    save_file(halve, base / "model.safetensors")
    write_artifact(base, load_artifact(base), None, tmp_path / "out")
    for name, tensor in tensors(tmp_path / "out").items():
        assert tensor.dtype == (torch.bfloat16 if name.startswith("decoder.") else torch.float16)


def test_position_embeddings_are_those_of_the_size_it_runs_at(tmp_path, small_bpe):
    base = publish(tmp_path / "base", "original", small_bpe)
    config = json.loads((base / "config.json").read_text())
    config["force_image_size"] = 112
    (base / "config.json").write_text(json.dumps(config))
    artifact = load_artifact(base)
    write_artifact(base, artifact, None, tmp_path / "out")
    again = load_artifact(tmp_path / "out")
    assert again.encoder.config.vit == msgspec.structs.replace(artifact.encoder.config.vit, pretrained_image_size=None)
    one, other = (a.encoder.backbone.position_embedding for a in (again, artifact))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_second_adapter_is_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(InputError, match="there is an adapter already; merge it"):
        check_base(tmp_path)


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
