"""Milliseconds of optimizers that take turns, so that a disturbance meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from cg_optim import CGLoRAOptimizer
from cg_optim.curvature_store import INTERVAL, WARM_UP_STEPS, collects_at

NAMES = ("adamw_foreach", "adamw_fused", "cg")
BASELINES = NAMES[:2]


@dataclass(frozen=True)
class Contender:
    """An optimizer and how its gradients come about."""

    optimizer: Optimizer
    forward_backward: Callable[[], None]

    @property
    def collecting(self) -> bool:
        """Whether the hooks collect for the next step."""
        group = self.optimizer.param_groups[0]
        return isinstance(self.optimizer, CGLoRAOptimizer) and collects_at(group["steps_taken"])


@dataclass(frozen=True)
class Turn:
    """Milliseconds of one training step."""

    collecting: bool
    forward_backward: float
    step: float


def resume_after_warm_up(optimizer: CGLoRAOptimizer) -> None:
    """Move a new optimizer to where it collects in every ``INTERVAL``-th step, as a resumed run."""
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["steps_taken"] = -(-WARM_UP_STEPS // INTERVAL) * INTERVAL
    optimizer.load_state_dict(saved)


def milliseconds(work: Callable[[], Any], device: str) -> float:
    """How long ``work`` takes, on a GPU from CUDA events."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def take_turns(contenders: dict[str, Contender], cycles: int, device: str) -> dict[str, list[Turn]]:
    """``cycles`` times the refresh interval of training steps of each, after one to warm up."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range((1 + cycles) * INTERVAL):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            contender = contenders[name]
            contender.optimizer.zero_grad()
            collecting = contender.collecting
            backward = milliseconds(contender.forward_backward, device)
            step = milliseconds(contender.optimizer.step, device)
            if number >= INTERVAL:
                turns[name].append(Turn(collecting, backward, step))
    return turns


def average(collecting: float, other: float) -> float:
    """Mean over the refresh schedule."""
    return (collecting + (INTERVAL - 1) * other) / INTERVAL


def summarise(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Medians.

    Returns:
        ``ms``, the optimizer step of each (``cg``: mean over the schedule);
        ``ms_cg_step`` and ``ms_hooks``, each ``collecting``, ``other`` and ``average``;
        ``ms_forward_backward`` without hooks.
    """
    # Paired with the same turn's passes without hooks, so that slow drifts cancel.
    plain = [
        statistics.fmean(turn.forward_backward for turn in both)
        for both in zip(*(turns[name] for name in BASELINES), strict=True)
    ]
    hooks = [
        (turn.collecting, turn.forward_backward - usual)
        for turn, usual in zip(turns["cg"], plain, strict=True)
    ]
    step = _by_kind((turn.collecting, turn.step) for turn in turns["cg"])
    return {
        "ms": {
            **{name: statistics.median(turn.step for turn in turns[name]) for name in BASELINES},
            "cg": step["average"],
        },
        "ms_cg_step": step,
        "ms_hooks": _by_kind(hooks),
        "ms_forward_backward": statistics.median(plain),
    }


def _by_kind(values: Iterable[tuple[bool, float]]) -> dict[str, float]:
    known = list(values)
    medians = [
        statistics.median(v for kind, v in known if kind is wanted) for wanted in (True, False)
    ]
    return {"collecting": medians[0], "other": medians[1], "average": average(*medians)}
