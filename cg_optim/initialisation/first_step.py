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

Nobody waits for an accelerator here either.  Where values are at hand, pairs that cannot start
(``B`` is not zero, or what was seen is not finite) are left out, and if there is no other the
next step tries again.  Elsewhere nobody knows: all pairs are computed, each is kept as it was
where it could not start, and that was it.  Eigenvectors then come from Jacobi's method, for all
pairs together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from cg_optim import host
from cg_optim.damped import DampedInput
from cg_optim.factor_state import factor_dtype
from cg_optim.initialisation.fresh import untouched
from cg_optim.initialisation.low_rank import row_space, with_norm_of
from cg_optim.initialisation.sketch import (
    TestMatrices,
    least_squares_together,
    right_vectors_together,
    sketch_size,
)
from cg_optim.linalg import all_finite
from cg_optim.pair_step import PairWork
from cg_optim.pairs import LoRAPair
from cg_optim.whitening import Whitening

#: The same on every rank and in every run.
SEED = 0
#: Singular values of ``Z A_old^T`` below this part of the largest are taken for zero.
SMALLEST = 1e-3


class Start(NamedTuple):
    """What the first batch says about one pair.

    Attributes:
        down: The new ``A``, ``(r, n)``.
        change: ``C``, ``(r, r)``: from the right it turns the gradient of ``B`` into the one
            for the new ``A``.
        usable: Boolean ``()``; where it is False the pair stays as it is.
    """

    down: Tensor
    change: Tensor
    usable: Tensor


class _Whitened(NamedTuple):
    """``Z K_X`` ``(k, n)`` of a pair, ``K_X``, and whether the pair can start, ``()``."""

    rows: Tensor
    k_x: Whitening
    usable: Tensor


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

    def start(self, damped: Callable[[int], DampedInput | None]) -> dict[int, Start]:
        """Set ``A`` of every pair that was seen and whose ``B`` is zero; the sketches are spent.

        Distributed ranks add up their sketches and take over what the first one makes of
        them, so that ``A`` is the same everywhere.

        Args:
            damped: Gives the damped input curvature of the same batch by pair.

        Returns:
            By pair what became of it.  Pairs of which it is known that they stay as they were
            are missing.
        """
        together = _several_ranks()
        if together:
            self._sum_over_ranks()
        found = self._starts(damped)
        if together:
            found = self._of_first_rank(found)
        for index, start in found.items():
            old = self._down(index)
            old.copy_(torch.where(start.usable, start.down.to(old.dtype), old))
        self.discard()
        self._tests = TestMatrices(SEED)  # lets go of the matrices
        return found

    def _down(self, index: int) -> Tensor:
        """A view of ``A`` as ``(r, n)``."""
        pair = self._pairs[index]
        return pair.as_matrices(pair.A.detach(), pair.B.detach())[0]

    def _starts(self, damped: Callable[[int], DampedInput | None]) -> dict[int, Start]:
        """What became of the pairs, for what is not known one by one to stay as it is."""
        found: dict[int, Start] = {}
        unseen: dict[int, _Whitened] = {}
        for index, sketch in self._sketches.items():
            model = damped(index)
            if model is None:
                continue
            k_x = model.whitening()
            rows = k_x.apply(sketch)
            usable = all_finite(rows) & rows.any() & untouched(self._pairs[index])
            if not host.at_hand(sketch):
                unseen[index] = _Whitened(torch.where(usable, rows, 0.0), k_x, usable)
            elif bool(usable):
                found.update(self._starts_of({index: _Whitened(rows, k_x, usable)}))
        return {**found, **self._starts_of(unseen)}

    def _starts_of(self, pairs: dict[int, _Whitened]) -> dict[int, Start]:
        right = right_vectors_together([pair.rows for pair in pairs.values()])
        downs: dict[int, Tensor] = {}
        systems: list[tuple[Tensor, Tensor]] = []
        for (index, (_, k_x, _)), vectors in zip(pairs.items(), right, strict=True):
            sketch = self._sketches[index]
            old = self._down(index).to(sketch.dtype)
            new = with_norm_of(old, row_space(vectors, self._pairs[index].rank, k_x))
            downs[index] = new.contiguous()
            systems.append((sketch @ old.mT, sketch @ new.mT))
        changes = least_squares_together(systems, SMALLEST)
        return {
            index: Start(down, change.contiguous(), pairs[index].usable)
            for (index, down), change in zip(downs.items(), changes, strict=True)
        }

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
                sketch.new_zeros(rank, sketch.shape[1]),
                sketch.new_zeros(rank, rank),
                torch.zeros((), dtype=torch.bool, device=sketch.device),
            )
            usable = mine.usable.to(sketch.dtype)  # not every backend sends booleans
            for tensor in (mine.down, mine.change, usable):
                distributed.broadcast(tensor, src=0)
            if not host.at_hand(usable) or bool(usable):
                agreed[index] = mine._replace(usable=usable > 0)
        return agreed


def _several_ranks() -> bool:
    started = distributed.is_available() and distributed.is_initialized()
    return started and distributed.get_world_size() > 1


def with_changed_gradient(work: PairWork, start: Start | None) -> PairWork:
    """The same work with the gradient of ``B`` times ``C`` if the pair has started."""
    if start is None or work.b.grad is None:
        return work
    grad = work.b.grad.to(start.change.dtype)
    changed = torch.where(start.usable, grad @ start.change, grad)
    return work._replace(b=work.b._replace(grad=changed))
