"""The short table of the root README: ours beside AdamW, full fine-tuning and the best peer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..methods import STARTED_METHODS
from ..sweep import BASELINE
from .measures import Measures
from .styles import OURS
from .table import MISSING, final_loss, grid, reach, verdict
from .topics import Topic

HEADER = ("task", "AdamW", "CGLoRAOptimizer", "best peer", "full fine-tuning", "ours and AdamW")


def summary(found: Sequence[tuple[Topic, Sequence[Measures]]]) -> str:
    """One row per task; empty without a task that has both AdamW and ours."""
    rows = [row for topic, measured in found if (row := summary_row(topic, measured))]
    if not rows:
        return ""
    note = (
        "Final held-out loss ± two standard errors over seeds, and the steps to AdamW's final "
        "loss (`>`: not reached); every learning rate is tuned. The best peer is the optimizer or "
        "initialisation with the lowest of these losses. *Lower* and *higher* are beyond two "
        "standard errors of the difference paired over seeds. All methods, costs and plots: "
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
        if one.method.partition("[")[0] not in (BASELINE, OURS, *STARTED_METHODS)
        and one.method not in topic.full
    ]
    peer = best(peers)
    full = best([one for one in measured if one.method in topic.full])
    return [
        topic.label,
        f"{outcome(adamw)} (of {topic.study.steps})",
        outcome(ours),
        MISSING if peer is None else f"{peer.title}: {outcome(peer)}",
        MISSING if full is None else outcome(full),
        verdict(ours.difference),
    ]


def outcome(one: Measures) -> str:
    """Loss with its spread, steps, and whether all of it is finished."""
    state = f" ({one.state})" if one.state else ""
    steps = "" if one.steps is None else f"; {reach(one.steps)} steps"
    return f"{final_loss(one)}{state}{steps}"


def best(measured: Sequence[Measures]) -> Measures | None:
    """The finished method with the lowest mean loss."""
    finished = [
        one for one in measured if not one.state and one.loss and math.isfinite(one.loss[0])
    ]
    return min(finished, key=lambda one: one.loss[0] if one.loss else math.inf, default=None)
