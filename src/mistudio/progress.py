"""Progress on stderr: a bar with rate and ETA on a terminal, one line every ten seconds elsewhere.

Standard output stays free for results, so that `--json` can be piped.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class Bar:
    """Counts work done and shows it; `note` is a short text such as `loss 0.12`."""

    def __init__(self, description: str, total: int | None, unit: str, progress: Progress | None, shown: bool = True):
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note, self._shown = 0, "", shown
        self._start = self._last_line = time.monotonic()
        self._progress = progress
        self._task = progress.add_task(description, total=total, rate="", note="") if progress else None

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """`n` more units of work are done."""
        self.done += n
        self.note = self.note if note is None else note
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=n, rate=f"{self.rate:,.0f} {self.unit}/s", note=self.note)
        elif self._shown and time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._print_line()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.monotonic() - self._start, 1e-9)

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        of = f" of {self.total:,}" if self.total else ""
        eta = f", {max(self.total - self.done, 0) / max(self.rate, 1e-9):,.0f} s left" if self.total else ""
        Console(stderr=True).print(
            f"{self.description}: {self.done:,}{of} {self.unit}, {self.rate:,.0f}/s{eta} {self.note}", highlight=False
        )


@contextmanager
def progress_bar(
    description: str, total: int | None = None, unit: str = "it", start: int = 0, shown: bool = True
) -> Iterator[Bar]:
    """A `Bar` for a `with` block. `start`: work that was done before (a resume), not counted in the rate. `shown`:
    False where another process shows it."""
    console = Console(stderr=True)
    if not console.is_terminal or not shown:
        yield Bar(description, None if total is None else total - start, unit, None, shown=shown)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(description, None if total is None else total - start, unit, progress)
