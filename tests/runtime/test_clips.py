"""Which frames are sampled, and the clips they make. A frame shows its index: 8 bars, the bits of it."""

import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import ceil
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.engines.package import InputError
from liteframe.runtime.clips import Clip, VideoEndedEarly, read_clips, sample_indices
from liteframe.runtime.video import Image, VideoSource, open_video

frame_rates = st.floats(0.1, 240) | st.sampled_from([1.0, 10.0, 24000 / 1001, 25.0, 30000 / 1001, 60.0])
clip_lengths = st.integers(1, 8)
clip_counts = st.integers(1, 64)


def numbered(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1  # (count, 8)
    bars = np.repeat(255 * bits, width // 8, axis=1)[:, None, :, None]
    return np.broadcast_to(bars, (count, height, width, 3)).astype(np.uint8)


def write_video(path: Path, count: int) -> Path:
    codec = cv2.VideoWriter.fourcc(*{".mp4": "mp4v", ".avi": "MJPG"}[path.suffix])
    writer = cv2.VideoWriter(str(path), codec, 10.0, (64, 48))
    for image in numbered(count, 48, 64):
        writer.write(image)
    writer.release()
    return path


def identity(image: np.ndarray) -> int:
    bits = image.mean(axis=(0, 2)).reshape(8, -1).mean(axis=1) > 127
    return int(bits @ (1 << np.arange(8)))


def identities(clips: Iterator[Clip]) -> list[list[int]]:
    return [[identity(image) for image in clip.frames] for clip in clips]


class Promising(VideoSource):
    """Promises more frames than it yields; counts what it decodes."""

    def __init__(self, promised: int, images: np.ndarray, fps: float = 10.0) -> None:
        self.name, self.fps, self.frame_count, self.images, self.decoded = "promising", fps, promised, images, 0

    def frames(self) -> Iterator[tuple[float, Callable[[], Image]]]:
        for index, image in enumerate(self.images):
            yield index / self.fps, lambda image=image: self.decode(image)  # type: ignore[misc]

    def decode(self, image: Image) -> Image:
        self.decoded += 1
        return image


class Live(VideoSource):
    """A camera whose frames arrive at the given seconds."""

    def __init__(self, seconds: list[float]) -> None:
        self.name, self.fps, self.frame_count, self.seconds, self.read = "live", 0.0, None, seconds, 0

    def frames(self) -> Iterator[tuple[float, Callable[[], Image]]]:
        for seconds in self.seconds:
            self.read += 1
            yield seconds, lambda: np.zeros((8, 8, 3), np.uint8)
        raise InputError("live stopped delivering")


# -- which frames ----------------------------------------------------------------------------------------------------


def test_ten_seconds_at_25_fps_in_two_clips_of_four() -> None:
    # segments [0, 5) and [5, 10), centres 2.5 and 7.5; 1 s between frames: 1.0, 2.0, 3.0, 4.0 and 6.0, 7.0, 8.0, 9.0
    assert sample_indices(250, 25.0, 8, 4).tolist() == [[25, 50, 75, 100], [150, 175, 200, 225]]


def test_a_long_video_keeps_one_second_between_frames() -> None:
    # an hour at 30 fps: centres at 15 and 45 minutes
    assert (sample_indices(108_000, 30.0, 8, 4) / 30).tolist() == [
        [898.5, 899.5, 900.5, 901.5],
        [2698.5, 2699.5, 2700.5, 2701.5],
    ]


def test_a_short_video_is_sampled_evenly_throughout() -> None:
    assert sample_indices(80, 20.0, 8, 4).tolist() == [[5, 15, 25, 35], [45, 55, 65, 75]]


def test_a_video_of_exactly_as_many_frames_gives_each_once() -> None:
    assert sample_indices(8, 30.0, 8, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_video_of_too_few_frames_gives_all_and_repeats_only_its_last() -> None:
    assert sample_indices(6, 30.0, 64, 4).tolist() == [[0, 1, 2, 3], [4, 5, 5, 5]]
    assert sample_indices(1, 30.0, 64, 4).tolist() == [[0, 0, 0, 0]]


def test_images_taken_more_rarely_than_asked_for_are_taken_one_by_one() -> None:
    # one in ten seconds; frames can't lie closer than they were taken
    assert sample_indices(16, 0.1, 8, 4).tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]


def test_floating_point_skips_no_frame() -> None:
    # centres such as 12.3 and 20.5 ...: a sum just below a whole number must not fall into the frame before
    assert np.all(np.diff(sample_indices(164, 1.0, 160, 8), axis=1) == 1)


@given(st.data(), clip_lengths, clip_counts, frame_rates, st.floats(0.1, 30))
def test_enough_frames_are_sampled_as_defined(
    data: st.DataObject, clip_length: int, clips: int, fps: float, min_fps: float
) -> None:
    frames = clips * clip_length
    frame_count = data.draw(st.integers(frames, 4 * frames) | st.integers(frames, 10**6))
    indices = sample_indices(frame_count, fps, frames, clip_length, min_fps)
    assert (indices.shape, indices.dtype) == ((clips, clip_length), np.int64)

    flat = indices.reshape(-1)
    assert np.all(np.diff(flat) > 0), "in order, across clips too, and none twice"
    assert flat[0] >= 0
    assert flat[-1] < frame_count

    # the definition, in exact arithmetic; a position on the edge of a frame may go to either side
    rate, duration = Fraction(fps), Fraction(frame_count) / Fraction(fps)
    interval = max(1 / rate, min(1 / Fraction(min_fps), duration / frames))
    for k in range(clips):
        for j in range(clip_length):
            seconds = (k + Fraction(1, 2)) * duration / clips + (j - Fraction(clip_length - 1, 2)) * interval
            assert -1e-6 < seconds * rate - int(indices[k, j]) < 1 + 1e-6


@given(st.data(), clip_lengths, clip_counts, frame_rates)
def test_frames_of_a_clip_lie_at_most_a_second_apart(
    data: st.DataObject, clip_length: int, clips: int, fps: float
) -> None:
    frame_count = data.draw(st.integers(1, 10**6))
    gaps = np.diff(sample_indices(frame_count, fps, clips * clip_length, clip_length), axis=1)
    assert gaps.size == 0 or gaps.max() <= max(ceil(fps), 1)


@given(st.data(), clip_lengths, clip_counts, frame_rates)
def test_clips_are_spread_evenly(data: st.DataObject, clip_length: int, clips: int, fps: float) -> None:
    frames = clips * clip_length
    frame_count = data.draw(st.integers(frames, 10**6))
    starts = sample_indices(frame_count, fps, frames, clip_length)[:, 0]
    assert np.all(np.abs(np.diff(starts) - frame_count / clips) < 1 + 1e-6)


@given(st.data(), clip_lengths, clip_counts, frame_rates)
def test_too_few_frames_are_all_sampled_once_and_the_end_repeated(
    data: st.DataObject, clip_length: int, clips: int, fps: float
) -> None:
    frames = clips * clip_length
    frame_count = data.draw(st.integers(1, frames))
    indices = sample_indices(frame_count, fps, frames, clip_length)
    assert indices.shape == (ceil(frame_count / clip_length), clip_length)
    flat = indices.reshape(-1).tolist()
    assert flat[:frame_count] == list(range(frame_count))
    assert set(flat[frame_count:]) <= {frame_count - 1}


@pytest.mark.parametrize(("frames", "clip_length"), [(6, 4), (0, 4), (-4, 4), (4, 0), (4, -2)])
def test_frames_that_do_not_make_clips_are_an_error(frames: int, clip_length: int) -> None:
    with pytest.raises(InputError, match="multiple"):
        sample_indices(100, 25.0, frames, clip_length)
    for source in (open_video(numbered(8)), Live([0.0])):
        with pytest.raises(InputError, match="multiple"):
            read_clips(source, frames, clip_length, (8, 8))  # at the call, not at the first clip


@pytest.mark.parametrize(
    ("frame_count", "fps", "min_fps"), [(0, 25.0, 1.0), (9, 0.0, 1.0), (9, 25.0, 0.0), (9, np.nan, 1.0)]
)
def test_a_video_without_frames_or_rate_is_an_error(frame_count: int, fps: float, min_fps: float) -> None:
    with pytest.raises(InputError, match="positive"):
        sample_indices(frame_count, fps, 4, 4, min_fps)


# -- the clips they make ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["video.mp4", "video.avi"])
def test_clips_of_a_file_hold_the_sampled_frames_and_their_times(tmp_path: Path, name: str) -> None:
    wanted = sample_indices(60, 10.0, 16, 4)
    clips = list(read_clips(open_video(write_video(tmp_path / name, 60)), 16, 4, (24, 32)))
    assert identities(iter(clips)) == wanted.tolist()
    assert np.array_equal([clip.timestamps for clip in clips], wanted / 10.0)
    assert all(clip.frames.shape == (4, 24, 32, 3) and clip.frames.dtype == np.uint8 for clip in clips)
    assert all(clip.timestamps.shape == (4,) and clip.timestamps.dtype == np.float64 for clip in clips)


@given(st.integers(1, 60), clip_lengths, st.integers(1, 12))
def test_clips_of_any_length_hold_the_sampled_frames(count: int, clip_length: int, clips: int) -> None:
    frames = clips * clip_length
    source = open_video(numbered(count), fps=2.0)
    assert (
        identities(read_clips(source, frames, clip_length, (8, 8)))
        == sample_indices(count, 2.0, frames, clip_length).tolist()
    )


def test_only_sampled_frames_are_decoded_and_none_twice() -> None:
    source = Promising(60, numbered(60))
    assert len(list(read_clips(source, 16, 4, (8, 8)))) == 4
    assert source.decoded == 16


def test_a_clip_is_there_as_soon_as_its_last_frame_is_read() -> None:
    source = Promising(60, numbered(60))
    clips = read_clips(source, 16, 4, (8, 8))
    assert source.decoded == 0
    next(clips)
    assert source.decoded == 4


def test_a_file_that_ends_in_mid_clip_has_it_filled_and_the_rest_dropped() -> None:
    assert sample_indices(60, 10.0, 12, 4).tolist() == [[2, 7, 12, 17], [22, 27, 32, 37], [42, 47, 52, 57]]
    clips = read_clips(Promising(60, numbered(30)), 12, 4, (8, 8))
    assert identities(iter([next(clips)])) == [[2, 7, 12, 17]]
    with pytest.warns(VideoEndedEarly, match=r"30 of the 60 frames.*6 of 12 frames were sampled") as record:
        [last] = clips
    assert identities(iter([last])) == [[22, 27, 27, 27]]
    assert last.timestamps.tolist() == [2.2, 2.7, 2.7, 2.7]
    assert [Path(warning.filename).name for warning in record] == ["test_clips.py"]  # it points at who reads


def test_a_file_that_ends_between_clips_has_none_filled() -> None:
    with pytest.warns(VideoEndedEarly, match="4 of 12 frames were sampled"):
        assert identities(read_clips(Promising(60, numbered(20)), 12, 4, (8, 8))) == [[2, 7, 12, 17]]


def test_a_file_that_ends_behind_the_last_sampled_frame_is_complete() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(read_clips(Promising(60, numbered(58)), 12, 4, (8, 8)))) == 3


def test_a_file_that_ends_before_the_first_sampled_frame_is_an_error() -> None:
    with pytest.raises(InputError, match=r"2 of the 60 frames.*number 3"):
        list(read_clips(Promising(60, numbered(2)), 12, 4, (8, 8)))


def test_a_cut_off_avi_warns_and_a_cut_off_mp4_is_an_error(tmp_path: Path) -> None:
    for name in ("video.avi", "video.mp4"):
        path = write_video(tmp_path / name, 60)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    clips = read_clips(open_video(tmp_path / "video.avi"), 60, 4, (48, 64))
    with pytest.warns(VideoEndedEarly, match="of the 60 frames"):
        flat = [number for clip in identities(clips) for number in clip]
    read = flat[: flat.index(flat[-1]) + 1]
    assert 10 < len(read) < 50
    assert read == list(range(len(read)))
    assert flat == read + read[-1:] * (-len(read) % 4)
    with pytest.raises(InputError, match="cut off"):
        open_video(tmp_path / "video.mp4")  # its header stood at the end


def test_giving_up_half_way_releases_the_capture(tmp_path: Path) -> None:
    source = open_video(write_video(tmp_path / "video.avi", 60))
    clips = read_clips(source, 16, 4, (8, 8))
    next(clips)
    clips.close()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="closed"):
        next(source.frames())


