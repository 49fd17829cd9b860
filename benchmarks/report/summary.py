"""The short table of the root README: ours beside AdamW, full fine-tuning and the best peer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..sweep import BASELINE
from .measures import Measures
from .styles import OURS
from .table import MISSING, final_loss, grid, reach, verdict
from .topics import Topic

HEADER = (
    "task", "AdamW", "CGLoRAOptimizer", "against AdamW", "best peer", "full fine-tuning",
    "steps to AdamW's loss: AdamW", "ours", "best peer", "full",
)  # fmt: skip


def summary(found: Sequence[tuple[Topic, Sequence[Measures]]]) -> str:
    """One row per task; empty without a task that has both AdamW and ours."""
    rows = [row for topic, measured in found if (row := summary_row(topic, measured))]
    if not rows:
        return ""
    note = (
        "Final held-out loss ± two standard errors over seeds, every learning rate tuned. "
        "*Best peer* is the other optimizer or initialisation with the lowest loss, the more "
        "favourable choice for it. `>`: not reached. All methods, costs and plots: "
        "[benchmarks](benchmarks/README.md)."
    )
    return f"{grid(HEADER, rows)}\n\n{note}"


def summary_row(topic: Topic, measured: Sequence[Measures]) -> list[str] | None:
    """Losses, then steps to AdamW's loss; ``None`` unless AdamW and ours have reported runs."""
    by_name = {one.method: one for one in measured}
    adamw, ours = by_name.get(BASELINE), by_name.get(OURS)
    if adamw is None or ours is None or not adamw.runs or not ours.runs:
        return None
    peers = [
        one
        for one in measured
        if one.method.partition("[")[0] not in (BASELINE, OURS) and one.method not in topic.full
    ]
    peer = best(peers)
    full = best([one for one in measured if one.method in topic.full])
    steps = [MISSING if one is None else reach(one.steps) for one in (adamw, ours, peer, full)]
    return [
        topic.label,
        loss(adamw),
        loss(ours),
        verdict(ours.difference),
        MISSING if peer is None else f"{loss(peer)} ({peer.title})",
        MISSING if full is None else loss(full),
        f"{steps[0]} of {topic.study.steps}",
        *steps[1:],
    ]


def loss(one: Measures) -> str:
    """Loss with its spread, and whether all of it is finished."""
    return final_loss(one) + (f" ({one.state})" if one.state else "")


def best(measured: Sequence[Measures]) -> Measures | None:
    """The finished method with the lowest mean loss."""
    finished = [
        one for one in measured if not one.state and one.loss and math.isfinite(one.loss[0])
    ]
    return min(finished, key=lambda one: one.loss[0] if one.loss else math.inf, default=None)
