"""How much is stacked at once: fewer calls against more memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

#: Elements of one stacked tensor, 64 MiB in float32.  A step holds some twenty of them for a
#: moment.  Larger ones save no time: launching their kernels takes less than running them.
MOST_ELEMENTS = 2**24


def in_parts(items: Sequence[Item], elements: int) -> Iterator[Sequence[Item]]:
    """Parts of ``items``, in order, that may be stacked.

    Args:
        items: What to stack.
        elements: Elements of the largest tensor that each brings along.
    """
    size = max(1, MOST_ELEMENTS // max(1, elements))
    for start in range(0, len(items), size):
        yield items[start : start + size]
