"""What becomes of a learning rate that AdamW had: ours at the same and at nearly twice of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..sweep import BASELINE, COARSE, Ledger, rate
from ..works import THOROUGH
from .measures import Measures
from .styles import OURS
from .table import MISSING, grid, number
from .targets import WORKS
from .topics import Topic

TWICE = 1
"""Places of the grid from a rate to nearly twice of it, a factor of 1.78."""
HEADER = (
    "task",
    "AdamW's tuned rate",
    "its loss",
    "ours, same rate",
    "ours, 1.8 times",
    "AdamW at a third of it",
    "ours, same rate",
    "ours, 1.8 times",
)


def carry_over(found: Sequence[tuple[Topic, Sequence[Measures]]]) -> str:
    """One row per task of the thorough presets; empty without any."""
    rows = [
        [topic.label, *cells]
        for topic, _ in found
        if topic.study.work in WORKS and topic.study.preset in THOROUGH
        if (cells := carry_over_cells(topic.ledger)) is not None
    ]
    if not rows:
        return ""
    note = (
        "For who has a learning rate for AdamW: CGLoRAOptimizer at the same rate and at 1.78 times "
        "of it, one place further on the grid, minus AdamW's loss; first where AdamW's rate is "
        "tuned, then where it is 0.32 times of that, as one chosen with caution may be. Final "
        "losses of the tuning seed on the half of the held-out data that the rates are tuned on."
    )
    return f"{grid(HEADER, rows)}\n\n{note}"


def carry_over_cells(ledger: Ledger) -> list[str] | None:
    """The cells behind the task's name; ``None`` before AdamW is tuned or ours has any loss."""
    theirs, ours = ledger.study.entry(BASELINE), ledger.study.entry(OURS)
    if theirs is None or ours is None:
        return None
    choice = ledger.choice(theirs)
    adamw, found = ledger.losses(theirs, theirs.knobs[0]), ledger.losses(ours, ours.knobs[0])
    if choice is None or not found:
        return None

    def beside(place: int) -> list[str]:
        return [
            _loss(adamw.get(place)),
            *(_minus(found.get(place + more), adamw.get(place)) for more in (0, TWICE)),
        ]

    return [number(rate(choice.place)), *beside(choice.place), *beside(choice.place - COARSE)]


def _loss(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def _minus(ours: float | None, theirs: float | None) -> str:
    if ours is None or theirs is None or not math.isfinite(theirs):
        return MISSING
    return f"{ours - theirs:+.3f}" if math.isfinite(ours) else "diverged"
