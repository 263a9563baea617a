"""Which clips are chosen of files, folders and saved clips. A frame shows its index: 8 bars, the bits of it."""

import errno
import os
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.calib.clips import _shares, read_calibration_clips, save_clips
from liteframe.engines.package import InputError
from liteframe.runtime.clips import VideoEndedEarly, read_clips
from liteframe.runtime.video import open_video

SIZE = (32, 48)  # H, W
RED, GREEN, BLUE = np.eye(3, dtype=int)


def numbered(indices: range, colour: np.ndarray = RED + GREEN + BLUE, size: tuple[int, int] = SIZE) -> np.ndarray:
    bits = (np.array(indices)[:, None] >> np.arange(8)) & 1  # (count, 8)
    bars = np.repeat(bits, size[1] // 8, axis=1)[:, None, :, None]
    return np.broadcast_to(20 + 200 * bars * colour, (len(indices), *size, 3)).astype(np.uint8)


def images(folder: Path, frames: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{index}.png"), frame[..., ::-1])
    return folder


def video(path: Path, frames: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (width, height))
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()
    return path


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, *SIZE, 3), np.uint8)


def read(*sources: Path, **options) -> np.ndarray:
    clips = read_calibration_clips(sources, 4, SIZE, **options)
    assert clips.dtype == np.uint8
    assert clips.shape[1:] == (4, *SIZE, 3)
    return clips


def identities(clips: np.ndarray) -> list[list[int]]:
    bits = clips.max(axis=-1).mean(axis=2).reshape(*clips.shape[:2], 8, -1).mean(axis=-1) > 127
    return (bits @ (1 << np.arange(8))).tolist()


def colours(clips: np.ndarray) -> list[int]:
    return clips.mean(axis=(1, 2, 3)).argmax(axis=-1).tolist()


# -- what is read ----------------------------------------------------------------------------------------------------


def test_a_video_and_a_folder_of_images_are_sampled_like_at_inference(tmp_path: Path) -> None:
    frames = numbered(range(90), size=(96, 144))
    for source in (video(tmp_path / "video.avi", frames), images(tmp_path / "images", frames)):
        clips = read(source, limit=5)
        expected = [clip.frames for clip in read_clips(open_video(source), 20, 4, SIZE)]
        assert np.array_equal(clips, expected)
    assert identities(clips)[0] == [7, 8, 9, 10]


def test_channels_are_rgb(tmp_path: Path) -> None:
    assert colours(read(images(tmp_path / "red", numbered(range(1, 9), RED)))) == [0, 0]


def test_a_folder_is_searched_for_videos_and_folders_of_images(tmp_path: Path) -> None:
    images(tmp_path / "data" / "b" / "frames", numbered(range(1, 5)))
    video(tmp_path / "data" / "b" / "c" / "video.AVI", numbered(range(11, 15)))
    video(tmp_path / "data" / "a.avi", numbered(range(21, 25)))
    video(tmp_path / "data" / "c.avi", numbered(range(31, 35)))
    # what is no video, or none that is meant
    cv2.imwrite(str(tmp_path / "data" / "poster.png"), np.zeros((8, 8, 3)))
    (tmp_path / "data" / "notes.txt").write_text("not a video")
    (tmp_path / "data" / "b" / ".hidden.mp4").write_text("not a video")
    images(tmp_path / "data" / ".trash" / "frames", numbered(range(41, 45)))
    (tmp_path / "data" / "empty").mkdir()
    assert [clip[0] for clip in identities(read(tmp_path / "data"))] == [21, 31, 11, 1]
    assert [clip[0] for clip in identities(read(tmp_path / "data" / "b", tmp_path / "data" / "a.avi"))] == [11, 1, 21]


def test_a_folder_given_by_name_may_be_hidden(tmp_path: Path) -> None:
    assert len(read(images(tmp_path / ".cache", numbered(range(1, 9))))) == 2


def test_a_long_video_does_not_crowd_out_short_ones(tmp_path: Path) -> None:
    long = images(tmp_path / "long", numbered(range(240), RED))
    short = images(tmp_path / "short", numbered(range(1, 9), GREEN))
    medium = video(tmp_path / "medium.avi", numbered(range(100), BLUE))
    clips = read(long, short, medium, limit=14)
    assert Counter(colours(clips)) == {0: 6, 1: 2, 2: 6}
    assert colours(clips) == sorted(colours(clips)), "in the order of the sources"
    assert [clip[1] for clip in identities(clips)[:6]] == [19, 59, 99, 139, 179, 219], "uniformly over the video"


