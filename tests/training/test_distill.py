"""Distillation: weights clipped, differences clipped, targets kept, a student that learns."""

import json
import re

import cv2
import msgspec
import numpy as np
import pytest
import torch
from liteframe.engines.package import InputError
from liteframe.export.artifact import load_artifact
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.liteframe import MIXERS, Downsampling, LiteFrameConfig
from liteframe.export.models.vit import ViTConfig
from liteframe.runtime.cli import guard
from liteframe.training.distill import (
    SHARD,
    Reconstruction,
    Taught,
    clip_weights,
    clipped_error,
    clips_from,
    distil,
    evaluate,
    limit_of,
    main,
    make_student,
    teach,
)
from liteframe.training.loop import Recipe
from published import publish

TEACHER = ViTConfig(
    image_size=(32, 32),
    patch_size=8,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    layer_scale=False,
    pre_norm=True,
)
SMALLER = msgspec.structs.replace(
    TEACHER, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
STUDENT = LiteFrameConfig(
    vit=SMALLER, downsampling=(Downsampling(1, (2, 2, 2)), Downsampling(2, (2, 1, 1))), head_size=24
)


def encoder(backbone, seed=0):
    torch.manual_seed(seed)
    built = VideoEncoder(EncoderConfig(backbone=backbone, output_size=8, shuffle=1))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.2)
    return built


def clips(number):
    """A bright square that moves."""
    random = np.random.default_rng(number)
    out = np.repeat(random.integers(0, 120, (1, 4, 4, 3)), 4, 0).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    row, column = random.integers(0, 20, 2)
    for t in range(4):
        out[t, row : row + 8, column + 2 * t : column + 2 * t + 8] = random.integers(150, 256, 3)
    return out


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    assert list(teach(encoder(TEACHER), clips, 120, folder, dense=True)) == [32, 64, 96, 128]
    return folder


def test_targets_are_what_wap_makes_of_the_teacher(taught):
    teacher, kept = encoder(TEACHER), Taught(taught)
    frames, targets = kept.batch(np.array([3, 70]))
    np.testing.assert_array_equal(frames, np.stack([clips(3), clips(70)]))
    with torch.no_grad():
        dense = teacher.dense(frames)
        expected = teacher.reducer(dense).flatten(1, 2)
    assert targets.shape == (2, 4, 24) and len(kept) == 4 * SHARD
    torch.testing.assert_close(targets, expected, rtol=0.05, atol=0.1)  # BF16
    _, features = Taught(taught, "dense").batch(np.array([3, 70]))
    torch.testing.assert_close(features, dense[:, :, 1:], rtol=0.05, atol=0.1)


def test_shards_that_are_there_are_not_made_again(taught):
    def refuse(number):
        raise AssertionError("drawn again")

    assert list(teach(encoder(TEACHER), refuse, 128, taught)) == [32, 64, 96, 128]


def test_too_few_clips_are_refused(tmp_path):
    with pytest.raises(InputError, match="0 clips with targets, at least 64"):
        Taught(tmp_path)


def test_every_epoch_takes_each_clip_once_in_another_order(taught):
    kept = Taught(taught)
    drawn = np.concatenate([kept.drawn(step, 48, seed=1) for step in range(8)])  # three epochs, cut within batches
    epochs = drawn.reshape(3, 128)
    for epoch in epochs:
        assert sorted(epoch) == list(range(128))
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(kept.drawn(2, 48, seed=1), drawn[96:144])


def test_a_student_begins_with_as_much_of_its_teacher_as_it_has_room_for():
    teacher, student = encoder(TEACHER).backbone, encoder(STUDENT, seed=1).backbone
    clip_weights(student, teacher)
    torch.testing.assert_close(student.vit.class_token, teacher.class_token[:16])
    torch.testing.assert_close(student.vit.patch_embedding.weight, teacher.patch_embedding.weight[:16])
    block, whole = student.vit.blocks[1], teacher.blocks[1]
    torch.testing.assert_close(block.mlp.fc1.weight, whole.mlp.fc1.weight[:32, :16])
    torch.testing.assert_close(block.norm2.bias, whole.norm2.bias[:16])
    for part in range(3):  # queries, keys, values: the first two heads of each
        torch.testing.assert_close(
            block.attn.qkv.weight[part * 16 : (part + 1) * 16], whole.attn.qkv.weight[part * 24 : part * 24 + 16, :16]
        )


