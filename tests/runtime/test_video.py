"""Frames from files, folders, arrays and cameras. A frame shows its index: 8 bars, the bits of it."""

import struct
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from liteframe.engines.package import InputError
from liteframe.runtime import video
from liteframe.runtime.video import VideoSource, open_video

COUNT, FPS = 60, 10.0


def bars(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    bits = (index >> np.arange(8)) & 1
    return np.broadcast_to(np.repeat(255 * bits, width // 8)[None, :, None], (height, width, 3)).astype(np.uint8)


def identity(image: np.ndarray) -> int:
    bits = image.mean(axis=(0, 2)).reshape(8, -1).mean(axis=1) > 127
    return int(bits @ (1 << np.arange(8)))


def write_video(path: Path, count: int = COUNT, fps: float = FPS) -> Path:
    codec = {".mp4": "mp4v", ".avi": "MJPG", ".mjpg": "MJPG", ".webm": "VP80"}[path.suffix]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, (64, 48))
    assert writer.isOpened()
    for index in range(count):
        writer.write(bars(index))
    writer.release()
    return path


def moov_first(mp4: Path) -> Path:
    """As for streaming: the header at the beginning, so that a half-downloaded file can be opened."""
    data, start, boxes = mp4.read_bytes(), 0, {}
    while start < len(data):
        size, name = struct.unpack_from(">I4s", data, start)
        boxes[name] = data[start : start + size]
        start += size
    moov = bytearray(boxes[b"moov"])
    table = moov.index(b"stco") + 8  # past name, version and flags; then the number of offsets, and the offsets
    for place in range(table + 4, table + 4 + 4 * struct.unpack_from(">I", moov, table)[0], 4):
        struct.pack_into(">I", moov, place, struct.unpack_from(">I", moov, place)[0] + len(moov))
    mp4.write_bytes(b"".join([boxes[b"ftyp"], moov, boxes[b"free"], boxes[b"mdat"]]))
    return mp4


def cut(path: Path, fraction: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def identities(source: VideoSource, wanted: range | None = None) -> list[int]:
    return [
        identity(decode()) for index, (_, decode) in enumerate(source.frames()) if wanted is None or index in wanted
    ]


class FakeCapture:
    """A camera that delivers `count` frames, one each 0.25 s of a fake clock, and then nothing."""

    def __init__(self, count: int, opens: bool = True) -> None:
        self.count, self.opened, self.grabbed, self.retrieved = count, opens, 0, 0

    def isOpened(self) -> bool:
        return self.opened

    def get(self, _: int) -> float:
        return 0.0

    def grab(self) -> bool:
        self.grabbed += self.grabbed < self.count + 1
        return self.grabbed <= self.count

    def retrieve(self) -> tuple[bool, np.ndarray]:
        self.retrieved += 1
        return True, bars(self.grabbed - 1)

    def release(self) -> None:
        self.opened = False


def plug_in(monkeypatch: pytest.MonkeyPatch, capture: FakeCapture) -> FakeCapture:
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: capture)
    monkeypatch.setattr(video, "time", SimpleNamespace(monotonic=lambda: 1000 + 0.25 * capture.grabbed))
    return capture


@pytest.mark.parametrize("name", ["video.mp4", "video.avi", "video.webm"])
def test_a_file_yields_every_frame_in_order_at_its_time(tmp_path: Path, name: str) -> None:
    with open_video(write_video(tmp_path / name)) as source:
        assert (source.fps, source.frame_count, source.duration) == (FPS, COUNT, COUNT / FPS)
        frames = [(seconds, decode()) for seconds, decode in source.frames()]
    assert [identity(image) for _, image in frames] == list(range(COUNT))
    assert [seconds for seconds, _ in frames] == [index / FPS for index in range(COUNT)]
    assert all(image.shape == (48, 64, 3) and image.dtype == np.uint8 for _, image in frames)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by /proc")
def test_a_file_decoded_alone_has_the_same_frames_and_no_threads_of_its_own(tmp_path: Path) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    path = write_video(tmp_path / "video.mp4")
    with open_video(path) as source:
        expected = [decode() for _, decode in source.frames()]
    before = threads()
    with open_video(path) as source:
        source.decode_alone()
        for image, (_, decode) in zip(expected, source.frames(), strict=True):
            np.testing.assert_array_equal(decode(), image)
            assert threads() == before


def test_only_the_frames_asked_for_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = plug_in(monkeypatch, FakeCapture(10))
    for index, (_, decode) in enumerate(open_video(0).frames()):
        if index in (3, 7):
            assert identity(decode()) == index
        if index == 9:
            break
    assert capture.retrieved == 2


def test_files_and_folders_are_read_as_rgb(tmp_path: Path) -> None:
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 2] = 255  # OpenCV writes BGR
    writer = cv2.VideoWriter(str(tmp_path / "red.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    writer.write(red)
    writer.release()
    (tmp_path / "folder").mkdir()
    cv2.imwrite(str(tmp_path / "folder" / "red.png"), red)
    for source in (tmp_path / "red.avi", str(tmp_path / "folder")):
        frames = open_video(source).frames()
        _, decode = next(frames)
        assert np.abs(decode()[0, 0].astype(int) - [255, 0, 0]).max() <= 3


def test_a_name_with_a_colon_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "ten.mp4").rename(tmp_path / "10:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert open_video("10:30.mp4").frame_count == COUNT


def test_a_file_without_a_frame_count_is_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "raw.mjpg")  # frames one after another, no header
    assert cv2.VideoCapture(str(path), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT) < 1
    source = open_video(path)
    assert (source.frame_count, source.fps) == (COUNT, pytest.approx(25))  # 25 is what FFmpeg assumes
    assert identities(source) == list(range(COUNT))


def test_an_unbelievable_frame_rate_is_measured(tmp_path: Path) -> None:
    """What browsers record: frames at uneven times, no rate in the header; FFmpeg then tells 1000 a second."""
    path = write_video(tmp_path / "browser.webm", fps=30)
    data = bytearray(path.read_bytes())
    rate = data.index(bytes.fromhex("23e38384"))  # DefaultDuration, 8 bytes, becomes a Void of the same size
    data[rate : rate + 2] = b"\xec\x86"
    for block in range(1, COUNT):
        even = round(block * 1000 / 30)
        stamp = data.index(b"\x81" + struct.pack(">H", even), rate) + 1
        data[stamp : stamp + 2] = struct.pack(">H", even + block * block % 19)
    path.write_bytes(data)
    assert cv2.VideoCapture(str(path), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FPS) == 1000
    source = open_video(path)
    assert (source.frame_count, source.fps) == (COUNT, pytest.approx(30, rel=0.01))
    assert identities(source) == list(range(COUNT))


def test_a_cut_off_file_ends_where_its_frames_end(tmp_path: Path) -> None:
    for path in (
        cut(write_video(tmp_path / "video.avi"), 0.5),
        cut(moov_first(write_video(tmp_path / "video.mp4")), 0.5),
    ):
        source = open_video(path)
        seen = identities(source)
        assert source.frame_count == COUNT
        assert 1 < len(seen) < COUNT
        assert seen[:-1] == list(range(len(seen) - 1))  # of the last frame, only a part may be left


def test_a_file_that_is_no_video_is_one_clear_error_and_no_chatter(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, empty = tmp_path / "text.mp4", tmp_path / "empty.mp4"
    text.write_text("this is not a video\n" * 50)
    empty.touch()
    headless = cut(write_video(tmp_path / "video.mp4"), 0.9)  # its header was at the end
    for path, reason in (
        (text, "not a video"),
        (headless, "cut off"),
        (empty, "empty"),
        (tmp_path / "no", "not exist"),
    ):
        with pytest.raises(InputError, match=reason) as error:
            open_video(path)
        assert str(path) in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_file_without_one_decodable_frame_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_video(tmp_path / "video.mp4")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    with pytest.raises(InputError, match="not one frame"):
        list(open_video(path).frames())
    assert capfd.readouterr() == ("", "")


def test_a_damaged_middle_raises_nothing_and_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_video(tmp_path / "video.avi")
    data = bytearray(path.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = np.random.default_rng(0).bytes(third)
    path.write_bytes(data)
    assert identities(open_video(path), range(4)) == list(range(4))
    assert capfd.readouterr() == ("", "")


def test_a_file_name_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4").rename(tmp_path / "video\udcff.mp4")
    with pytest.raises(InputError, match="UTF-8"):
        open_video(path)


@pytest.mark.parametrize("source", [3.5, None, b"video.mp4", ["video.mp4"]])
def test_a_source_of_another_kind_is_an_error(source: object) -> None:
    with pytest.raises(InputError, match=type(source).__name__):
        open_video(source)  # type: ignore[arg-type]


def test_a_source_that_is_neither_file_nor_folder_is_an_error_at_once() -> None:
    with pytest.raises(InputError, match="neither a file nor a folder"):
        open_video("/dev/zero")


def test_a_read_source_must_be_opened_again(tmp_path: Path) -> None:
    source = open_video(write_video(tmp_path / "video.avi"))
    assert len(list(source.frames())) == COUNT
    with pytest.raises(ValueError, match="open it again"):
        next(source.frames())


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    with open_video(write_video(tmp_path / "video.avi")) as source:
        source.close()
        source.close()


def test_a_generator_given_up_half_way_releases_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = plug_in(monkeypatch, FakeCapture(10))
    frames = open_video(0).frames()
    next(frames)
    assert capture.isOpened()
    frames.close()  # type: ignore[attr-defined]
    assert not capture.isOpened()


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    for index, name in enumerate(
        ["Frame1.PNG", "frame2.bmp", "frame02b.webp", "frame10.tif", "frame010x1.jpg", "g.jpeg"]
    ):
        cv2.imwrite(str(tmp_path / name), bars(index))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._frame1.png").write_text("what another system leaves behind")
    (tmp_path / "frame0.png").mkdir()
    source = open_video(tmp_path)
    assert (source.frame_count, source.fps, source.duration) == (6, 1.0, 6.0)
    assert identities(source) == list(range(6))


def test_fps_gives_the_times_of_images(tmp_path: Path) -> None:
    array = np.zeros((3, 8, 8, 3), np.uint8)
    for index, image in enumerate(array):
        cv2.imwrite(str(tmp_path / f"{index}.png"), image)
    for source in (array, tmp_path):
        assert [seconds for seconds, _ in open_video(source, fps=4).frames()] == [0, 0.25, 0.5]
        assert open_video(source, fps=4).duration == 0.75


@pytest.mark.parametrize(
    ("pixels", "rgb"),
    [
        (np.full((8, 8), 100, np.uint8), [100, 100, 100]),
        (np.full((8, 8, 4), [10, 20, 30, 0], np.uint8), [30, 20, 10]),
        (np.full((8, 8), 100 * 256, np.uint16), [100, 100, 100]),
    ],
    ids=["grey", "transparent", "16-bit"],
)
def test_images_of_any_kind_become_rgb(tmp_path: Path, pixels: np.ndarray, rgb: list[int]) -> None:
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    [(_, decode)] = open_video(tmp_path).frames()
    image = decode()
    assert (image.shape, image.dtype, image[0, 0].tolist()) == ((8, 8, 3), np.uint8, rgb)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(100)], ids=["empty", "text", "damaged"])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "2.png").write_bytes(content)
    with pytest.raises(InputError, match=r"2\.png can't be decoded"):
        identities(open_video(tmp_path))
    assert identities(open_video(tmp_path), range(1)) == [0]  # a frame that nobody wants disturbs nobody
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no images"):
        open_video(tmp_path)


def test_an_array_is_read_in_place() -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)
    source = open_video(array)
    assert (source.frame_count, source.fps) == (5, 1.0)
    assert all(np.shares_memory(decode(), array) for _, decode in source.frames())
    assert np.array_equal(np.stack([decode() for _, decode in source.frames()]), array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 0, 8, 3), np.uint8),
    ],
    ids=["dtype", "one image", "channels first", "alpha", "no frames", "no pixels"],
)
def test_an_array_of_another_shape_or_type_is_an_error(array: np.ndarray) -> None:
    with pytest.raises(InputError, match="uint8 \\(frames, height, width, 3\\)"):
        open_video(array)


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf")])
def test_fps_must_be_positive(fps: float) -> None:
    with pytest.raises(InputError, match="positive"):
        open_video(np.zeros((2, 8, 8, 3), np.uint8), fps)


