"""Short budgets from every start, by the protocol of the suite.

Here every method, initialisations included, has its learning rate refined to a quarter of a
decade: at 30 steps the best rate of a start is not that of its optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from .. import works
from ..cells import load_all
from ..methods import select
from ..metrics import mean_and_spread, paired_difference
from ..report.table import MISSING, difference, grid, plus_minus, verdict
from ..runner import Comparison
from ..sweep import Entry, Ledger, Study, without_extras
from ..works import Task

METHODS = (
    "adamw", "cg", "cg-curvature-newton", "curvature-newton", "cg[init=curvature]",
    "cg-curvature-keep", "cg-curvature-shift", "lora-ga", "cg-lora-ga", "eva", "cg-eva",
    "curvature-shift", "curvature-keep", "pissa", "cg-pissa", "corda", "cg-corda",
)  # fmt: skip
"""What is compared, the most urgent first."""
TASKS = (("lm", "pubmed-b8"), ("nlu", "cola"))
REPORTING_SEEDS = (1, 2, 3)


def comparisons(
    data: Path | None, steps: Sequence[int], tasks: Sequence[str], methods: Sequence[str]
) -> list[Comparison]:
    """One for each task and budget; without data the tasks that need none."""
    found = []
    for task in _tasks(data):
        if not tasks or task.name in tasks:
            found += [Comparison(task, _study(task, budget, methods)) for budget in steps]
    return found


def _tasks(data: Path | None) -> Iterator[Task]:
    for work, name in TASKS:
        known = works.work(work).tasks("quick", data, "cpu")
        yield next((task for task in known if task.name == name), known[0])


def _study(task: Task, steps: int, methods: Sequence[str]) -> Study:
    chosen = select(methods or METHODS)
    entries = [
        replace(one.entry(task.lr_scale, False), priority=number, follows=None)
        for number, one in enumerate(chosen)
    ]
    study = replace(task.study([]), entries=tuple(entries), steps=steps, refine=True)
    return without_extras(replace(study, reporting_seeds=REPORTING_SEEDS))


def table(comparison: Comparison, out: Path) -> str:
    """Losses of all finished methods, and what each start changes for its optimizer."""
    ledger = Ledger(comparison.study, list(load_all(out / comparison.task.folder)))
    methods = {method.name: method for method in select([e.method for e in ledger.study.entries])}
    losses = {entry.method: _losses(ledger, entry) for entry in ledger.study.entries}
    rows = []
    for entry in ledger.study.entries:
        method, mine = methods[entry.method], losses[entry.method]
        choice = ledger.choice(entry)
        if choice is None or len(mine) < len(ledger.study.reporting_seeds):
            continue
        plain = method.follows or ("cg" if method.options else None)
        paired = None if plain is None else paired_difference(mine, losses.get(plain, {}))
        mean, spread = mean_and_spread(list(mine.values()))
        if not math.isfinite(mean):
            bad = sum(not math.isfinite(loss) for loss in mine.values())
            text = f"{bad} of {len(mine)} diverged or failed"
            rows.append((mean, (method.title, f"{choice.lr:g}", text, MISSING, MISSING)))
            continue
        change = MISSING if paired is None else difference(paired)
        cells = (method.title, f"{choice.lr:g}", plus_minus((mean, spread)), change)
        rows.append((mean, (*cells, verdict(paired))))
    if not rows:
        return ""
    header = ("method", "lr", "loss ± 2 SE", "minus the same optimizer's", "verdict")
    title = f"{comparison.task.work} / {comparison.task.name}, {ledger.study.steps} steps"
    return f"**{title}**\n\n{grid(header, [row for _, row in sorted(rows)])}"


def _losses(ledger: Ledger, entry: Entry) -> dict[int, float]:
    """Final reporting loss by seed, of the tuned setting."""
    choice = ledger.choice(entry)
    if choice is None:
        return {}
    found = {}
    for seed in ledger.study.reporting_seeds:
        result = ledger.get(ledger.cell(entry, choice.lr, choice.knob, seed))
        if result is not None:
            found[seed] = result.loss("report")
    return found
