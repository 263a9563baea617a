"""A needle in a haystack, read as the runtime reads any video."""

import cv2
import numpy as np
import pytest
from liteframe.engines.package import InputError
from liteframe.runtime.clips import read_clips
from liteframe.training.haystack import Haystack

SIZE = (16, 24)


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """Two videos, of 5 dark and 3 grey frames."""
    folder = tmp_path_factory.mktemp("footage")
    paths = []
    for name, count, shade in (("dark", 5, 10), ("grey", 3, 120)):
        paths.append(folder / f"{name}.avi")
        writer = cv2.VideoWriter(str(paths[-1]), cv2.VideoWriter.fourcc(*"MJPG"), 10, (48, 32))
        for _ in range(count):
            writer.write(np.full((32, 48, 3), shade, np.uint8))
        writer.release()
    return paths


def shades(haystack):
    clips = list(read_clips(haystack, haystack.frame_count, 4, SIZE))
    return np.concatenate([clip.frames for clip in clips]).mean((1, 2, 3)).round(-1)


@pytest.mark.parametrize(("depth", "first"), [(0, 0), (0.5, 9), (1, 18)])
def test_the_needle_lies_at_its_depth_and_hay_goes_round(footage, depth, first):
    needle = np.full((2, *SIZE, 3), 250, np.uint8)
    haystack = Haystack(footage, needle, 20, depth)
    expected = np.resize([10] * 5 + [120] * 3, 20)
    expected[first : first + 2] = 250
    assert haystack.first == first
    np.testing.assert_array_equal(shades(haystack), expected)


@pytest.mark.parametrize(
    ("frames", "depth", "message"), [(2, 0.5, "2 frames does not fit"), (20, 1.5, "depth is 1.5"), (20, -1, "depth")]
)
def test_a_needle_that_can_not_lie_there_is_refused(footage, frames, depth, message):
    with pytest.raises(InputError, match=message):
        Haystack(footage, np.zeros((2, *SIZE, 3), np.uint8), frames, depth)


def test_hay_that_is_missing_is_named(tmp_path):
    needle = np.zeros((2, *SIZE, 3), np.uint8)
    with pytest.raises(InputError, match=r"hay\.mp4"):
        Haystack([tmp_path / "hay.mp4"], needle, 20, 0)
    with pytest.raises(InputError, match="footage"):
        Haystack([], needle, 20, 0)
