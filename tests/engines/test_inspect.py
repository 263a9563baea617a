"""`liteframe inspect`: what is printed is what the manifest says, and nothing is printed of a broken package."""

import json

import msgspec
import pytest
from liteframe.engines import inspect_package
from liteframe.engines.package import InputError, TensorSpec, open_package, write_manifest


@pytest.fixture
def folder(tmp_path, tiny_manifest):
    made = tmp_path / "package"
    write_manifest(made, tiny_manifest(made))
    return made


@pytest.fixture
def inspect(folder, capsys):
    def run(*arguments):
        assert inspect_package.main([str(folder), *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def words(lines):
    return [line.split() for line in lines]


def test_it_says_what_the_package_is_for_and_made_of(inspect, folder):
    assert inspect()[:5] == [
        f"{folder}: target a100, engines",
        f"built from tiny, SHA-256 {'0' * 64}",
        "with torch 2.13.0",
        "up to 9 frames of 42 x 56 in clips of 1, each in up to 10 tiles and a thumbnail, 3 visual tokens a clip, "
        "KV cache of 12 positions",
        "note: random weights",
    ]


def test_it_says_how_each_engine_was_compiled(inspect):
    lines = inspect()
    start = lines.index("encoder engine, fused: encoder.engine")
    assert lines[start + 1 : start + 3] == [
        "  tensorrt 11.4.1, compute capability 8.0",
        "  precision asked fp32, tensors found 7 fp32",
    ]
    assert lines[start + 3] == "  kept in fp32 by rule norm: 1 nodes"
    assert "against torch" in lines[start + 4]
    assert "0.9999987" in lines[start + 4]
    start = lines.index("decoder engine, fused: decoder.engine")
    assert "0.9999987" not in "".join(lines[start : start + 5])  # it was not run
    assert "encoder graph, fused: graphs/encoder.fused.onnx, graphs/encoder.data" in lines


def test_it_lists_inputs_with_profiles_and_outputs(inspect):
    lines = words(inspect())
    assert ["in", "x", "float32", "clips", "8", "1", "8", "2", "8", "4", "8"] in lines
    assert ["out", "y", "float32", "clips", "2"] in lines


def test_it_ends_with_the_verdict_or_one_json_document(inspect, folder):
    assert inspect()[-1] == "all files are there and match their hashes"
    *_, verdict, last = inspect("--json")
    assert verdict == "all files are there and match their hashes"
    assert json.loads(last) == json.loads((folder / "manifest.json").read_text())


def test_a_bundle_is_called_one(inspect, folder):
    manifest = open_package(folder).manifest
    text = msgspec.structs.replace(manifest.text, notice="")
    write_manifest(folder, msgspec.structs.replace(manifest, engines=[], text=text))
    lines = inspect()
    assert lines[0] == f"{folder}: target a100, bundle without engines"
    assert not any("engine," in line or line.startswith("note") for line in lines)


def with_caches(folder, layers):
    manifest = open_package(folder).manifest
    caches = [f"{kind}_cache_{i}" for i in range(layers) for kind in "kv"]

    def specs(*names):
        return [TensorSpec(name=name, dtype="float32", shape=[1, 2, 256, 8], profile=None) for name in names]

    decoder = msgspec.structs.replace(
        manifest.engines[1],
        inputs=specs("inputs_embeds", *caches),
        outputs=specs("logits", *(f"{name}_out" for name in caches)),
    )
    write_manifest(folder, msgspec.structs.replace(manifest, engines=[manifest.engines[0], decoder], graphs=[]))


@pytest.mark.parametrize("layers", [2, 12])
def test_the_caches_of_all_layers_take_one_line_each_way(inspect, folder, layers):
    with_caches(folder, layers)
    names = [line[1] for line in words(inspect()) if line[:1] in (["in"], ["out"])]
    last = layers - 1
    assert names == [
        *("x", "y"),
        *("inputs_embeds", f"k_cache_0..{last}", f"v_cache_0..{last}"),
        *("logits", f"k_cache_0..{last}_out", f"v_cache_0..{last}_out"),
    ]


def test_the_caches_of_one_layer_keep_their_names(inspect, folder):
    with_caches(folder, 1)
    names = [line[1] for line in words(inspect()) if line[:1] in (["in"], ["out"])]
    assert names[3:5] == ["k_cache_0", "v_cache_0"]


def test_a_package_built_for_the_cpu_is_printed(tiny_package, capsys):
    assert inspect_package.main([str(tiny_package.folder)]) == 0
    out = capsys.readouterr().out
    assert "target cpu, engines" in out
    assert "k_cache_0..1" in out
    assert "onnxruntime" in out


def test_it_tells_how_many_frames_the_cache_holds_in_how_many_tiles(tiny_package, capsys):
    # 1280 positions, 1024 for a question; a clip of 4 frames takes 2 for each tile and the thumbnail, and 32 for text
    model = msgspec.structs.replace(tiny_package.manifest.model, max_tiles=100)
    assert inspect_package.budget_of(model) == {
        **dict.fromkeys((1, 2, 4, 6, 9, 12), 16),
        16: 12,
        25: 12,
        36: 8,
        100: 4,
    }
    assert inspect_package.budget_of(msgspec.structs.replace(model, capacity=1025)) == {}
    inspect_package.main([str(tiny_package.folder)])
    lines = words(capsys.readouterr().out.splitlines())
    start = lines.index(["tiles", "most", "frames"])
    assert lines[start - 1] == ["what", "the", "cache", "holds"]
    assert lines[start + 1 : start + 10] == [[str(t), str(f)] for t, f in inspect_package.budget_of(model).items()][:9]


def test_a_broken_package_prints_nothing(folder, capsys):
    (folder / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(InputError, match=r"tokenizer\.json: SHA-256 differs"):
        inspect_package.main([str(folder), "--json"])
    assert capsys.readouterr().out == ""
