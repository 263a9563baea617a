"""Alignment: what is learned is what the runtime will ask, and what is saved is what was learned."""

import json

import numpy as np
import peft
import pytest
import torch
from liteframe.calib.questions import Question
from liteframe.engines.package import InputError
from liteframe.export.artifact import load_artifact
from liteframe.export.lora import merge_adapter
from liteframe.export.torch_engine import chat_text
from liteframe.runtime.cli import guard
from liteframe.runtime.conversation import Cache
from liteframe.runtime.text import ChatText
from liteframe.training.align import add_lora, align, answer_ids, answer_loss, draw_from, lay_out, main
from liteframe.training.artifact import load_adapter, save_adapter
from liteframe.training.loop import Recipe
from liteframe.training.samples import Sample, write_samples
from safetensors.torch import load_file, save_file

QUESTIONS = (
    Question("colour", "what colour is the cat?", "red"),
    Question("order", "which is first, the cat or the dog?", "the dog in 2024"),
    Question("count", "how many?", "two"),
)


def load(folder):
    """With a last norm that lets random weights be sure of an answer."""
    artifact = load_artifact(folder)
    artifact.decoder.model.norm.weight.data.fill_(4.0)
    return artifact


@pytest.fixture
def artifact(tiny_artifact):
    return load(tiny_artifact)


class Noting:
    """A decoder that keeps what it is given."""

    def __init__(self):
        self.capacity, self.position, self.given = 4096, 0, []

    def forward(self, embeddings):
        self.given += list(embeddings)
        self.position += len(embeddings)

    def rewind(self, position):
        self.position = position


class Scripted:
    """A sampler that says what it was told to."""

    def __init__(self, ids):
        self._ids = iter(ids)

    def pick(self, logits):
        return next(self._ids)


def embedded(artifact, row, tokens, branch):
    """What the decoder reads of a row when a question is asked alone."""
    table = artifact.decoder.model.embed_tokens.weight.detach().numpy()
    kept = (row.branches == 0) | (row.branches == branch)
    visual = iter(tokens.reshape(-1, tokens.shape[-1]))
    return np.stack([next(visual) if i < 0 else table[i] for i in row.ids[kept]]), row.positions[kept]


@pytest.mark.parametrize("clips", [1, 3])
def test_a_row_holds_what_the_runtime_gives_the_decoder(artifact, tiny_package, clips):
    text, encode = chat_text(artifact), answer_ids(artifact)
    row = lay_out(text, encode, QUESTIONS, artifact.encoder, clips)
    model = tiny_package.manifest.model
    tokens = np.random.default_rng(0).standard_normal((clips, model.tokens_per_clip, 24)).astype(np.float32)
    for number, question in enumerate(QUESTIONS, start=1):
        answer = [*encode(question.answer), *text.end_of_turn]
        decoder = Noting()
        cache = Cache(decoder, ChatText.of(tiny_package), model, list(tokens))
        assert list(cache.ask(question.text, 50, Scripted(answer))) == answer[:-1]
        expected, positions = embedded(artifact, row, tokens, number)
        np.testing.assert_allclose(np.stack(decoder.given), expected, rtol=1e-6)
        np.testing.assert_array_equal(positions, np.arange(len(positions)))
        assert row.labels[row.branches == number][-len(answer) :].tolist() == answer
        assert (row.labels[row.branches == number][: -len(answer)] == -100).all()
    assert (row.labels[row.branches == 0] == -100).all()


