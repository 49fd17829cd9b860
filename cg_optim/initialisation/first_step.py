r"""``A`` from the first training batch: the same subspace without a pass of its own.

During the backward passes before the first step hooks add up ``Z = \Psi^T D`` ``(k, n)`` for
every fresh pair, with a random ``\Psi`` and the gradient ``D`` of its output (micro-batches add
up).  In ``step()``, with the input curvature of these same rows,

1. ``A`` becomes the ``r`` leading right singular directions of ``Z K_X`` mapped back by
   ``K_X^T``, as long as it was before.  ``B`` is zero, so the function stays what it was.
2. The gradient of ``B`` belonged to the old ``A``: it is ``D A_{old}^T``.  For the new one it
   would be ``D A_{new}^T``, of which the sketch knows enough: with ``C`` the least-squares
   solution of ``Z A_{old}^T C = Z A_{new}^T`` it is ``D A_{old}^T C`` up to what the old rows
   cannot express.  So this batch trains ``B`` like any other and no step is lost.

Both are free of the loss's scale, and so of ``GradScaler``'s and of clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from cg_optim.damped import DampedInput
from cg_optim.factor_state import factor_dtype
from cg_optim.initialisation.fresh import is_fresh
from cg_optim.initialisation.low_rank import row_space, with_norm_of
from cg_optim.initialisation.sketch import TestMatrices, right_vectors, sketch_size
from cg_optim.pair_step import PairWork
from cg_optim.pairs import LoRAPair

#: The same on every rank and in every run.
SEED = 0
#: Singular values of ``Z A_old^T`` below this part of the largest are taken for zero.
SMALLEST = 1e-3


class Start(NamedTuple):
    """What the first batch says about one pair.

    Attributes:
        down: The new ``A``, ``(r, n)``.
        change: ``C``, ``(r, r)``.
    """

    down: Tensor
    change: Tensor


class FirstStep:
    """The sketches of all pairs until their first step.

    Args:
        pairs: The optimizer's pairs; more may be added to the list.
    """

    def __init__(self, pairs: Sequence[LoRAPair]) -> None:
        self._pairs = pairs
        self._tests = TestMatrices(SEED)
        self._sketches: dict[int, Tensor] = {}

    def consume(self, index: int, rows: Tensor, gradients: Tensor) -> None:
        """Add the rows ``x`` ``(N, n)`` and output gradients ``(N, m)`` of a pair."""
        pair = self._pairs[index]
        x, d = (value.to(pair.A.device, factor_dtype(pair.A)) for value in (rows, gradients))
        if index not in self._sketches:
            self._sketches[index] = self._blank(pair)
        sketch = self._sketches[index]
        psi = self._tests.get(pair.out_features, len(sketch), d, stream=1)
        sketch.addmm_((d @ psi).mT, x)

    def _blank(self, pair: LoRAPair) -> Tensor:
        rows = sketch_size(pair.rank, pair.out_features, pair.in_features)
        shape = rows, pair.in_features
        return torch.zeros(shape, dtype=factor_dtype(pair.A), device=pair.A.device)

    def discard(self, indices: Iterable[int] | None = None, unless: Tensor | None = None) -> None:
        """Drop the sketches of some pairs, or all; none where a boolean tensor is True."""
        for index in list(self._sketches) if indices is None else indices:
            if unless is None:
                self._sketches.pop(index, None)
            elif index in self._sketches:
                sketch = self._sketches[index]
                sketch.masked_fill_(~unless.to(sketch.device), 0.0)

    def start(self, damped: Callable[[int], DampedInput | None]) -> dict[int, Tensor]:
        """Set ``A`` of every pair that was seen and whose ``B`` is zero; the sketches are spent.

        Distributed ranks add up their sketches and take over what the first one makes of
        them, so that ``A`` is the same everywhere.

        Args:
            damped: Gives the damped input curvature of the same batch by pair.

        Returns:
            By pair ``C``, ``(r, r)``: from the right it turns the gradient of ``B`` into the
            one for the new ``A``.  Pairs that stay as they were are missing.
        """
        together = _several_ranks()
        if together:
            self._sum_over_ranks()
        starts = {index: self._start_of(index, damped(index)) for index in list(self._sketches)}
        found = {index: start for index, start in starts.items() if start is not None}
        if together:
            found = self._of_first_rank(found)
        for index, start in found.items():
            self._down(index).copy_(start.down)
        self.discard()
        self._tests = TestMatrices(SEED)  # lets go of the matrices
        return {index: start.change for index, start in found.items()}

    def _down(self, index: int) -> Tensor:
        """A view of ``A`` as ``(r, n)``."""
        pair = self._pairs[index]
        return pair.as_matrices(pair.A.detach(), pair.B.detach())[0]

    def _start_of(self, index: int, damped: DampedInput | None) -> Start | None:
        sketch, pair = self._sketches[index], self._pairs[index]
        if damped is None or not is_fresh(pair):
            return None
        whitening = damped.whitening()
        whitened = whitening.apply(sketch)
        if not bool(torch.isfinite(whitened).all()) or not bool(whitened.any()):
            return None
        old = self._down(index).to(sketch.dtype)
        new = with_norm_of(old, row_space(right_vectors(whitened), pair.rank, whitening))
        change = torch.linalg.pinv(sketch @ old.mT, rtol=SMALLEST) @ (sketch @ new.mT)
        return Start(new.contiguous(), change.contiguous())

    # ------------------------------------------------------------------ distributed ranks

    def _sum_over_ranks(self) -> None:
        for index, pair in enumerate(self._pairs):
            if pair.observed:  # a rank that did not see a pair adds nothing to it
                self._sketches.setdefault(index, self._blank(pair))
                distributed.all_reduce(self._sketches[index])

    def _of_first_rank(self, found: dict[int, Start]) -> dict[int, Start]:
        agreed: dict[int, Start] = {}
        for index, sketch in sorted(self._sketches.items()):  # in one order on all ranks
            rank = self._pairs[index].rank
            mine = found.get(index) or Start(
                sketch.new_zeros(rank, sketch.shape[1]), sketch.new_zeros(rank, rank)
            )
            for tensor in mine:
                distributed.broadcast(tensor, src=0)
            if bool(mine.down.any()):
                agreed[index] = mine
        return agreed


def _several_ranks() -> bool:
    started = distributed.is_available() and distributed.is_initialized()
    return started and distributed.get_world_size() > 1


def with_changed_gradient(work: PairWork, change: Tensor | None) -> PairWork:
    """The same work with the gradient of ``B`` times ``C``; unchanged without one."""
    if change is None or work.b.grad is None:
        return work
    return replace(work, b=replace(work.b, grad=work.b.grad.to(change.dtype) @ change))
