"""Assembles the demo's artifact: the student, projector and adapter of examples/liteframe-smollm2, and SmolLM2.

python examples/liteframe_smollm2.py OUTPUT
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from assets import fetch
from liteframe.engines.package import new_folder
from liteframe.runtime.cli import guard

TRAINED = Path(__file__).parent / "liteframe-smollm2"


def assemble(output: Path) -> None:
    """Writes the artifact's folder. Raises AssetError when SmolLM2 can't be fetched."""
    language_model = fetch("smollm2")
    with new_folder(output) as folder:
        shutil.copytree(TRAINED, folder, dirs_exist_ok=True)
        shutil.copyfile(language_model, folder / language_model.name)


def main(arguments: list[str]) -> int:
    assemble(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
