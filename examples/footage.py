"""Backgrounds that the demo's model is trained, validated and tested on: of free licences where weights come from them.

No picture is in two splits, nor the other view of one. What is in no training set is only measured with.
"""

from __future__ import annotations

from assets import fetch
from liteframe.training.backgrounds import Backgrounds

PHOTOS = {
    "train": (
        "aero1.jpg aloeL.jpg apple.jpg baboon.jpg basketball1.png board.jpg box_in_scene.png building.jpg "
        "butterfly.jpg chicky_512.png ela_original.jpg fruits.jpg graf1.png left.jpg left03.jpg "
        "licenseplate_motion.jpg orange.jpg rubberwhale1.png smarties.png squirrel_cls.jpg stuff.jpg text_defocus.jpg "
        "Blender_Suzanne1.jpg blox.jpg notes.png pic1.png pic3.png"
    ),
    "validation": "HappyFish.jpg aero3.jpg text_motion.jpg",
    "test": "cards.png home.jpg leuvenA.jpg starry_night.jpg sudoku.png",
}
OTHER_PHOTOS = {"train": ("skimage", "lomiri")}  # assets, folders that are of one split as a whole
VIDEOS = {"train": ("vtest", "bunny"), "validation": ("tree",), "test": ("bikes", "carphone")}


def backgrounds(split: str) -> Backgrounds:
    """Raises AssetError when they can't be fetched."""
    opencv = fetch("opencv")
    photos = [path for name in OTHER_PHOTOS.get(split, ()) for path in sorted(fetch(name).iterdir())]
    own = {"vtest": opencv / "vtest.avi", "tree": opencv / "tree.avi"}
    return Backgrounds(
        [*(opencv / name for name in PHOTOS[split].split()), *photos],
        [own.get(name) or fetch(name) for name in VIDEOS[split]],
    )
