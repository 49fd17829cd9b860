"""How far to go along the Newton step: a line search that starts from what is plausible.

The layers' own Newton steps add up, and a step fitted to one batch is too long for others, so
that the best common length is far below 1: anything between 0.3 and 1e-5 was seen.  The first
length tried is a quarter of Polyak's: as if the loss fell in a straight line to three quarters
of what it is.  On a parabola that reaches zero it is an eighth of the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable

#: The first length goes for this part of the loss.
FIRST = 0.25
#: The first length of a loss that is negative, for which no bound is known.
FIRST_OF_NEGATIVE = 1.0 / 16.0
#: A length that does not lower the loss is divided by this; none grows by more than its square.
FACTOR = 4.0
#: A length is tried beyond one that was good if it is more than this times as long.
WORTHWHILE = 2.0
#: How many lengths are tried at most.
STEPS = 8


def search_length(
    loss_at: Callable[[float], float], loss_at_zero: float, slope: float
) -> tuple[float, float]:
    """A length that lowers the loss.

    Each length costs a forward pass; one of them is usual.  It is divided by :data:`FACTOR`
    until the loss is below ``loss_at_zero``.  If that was so at once, and so clearly that the
    parabola through both losses with that slope has its minimum much farther out, the search
    goes on there, as long as the loss falls.

    Args:
        loss_at: Loss after a step of a length; not finite where the step breaks the model.
        loss_at_zero: Loss without a step.
        slope: How fast the loss falls at first, on other data: an upper bound.

    Returns:
        The length and its loss; ``(0, loss_at_zero)`` if no length lowers the loss.
    """
    if not 0.0 < slope < math.inf or not math.isfinite(loss_at_zero):
        return 0.0, loss_at_zero
    shrunk = False
    length = FIRST * loss_at_zero / slope if loss_at_zero > 0 else FIRST_OF_NEGATIVE
    best, least = 0.0, loss_at_zero
    for _ in range(STEPS):
        loss = loss_at(length)
        if not loss < least:  # NaN included
            if best > 0.0:
                break
            length /= FACTOR
            shrunk = True
            continue
        best, least = length, loss
        farther = _vertex(length, loss_at_zero - loss, slope)
        if shrunk or farther <= WORTHWHILE * length:
            break
        length = min(farther, FACTOR**2 * length)
    return best, least


def _vertex(length: float, decrease: float, slope: float) -> float:
    """Where the parabola with this slope at 0, lower by ``decrease`` at ``length``, is lowest."""
    missing = slope * length - decrease
    return 0.5 * slope * length**2 / missing if missing > 0 else math.inf
