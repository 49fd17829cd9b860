"""``python -m benchmarks <work...>``: run, or go on with, the comparisons."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DataFileError
from .usage import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from .runner import Comparison

WORKS = ("linear", "lm", "nlu", "step", "report")
TRAINED = WORKS[:3]
MOST_GPU_JOBS = 4
GPU_JOB_BYTES = 24 * 2**30
"""Device memory that a training run may take: more than the ``gpu`` preset's do."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UsageError: If it is wrong.
    """
    parser = _Parser(
        prog="python -m benchmarks",
        description="Compare optimizers for LoRA. Finished cells are kept: the same command goes "
        "on where it was stopped.",
    )
    parser.add_argument("works", nargs="+", metavar="work", help=", ".join(WORKS))
    parser.add_argument(
        "--preset", choices=("tiny", "quick", "medium", "full", "gpu"), default="quick"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="your own data, see README.md")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="e.g. adamw cg[damping=1]")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds of the report")
    parser.add_argument("--out", type=Path, default=Path("bench_output"), metavar="DIR")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="processes at a time")
    parser.add_argument("--threads", type=_positive, metavar="N", help="of each process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--until", type=float, metavar="MINUTES", help="start no cell after that")
    parser.add_argument("--retry", action="store_true", help="run failed cells again")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="pretrained bases")
    options = parser.parse_args(argv)
    for work in options.works:
        if work not in WORKS:
            raise UsageError(f"unknown work {work!r}; known: {', '.join(WORKS)}")
    if options.data is not None and not options.data.is_dir():
        raise UsageError(f"--data {options.data}: no such folder")
    return options


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the works; the exit code: 0, 2 for a wrong request or file, 130 after Ctrl-C."""
    try:
        options = arguments(argv)
        _run(options)
    except (UsageError, DataFileError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished cells are kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.threads is None:
        options.threads = 1 if options.device == "cpu" else min(4, os.cpu_count() or 1)
    # Before torch is imported, here and in the worker processes.
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    from rich.console import Console

    if options.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise UsageError(f"--device {options.device}: torch sees no such device here")

    console = Console()
    comparisons = _comparisons(options)
    for work in options.works:
        if work in TRAINED:
            mine = [comparison for comparison in comparisons if comparison.task.work == work]
            if not _train(mine, options, console):
                console.print(f"{work}: time is up; the same command goes on")
        elif work == "step":
            from .works.step import run_step

            console.print(f"step: {run_step(options.preset, options.device, options.out)}")
        else:
            from .report import write_report

            write_report(options.out, refresh=options.out.resolve() == _committed())


def _committed() -> Path:
    """The folder of the committed results, whose report is shown in the READMEs."""
    return Path(__file__).resolve().parent / "results"


def _comparisons(options: argparse.Namespace) -> list[Comparison]:
    """Everything asked for, checked before anything is run."""
    from . import works
    from .methods import select
    from .runner import Comparison

    asked = select(options.methods) if options.methods else None
    found: list[Comparison] = []
    for name in (work for work in TRAINED if work in options.works):
        work = works.work(name)
        if options.preset not in work.PRESETS:
            raise UsageError(f"{name} has no preset {options.preset!r}")
        for task in work.tasks(options.preset, options.data, options.device):
            changes: dict[str, object] = {}
            if options.cache is not None:
                changes["cache"] = options.cache
            if options.seeds is not None:
                clash = sorted(set(options.seeds) & set(task.tuning_seeds))
                if clash:
                    raise UsageError(f"--seeds {clash[0]}: is a tuning seed of {task.name}")
                changes["reporting_seeds"] = tuple(options.seeds)
            mine = replace(task, **changes)  # type: ignore[arg-type]
            methods = asked or select(mine.methods)
            found.append(Comparison(mine, mine.study(methods)))
    if options.tasks:
        names = [comparison.task.name for comparison in found]
        for name in options.tasks:
            if name not in names:
                raise UsageError(f"unknown task {name!r}; known: {', '.join(names)}")
        found = [comparison for comparison in found if comparison.task.name in options.tasks]
    return found


def _train(comparisons: list[Comparison], options: argparse.Namespace, console: Console) -> bool:
    import torch

    from . import works
    from .divergence import write_divergences
    from .progress import Bars
    from .runner import Runner, forget_failures
    from .timing import write_timing

    if options.retry:
        forget_failures(comparisons, options.out)
    jobs = options.jobs or _default_jobs(options)
    # Preparation is one process and comes before the cells: it may have all their threads.
    torch.set_num_threads(jobs * options.threads)
    with Bars(console) as bars:
        for comparison in comparisons:
            task = comparison.task
            works.work(task.work).prepare(task, bars.prepared)
        runner = Runner(
            comparisons=comparisons,
            out=options.out,
            jobs=jobs,
            threads=options.threads,
            until=None if options.until is None else 60 * options.until,
            report=bars.status,
        )
        complete = runner.run()
    for comparison in comparisons:
        write_divergences(comparison, options.out)
        if complete:
            write_timing(comparison, options.out, options.threads)
    return complete


def _default_jobs(options: argparse.Namespace) -> int:
    if options.device != "cpu":
        import torch

        # On a GPU a short cell spends as long on its start as on its steps.
        memory = torch.cuda.get_device_properties(0).total_memory
        return max(1, min(MOST_GPU_JOBS, memory // GPU_JOB_BYTES))
    return max(1, (os.cpu_count() or 1) // options.threads)


if __name__ == "__main__":
    sys.exit(main())
