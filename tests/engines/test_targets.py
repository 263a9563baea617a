"""The table of targets is the one that users are told of, and its entries can be built."""

import onnx
import pytest
from liteframe.engines.targets import PLAIN_OPSET, PLAIN_TYPES, TARGETS, dialect_for_tensorrt

# name: compute capabilities, compiler, ahead-of-time compiler, provider, as users are told
TABLE = {
    "cpu": ((), "onnxruntime", None, "CPUExecutionProvider"),
    "cuda": ((), "onnxruntime", None, "CUDAExecutionProvider"),
    "a100": (("8.0",), "tensorrt", "tensorrt-rtx", None),
    "rtx": (("8.6", "8.9", "12.0", "12.1"), "tensorrt-rtx", None, None),
    "jetson-orin": (("8.7",), "tensorrt", None, None),
    "jetson-thor": (("11.0",), "tensorrt", None, None),
}
RTX_CAPABILITIES = {"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"}  # what TensorRT-RTX compiles for


def test_the_table_is_the_promised_one():
    found = {
        name: (target.capabilities, target.compiler, target.ahead_of_time, target.provider)
        for name, target in TARGETS.items()
    }
    assert found == TABLE
    assert all(target.name == name for name, target in TARGETS.items())


@pytest.mark.parametrize(
    ("version", "dialect"),
    [
        ("10.3.0", "plain"),  # JetPack 6
        ("10.9.0.34", "plain"),
        ("10.13.3.9", "plain"),  # JetPack 7.1
        ("10.14.1.48", "plain"),  # has Attention, not yet TensorScatter
        ("10.15.1.29", "fused"),
        ("11.0.0", "fused"),
        ("11.4.1", "fused"),
        ("10.100", "fused"),
        ("8.6.1", "plain"),
    ],
)
def test_the_dialect_follows_from_tensorrts_version(version, dialect):
    assert dialect_for_tensorrt(version) == dialect


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_target_carries_the_graphs_that_its_compilers_take(target):
    jetson = target.name.startswith("jetson")
    assert target.dialects == (("fused", "plain") if jetson else ("fused",))
    # a bundle is proven, and by something that compiles here; what is compiled here needs no proof
    assert (target.proof is not None) == jetson
    if target.proof is not None:
        assert target.proof in RTX_CAPABILITIES - set(target.capabilities)
    if "tensorrt-rtx" in (target.compiler, target.ahead_of_time):
        assert set(target.capabilities) <= RTX_CAPABILITIES


def test_no_gpu_fits_two_targets():
    capabilities = [capability for target in TARGETS.values() for capability in target.capabilities]
    assert len(capabilities) == len(set(capabilities))


def test_every_plain_operator_is_onnxs_own_at_the_plain_opset():
    assert PLAIN_OPSET == 20
    for name in PLAIN_TYPES:
        assert not onnx.defs.get_schema(name, PLAIN_OPSET).deprecated, name


def test_the_operators_of_the_fused_dialect_are_not_plain():
    assert not PLAIN_TYPES.keys() & {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"}
