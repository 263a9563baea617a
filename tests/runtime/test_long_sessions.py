"""Sessions with long videos, against modules and equations put together by hand."""

import _thread
import json
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import torch
from liteframe.engines.package import QUESTION_POSITIONS, InputError
from liteframe.export.artifact import load_artifact
from liteframe.export.build_engine import build
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.vit import ViTConfig
from liteframe.runtime import EngineError, VideoSession, cli
from liteframe.runtime.conversation import Cache
from liteframe.runtime.long_video import LongVideo, Query, Span
from liteframe.runtime.text import ChatText
from liteframe.runtime.trace import Trace
from safetensors.torch import load_file, save_file
from test_long_video import merged
from test_session import Reference, edited

QUESTION = "what's in the video?"
FRAMES, KEYFRAMES = 48, 3


@pytest.fixture(scope="module")
def package(tiny_artifact, tmp_path_factory):
    """`tiny_artifact` for long videos of up to 48 frames, with 3 keyframes, told apart from a cosine of 0.999 on."""
    folder = tmp_path_factory.mktemp("long") / "artifact"
    folder.mkdir()
    for path in tiny_artifact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["long_video"] = {"similar": 0.999, "redundancy_weight": 0.5, "temperature": 0.05}
    (folder / "config.json").write_text(json.dumps(config))
    return edited(build(folder, "cpu", folder.parent / "package", frames=16, long_video=FRAMES, keyframes=KEYFRAMES))


@pytest.fixture(scope="module")
def frames_apart(tiny_artifact, tmp_path_factory):
    """`tiny_artifact` with a frame-wise tower that keeps 4 tokens a frame, and without a prompt of its own, for long
    videos of up to 128 frames with 16 keyframes: the artifact's folder and the package."""
    folder = tmp_path_factory.mktemp("apart") / "artifact"
    folder.mkdir()
    for path in tiny_artifact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    vit = ViTConfig(
        image_size=(56, 56), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    encoder = EncoderConfig(backbone=vit, output_size=24, reducer="none")
    config |= {"encoder": msgspec.to_builtins(encoder), "long_video": {"similar": 0.999, "temperature": 0.05}}
    config["decoder"]["max_position_embeddings"] = 8192
    del config["prompt"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if name.startswith("decoder.")}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in VideoEncoder(encoder).named_parameters():
        tensors[f"encoder.{name}"] = torch.randn(parameter.shape, generator=generator) * 0.3
    save_file(tensors, folder / "model.safetensors")
    return folder, edited(build(folder, "cpu", folder.parent / "package", frames=16, long_video=128, keyframes=16))


@pytest.fixture
def session(package):
    with VideoSession(package) as session:
        yield session


@pytest.fixture(scope="module")
def reference(tiny_artifact):
    return Reference(tiny_artifact)


@pytest.fixture(scope="module")
def video():
    """Twelve clips of moving noise, of which no two are alike."""
    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (FRAMES, 7, 7, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def clip_tokens(reference, video):
    with torch.no_grad():
        return reference.encoder(torch.from_numpy(video.reshape(-1, 4, *video.shape[1:]))).numpy()


def thinned(reference, video, query, keyframes=KEYFRAMES):
    """Algorithm 1 and equations 5 to 10, step by step: [(tokens, first frame, last frame), ...]."""
    clips = clip_tokens(reference, video).astype(np.float64)
    unit = [clip / np.linalg.norm(clip, axis=1, keepdims=True) for clip in clips]
    parts = query / np.linalg.norm(query, axis=1, keepdims=True)
    relevance = [(parts @ clip.T).max(1).mean() for clip in unit]
    means = clips.mean(1) - clips.mean((0, 1))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    keys: list = []
    for candidate in sorted(range(len(clips)), key=lambda number: -relevance[number]):
        if len(keys) < keyframes and all(means[candidate] @ means[key] < 0.999 for key in keys):
            keys.append(candidate)
    spans, run, key, start = [], [], None, 0
    for number, clip in enumerate(clips):
        if number in keys:
            if run:
                spans.append((np.array(run), start + 1, 4 * number))
            spans += [(clip[:1], 4 * number + 1, 4 * number + 2), (clip[1:], 4 * number + 3, 4 * number + 4)]
            run, key, start = [], clip, 4 * number + 4
        else:
            run.append(merged(clip, query.mean(0), key, 0.5, 0.05))
    if run:
        spans.append((np.array(run), start + 1, len(video)))
    return keys, spans


def expected_positions(reference, spans, question, prefix_of=None, suffix=None):
    """The prompt's embeddings: template, each span between its own text, question."""
    prefix_of = prefix_of or reference.prompt["unit_prefix"].format
    suffix = suffix or reference.prompt["unit_suffix"]
    text = reference.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"[VIDEO]{question}"}],
        chat_template=reference.template,
        add_generation_prompt=True,
        tokenize=False,
    )
    before, after = text.split("[VIDEO]")
    parts = [reference.embed(before)]
    for tokens, first, last in spans:
        prefix = prefix_of(first=first, last=last)
        parts += [reference.embed(prefix), torch.tensor(tokens).float(), reference.embed(suffix)]
    return torch.cat([*parts, reference.embed(after)])