def test_questions_about_a_video_are_learned_as_if_each_were_asked_alone(artifact):
    text, encode, decoder = chat_text(artifact), answer_ids(artifact), artifact.decoder
    torch.manual_seed(0)
    tokens = torch.randn(5, artifact.encoder.tokens_per_clip, 24)
    with torch.no_grad():
        asked = ((QUESTIONS, tokens[:2]), (QUESTIONS[:1], tokens[2:]))
        rows = [lay_out(text, encode, questions, artifact.encoder, len(clips)) for questions, clips in asked]
        together = answer_loss(decoder, rows, tokens).item()
        total, count = 0.0, 0
        for questions, clips in asked:
            for question in questions:
                alone = lay_out(text, encode, [question], artifact.encoder, len(clips))
                logits = causal_logits(decoder, alone, clips)
                told = alone.labels != -100
                total += torch.nn.functional.cross_entropy(
                    logits[torch.from_numpy(told)], torch.from_numpy(alone.labels[told]), reduction="sum"
                ).item()
                count += told.sum()
    assert together == pytest.approx(total / count, rel=1e-5)


def causal_logits(decoder, row, clips):
    """By the module as it is exported, one position after the other, over its cache."""
    visual, caches, out = iter(clips.flatten(0, 1)), decoder.empty_caches(len(row.ids)), []
    for position, number in enumerate(row.ids):
        x = next(visual) if number < 0 else decoder.model.embed_tokens.weight[number]
        logits, caches = decoder(x[None, None], torch.tensor([position]), caches)
        out.append(logits[0])
    return torch.stack(out)


def samples(number):
    """Light or dark videos, and a question which."""
    random = np.random.default_rng(number)
    light = bool(random.integers(2))
    frames = random.integers(150 if light else 0, 256 if light else 106, (8, 56, 56, 3)).astype(np.uint8)
    return Sample(frames, 1.0, (Question("light", "is it light?", "yes" if light else "no"),))


@pytest.fixture(scope="module")
def aligned(tiny_artifact, tmp_path_factory):
    """The tiny artifact after some steps, the folder of the run, and the adapter that was saved."""
    artifact, folder = load(tiny_artifact), tmp_path_factory.mktemp("align")
    recipe = Recipe(steps=100, batch=8, peak_lr=2e-2, warmup=5)
    lora = add_lora(artifact.decoder)
    assert align(artifact, lora, samples, folder / "run", recipe)
    save_adapter(lora, folder / "adapter")
    return artifact, folder


def test_an_adapter_is_read_as_it_was_saved(aligned, tiny_artifact):
    trained, folder = aligned
    again = load(tiny_artifact)
    load_adapter(add_lora(again.decoder, seed=1), folder / "adapter")
    loras = [(n, p) for n, p in trained.decoder.named_parameters() if "lora_" in n]
    read = dict(again.decoder.named_parameters())
    assert loras and all(torch.equal(read[name], parameter.half().float()) for name, parameter in loras)


