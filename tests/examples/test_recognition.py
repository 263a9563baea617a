"""Pictures written byte by byte, an encoder of two nodes, neighbours found the slow way."""

import struct
import zlib

import numpy as np
import onnx
import pytest
import recognition
from hypothesis import given
from hypothesis import strategies as st
from liteframe.engines.package import InputError
from onnx import helper
from recognition import calibration_stamps, features, load_stamps, nearest_neighbour_accuracy


def write_png(path, pixels):
    """PNG of uint8 (H, W, channels): 1 grey, 2 grey and opacity, 3 RGB, 4 RGBA."""
    height, width, channels = pixels.shape

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def plain(height, width, *values):
    return np.tile(np.array(values, np.uint8), (height, width, 1))


@pytest.fixture
def stamps(tmp_path):
    """Ten birds, ten fruits of which some lie deeper, nine tools, ten letters."""
    for i in range(10):
        write_png(tmp_path / f"animals/birds/b{i}.png", plain(4, 4, 200, 10 * i, 0))
        write_png(
            tmp_path / ("food/fruit" if i < 6 else "food/fruit/cartoon") / f"f{i}.png", plain(4, 4, 0, 10 * i, 200)
        )
        write_png(tmp_path / f"symbols/letters/l{i}.png", plain(4, 4, 9, 9, 9))
        if i < 9:
            write_png(tmp_path / f"household/tools/t{i}.png", plain(4, 4, 9, 9, 9))
        (tmp_path / f"animals/birds/b{i}.txt").write_text("A bird.")
    return tmp_path


def load_one(stamps, pixels, size):
    write_png(stamps / "animals/birds/b0.png", pixels)
    return load_stamps(stamps, size)[0][0]


def test_labels_are_two_folders_deep_and_small_ones_left_out(stamps):
    pictures, labels, names = load_stamps(stamps, (6, 8))
    assert pictures.shape == (20, 6, 8, 3) and pictures.dtype == np.uint8
    assert names == sorted(names) and set(labels) == {"animals/birds", "food/fruit"}
    assert labels == ["/".join(name.split("/")[:2]) for name in names]
    assert names[0] == "animals/birds/b0.png" and names[-1] == "food/fruit/f5.png"
    assert "food/fruit/cartoon/f9.png" in names
    for picture, name in zip(pictures, names, strict=True):
        value = 10 * int(name[-5])
        expected = (200, value, 0) if "birds" in name else (0, value, 200)
        assert tuple(picture[3, 4]) == expected


@pytest.mark.parametrize(
    ("pixel", "expected"),
    [
        ((10, 20, 30), (10, 20, 30)),
        ((10, 20, 30, 255), (10, 20, 30)),
        ((10, 20, 30, 0), (255, 255, 255)),
        ((10, 20, 30, 51), (206, 208, 210)),  # a fifth of it
        ((100, 51), (224, 224, 224)),
    ],
)
def test_what_is_transparent_is_white(stamps, pixel, expected):
    assert (load_one(stamps, plain(4, 4, *pixel), (4, 4)) == expected).all()


def test_transparent_colours_do_not_bleed_into_what_is_left_of_them(stamps):
    pixels = plain(8, 8, 255, 0, 0, 0)
    pixels[:, ::2] = (0, 0, 0, 255)
    picture = load_one(stamps, pixels, (4, 4))  # each pixel half black, half transparent red
    assert (np.abs(picture.astype(int) - 128) <= 1).all()


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((10, 20), slice(5, 15), slice(0, 20)),
        ((40, 10), slice(0, 20), slice(7, 12)),
        ((1, 100), slice(9, 10), slice(0, 20)),
    ],
)
def test_proportions_are_kept_on_white(stamps, shape, rows, columns):
    picture = load_one(stamps, plain(*shape, 0, 0, 0), (20, 20))
    expected = np.full((20, 20, 3), 255, np.uint8)
    expected[rows, columns] = 0
    np.testing.assert_array_equal(picture, expected)