@torch.no_grad()
def greedy(reference, positions, count):
    ids: list = []
    while len(ids) < count:
        ids.append(int(reference.llama(inputs_embeds=positions[None]).logits[0, -1].argmax()))
        positions = torch.cat([positions, reference.llama.get_input_embeddings().weight[ids[-1:]]])
    return reference.decode(ids)


def words(reference, text):
    with torch.no_grad():
        return reference.embed(text).numpy().astype(np.float64)


def test_a_hybrid_answer_equals_the_modules_and_equations_put_together_by_hand(session, reference, video):
    session.watch(video, long_video="hybrid", query=QUESTION)
    ids = session.ask(QUESTION, max_new_tokens=12)
    answer = "".join(ids)
    keys, spans = thinned(reference, video, words(reference, QUESTION))
    assert len(keys) == KEYFRAMES
    positions = expected_positions(reference, spans, QUESTION)
    stats = session.stats()
    assert stats.prompt_tokens == len(positions)
    assert stats.visual_tokens == sum(len(tokens) for tokens, _, _ in spans)
    assert (stats.frames, stats.clips) == (FRAMES, FRAMES // 4)
    assert answer == greedy(reference, positions, 12)


def test_a_picture_finds_the_clip_it_was_taken_from(session, video):
    for clip in (0, 5, 11):
        still = np.broadcast_to(video[4 * clip], (4, *video.shape[1:]))
        footage = np.concatenate([video[: 4 * clip], still, video[4 * clip + 4 :]])
        session.watch(footage, long_video="hybrid", query=video[4 * clip])
        shown = [(entry.first, entry.last) for entry in session._pipeline.conversation.entries]
        assert {(4 * clip + 1, 4 * clip + 2), (4 * clip + 3, 4 * clip + 4)} <= set(shown)


class Sink:
    """A decoder that keeps how many positions it was given at once, and nothing else."""

    position, capacity = 0, 1 << 20

    def __init__(self):
        self.sizes = []

    def rewind(self, position):
        self.position = position

    def forward(self, embeddings):
        self.position += len(embeddings)
        self.sizes.append(len(embeddings))


def test_a_long_video_is_laid_out_a_chunk_at_a_time(package):
    model, text = package.manifest.model, ChatText.of(package)
    tokens = np.zeros((50, model.hidden_size), np.float32)
    spans = [Span(tokens, first, first + 3) for first in range(1, 2000, 4)]
    sink = Sink()
    cache = Cache(sink, text, model, spans)
    tracemalloc.start()
    cache.fill()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert set(sink.sizes[:-1]) == {model.chunk}
    assert sink.position == cache.position > 25_000
    assert peak < sink.position * tokens[0].nbytes / 4


def test_the_next_question_is_about_the_same_video(session, reference, video):
    session.watch(video, long_video="hybrid", query=QUESTION)
    "".join(session.ask(QUESTION, max_new_tokens=3))
    "".join(session.ask("the cat sat in 2024", max_new_tokens=3))
    session.forget()
    again = "".join(session.ask(QUESTION, max_new_tokens=12))
    _, spans = thinned(reference, video, words(reference, QUESTION))
    assert again == greedy(reference, expected_positions(reference, spans, QUESTION), 12)


def push(session, frames):
    for number, frame in enumerate(frames):
        session.push(frame, float(number))
    session.drain()


def test_a_stream_that_follows_a_long_video_begins_without_it(session, package, video):
    session.watch(video, long_video="hybrid", query=QUESTION)
    with VideoSession(package) as fresh:
        for one in (session, fresh):
            push(one, video[:24])
        assert session.stats().frames == fresh.stats().frames > 0
        for question in (QUESTION, "the cat sat"):
            assert list(session.ask(question, max_new_tokens=8)) == list(fresh.ask(question, max_new_tokens=8))


def test_what_was_said_about_a_long_video_stays_in_the_stream_that_follows(session, reference, video):
    session.watch(video, long_video="hybrid", query=QUESTION)
    reading = session.ask(QUESTION, max_new_tokens=8)
    first = next(reading)  # the rest is generated, and never read
    push(session, video[:8])
    answer = "".join(session.ask("the cat sat", max_new_tokens=8))
    turn = session._pipeline.conversation.entries[0]
    assert (turn.question, len(turn.answer)) == (QUESTION, 8)
    assert reference.decode(turn.answer).startswith(first)
    ids = reference.chat([(None, QUESTION), (video[:8], "the cat sat")], 8, [list(turn.answer)])[-1]
    assert answer == reference.decode(ids)


def test_a_uniform_video_is_what_it_is_without(session, tiny_package, video):
    with VideoSession(edited(tiny_package)) as plain:
        plain.watch(video)
        expected = list(plain.ask(QUESTION, max_new_tokens=8))
    session.watch(video)
    assert list(session.ask(QUESTION, max_new_tokens=8)) == expected


def test_what_was_seen_stays_when_a_long_video_fails(session, video, monkeypatch):
    session.watch(video[:16])
    before = list(session.ask(QUESTION, max_new_tokens=4))
    session.forget()
    session.watch(video[:16], long_video="hybrid", query=QUESTION)  # opens what it needs
    session.watch(video[:16])
    monkeypatch.setattr(session._searcher.merger, "merge", lambda *_: 1 / 0)
    with pytest.raises(EngineError, match=r"^the merger failed on the frames \d+ to \d+: division"):
        session.watch(video, long_video="hybrid", query=QUESTION)
    assert list(session.ask(QUESTION, max_new_tokens=4)) == before
    assert session._pipeline.conversation.long is None


@pytest.mark.parametrize("engine", ["merger", "decoder"])
def test_an_interrupted_long_video_ends_at_the_next_call_of_an_engine(session, video, monkeypatch, engine):
    session.watch(video, long_video="hybrid", query=QUESTION)  # opens the merger
    session.watch(video[:16])
    before = list(session.ask(QUESTION, max_new_tokens=4))
    session.forget()
    calls, conversation = [], session._pipeline.conversation
    engine, name = (session._searcher.merger, "merge") if engine == "merger" else (session.engines[1], "forward")
    run = getattr(engine, name)

    def interrupted(*arguments):
        if conversation.long is not None:
            calls.append(arguments)
            _thread.interrupt_main()
            conversation.long._stopped.wait(30)
        return run(*arguments)

    monkeypatch.setattr(engine, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.watch(video, long_video="hybrid", query=QUESTION)
    assert len(calls) == 1
    assert conversation.long is None
    assert list(session.ask(QUESTION, max_new_tokens=4)) == before


def test_closing_a_session_ends_a_long_video_between_two_merges(session, video, monkeypatch):
    session.watch(video, long_video="hybrid", query=QUESTION)
    calls, closing = [], []

    def closed_meanwhile(*_):
        long = session._pipeline.conversation.long
        calls.append(long)
        closing.append(threading.Thread(target=session.close))
        closing[0].start()
        assert long._stopped.wait(30)
        return np.zeros((1, 24), np.float32)

    monkeypatch.setattr(session._searcher.merger, "merge", closed_meanwhile)
    with pytest.raises(InputError, match="the session is closed"):
        session.watch(video, long_video="hybrid", query=QUESTION)
    closing[0].join()
    assert len(calls) == 1
    assert calls[0]._spool._file.closed


def test_merging_and_prefilling_count_as_the_language_models_time(package, video, monkeypatch):
    trace = Trace()
    with VideoSession(package, trace=trace) as session:
        session.watch(video, long_video="hybrid", query=QUESTION)
        merge, slow = session._searcher.merger.merge, []

        def slowly(*arguments):
            slow.append(time.sleep(0.3))
            return merge(*arguments)

        monkeypatch.setattr(session._searcher.merger, "merge", slowly)
        trace.spans.clear()
        session.watch(video, long_video="hybrid", query=QUESTION)
        assert slow and session.stats().llm_ms >= 300 * len(slow)
    longest = max(end - start for stage, name, start, end, _ in trace.spans if name == "llm")
    assert longest >= 0.3 * len(slow)


def test_a_session_goes_on_after_a_disk_that_was_full(session, video, monkeypatch):
    session.watch(video[:16])
    opened = tempfile.TemporaryFile
    files = [Path("/dev/full").open("r+b", buffering=0)]  # noqa: SIM115 - the session closes it
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: files.pop() if files else opened(**options))
    with pytest.raises(InputError, match=r"No space left.*TMPDIR"):
        session.watch(video, long_video="hybrid", query=QUESTION)
    assert session._pipeline.conversation.long is None
    assert "".join(session.ask(QUESTION, max_new_tokens=3))
    session.watch(video, long_video="hybrid", query=QUESTION)
    assert session.stats().frames == FRAMES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"long_video": "hybrid"}, "searched for something"),
        ({"long_video": "hybrid", "query": " "}, "is empty"),
        ({"long_video": "hybrid", "query": np.zeros((4, 4), np.uint8)}, r"uint8 \(4, 4\)"),
        ({"query": QUESTION}, "for long videos"),
        ({"long_video": "hybrid", "query": QUESTION, "frames": 52}, "at most 48"),
        ({"long_video": "hybrid", "query": QUESTION, "frames": 8}, "3 keyframes of 2 clips"),
        ({"long_video": "vilamp", "query": QUESTION}, "2 time steps of the 4 frames"),
        ({"long_video": "dense", "query": QUESTION}, "expected one of"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_video_before_stays(session, video, options, message):
    session.watch(video[:8])
    with pytest.raises(InputError, match=message):
        session.watch(video, **options)
    assert session.stats().frames == 8


def test_a_package_without_it_says_how_to_build_one(tiny_package, video):
    with VideoSession(tiny_package) as session, pytest.raises(InputError, match="build with --long-video"):
        session.watch(video, long_video="hybrid", query=QUESTION)


def test_a_run_of_merged_frames_is_told_as_a_range_where_the_encoder_keeps_frames_apart(frames_apart, reference):
    footage = np.random.default_rng(2).integers(0, 256, (64, 56, 56, 3), dtype=np.uint8)
    with VideoSession(frames_apart[1]) as session:
        session.watch(footage, long_video="vilamp", query=QUESTION)
        spans = [(span.tokens, span.first, span.last) for span in session._pipeline.conversation.entries]
        answer = "".join(session.ask(QUESTION, max_new_tokens=8))
        positions = session.stats().prompt_tokens
    assert any(first < last for _, first, last in spans)

    def prefix(first, last):
        return f"Frame{first}: <img>" if first == last else f"Frames {first}-{last}: <img>"

    expected = expected_positions(reference, spans, QUESTION, prefix, "</img>\n")
    assert positions == len(expected)
    assert answer == greedy(reference, expected, 8)


@pytest.mark.parametrize("mode", ["vilamp", "hybrid"])
def test_the_longest_video_fits_with_a_question_however_its_keyframes_lie(frames_apart, monkeypatch, mode):
    """Between any two of them is a run of others, each of which takes text."""
    monkeypatch.setattr(LongVideo, "keyframes", lambda long: np.arange(1, 2 * 16, 2))
    footage = np.random.default_rng(1).integers(0, 256, (128, 56, 56, 3), dtype=np.uint8)
    with VideoSession(frames_apart[1]) as session:
        session.watch(footage, long_video=mode, query=QUESTION)
        assert session.model.units_per_clip == session.model.clip_length
        conversation = session._pipeline.conversation
        assert len(conversation.entries) == (16 + 17 if mode == "vilamp" else 16 * 4 + 16)
        chat = 20  # positions before the video, which are counted with the question's
        assert conversation._cache.position - chat + QUESTION_POSITIONS <= session.model.capacity
        list(session.ask(" ".join(["the cat sat"] * 80), max_new_tokens=300))
        assert session.stats().finished == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"long_video": 50}, "--long-video 50: expected a multiple of 4"),
        ({"long_video": 48, "keyframes": 13}, "--keyframes 13.*12 to"),
        ({"long_video": 48, "keyframes": 0}, "--keyframes 0"),
        ({"keyframes": 4}, "add --long-video"),
        ({"long_video": 40000, "keyframes": 4}, "--long-video 40000 with --keyframes 4 needs a KV.*fewer --keyframes"),
    ],
)
def test_a_build_that_does_not_fit_is_refused_with_the_numbers(tiny_artifact, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        build(tiny_artifact, "cpu", tmp_path / "package", frames=16, **options)
    assert not list(tmp_path.iterdir())


def test_the_command_answers_about_a_long_video(package, video, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(video):
        cv2.imwrite(str(folder / f"{number}.png"), image[:, :, ::-1])
    arguments = ["run", str(package.folder), str(folder), QUESTION, "--max-new-tokens", "4", "--json"]
    monkeypatch.setattr("sys.argv", ["liteframe", *arguments, "--long-video", "hybrid"])
    assert cli.main() == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["frames"] == FRAMES
    picture = ["--long-video", "hybrid", "--query-image", str(folder / "3.png")]
    monkeypatch.setattr("sys.argv", ["liteframe", *arguments, *picture])
    assert cli.main() == 0
    capsys.readouterr()
    for extra, message in (
        (["--query-image", str(folder / "3.png")], "add --long-video"),
        (["--long-video", "hybrid", "--query-image", str(folder / "none.png")], "none.png"),
        (["--long-video", "vilamp"], "use --long-video hybrid"),
    ):
        monkeypatch.setattr("sys.argv", ["liteframe", *arguments, *extra])
        assert cli.main() == 2
        assert message in capsys.readouterr().err


def test_the_manifest_says_how_the_video_is_thinned(package):
    settings = package.manifest.model.long_video
    assert msgspec.structs.asdict(settings) == {
        "max_frames": FRAMES,
        "keyframes": KEYFRAMES,
        "similar": 0.999,
        "redundancy_weight": 0.5,
        "temperature": 0.05,
    }
    assert package.engine("merger").parity["cosine"] >= 0.99999


def test_the_query_of_a_question_is_its_words(session, reference):
    session.watch(np.zeros((16, 56, 56, 3), np.uint8), long_video="hybrid", query=QUESTION)
    query = session._searcher.query(QUESTION)
    assert isinstance(query, Query)
    np.testing.assert_allclose(query.parts, words(reference, QUESTION), atol=1e-6)
    np.testing.assert_allclose(query.vector, words(reference, QUESTION).mean(0), atol=1e-6)


def test_the_artifact_loads_with_its_settings(tiny_artifact):
    assert load_artifact(tiny_artifact).long_video.similar == 0.85
