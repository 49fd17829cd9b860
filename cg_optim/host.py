"""The one place that decides whether a value may be looked at.

Reading a value that lives on an accelerator makes the host wait until all work before it
is done, and then the accelerator wait for the host.  In a step nobody may do that; code
that knows a shortcut for values at hand asks here first, and otherwise computes both ways
and selects.
"""

from __future__ import annotations

from torch import Tensor


def at_hand(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read without waiting for anything."""
    return tensor.device.type == "cpu"
