"""Which input curvature belongs to which pair, and when it is collected.

Pairs whose layers receive the same tensor (q, k and v) share one
:class:`~cg_optim.input_curvature.InputCurvature`.  Sharing is found out at the first
backward and can later only be undone, never made: if a pair turns up without the
others it takes a copy along.  Sharing therefore never changes a number, it only saves
memory and work, and every pair can be saved and restored on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cg_optim.damped import DampedInput
from cg_optim.input_curvature import (
    InputCurvature,
    damp_together,
    directions,
    new_input_curvature,
    state_shapes,
    update_together,
)
from cg_optim.pairs import LoRAPair

#: Weight of the past in the running mean of X, per update.
DECAY = 0.95
#: Statistics are collected in each of the first steps, then in every INTERVAL-th only:
#: X drifts slowly once training is under way, and the hooks' cost falls accordingly.
WARM_UP_STEPS = 6
INTERVAL = 6

STATE_PREFIX = "input_"
#: In the state of every pair that has a curvature.
TRACE = STATE_PREFIX + "trace"


def collects_at(step: int) -> bool:
    """Whether statistics are collected for the ``step``-th step, counted from 0."""
    return step < WARM_UP_STEPS or step % INTERVAL == 0


class CurvatureStore:
    """The input curvatures of a list of pairs.

    Args:
        pairs: All pairs; curvature is kept for the observed ones.
        representation: See :func:`~cg_optim.input_curvature.new_input_curvature`.
    """

    def __init__(self, pairs: Sequence[LoRAPair], representation: str | int) -> None:
        self._pairs = pairs
        self._representation = representation
        self._curvature_of: dict[int, InputCurvature] = {}
        # Pairs whose curvature exists only because there had to be something to save.
        self._blank: set[int] = set()

    def of(self, pair_index: int) -> InputCurvature | None:
        """The curvature of a pair, None if it has none yet."""
        return self._curvature_of.get(pair_index)

    def damped(self, pair_index: int, damping: float) -> DampedInput | None:
        """The damped curvature of a pair, None if it has none."""
        curvature = self._curvature_of.get(pair_index)
        return None if curvature is None else curvature.damped(damping)

    def damp_together(self, dampings: Sequence[float]) -> None:
        """Prepare :meth:`damped` of all pairs with a few calls; one damping for each pair."""
        wanted = [(each, dampings[index]) for index, each in self._curvature_of.items()]
        in_use: dict[int, set[float]] = {}
        for each, damping in wanted:
            in_use.setdefault(id(each), set()).add(damping)
        for each in self.distinct():
            # A damping that changes in every step must not leave a matrix behind in each.
            each.keep_damped(in_use[id(each)])
        damp_together(wanted)

    @contextmanager
    def only_looked_at(self) -> Iterator[None]:
        """Forget what is damped inside the block: the step damps anew and counts repairs."""
        before = [(each, each.dampings()) for each in self.distinct()]
        try:
            yield
        finally:
            for each, dampings in before:
                each.keep_damped(dampings)

    def distinct(self) -> list[InputCurvature]:
        """Every curvature once, in the order of the pairs."""
        return list({id(c): c for _, c in sorted(self._curvature_of.items())}.values())

    # ------------------------------------------------------------- collecting

    def consume(self, rows: Tensor, mask: Tensor, pair_indices: tuple[int, ...]) -> None:
        """Add the rows that these pairs received; the observer's consumer."""
        together = set(pair_indices)
        fresh = [i for i in pair_indices if i not in self._curvature_of or i in self._blank]
        if fresh:
            self._blank.difference_update(fresh)
            created = self._new(fresh[0])
            self._curvature_of.update(dict.fromkeys(fresh, created))
        receiving: dict[int, InputCurvature] = {}
        for index in pair_indices:
            curvature = self._curvature_of[index]
            if id(curvature) not in receiving:
                self._split(curvature, together)
                curvature = self._curvature_of[index]
            receiving[id(curvature)] = curvature
        for curvature in receiving.values():
            # nn.DataParallel brings rows from other devices.
            curvature.accumulate(rows.to(curvature.device), mask.to(curvature.device))

    def _split(self, curvature: InputCurvature, together: set[int]) -> None:
        """Give the members of ``curvature`` inside ``together`` a copy, if others remain."""
        members = {i for i, c in self._curvature_of.items() if c is curvature}
        inside = members & together
        if inside != members:
            copied = curvature.clone()
            self._curvature_of.update(dict.fromkeys(inside, copied))

    def update(self) -> dict[int, Tensor]:
        """Fold in what was collected since the last call.

        Returns:
            For each distinct input that anything was collected of, by the first pair that
            has it: a boolean ``()`` tensor, True if the sums were unusable.
        """
        first: dict[int, int] = {}
        for index, curvature in sorted(self._curvature_of.items()):
            if curvature.touched:
                first.setdefault(id(curvature), index)
        dropped = update_together([self._curvature_of[i] for i in first.values()], DECAY)
        return dict(zip(first.values(), dropped, strict=True))

    def discard(self) -> None:
        """Drop what was collected since the last update."""
        for curvature in self.distinct():
            curvature.discard()

    def discard_pair(self, pair_index: int, unless: Tensor | None = None) -> set[int]:
        """Drop what was collected for a pair since the last update.

        Args:
            pair_index: The pair.
            unless: Boolean ``()`` tensor; where it is True nothing is dropped.

        Returns:
            The pairs that share its curvature; they lose the same rows.
        """
        curvature = self._curvature_of.get(pair_index)
        if curvature is None:
            return set()
        curvature.discard(None if unless is None else unless.to(curvature.device))
        return {i for i, c in self._curvature_of.items() if c is curvature}

    # ------------------------------------------------------------------ state

    def state(self, pair_index: int) -> dict[str, Tensor]:
        """The live tensors to save with a pair's A; created if there are none yet."""
        if pair_index not in self._curvature_of:
            self._curvature_of[pair_index] = self._new(pair_index)
            self._blank.add(pair_index)
        tensors = self._curvature_of[pair_index].state()
        return {STATE_PREFIX + name: tensor for name, tensor in tensors.items()}

    def load_state(self, saved: dict[int, dict[str, Tensor]]) -> None:
        """Replace everything by saved tensors, sharing what is equal.

        Args:
            saved: For each pair index the tensors :meth:`state` returned.
        """
        self._curvature_of.clear()
        self._blank.clear()
        for index, tensors in sorted(saved.items()):
            plain = {name.removeprefix(STATE_PREFIX): value for name, value in tensors.items()}
            for curvature in self.distinct():
                if _equal(curvature.state(), plain):
                    self._curvature_of[index] = curvature
                    break
            else:
                self._curvature_of[index] = self._new(index)
                self._curvature_of[index].load_state(plain)

    def has_seen(self, pair_index: int) -> bool:
        """Whether any input went into the curvature of a pair; waits for its device."""
        curvature = self._curvature_of.get(pair_index)
        return curvature is not None and bool(curvature.updates > 0)

    def describe(self, pair_index: int) -> str:
        """How the curvature of a pair is held, for people."""
        n = self._pairs[pair_index].in_features
        rank = directions(n, self._representation)
        return f"dense {n}x{n}" if rank is None else f"{rank} of {n} directions"

    def expected_state(self, pair_index: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes that :meth:`load_state` wants for a pair."""
        shapes = state_shapes(self._pairs[pair_index].in_features, self._representation)
        return {STATE_PREFIX + name: shape for name, shape in shapes.items()}

    def _new(self, pair_index: int) -> InputCurvature:
        pair = self._pairs[pair_index]
        return new_input_curvature(pair.in_features, pair.A, self._representation)


def _equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    # The trace differs between any two inputs that were not the same tensor, so the
    # large tensors are compared only where they can be equal.
    names = sorted(mine, key=lambda name: mine[name].numel())
    return all(
        mine[name].shape == other[name].shape
        and torch.equal(mine[name], other[name].to(mine[name]))
        for name in names
    )