def test_a_student_as_large_as_its_teacher_begins_as_it():
    config = LiteFrameConfig(vit=TEACHER, downsampling=(), head_size=24)
    teacher, student = encoder(TEACHER), VideoEncoder(EncoderConfig(backbone=config, output_size=8, shuffle=1))
    clip_weights(student.backbone, teacher.backbone)
    with torch.no_grad():
        student.backbone.head.weight.copy_(torch.eye(24))
        student.backbone.head.bias.zero_()
        frames = torch.from_numpy(clips(0)[None])
        torch.testing.assert_close(student.dense(frames), teacher.dense(frames)[:, :, 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32, "num_attention_heads": 4}, "hidden_size is 32, the teacher's only 24"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, the teacher's only 3"),
        ({"num_attention_heads": 1}, "heads are 16 wide, the teacher's 8"),
    ],
)
def test_a_student_that_its_teacher_does_not_cover_is_refused(change, message):
    config = LiteFrameConfig(vit=msgspec.structs.replace(SMALLER, **change), downsampling=(), head_size=24)
    with pytest.raises(InputError, match=message):
        clip_weights(encoder(config).backbone, encoder(TEACHER).backbone)


def test_a_grid_that_strides_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"stride \[2, 3, 3\] does not divide the grid \[4, 4, 4\]"):
        LiteFrameConfig(vit=SMALLER, downsampling=(Downsampling(1, (2, 3, 3)),), head_size=24)


def test_differences_beyond_three_deviations_count_as_three():
    random = np.random.default_rng(0)
    found, wanted = random.standard_normal((2, 40, 5, 3))
    found[0, 0] += 50
    limit = 3 * (found - wanted).std(ddof=1)
    expected = np.mean(np.clip(found - wanted, -limit, limit) ** 2)
    x = torch.tensor(found, requires_grad=True)
    difference = x - torch.tensor(wanted)
    loss = clipped_error(difference, limit_of(difference))
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)
    loss.backward()
    assert (x.grad[0, 0] == 0).all() and (x.grad[1, 1] != 0).all()


def test_reconstruction_puts_positions_where_they_were():
    """Of a decoder that copies its token, each position's features are those of the block it lies in."""
    decoder = Reconstruction(6, (1, 2, 3), (4, 4, 6), hidden=6)
    with torch.no_grad():
        decoder.position.zero_()
        for layer in (decoder.fc1, decoder.fc2):
            layer.weight.copy_(torch.eye(6))
            layer.bias.zero_()
    tokens = torch.full((2, 6, 6), 30.0) + torch.arange(6)[None, :, None] + 10 * torch.arange(2)[:, None, None]
    out = decoder(tokens).detach()  # GELU is the identity up here
    assert out.shape == (2, 4, 24, 6)
    blocks = out.reshape(2, 4, 4, 6, 6)[1, 3, :, :, 0]
    expected = 40 + np.arange(6).reshape(2, 3).repeat(2, 0).repeat(2, 1)
    np.testing.assert_allclose(blocks, expected)


@pytest.mark.parametrize("objective", ["ctd", "rtd", "dense"])
def test_a_student_learns(taught, tmp_path, objective):
    config = LiteFrameConfig(vit=SMALLER, downsampling=(), head_size=24) if objective == "dense" else STUDENT
    student = encoder(config, seed=1)
    kept = Taught(taught, "targets" if objective == "ctd" else "dense")
    recipe = Recipe(steps=60, batch=16, peak_lr=5e-3, warmup=10)
    assert distil(student, kept, tmp_path, recipe, objective)
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in (tmp_path / "log.jsonl").open()]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_moves_every_parameter_of_a_mixer(taught, tmp_path, mixer):
    """In more than one step: behind an output that begins at zero nothing moves in the first."""
    config = msgspec.structs.replace(STUDENT, mixer=mixer, downsampling=(Downsampling(1, (4, 2, 2)),))
    student = make_student(encoder(TEACHER), config)
    before = {name: parameter.detach().clone() for name, parameter in student.backbone.named_parameters()}
    assert distil(student, Taught(taught), tmp_path, Recipe(steps=3, batch=8, peak_lr=5e-3, warmup=1))
    mixing = {name: p for name, p in student.backbone.named_parameters() if ".temporal." in name or "downs" in name}
    assert mixing
    for name, parameter in mixing.items():
        assert not torch.equal(parameter, before[name]), name
    assert any(".temporal." in name for name in mixing) == (mixer not in ("none", "spatio_temp_attn"))