def test_fps_is_refused_for_files_and_cameras(tmp_path: Path) -> None:
    for source in (write_video(tmp_path / "video.avi"), 0, "camera:0"):
        with pytest.raises(InputError, match="leave fps out"):
            open_video(source, fps=2.0)


@pytest.mark.parametrize("source", [0, "camera:0"])
def test_a_camera_yields_frames_at_the_time_they_arrive(source: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeCapture(10))
    camera = open_video(source)
    assert (camera.frame_count, camera.duration, camera.fps) == (None, None, 0.0)
    frames = camera.frames()
    assert [next(frames)[0] for _ in range(4)] == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("count", [0, 3])
def test_a_camera_that_stops_is_an_error(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = plug_in(monkeypatch, FakeCapture(count))
    with pytest.raises(InputError, match=f"camera:0 stopped delivering after {count} frames"):
        list(open_video(0).frames())
    assert not capture.isOpened()


def test_a_camera_frame_that_cannot_be_converted_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = plug_in(monkeypatch, FakeCapture(3))
    monkeypatch.setattr(capture, "retrieve", lambda: (False, None))
    with pytest.raises(InputError, match="can't be converted"):
        identities(open_video(0))


def test_a_camera_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, FakeCapture(3, opens=False))
    with pytest.raises(InputError, match="camera:7 can't be opened"):
        open_video(7)


@pytest.mark.parametrize("source", ["camera:", "camera:front", "camera:1900", -1, 2**40])
def test_a_camera_without_a_proper_number_is_an_error(source: int | str) -> None:
    with pytest.raises(InputError, match="camera:0 to camera:99"):
        open_video(source)


def test_an_absent_camera_is_refused_without_chatter(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="can't be opened"):
        open_video(99)
    assert capfd.readouterr() == ("", "")
