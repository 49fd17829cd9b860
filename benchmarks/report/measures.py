"""The protocol's measures of every method of a topic, as numbers; ``None`` is not measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..cells import Result
from ..metrics import (
    Paired,
    Width,
    gap_closed,
    good_range,
    mean_and_spread,
    median_censored,
    paired_difference,
    steps_to_target,
)
from ..sweep import BAND, BASELINE, Entry, Ledger, is_broken, rate, short_steps, shortest
from .topics import Topic

CEILINGS = ("full-adamw", "full-muon")
LOSSES = ("choose", "report")
NOWHERE = Width(1.0, 0.0, low_open=False, high_open=False)
"""The width of a band that no learning rate of a finished sweep reaches."""


@dataclass(frozen=True)
class Setting:
    """The setting of a method that is reported.

    Attributes:
        lr, knob: the setting.
        tuned: whether tuning is finished and chose it.
    """

    lr: float
    knob: float | None
    tuned: bool


@dataclass(frozen=True)
class Reach:
    """Steps (or seconds) to a target; a censored one was not reached within ``value``."""

    value: float
    censored: bool = False


@dataclass(frozen=True)
class Timing:
    """Milliseconds per step of a solo run: forward and backward (without hooks), hooks, step."""

    forward_backward: float
    step: float
    hooks: float | None = None

    @property
    def whole(self) -> float:
        """Milliseconds of a whole training step."""
        return self.forward_backward + self.step + (self.hooks or 0.0)


@dataclass(frozen=True)
class Measures:
    """Everything the report says about one method on one task.

    Attributes:
        method, title: identity.
        state: empty if all is finished, else ``unfinished``, ``diverged`` or ``failed``.
        setting: what the reported runs use.
        runs: the reported runs by seed; ``losses`` are their final losses.
        difference: loss minus AdamW's, paired over seeds.
        steps, seconds: median over seeds to AdamW's final loss of the same seed.
        budget: shortest share of the budget, rescheduled, that ends at AdamW's loss or below.
        gap: share of the gap from AdamW to full fine-tuning that is closed.
        kl: divergence from full fine-tuning with two standard errors.
        width_own, width_adamw: good learning rates in the two bands.
        default: tuning loss at the package's defaults relative to the tuned one.
        diverged, failed, count: numbers of runs.
        errors: what failed runs said, each message once.
        timing: milliseconds per step.
        state_bytes, memory: bytes of the optimizer's state, and peak of the whole process.
        metrics: further metrics of the task with two standard errors.
    """

    method: str
    title: str
    state: str = ""
    setting: Setting | None = None
    runs: Mapping[int, Result] = field(default_factory=dict)
    difference: Paired | None = None
    steps: Reach | None = None
    seconds: Reach | None = None
    budget: float | None = None
    gap: float | None = None
    kl: tuple[float, float] | None = None
    width_own: Width | None = None
    width_adamw: Width | None = None
    default: float | None = None
    diverged: int = 0
    failed: int = 0
    count: int = 0
    errors: tuple[str, ...] = ()
    timing: Timing | None = None
    state_bytes: float | None = None
    memory: float | None = None
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def losses(self) -> dict[int, float]:
        """Final loss of the reported runs by seed, infinite where one is bad."""
        return {seed: run.loss("report") for seed, run in self.runs.items()}

    @property
    def loss(self) -> tuple[float, float] | None:
        """Mean final loss and two standard errors."""
        return mean_and_spread(list(self.losses.values())) if self.runs else None


def measure(topic: Topic) -> list[Measures]:
    """The measures of every method, the lowest loss first, unfinished methods last."""
    ledger, study = topic.ledger, topic.study
    reported = {
        entry.method: runs(ledger, entry, setting(ledger, entry)) for entry in study.entries
    }
    found = [_measure(topic, entry, reported) for entry in study.entries]
    return sorted(found, key=_merit)


def _merit(one: Measures) -> tuple[bool, float]:
    loss = one.loss
    return (bool(one.state), loss[0] if loss and math.isfinite(loss[0]) else math.inf)


def setting(ledger: Ledger, entry: Entry) -> Setting | None:
    """The tuned setting; while tuning goes on, the one with most reported runs, or the leading."""
    choice = ledger.choice(entry)
    if choice is not None:
        return Setting(choice.lr, choice.knob, tuned=True)
    groups: dict[tuple[float, float | None], list[float]] = {}
    for result in ledger.of(entry.method):
        cell = result.cell
        if cell.seed in ledger.study.reporting_seeds and cell.steps == ledger.study.steps:
            groups.setdefault((cell.lr, cell.knob), []).append(result.loss("choose"))
    if groups:
        lr, knob = min(groups, key=lambda one: (-len(groups[one]), sum(groups[one]), one[0]))
        return Setting(lr, knob, tuned=False)
    leading = ledger.leading(entry)
    return None if leading is None else Setting(leading.lr, leading.knob, tuned=False)


def runs(ledger: Ledger, entry: Entry, chosen: Setting | None) -> dict[int, Result]:
    """Finished reporting runs of a setting by seed."""
    if chosen is None:
        return {}
    seeds = ledger.study.reporting_seeds
    found = {s: ledger.get(ledger.cell(entry, chosen.lr, chosen.knob, s)) for s in seeds}
    return {seed: result for seed, result in found.items() if result is not None}


def _measure(topic: Topic, entry: Entry, reported: Mapping[str, dict[int, Result]]) -> Measures:
    ledger, study, name = topic.ledger, topic.study, entry.method
    chosen, mine = setting(ledger, entry), reported[name]
    losses = {method: _losses(found) for method, found in reported.items()}
    theirs = losses.get(BASELINE, {})
    difference = None if name == BASELINE else paired_difference(losses[name], theirs)
    if difference is not None and not math.isfinite(difference.mean):
        difference = None
    timing = _timing(topic, name)
    steps = _steps(mine, theirs, study.steps)
    seconds = None
    if steps is not None and timing is not None:
        seconds = Reach(1e-3 * steps.value * timing.whole, steps.censored)
    cells = ledger.of(name)
    baseline = study.entry(BASELINE)
    return Measures(
        method=name,
        title=topic.titles[name],
        state=_state(ledger, entry, chosen, mine),
        setting=chosen,
        runs=mine,
        difference=difference,
        steps=steps,
        seconds=seconds,
        budget=_budget(ledger, entry),
        gap=None if name == BASELINE else gap(losses, name),
        kl=_divergence(topic, name, mine),
        width_own=_width(ledger, entry, chosen, None),
        width_adamw=_width(ledger, entry, chosen, baseline),
        default=_default(ledger, entry),
        diverged=sum(cell.status == "diverged" for cell in cells),
        failed=sum(cell.status == "failed" for cell in cells),
        count=len(cells),
        errors=tuple(sorted({c.error for c in cells if c.status == "failed" and c.error})),
        timing=timing,
        state_bytes=_cost(mine, "state_bytes"),
        memory=_cost(mine, "peak_device_memory") or _cost(mine, "peak_memory"),
        metrics=_metrics(mine),
    )


def _losses(found: Mapping[int, Result]) -> dict[int, float]:
    return {seed: run.loss("report") for seed, run in found.items()}


def _state(ledger: Ledger, entry: Entry, chosen: Setting | None, mine: Mapping[int, Result]) -> str:
    if is_broken(ledger, entry):
        return "failed"
    if chosen is None and not ledger.pending(entry) and ledger.of(entry.method):
        return "diverged"
    complete = (
        chosen is not None and chosen.tuned and len(mine) == len(ledger.study.reporting_seeds)
    )
    return "" if complete else "unfinished"


def _steps(mine: Mapping[int, Result], theirs: Mapping[int, float], budget: int) -> Reach | None:
    """Median over the seeds that AdamW has finished too; a bad run never reaches anything."""
    reached = [
        steps_to_target(run.curve["step"], run.curve["report"], theirs[seed])
        if run.status == "ok"
        else None
        for seed, run in mine.items()
        if math.isfinite(theirs.get(seed, math.inf))
    ]
    if not reached:
        return None
    median = median_censored(reached)
    return Reach(float(budget), censored=True) if median is None else Reach(median)


def _budget(ledger: Ledger, entry: Entry) -> float | None:
    passed, _ = shortest(ledger, entry)
    steps = ledger.study.steps
    # Of a few steps, nine tenths are all.
    shorter = {share for share in passed if short_steps(ledger.study, share) < steps}
    return min((share for share in shorter if passed[share]), default=None)


def ceiling(losses: Mapping[str, Mapping[int, float]]) -> str | None:
    """The full fine-tuning with the lower mean loss."""
    means = {name: statistics.fmean(losses[name].values()) for name in CEILINGS if losses.get(name)}
    finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    return min(finite, key=lambda name: finite[name], default=None)


def gap(losses: Mapping[str, Mapping[int, float]], method: str) -> float | None:
    """Share of the gap to the better full fine-tuning that ``method`` closes.

    Means are over the seeds that the three have in common.
    """
    full = ceiling(losses)
    if full is None or not losses.get(BASELINE) or not losses.get(method):
        return None
    spread = paired_difference(losses[BASELINE], losses[full])
    seeds = losses[BASELINE].keys() & losses[full].keys() & losses[method].keys()
    if spread is None or not seeds:
        return None
    adamw, ours, theirs = (
        statistics.fmean(losses[name][seed] for seed in seeds) for name in (BASELINE, method, full)
    )
    return gap_closed(adamw, ours, theirs, spread=spread.spread)


def _width(
    ledger: Ledger, entry: Entry, chosen: Setting | None, against: Entry | None
) -> Width | None:
    """Good learning rates of the reported knob value.

    The band reaches to the method's own best plus 2 %, or to the tuned loss of ``against``.
    """
    if chosen is None or against is entry:
        return None
    places = ledger.losses(entry, chosen.knob)
    losses = {rate(index): loss for index, loss in places.items()}
    if against is None:
        finite = [loss for loss in losses.values() if math.isfinite(loss)]
        return good_range(losses, BAND * min(finite)) if finite else None
    reference = ledger.choice(against)
    if reference is None or not losses:
        return None
    return good_range(losses, reference.loss) or NOWHERE


def _default(ledger: Ledger, entry: Entry) -> float | None:
    choice = ledger.choice(entry)
    if choice is None or entry.default is None or entry.follows is not None or not choice.loss:
        return None
    loss = ledger.tuning_loss(entry, entry.default, entry.knobs[0])
    return None if loss is None else loss / choice.loss


def _timing(topic: Topic, method: str) -> Timing | None:
    """The solo timing of a method, unless it was of cells that are no longer shown."""
    timed = topic.timings.get(method, {})
    known = {result.cell.name for result in topic.ledger.of(method)}
    both, step = timed.get("ms_forward_backward"), timed.get("ms_step")
    if timed.get("cell") not in known or both is None or step is None:
        return None
    hooks = timed.get("ms_hooks")
    return Timing(max(both - (hooks or 0.0), 0.0), step, hooks)


def _divergence(
    topic: Topic, method: str, mine: Mapping[int, Result]
) -> tuple[float, float] | None:
    """Mean and two standard errors over the reported runs."""
    found = topic.divergences.get(method, {})
    seeds, cells = found.get("seeds", {}), found.get("cells", {})
    values = [
        float(seeds[str(seed)])
        for seed, run in mine.items()
        if str(seed) in seeds and cells.get(str(seed)) == run.cell.name
    ]
    return mean_and_spread(values) if values else None


def _cost(mine: Mapping[int, Result], name: str) -> float | None:
    values = [run.costs[name] for run in mine.values() if run.costs.get(name) is not None]
    return statistics.median(values) if values else None


def _metrics(mine: Mapping[int, Result]) -> dict[str, tuple[float, float]]:
    """Metrics that every reported run has."""
    good = [run.final for run in mine.values() if run.status == "ok"]
    names = [name for name in (good[0] if good else {}) if name not in LOSSES]
    return {
        name: mean_and_spread([final[name] for final in good])
        for name in names
        if all(name in final for final in good)
    }
