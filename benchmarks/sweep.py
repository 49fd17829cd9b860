"""Which cell next: the plan of a comparison as a pure function of the finished cells.

Every method goes through the same stages, with the same density of learning rates:

1. *tune*: on the tuning seeds and the ``choose`` half of the held-out data, three learning rates
   half a decade apart, widened while the best one lies at an edge, then refined to a quarter of a
   decade (a factor of 1.78) around the best one; so for each value of the second knob.
2. *report*: the chosen setting on the reporting seeds.
3. *default*: the method as its package sets it, on the tuning seeds.
4. *width*: the sweep of the chosen knob value extended until both ends leave both bands.
5. *short*: for methods that beat tuned AdamW, shorter budgets with their own schedule.

Nothing here trains or reads a file, and nothing is remembered: stopping at any point and asking
again gives the same plan minus what is finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .cells import Cell, Result

STEPS_PER_DECADE = 4
"""Density of the fine grid; the coarse one takes every second value."""
COARSE = 2
BAND = 1.02
"""A learning rate is good if its loss is within this factor of the method's best."""
SHORT_FRACTIONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BASELINE = "adamw"
ENOUGH_FAILURES = 3
"""Failed runs, and no other, after which a method is taken to be broken on a task."""

Key = tuple[str, float, float | None, int, int]


def rate(index: int) -> float:
    """Learning rate at a place of the grid, rounded so that it prints and compares exactly."""
    return float(f"{10 ** (index / STEPS_PER_DECADE):.3g}")


def place(lr: float) -> int | None:
    """Place of ``lr`` on the grid, or ``None`` if it is not on it."""
    index = round(STEPS_PER_DECADE * math.log10(lr))
    return index if math.isclose(rate(index), lr, rel_tol=1e-6) else None


def nearest(lr: float) -> int:
    """The place of the coarse grid nearest to ``lr``."""
    return COARSE * round(STEPS_PER_DECADE * math.log10(lr) / COARSE)


def best_place(losses: Mapping[int, float]) -> int | None:
    """Place with the lowest loss (the smaller learning rate on a tie), ``None`` if all diverged."""
    finite = [index for index in sorted(losses) if math.isfinite(losses[index])]
    return min(finite, key=lambda index: losses[index], default=None)


def wanted_places(
    losses: Mapping[int, float], centre: int, *, refine: bool = True, limit: int = 10
) -> list[int]:
    """Places of the grid to run next; empty when the best one is bracketed (and refined).

    Args:
        losses: loss of every finished place, infinite where the run diverged or failed.
        centre: place of the coarse grid to start around.
        refine: whether to go on to the fine grid.
        limit: how far from ``centre`` the sweep may go.
    """
    start = [index for index in (centre, centre - COARSE, centre + COARSE) if index not in losses]
    if start:
        return start
    coarse = {i: loss for i, loss in losses.items() if (i - centre) % COARSE == 0}
    best = best_place(coarse)
    if best is None:  # everything diverged: the way out is down
        lower = min(coarse) - COARSE
        return [lower] if lower >= centre - limit else []
    edges = [i for i in (best - COARSE, best + COARSE) if i not in coarse]
    edges = [i for i in edges if abs(i - centre) <= limit]
    if edges or not refine:
        return edges
    best = best_place(losses)
    assert best is not None
    fine = [i for i in (best - 1, best + 1) if i not in losses]
    return [i for i in fine if abs(i - centre) <= limit]


def wanted_for_width(
    losses: Mapping[int, float], level: float, centre: int, *, limit: int = 14
) -> list[int]:
    """Places to add so that both ends of the sweep have a loss above ``level``."""
    best = best_place(losses)
    if best is None:
        return []
    wanted = []
    for direction in (-1, 1):
        side = [i for i in losses if (i - best) * direction >= 0]
        if any(not losses[i] <= level for i in side):
            continue
        end = max(side, key=lambda i: i * direction)
        step = end + COARSE * direction
        if abs(step - centre) <= limit:
            wanted.append(step)
    return wanted


