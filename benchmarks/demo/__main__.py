"""``python -m benchmarks.demo``: AdamW and CGLoRAOptimizer side by side in a few minutes."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..errors import DataFileError

CACHE = Path(__file__).resolve().parents[1] / "cache"
"""Pretrained base models, so that a second demo starts at once; not under version control."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Fine-tune with AdamW and with CGLoRAOptimizer from the same initial "
        "weights on the same data: a pretrained sentence encoder on a classification task, "
        "and a small byte-level language model on source code.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="classify these texts instead: .tsv or .tsv.gz with the header line "
        "label<TAB>text_a[<TAB>text_b], UTF-8, no quoting; labels may be words",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output"), metavar="DIR")
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N", help="runs of each")
    parser.add_argument("--preset", choices=("demo", "tiny"), default="demo")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, metavar="DIR", help="folder of pretrained bases"
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code: 0, or 2 for a file that cannot be used."""
    options = arguments(argv)
    try:
        if options.data is not None:
            _check_data(options.data)  # before anything slow is imported
        options.out.mkdir(parents=True, exist_ok=True)
        _run(options, Console())
    except DataFileError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _check_data(path: Path) -> None:
    from .parts import user_data

    user_data(path)


def _run(options: argparse.Namespace, console: Console) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
    from . import report
    from .parts import ClassifierPart, LanguageModelPart, Part
    from .settings import PRESETS
    from .training import OPTIMIZERS, Run, run

    started = time.monotonic()
    preset = PRESETS[options.preset]
    results: list[tuple[Part, list[Run]]] = []

    def compare(part: Part, progress: Progress) -> None:
        runs = []
        for seed in range(options.seeds):
            for name in OPTIMIZERS:
                label = name if options.seeds == 1 else f"{name}, seed {seed}"
                with _bar(progress, label, part.settings.steps) as update:
                    runs.append(run(part, name, seed, update))
        results.append((part, runs))

    with _progress(console) as progress:
        console.print("[bold]Part 1[/bold]: reading texts and the pretrained encoder")
        compare(ClassifierPart(preset.classifier, options.data), progress)
    report.show(console, *results[-1])

    with _progress(console) as progress:
        console.print("[bold]Part 2[/bold]: a language model, pretrained now unless it was before")
        steps = preset.language_model.base.steps
        with _bar(progress, "pretraining", steps) as update:
            part = LanguageModelPart(
                preset.language_model,
                options.cache,
                lambda step, _, loss: update(step, loss),
            )
            update(steps, None)  # also where the cache had it
        compare(part, progress)
    report.show(console, *results[-1])

    picture, record = options.out / "demo.png", options.out / "demo.json"
    report.draw(picture, results)
    report.save(record, results)
    console.print(f"Curves: {picture}   numbers: {record}   {time.monotonic() - started:.0f} s")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class _Update:
    """Moves one bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self, step: int, loss: float | None) -> None:
        shown = {} if loss is None else {"loss": f"loss {loss:.4f}"}
        self._progress.update(self._task, completed=step, **shown)


@contextmanager
def _bar(progress: Progress, label: str, steps: int) -> Iterator[_Update]:
    yield _Update(progress, progress.add_task(label, total=steps, loss=""))


if __name__ == "__main__":
    sys.exit(main())