@given(st.dictionaries(st.integers(0, 99), st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 60))
def test_shares_are_as_even_as_the_videos_allow(available: dict[int, int], limit: int) -> None:
    shares = _shares(available, limit)
    assert sum(shares.values()) == min(limit, sum(available.values()))
    assert all(shares[video] <= count for video, count in available.items())
    # who has one less than another has given all, or comes later in the turns
    assert all(
        shares[video] == count or shares[video] >= max(shares.values()) - 1 for video, count in available.items()
    )


def test_of_more_videos_than_clips_a_seed_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(6):
        images(tmp_path / "data" / f"{index}", numbered(range(4 * index, 4 * index + 4)))
        video(tmp_path / "data" / f"{index}.avi", numbered(range(4 * index + 100, 4 * index + 104)))
    clips = read(tmp_path / "data", limit=5)
    chosen = [clip[0] for clip in identities(clips)]
    assert len(set(chosen)) == 5
    assert any([clip[0] for clip in identities(read(tmp_path / "data", limit=5, seed=s))] != chosen for s in (1, 2))

    walk = os.walk

    def backwards(*arguments, **options) -> Iterator[tuple[str, list[str], list[str]]]:
        for folder, folders, files in walk(*arguments, **options):
            folders.reverse()
            files.reverse()
            yield folder, folders, files

    monkeypatch.setattr(os, "walk", backwards)
    moved = shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    assert read(moved, limit=5).tobytes() == clips.tobytes()


def test_progress_counts_the_clips_read(tmp_path: Path) -> None:
    counts: list[int] = []
    static = video(tmp_path / "static.avi", np.repeat(numbered(range(5, 6)), 40, axis=0))
    assert len(read(images(tmp_path / "a", numbered(range(1, 30))), static, limit=12, progress=counts.append)) == 7
    assert counts == list(range(1, 13))


def test_no_more_than_the_clips_kept_is_held(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = np.repeat(np.repeat(rng.integers(0, 256, (300, 10, 10, 3), np.uint8), 20, axis=1), 20, axis=2)
    source = video(tmp_path / "video.avi", frames)  # 36 MB of frames
    del frames
    tracemalloc.start()
    clips = read_calibration_clips([source], 4, (200, 200), limit=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(clips) == 10
    assert peak < clips.nbytes + 4 * clips[0].nbytes


def test_what_a_file_that_ends_early_has_is_used(tmp_path: Path) -> None:
    path = video(tmp_path / "video.avi", numbered(range(60)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(VideoEndedEarly, match=str(path)):
        assert 0 < len(read(path)) < 15


# -- alike -----------------------------------------------------------------------------------------------------------


def test_a_static_camera_gives_one_clip(tmp_path: Path) -> None:
    scene = np.random.default_rng(0).integers(40, 200, (1, *SIZE, 3)).repeat(80, axis=0)
    sensor = np.random.default_rng(1).normal(0, 3, scene.shape)
    frames = np.clip(scene + sensor, 0, 255).astype(np.uint8)
    assert len(read(images(tmp_path / "static", frames))) == 1
    frames[40:, 8:16, 8:16] = 255 - frames[40:, 8:16, 8:16] // 8  # something has come
    assert len(read(images(tmp_path / "changed", frames))) == 2


def test_the_same_file_twice_adds_nothing_and_takes_no_others_place(tmp_path: Path) -> None:
    path = images(tmp_path / "a", numbered(range(80)))
    other = images(tmp_path / "b", numbered(range(80, 160)))
    (tmp_path / "link").symlink_to(path)
    copy = shutil.copytree(path, tmp_path / "copy")
    once = read(path, other, limit=6)
    assert len(once) == 6
    again = read(path, tmp_path / "a" / ".." / "a", tmp_path / "link", other, limit=6)
    assert again.tobytes() == once.tobytes()
    assert read(path, copy).tobytes() == read(path).tobytes()


def test_alike_is_a_mean_difference_below_one_grey_level(tmp_path: Path) -> None:
    grey = np.full((5, 4, *SIZE, 3), 100, np.uint8)
    grey[1, :, ::2] += 1  # every second row: 0.5 levels
    grey[2, :3] += 1  # three frames of four: 0.75
    grey[3, :, ::2] += 3  # 1.5
    grey[4] += 3  # 3.0, and 1.5 from the one before
    save_clips(tmp_path / "clips.npy", grey)
    assert np.array_equal(read(tmp_path / "clips.npy"), grey[[0, 3, 4]])


def test_clips_of_all_sources_are_compared(tmp_path: Path) -> None:
    path = images(tmp_path / "a", numbered(range(40)))
    save_clips(tmp_path / "clips.npy", read(path))
    assert read(tmp_path / "clips.npy", path).tobytes() == read(path).tobytes()


# -- saved clips -----------------------------------------------------------------------------------------------------


def test_saved_clips_are_read_back_as_they_are(tmp_path: Path) -> None:
    clips = noise(9)
    clips //= np.arange(1, 10, dtype=np.uint8)[:, None, None, None, None]  # of different brightness
    save_clips(tmp_path / "clips.npy", clips)
    assert [path.name for path in tmp_path.iterdir()] == ["clips.npy"]
    assert np.array_equal(np.load(tmp_path / "clips.npy", allow_pickle=False), clips)
    assert np.array_equal(read(tmp_path / "clips.npy"), clips)
    assert np.array_equal(read(tmp_path / "clips.npy", limit=3), clips[[1, 4, 7]]), "spread over all"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file, clips: np.ndarray, allow_pickle: bool) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    save_clips(tmp_path / "clips.npy", noise(1))
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"clips\.npy: cannot be written \(No space left"):
        save_clips(tmp_path / "clips.npy", noise(2))
    monkeypatch.undo()
    assert np.array_equal(read(tmp_path / "clips.npy"), noise(1))
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match="cannot be written"):
        save_clips(tmp_path / "nowhere" / "clips.npy", noise(1))


@pytest.mark.parametrize(
    "array",
    [
        noise(2).astype(np.float32),
        noise(2)[:, :3],
        noise(2)[:, :, 1:],
        noise(2)[..., :1],
        noise(2)[0],
        noise(0),
        np.array([None, {}]),
    ],
    ids=["dtype", "length", "size", "grey", "one clip", "none", "pickled"],
)
def test_a_npy_of_anything_else_is_an_error(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "clips.npy", array)
    with pytest.raises(
        InputError, match=r"clips\.npy: (holds .* not one or more clips of uint8 \(4, 32, 48, 3\)|not saved)"
    ):
        read(tmp_path / "clips.npy")


@pytest.mark.parametrize("kept", [0, 5, 60, 200, -1])
def test_a_cut_off_npy_is_an_error(tmp_path: Path, kept: int) -> None:
    save_clips(tmp_path / "clips.npy", noise(2))
    (tmp_path / "clips.npy").write_bytes((tmp_path / "clips.npy").read_bytes()[:kept])
    with pytest.raises(InputError, match=r"clips\.npy: not saved clips"):
        read(tmp_path / "clips.npy")


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@given(place=st.integers(0, 127), value=st.integers(0, 255))
def test_a_damaged_header_is_an_error_or_harmless(tmp_path_factory, place: int, value: int) -> None:
    path = tmp_path_factory.mktemp("npy") / "clips.npy"
    save_clips(path, noise(2))
    data = bytearray(path.read_bytes())
    data[place] = value
    path.write_bytes(data)
    try:
        assert read(path).shape == (2, 4, *SIZE, 3)
    except InputError as error:
        assert str(path) in str(error)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_no_sources_and_no_clips_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="from 0 sources"):
        read()
    with pytest.raises(InputError, match="0 calibration clips"):
        read(images(tmp_path / "a", numbered(range(4))), limit=0)