def wanted_budget(passed: Mapping[float, bool]) -> float | None:
    """Next fraction of the budget to try in the search for the shortest one that still passes.

    Args:
        passed: for each finished fraction, whether its final loss reached the target.
    """
    low, high = 0, len(SHORT_FRACTIONS)
    for position, fraction in enumerate(SHORT_FRACTIONS):
        if fraction in passed:
            if passed[fraction]:
                high = min(high, position)
            else:
                low = max(low, position + 1)
    return SHORT_FRACTIONS[(low + high) // 2] if low < high else None


@dataclass(frozen=True)
class Entry:
    """How one method takes part in a study.

    Attributes:
        method: its name.
        lr: learning rate to start the sweep around.
        default: learning rate its package sets, ``None`` if the package names none.
        knobs: values of the second knob to sweep, the package's own first; ``(None,)`` without.
        priority: methods of a lower number are finished first.
        follows: name of the method whose tuned learning rate is the centre (three values around
            it, widened but not refined), for initialisations.
        revision: see :class:`~benchmarks.cells.Cell`.
    """

    method: str
    lr: float
    default: float | None = None
    knobs: tuple[float | None, ...] = (None,)
    priority: int = 1
    follows: str | None = None
    revision: str = ""


@dataclass(frozen=True)
class Study:
    """One comparison: a task, the methods that take part and the protocol's settings."""

    work: str
    preset: str
    task: str
    recipe: str
    steps: int
    entries: tuple[Entry, ...]
    tuning_seeds: tuple[int, ...] = (0,)
    reporting_seeds: tuple[int, ...] = (1, 2, 3)
    refine: bool = True
    width: bool = True
    defaults: bool = True
    short: bool = True

    def entry(self, method: str) -> Entry | None:
        """The entry of ``method`` if it takes part."""
        return next((entry for entry in self.entries if entry.method == method), None)


@dataclass(frozen=True)
class Choice:
    """A tuned setting: its place on the grid, its knob value and its loss when tuned."""

    place: int
    knob: float | None
    loss: float

    @property
    def lr(self) -> float:
        """Learning rate of the choice."""
        return rate(self.place)


@dataclass(frozen=True)
class Request:
    """A cell that is wanted, why, and how urgently (a lower ``order`` goes first)."""

    cell: Cell
    stage: str
    order: tuple[int, int]


class Ledger:
    """The finished cells of one study, asked in the terms of the protocol."""

    def __init__(self, study: Study, results: Collection[Result]) -> None:
        self.study = study
        self._results: dict[Key, Result] = {}
        revisions = {entry.method: entry.revision for entry in study.entries}
        for result in results:
            cell = result.cell
            same = (cell.work, cell.preset, cell.task, cell.recipe)
            if same != (study.work, study.preset, study.task, study.recipe):
                continue
            if revisions.get(cell.method) == cell.revision:
                self._results[(cell.method, cell.lr, cell.knob, cell.seed, cell.steps)] = result

    def cell(
        self, entry: Entry, lr: float, knob: float | None, seed: int, steps: int | None = None
    ) -> Cell:
        """The cell of a setting of ``entry`` in this study."""
        study = self.study
        return Cell(
            work=study.work,
            preset=study.preset,
            task=study.task,
            method=entry.method,
            lr=lr,
            knob=knob,
            seed=seed,
            steps=steps or study.steps,
            recipe=study.recipe,
            revision=entry.revision,
        )

    def get(self, cell: Cell) -> Result | None:
        """The finished result of ``cell``."""
        return self._results.get((cell.method, cell.lr, cell.knob, cell.seed, cell.steps))

    def of(self, method: str) -> list[Result]:
        """All finished cells of ``method``."""
        return [result for key, result in self._results.items() if key[0] == method]

    def mean(self, cells: Sequence[Cell], half: str) -> float | None:
        """Mean final loss over ``cells``; ``None`` while one is missing, infinite if one is bad."""
        found = [self.get(cell) for cell in cells]
        if any(result is None for result in found):
            return None
        return sum(result.loss(half) for result in found if result) / len(found)

    def rates(self, method: str, knob: float | None) -> list[float]:
        """Learning rates that any tuning seed of ``method`` has finished."""
        return sorted(
            {
                lr
                for (name, lr, value, seed, steps) in self._results
                if (name, value) == (method, knob)
                and seed in self.study.tuning_seeds
                and steps == self.study.steps
            }
        )

    def losses(self, entry: Entry, knob: float | None) -> dict[int, float]:
        """Tuning loss of every place of the grid that all tuning seeds have finished."""
        losses = {}
        for lr in self.rates(entry.method, knob):
            index = place(lr)
            mean = self.tuning_loss(entry, lr, knob)
            if index is not None and mean is not None:
                losses[index] = mean
        return losses

    def tuning_loss(self, entry: Entry, lr: float, knob: float | None) -> float | None:
        """Mean tuning loss of one setting, ``None`` while a seed is missing."""
        seeds = self.study.tuning_seeds
        return self.mean([self.cell(entry, lr, knob, seed) for seed in seeds], "choose")

    def centre(self, entry: Entry, knob: float | None) -> int | None:
        """Where the sweep of ``entry`` starts; ``None`` while that is not known yet."""
        if entry.follows is not None:
            followed = self.study.entry(entry.follows)
            if followed is None:
                return nearest(entry.lr)
            choice = self.choice(followed)
            return None if choice is None else choice.place
        first = nearest(entry.lr)
        if knob == entry.knobs[0]:
            return first
        # Later values of the knob start from the first one's best, to save widening; the density
        # and the stopping rule are the same.
        best = best_place(self.losses(entry, entry.knobs[0]))
        return first if best is None else first + COARSE * round((best - first) / COARSE)

    def pending(self, entry: Entry) -> list[tuple[int, float | None]]:
        """Settings that tuning still needs."""
        pending: list[tuple[int, float | None]] = []
        refine = self.study.refine and entry.follows is None
        for knob in entry.knobs:
            centre = self.centre(entry, knob)
            if centre is None:
                return []
            losses = self.losses(entry, knob)
            wanted = wanted_places(losses, centre, refine=refine)
            pending.extend((index, knob) for index in wanted)
            if wanted and knob == entry.knobs[0]:
                break
        return pending

    def choice(self, entry: Entry) -> Choice | None:
        """The tuned setting; ``None`` while tuning goes on or if every run diverged or failed."""
        if entry.follows and self.centre(entry, entry.knobs[0]) is None:
            return None
        if self.pending(entry):
            return None
        return self.leading(entry)

    def leading(self, entry: Entry) -> Choice | None:
        """The best setting so far, finished or not."""
        choices = []
        for knob in entry.knobs:
            losses = self.losses(entry, knob)
            best = best_place(losses)
            if best is not None:
                choices.append(Choice(best, knob, losses[best]))
        return min(choices, key=lambda choice: choice.loss, default=None)

    def reported(self, entry: Entry, lr: float, knob: float | None, steps: int) -> float | None:
        """Mean reporting loss of one setting."""
        seeds = self.study.reporting_seeds
        return self.mean([self.cell(entry, lr, knob, seed, steps) for seed in seeds], "report")


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


def without_extras(study: Study) -> Study:
    """The study reduced to tuning and reporting."""
    return replace(study, width=False, defaults=False, short=False)
