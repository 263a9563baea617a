"""The `liteframe` command. Commands of other folders are found through the package's entry points, so that a device
with only the runtime and the engines installed has those of its own, and learns what the others need."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import entry_points, version
from pathlib import Path

from ..engines.package import GateError, InputError

SUMMARY = {
    "build": "artifact in, engine package out",
    "run": "answer a question about a video",
    "profile": "latency by number of frames, vision and language apart",
    "compile": "finish a bundle on its device",
    "inspect": "check a package and print what is in it",
    "doctor": "what can be compiled and run on this machine",
    "drift": "where a candidate's layers drift from a reference's",
    "evaluate": "how many questions about videos are answered right",
    "compare": "every way to make visual tokens fewer, beside the others",
}


interrupted = threading.Event()  # by a signal: torch's exporter may swallow the exception that it raises
SIGNALS = signal.SIGINT, signal.SIGTERM  # Ctrl-C, and how a service or a container is stopped


def guard(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs a command and turns what goes wrong into one message and an exit code: 1 a gate failed, 2 bad input."""
    warnings.showwarning = lambda message, *_: print(f"liteframe: warning: {message}", file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal can't show
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        interrupted.set()
        raise KeyboardInterrupt

    interrupted.clear()
    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        code = command(arguments)
        print(end="", flush=True)  # what can't be written comes up here, not when the interpreter exits
        return code
    except GateError as error:
        return _fail(str(error), 1)
    except InputError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # the reader of our output has left
        return 0
    except SystemExit as error:
        if _led_to(BrokenPipeError, error):  # how a rich console reports it
            return 0
        raise
    except OSError as error:
        what = f"{error.filename or 'the output'}: {error.strerror or error}"
        return _fail(f"{what}; check that it is there, permitted and not on a full disk, and run again", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + (came or SIGNALS)[0])
    except Exception as error:
        if _led_to(KeyboardInterrupt, error):  # torch's exporter wraps it
            return _fail("interrupted", 128 + (came or SIGNALS)[0])
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        interrupted.clear()
        try:
            print(end="", flush=True)
        except OSError:  # nor would the interpreter's own attempt, at exit, succeed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _led_to(kind: type[BaseException], error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


def _fail(message: str, code: int) -> int:
    with suppress(OSError):  # the exit code still tells
        print(f"liteframe: {message}", file=sys.stderr)
    return code


def main() -> int:
    commands = "\n".join(f"  {name:9}{summary}" for name, summary in SUMMARY.items())
    parser = argparse.ArgumentParser(
        prog="liteframe",
        description="Video-language models as engines: build, run, profile.",
        epilog=f"commands:\n{commands}\n\nliteframe COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"liteframe {version('liteframe')}")
    parser.add_argument("command", choices=SUMMARY, metavar="COMMAND")
    options = parser.parse_args(sys.argv[1:2])
    return guard(lambda arguments: _load(options.command)(arguments), sys.argv[2:])


def _load(name: str) -> Callable[[list[str]], int]:
    (entry,) = entry_points(group="liteframe.commands", name=name)
    try:
        command: Callable[[list[str]], int] = entry.load()
    except ModuleNotFoundError as error:
        needed = "export" if name in ("build", "compare", "drift") else "cpu"
        raise InputError(f"{name} needs the module {error.name}; run: pip install 'liteframe[{needed}]'") from None
    return command


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="liteframe run", description="Answer a question about a video.")
    parser.add_argument("package", type=Path)
    parser.add_argument(
        "video", help='a video file, a folder of images, "camera:N", or "" for a question without a video'
    )
    parser.add_argument("question")
    parser.add_argument("--frames", type=int, help="frames to sample (default: as many as the package was built for)")
    parser.add_argument("--tiles", type=int, default=1, help="cut each frame into so many tiles at most (default: 1)")
    parser.add_argument("--no-thumbnail", action="store_true", help="leave out the whole frame beside its tiles")
    parser.add_argument("--fps", type=float, help="rate of the images of a folder (default: 1)")
    parser.add_argument(
        "--long-video",
        choices=("uniform", "vilamp", "hybrid"),
        default="uniform",
        help="keep all of every frame (default), or of the frames or clips that the question is about; see docs",
    )
    parser.add_argument("--query-image", type=Path, metavar="FILE", help="search the long video for this, instead")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    parser.add_argument("--json", action="store_true", help="make the last line of the output one JSON document")
    options = parser.parse_args(arguments)
    thinned = options.long_video != "uniform"
    asked = (options.frames, options.fps, options.tiles) != (None, None, 1)
    if not options.video and (asked or thinned):
        raise InputError(
            "--frames, --fps, --tiles and --long-video are for a video, and none was given; leave them out or name one"
        )
    if options.query_image is not None and not thinned:
        raise InputError("--query-image is for long videos; leave it out, or add --long-video hybrid")
    from rich.console import Console
    from rich.progress import Progress

    from .session import VideoSession
    from .video import read_image

    session = VideoSession(options.package)
    if options.video:
        query = read_image(options.query_image) if options.query_image else options.question if thinned else None
        settings = session.model.long_video
        most = settings.max_frames if thinned and settings is not None else session.model.max_frames
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"watching {options.video}", total=options.frames or most)
            session.watch(
                options.video,
                options.frames,
                options.fps,
                lambda encoded: bar.update(task, completed=encoded),
                options.tiles,
                not options.no_thumbnail,
                options.long_video,
                query,
            )
        if notice := session.package.manifest.text.notice:
            print(f"note: {notice}", file=sys.stderr)
    pieces = []
    for piece in session.ask(
        options.question, options.max_new_tokens, options.temperature, options.top_p, options.seed
    ):
        pieces.append(piece)
        if options.stream:
            print(piece, end="", flush=True)
    print("" if options.stream else "".join(pieces))
    if options.json:
        print(json.dumps({"answer": "".join(pieces), **asdict(session.stats())}))
    return 0
