"""Every cell that is needed now, the most urgent first, and how many are still to come."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from ..cells import Cell, Result
from .grid import (
    SHORT_FRACTIONS,
    STEPS_PER_DECADE,
    nearest,
    rate,
    wanted_budget,
    wanted_for_width,
)
from .ledger import Ledger
from .study import Entry, Study

BAND = 1.02
"""A learning rate is good if its loss is within this factor of the method's best."""
BASELINE = "adamw"
ENOUGH_FAILURES = 3
"""Failed runs, and no other, after which a method is taken to be broken on a task."""


@dataclass(frozen=True)
class Request:
    """A cell that is wanted, why, and how urgently (a lower ``order`` goes first)."""

    cell: Cell
    stage: str
    order: tuple[int, int]


def _tune(ledger: Ledger, entry: Entry) -> Iterator[Cell]:
    for index, knob in ledger.pending(entry):
        for seed in ledger.study.tuning_seeds:
            yield ledger.cell(entry, rate(index), knob, seed)


def _report(ledger: Ledger, entry: Entry) -> Iterator[Cell]:
    choice = ledger.choice(entry)
    if choice is not None:
        for seed in ledger.study.reporting_seeds:
            yield ledger.cell(entry, choice.lr, choice.knob, seed)


def _default(ledger: Ledger, entry: Entry) -> Iterator[Cell]:
    if ledger.study.defaults and entry.default is not None and entry.follows is None:
        for seed in ledger.study.tuning_seeds:
            yield ledger.cell(entry, entry.default, entry.knobs[0], seed)


def _width(ledger: Ledger, entry: Entry) -> Iterator[Cell]:
    baseline = ledger.study.entry(BASELINE)
    choice = ledger.choice(entry)
    if not ledger.study.width or entry.follows or choice is None or baseline is None:
        return
    reference = ledger.choice(baseline)
    centre = ledger.centre(entry, choice.knob)
    if reference is None or centre is None:
        return
    level = max(choice.loss * BAND, reference.loss)
    for index in wanted_for_width(ledger.losses(entry, choice.knob), level, centre):
        for seed in ledger.study.tuning_seeds:
            yield ledger.cell(entry, rate(index), choice.knob, seed)


def short_steps(study: Study, fraction: float) -> int:
    """Number of steps of a shortened budget."""
    return max(1, round(study.steps * fraction))


def shortest(ledger: Ledger, entry: Entry) -> tuple[dict[float, bool], float | None]:
    """Which shortened budgets of ``entry`` reached tuned AdamW's loss, and the next one to try."""
    baseline = ledger.study.entry(BASELINE)
    choice, reference = ledger.choice(entry), baseline and ledger.choice(baseline)
    if not choice or not reference or not baseline or entry.method == BASELINE or entry.follows:
        return {}, None
    steps = ledger.study.steps
    target = ledger.reported(baseline, reference.lr, reference.knob, steps)
    full = ledger.reported(entry, choice.lr, choice.knob, steps)
    if target is None or full is None or not full <= target < math.inf:
        return {}, None
    passed = {}
    for fraction in SHORT_FRACTIONS:
        loss = ledger.reported(entry, choice.lr, choice.knob, short_steps(ledger.study, fraction))
        if loss is not None:
            passed[fraction] = loss <= target
    return passed, wanted_budget(passed)


def _short(ledger: Ledger, entry: Entry) -> Iterator[Cell]:
    choice = ledger.choice(entry)
    if not ledger.study.short or choice is None:
        return
    _, fraction = shortest(ledger, entry)
    if fraction is not None:
        for seed in ledger.study.reporting_seeds:
            steps = short_steps(ledger.study, fraction)
            yield ledger.cell(entry, choice.lr, choice.knob, seed, steps)


STAGES: tuple[tuple[str, Callable[[Ledger, Entry], Iterator[Cell]]], ...] = (
    ("tune", _tune),
    ("report", _report),
    ("default", _default),
    ("width", _width),
    ("short", _short),
)


def is_broken(ledger: Ledger, entry: Entry) -> bool:
    """Whether every run of a method has failed (not diverged), often enough to stop trying."""
    found = ledger.of(entry.method)
    return len(found) >= ENOUGH_FAILURES and all(result.status == "failed" for result in found)


def plan(study: Study, results: Collection[Result]) -> list[Request]:
    """Every cell known to be needed now, the most urgent first.

    The order finishes the methods of the lowest priority number (tuned and reported) before the
    next ones start, and leaves defaults, widths and short budgets of all methods for the end.
    """
    ledger = Ledger(study, results)
    requests: dict[Cell, Request] = {}
    for entry in study.entries:
        if is_broken(ledger, entry):
            continue
        for number, (stage, wanted) in enumerate(STAGES):
            late = 0 if stage in ("tune", "report") else 100
            for cell in wanted(ledger, entry):
                if ledger.get(cell) is None and cell not in requests:
                    requests[cell] = Request(cell, stage, (late + entry.priority, number))
    return sorted(requests.values(), key=lambda request: request.order)


def forecast(study: Study, results: Collection[Result], *, cap: int = 2000) -> list[Cell]:
    """The cells still to come if the losses were smooth: what the time estimate is made from.

    The plan is played through with made-up losses: a parabola in the logarithm of the learning
    rate around what the sweep holds as its centre.
    """
    known = list(results)
    missing: list[Cell] = []
    centres = {entry.method: nearest(entry.lr) for entry in study.entries}
    ledger = Ledger(study, known)
    for entry in study.entries:
        leading = ledger.leading(entry)
        if leading is not None:
            centres[entry.method] = leading.place
    while len(missing) < cap:
        requests = plan(study, known)
        if not requests:
            break
        for request in requests:
            cell = request.cell
            distance = STEPS_PER_DECADE * math.log10(cell.lr) - centres[cell.method]
            loss = 1.0 + 0.01 * distance**2
            reference = next((r for r in known if r.status == "ok"), None)
            scale = reference.loss("choose") if reference else 1.0
            value = scale * loss if math.isfinite(scale) else loss
            final = {"choose": value, "report": value}
            known.append(Result(cell=cell, status="ok", final=final))
            missing.append(cell)
    return missing
