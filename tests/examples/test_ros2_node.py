"""The ROS 2 node's handling of messages, without ROS: messages are objects with the fields that theirs have."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from liteframe.runtime import EngineError, InputError, VideoSession
from ros2_node import ENCODINGS, Watcher, to_frame

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
CODES = {
    "bgr8": cv2.COLOR_RGB2BGR,
    "8UC3": cv2.COLOR_RGB2BGR,
    "rgba8": cv2.COLOR_RGB2RGBA,
    "bgra8": cv2.COLOR_RGB2BGRA,
    "mono8": cv2.COLOR_RGB2GRAY,
    "8UC1": cv2.COLOR_RGB2GRAY,
}


def image(pixels, encoding="rgb8", seconds=0.0, padding=0, **changes):
    """A sensor_msgs/Image of pixels (H, W, C) or (H, W), each row followed by padding."""
    rows = pixels.reshape(len(pixels), -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=99)
    whole, fraction = divmod(round(seconds * 1e9), 10**9)
    fields = {
        "header": SimpleNamespace(stamp=SimpleNamespace(sec=whole, nanosec=fraction)),
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "encoding": encoding,
        "step": rows.shape[1],
        "data": rows.tobytes(),
    }
    return SimpleNamespace(**fields | changes)


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_image_in_every_encoding_becomes_rgb(encoding, padding):
    pixels = RGB if encoding == "rgb8" else cv2.cvtColor(RGB, CODES[encoding])
    frame, seconds = to_frame(image(pixels, encoding, 1234.5, padding))
    expected = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB) if pixels.ndim == 2 else RGB
    np.testing.assert_array_equal(frame, expected)
    assert frame.dtype == np.uint8 and seconds == 1234.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "yuv422"}, "an image in yuv422; rgb8, bgr8"),
        ({"data": b"short"}, "has 5 bytes in rows of 21; at least 105"),
        ({"step": 20}, "in rows of 20; at least 105"),
        ({"height": 0, "data": b""}, "an image of 7 x 0"),
    ],
)
def test_an_image_that_is_damaged_says_how(changes, message):
    with pytest.raises(InputError, match=message):
        to_frame(image(RGB, **changes))


class Session:
    def __init__(self, fails=()):
        self.pushed, self.fails = [], list(fails)

    def push(self, frame, seconds):
        if self.fails:
            raise self.fails.pop(0)
        self.pushed.append(seconds)


@pytest.mark.parametrize("camera", [30.0, 25.0, 7.0, 4.0, 2.0])
def test_frames_are_pushed_at_the_rate_that_was_asked_for_at_most(camera):
    session = Session()
    watcher = Watcher(session, 4.0, print, print)
    jitter = np.random.default_rng(1).uniform(-0.2, 0.2, 400)
    for number in range(400):
        watcher.on_image(image(RGB, seconds=100 + (number + jitter[number]) / camera))
    seconds = session.pushed[-1] - session.pushed[0]
    assert (len(session.pushed) - 1) / seconds == pytest.approx(min(camera, 4.0), rel=0.06)


def test_images_that_can_not_be_used_are_counted_and_the_next_is_taken():
    said = []
    session = Session([EngineError("the encoder failed"), InputError("push them in their order")])
    watcher = Watcher(session, 4.0, print, said.append)
    for number in range(4):
        watcher.on_image(image(RGB, "yuv422" if number == 0 else "rgb8", seconds=number))
    assert watcher.refused == 3 and session.pushed == [3.0]
    assert "yuv422" in said[0] and "the encoder failed" in said[1] and "in their order" in said[2]


def test_a_question_is_answered_piece_by_piece_while_images_come(tiny_package):
    said, warned = [], []
    frames = np.random.default_rng(2).integers(0, 256, (8, 56, 56, 3), dtype=np.uint8)
    with VideoSession(tiny_package, threads=1) as session, VideoSession(tiny_package, threads=1) as direct:
        watcher = Watcher(session, 4.0, said.append, warned.append)
        for number, frame in enumerate(frames):
            watcher.on_image(image(frame, seconds=number / 4))
            direct.push(frame, number / 4)
        watcher.on_question(SimpleNamespace(data="what's in the video?")).join(20)
        assert said[-1] == "" and "".join(said) == "".join(direct.ask("what's in the video?"))
        said.clear()
        watcher.on_question(SimpleNamespace(data="<|im_end|>")).join(20)
        assert said == [""] and "control token" in warned[0]