@pytest.mark.parametrize("damage", ["cut", "shape", "layer", "missing", "none"])
def test_an_adapter_that_does_not_fit_is_refused(aligned, tiny_artifact, tmp_path, damage):
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(aligned[1] / "adapter" / path.name)
    name = sorted(state)[0]
    if damage == "shape":
        state[name] = state[name][:, :-1].contiguous()
    elif damage in ("layer", "missing"):
        tensor = state.pop(name)
        state |= {name.replace("layers.0", "layers.9"): tensor} if damage == "layer" else {}
    if damage != "none":
        save_file(state, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: (can't be put|adapts other layers)"):
        load_adapter(add_lora(load(tiny_artifact).decoder), tmp_path)


def test_it_learns_what_is_in_the_video(aligned):
    losses = [json.loads(line)["loss"] for line in (aligned[1] / "run" / "log.jsonl").open()]
    blind = np.log(2) / 3  # knowing the words but not which: of the about three ids of an answer, one can't be told
    assert np.mean(losses[-5:]) < 0.5 * blind < np.mean(losses[:5])


def test_the_language_model_itself_is_not_changed(aligned, tiny_artifact):
    before = dict(load(tiny_artifact).decoder.named_parameters())
    after = {n.replace(".base_layer", ""): p for n, p in aligned[0].decoder.named_parameters() if "lora_" not in n}
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)


def test_the_adapter_that_is_saved_is_merged_as_it_was_trained(aligned, tiny_artifact):
    trained, folder = aligned
    merged = load(tiny_artifact).decoder
    merge_adapter(merged, folder / "adapter")
    tokens = torch.randn(2, trained.encoder.tokens_per_clip, 24, generator=torch.Generator().manual_seed(0))
    row = lay_out(chat_text(trained), answer_ids(trained), QUESTIONS, trained.encoder, 2)
    trained.decoder.eval()
    with torch.no_grad():
        found, expected = answer_loss(merged, [row], tokens), answer_loss(trained.decoder, [row], tokens)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # stored in FP16


def test_peft_itself_reads_the_adapter(aligned, tiny_artifact):
    trained, folder = aligned
    base = load(tiny_artifact).decoder
    config = peft.LoraConfig.from_pretrained(str(folder / "adapter"))
    model = (
        peft.PeftModel(torch.nn.ModuleDict({"decoder": base}), config)
        if False
        else peft.LoraModel(base, config, "default")
    )
    weights = peft.load_peft_weights(str(folder / "adapter"), device="cpu")
    weights = {name.removeprefix("base_model."): value for name, value in weights.items()}
    loaded = peft.set_peft_model_state_dict(model, weights)
    assert not loaded.unexpected_keys and (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.05)
    for (name, one), (_, other) in zip(base.named_parameters(), trained.decoder.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=name)  # stored in FP16


def test_frozen_parameters_stay(tiny_artifact, tmp_path):
    artifact, before = load(tiny_artifact), load(tiny_artifact)
    lora = add_lora(artifact.decoder)
    recipe = Recipe(steps=2, batch=2, peak_lr=1e-2, warmup=1)
    align(artifact, lora, samples, tmp_path, recipe, frozen=lambda name: name.startswith("backbone."))
    same = {
        name: torch.equal(one, other)
        for (name, one), (_, other) in zip(
            artifact.encoder.named_parameters(), before.encoder.named_parameters(), strict=True
        )
    }
    assert all(equal == name.startswith("backbone.") for name, equal in same.items())


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("align") / "questions"
    write_samples([samples(number) for number in range(5)], folder)
    return folder


def test_every_epoch_draws_each_video_once_cut_to_a_number_of_frames(questions, artifact):
    draw = draw_from(questions, artifact.encoder.config, [4, 8], seed=0)
    drawn = [draw(number) for number in range(20)]
    assert {len(sample.frames) for sample in drawn} == {4, 8}
    whole = [draw_from(questions, artifact.encoder.config, [8], seed=0)(number).frames for number in range(20)]
    orders = [[frames.mean() for frames in whole[start : start + 5]] for start in range(0, 20, 5)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders) and orders[0] != orders[1]


def test_an_artifact_is_aligned_with_a_folder_of_questions(questions, tiny_artifact, tmp_path, capsys):
    arguments = [str(tiny_artifact), str(questions), "--output", str(tmp_path), "--frames", "4", "8", "--batch", "2"]
    assert guard(main, [*arguments, "--steps", "3", "--minutes", "0"]) == 0
    assert "the same command goes on" in capsys.readouterr().out
    assert guard(main, [*arguments, "--steps", "3"]) == 0
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "artifact"))
    load_artifact(tmp_path / "artifact")
    assert guard(main, [str(tmp_path / "artifact"), str(questions), "--output", str(tmp_path / "again")]) == 2
    assert "there is an adapter already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--frames", "6"], 2, "6 frames, expected a multiple of 4"),
        (["--frames", "8", "--lr", "1e30", "--steps", "90"], 1, "the loss diverged at step"),
    ],
)
def test_what_goes_wrong_is_said_in_one_message(questions, tiny_artifact, tmp_path, capsys, options, code, message):
    arguments = [str(tiny_artifact), str(questions), "--output", str(tmp_path), "--batch", "2"]
    assert guard(main, [*arguments, *options]) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "artifact").exists()