def test_reading_to_the_last_clip_releases_the_capture(tmp_path: Path) -> None:
    source = open_video(write_video(tmp_path / "video.avi", 60))
    assert len(list(read_clips(source, 8, 4, (8, 8)))) == 2
    with pytest.raises(ValueError, match="closed"):
        next(source.frames())


# -- cameras ---------------------------------------------------------------------------------------------------------


def camera_times(seconds: list[float], frames: int) -> list[float]:
    return [time for clip in read_clips(Live(seconds), frames, 4, (8, 8)) for time in clip.timestamps.tolist()]


def test_a_camera_gives_a_frame_a_second() -> None:
    assert camera_times([index / 30 for index in range(300)], 8) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_camera_gives_the_frames_nearest_to_full_seconds() -> None:
    seconds = [0.3 * index for index in range(40)]
    nearest = [min(seconds, key=lambda s: abs(s - k)) for k in range(8)]
    assert camera_times(seconds, 8) == pytest.approx(nearest)


def test_a_camera_slower_than_a_frame_a_second_gives_every_frame() -> None:
    assert camera_times([1.5 * index for index in range(9)], 8) == [1.5 * index for index in range(8)]


def test_a_camera_that_stalls_does_not_catch_up() -> None:
    seconds = [0, 0.25, 0.5, 0.75, 1.0, 4.25, 4.5, 4.75, 5.0, 5.25, 5.5, 5.75, 6.0]
    assert camera_times(seconds, 4) == [0, 1.0, 4.25, 5.0]


