"""Tiles: which grid a frame is cut by, what is cut, and what the language model is given of it."""

import json
from itertools import product

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from liteframe.engines.package import InputError, Package, views_of
from liteframe.engines.targets import TARGETS
from liteframe.export.artifact import load_artifact
from liteframe.export.build_engine import build, describe_model
from liteframe.runtime import EngineError, VideoSession, cli
from liteframe.runtime.clips import read_clips
from liteframe.runtime.engine import open_engines
from liteframe.runtime.pipeline import Clip, Queue, Request
from liteframe.runtime.text import ChatText
from liteframe.runtime.tiles import Grid, Tiler, check_budget, check_tiles, choose_grid, split
from liteframe.runtime.video import open_video

QUESTION, OTHER = "what's in the video?", "the cat sat in 2024"
CLIP, SIZE = 4, 56

sides = st.integers(1, 5000)
tile_sides = st.integers(1, 600)


def video(seed, frames=16, height=SIZE, width=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


# -- the grid --------------------------------------------------------------------------------------------------------


def internvl(height, width, tile, tiles):
    """The rule as it is stated: grids in the order of their size; a closer one takes the place of the best so far, and
    so does one as close if the picture has more than half of its pixels. Differences are compared as whole numbers."""
    best, least = None, None
    for rows, columns in sorted(product(range(1, tiles + 1), repeat=2), key=lambda grid: grid[0] * grid[1]):
        if rows * columns > tiles:
            break
        # |width / height - columns tile_w / (rows tile_h)| as a fraction
        distance = abs(width * rows * tile[0] - columns * tile[1] * height), height * rows * tile[0]
        sign = -1 if least is None else distance[0] * least[1] - least[0] * distance[1]
        if sign < 0 or (sign == 0 and height * width > 0.5 * rows * columns * tile[0] * tile[1]):
            best, least = (rows, columns), distance
    return best


@given(height=sides, width=sides, tile=st.tuples(tile_sides, tile_sides), tiles=st.integers(1, 24))
@example(height=1080, width=1920, tile=(448, 448), tiles=12)
@example(height=448, width=672, tile=(448, 448), tiles=2)  # as close to 1 x 1 as to 1 x 2
@example(height=900, width=900, tile=(448, 448), tiles=12)
@example(height=1, width=5000, tile=(448, 448), tiles=6)
def test_the_grid_is_the_one_of_internvls_rule(height, width, tile, tiles):
    grid = choose_grid((height, width), tile, tiles)
    assert grid == internvl(height, width, tile, tiles)
    assert 1 <= grid.tiles <= tiles


@pytest.mark.parametrize(
    ("size", "tiles", "grid"),
    [
        ((1080, 1920), 12, (2, 4)),  # 16:9 is closest to 2:1; of 1 x 2 and 2 x 4 the frame fills half of both
        ((480, 854), 12, (1, 2)),  # and here not of 2 x 4
        ((1920, 1080), 12, (4, 2)),
        ((768, 1024), 12, (3, 4)),
        ((1024, 768), 12, (4, 3)),
        ((448, 448), 12, (1, 1)),
        ((900, 900), 12, (2, 2)),
        ((1000, 1000), 12, (3, 3)),
        ((448, 672), 2, (1, 2)),  # half way between 1:1 and 2:1, and 1.5 tiles of pixels are more than half of 2
        ((200, 300), 2, (1, 1)),
        ((10, 1000), 4, (1, 4)),
        ((1080, 1920), 1, (1, 1)),
    ],
)
def test_known_frames_get_known_grids(size, tiles, grid):
    assert choose_grid(size, (448, 448), tiles) == grid


@given(height=sides, width=sides, factors=st.tuples(st.integers(1, 9), st.integers(1, 9)), tiles=st.integers(1, 16))
def test_only_the_frames_size_in_tiles_matters(height, width, factors, tiles):
    down, across = factors
    stretched = choose_grid((height * down, width * across), (448 * down, 448 * across), tiles)
    assert stretched == choose_grid((height, width), (448, 448), tiles)


# -- the tiles -------------------------------------------------------------------------------------------------------


def stretched(frame, height, width):
    """As InternVL's pictures are: by area where they shrink, bicubically where they grow."""
    how = cv2.INTER_AREA if height * width < frame.shape[0] * frame.shape[1] else cv2.INTER_CUBIC
    return cv2.resize(frame, (width, height), interpolation=how)


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),  # odd, smaller than a tile, portrait, landscape
    grid=st.builds(Grid, st.integers(1, 4), st.integers(1, 4)),
    tile=st.sampled_from([(16, 16), (12, 20), (9, 7)]),
    thumbnail=st.booleans(),
)
def test_tiles_are_pieces_of_the_stretched_frame_row_by_row_with_the_whole_behind_them(size, grid, tile, thumbnail):
    frame = video(1, 1, *size)[0]
    views = split(frame, grid, tile, thumbnail)
    assert views.dtype == np.uint8
    assert views.shape == (views_of(grid.tiles, thumbnail), *tile, 3)
    (height, width), whole = tile, stretched(frame, grid.rows * tile[0], grid.columns * tile[1])
    for row, column in product(range(grid.rows), range(grid.columns)):
        piece = whole[row * height : (row + 1) * height, column * width : (column + 1) * width]
        np.testing.assert_array_equal(views[row * grid.columns + column], piece)
    if thumbnail and grid.tiles > 1:
        np.testing.assert_array_equal(views[-1], stretched(frame, *tile))
    else:
        assert len(views) == grid.tiles


