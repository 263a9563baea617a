"""What long commands say on stderr while they work."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..runtime.cli import interrupted

Progress = Console(stderr=True, width=None if sys.stderr.isatty() else 120)


@contextmanager
def step(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar while it lasts; a line with its time and the process's peak memory when done."""
    start = time.perf_counter()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Progress, transient=True, disable=not Progress.is_terminal) as bar:
        task = bar.add_task(f"{what} ...", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
    if interrupted.is_set():
        raise KeyboardInterrupt
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    Progress.print(f"{time.perf_counter() - start:7.1f} s  {peak:5.2f} GB  {what}", highlight=False)
