"""How far to go along the Newton step: a search over lengths on real data."""

from __future__ import annotations

import math
from collections.abc import Callable

#: Where the search begins: the layers' own Newton steps add up, so that the best common
#: length is far below 1.
FIRST = 1.0 / 16.0
#: Ratio of neighbouring lengths.
FACTOR = 4.0
#: How often at most the search goes on in one direction.
STEPS = 8


def search_length(loss_at: Callable[[float], float], loss_at_zero: float) -> tuple[float, float]:
    """The best of a few lengths, the last one at the vertex of a parabola through three.

    Each length costs a forward pass; five of them are usual.

    Args:
        loss_at: Loss after a step of a length; not finite where the step breaks the model.
        loss_at_zero: Loss without a step.

    Returns:
        The length and its loss; ``(0, loss_at_zero)`` if no length lowers the loss.
    """
    losses: dict[int, float] = {}

    def look(power: int) -> float:
        losses[power] = _finite(loss_at(FIRST * FACTOR**power))
        return losses[power]

    look(0)
    _walk(losses, look, -1, loss_at_zero)
    if min(losses, key=losses.__getitem__) == 0:
        _walk(losses, look, 1, loss_at_zero)
    best = min(losses, key=losses.__getitem__)
    lengths = {FIRST * FACTOR**power: loss for power, loss in losses.items()}
    vertex = FIRST * FACTOR ** (best + _vertex(losses, best))
    if vertex not in lengths:
        lengths[vertex] = _finite(loss_at(vertex))
    length = min(lengths, key=lengths.__getitem__)
    return (length, lengths[length]) if lengths[length] < loss_at_zero else (0.0, loss_at_zero)


def _walk(
    losses: dict[int, float], look: Callable[[int], float], direction: int, loss_at_zero: float
) -> None:
    """Go on while the loss falls, or while no length so far is better than no step at all."""
    power = 0
    for _ in range(STEPS):
        least = min(losses.values())
        if losses[power] > least and least < loss_at_zero:
            return
        power += direction
        look(power)


def _vertex(losses: dict[int, float], best: int) -> float:
    """Where between -1/2 and 1/2 the parabola through the best and its neighbours is lowest.

    Half a step down if the step above breaks the model.
    """
    below, here, above = (losses.get(best + step, math.inf) for step in (-1, 0, 1))
    if not math.isfinite(above):
        return -0.5 if math.isfinite(here) and best + 1 in losses else 0.0
    if not math.isfinite(below):
        return 0.0
    curvature = below - 2 * here + above
    return 0.5 * (below - above) / curvature if curvature > 0 else 0.0


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
