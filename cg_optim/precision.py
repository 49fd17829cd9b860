"""Full precision where the user's surroundings ask for less.

Autocast turns every matrix product inside it into one of half precision.  That is meant for
the model: a step, or a weight that is moved, would be spoilt by it, or fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def autocast_off(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Switch autocast off on the devices of some tensors, if it is on."""
    kinds = {tensor.device.type for tensor in tensors}
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
