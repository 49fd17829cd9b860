"""Runs what the plan asks for: one process per cell, resumable, stoppable, with an estimate.

Every cell is written to its own file by its own process when it ends, and the plan is computed
anew from the files, so nothing is lost when a run is stopped: the same command goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from .cells import Cell, Result, load, load_all, save
from .execute import Job, failure, predictions_path, run_job
from .sweep import Request, Study, forecast, plan
from .works import Task

TIME_LIMIT = 3600.0
"""Seconds after which a cell counts as failed."""
GUESS = 30.0
"""Seconds a cell is taken to need before any has finished."""


@dataclass
class Comparison:
    """A task with its study and the finished cells."""

    task: Task
    study: Study
    results: dict[Cell, Result] = field(default_factory=dict)

    def read(self, out: Path) -> None:
        """Take up the finished cells under ``out``."""
        self.results = {result.cell: result for result in load_all(out / self.task.folder)}

    def requests(self) -> list[Request]:
        """The cells known to be needed now."""
        return plan(self.study, list(self.results.values()))

    def to_come(self) -> list[Cell]:
        """All cells that are likely still needed."""
        return forecast(self.study, list(self.results.values()))


@dataclass(frozen=True)
class Status:
    """How far a run is: for the progress bar.

    Attributes:
        done: cells finished in this run and before.
        left: cells likely still to come.
        seconds: estimate of the time left.
        running: the cells being run.
        last: the cell finished last, if one was.
    """

    done: int
    left: int
    seconds: float
    running: tuple[Cell, ...]
    last: Result | None


@dataclass
class _Running:
    request: Request
    comparison: Comparison
    job: Job
    process: BaseProcess
    started: float


@dataclass
class Runner:
    """Runs comparisons.

    Args:
        comparisons: what to run, in the order of their urgency among equals.
        out: output folder.
        jobs: processes at a time.
        threads: torch threads of each.
        until: seconds after which no further cell is started, ``None`` for no limit.
        report: called whenever something has changed.
        time_limit: seconds after which a cell is stopped and recorded as failed.
    """

    comparisons: Sequence[Comparison]
    out: Path
    jobs: int = 1
    threads: int = 1
    until: float | None = None
    report: Callable[[Status], None] | None = None
    time_limit: float = TIME_LIMIT

    def run(self) -> bool:
        """Run until nothing is left to do.

        Returns:
            Whether everything is done; ``False`` if the time ran out first.

        Raises:
            KeyboardInterrupt: On Ctrl-C, after the workers are stopped; finished cells are kept.
        """
        for comparison in self.comparisons:
            comparison.read(self.out)
        self._context = fork_server(self.threads)
        self._running: list[_Running] = []
        self._left = {id(c): c.to_come() for c in self.comparisons}
        started = time.monotonic()
        try:
            while True:
                timely = self.until is None or time.monotonic() - started < self.until
                if timely:
                    self._start_cells()
                if not self._running:
                    return timely
                self._tell(None)
                self._wait()
        finally:
            self._stop()

    def _start_cells(self) -> None:
        if len(self._running) >= self.jobs:
            return
        busy = {running.request.cell for running in self._running}
        wanted = [
            (request.order, number, request, comparison)
            for number, comparison in enumerate(self.comparisons)
            for request in comparison.requests()
            if request.cell not in busy
        ]
        wanted.sort(key=lambda item: item[:2])
        for _, _, request, comparison in wanted[: self.jobs - len(self._running)]:
            job = Job(
                cell=request.cell,
                task=comparison.task,
                out=self.out,
                threads=self.threads,
                predictions=request.stage == "report",
            )
            process = self._context.Process(target=run_job, args=(job,))
            # Left half way, the worker would wait for a job that never comes, and no one for it.
            with interrupts_held():
                process.start()
                self._running.append(_Running(request, comparison, job, process, time.monotonic()))

    def _wait(self) -> None:
        wait([running.process.sentinel for running in self._running], timeout=1.0)
        for running in list(self._running):
            late = time.monotonic() - running.started > self.time_limit
            if running.process.is_alive() and not late:
                continue
            self._running.remove(running)
            if running.process.is_alive():
                _end(running.process)
                error = f"TimeoutError: not finished after {self.time_limit:g} s"
            else:
                running.process.join()
                error = f"the process died with exit code {running.process.exitcode}"
            self._finish(running, error)

    def _finish(self, running: _Running, error: str) -> None:
        path = self.out / running.request.cell.path
        if not path.exists():
            save(failure(running.job, error), self.out)
        result = load(path)
        comparison = running.comparison
        comparison.results[result.cell] = result
        self._left[id(comparison)] = comparison.to_come()
        self._tell(result)

    def _stop(self) -> None:
        for running in self._running:
            _end(running.process)
        self._running = []

    def _tell(self, last: Result | None) -> None:
        if self.report is None:
            return
        now = time.monotonic()
        seconds = 0.0
        for comparison in self.comparisons:
            costs = _seconds_of(comparison)
            seconds += sum(costs(cell) for cell in self._left[id(comparison)])
            for running in self._running:
                if running.comparison is comparison:
                    cost = costs(running.request.cell)
                    seconds -= min(cost, now - running.started)
        self.report(
            Status(
                done=sum(len(comparison.results) for comparison in self.comparisons),
                left=sum(map(len, self._left.values())),
                seconds=max(0.0, seconds) / self.jobs,
                running=tuple(running.request.cell for running in self._running),
                last=last,
            )
        )


def _seconds_of(comparison: Comparison) -> Callable[[Cell], float]:
    """Estimate of the seconds of a cell, from the finished ones of its method or its task."""
    times: dict[str, list[float]] = {}
    for result in comparison.results.values():
        wall = result.environment.get("wall_seconds")
        if wall is not None and result.status != "failed":
            times.setdefault(result.cell.method, []).append(wall / result.cell.steps)
    medians = {method: statistics.median(values) for method, values in times.items()}
    usual = statistics.median(medians.values()) if medians else GUESS / comparison.study.steps
    return lambda cell: cell.steps * medians.get(cell.method, usual)


def fork_server(threads: int) -> ForkServerContext:
    """Processes that start in milliseconds with everything imported, one per cell."""
    # Read by the thread pools when the server imports torch; the server inherits them.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    # Ctrl-C is the parent's business, which stops its workers itself: they inherit from the
    # server that the signal is blocked, from their first instruction on. The tracker comes
    # first because its own start takes the block away.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block.

    A handler, not a mask: with other threads about (the progress bar has one) a signal blocked
    here is delivered there, and Python still raises in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    for number in held[:1]:
        signal.raise_signal(number)


def _end(process: BaseProcess) -> None:
    process.terminate()
    process.join(5.0)
    if process.is_alive():
        process.kill()
        process.join()


def forget_failures(comparisons: Sequence[Comparison], out: Path) -> int:
    """Delete the records of failed cells, so that they are run again; returns how many."""
    count = 0
    for comparison in comparisons:
        for result in load_all(out / comparison.task.folder):
            if result.status == "failed":
                (out / result.cell.path).unlink()
                predictions_path(result.cell, out).unlink(missing_ok=True)
                count += 1
    return count
