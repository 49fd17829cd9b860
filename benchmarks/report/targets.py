"""How far the promises are kept: ours relative to AdamW on every task, and the medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..metrics import Width, paired_difference
from ..sweep import BASELINE
from ..works import THOROUGH
from .measures import Measures
from .styles import OURS
from .summary import best
from .table import MISSING, final_loss, grid
from .topics import Topic

WORKS = ("lm", "nlu")


@dataclass(frozen=True)
class Kept:
    """Ours on one task; ``None`` is not measured.

    Attributes:
        task: label of the task.
        steps: share of AdamW's steps until its final loss: the smaller of where the curve reaches
            it and of the shortest run, with a schedule of its own, that ends there.  More than
            one is not reached.
        seconds: the same in seconds, with the times of a solo run.
        peer: the best other optimizer on LoRA, and ours minus its loss.
        gap: share of the gap from AdamW to full fine-tuning that is closed.
        kl: divergence from full fine-tuning relative to AdamW's.
        width: ratio of the largest to the smallest learning rate that beats tuned AdamW.
        own_width: width of the band of own best + 2 % relative to AdamW's.
        default: loss at the default learning rate relative to the tuned best.
        diverged: runs that diverged inside AdamW's band of 2 %.
    """

    task: str
    steps: float | None = None
    seconds: float | None = None
    peer: str = MISSING
    gap: float | None = None
    kl: float | None = None
    width: float | None = None
    own_width: float | None = None
    default: float | None = None
    diverged: int | None = None


def targets(found: Sequence[tuple[Topic, Sequence[Measures]]]) -> str:
    """One row per task of the thorough presets, and the medians; empty without any."""
    tasks = [
        kept
        for topic, measured in found
        if topic.study.work in WORKS and topic.study.preset in THOROUGH
        if (kept := keep(topic, measured)) is not None
    ]
    if not tasks:
        return ""
    rows = [[one.task, *(show(one) for _, show in COLUMNS)] for one in tasks]
    rows.append([f"median of {len(tasks)}", *_medians(tasks)])
    note = (
        "CGLoRAOptimizer relative to AdamW. Steps and seconds are the share of AdamW's until its "
        "final loss is reached, by the same run or by a shorter one with its own schedule (`>1`: "
        "not reached). The best peer is the best other optimizer on LoRA of those that were run. "
        "Gap and KL are to the better full fine-tuning, where it is ahead of AdamW on LoRA. "
        "Widths are ratios of learning rates. Medians are over the tasks that have a value."
    )
    return f"{grid(['task', *(name for name, _ in COLUMNS)], rows)}\n\n{note}"


def keep(topic: Topic, measured: Sequence[Measures]) -> Kept | None:
    """The row of one task; ``None`` unless AdamW is finished there, and ours, or ours broke."""
    by_name = {one.method: one for one in measured}
    adamw, ours = by_name.get(BASELINE), by_name.get(OURS)
    if adamw is None or ours is None or adamw.state or ours.state == "unfinished":
        return None
    if ours.state:  # diverged or failed at every rate: the worst outcome must not go missing
        return Kept(topic.label, math.inf, math.inf, ours.state, width=0.0, diverged=ours.diverged)
    steps = _steps(ours, topic.study.steps)
    seconds = None
    if steps is not None and adamw.timing is not None and ours.timing is not None:
        seconds = steps * ours.timing.whole / adamw.timing.whole
    return Kept(
        task=topic.label,
        steps=steps,
        seconds=seconds,
        peer=_peer(topic, measured, ours),
        gap=ours.gap,
        kl=_divergence(ours, adamw),
        width=None if ours.width_adamw is None else max(ours.width_adamw.ratio, 0.0),
        own_width=_ratio(ours.width_own, adamw.width_own),
        default=ours.default,
        diverged=_diverged(topic, adamw.width_own),
    )


def _steps(ours: Measures, budget: int) -> float | None:
    shares = [] if ours.budget is None else [ours.budget]
    if ours.steps is not None:
        shares.append(math.inf if ours.steps.censored else ours.steps.value / budget)
    return min(shares, default=None)


def _divergence(ours: Measures, adamw: Measures) -> float | None:
    """Relative to AdamW's; none where full fine-tuning is no goal, being behind AdamW on LoRA."""
    if ours.gap is None or not (ours.kl and adamw.kl and adamw.kl[0]):
        return None
    return ours.kl[0] / adamw.kl[0]


def _peer(topic: Topic, measured: Sequence[Measures], ours: Measures) -> str:
    others = [
        one
        for one in measured
        if one.method.partition("[")[0] not in (BASELINE, OURS) and one.method not in topic.full
    ]
    peer = best(others)
    difference = None if peer is None else paired_difference(ours.losses, peer.losses)
    if peer is None or difference is None:
        return MISSING
    if not math.isfinite(difference.mean):
        return f"{peer.title}: ours {final_loss(ours)}"
    return f"{peer.title}: {difference.mean:+.3f}, {difference.verdict}"


def _ratio(ours: Width | None, theirs: Width | None) -> float | None:
    return None if ours is None or theirs is None else ours.ratio / theirs.ratio


def _diverged(topic: Topic, band: Width | None) -> int | None:
    if band is None:
        return None
    return sum(
        result.status == "diverged" and band.low <= result.cell.lr <= band.high
        for result in topic.ledger.of(OURS)
    )


def _share(value: float | None) -> str:
    if value is None:
        return MISSING
    return ">1" if math.isinf(value) else f"{value:.2f}"


def _wide(value: float | None) -> str:
    return "none" if value == 0 else _share(value)


COLUMNS: tuple[tuple[str, Callable[[Kept], str]], ...] = (
    ("steps", lambda one: _share(one.steps)),
    ("seconds", lambda one: _share(one.seconds)),
    ("minus the best peer", lambda one: one.peer),
    ("gap closed", lambda one: MISSING if one.gap is None else f"{one.gap:.0%}"),
    ("KL to full", lambda one: _share(one.kl)),
    ("width beating AdamW", lambda one: _wide(one.width)),
    ("width of own best + 2 %", lambda one: _share(one.own_width)),
    ("default / tuned", lambda one: MISSING if one.default is None else f"{one.default:.3f}"),
    ("diverged", lambda one: MISSING if one.diverged is None else str(one.diverged)),
)


def _medians(tasks: Sequence[Kept]) -> list[str]:
    def median(name: str) -> float | int | None:
        values = [value for one in tasks if (value := getattr(one, name)) is not None]
        return statistics.median(values) if values else None

    middle = Kept(
        task="",
        **{  # type: ignore[arg-type]
            name: median(name)
            for name in ("steps", "seconds", "gap", "kl", "width", "own_width", "default")
        },
    )
    return [show(middle) for _, show in COLUMNS]
