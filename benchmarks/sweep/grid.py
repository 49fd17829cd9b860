"""Which learning rates, and which budgets, come next: arithmetic on places of a grid.

A place is an integer, the learning rate ``10^(place / STEPS_PER_DECADE)``; losses come by place,
infinite where a run diverged or failed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

STEPS_PER_DECADE = 4
"""Density of the fine grid; the coarse one takes every second value."""
COARSE = 2
SHORT_FRACTIONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


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
