"""Engine packages: what is written is read back; anything else is refused by name, before it is loaded."""

import copy
import errno
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from liteframe.engines.package import InputError, describe_file, hash_file, inside, new_folder, open_package
from liteframe.engines.package import write_manifest as write

FREE_MAPS = {"versions", "special_tokens", "found", "parity"}
REMEDY = re.compile(r"\b(build|copy|put) [^;]*$")
FILES = (
    "encoder.engine decoder.engine graphs/encoder.fused.onnx graphs/encoder.data graphs/decoder.fused.onnx "
    "graphs/decoder.data polygraphy/commands.txt drift/drift.html tokenizer.json chat_template.jinja embeddings.npy "
    "query_tokenizer.json"
).split()


@pytest.fixture
def folder(tmp_path, tiny_manifest):
    """A whole package."""
    made = tmp_path / "package"
    write(made, tiny_manifest(made))
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_manifest):
    """A whole package; who changes it puts it back."""
    made = tmp_path_factory.mktemp("whole") / "package"
    write(made, tiny_manifest(made))
    return made


def refusal(folder):
    """What `open_package` says: one line, what it is about first and what to do last."""
    with pytest.raises(InputError) as caught:
        open_package(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}")
    assert message.isprintable()
    assert REMEDY.search(message), message
    return message


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def edit(folder, change):
    """Changes the manifest as someone with an editor would."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def list_file(folder, **changes):
    """Changes what a manifest, signed again, says of the tokenizer's file."""
    manifest = open_package(folder).manifest
    text = msgspec.structs.replace(manifest.text, tokenizer=msgspec.structs.replace(manifest.text.tokenizer, **changes))
    write(folder, msgspec.structs.replace(manifest, text=text))


def places(node, path=()):
    """Every value of a JSON document, with its path."""
    yield path, node
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(value, (*path, key))


def at(content, path):
    for key in path:
        content = content[key]
    return content


def read_json(folder):
    return json.loads((folder / "manifest.json").read_text())


# what is read


def test_what_is_written_is_read_back(folder, tiny_manifest, tmp_path):
    opened = open_package(folder)
    assert msgspec.structs.replace(opened.manifest, sha256="") == tiny_manifest(tmp_path / "again")
    assert opened.folder == folder
    assert open_package(str(folder)).manifest == opened.manifest
    assert [file.path for file in opened.manifest.files()] == [*FILES[2:6], *FILES[:2], *FILES[6:]]


def test_the_manifest_holds_what_json_readers_expect(folder):
    content = read_json(folder)
    assert (content["format"], content["target"], content["model"]["image_size"]) == (1, "a100", [56, 42])
    tokenizer = content["text"]["tokenizer"]
    assert tokenizer == {"path": "tokenizer.json", "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    assert content["graphs"][0]["inputs"] == [
        {
            "name": "x",
            "dtype": "float32",
            "shape": ["clips", 8],
            "profile": {"min": [1, 8], "opt": [2, 8], "max": [4, 8]},
        }
    ]
    assert [engine["parity"] for engine in content["engines"]] == [
        {"cosine": 0.9999987, "relative_difference": 2e-7},
        None,
    ]


def test_the_manifests_hash_is_that_of_its_compact_form_without_the_hash(folder):
    text = (folder / "manifest.json").read_bytes()
    digest = json.loads(text)["sha256"]
    bare = msgspec.json.format(text.replace(digest.encode(), b""), indent=-1)
    assert digest == hashlib.sha256(bare).hexdigest()


def test_the_same_manifest_gives_the_same_bytes(tmp_path, tiny_manifest):
    texts = []
    for name in ("one", "two"):
        manifest = tiny_manifest(tmp_path / name)
        versions = {"torch": "2", "onnx": "1"}
        if name == "two":
            versions = dict(reversed(versions.items()))
        write(
            tmp_path / name,
            msgspec.structs.replace(
                manifest, built_from=msgspec.structs.replace(manifest.built_from, versions=versions), sha256=name
            ),
        )
        texts.append((tmp_path / name / "manifest.json").read_bytes())
    assert texts[0] == texts[1]
    assert texts[0].endswith(b"}\n")


def test_layout_and_order_of_the_json_mean_nothing(folder):
    before = open_package(folder).manifest
    (folder / "manifest.json").write_text(json.dumps(read_json(folder), sort_keys=True, indent=7))
    assert open_package(folder).manifest == before


def test_a_package_may_be_moved_or_linked_as_a_whole(folder, tmp_path):
    manifest = open_package(folder).manifest
    moved = folder.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    assert open_package(moved).manifest == open_package(tmp_path / "link").manifest == manifest