def test_a_camera_is_read_no_longer_than_needed() -> None:
    camera = Live([0.5 * index for index in range(100)])
    assert len(list(read_clips(camera, 4, 4, (8, 8)))) == 1
    assert camera.read == 7  # 0.0 to 3.0 s


def test_a_camera_that_stops_in_mid_clip_is_an_error() -> None:
    clips = read_clips(Live([float(index) for index in range(6)]), 8, 4, (8, 8))
    assert next(clips).timestamps.tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match="stopped delivering"):
        next(clips)


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_the_whole_frame_is_stretched() -> None:
    left_red = np.zeros((1, 10, 40, 3), np.uint8)
    left_red[:, :, :20, 0] = 255
    [clip] = read_clips(open_video(left_red), 1, 1, (20, 20))
    assert clip.frames[0, :, :8].tolist() == [[[255, 0, 0]] * 8] * 20
    assert clip.frames[0, :, 12:].tolist() == [[[0, 0, 0]] * 8] * 20


@pytest.mark.parametrize(("size", "how"), [((16, 16), cv2.INTER_AREA), ((100, 120), cv2.INTER_CUBIC)])
def test_shrinking_averages_and_growing_is_bicubic(size: tuple[int, int], how: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), np.uint8)
    [clip] = read_clips(open_video(image), 1, 1, size)
    assert np.array_equal(clip.frames[0], cv2.resize(image[0], size[::-1], interpolation=how))