def test_a_folder_without_videos_or_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data" / "deeper").mkdir(parents=True)
    (tmp_path / "data" / "deeper" / "notes.txt").touch()
    with pytest.raises(InputError, match="data holds no videos and no images"):
        read(images(tmp_path / "a", numbered(range(4))), tmp_path / "data")


def test_a_source_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for name in ("missing", "missing.mp4", "missing.npy"):
        with pytest.raises(InputError, match=name):
            read(tmp_path / name)


def test_what_cannot_be_read_is_named_before_anything_is_read(tmp_path: Path) -> None:
    counts: list[int] = []
    images(tmp_path / "data" / "a", numbered(range(8)))
    damaged = tmp_path / "data" / "z.mp4"
    damaged.write_text("not a video")
    with pytest.raises(InputError, match=str(damaged)):
        read(tmp_path / "data", progress=counts.append)
    assert counts == []


@pytest.mark.parametrize("size", [(31, 48), (32, 47), (16, 200), (200, 16)])
def test_a_video_smaller_than_the_input_on_one_side_is_an_error(tmp_path: Path, size: tuple[int, int]) -> None:
    counts: list[int] = []
    small = images(tmp_path / "small", np.zeros((4, *size, 3), np.uint8))
    with pytest.raises(InputError, match=f"small.* {size[1]} x {size[0]} pixels, the model takes 48 x 32"):
        read(images(tmp_path / "large", numbered(range(8))), small, progress=counts.append)
    assert counts == []


def test_one_small_image_among_large_ones_is_an_error(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", numbered(range(8)))
    cv2.imwrite(str(folder / "5.png"), np.zeros((8, 8, 3)))
    with pytest.raises(InputError, match="images: clips smaller than the input size"):
        read(folder)


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path / "data" / "a", numbered(range(8)))
    scandir = os.scandir

    def forbidding(path):
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    with pytest.raises(InputError, match="a can't be read: Permission denied"):
        read(tmp_path / "data")
