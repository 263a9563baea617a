"""Sessions against the torch modules put together by hand, with transformers' language model and chat template."""

import json
import re
import time
import warnings

import cv2
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liteframe.engines.package import InputError, Package
from liteframe.export.artifact import load_artifact
from liteframe.runtime import EngineError, VideoSession
from liteframe.runtime.clips import VideoEndedEarly
from liteframe.runtime.text import Sampler
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

QUESTION = "what's in the video?"
OTHER = "the cat sat in 2024"
CLIP, SIZE = 4, 56


class Reference:
    """What an answer is: encoder module, transformers' tokenizer, template and Llama, all in one pass each."""

    def __init__(self, folder):
        self.encoder = load_artifact(folder).encoder
        config = json.loads((folder / "config.json").read_text())
        self.prompt = config["prompt"]
        self.llama = LlamaForCausalLM(LlamaConfig(**config["decoder"])).eval()
        tensors = load_file(folder / "model.safetensors")
        weights = {n.removeprefix("decoder."): t for n, t in tensors.items() if n.startswith("decoder.")}
        missing, surplus = self.llama.load_state_dict(weights, strict=False)
        assert set(missing) == {"lm_head.weight"} and not surplus  # tied
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|im_start|>", eos_token="<|im_end|>"
        )
        self.template = (folder / "chat_template.jinja").read_text()

    def embed(self, text):
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        return self.llama.get_input_embeddings()(ids)[0]

    def positions(self, question, frames=None):
        """Embeddings (positions, D) of the prompt; frames uint8 (frames, H, W, 3) in whole clips."""
        return self._prompt([(frames, question)], [])

    @torch.no_grad()
    def _prompt(self, turns, answers):
        """Of a chat up to where the answer to its last turn begins; `answers` are the ids of those before."""
        marked, messages = {}, []
        for number, (frames, question) in enumerate(turns):
            video = f"[VIDEO {number}]" if frames is not None else ""
            messages.append({"role": "user", "content": video + question})
            if number < len(answers):
                messages.append({"role": "assistant", "content": f"[ANSWER {number}]"})
                marked[f"[ANSWER {number}]"] = self.llama.get_input_embeddings()(torch.tensor(answers[number]).long())
            if video:
                before = sum(len(f) for f, _ in turns[:number] if f is not None)
                marked[video] = self.units(frames, before)
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        parts = re.split(r"(\[(?:VIDEO|ANSWER) \d+\])", text)
        return torch.cat([marked[part] if part in marked else self.embed(part) for part in parts if part])

    def units(self, frames, before):
        clips = torch.from_numpy(frames.reshape(-1, CLIP, *frames.shape[1:]))
        per_unit = CLIP // self.encoder.units_per_clip
        units = self.encoder(clips).reshape(-1, self.encoder.tokens_per_clip // self.encoder.units_per_clip, 24)
        parts = []
        for number, unit in enumerate(units):
            first = before + number * per_unit + 1
            prefix = self.prompt["unit_prefix"].format(first=first, last=first + per_unit - 1)
            parts += [self.embed(prefix), unit, self.embed(self.prompt["unit_suffix"])]
        return torch.cat(parts)

    @torch.no_grad()
    def chat(self, turns, count=24, answers=()):
        """Greedy token ids of each answer, the whole sequence computed anew for each; turns are (frames, question), of
        which the first have got `answers`."""
        answers = list(answers)
        for end in range(len(answers) + 1, len(turns) + 1):
            sequence, ids = self._prompt(turns[:end], answers), []
            while len(ids) < count:
                logits = self.llama(inputs_embeds=sequence[None]).logits[0, -1]
                ids.append(int(logits.argmax()))
                sequence = torch.cat([sequence, self.llama.get_input_embeddings().weight[ids[-1:]]])
            answers.append(ids)
        return answers

    def tokens(self, question, frames=None, count=24):
        return self.chat([(frames, question)], count)[0]

    def answer(self, question, frames=None, count=24):
        return self.decode(self.tokens(question, frames, count))

    def answers(self, turns, count=24):
        return [self.decode(ids) for ids in self.chat(turns, count)]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def reference(tiny_artifact):
    return Reference(tiny_artifact)


def edited(package, model=None, **text):
    """The package with other fields in its manifest's model and text; no answer ends by itself unless asked to."""
    manifest = package.manifest
    return Package(
        folder=package.folder,
        manifest=msgspec.structs.replace(
            manifest,
            model=msgspec.structs.replace(manifest.model, **(model or {})),
            text=msgspec.structs.replace(manifest.text, **{"end_of_turn": [], **text}),
        ),
    )


@pytest.fixture(scope="module")
def package(tiny_package):
    return edited(tiny_package)


@pytest.fixture
def session(package):
    return VideoSession(package, threads=1)


def video(seed, frames=16):
    return np.random.default_rng(seed).integers(0, 256, (frames, SIZE, SIZE, 3), dtype=np.uint8)


def answer(session, question=QUESTION, count=24, **options):
    return "".join(session.ask(question, count, **options))


def assert_equal_stats(stats, **expected):
    assert {name: getattr(stats, name) for name in expected} == expected


# -- the way from video to text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [4, 8, 16])
@pytest.mark.parametrize("question", [QUESTION, OTHER, "café 漢字 {first}\n\n?"])
def test_an_answer_equals_the_modules_put_together_by_hand(session, reference, question, frames):
    watched = video(frames, frames)
    session.watch(watched, frames)
    assert answer(session, question) == reference.answer(question, watched)
    assert_equal_stats(
        session.stats(),
        frames=frames,
        clips=frames // CLIP,
        visual_tokens=frames // CLIP * 2,
        prompt_tokens=len(reference.positions(question, watched)),
        new_tokens=24,
        finished="length",
    )


def test_answers_depend_on_the_video_and_on_its_order(reference):
    """Else the tests around this one would compare nothing."""
    watched = video(1)
    assert len({reference.answer(QUESTION, v) for v in (watched, watched[::-1].copy(), video(2))}) == 3
    assert reference.answer(QUESTION) != reference.answer(OTHER)


def test_a_question_without_a_video_is_answered_alone(session, reference):
    assert answer(session, OTHER) == reference.answer(OTHER)
    assert_equal_stats(session.stats(), frames=0, visual_tokens=0, prompt_tokens=len(reference.positions(OTHER)))


@pytest.mark.parametrize("model", [{"chunk": 1}, {"chunk": 7}, {"chunk": 100}, {"max_clips": 3}, {"max_clips": 16}])
def test_neither_chunks_nor_batches_change_an_answer(tiny_package, reference, model):
    session = VideoSession(edited(tiny_package, model), threads=1)
    session.watch(video(1))
    assert answer(session) == reference.answer(QUESTION, video(1))
    assert_equal_stats(session.stats(), frames=16, clips=4, visual_tokens=8)


def test_text_comes_token_by_token(session, reference):
    session.watch(video(1))
    pieces = list(session.ask(QUESTION, 24))
    assert len(pieces) > 12
    assert "".join(pieces) == reference.answer(QUESTION, video(1))


@settings(max_examples=15, deadline=None)
@given(temperature=st.floats(0.2, 2), top_p=st.floats(0.3, 1), seed=st.integers(0, 2**32), about_video=st.booleans())
def test_sampling_draws_from_the_modules_logits(package, reference, temperature, top_p, seed, about_video):
    session, frames = VideoSession(package, threads=1), video(1) if about_video else None
    if frames is not None:
        session.watch(frames)
    got = answer(session, count=6, temperature=temperature, top_p=top_p, seed=seed)
    sampler, sequence, ids = Sampler(temperature, top_p, seed), reference.positions(QUESTION, frames), []
    with torch.no_grad():
        for _ in range(6):
            ids.append(sampler.pick(reference.llama(inputs_embeds=sequence[None]).logits[0, -1].numpy()))
            sequence = torch.cat([sequence, reference.llama.get_input_embeddings().weight[ids[-1:]]])
    assert got == reference.tokenizer.decode(ids, skip_special_tokens=True)


# -- several questions and videos ------------------------------------------------------------------------------------


def counted(session):
    """The sizes of the decoder's calls from now on."""
    decoder = session._pipeline.conversation._cache._decoder
    sizes, forward = [], decoder.forward
    decoder.forward = lambda embeddings: sizes.append(len(embeddings)) or forward(embeddings)
    return sizes


def test_the_video_is_in_the_cache_before_the_question_comes(session, reference):
    sizes = counted(session)
    session.watch(video(1))
    shared = len(reference.positions("", video(1))) - len(reference.embed("<|im_end|>\n<|im_start|>assistant\n"))
    assert sum(sizes) == shared
    sizes.clear()
    assert answer(session, count=1) == reference.answer(QUESTION, video(1), 1)
    assert sum(sizes) == len(reference.positions(QUESTION, video(1))) - shared


@settings(max_examples=15)
@given(st.lists(st.sampled_from([QUESTION, OTHER, "1000", "see"]), min_size=2, max_size=6), st.booleans())
def test_questions_know_of_the_turns_before(package, reference, asked, about_video):
    session, frames = VideoSession(package, threads=1), video(1) if about_video else None
    if frames is not None:
        session.watch(frames)
    turns = [(frames if number == 0 else None, question) for number, question in enumerate(asked)]
    assert [answer(session, q, 8) for q in asked] == reference.answers(turns, 8)


def test_a_further_question_computes_only_its_own_tokens(session, reference):
    session.watch(video(1))
    answer(session, QUESTION, 8)
    before = len(reference.positions(QUESTION, video(1))) + 7  # what the eighth token of the answer is computed from
    sizes = counted(session)
    assert answer(session, OTHER, 1) == reference.answers([(video(1), QUESTION), (None, OTHER)], 8)[1][:1]
    assert sum(sizes) + before == session.stats().prompt_tokens


def test_what_was_said_can_be_forgotten(session, reference):
    session.watch(video(1))
    answer(session, OTHER)
    session.forget()
    assert answer(session) == reference.answer(QUESTION, video(1))


def test_a_video_replaces_the_one_before(session, reference):
    session.watch(video(1))
    answer(session)
    session.watch(video(2, 8), 8)
    assert_equal_stats(session.stats(), frames=8, clips=2, visual_tokens=4, prompt_tokens=0, new_tokens=0, finished="")
    assert answer(session) == reference.answer(QUESTION, video(2, 8))
    session.watch(video(1))
    assert answer(session) == reference.answer(QUESTION, video(1))


def test_a_video_after_a_question_without_one(session, reference):
    answer(session)
    session.watch(video(1))
    assert answer(session) == reference.answer(QUESTION, video(1))


@pytest.mark.parametrize(
    ("source", "options"),
    [("missing.mp4", {}), (np.zeros((3, 8, 8), np.uint8), {}), (video(2), {"frames": 3}), (video(2), {"fps": -1.0})],
)
def test_a_video_that_can_not_be_read_leaves_the_one_before(session, reference, source, options):
    session.watch(video(1))
    stats = session.stats()
    with pytest.raises(InputError):
        session.watch(source, **options)
    assert session.stats() == stats
    assert answer(session) == reference.answer(QUESTION, video(1))


def test_a_video_that_fails_midway_leaves_the_one_before(session, reference, tmp_path):
    session.watch(video(1))
    for number, image in enumerate(video(2)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    (tmp_path / "9.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"9\.png can't be decoded"):
        session.watch(tmp_path)
    assert answer(session) == reference.answer(QUESTION, video(1))


# -- answers that are not read to their end --------------------------------------------------------------------------


def read(answer, pieces):
    """Takes so many pieces; returns them, and the number of ids that they are made of."""
    text = "".join(next(answer) for _ in range(pieces))
    return text, answer._answer.read


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("how", ["asking on", "closing", "dropping"])
def test_of_an_abandoned_answer_what_was_read_stays_in_the_chat(session, reference, taken, how):
    session.watch(video(1))
    abandoned = session.ask(OTHER)
    _, ids = read(abandoned, taken)
    if how == "closing":
        abandoned.close()
    elif how == "dropping":
        del abandoned
    turns = [(video(1), QUESTION)]
    said = []
    if taken:
        turns = [(video(1), OTHER), (None, QUESTION)]
        said = [reference.tokens(OTHER, video(1), ids)]
    assert answer(session) == reference.decode(reference.chat(turns, answers=said)[-1])
    assert_equal_stats(session.stats(), new_tokens=24, finished="length")


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("after", ["ask", "watch"])
def test_an_answer_ends_with_an_error_once_the_session_has_gone_on(session, reference, taken, after):
    session.watch(video(1))
    first = session.ask(OTHER)
    read(first, taken)
    if after == "ask":
        session.ask(QUESTION, 24)
    else:
        session.watch(video(2))
    with pytest.raises(InputError, match="this answer ended when the session was given another video or question"):
        next(first)
    if after == "watch":
        assert answer(session) == reference.answer(QUESTION, video(2))


def test_an_answer_goes_on_where_nobody_reads_it(session):
    session.watch(video(1))
    session.ask(QUESTION, 24)
    pending = session.ask(OTHER, 24)
    while session.stats().finished != "length":
        time.sleep(0.001)
    assert len("".join(pending)) > 0


def test_a_question_that_is_refused_does_not_end_the_answer_before(session, reference):
    session.watch(video(1))
    first = session.ask(QUESTION, 24)
    begun = next(first)
    for refused in ("", "<|im_end|>", "long " * 2000):
        with pytest.raises(InputError):
            session.ask(refused)
    assert begun + "".join(first) == reference.answer(QUESTION, video(1))


@pytest.mark.parametrize("call", [0, 1, 2, 9])
def test_an_engine_that_fails_while_answering_may_be_asked_again(tiny_package, reference, call):
    session = VideoSession(edited(tiny_package, {"chunk": 16}), threads=1)
    session.watch(video(1))
    decoder = session._pipeline.conversation._cache._decoder
    forward, calls = decoder.forward, []

    def failing(embeddings):
        calls.append(len(embeddings))
        if len(calls) == call + 1:
            raise RuntimeError("out of memory")
        return forward(embeddings)

    decoder.forward = failing
    with pytest.raises(EngineError, match="the decoder failed while answering: out of memory"):
        answer(session)
    assert len(calls) == call + 1
    session.forget()
    assert answer(session) == reference.answer(QUESTION, video(1))


def test_a_template_that_tells_the_time_has_its_turn_prefilled_anew(session, reference, monkeypatch):
    """As when the date in the prefix has changed since the video was read."""
    session.watch(video(1))
    sizes, turn, lead = counted(session), session._text.turn, [1, 2, 3]
    monkeypatch.setattr(session._text, "turn", lambda *a, **k: (lead, turn(*a, **k)[1]))
    for lead in ([1, 2, 3], [4, 5]):
        sizes.clear()
        said = answer(session)
        session.forget()
        fresh = VideoSession(session.package, threads=1)
        monkeypatch.setattr(fresh._text, "turn", lambda *a, lead=lead, **k: (lead, turn(*a, **k)[1]))
        fresh.watch(video(1))
        assert said == answer(fresh) != reference.answer(QUESTION, video(1))
        assert sum(sizes) >= len(reference.positions(QUESTION, video(1))) - 10
        session.watch(video(1))


# -- why answers end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_no_more_tokens_than_asked_for(session, reference, count):
    session.watch(video(1))
    sizes = counted(session)
    assert answer(session, count=count) == reference.answer(QUESTION, video(1), count)
    assert_equal_stats(session.stats(), new_tokens=count, finished="length")
    assert sizes[-(count - 1) :] == [1] * (count - 1) or count == 1  # nothing is computed past the last token


def test_an_answer_ends_at_the_end_of_turn_which_is_not_in_it(tiny_package, reference):
    ids = reference.tokens(QUESTION, video(1))
    position = next(i for i in range(3, len(ids)) if ids[i] not in ids[:i])
    session = VideoSession(edited(tiny_package, end_of_turn=[339, ids[position]]), threads=1)
    session.watch(video(1))
    assert answer(session) == reference.tokenizer.decode(ids[:position])
    assert_equal_stats(session.stats(), new_tokens=position, finished="end")


def test_an_answer_may_be_empty(tiny_package, reference):
    session = VideoSession(edited(tiny_package, end_of_turn=reference.tokens(QUESTION, count=1)), threads=1)
    assert list(session.ask(QUESTION)) == []
    assert_equal_stats(session.stats(), new_tokens=0, finished="end")


@pytest.mark.parametrize("room", [1, 2, 10])
def test_an_answer_ends_when_the_cache_is_full(tiny_package, reference, room):
    prompt = len(reference.positions(QUESTION, video(1)))
    session = VideoSession(edited(tiny_package, {"capacity": prompt + room}), threads=1)
    session.watch(video(1))
    assert answer(session, count=100) == reference.answer(QUESTION, video(1), room + 1)
    assert_equal_stats(session.stats(), prompt_tokens=prompt, new_tokens=room + 1, finished="cache")
    with pytest.raises(InputError, match=r"video, earlier turns and question take \d+ positions.* forget\(\)"):
        session.ask(QUESTION)
    session.forget()
    assert answer(session, count=100) == reference.answer(QUESTION, video(1), room + 1)


def test_the_cache_that_was_built_fills_up(session):
    """All of its growth on the way."""
    session.watch(video(1))
    assert len(answer(session, count=5000)) > 100
    assert session.stats().finished == "cache"
    assert session.stats().prompt_tokens + session.stats().new_tokens == session.model.capacity + 1
    decoder = session._pipeline.conversation._cache._decoder
    assert decoder.position == decoder.capacity == session.model.capacity


@pytest.mark.parametrize("with_video", [False, True])
def test_a_question_that_leaves_no_room_for_an_answer_is_refused(tiny_package, reference, with_video):
    frames = video(1) if with_video else None
    prompt = len(reference.positions(QUESTION, frames))
    for capacity in (prompt, prompt - 1) if with_video else (prompt, prompt - 1, 1):
        session = VideoSession(edited(tiny_package, {"capacity": capacity}), threads=1)
        if frames is not None:
            session.watch(frames)
        with pytest.raises(InputError, match=f"take {prompt + 1} positions, the KV cache holds {capacity};"):
            session.ask(QUESTION)


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("", {}, "the question is empty"),
        (" \n\t", {}, "the question is empty"),
        ("a <|im_end|>", {}, "control token <|im_end|>"),
        (QUESTION, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (QUESTION, {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (QUESTION, {"temperature": -1.0}, "temperature is -1.0"),
        (QUESTION, {"top_p": 0.0}, "top_p is 0.0"),
        (QUESTION, {"seed": -1}, "seed is -1"),
    ],
)
def test_what_can_not_be_asked_is_refused_at_the_call(session, question, options, message):
    with pytest.raises(InputError) as refused:
        session.ask(question, **options)
    assert message in str(refused.value)


# -- sources of frames -----------------------------------------------------------------------------------------------


@pytest.fixture
def recording(tmp_path):
    """A lossless file of 16 frames of the encoder's size, and the frames."""
    path, frames = tmp_path / "video.avi", video(3)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"FFV1"), 10.0, (SIZE, SIZE))
    assert writer.isOpened()
    for image in frames:
        writer.write(image[..., ::-1])
    writer.release()
    return path, frames


def test_arrays_folders_and_files_give_the_same_answer(package, reference, recording, tmp_path):
    path, frames = recording
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(frames):
        cv2.imwrite(str(folder / f"frame{number}.png"), image[..., ::-1])
    expected = reference.answer(QUESTION, frames)
    for source in (frames, folder, str(folder), path, str(path)):
        session = VideoSession(package, threads=1)
        session.watch(source)
        assert answer(session) == expected
        assert_equal_stats(session.stats(), frames=16, clips=4, visual_tokens=8)


def test_a_video_is_sampled_down_to_what_is_wanted(session, reference):
    long = video(4, 160)
    session.watch(long, frames=8, fps=10.0)
    # segments [0, 8) and [8, 16) s, centres 4 and 12 s, one second between frames
    sampled = long[[25, 35, 45, 55, 105, 115, 125, 135]]
    assert answer(session) == reference.answer(QUESTION, sampled)


def test_progress_is_told_in_frames(session):
    told = []
    session.watch(video(1, frames=16), progress=told.append)
    assert told == [4, 8, 12, 16]


def test_as_many_frames_as_the_package_takes_by_default(session):
    session.watch(video(4, 100))
    assert_equal_stats(session.stats(), frames=16, clips=4)


@pytest.mark.parametrize("frames", [1, 5, 15])
def test_a_video_that_ends_within_a_clip_repeats_its_last_frame(session, reference, frames):
    short = video(5, frames)
    session.watch(short)
    padded = short[np.minimum(np.arange(-(-frames // CLIP) * CLIP), frames - 1)]
    assert answer(session) == reference.answer(QUESTION, padded)
    assert_equal_stats(session.stats(), frames=len(padded), clips=len(padded) // CLIP)


def test_a_file_that_ends_before_its_header_says_warns_and_is_answered(session, reference, recording, tmp_path):
    path, frames = recording
    cut = tmp_path / "cut.avi"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 5 // 8])
    capture, readable = cv2.VideoCapture(str(cut)), 0
    while capture.read()[0]:
        readable += 1
    assert readable % CLIP and CLIP < readable < 12 and capture.get(cv2.CAP_PROP_FRAME_COUNT) == 16
    with pytest.warns(VideoEndedEarly, match=rf"cut\.avi ended early: {readable} of the 16 frames"):
        session.watch(cut)
    clips = -(-readable // CLIP)
    assert_equal_stats(session.stats(), clips=clips)
    padded = frames[np.minimum(np.arange(clips * CLIP), readable - 1)]
    assert answer(session) == reference.answer(QUESTION, padded)


@pytest.mark.parametrize("content", [b"", b"no video at all", b"RIFF\x00\x00\x00\x00AVI LIST"])
def test_a_file_that_is_no_video_is_refused(session, tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        session.watch(path)
    assert str(refused.value).startswith(str(path))


def test_a_file_without_frames_is_refused(session, tmp_path):
    path = tmp_path / "empty.avi"
    cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (SIZE, SIZE)).release()
    with pytest.raises(InputError) as refused:
        session.watch(path)
    assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((16, SIZE, SIZE, 3), np.float32),
        np.zeros((16, SIZE, SIZE, 3), np.int8),
        np.zeros((16, 3, SIZE, SIZE), np.uint8),
        np.zeros((16, SIZE, SIZE, 4), np.uint8),
        np.zeros((SIZE, SIZE, 3), np.uint8),
        np.zeros((0, SIZE, SIZE, 3), np.uint8),
        np.zeros((16, 0, SIZE, 3), np.uint8),
        np.zeros((), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_that_is_no_video_is_refused(session, array):
    with pytest.raises(InputError, match=r"expected") as refused:
        session.watch(array)
    assert f"{array.dtype} {array.shape}" in str(refused.value)


@pytest.mark.parametrize("frames", [0, -4, 1, 3, 6, 17])
def test_frames_that_make_no_whole_clips_are_refused(session, frames):
    with pytest.raises(InputError, match=f"{frames} frames, expected a multiple of 4"):
        session.watch(video(1), frames)


@pytest.mark.parametrize("frames", [20, 64])
def test_more_frames_than_the_package_takes_are_refused(session, frames):
    with pytest.raises(InputError, match=f"at most 16; build with --frames {frames}"):
        session.watch(video(1), frames)


@pytest.mark.parametrize("source", [None, 1.5, b"video.mp4", [1, 2]])
def test_what_is_no_source_is_refused(session, source):
    with pytest.raises(InputError, match=f"A {type(source).__name__} can't be opened as a video"):
        session.watch(source)


def test_frames_of_another_size_are_stretched(session, reference):
    images = video(6)[:, :28, :, :]
    session.watch(images)
    stretched = np.stack([cv2.resize(i, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for i in images])
    assert answer(session) == reference.answer(QUESTION, stretched)


def test_watching_warns_of_nothing_else(session):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.watch(video(1))
        answer(session)