def test_links_within_the_package_are_followed(folder):
    (folder / "encoder.engine").rename(folder / "elsewhere")
    (folder / "encoder.engine").symlink_to("elsewhere")
    assert open_package(folder).path(open_package(folder).engine("encoder").files[0]) == folder / "encoder.engine"


def test_engines_and_graphs_are_found_by_name(folder):
    opened = open_package(folder)
    assert opened.engine("decoder").files[0].path == "decoder.engine"
    assert opened.graph("encoder", "fused").files[0].path == "graphs/encoder.fused.onnx"
    with pytest.raises(InputError, match="no encoder graph in the plain dialect; build the package again"):
        opened.graph("encoder", "plain")


def test_a_bundle_says_what_finishes_it(folder):
    write(folder, msgspec.structs.replace(open_package(folder).manifest, engines=[]))
    with pytest.raises(InputError) as caught:
        open_package(folder).engine("encoder")
    assert str(caught.value) == (
        f"{folder}: a bundle for a100, without engines; on the device run: liteframe compile {folder}"
    )


@pytest.mark.parametrize("size", [0, 1, 2**22 - 1, 2**22, 2**22 + 1])
def test_a_file_is_described_by_its_size_and_hash(tmp_path, size):
    content = bytes(range(251)) * (size // 251 + 1)
    path = tmp_path / "a" / "b"
    path.parent.mkdir()
    path.write_bytes(content[:size])
    described = describe_file(tmp_path, path)
    assert (described.path, described.bytes) == ("a/b", size)
    assert described.sha256 == hash_file(path) == hashlib.sha256(content[:size]).hexdigest()


# files that changed


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES), position=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_any_changed_byte_of_any_file_is_refused(whole, name, position, flip):
    path = whole / name
    content = path.read_bytes()
    changed = bytearray(content)
    changed[position % len(content)] ^= flip
    path.write_bytes(changed)
    try:
        assert refusal(whole).startswith(f"{path}: SHA-256 differs from manifest.json")
    finally:
        path.write_bytes(content)


def means(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_any_changed_byte_of_the_manifest_is_refused_unless_it_means_the_same(whole, position, byte):
    path, manifest = whole / "manifest.json", open_package(whole).manifest
    content = path.read_bytes()
    changed = bytearray(content)
    position %= len(content)
    assume(changed[position] != byte)
    changed[position] = byte
    path.write_bytes(changed)
    try:
        if means(bytes(changed)) == means(content):
            assert open_package(whole).manifest == manifest
        else:
            assert refusal(whole).startswith(f"{path}: ")
    finally:
        path.write_bytes(content)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(FILES), size=st.integers(0, 200))
def test_a_file_of_another_size_is_refused(whole, name, size):
    path = whole / name
    content = path.read_bytes()
    assume(size != len(content))
    path.write_bytes((content + bytes(200))[:size])
    try:
        assert refusal(whole).startswith(f"{path}: {size} bytes, manifest.json says {len(content)}; truncated")
    finally:
        path.write_bytes(content)


def remove(path):
    path.unlink()


def rename(path):
    path.rename(path.with_name("another"))


def make_folder(path):
    path.unlink()
    path.mkdir()


