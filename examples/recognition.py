"""What an encoder recognises: drawings of things, told apart by the visual tokens that its graph gives.

    python examples/recognition.py ENCODER.onnx ...

    stamps ──on white, padded──▶ clips of one picture ──encoder──▶ visual tokens ──mean, unit length──▶ features
    features ──each by its 5 nearest neighbours among the others──▶ accuracy

That the projector is not trained does little harm: features that are alike stay so. Some stamps are for calibration and
neither asked about nor neighbours, so that no encoder is judged by what its ranges were fitted to.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import cv2
import numpy as np
from assets import fetch
from liteframe.engines.package import InputError
from liteframe.runtime.cli import guard
from liteframe.runtime.ort_engine import OrtEncoder
from numpy.typing import NDArray
from rich.progress import track

SIZE, CLIP_LENGTH = (224, 224), 4  # of the encoder that clip_smollm2.py assembles
NEIGHBOURS = 5
SMALLEST_CLASS = 10
NOT_BY_LOOKS = ("seasonal", "symbols")  # what belongs to an occasion, and letters, digits, coins
CALIBRATION = 64


def load_stamps(folder: Path, size: tuple[int, int]) -> tuple[NDArray[np.uint8], list[str], list[str]]:
    """Pictures uint8 (n, H, W, 3), RGB, their labels and their names, all in the order of the names.

    A name is a picture's path in `folder`, a label the first two folders of it: "animals/birds". Labels of fewer than
    ten pictures, and those of NOT_BY_LOOKS, are left out.

    Args:
        size: (H, W) in pixels, into which pictures are fitted whole, on white.

    Raises:
        InputError: a picture can't be read, or there are none.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    labels = {name: "/".join(name.split("/")[:-1][:2]) for name in names}
    count = Counter(labels.values())
    names = [n for n in names if count[labels[n]] >= SMALLEST_CLASS and n.split("/")[0] not in NOT_BY_LOOKS]
    if not names:
        raise InputError(f"{folder}: no kind of thing has {SMALLEST_CLASS} pictures; expected the stamps, fetch them")
    return np.stack([_on_white(folder / name, size) for name in names]), [labels[n] for n in names], names


def _on_white(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)  # BGR or BGRA: PNGs with transparency become the latter
    if image is None or image.dtype != np.uint8 or image.ndim != 3:
        raise InputError(f"{path}: not a picture in colours of 8 bits; fetch the stamps again")
    colours: NDArray = image[..., 2::-1].astype(np.float32)
    if image.shape[2] == 4:
        opacity = image[..., 3:].astype(np.float32) / 255
        colours = colours * opacity + 255 * (1 - opacity)
    scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    fitted = cv2.resize(colours, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    padded = np.full((*size, 3), 255, np.uint8)
    padded[top : top + height, left : left + width] = np.clip(np.rint(fitted), 0, 255)
    return padded


def calibration_stamps(count: int) -> set[int]:
    """Which of `count` stamps are for calibration, and never measured; the same ones each time."""
    return set(np.random.default_rng(0).permutation(count)[:CALIBRATION].tolist())


def features(encoder: Path, pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Visual tokens of a clip of each picture (n, H, W, 3), averaged and scaled to unit length: (n, D).

    Raises:
        InputError: the encoder can't be loaded, or takes other clips.
    """
    engine = OrtEncoder(encoder)
    tokens = [
        engine.encode(np.repeat(picture[None, None], CLIP_LENGTH, axis=1))[0].mean(axis=0, dtype=np.float64)
        for picture in track(pictures, encoder.name, transient=True, disable=not sys.stderr.isatty())
    ]
    return np.stack([vector / np.linalg.norm(vector) for vector in tokens])


def nearest_neighbour_accuracy(
    features: NDArray[np.float64], labels: Sequence[str], calibration: Collection[int]
) -> float:
    """How many of those measured get their own label from their nearest neighbours among the others measured.

    The label that most of the five have wins; of several such, that of the nearest.

    Args:
        features: (n, D), of unit length: the nearest have the largest inner product.
        calibration: indices of what is not measured: neither asked about nor a neighbour.
    """
    measured = [i for i in range(len(labels)) if i not in calibration]
    similarity = features[measured] @ features[measured].T
    np.fill_diagonal(similarity, -np.inf)
    right = 0
    for i, neighbours in zip(measured, np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBOURS], strict=True):
        votes = Counter(labels[measured[j]] for j in neighbours)  # the nearest first, which decides between equals
        right += votes.most_common(1)[0][0] == labels[i]
    return right / len(measured)


def main(arguments: list[str]) -> int:
    pictures, labels, _ = load_stamps(fetch("stamps"), SIZE)
    calibration = calibration_stamps(len(pictures))
    print(f"{len(pictures) - len(calibration)} stamps of {len(set(labels))} kinds, {NEIGHBOURS} nearest neighbours")
    for encoder in map(Path, arguments):
        accuracy = nearest_neighbour_accuracy(features(encoder, pictures), labels, calibration)
        print(f"{accuracy:7.1%}  {encoder}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
