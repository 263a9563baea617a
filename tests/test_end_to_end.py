"""The whole way on real weights: artifact, packages for the CPU and SM80, real video, and SmolLM2's own words."""

import json
import shutil
import subprocess
import sys

import pytest
import transformers
from assets import fetch, read_prose
from clip_smollm2 import assemble
from liteframe.engines.package import InputError, open_package
from liteframe.export import precision
from liteframe.export.build_engine import build
from liteframe.runtime import VideoSession

pytestmark = pytest.mark.slow
QUESTION = "Describe a rainy day in a big city."


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "clip-smollm2"
    assemble(folder)
    return folder


@pytest.fixture(scope="module")
def package(artifact):
    return build(artifact, "cpu", artifact.parent / "cpu", frames=16)


def test_greedy_text_equals_transformers_token_for_token(package):
    gguf = fetch("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    expected = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    session = VideoSession(package)
    picked = []
    stream = session._text.stream
    session._text.stream = lambda ids: stream(picked.append(token) or token for token in ids)
    assert "".join(session.ask(QUESTION, max_new_tokens=64)) == expected
    assert picked == out[0, prompt["input_ids"].shape[1] :].tolist()
    assert len(picked) == 64
    assert session.stats().prompt_tokens == prompt["input_ids"].shape[1]


def test_a_real_video_is_watched_and_asked_about(package):
    session = VideoSession(package)
    session.watch(fetch("bikes"), frames=16)
    first = "".join(session.ask("What is happening?", max_new_tokens=8))
    assert session.stats().frames == 16 and session.stats().visual_tokens == 4 * 49
    assert "".join(session.ask("What is happening?", max_new_tokens=8)) == first
    with pytest.raises(InputError, match="KV cache"):
        session.ask("long " * 5000)


def test_sm80_engines_are_compiled_without_a_gpu_and_not_run(artifact):
    made = build(artifact, "a100", artifact.parent / "a100", frames=16)
    engines = made.manifest.engines
    assert [e.name for e in engines] == ["encoder", "decoder"]
    assert all(e.compiler == "tensorrt-rtx" and e.capabilities == ["8.0"] and e.parity is None for e in engines)
    assert all(set(e.precision.found) == {"fp32"} for e in engines)
    with pytest.raises(InputError, match="TensorRT engines for a100"):
        VideoSession(made)


def test_the_vit_in_int8_and_the_decoder_in_fp16_hold_their_gates(artifact, tmp_path, monkeypatch):
    """Perplexity of a book, and visual tokens of clips that calibration did not see: bench/accuracy.py in small."""
    monkeypatch.setattr(precision, "CLIPS", 32)
    monkeypatch.setattr(precision, "WINDOWS", 16)
    book = tmp_path / "book.txt"
    book.write_text(read_prose(fetch("holmes")))
    sources = [fetch("bikes"), fetch("bunny"), book]
    made = build(
        artifact, "cpu", tmp_path / "int8", frames=16, precision="int8", decoder_precision="fp16", calib=sources
    )
    assert made.manifest.allowed_drift == []  # no gate was missed
    vit, decoder = made.manifest.engines
    assert 0.99 <= vit.parity["mean_cosine"] < 0.9999 and vit.parity["worst_cosine"] >= 0.97
    assert vit.precision.asked == "int8" and vit.precision.found["uint8"] > 20
    assert 0 < abs(decoder.parity["perplexity_increase"]) <= 0.001
    session = VideoSession(made)
    assert "Paris" in "".join(session.ask("What is the capital of France?", max_new_tokens=12))


def test_the_command_answers_and_ends_with_one_json_document(package):
    command = [sys.executable, "-c", "from liteframe.runtime.cli import main; raise SystemExit(main())", "run"]
    question = "What is the capital of France?"
    done = subprocess.run([*command, package.folder, "", question, "--json"], capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1])["answer"] == "The capital of France is Paris."


def test_a_tampered_engine_is_refused_before_loading(package, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(package.folder, copy)
    data = copy / "encoder.data"
    with data.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(InputError, match=r"encoder\.data: SHA-256 differs"):
        open_package(copy)
