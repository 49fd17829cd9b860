"""How much memory an optimizer's state takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of every tensor in the optimizer's state; storage that several share counts once."""
    # Several optimizers that step as one have several states.
    states = getattr(optimizer, "states", [optimizer.state])
    seen: set[int] = set()
    # The keys of a state are the parameters themselves.
    tensors = [t for state in states for value in state.values() for t in _tensors(value, seen)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in ``value`` but parameters, wherever they are nested.

    ``seen`` holds the identities of what was looked at. Nothing made here may get into it: what
    comes after it can have the same identity.
    """
    if id(value) in seen or isinstance(value, (nn.Parameter, nn.Module, type)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__"):
        # Some packages keep objects with tensors in their state (Shampoo's preconditioners).
        yield from _tensors(vars(value), seen)