def test_dense_features_are_added_to_shards_that_are_there(tmp_path):
    def clips(number):
        return np.random.default_rng(number).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)

    teacher = encoder(TEACHER)
    list(teach(teacher, clips, 32, tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    list(teach(teacher, lambda number: pytest.fail("drawn again"), 32, tmp_path, dense=True))
    assert np.load(tmp_path / "00000-dense.npy").shape == (32, 4, 16, 24)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_a_student_is_judged_beside_one_that_says_the_mean(taught):
    student, kept = encoder(STUDENT, seed=1), Taught(taught)
    _, targets = kept.batch(np.arange(len(kept)))
    mean = targets.flatten(0, 1).mean(0)
    with torch.no_grad():
        student.backbone.head.weight.zero_()
        student.backbone.head.bias.copy_(mean)
    figures = evaluate(student, kept, mean)
    difference = targets.flatten(0, 1).double().numpy() - mean.double().numpy()
    clipped = np.square(np.clip(difference, -3 * difference.std(), 3 * difference.std())).mean()
    assert figures["loss"] == pytest.approx(figures["loss_of_mean"]) == pytest.approx(clipped, rel=1e-4)
    assert figures["error"] == pytest.approx(figures["error_of_mean"]) == pytest.approx(difference.var(), rel=1e-4)
    assert -1 <= figures["cosine"] <= 1


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos of 8 frames a second, 5 seconds each, whose light tells the time."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        writer = cv2.VideoWriter(str(folder / f"{number}.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 8, (64, 48))
        for frame in range(40):
            writer.write(np.full((48, 64, 3), 6 * frame, np.uint8))
        writer.release()
    return folder


def test_clips_are_taken_at_one_to_four_frames_a_second(videos):
    clip = clips_from(sorted(videos.iterdir()), 4, (32, 32))
    steps = []
    for number in range(30):
        frames = clip(number)
        assert frames.shape == (4, 32, 32, 3) and frames.dtype == np.uint8
        np.testing.assert_array_equal(frames, clip(number))
        between = np.diff(frames.mean((1, 2, 3))) / 6
        assert np.ptp(between) < 1.5  # frames, which are rounded
        steps.append(between.mean())
    assert {round(step) for step in steps} == {2, 4, 8}


def test_a_video_too_short_for_a_clip_repeats_its_last_frame(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "short.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 8, (64, 48))
    for frame in range(3):
        writer.write(np.full((48, 64, 3), 80 * frame, np.uint8))
    writer.release()
    frames = clips_from([tmp_path / "short.mp4"], 4, (32, 32))(0)
    assert frames.shape[0] == 4 and (frames[-1] == frames[-2]).all()


CONFIG = {
    "vit": {
        "image_size": [32, 32],
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "layer_scale": False,
    },
    "downsampling": [{"after": 1, "stride": [2, 2, 2]}, {"after": 2, "stride": [2, 1, 1]}],
    "head_size": 24,
}


def command(base, videos, folder, config=CONFIG, **options):
    (folder / "student.json").write_text(json.dumps(config))
    arguments = [str(base), str(videos), "--output", str(folder / "out"), "--student", str(folder / "student.json")]
    options = {"clips": 64, "held-out": 64, "steps": 3, "batch": 8} | options
    return guard(main, [*arguments, *(f"--{name}={value}" for name, value in options.items())])


def test_a_teacher_is_distilled_from_videos(base, videos, tmp_path, capsys):
    assert command(base, videos, tmp_path, minutes=0) == 0
    assert "the same command goes on" in capsys.readouterr().out
    assert command(base, videos, tmp_path) == 0
    out = capsys.readouterr().out
    assert "loss_of_mean" in out and str(tmp_path / "out" / "artifact") in out
    student, teacher = load_artifact(tmp_path / "out" / "artifact").encoder, load_artifact(base).encoder
    torch.testing.assert_close(student.projector.fc1.weight, teacher.projector.fc1.weight.half().float())
    assert student.tokens_per_clip == teacher.tokens_per_clip


def test_a_published_internvl_is_a_teacher(videos, small_bpe, tmp_path):
    base = publish(tmp_path / "internvl", "original", small_bpe)
    vit = {"image_size": [56, 56], "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CONFIG | {"vit": vit | {"intermediate_size": 32}, "head_size": 32}
    assert command(base, videos, tmp_path, config) == 0
    student, teacher = load_artifact(tmp_path / "out" / "artifact"), load_artifact(base)
    assert student.encoder.tokens_per_clip == teacher.encoder.tokens_per_clip == 1
    assert student.prompt == teacher.prompt and "<img>" in student.prompt.unit_prefix
    torch.testing.assert_close(student.decoder.state_dict(), teacher.decoder.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsampling": [{"after": 1, "stride": [2, 3, 3]}]}, "does not divide the grid"),
        ({"downsampling": [{"after": 1, "stride": [4, 4, 4]}]}, r"tokens are \[1, 1\] of 24, the teacher's compressed"),
        ({"head_size": 20}, r"tokens are \[2, 2\] of 20"),
        ({"unknown": 1}, "no LiteFrameConfig"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(base, videos, tmp_path, capsys, change, message):
    assert command(base, videos, tmp_path, CONFIG | change) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and "Traceback" not in err and not (tmp_path / "out").exists()


def test_what_is_no_teacher_and_too_few_videos_are_refused(base, tiny_artifact, videos, tmp_path, capsys):
    assert command(tiny_artifact, videos, tmp_path) == 2
    assert "a teacher has a frame-wise tower" in capsys.readouterr().err
    assert command(base, videos / "0.mp4", tmp_path) == 2
    assert "1 videos, at least 2 are needed" in capsys.readouterr().err
