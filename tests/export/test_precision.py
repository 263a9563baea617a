"""FP16 and INT8 builds of the tiny artifact: what was asked for is what the graphs and the engines show."""

import json
import shutil

import numpy as np
import onnx
import pytest
from liteframe.calib.clips import save_clips
from liteframe.engines.package import GateError, InputError, open_package
from liteframe.export import precision
from liteframe.export.build_engine import build, print_report
from liteframe.runtime import VideoSession

DRIFT = ["drift-decoder.png", "drift-encoder.png", "drift.html"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Eight clips of moving waves, saved as the model takes them."""
    t, y, x, c = np.meshgrid(*(np.arange(n) for n in (4, 56, 56, 3)), indexing="ij")
    waves = [127 + 120 * np.sin(x / (3 + k) + y / (9 - k) + t + k * c) for k in range(8)]
    path = tmp_path_factory.mktemp("clips") / "clips.npy"
    save_clips(path, np.array(waves).astype(np.uint8))
    return path


@pytest.fixture(scope="module")
def built(tiny_artifact, clips, tmp_path_factory):
    """Builds of the tiny artifact by target and precisions, drift allowed: random weights are no judge of INT8."""
    folder, made = tmp_path_factory.mktemp("precisions"), {}

    def get(target, asked, decoder=None):
        key = target, asked, decoder
        if key not in made:
            made[key] = build(
                tiny_artifact,
                target,
                folder / "-".join(map(str, key)),
                16,
                precision=asked,
                decoder_precision=decoder,
                calib=[clips],
                allow_drift=True,
            )
        return made[key]

    return get


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr(precision, "WINDOWS", 4)
    monkeypatch.setattr(precision, "WINDOW", 24)


@pytest.mark.parametrize(
    ("asked", "decoder", "products"),
    [("fp16", None, 0), ("int8", None, 12 + 15), ("fp16", "int8-weights", 15), ("fp16", "int4-weights", 15)],
)
def test_a_cpu_package_computes_what_was_asked_for_and_answers(built, capsys, asked, decoder, products):
    made = built("cpu", asked, decoder)
    print_report(made)
    report = " ".join(capsys.readouterr().err.split())
    for wanted in ("mean cosine", "perplexity increase", *(["encoder, fused, fp16:", "by rule"] * (asked == "fp16"))):
        assert wanted in report
    assert [f.path for f in made.manifest.drift] == [f"drift/{n}" for n in DRIFT]
    page = made.path(made.manifest.drift[-1]).read_text()
    assert "backbone.vit.blocks.1.mlp.fc2" in page and "model.layers.1.mlp.down_proj" in page
    assert [e.precision.asked for e in made.manifest.engines] == [asked, decoder or asked]
    kernels = []
    for engine in made.manifest.engines:
        graph = onnx.load(made.path(engine.files[0]), load_external_data=False).graph
        kernels += [n.name for n in graph.node if n.op_type in ("MatMulIntegerToFloat", "MatMulNBits")]
    layers = {name.removesuffix("_q").removesuffix("_k").removesuffix("_v") for name in kernels}
    assert len(layers) == products
    if asked == "fp16":
        assert made.manifest.engines[0].precision.found["fp16"] > 20
    assert np.load(made.path(made.manifest.text.embeddings)).dtype == np.float16
    session = VideoSession(made)
    session.watch(np.zeros((8, 60, 60, 3), np.uint8), frames=8)
    assert isinstance("".join(session.ask("what?", max_new_tokens=4)), str)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "decoder"), [("fp16", None), ("int8", None), ("fp16", "int8-weights"), ("fp16", "int4-weights")]
)
@pytest.mark.parametrize("target", ["a100", "rtx", "jetson-orin", "jetson-thor"])
def test_tensorrt_packages_are_proven_in_every_dialect(built, target, asked, decoder):
    made = built(target, asked, decoder)
    for graph in made.manifest.graphs:
        assert graph.precision.asked == (decoder or asked if graph.name == "decoder" else asked)
        caches = [spec for spec in graph.inputs if "_cache_" in spec.name]
        assert all(spec.dtype == "float16" for spec in caches)
        assert {kept.reason for kept in graph.precision.kept} >= {"norm"}
        assert graph.precision.found["fp16"] > graph.precision.found["fp32"] / 2
        model = onnx.load(made.path(graph.files[0]), load_external_data=False)
        zero_points = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"}
        stored = {i.name: i for i in model.graph.initializer}
        assert all(stored[name].data_type == onnx.TensorProto.INT8 for name in zero_points)
        assert bool(zero_points) == (graph.precision.asked == "int8")
    if target in ("a100", "rtx"):
        assert all("fp16" in engine.precision.found for engine in made.manifest.engines)


def test_a_failed_gate_stops_the_build_and_says_by_how_much(tiny_artifact, clips, tmp_path, monkeypatch):
    monkeypatch.setitem(precision.MEAN_COSINE, "int8", 1.1)
    arguments = {"precision": "int8", "calib": [clips]}
    with pytest.raises(
        GateError, match=r"encoder in int8: mean_cosine .* gate is 1\.1; costliest layers: \w+\..*drift"
    ):
        build(tiny_artifact, "cpu", tmp_path / "out", 16, **arguments)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(precision.PERPLEXITY, "int8", -1.0)
    made = build(tiny_artifact, "cpu", tmp_path / "out", 16, **arguments, allow_drift=True)
    encoder, decoder = made.manifest.allowed_drift[0], made.manifest.allowed_drift[-1]
    assert "encoder in int8: mean_cosine" in encoder and "decoder in int8: perplexity" in decoder


@pytest.mark.parametrize("target", ["cpu", "a100"])
def test_layers_that_cost_too_much_get_a_scale_for_each_token_before_they_are_kept(
    tiny_artifact, clips, tmp_path, monkeypatch, target
):
    monkeypatch.setitem(precision.BUDGET, ("decoder", "int8"), 0.0)
    seen, drift = [], precision.Lowering.drift
    monkeypatch.setattr(precision.Lowering, "drift", lambda lowering, *a: seen.append(lowering) or drift(lowering, *a))
    built = build(tiny_artifact, target, tmp_path / "out", 16, precision="int8", calib=[clips], allow_drift=True)
    by_token, (graph,) = seen[0].by_token["decoder"], (g for g in built.manifest.engines if g.name == "decoder")
    behind_norms = {f"{layer}_proj/MatMul" for layer in ("q", "k", "v", "gate", "up")}
    assert by_token and {layer.rpartition(".")[2] for layer in by_token} <= behind_norms
    assert by_token <= {kept.node for kept in graph.precision.kept if kept.reason.startswith("sensitivity")}


def test_a_cache_serves_other_precisions_and_only_its_own_graphs(tiny_artifact, clips, tmp_path):
    cache = tmp_path / "cache.safetensors"
    first = build(
        tiny_artifact, "cpu", tmp_path / "a", 16, precision="int8", calib=[clips], calib_cache=cache, allow_drift=True
    )
    again = build(tiny_artifact, "cpu", tmp_path / "b", 16, precision="int8", calib_cache=cache, allow_drift=True)
    assert again.manifest == first.manifest
    with pytest.raises(InputError, match=r"cache\.safetensors: exists already, so clips are not needed; leave out"):
        build(tiny_artifact, "cpu", tmp_path / "c", 16, precision="int8", calib=[clips], calib_cache=cache)
    other = tmp_path / "other"
    shutil.copytree(tiny_artifact, other)
    config = json.loads((other / "config.json").read_text())
    config["decoder"]["rms_norm_eps"] = 1e-3
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"cache\.safetensors: observed on another graph"):
        build(other, "cpu", tmp_path / "c", 16, precision="int8", calib_cache=cache)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int8"}, r"precision int8 and int8 needs calibration clips and none were given"),
        ({"precision": "int8", "target": "cuda"}, r"encoder in int8: the target cuda lacks it; it has fp32, fp16"),
        ({"calib": ["clips"]}, r"--calib and --calib-cache are for fp16 and int8"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(tiny_artifact, tmp_path, arguments, message):
    target = arguments.pop("target", "cpu")
    with pytest.raises(InputError, match=message):
        build(tiny_artifact, target, tmp_path / "out", 16, **arguments)
    assert not list(tmp_path.iterdir())


def test_clips_smaller_than_the_input_are_refused(tiny_artifact, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    import cv2

    for number in range(8):
        cv2.imwrite(str(small / f"{number}.png"), np.full((20, 90, 3), number * 30, np.uint8))
    with pytest.raises(InputError, match=r"small.*20"):
        build(tiny_artifact, "cpu", tmp_path / "out", 16, precision="int8", calib=[small])
    assert not (tmp_path / "out").exists()


def test_the_same_clips_give_the_same_package(tiny_artifact, clips, built, tmp_path):
    made = build(tiny_artifact, "cpu", tmp_path / "again", 16, precision="fp16", calib=[clips], allow_drift=True)
    assert open_package(made.folder).manifest == built("cpu", "fp16").manifest
