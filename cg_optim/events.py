"""Counts numerical events where they happen and warns once about each kind.

Counting must not wait for a GPU: a count that lives on one stays there, and a copy is
on its way to the host, looked at in a later step once it has arrived.
"""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from torch import Tensor

from cg_optim.errors import NumericalWarning

PAIR_SKIPPED = "pair skipped"
PARAMETER_SKIPPED = "parameter skipped"
CURVATURE_DROPPED = "curvature update dropped"

#: What each kind of event means, for the warning.
MEANING = {
    PAIR_SKIPPED: "the gradients of a LoRA pair were not finite; the pair was left as it was",
    PARAMETER_SKIPPED: "the gradient of a parameter was not finite; it was left as it was",
    CURVATURE_DROPPED: "the inputs of a layer were not finite; its curvature was left as it was",
}


#: Devices from which a copy to pinned memory can be waited for with an event; elsewhere
#: the warning comes with the next look at the counts.
PINNING_DEVICES = ("cuda", "xpu")


class EventCounter:
    """Numerical events of one optimizer."""

    def __init__(self) -> None:
        self._counted: Counter[str] = Counter(dict.fromkeys(MEANING, 0))
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        self._arriving: dict[str, tuple[Tensor, torch.Event]] = {}
        self._warned: set[str] = set()

    def add(self, kind: str, count: int | Tensor) -> None:
        """Count events of a kind; a 0-dimensional tensor may live on any device."""
        if isinstance(count, Tensor) and count.device.type != "cpu":
            key = (kind, count.device)
            self._on_device[key] = self._on_device.get(key, 0) + count
            self._watch(kind, self._on_device[key])
            return
        self._counted[kind] += int(count)
        if count:
            self._warn(kind)

    def counts(self) -> dict[str, int]:
        """All counts so far, by kind; waits for the devices."""
        total = Counter(self._counted)
        for (kind, _), count in self._on_device.items():
            total[kind] += int(count)
            if total[kind]:
                self._warn(kind)
        return {kind: total[kind] for kind in MEANING}

    def _watch(self, kind: str, total: Tensor) -> None:
        if kind in self._warned or total.device.type not in PINNING_DEVICES:
            return
        if kind in self._arriving:
            copied, done = self._arriving[kind]
            if not done.query():
                return
            if int(copied):
                self._warn(kind)
        copied = torch.empty((), dtype=total.dtype, pin_memory=True)
        copied.copy_(total, non_blocking=True)
        done = torch.Event(total.device)
        done.record()
        self._arriving[kind] = (copied, done)

    def _warn(self, kind: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(
                f"{MEANING[kind]} (warned once; optimizer.diagnostics() counts these events)",
                NumericalWarning,
                stacklevel=5,
            )