def break_link(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("change", [remove, rename, make_folder, break_link])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(folder, name, change):
    change(folder / name)
    message = refusal(folder)
    assert message == f"{folder / name}: missing, although manifest.json lists it; copy the whole package again"


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_package_is_refused_though_it_leads_to_the_same_bytes(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    assert f"refers to '{name}', which lies outside the folder" in refusal(folder)


def test_a_file_in_a_folder_linked_from_outside_is_refused(folder, tmp_path):
    (folder / "graphs").rename(tmp_path / "graphs")
    (folder / "graphs").symlink_to(tmp_path / "graphs")
    assert "refers to 'graphs/encoder.fused.onnx', which lies outside the folder" in refusal(folder)


# manifests that changed


def test_a_manifest_edited_by_hand_is_refused(folder):
    edit(folder, lambda content: content["model"].update(chunk=1024))
    assert refusal(folder) == (
        f"{folder / 'manifest.json'}: changed since it was built (its own SHA-256 does not match); "
        "build the package again"
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_changed_value_is_refused(whole, data):
    path = whole / "manifest.json"
    before = path.read_bytes()
    content = json.loads(before)
    place, old = data.draw(st.sampled_from([found for found in places(content) if found[0]]))
    new = data.draw(values)
    assume(new != old)
    at(content, place[:-1])[place[-1]] = new
    path.write_text(json.dumps(content))
    try:
        assert refusal(whole).startswith(f"{path}: ")
    finally:
        path.write_bytes(before)


def objects(content):
    """Objects of the manifest whose fields are fixed."""
    for place, node in places(content):
        if isinstance(node, dict) and not FREE_MAPS & {*place[-1:]}:
            yield place, node


def test_every_missing_field_is_refused_by_name(whole, tmp_path):
    content = read_json(whole)
    tried = 0
    for place, node in objects(content):
        for field in node:
            changed = copy.deepcopy(content)
            del at(changed, place)[field]
            (tmp_path / "manifest.json").write_text(json.dumps(changed))
            message = refusal(tmp_path)
            assert f"field `{field}`" in message or field == "format", (place, message)
            tried += 1
    assert tried > 140


def test_every_unknown_field_is_refused_by_name(whole, tmp_path):
    content = read_json(whole)
    for place, _ in objects(content):
        changed = copy.deepcopy(content)
        at(changed, place)["colour"] = 1
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        assert "unknown field `colour`" in refusal(tmp_path), place


def test_a_name_that_would_break_the_line_is_escaped(folder):
    edit(folder, lambda content: content.update({"a\nb\x1b[31mé": 1}))
    assert r"unknown field `a\nb\x1b[31mé`" in refusal(folder)


def test_a_field_of_another_type_is_refused_with_both_types(folder):
    edit(folder, lambda content: content["model"].update(chunk="512"))
    assert "Expected `int`, got `str` - at `$.model.chunk`" in refusal(folder)


@pytest.mark.parametrize("version", [0, 2, -1, 1.5, "1", None, [1], {}])
def test_another_format_is_refused_by_its_number(folder, version):
    edit(folder, lambda content: content.update(format=version, unheard_of=1))
    message = refusal(folder)
    assert message.startswith(
        f"{folder / 'manifest.json'}: package format {version!r}, this version of liteframe reads 1"
    )
    assert "install the one that built it" in message


def test_a_format_is_a_number(folder):
    edit(folder, lambda content: content.update(format=True))
    assert "$.format" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'"format"',
        b"\xff\xfe",
        b"[" * 100_000,
        '{"format": 1}'.encode("utf-16"),
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_what_is_no_manifest_is_refused(folder, content):
    (folder / "manifest.json").write_bytes(content)
    assert refusal(folder).startswith(f"{folder / 'manifest.json'}: not a manifest (")


def test_a_truncated_manifest_is_refused(folder):
    path = folder / "manifest.json"
    content = path.read_bytes()
    for size in range(0, len(content) - 2, 37):
        path.write_bytes(content[:size])
        assert "not a manifest" in refusal(folder)


def test_an_unknown_target_is_refused_with_the_known_ones(folder):
    write(folder, msgspec.structs.replace(open_package(folder).manifest, target="h100"))
    assert "target 'h100', expected one of cpu, cuda, a100, rtx, jetson-orin, jetson-thor" in refusal(folder)


@pytest.mark.parametrize("kind", ["nothing", "file", "empty folder", "folder as manifest"])
def test_what_is_no_package_is_refused(tmp_path, kind):
    path = tmp_path / "package"
    if kind == "file":
        path.write_bytes(b"")
    elif kind != "nothing":
        (path / "manifest.json" if kind == "folder as manifest" else path).mkdir(parents=True)
    assert refusal(path) == (
        f"{path}: not an engine package (no manifest.json); build one with: liteframe build ARTIFACT"
    )


# paths


@pytest.mark.parametrize(
    "path",
    [
        "",
        "..",
        "../secret",
        "graphs/../../secret",
        "graphs/../tokenizer.json",
        "/etc/hostname",
        "//etc/hostname",
        "..\\secret",
        "graphs\\encoder.data",
        "a\0b",
        "out/secret",
    ],
)
def test_a_signed_path_that_leaves_the_package_is_refused(folder, path):
    (folder.parent / "secret").write_bytes(b"{}")
    (folder / "out").symlink_to("..")
    list_file(folder, path=path)
    assert refusal(folder).startswith(
        f"{folder}: refers to {path!r}, which lies outside the folder; expected a path in it"
    )


def test_a_link_to_itself_is_refused(folder):
    (folder / "loop").symlink_to("loop")
    list_file(folder, path="loop")
    assert re.search("outside|missing", refusal(folder))  # Python 3.13 no longer minds when it resolves one


def test_an_absolute_path_is_refused_even_into_the_package(folder):
    list_file(folder, path=str(folder / "tokenizer.json"))
    assert "which lies outside the folder" in refusal(folder)


@pytest.mark.parametrize("path", [".", "graphs", "tokenizer.json/more", "x" * 300, "x/" * 3000])
def test_a_signed_path_that_is_no_file_is_refused(folder, path):
    list_file(folder, path=path)
    assert "missing" in refusal(folder)


@pytest.mark.parametrize("changes", [{"bytes": -2}, {"bytes": 2**63}, {"sha256": ""}, {"sha256": "A" * 64}])
def test_a_signed_size_or_hash_that_is_not_the_files_is_refused(folder, changes):
    list_file(folder, **changes)
    assert refusal(folder).startswith(f"{folder / 'tokenizer.json'}: ")


parts = st.sampled_from(["..", ".", "", "a", "out", "loop", "file", "~", "a\\b", "a\0b", "…"])


@settings(max_examples=300, deadline=None)
@given(relative=st.lists(parts, max_size=6).map("/".join) | st.text(max_size=12))
def test_a_path_is_held_within_its_folder(tmp_path_factory, relative):
    folder = tmp_path_factory.getbasetemp() / "held"
    if not folder.exists():
        (folder / "a").mkdir(parents=True)
        (folder / "file").touch()
        (folder / "out").symlink_to("..")
        (folder / "loop").symlink_to("loop")
    try:
        path = inside(folder, relative)
    except InputError as error:
        assert repr(relative) in str(error)
    else:
        assert os.path.commonpath([os.path.realpath(path), os.path.realpath(folder)]) == os.path.realpath(folder)
        assert ".." not in path.parts


@pytest.mark.parametrize("relative", ["a", "a/b", "./a", "a//b", "a/./b", ".hidden", "...", "a..b", "café", " ", "~"])
def test_a_path_within_its_folder_is_kept(tmp_path, relative):
    assert inside(tmp_path, relative) == tmp_path / relative


# writing


def disk_full(path, content):
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError(28, "No space left on device")


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("method", "failure", "error"),
    [("write_bytes", disk_full, OSError), ("replace", interrupt, KeyboardInterrupt)],
    ids=["full disk", "interrupt"],
)
def test_a_manifest_is_written_whole_or_not_at_all(folder, monkeypatch, method, failure, error):
    before = open_package(folder).manifest
    there = names(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, failure)
        with pytest.raises(error):
            write(folder, msgspec.structs.replace(before, target="rtx"))
    assert open_package(folder).manifest == before
    assert names(folder) == there


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_writing_names_the_output(tmp_path, number):
    output = tmp_path / "output"
    with pytest.raises(InputError) as caught, new_folder(output) as folder:
        (folder / "half").write_bytes(b"written")
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"{output}: cannot be written ({os.strerror(number)}); nothing of it was kept")
    assert not list(tmp_path.iterdir())


def test_another_failing_file_keeps_its_own_error(tmp_path):
    with pytest.raises(PermissionError), new_folder(tmp_path / "output"):
        raise PermissionError(errno.EACCES, "Permission denied", "elsewhere")
    assert not list(tmp_path.iterdir())


def test_a_new_folder_appears_when_it_is_done(tmp_path):
    output = tmp_path / "deep" / "er" / "output"
    with new_folder(output) as folder:
        assert not output.exists()
        assert folder.parent == output.parent  # the same file system, where a rename is atomic
        (folder / "file").write_text("content")
    assert (output / "file").read_text() == "content"
    assert output.stat().st_mode & 0o777 == 0o755
    assert names(output.parent) == ["output"]


@pytest.mark.parametrize("error", [ValueError, InputError, OSError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_behind_when_it_fails(tmp_path, error):
    def fail():
        with new_folder(tmp_path / "output") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").touch()
            raise error("mine")

    with pytest.raises(error, match="mine"):
        fail()
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_an_output_that_is_there_is_refused_and_kept(tmp_path, kind):
    output = tmp_path / "output"
    if kind == "folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("precious")
    else:
        output.symlink_to("nowhere")
    before = output.lstat()
    with pytest.raises(InputError) as caught, new_folder(output):
        pytest.fail("the body ran")
    assert str(caught.value) == f"{output}: already exists; remove it or choose another --output"
    assert output.lstat() == before
    assert names(tmp_path) == ["output"]


def test_an_output_that_came_meanwhile_is_refused_and_kept(tmp_path):
    output = tmp_path / "output"
    with pytest.raises(InputError, match=f"^{re.escape(str(output))}: cannot take"), new_folder(output) as folder:
        (folder / "ours").touch()
        output.mkdir()
        (output / "theirs").touch()
    assert names(output) == ["theirs"]
    assert names(tmp_path) == ["output"]


@pytest.mark.parametrize(
    ("output", "reason"),
    [("file/output", "File exists"), ("file/sub/output", "Not a directory"), ("x" * 300, "File name too long")],
)
def test_a_parent_that_can_not_hold_the_output_is_refused(tmp_path, output, reason):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught, new_folder(tmp_path / output):
        pytest.fail("the body ran")
    parent = (tmp_path / output).parent
    assert str(caught.value) == f"{parent}: cannot be written ({reason}); choose another --output"


def test_a_parent_without_permission_is_refused(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)  # to root, who may run this, nothing else is refused
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"), new_folder(tmp_path / "output"):
        pytest.fail("the body ran")