def test_a_frame_of_the_wanted_size_is_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), np.uint8)
    [clip] = read_clips(open_video(image), 1, 1, (48, 64))
    assert np.array_equal(clip.frames, image)


def test_frames_of_different_sizes_and_kinds_make_one_clip(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "0.png"), numbered(4, 48, 64)[0])
    cv2.imwrite(str(tmp_path / "1.png"), numbered(4, 10, 8)[1, ..., 0])
    cv2.imwrite(str(tmp_path / "2.png"), cv2.cvtColor(numbered(4, 200, 104)[2], cv2.COLOR_BGR2BGRA))
    cv2.imwrite(str(tmp_path / "3.png"), numbered(4, 1, 8)[3])
    [clip] = read_clips(open_video(tmp_path), 4, 4, (32, 32))
    assert identities(iter([clip])) == [[0, 1, 2, 3]]


def test_arrays_that_are_mirrored_or_read_only_can_be_read() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    image.flags.writeable = False
    [clip] = read_clips(open_video(image[:, ::-1, ::-1]), 1, 1, (8, 8))
    assert np.array_equal(clip.frames, image[:, ::-1, ::-1])


@pytest.mark.parametrize("size", [(0, 8), (8, -1)])
def test_a_size_without_pixels_is_an_error(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="positive height and width"):
        read_clips(open_video(numbered(4)), 4, 4, size)
