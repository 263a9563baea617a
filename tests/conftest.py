import ctypes
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import msgspec
import native
import pytest
from hypothesis import settings

os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when a test module first imports polygraphy

# the same examples in every run; `pytest --hypothesis-profile=default` looks for new ones
settings.register_profile("repeatable", derandomize=True, deadline=None)  # the machine may be busy
settings.register_profile("few", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Whole builds of real weights come first, or one worker would still be at them when the other is done."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads only wait for each other on tensors as small as these, and for long when the machine is busy."""
    if torch := sys.modules.get("torch"):  # a session that does without it stays without it
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def exports(tmp_path_factory):
    """torch exports the same module once for all tests and all workers, for that takes seconds however small it is.

    Equal are modules of the same classes, settings and weights. A later export is read from the first one's file, so
    nothing is shared that a test might change. Yields the export itself, for `exported_anew`.
    """
    trace = sys.modules.get("liteframe.export.trace")
    if trace is None:  # see one_thread
        yield None
        return
    import onnx_ir as ir
    import torch

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    folder.mkdir(exist_ok=True)
    export = trace._trace

    def read_or_export(module, arguments, dynamic_shapes, inputs, outputs, dialect):
        made = hashlib.sha256(repr((module, module.config, inputs, outputs, dialect)).encode())
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            made.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
            made.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
        stored = folder / made.hexdigest()
        if stored.exists():
            module.eval()  # as exporting leaves it
            return ir.load(stored / "graph.onnx")
        model = export(module, arguments, dynamic_shapes, inputs, outputs, dialect)
        partial = Path(tempfile.mkdtemp(dir=folder))
        ir.save(model, partial / "graph.onnx", external_data="graph.data")
        try:
            partial.rename(stored)
        except OSError:  # another worker's was there first
            assert stored.exists()
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_trace", read_or_export)
        yield export


@pytest.fixture
def exported_anew(exports, monkeypatch):
    """For tests of exporting itself: every export is one, none is read back."""
    from liteframe.export import trace

    if exports is not None:
        monkeypatch.setattr(trace, "_trace", exports)


@pytest.fixture(scope="session")
def small_bpe():
    """Vocabulary and merges of a small byte-level BPE; its merges cross words, digits and spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        ["what's in the video? the cat  sat", "in 2024 and 20244 I'LL see", "café  crème\n\n\nwe're", "1000 100 10"],
        trainer,
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory, small_bpe):
    """A LiteFrame artifact's folder with random weights: student 56 x 56, 2 tokens a clip; tied Llama of 24 wide."""
    import msgspec
    import torch
    from liteframe.export.layouts import decoder_config
    from liteframe.export.models.decoder import Decoder
    from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
    from liteframe.export.models.liteframe import Downsampling, LiteFrameConfig
    from liteframe.export.models.vit import ViTConfig
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    backbone = LiteFrameConfig(
        vit=ViTConfig(
            image_size=(56, 56), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        ),
        downsampling=(Downsampling(1, (2, 2, 2)),),
        head_size=12,
    )
    llama = {
        "model_type": "llama",
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "vocab_size": 340,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "tie_word_embeddings": True,
    }
    generator = torch.Generator().manual_seed(0)
    modules = {
        "encoder": VideoEncoder(EncoderConfig(backbone=backbone, output_size=24)),
        "decoder": Decoder(decoder_config(llama)),
    }
    tensors = {}
    for part, module in modules.items():
        for name, parameter in module.named_parameters():  # shared ones appear once
            tensors[f"{part}.{name}"] = torch.randn(parameter.shape, generator=generator) * 0.3
    folder = tmp_path_factory.mktemp("tiny") / "artifact"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "liteframe",
        "version": 1,
        "encoder": msgspec.to_builtins(modules["encoder"].config),
        "decoder": llama,
        "prompt": {"unit_prefix": "Frames {first}-{last}: ", "unit_suffix": "\n"},
        "notice": "random weights",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE(*small_bpe))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return folder


@pytest.fixture(scope="session")
def small_decoder():
    """Makes decoders with random weights, of a width that INT4 blocks and of a head size that fused kernels take:
    64 wide, two layers, four heads of 16 over two of keys, a vocabulary of 50; options as of `DecoderConfig`."""
    import torch
    from liteframe.export.models.decoder import Decoder, DecoderConfig

    config = DecoderConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=50,
        max_position_embeddings=64,
    )

    def make(**options):
        torch.manual_seed(0)
        decoder = Decoder(msgspec.structs.replace(config, **options)).eval()
        for parameter in decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return decoder

    return make


