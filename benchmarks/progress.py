"""The progress bar of a run, with an estimate of the time left."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .cells import Cell, Result
from .runner import Status


class Bars:
    """A live display; on something that is no terminal, one line per finished cell."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._cells = self._progress.add_task("cells", total=None, note="", visible=False)
        self._preparing = self._progress.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def prepared(self, what: str, step: int, steps: int) -> None:
        """Show a preparation, hidden when it is over."""
        self._progress.update(
            self._preparing,
            description=what,
            completed=step,
            total=steps,
            visible=step < steps,
        )

    def status(self, status: Status) -> None:
        """Show how far the cells are."""
        now = ", ".join(f"{cell.task} {cell.method}" for cell in status.running)
        self._progress.update(
            self._cells,
            completed=status.done,
            total=status.done + status.left,
            note=f"about {duration(status.seconds)} left  {now}",
            visible=True,
        )
        if status.last is not None:
            said = line(status.last)
            if not self._console.is_terminal:  # a log has no bar
                total = status.done + status.left
                said += f"  [{status.done}/{total}, about {duration(status.seconds)} left]"
            self._console.print(said, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds for people: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def line(result: Result) -> str:
    """One finished cell on one line."""
    cell: Cell = result.cell
    knob = "" if cell.knob is None else f" knob {cell.knob:g}"
    outcome = result.error if result.status == "failed" else result.status
    if result.status == "ok":
        outcome = f"{result.final['report']:.5g}"
    return (
        f"{cell.work} {cell.task}: {cell.method} lr {cell.lr:g}{knob} seed {cell.seed}: {outcome}"
    )
