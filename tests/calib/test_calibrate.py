"""A calibration survives its file unchanged, and a file that is not this graph's calibration is refused."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from liteframe.calib.calibrate import calibrate, even_out, hash_graph, load_cache, save_cache
from liteframe.calib.observe import observe, observe_channels
from liteframe.engines.package import InputError
from safetensors import safe_open
from safetensors.numpy import save_file

KEY = "decoder", "fused"
CLIPS = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 6, 3), np.uint8)
GRAPHS = {"decoder": "0" * 64}


@pytest.fixture(scope="module")
def calibration(tiny_graphs, feeds, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("scratch")
    made = calibrate(tiny_graphs[KEY], feeds[KEY], scratch)
    assert not list(scratch.iterdir())
    return made


@pytest.fixture
def cache(calibration, tmp_path):
    path = tmp_path / "cache.safetensors"
    save_cache(path, CLIPS, GRAPHS, {"decoder": calibration})
    return path


def refusal(path, graphs=GRAPHS):
    with pytest.raises(InputError) as caught:
        load_cache(path, graphs)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "calibrate again with --calib" in message
    return message


def test_the_smoothed_graph_is_what_is_observed(tiny_graphs, feeds, calibration, tmp_path):
    channels = observe_channels(tiny_graphs[KEY], feeds[KEY])
    model = ir.load(tiny_graphs[KEY])
    even_out(model, channels)
    ir.save(model, tmp_path / "smoothed.onnx", external_data="smoothed.data")
    expected = observe(tmp_path / "smoothed.onnx", feeds[KEY])
    assert calibration.observation.largest == pytest.approx(expected.largest, rel=1e-5)
    assert calibration.channels.keys() == channels.keys()
    for layer, found in channels.items():
        np.testing.assert_allclose(calibration.channels[layer], found, rtol=1e-5)


def test_a_cache_gives_back_what_was_saved(cache, calibration):
    clips, found = load_cache(cache, GRAPHS)
    np.testing.assert_array_equal(clips, CLIPS)
    assert found.keys() == {"decoder"}
    assert found["decoder"].observation.largest == calibration.observation.largest
    assert found["decoder"].channels.keys() == calibration.channels.keys()
    for layer, channels in calibration.channels.items():
        np.testing.assert_array_equal(found["decoder"].channels[layer], channels)
    histograms = found["decoder"].observation.histograms
    assert histograms.keys() == calibration.observation.histograms.keys()
    for layer, expected in calibration.observation.histograms.items():
        np.testing.assert_array_equal(histograms[layer].counts, expected.counts)
        np.testing.assert_array_equal(histograms[layer].edges(), expected.edges())
        for figure in ("minimum", "maximum", "zeros"):
            assert getattr(histograms[layer], figure) == getattr(expected, figure)
    assert list(cache.parent.iterdir()) == [cache]


def test_a_cache_of_another_graph_is_refused(cache):
    assert "observed on another graph" in refusal(cache, {"decoder": "1" * 64})


def test_the_hash_is_of_the_graph_and_of_its_weights(tmp_path):
    hashes = []
    for graph, weights in ((b"g", b"w"), (b"h", b"w"), (b"g", b"v"), (b"w", b"g"), (b"g", b"w")):
        (tmp_path / "graph").write_bytes(graph)
        (tmp_path / "weights").write_bytes(weights)
        hashes.append(hash_graph(tmp_path / "graph", tmp_path / "weights"))
    assert hashes[0] == hashes[4]
    assert len({*hashes}) == 4


@pytest.mark.parametrize("left", [0, 5, 0.5, -1])
def test_a_truncated_file_is_refused(cache, left):
    content = cache.read_bytes()
    cache.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    assert "not a calibration cache" in refusal(cache)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    refusal(path)  # no such file
    path.write_bytes(b"{}" * 100)
    assert "not a calibration cache" in refusal(path)
    save_file({"weight": np.zeros(3)}, path)
    assert "no calibration cache of this version (format None, expected 'liteframe calibration 2')" in refusal(path)


def drop(tensors, ending):
    return {name: array for name, array in tensors.items() if not name.endswith(ending)}


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: drop(tensors, "q_proj/MatMul/counts"),
        lambda tensors: tensors | {n: a[:5] for n, a in tensors.items() if n.endswith("/counts")},
        lambda tensors: tensors | {n: a[:2] for n, a in tensors.items() if n.endswith("/bins")},
        lambda tensors: tensors | {"projector/channels/m/MatMul": np.zeros(3, np.float32)},
        lambda tensors: tensors | {"decoder": np.zeros(3)},
    ],
    ids=["lacks counts", "too few counts", "too few bins", "of no graph", "of nothing"],
)
def test_a_damaged_file_is_refused(cache, damage):
    with safe_open(cache, "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert json.loads(metadata["graphs"]) == GRAPHS
    save_file(damage(tensors), cache, metadata)
    assert "a damaged calibration cache" in refusal(cache)