@pytest.fixture(scope="session")
def tiny_package(tiny_artifact):
    """`tiny_artifact` built for the CPU, for up to 16 frames: an opened package; tests leave it as it is."""
    from liteframe.export.build_engine import build

    return build(tiny_artifact, "cpu", tiny_artifact.parent / "package", frames=16)


@pytest.fixture(scope="session")
def tiny_manifest():
    """Writes the files of a package into a folder and returns their manifest: an a100 package with engines, in which
    every field that may vary does. The files hold a few bytes each and are no graphs."""
    from liteframe.engines import package

    def write(folder):
        def file(path, content):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
            return package.describe_file(folder, folder / path)

        precision = package.Precision(
            asked="fp32",
            found={"fp32": 7},
            kept=[package.Kept(node="norm/LayerNormalization", type="fp32", reason="norm")],
        )

        def spec(name, *shape, profile=None):
            return package.TensorSpec(name=name, dtype="float32", shape=list(shape), profile=profile)

        profile = package.Profile(min=[1, 8], opt=[2, 8], max=[4, 8])
        graphs, engines = [], []
        for name in ("encoder", "decoder"):
            specs = {"inputs": [spec("x", "clips", 8, profile=profile)], "outputs": [spec("y", "clips", 2)]}
            both = {"name": name, "dialect": "fused", "parity": {"cosine": 0.9999987, "relative_difference": 2e-7}}
            data = file(f"graphs/{name}.data", f"{name}'s weights".encode())
            graph = file(f"graphs/{name}.fused.onnx", f"{name}'s graph".encode())
            graphs.append(package.Graph(**both, **specs, opset=24, files=[graph, data], precision=precision))
            engines.append(
                package.Engine(
                    **both,
                    **specs,
                    files=[file(f"{name}.engine", f"{name}'s engine".encode())],
                    precision=precision,
                    compiler="tensorrt",
                    compiler_version="11.4.1",
                    capabilities=["8.0"],
                    operators=None,
                )
            )
        engines[1] = msgspec.structs.replace(engines[1], parity=None)
        numbers = {name: i for i, name in enumerate(package.Model.__struct_fields__[1:-1], 1)}
        return package.Manifest(
            format=1,
            target="a100",
            built_from=package.Origin(artifact="tiny", artifact_sha256="0" * 64, versions={"torch": "2.13.0"}),
            model=package.Model(
                image_size=(56, 42),
                long_video=package.LongVideo(
                    max_frames=64, keyframes=4, similar=0.85, redundancy_weight=1.0, temperature=0.01
                ),
                **numbers,
            ),
            text=package.Text(
                tokenizer=file("tokenizer.json", b"{}"),
                chat_template=file("chat_template.jinja", "café".encode()),
                embeddings=file("embeddings.npy", bytes(64)),
                query_tokenizer=file("query_tokenizer.json", b"{}"),
                end_of_turn=[2],
                special_tokens={"eos_token": "<|im_end|>"},
                unit_prefix="Frames {first}-{last}: ",
                unit_suffix="\n",
                run_prefix=None,
                notice="random weights",
            ),
            graphs=graphs,
            engines=engines,
            commands=[file("polygraphy/commands.txt", b"polygraphy run\n")],
            drift=[file("drift/drift.html", b"<!doctype html>")],
            accuracy=package.Accuracy(questions=4, modules=75.0, engines=50.0, different=1),
            allowed_drift=["decoder in fp16: perplexity on held-out text rises 0.20%, its gate is 0.1%"],
            sha256="",
        )

    return write


@pytest.fixture(scope="session")
def native_build(tmp_path_factory):
    """The top-level CMakeLists.txt built without a CUDA compiler: the folder, and what cmake said."""
    folder = tmp_path_factory.mktemp("native")
    told = native.cmake("-S", native.SOURCES, "-B", folder, "-DNVCC=OFF")
    native.cmake("--build", folder)
    return folder, told


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """LITEFRAME_EMULATED names a library that is built already, with sanitizers say."""
    library = os.environ.get("LITEFRAME_EMULATED") or native.build_emulated(tmp_path_factory.mktemp("emulated"))
    return native.Emulated(library)


@pytest.fixture(scope="session")
def native_host(native_build):
    """The kernels' arithmetic as a library for this CPU."""
    library = ctypes.CDLL(os.fspath(native_build[0] / "engines/native/libliteframe_host.so"))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.liteframe_depthwise_temporal_conv.argtypes = [integer, *[pointer] * 5, *[integer] * 12]
    library.liteframe_depthwise_temporal_conv_backward.argtypes = [integer, *[pointer] * 6, *[integer] * 12]
    library.liteframe_weighted_average_pool.argtypes = [
        integer,
        *[pointer] * 2,
        *[integer] * 8,
        ctypes.c_float,
        integer,
    ]
    return library
