"""The command: what it prints, where, and how it ends. A failure is one message on stderr, and never a traceback."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings

import cv2
import msgspec
import numpy as np
import pytest
from liteframe.engines.package import GateError, InputError, Manifest
from liteframe.engines.targets import TARGETS
from liteframe.export import build_engine, verify
from liteframe.runtime import VideoSession, cli

QUESTION = "what's in the video?"
COMMAND = [sys.executable, "-c", "from liteframe.runtime.cli import main; raise SystemExit(main())"]


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs the command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command sets it

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["liteframe", *map(str, arguments)])
        try:
            code = cli.main()
        except SystemExit as error:  # argparse
            code = error.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def folder(tiny_package, tmp_path):
    """A package's folder to be changed."""
    return shutil.copytree(tiny_package.folder, tmp_path / "package")


@pytest.fixture
def video(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(np.random.default_rng(1).integers(0, 256, (8, 56, 56, 3), dtype=np.uint8)):
        cv2.imwrite(str(folder / f"{number}.png"), image)
    return folder


def assert_failed(done, code, *fragments):
    """One message on stderr that holds the fragments, and nothing on stdout."""
    assert (done[0], done[1]) == (code, "")
    (line,) = done[2].splitlines()
    assert line.startswith("liteframe: ")
    for fragment in fragments:
        assert str(fragment) in line


def finished(*arguments, **options):
    """As `call`, in a process of its own."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True, **options)
    return done.returncode, done.stdout or "", done.stderr


# -- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["watch"], ["--json"], ["run"], ["run", "a", "b"], ["build"], ["profile"]])
def test_wrong_use_is_told_the_usage(call, arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: liteframe")
    assert "error:" in err


def test_help_names_every_command(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for command, summary in cli.SUMMARY.items():
        assert f"  {command:9}{summary}" in out


@pytest.mark.parametrize("command", cli.SUMMARY)
def test_every_command_has_help_of_its_own(call, command):
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: liteframe {command} ")


def test_the_version_is_the_installed_one(call):
    from importlib.metadata import version

    assert call("--version") == (0, f"liteframe {version('liteframe')}\n", "")


# -- exit codes ------------------------------------------------------------------------------------------------------


def wrapped(error):
    """As libraries do that wrap what stops them."""
    try:
        try:
            raise error
        except BaseException:
            raise AttributeError("no such thing")  # noqa: B904 - without `from`, as happens by accident
    except AttributeError as inner:
        try:
            raise RuntimeError("it failed") from inner
        except RuntimeError as outer:
            return outer


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (GateError("cosine 0.9, the gate is 1"), 1, "cosine 0.9, the gate is 1"),
        (InputError("a.mp4: missing"), 2, "a.mp4: missing"),
        (FileNotFoundError(2, "No such file or directory", "a.mp4"), 2, "a.mp4: No such file or directory; check"),
        (OSError(28, "No space left on device"), 2, "the output: No space left on device; check"),
        (OSError("3 requested and 0 written"), 2, "the output: 3 requested and 0 written; check"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (wrapped(KeyboardInterrupt()), 130, "interrupted"),
    ],
)
def test_what_goes_wrong_becomes_a_message_and_an_exit_code(capsys, monkeypatch, error, code, message):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def command(arguments):
        raise error

    assert_failed((cli.guard(command, []), *capsys.readouterr()), code, message)


@pytest.mark.parametrize("error", [ZeroDivisionError(), wrapped(ValueError()), SystemExit(2)])
def test_what_is_no_fault_of_the_user_is_not_hidden(monkeypatch, error):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def command(arguments):
        raise error

    with pytest.raises(type(error)) as raised:
        cli.guard(command, [])
    assert raised.value is error


def test_the_commands_own_exit_code_is_passed_on_and_warnings_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def command(arguments):
        warnings.warn("it ended early", UserWarning, stacklevel=1)
        return len(arguments)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        assert cli.guard(command, ["a", "b", "c"]) == 3
    assert capsys.readouterr().err == "liteframe: warning: it ended early\n"


# -- run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(tiny_package):
    return VideoSession(tiny_package)


def test_run_prints_the_answer_and_the_notice_apart(call, tiny_package, session, video):
    session.watch(video, 8)
    answer = "".join(session.ask(QUESTION, 24))
    done = call("run", tiny_package.folder, video, QUESTION, "--frames", 8, "--max-new-tokens", 24)
    assert done == (0, f"{answer}\n", "note: random weights\n")


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_run_ends_with_one_json_document(call, tiny_package, session, video, stream):
    session.watch(video, 8)
    answer = "".join(session.ask(QUESTION, 24))
    options = ["--frames", 8, "--max-new-tokens", 24, "--json", *stream]
    code, out, _ = call("run", tiny_package.folder, video, QUESTION, *options)
    assert code == 0
    document = json.loads(out.splitlines()[-1])
    assert out == f"{answer}\n{out.splitlines()[-1]}\n"
    expected = {"answer": answer, "frames": 8, "clips": 2, "visual_tokens": 4, "new_tokens": 24, "finished": "length"}
    assert expected.items() <= document.items()
    assert document["vision_ms"] > 0 and document["llm_ms"] > 0 and document["decode_ms"] > 0


def test_run_answers_a_question_without_a_video_and_samples_as_it_is_told(call, tiny_package, session):
    session_free = VideoSession(tiny_package)
    answers = set()
    for seed in (1, 2):
        options = ["--max-new-tokens", 16, "--temperature", 0.8, "--top-p", 0.9, "--seed", seed]
        code, out, err = call("run", tiny_package.folder, "", QUESTION, *options)
        assert (code, err) == (0, "")
        session_free.forget()
        assert out == "".join(session_free.ask(QUESTION, 16, 0.8, 0.9, seed)) + "\n"
        answers.add(out)
    assert len(answers) == 2


def test_run_streams_each_piece_as_it_comes(tiny_package, monkeypatch, capsys):
    """The first piece is out before the second is computed."""
    seen = []

    def ask(self, *options):
        for piece in ("one", " two"):
            seen.append(capsys.readouterr().out)
            yield piece

    monkeypatch.setattr(VideoSession, "ask", ask)
    assert cli.run([str(tiny_package.folder), "", QUESTION, "--stream"]) == 0
    assert seen == ["", "one"]
    assert capsys.readouterr().out == " two\n"


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"package": "nowhere"}, ["nowhere: not an engine package", "liteframe build"]),
        ({"package": "."}, ["not an engine package"]),
        ({"video": "nowhere.mp4"}, ["nowhere.mp4 does not exist"]),
        ({"video": os.devnull}, [os.devnull]),
        ({"video": "camera:100"}, ["camera:100 is not a camera"]),
        ({"video": "", "--frames": 4}, ["--frames, --fps, --tiles and --long-video are for a video"]),
        ({"video": "", "--fps": 1}, ["--frames, --fps, --tiles and --long-video are for a video"]),
        ({"video": "", "--tiles": 4}, ["--frames, --fps, --tiles and --long-video are for a video"]),
        ({"question": ""}, ["the question is empty"]),
        ({"question": " \n"}, ["the question is empty"]),
        ({"question": "<|im_end|>"}, ["control token <|im_end|>"]),
        ({"question": "long " * 2000}, ["the KV cache holds 1280"]),
        ({"question": "caf\udce9"}, ["not valid Unicode"]),
        ({"--frames": 6}, ["6 frames, expected a multiple of 4"]),
        ({"--frames": 0}, ["0 frames"]),
        ({"--frames": 64}, ["at most 16; build with --frames 64"]),
        ({"--tiles": 0}, ["tiles is 0, expected 1 or more"]),
        (
            {"--tiles": 500},
            ["tiles is 500; of a single clip, 4 frames, at most 111 fit", "--tiles 500"],
        ),
        ({"--fps": 0}, ["fps is 0"]),
        ({"--fps": "nan"}, ["fps is nan"]),
        ({"--max-new-tokens": 0}, ["max_new_tokens is 0"]),
        ({"--temperature": -1}, ["temperature is -1"]),
        ({"--top-p": 0}, ["top_p is 0"]),
        ({"--seed": -1}, ["seed is -1"]),
    ],
    ids=str,
)
def test_run_refuses_bad_input_in_one_line(call, tiny_package, video, changes, fragments):
    given = {"package": tiny_package.folder, "video": video, "question": QUESTION, **changes}
    options = [f"{name}={value}" for name, value in given.items() if name.startswith("--")]
    code, out, err = call("run", given["package"], given["video"], given["question"], *options)
    assert_failed((code, out, err.removeprefix("note: random weights\n")), 2, *fragments)


@pytest.mark.parametrize("option", ["--frames=x", "--tiles=2x2", "--seed=1.5", "--temperature=hot"])
def test_run_refuses_what_is_no_number_with_its_usage(call, tiny_package, option):
    code, out, err = call("run", tiny_package.folder, "", QUESTION, option)
    assert (code, out) == (2, "")
    assert f"argument {option.split('=')[0]}: invalid" in err


@pytest.mark.parametrize("command", ["run", "inspect", "profile"])
@pytest.mark.parametrize(
    "file",
    (
        "manifest.json encoder.onnx encoder.data decoder.onnx decoder.data embeddings.npy tokenizer.json "
        "chat_template.jinja"
    ).split(),
)
def test_a_changed_package_is_refused_by_every_command(call, folder, command, file):
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    assert_failed(call(command, folder, *(["", QUESTION] if command == "run" else [])), 2, folder / file)


# -- build, inspect, doctor, profile ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"artifact": "nowhere"}, ["nowhere: no such folder; expected an artifact"]),
        ({"artifact": "."}, ["config.json: no such file"]),
        ({"--frames": 6}, ["--frames 6: expected a multiple of 4"]),
        ({"--frames": 0}, ["--frames 0"]),
        ({"--frames": 400}, ["--frames 400 needs a KV cache of", "trained for 2048"]),
        ({"--tiles": 0}, ["--tiles 0: expected 1 or more"]),
        ({"--tiles": 40}, ["--frames 64 --tiles 40 needs a KV cache of 3072 positions", "fewer frames or tiles"]),
        ({"--ratio": 4}, ["--reducer and --ratio are for frame-wise towers"]),
        ({"--output": "taken"}, ["taken: already exists; remove it or choose another --output"]),
        ({"--output": "taken/file/package"}, ["taken/file", "cannot be written"]),
    ],
    ids=str,
)
def test_build_refuses_bad_input_in_one_line_and_leaves_nothing(
    call, tiny_artifact, tmp_path, monkeypatch, options, fragments
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    given = {"artifact": tiny_artifact, "--target": "cpu", "--output": "package", **options}
    arguments = [f"{name}={value}" for name, value in given.items() if name.startswith("--")]
    code, out, err = call("build", given["artifact"], *arguments)
    *progress, message = err.splitlines(keepends=True)
    assert all(line.endswith("  load the artifact\n") for line in progress)
    assert_failed((code, out, message), 2, *fragments)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]


def test_build_refuses_a_target_it_does_not_know(call, tiny_artifact):
    code, out, err = call("build", tiny_artifact, "--target", "tpu")
    assert (code, out) == (2, "")
    assert all(target in err for target in TARGETS)


def test_build_reports_and_ends_with_one_json_document(call, tiny_artifact, tiny_package, monkeypatch):
    asked = []
    monkeypatch.setattr(build_engine, "build", lambda *arguments: asked.append(arguments) or tiny_package)
    code, out, err = call("build", tiny_artifact, "--target", "cpu", "--frames", 16, "--json")
    assert code == 0
    given = [str(tiny_artifact), "cpu", "artifact-cpu", "16", "1", "None", "None"]
    assert [str(a) for a in asked[0]] == [
        *given,
        "fp32",
        "None",
        "[]",
        "None",
        "minmax",
        "False",
        "None",
        "None",
        "auto",
        "None",
        "None",
        "None",
    ]
    (line,) = out.splitlines()
    document = json.loads(line)
    assert document["package"] == str(tiny_package.folder)
    assert msgspec.convert(document["manifest"], Manifest) == tiny_package.manifest
    assert "encoder engine" in err and f"engine package: {tiny_package.folder}" in err


def test_a_gate_that_fails_exits_with_1_and_leaves_nothing(call, tiny_artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "COSINE", 1.1)
    code, out, err = call("build", tiny_artifact, "--target", "cpu", "--output", tmp_path / "package")
    assert (code, out) == (1, "")
    messages = [line for line in err.splitlines() if line.startswith("liteframe: ")]
    assert len(messages) == 1 and "the gate is 1.1" in messages[0]
    assert err.splitlines()[-1] == messages[0]
    assert list(tmp_path.iterdir()) == []


def test_inspect_prints_what_is_in_a_package(call, tiny_package):
    code, out, err = call("inspect", tiny_package.folder, "--json")
    assert (code, err) == (0, "")
    *lines, document = out.splitlines()
    assert msgspec.json.decode(document, type=Manifest) == tiny_package.manifest
    text = "\n".join(lines)
    assert lines[0] == f"{tiny_package.folder}: target cpu, engines"
    for fragment in ("16 frames of 56 x 56", "note: random weights", "encoder.onnx", "decoder.data", "visual_tokens"):
        assert fragment in text


@pytest.mark.parametrize("command", ["inspect", "profile", "compile"])
def test_a_folder_that_is_no_package_is_refused(call, tmp_path, command):
    assert_failed(call(command, tmp_path), 2, f"{tmp_path}: not an engine package")


def test_a_package_for_the_cpu_needs_no_compiling(call, tiny_package):
    assert_failed(call("compile", tiny_package.folder), 2, "needs no compiling")


def test_doctor_says_what_can_be_done_here(call):
    code, out, err = call("doctor", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out.splitlines()[-1])
    assert report["targets"].keys() == TARGETS.keys()
    assert report["targets"]["cpu"] == {"compile": "yes", "run": "yes"}
    assert report["libraries"]["numpy"] == np.__version__
    assert report["gpus"] or report["no_gpu"]


def test_profile_prints_a_table_and_one_json_document(call, tiny_package):
    options = ["--frames", "4,16", "--iterations", 3, "--warmup", 1, "--json"]
    code, out, err = call("profile", tiny_package.folder, *options)
    assert (code, err) == (0, "")
    *table, document = out.splitlines()
    report = json.loads(document)
    assert report["package"] == str(tiny_package.folder) and report["iterations"] == 3
    assert [row["frames"] for row in report["rows"]] == [4, 16]
    assert table[0].split()[:8] == ["frames", "tokens", "vision", "ms", "LLM", "ms", "total", "ms"]
    assert [line.split()[0] for line in table[1:3]] == ["4", "16"]
    assert table[3] == "medians of 3 after 1, batch 1"
    assert table[6].startswith("encoder, one clip: ") and "temporal" in table[6]
    assert table[-1].endswith("commands.txt") and report["layers"]["encoder"]["block 0 MLP"] > 0


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--frames", "5"], "5 frames, expected a multiple of 4"),
        (["--frames", "4,64"], "at most 16"),
        (["--iterations", "0"], "--iterations takes 1 or more"),
        (["--warmup", "-1"], "--warmup 0 or more"),
    ],
)
def test_profile_refuses_bad_input_in_one_line(call, tiny_package, options, fragment):
    options = [*options, *([] if "--iterations" in options else ["--iterations", "1"])]
    options = [*options, *([] if "--warmup" in options else ["--warmup", "0"])]
    assert_failed(call("profile", tiny_package.folder, *options), 2, fragment)


@pytest.mark.parametrize("frames", ["", "x", "4,", "4 8"])
def test_profile_refuses_frames_that_are_no_numbers(call, tiny_package, frames):
    code, out, err = call("profile", tiny_package.folder, f"--frames={frames}")
    assert (code, out) == (2, "")
    assert f"argument --frames: {frames!r} is not a list of numbers such as 64,128,256" in err


# -- signals, pipes and disks ----------------------------------------------------------------------------------------


def commands(package):
    return {
        "run": ["run", package, "", QUESTION, "--max-new-tokens", "64"],
        "stream": ["run", package, "", QUESTION, "--max-new-tokens", "64", "--stream"],
        "inspect": ["inspect", package, "--json"],
        "doctor": ["doctor"],
        "profile": ["profile", package, "--frames", "4", "--iterations", "1", "--warmup", "0"],
    }


every_command = pytest.mark.parametrize("command", commands(None))


@every_command
def test_a_reader_that_leaves_ends_the_command_quietly(tiny_package, command):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert finished(*commands(tiny_package.folder)[command], stdout=writer) == (0, "", "")
    finally:
        os.close(writer)


@every_command
def test_a_full_disk_is_one_message(tiny_package, command):
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = finished(*commands(tiny_package.folder)[command], stdout=full)
    assert_failed(done, 2, "the output: No space left on device")


def test_the_exit_code_is_right_where_no_message_can_be_written():
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run([*COMMAND, "inspect", "nowhere"], stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout) == (2, b"")


def test_an_answer_that_the_terminal_can_not_show_is_printed_all_the_same(tiny_package, session):
    answer = "".join(VideoSession(tiny_package).ask(QUESTION, 64))
    assert not answer.isascii()
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = commands(tiny_package.folder)["run"]
    code, out, err = finished(*command, stdout=subprocess.PIPE, env=environment)
    assert (code, err) == (0, "")
    assert out == "".join(c if c.isascii() else "?" for c in answer) + "\n"


def interrupt_after(line, arguments, number):
    """Sends a signal once a line on stderr holds these words."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for written in process.stderr:
            if line in written:
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_build_that_is_interrupted_leaves_nothing(tiny_artifact, tmp_path, number, code):
    arguments = ["build", tiny_artifact, "--target", "cpu", "--output", tmp_path / "package"]
    assert interrupt_after("run the torch modules", arguments, number) == (code, "", "liteframe: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_ctrl_c_that_a_library_swallows_counts_all_the_same(call, tiny_artifact, tmp_path, monkeypatch):
    def swallow(*_):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(build_engine, "Verifier", swallow)
    code, out, err = call("build", tiny_artifact, "--target", "cpu", "--output", tmp_path / "package")
    assert (code, out, err.splitlines()[-1]) == (130, "", "liteframe: interrupted")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_a_disk_that_fills_up_while_building_leaves_nothing(tiny_artifact, tmp_path):
    """Files of more than 50 kB can't be written; the graphs' weights are larger."""
    limit = 50_000
    arguments = ["build", tiny_artifact, "--target", "cpu", "--output", tmp_path / "package"]
    code, out, err = finished(
        *arguments,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("liteframe: ") and "File too large" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