def test_a_frame_of_the_grids_size_is_only_cut():
    frame = video(1, 1, 24, 60)[0]
    views = split(frame, Grid(2, 3), (12, 20), thumbnail=False)
    np.testing.assert_array_equal(np.concatenate([np.hstack(views[:3]), np.hstack(views[3:])]), frame)


def test_the_first_frame_decides_on_the_grid_of_a_video():
    tiler = Tiler((16, 16), 4, thumbnail=True)
    assert [len(tiler(frame)) for frame in (video(1, 1, 16, 64)[0], video(1, 1, 64, 16)[0])] == [5, 5]
    assert tiler.grid == (1, 4)


def test_a_clips_views_are_clips_through_time():
    frames = video(2, 8, 40, 80)
    clips = list(read_clips(open_video(frames), 8, CLIP, (16, 16), Tiler((16, 16), 2, thumbnail=True)))
    assert [clip.frames.shape for clip in clips] == [(3, CLIP, 16, 16, 3)] * 2
    for number, frame in enumerate(frames):
        seen = clips[number // CLIP].frames[:, number % CLIP]
        np.testing.assert_array_equal(seen, split(frame, Grid(1, 2), (16, 16), thumbnail=True))


# -- what fits -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tiny_artifact, tmp_path_factory):
    """Built for 16 frames in 6 tiles; no answer ends by itself."""
    return edited(build(tiny_artifact, "cpu", tmp_path_factory.mktemp("tiled") / "package", frames=16, tiles=6))


def edited(package, **model):
    manifest = package.manifest
    model = msgspec.structs.replace(manifest.model, **model)
    text = msgspec.structs.replace(manifest.text, end_of_turn=[])
    return Package(package.folder, msgspec.structs.replace(manifest, model=model, text=text))


def test_the_cache_is_built_for_the_frames_in_their_tiles_and_thumbnails(package, tiny_package):
    model, whole = package.manifest.model, tiny_package.manifest.model
    assert (model.max_tiles, whole.max_tiles) == (6, 1)
    # 4 clips of 2 tokens in 7 views, with 16 positions of text around each of 2 units, 1024 for a question; of 256
    assert model.positions(16, 7) == 4 * (7 * 2 + 2 * 16) + 1024 == 1208 <= model.capacity == 1280
    assert model.most_frames(7) == 16 and model.most_tiles(16) >= 6


def test_an_encoder_that_is_given_batches_is_built_for_those_of_tiles(tiny_artifact):
    artifact = load_artifact(tiny_artifact)
    given = [(4, 1), (4, 2), (4, 6), (16, 6)]
    assert [describe_model(artifact, *each, TARGETS["a100"]).max_clips for each in given] == [1, 3, 7, 16]
    assert [describe_model(artifact, *each, TARGETS["cpu"]).max_clips for each in given] == [1, 1, 1, 1]


@given(
    capacity=st.integers(1, 6000),
    tokens=st.integers(1, 70),
    units=st.integers(1, 4),
    text=st.integers(16, 99),
    frames=st.integers(1, 12).map(lambda clips: clips * CLIP),
    tiles=st.integers(1, 40),
    thumbnail=st.booleans(),
)
def test_what_fits_is_what_counting_says(package, capacity, tokens, units, text, frames, tiles, thumbnail):
    sizes = {"capacity": capacity, "tokens_per_clip": tokens, "units_per_clip": units, "unit_text": text}
    model = edited(package, **sizes, max_frames=48).manifest.model

    def fits(frames, tiles):
        views = tiles + 1 if thumbnail and tiles > 1 else tiles
        return sum(views * tokens + units * text for _ in range(0, frames, CLIP)) + 1024 <= capacity

    assert (model.positions(frames, views_of(tiles, thumbnail)) <= capacity) == fits(frames, tiles)
    most = max((count for count in range(CLIP, 49, CLIP) if fits(count, tiles)), default=0)
    assert model.most_frames(views_of(tiles, thumbnail)) == most
    assert fits(frames, counted := model.most_tiles(frames, thumbnail)) or counted == 0
    assert not fits(frames, counted + 1)
    if tiles > 1 and not fits(frames, tiles):
        with pytest.raises(InputError, match=rf"^{frames} frames in 1 x {tiles} tiles.*the KV cache holds {capacity};"):
            check_budget(model, frames, Grid(1, tiles), thumbnail)
    else:
        check_budget(model, frames, Grid(1, tiles), thumbnail)


@pytest.mark.parametrize(
    ("capacity", "frames", "thumbnail", "message"),
    [
        (
            1280,
            16,
            True,
            "16 frames in 10 x 10 tiles and a thumbnail take 1960 positions, 1024 for a question among them; the KV "
            "cache holds 1280; use at most 4 frames or at most 15 tiles, or build with --frames 16 --tiles 100",
        ),
        (
            1140,
            8,
            False,
            "8 frames in 10 x 10 tiles take 1488 positions, 1024 for a question among them; the KV cache holds 1140; "
            "use at most 13 tiles, or build with --frames 8 --tiles 100",
        ),
        (
            1100,
            8,
            True,
            "8 frames in 10 x 10 tiles and a thumbnail take 1492 positions, 1024 for a question among them; the KV "
            "cache holds 1100; use at most 2 tiles, or build with --frames 8 --tiles 100",
        ),
        (
            1092,
            8,
            True,
            "8 frames in 10 x 10 tiles and a thumbnail take 1492 positions, 1024 for a question among them; the KV "
            "cache holds 1092; use at most 1 tile, or build with --frames 8 --tiles 100",
        ),
        (
            1000,
            8,
            True,
            "8 frames in 10 x 10 tiles and a thumbnail take 1492 positions, 1024 for a question among them; the KV "
            "cache holds 1000; build with --frames 8 --tiles 100",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(package, capacity, frames, thumbnail, message):
    model = edited(package, capacity=capacity).manifest.model
    with pytest.raises(InputError) as refused:
        check_budget(model, frames, Grid(10, 10), thumbnail)
    assert str(refused.value) == message


@pytest.mark.parametrize("tiles", [0, -1])
def test_less_than_one_tile_is_refused(package, tiles):
    with pytest.raises(InputError, match=f"tiles is {tiles}, expected 1 or more"):
        VideoSession(package, threads=1).watch(video(1), tiles=tiles)


def test_more_tiles_than_fit_of_a_single_clip_are_refused_before_the_video_is_looked_at(package):
    model = package.manifest.model
    check_tiles(model, 111, thumbnail=True)
    check_tiles(model, 112, thumbnail=False)
    with pytest.raises(InputError, match=r"tiles is 112; of a single clip, 4 frames, at most 111 fit .* of 1280 pos"):
        check_tiles(model, 112, thumbnail=True)
    with pytest.raises(InputError, match="tiles is 1000000"):
        VideoSession(package, threads=1).watch("nowhere.mp4", tiles=1_000_000)
    check_tiles(edited(package, capacity=1).manifest.model, 1, thumbnail=True)  # as a video of one tile always was


# -- what the language model is given --------------------------------------------------------------------------------


def by_hand(package, frames, grid, thumbnail, count=24):
    """An answer's text, the visual tokens of each view of a clip, and positions: one view encoded after the other, all
    positions of the prompt in one piece."""
    encoder, decoder = open_engines(package, 1)
    text, model = ChatText.of(package), package.manifest.model
    before, after = text.turn(QUESTION, with_video=True)
    views = np.stack([split(frame, grid, model.image_size, thumbnail) for frame in frames])
    clips, parts = [], [text.embed(before)]
    for start in range(0, len(frames), CLIP):
        clip = [encoder.encode(views[None, start : start + CLIP, view])[0] for view in range(views.shape[1])]
        clips.append(clip)
        for unit in range(2):
            first = start + unit * 2 + 1
            parts.append(text.embed(text._encode(f"Frames {first}-{first + 1}: ")))
            parts += [view[unit : unit + 1] for view in clip]  # 2 tokens a clip, 2 units
            parts.append(text.embed(text._encode("\n")))
    positions = np.concatenate([*parts, text.embed(after)])
    logits, ids = decoder.forward(positions), []
    while len(ids) < count:
        ids.append(int(logits.argmax()))
        logits = decoder.forward(text.embed(ids[-1:]))
    return "".join(text.stream(iter(ids))), clips, len(positions)


@pytest.mark.parametrize(
    ("size", "tiles", "thumbnail", "grid"),
    [
        ((112, 168), 6, True, (2, 3)),
        ((112, 168), 6, False, (2, 3)),
        ((101, 57), 2, True, (2, 1)),  # portrait, odd
        ((20, 60), 3, True, (1, 3)),  # smaller than a tile
        ((70, 70), 6, True, (1, 1)),  # one tile is enough: no thumbnail
        ((112, 168), 1, True, (1, 1)),
    ],
)
def test_a_tiled_video_is_answered_about_as_by_hand(package, size, tiles, thumbnail, grid):
    frames, session = video(3, 8, *size), VideoSession(package, threads=1)
    session.watch(frames, 8, tiles=tiles, thumbnail=thumbnail)
    answer = "".join(session.ask(QUESTION, 24))
    expected, clips, positions = by_hand(package, frames, Grid(*grid), thumbnail)
    assert answer == expected
    views = views_of(grid[0] * grid[1], thumbnail)
    stats = session.stats()
    assert (stats.frames, stats.clips, stats.visual_tokens) == (8, 2, 2 * 2 * views)
    assert (stats.clips_seen, stats.prompt_tokens) == (2, positions)
    for entry, clip in zip(session._pipeline.conversation.entries, clips, strict=False):
        np.testing.assert_array_equal(np.reshape(entry, (views, 2, 24)), clip)


def test_tiles_thumbnail_and_their_order_matter(package):
    """Else the test above would compare nothing."""
    frames = video(3, 8, 112, 168)
    answers = {by_hand(package, frames, Grid(*grid), thumb)[0] for grid, thumb in product([(2, 3), (1, 6)], [0, 1])}
    assert len(answers) == 4


def test_a_video_in_one_tile_gives_the_bits_that_it_gives_without_tiles(package):
    sessions = [VideoSession(package, threads=1) for _ in range(3)]
    for session, options in zip(sessions, ({}, {"tiles": 1, "thumbnail": False}, {"tiles": 6}), strict=True):
        session.watch(video(4, 16), **options)
    plain, one, square = ([np.asarray(e) for e in s._pipeline.conversation.entries] for s in sessions)
    np.testing.assert_array_equal(one, plain)
    np.testing.assert_array_equal(square, plain)
    assert len({"".join(session.ask(QUESTION, 24)) for session in sessions}) == 1


@pytest.mark.parametrize("max_clips", [2, 3, 7, 16])
def test_batches_of_the_encoder_change_nothing(package, max_clips):
    frames, calls = video(3, 16, 112, 168), []
    session = VideoSession(edited(package, max_clips=max_clips), threads=1)
    encode = session._pipeline._encoder.encode
    session._pipeline._encoder.encode = lambda batch: calls.append(len(batch)) or encode(batch)
    session.watch(frames, tiles=6)
    assert "".join(session.ask(QUESTION, 24)) == by_hand(package, frames, Grid(2, 3), True)[0]
    assert sum(calls) == 4 * 7 and max(calls) <= max_clips


def test_a_chat_about_tiles_goes_on_and_can_be_forgotten(package):
    frames, session = video(3, 8, 112, 168), VideoSession(package, threads=1)
    session.watch(frames, 8, tiles=6)
    first = "".join(session.ask(QUESTION, 24))
    assert "".join(session.ask(OTHER, 24)) != first
    session.forget()
    assert "".join(session.ask(QUESTION, 24)) == first
    assert session.stats().visual_tokens == 2 * 2 * 7


def test_a_stream_after_tiles_is_untiled(package):
    session, fresh = VideoSession(package, threads=1), VideoSession(package, threads=1)
    session.watch(video(3, 8, 112, 168), 8, tiles=6)
    session.reset()
    for each in (session, fresh):
        for number, frame in enumerate(video(5, 4, 112, 168)):
            each.push(frame, number)
    assert "".join(session.ask(QUESTION, 8)) == "".join(fresh.ask(QUESTION, 8))
    assert session.stats().visual_tokens == 2


def test_progress_is_told_in_frames_not_in_tiles(package):
    told = []
    VideoSession(package, threads=1).watch(video(3, 16, 112, 168), tiles=6, progress=told.append)
    assert told == [4, 8, 12, 16]


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_frames_in_tiles_beyond_the_cache_leave_what_was_seen(package):
    session = VideoSession(package, threads=1)
    session.watch(video(1, 8), 8)
    before = "".join(session.ask(QUESTION, 24))
    with pytest.raises(InputError, match=r"^16 frames in 4 x 4 tiles and a thumbnail take 1288 positions"):
        session.watch(video(2, 16, 224, 224), tiles=16)
    session.forget()
    assert "".join(session.ask(QUESTION, 24)) == before
    session.watch(video(2, 16, 224, 224)[:, :, :168], tiles=15)  # at most 15 tiles fit, and 4 x 3 is closest
    assert session.stats().visual_tokens == 4 * 2 * 13


def test_an_interrupt_between_tiles_leaves_what_was_seen(package):
    def interrupt(encoded):
        raise KeyboardInterrupt

    session = VideoSession(package, threads=1)
    session.watch(video(3, 8, 112, 168), 8, tiles=6)
    before = "".join(session.ask(QUESTION, 24))
    with pytest.raises(KeyboardInterrupt):
        session.watch(video(4, 16, 112, 168), tiles=4, progress=interrupt)
    session.forget()
    assert "".join(session.ask(QUESTION, 24)) == before
    assert session.stats().visual_tokens == 2 * 2 * 7


def test_only_frames_that_the_video_has_count(package):
    session = VideoSession(package, threads=1)
    session.watch(video(2, 7, 224, 224), tiles=16)  # two clips, though the package takes four
    assert session.stats().visual_tokens == 2 * 2 * 17


def test_an_encoder_that_fails_on_a_tile_loses_the_clip_and_says_so(package):
    session, encoded = VideoSession(package, threads=1), []
    encode = session._pipeline._encoder.encode

    def fail(batch):
        encoded.append(batch)
        if len(encoded) == 9:  # the second clip's second view
            raise RuntimeError("out of memory")
        return encode(batch)

    session._pipeline._encoder.encode = fail
    with pytest.raises(EngineError, match="the encoder failed on 1 clips, which are left out: out of memory"):
        session.watch(video(3, 16, 112, 168), tiles=6)
    session._pipeline._encoder.encode = encode
    session.watch(video(3, 16, 112, 168), tiles=6)
    assert session.stats().visual_tokens == 4 * 2 * 7


def test_a_queue_counts_views_and_lets_a_clip_of_many_through():
    def clip(views):
        return Clip(np.zeros((views, CLIP, 2, 2, 3), np.uint8), given=0)

    queue = Queue(6, weigh=lambda clip: len(clip.views))
    assert queue.put(clip(9)) == []  # it is alone
    assert [len(c.views) for c in queue.take(3)] == [9]
    for views in (2, 1, 3):
        queue.put(clip(views))
    assert [len(c.views) for c in queue.put(clip(4), "drop-oldest")] == [2, 1, 3]
    queue.put(Request(lambda: None))
    queue.put(clip(2))
    assert [len(c.views) for c in queue.take(100)] == [4]
    assert isinstance(queue.take(100), Request)
    queue.put(clip(1))
    assert [len(c.views) for c in queue.take(3)] == [2, 1]


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    for number, image in enumerate(video(6, 8, 112, 168)):
        cv2.imwrite(str(tmp_path / f"{number}.png"), image[..., ::-1])
    return tmp_path


@pytest.mark.parametrize(("options", "views"), [([], 7), (["--no-thumbnail"], 6)])
def test_run_cuts_frames_into_tiles(package, images, capsys, options, views):
    arguments = [package.folder, images, QUESTION, "--tiles", 6, "--max-new-tokens", 8, "--json", *options]
    assert cli.run([str(argument) for argument in arguments]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["frames"], document["visual_tokens"]) == (8, 2 * 2 * views)


def test_run_refuses_tiles_beyond_the_cache_with_exit_code_2(package, images, capsys):
    arguments = [package.folder, images, QUESTION, "--tiles", 96]
    for number in range(8):
        cv2.imwrite(str(images / f"{number}.png"), video(number, 1, 448, 672)[0])
    assert cli.guard(cli.run, [str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("liteframe: 8 frames in 8 x 12 tiles and a thumbnail take 1476 positions")
    assert line.endswith(
        "the KV cache holds 1280; use at most 4 frames or at most 47 tiles, or build with --frames 8 --tiles 96"
    )