def test_what_is_no_picture_in_colours_is_refused(stamps):
    (stamps / "food/fruit/f0.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"food/fruit/f0\.png: not a picture"):
        load_stamps(stamps, (4, 4))
    write_png(stamps / "food/fruit/f0.png", plain(4, 4, 7))
    with pytest.raises(InputError, match=r"food/fruit/f0\.png: not a picture"):
        load_stamps(stamps, (4, 4))


def test_a_folder_without_stamps_is_refused(tmp_path):
    with pytest.raises(InputError, match="no kind of thing has 10 pictures"):
        load_stamps(tmp_path, (4, 4))


@pytest.fixture
def encoder(tmp_path):
    """Its tokens are the columns of the clip, averaged over rows and frames."""
    nodes = [
        helper.make_node("Cast", ["frames"], ["pixels"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["visual_tokens"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("frames", onnx.TensorProto.UINT8, ["clips", 4, 6, 8, 3])],
        [helper.make_tensor_value_info("visual_tokens", onnx.TensorProto.FLOAT, ["clips", 8, 3])],
        [helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [1, 2])],
    )
    path = tmp_path / "encoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_features_are_the_mean_token_of_a_clip_at_unit_length(encoder):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
    found = features(encoder, pictures)
    means = pictures.astype(np.float64).mean(axis=(1, 2))
    np.testing.assert_allclose(found, means / np.sqrt((means**2).sum(axis=1, keepdims=True)), rtol=1e-6)


def test_pictures_of_another_size_are_refused(encoder):
    with pytest.raises(InputError, match=r"expected uint8 \(clips, 4, 6, 8, 3\)"):
        features(encoder, np.zeros((1, 6, 6, 3), np.uint8))


def accuracy_the_slow_way(vectors, labels, calibration):
    measured, right = [i for i in range(len(labels)) if i not in calibration], 0
    for i in measured:
        others = sorted((float(((vectors[i] - vectors[j]) ** 2).sum()), j) for j in measured if j != i)
        near = [labels[j] for _, j in others[:5]]
        most = max(near.count(label) for label in near)
        right += next(label for label in near if near.count(label) == most) == labels[i]
    return right / len(measured)


@given(st.integers(0, 1000), st.integers(8, 30), st.integers(1, 4), st.integers(0, 2))
def test_accuracy_is_that_of_a_search_through_all_of_them(seed, count, kinds, held_out):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = [str(label) for label in rng.integers(0, kinds, count)]
    calibration = set(range(held_out))
    expected = accuracy_the_slow_way(vectors, labels, calibration)
    assert nearest_neighbour_accuracy(vectors, labels, calibration) == expected


def test_stamps_for_calibration_are_neither_asked_about_nor_neighbours():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.eye(3), 10, axis=0) + rng.normal(0, 0.01, (30, 3))
    labels = [name for name in "abc" for _ in range(10)]
    assert nearest_neighbour_accuracy(clusters, labels, set()) == 1
    misleading, wrong = np.concatenate([clusters, clusters, clusters]), labels + ["d"] * 60
    assert nearest_neighbour_accuracy(misleading, wrong, set(range(30, 90))) == 1
    assert nearest_neighbour_accuracy(misleading, wrong, set()) < 0.7


def test_the_stamps_for_calibration_are_always_the_same():
    chosen = calibration_stamps(300)
    assert len(chosen) == 64 and chosen == calibration_stamps(300)
    assert min(chosen) >= 0 and max(chosen) < 300


def test_the_command_prints_each_encoders_accuracy(stamps, encoder, monkeypatch, capsys):
    monkeypatch.setattr(recognition, "fetch", lambda name: {"stamps": stamps}[name])
    monkeypatch.setattr(recognition, "SIZE", (6, 8))
    monkeypatch.setattr(recognition, "CALIBRATION", 4)
    assert recognition.main([str(encoder), str(encoder)]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading == "16 stamps of 2 kinds, 5 nearest neighbours"
    assert lines == [f" 100.0%  {encoder}"] * 2
