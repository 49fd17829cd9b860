"""``python -m benchmarks.starts cost compare table``: measure starts, and show what was found."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cells import write_json
from ..marked_block import refresh_block
from ..usage import UsageError

RESULTS = Path(__file__).resolve().parent / "results"
README = Path(__file__).resolve().parents[1] / "README.md"
COSTS = "cost.json"
ACTIONS = ("cost", "compare", "table")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the actions; 0, or 2 for a wrong request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starts", description=__doc__)
    parser.add_argument("actions", nargs="+", choices=ACTIONS)
    parser.add_argument("--steps", nargs="+", type=int, default=[30, 60, 120], metavar="N")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK")
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD")
    parser.add_argument("--data", type=Path, metavar="DIR", help="as for python -m benchmarks")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--until", type=float, metavar="MINUTES", help="start no cell after that")
    options = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        for action in options.actions:
            {"cost": _cost, "compare": _compare, "table": _table}[action](options)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _cost(options: argparse.Namespace) -> None:
    from . import cost

    record = cost.measure_all(cost.Shape(), threads=1)
    write_json(options.out / COSTS, record)
    print(cost.table(record))


def _compare(options: argparse.Namespace) -> None:
    from rich.console import Console

    from .. import works
    from ..progress import Bars
    from ..runner import Runner
    from .compare import comparisons

    found = comparisons(options.data, options.steps, options.tasks, options.methods)
    with Bars(Console()) as bars:
        for comparison in found:
            works.work(comparison.task.work).prepare(comparison.task, bars.prepared)
        until = None if options.until is None else 60 * options.until
        Runner(found, options.out, jobs=options.jobs, until=until, report=bars.status).run()


def _table(options: argparse.Namespace) -> None:
    from . import cost
    from .compare import comparisons, table

    found = comparisons(options.data, options.steps, options.tasks, options.methods)
    parts = [text for one in found if (text := table(one, options.out))]
    costs = options.out / COSTS
    if costs.is_file():
        parts.append(cost.table(json.loads(costs.read_text(encoding="utf-8"))))
    text = "\n\n".join(parts)
    print(text)
    if options.out.resolve() == RESULTS:
        refresh_block(README, "starts", text)


if __name__ == "__main__":
    sys.exit(main())
