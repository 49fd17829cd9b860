"""How far to go along the Newton step: a search over lengths on real data."""

from __future__ import annotations

import math
from collections.abc import Callable

#: Lengths are searched from the full Newton step down by this factor, then refined by its root.
FACTOR = 4.0
#: How often at most in either direction.
STEPS = 8


def search_length(loss_at: Callable[[float], float], loss_at_zero: float) -> tuple[float, float]:
    """The length with the lowest loss on a grid around the minimum.

    Args:
        loss_at: Loss after a step of a length; not finite where the step breaks the model.
        loss_at_zero: Loss without a step.

    Returns:
        The length and its loss; ``(0, loss_at_zero)`` if no length lowers the loss.
    """
    losses = {1.0: _finite(loss_at(1.0))}

    def walk(factor: float) -> None:
        """Go on in one direction while the loss falls, or has not yet fallen below the start."""
        length = 1.0
        for _ in range(STEPS):
            if losses[length] > min(losses.values()) and min(losses.values()) < loss_at_zero:
                return
            length *= factor
            losses[length] = _finite(loss_at(length))

    walk(1.0 / FACTOR)
    if min(losses, key=losses.__getitem__) == 1.0:
        walk(FACTOR)
    best = min(losses, key=losses.__getitem__)
    for length in (best / math.sqrt(FACTOR), best * math.sqrt(FACTOR)):
        losses[length] = _finite(loss_at(length))
    best = min(losses, key=losses.__getitem__)
    return (best, losses[best]) if losses[best] < loss_at_zero else (0.0, loss_at_zero)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
