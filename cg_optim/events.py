"""Counts numerical events where they happen and warns once about each kind.

Counting must not wait for a GPU: a count that lives on one stays there, and a copy is
on its way to the host, looked at in a later step once it has arrived.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cg_optim import host
from cg_optim.errors import NumericalError, NumericalWarning, warn

PAIR_SKIPPED = "pair skipped"
PARAMETER_SKIPPED = "parameter skipped"
CURVATURE_DROPPED = "curvature update dropped"
FACTORISATION_REPAIRED = "factorisation repaired"

#: What each kind of event means, for the warning.
MEANING = {
    PAIR_SKIPPED: "the gradients or the step of a LoRA pair were not finite; it was left as it was",
    PARAMETER_SKIPPED: (
        "the gradient or the step of a parameter was not finite; it was left as it was"
    ),
    CURVATURE_DROPPED: "the inputs of a layer were not finite; its curvature was left as it was",
    FACTORISATION_REPAIRED: (
        "a curvature matrix could not be factorised with its damping alone; more was added, or "
        "the pair was stepped without it"
    ),
}


#: Devices from which a copy to pinned memory can be waited for with an event; elsewhere
#: the warning comes with the next look at the counts.
PINNING_DEVICES = ("cuda", "xpu")


class EventCounter:
    """Numerical events of one optimizer.

    Args:
        strict: Whether :meth:`raise_if_strict` raises what was added before; every event
            is then looked at, which waits for the devices.
    """

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self._happened: list[str] = []
        self._counted: Counter[str] = Counter(dict.fromkeys(MEANING, 0))
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        self._arriving: dict[str, tuple[Tensor, torch.Event]] = {}
        self._warned: set[str] = set()

    def add(
        self,
        kind: str,
        flags: Iterable[Tensor],
        names: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        """Count the True among boolean tensors of any shape and on any devices.

        Args:
            kind: One of the keys of :data:`MEANING`.
            flags: What to count.
            names: What each flag, one after the other, is about; asked only if strict.
        """
        by_device: dict[torch.device, list[Tensor]] = {}
        flags = [flag.reshape(-1) for flag in flags]
        for flag in flags:
            by_device.setdefault(flag.device, []).append(flag)
        if self._strict:
            self._note(kind, [bad for flag in flags for bad in flag.tolist()], names)
        for device, each in by_device.items():
            count = torch.cat(each).sum()
            if host.at_hand(count):
                self._counted[kind] += int(count)
                if self._counted[kind]:
                    self._warn(kind)
            else:
                key = (kind, device)
                if key not in self._on_device:
                    self._on_device[key] = torch.zeros_like(count)
                # In place: so does the replay of a CUDA graph.
                self._on_device[key] += count
                self._watch(kind, self._on_device[key])

    def raise_if_strict(self) -> None:
        """End of a step.

        Raises:
            NumericalError: If strict and anything happened since the last call.
        """
        if self._happened:
            happened, self._happened = self._happened, []
            raise NumericalError("; ".join(happened))

    def counts(self) -> dict[str, int]:
        """All counts so far, by kind; waits for the devices."""
        total = Counter(self._counted)
        for (kind, _), count in self._on_device.items():
            total[kind] += int(count)
            if total[kind]:
                self._warn(kind)
        return {kind: total[kind] for kind in MEANING}

    def _note(
        self, kind: str, flags: list[bool], names: Callable[[], Sequence[str]] | None
    ) -> None:
        if any(flags):
            where = [name for name, bad in zip(names(), flags, strict=True) if bad] if names else []
            whose = f" ({', '.join(where)})" if where else ""
            self._happened.append(f"{kind}{whose}: {MEANING[kind]}")

    def _watch(self, kind: str, total: Tensor) -> None:
        if kind in self._warned or total.device.type not in PINNING_DEVICES:
            return
        if total.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # a graph cannot hold a look at an event
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
        # A strict optimizer says it with an error.
        if kind not in self._warned and not self._strict:
            self._warned.add(kind)
            warn(
                f"{MEANING[kind]} (warned once; optimizer.diagnostics() counts these events)",
                NumericalWarning,
            )
