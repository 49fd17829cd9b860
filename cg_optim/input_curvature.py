"""Running estimates of the input curvature ``X = E[x x^T]`` of one distinct layer input.

Two representations share one interface:

* :class:`DenseCurvature` keeps the whole ``(n, n)`` matrix: exact, for small ``n``.
* :class:`LowRankCurvature` keeps ``Q F F^T Q^T + tail (I - Q Q^T)``: ``k`` directions and an
  isotropic tail, ``n k + k^2`` floats.  The directions follow the data by one step of block
  power iteration per update with a Nystrom approximation (Tropp et al. 2017,
  arXiv:1706.05736, Alg. 3).  Nothing that uses them depends on which basis of their span is
  kept, so no eigenvectors are computed.

Statistics are sums over rows, so splitting a batch into micro-batches changes nothing.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cg_optim.damped import DampedGram, DampedInput, DampedLowRank
from cg_optim.linalg import all_finite, as_scales, damped_cholesky
from cg_optim.stacks import in_parts

#: Directions kept of larger inputs.
DEFAULT_RANK = 32
#: Relative damping of the k x k Nystrom core, far below any damping of the step.
CORE_DAMPING = 1e-6


class InputCurvature:
    """Base class: one distinct layer input, its running estimate and this step's sums.

    Args:
        features: Input size ``n``.
        like: Tensor whose device is used; statistics are float32, or float64 if it is.
    """

    #: Names of the tensors that make up the running estimate, saved with the optimizer.
    state_names: tuple[str, ...] = ()
    #: This step's sum over rows of what the representation needs.
    _sum: Tensor

    def __init__(self, features: int, like: Tensor) -> None:
        self.features = features
        self.device = like.device
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        #: Number of updates so far.
        self.updates = torch.zeros((), dtype=torch.int64, device=self.device)
        #: Whether rows were handed over since the last update, known without looking.
        self.touched = False
        self.trace = self._zeros()
        self._rows = self._zeros()
        self._square_sum = self._zeros()
        self._damped: dict[float, DampedInput] = {}

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def accumulate(self, rows: Tensor, mask: Tensor) -> None:
        """Add the rows ``(N, n)`` whose mask ``(N,)`` is True to this step's sums."""
        # where, not a product: a masked row may hold NaN.
        x = torch.where(mask.unsqueeze(-1), rows, 0.0).to(self.dtype)
        self._rows += mask.sum()
        self._square_sum += torch.linalg.vector_norm(x).square()
        self._accumulate(x)
        self.touched = True

    def update(self, decay: float) -> Tensor:
        """Fold this step's sums into the running mean; see :func:`update_together`.

        Returns:
            Boolean ``()`` tensor, False if something was not finite.
        """
        return ~update_together([self], decay)[0]

    def _sums(self) -> tuple[Tensor, ...]:
        return self._rows, self._square_sum, self._sum

    def discard(self, unless: Tensor | None = None) -> None:
        """Drop this step's sums; with a boolean ``()`` tensor only where it is False."""
        for each in self._sums():
            if unless is None:
                each.zero_()
            else:
                each.masked_fill_(~unless, 0.0)
        self.touched = self.touched and unless is not None

    def damped(self, damping: float) -> DampedInput:
        """The estimate with relative damping; the identity before the first update."""
        if damping not in self._damped:
            self._damped[damping] = self._compute_damped(damping)
        return self._damped[damping]

    def dampings(self) -> set[float]:
        """Those for which :meth:`damped` has its answer ready."""
        return set(self._damped)

    def keep_damped(self, dampings: Collection[float]) -> None:
        """Let go of what was damped otherwise."""
        self._damped = {
            damping: its for damping, its in self._damped.items() if damping in dampings
        }

    def state(self) -> dict[str, Tensor]:
        """The live tensors that make up the estimate; everything else follows from them."""
        names = (*self.state_names, "trace", "updates")
        return {name: getattr(self, name) for name in names}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Copy what :meth:`state` returned into this estimate, bit for bit."""
        for name, mine in self.state().items():
            mine.copy_(tensors[name])
        self._damped.clear()
        self.discard()

    def clone(self) -> InputCurvature:
        """An independent copy, this step's sums included."""
        return copy.deepcopy(self)

    # What a representation provides.
    def _accumulate(self, x: Tensor) -> None:
        raise NotImplementedError

    @staticmethod
    def _updated(old: dict[str, Tensor], weight: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """New values of ``state_names`` for a stack of inputs.

        Args:
            old: The values so far, each ``(inputs, ...)``.
            weight: Of what is new, ``(inputs, 1, 1)``.
            mean: This step's ``_sum`` divided by its rows, ``(inputs, ...)``.
        """
        raise NotImplementedError

    def _compute_damped(self, damping: float) -> DampedInput:
        raise NotImplementedError


class DenseCurvature(InputCurvature):
    """The full ``(n, n)`` matrix."""

    state_names = ("gram",)

    def __init__(self, features: int, like: Tensor) -> None:
        super().__init__(features, like)
        self.gram = self._zeros(features, features)
        self._sum = self._zeros(features, features)

    def _accumulate(self, x: Tensor) -> None:
        self._sum.addmm_(x.mT, x)

    @staticmethod
    def _updated(old: dict[str, Tensor], weight: Tensor, mean: Tensor) -> dict[str, Tensor]:
        return {"gram": torch.lerp(old["gram"], mean, weight)}

    def _compute_damped(self, damping: float) -> DampedInput:
        return DampedGram.from_gram(self.gram, self.trace / self.features, damping)


class LowRankCurvature(InputCurvature):
    """``k`` directions, a factor of the curvature inside their span, and an isotropic tail.

    The factor ``F`` is kept and not ``F F^T``: the product is then semi-definite whatever
    was rounded, and so is what may come out of a damaged checkpoint.

    Args:
        features: Input size ``n``.
        like: See :class:`InputCurvature`.
        rank: Number of directions ``k``, less than ``n``.
    """

    state_names = ("basis", "factor")

    def __init__(self, features: int, like: Tensor, rank: int = DEFAULT_RANK) -> None:
        super().__init__(features, like)
        self.rank = rank
        # Without waiting for the copy; a change of precision on the way would wait.
        start = _random_basis(features, rank).to(self.dtype)
        self.basis = start.to(self.device, non_blocking=True, copy=True)
        self.factor = self._zeros(rank, rank)
        self._sum = self._zeros(features, rank)

    def _accumulate(self, x: Tensor) -> None:
        self._sum.addmm_(x.mT, x @ self.basis)

    @staticmethod
    def _updated(old: dict[str, Tensor], weight: Tensor, mean: Tensor) -> dict[str, Tensor]:
        core = old["factor"] @ old["factor"].mT
        sketch = torch.lerp(old["basis"] @ core, mean, weight)
        basis, factor = nystrom(old["basis"], sketch)
        return {"basis": basis, "factor": factor}

    def _compute_damped(self, damping: float) -> DampedInput:
        damp_together([(self, damping)])
        return self._damped[damping]


def nystrom(basis: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """The Nystrom approximation ``Y (U^T Y)^-1 Y^T`` of a PSD matrix known through ``Y = X U``.

    Args:
        basis: ``U`` with orthonormal columns, ``(..., n, k)``.
        sketch: ``Y = X U``, ``(..., n, k)``.

    Returns:
        ``Q`` with orthonormal columns, ``(..., n, k)``, and ``F``, ``(..., k, k)``, with which
        the approximation is ``Q F F^T Q^T``.
    """
    core = basis.mT @ sketch
    factor = damped_cholesky(core, CORE_DAMPING).factor
    q, r = torch.linalg.qr(sketch)
    # X ~ (Y L^-T) (Y L^-T)^T with Y L^-T = Q (R L^-T).
    return q, torch.linalg.solve_triangular(factor, r.mT, upper=False).mT


def update_together(curvatures: Sequence[InputCurvature], decay: float) -> list[Tensor]:
    """Fold the sums of this step into the running means of some inputs, stacks of them at once.

    The means are bias-corrected: the ``t``-th update weighs the new rows
    ``(1 - decay) / (1 - decay^t)``.  An input stays as it was if it had no rows or if something
    was not finite.

    Args:
        curvatures: The inputs, each once.
        decay: Weight of the past.

    Returns:
        For each input a boolean ``()`` tensor, True if something was not finite.
    """
    dropped: dict[int, Tensor] = {}
    stacks: dict[Any, list[InputCurvature]] = {}
    for one in curvatures:
        if one.touched:
            shapes = tuple(value.shape for value in one.state().values())
            stacks.setdefault((type(one), shapes, one.dtype, one.device), []).append(one)
        else:
            dropped[id(one)] = torch.zeros_like(one.updates, dtype=torch.bool)
    for stack in stacks.values():
        for alike in in_parts(stack, stack[0]._sum.numel()):
            unusable = ~_update_stack(alike, decay)
            dropped.update(zip(map(id, alike), unusable.unbind(), strict=True))
    return [dropped[id(one)] for one in curvatures]


def _update_stack(alike: Sequence[InputCurvature], decay: float) -> Tensor:
    """:func:`update_together` for inputs of one kind and size; boolean ``(inputs,)``."""
    first = alike[0]
    old = {name: torch.stack([getattr(one, name) for one in alike]) for name in first.state()}
    row_sums = torch.stack([one._rows for one in alike])
    square_sums = torch.stack([one._square_sum for one in alike])
    sums = torch.stack([one._sum for one in alike])
    usable = torch.isfinite(square_sums)
    some = usable & (row_sums > 0)
    # Sums of no rows, or of bad ones, must not meet the mean as 0/0 or NaN.
    rows = torch.where(some, row_sums, 1.0)
    weight = ((1.0 - decay) / (1.0 - decay ** (old["updates"] + 1).double())).to(first.dtype)
    mean = torch.where(as_scales(some), sums, 0.0) / as_scales(rows)
    new = first._updated(old, as_scales(weight), mean)
    for value in new.values():
        usable = usable & all_finite(value)
    new["trace"] = torch.lerp(old["trace"], torch.where(some, square_sums, 0.0) / rows, weight)
    usable = usable & torch.isfinite(new["trace"])
    new["updates"] = old["updates"] + 1
    changed = some & usable
    for name, values in new.items():
        mask = as_scales(changed) if values.ndim > 1 else changed
        kept = torch.where(mask, values, old[name])
        # In place: the saved state refers to these very tensors.
        torch._foreach_copy_([getattr(one, name) for one in alike], list(kept.unbind()))
    torch._foreach_zero_([part for one in alike for part in one._sums()])
    for one in alike:
        one._damped.clear()
        one.touched = False
    return usable


def damp_together(wanted: Iterable[tuple[InputCurvature, float]]) -> None:
    """Make :meth:`InputCurvature.damped` of some inputs cheap: what can be stacked is.

    Small matrices are a matter of calls, not of arithmetic, and each call works on the inputs
    of all layers of one size.

    Args:
        wanted: Inputs, each with a relative damping.
    """
    stacks: dict[Any, dict[int, LowRankCurvature]] = {}
    for one, damping in wanted:
        if isinstance(one, LowRankCurvature) and damping not in one._damped:
            key = damping, one.features, one.rank, one.dtype, one.device
            stacks.setdefault(key, {})[id(one)] = one
    for (damping, features, rank, *_), stack in stacks.items():
        alike = list(stack.values())
        traces = torch.stack([one.trace for one in alike])
        factors = torch.stack([one.factor for one in alike])
        rest = (traces - factors.square().sum((-2, -1))).clamp_min(0)
        damped = DampedLowRank.from_factors(
            [one.basis for one in alike],
            factors,
            rest / (features - rank),
            traces / features,
            damping,
        )
        for one, its in zip(alike, damped, strict=True):
            one._damped[damping] = its


def directions(features: int, representation: str | int) -> int | None:
    """How many directions to keep of an input of size ``features``; None keeps all (dense).

    Args:
        features: Input size ``n``.
        representation: ``"auto"``, ``"dense"``, or the number of directions.
    """
    if representation == "dense":
        return None
    rank = DEFAULT_RANK if representation == "auto" else int(representation)
    # Below this size the low-rank form holds about as many numbers as the matrix itself.
    return rank if features > 2 * rank else None


def new_input_curvature(features: int, like: Tensor, representation: str | int) -> InputCurvature:
    """An empty estimate; see :func:`directions` for the choice of representation."""
    rank = directions(features, representation)
    if rank is None:
        return DenseCurvature(features, like)
    return LowRankCurvature(features, like, rank)


def state_shapes(features: int, representation: str | int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what :meth:`InputCurvature.state` returns."""
    rank = directions(features, representation)
    shapes: dict[str, tuple[int, ...]] = {"trace": (), "updates": ()}
    if rank is None:
        return {"gram": (features, features), **shapes}
    return {"basis": (features, rank), "factor": (rank, rank), **shapes}


@functools.cache
def _random_basis(features: int, rank: int) -> Tensor:
    """Orthonormal ``(features, rank)`` start of the power iteration.

    The seed is fixed: distributed ranks and repeated runs start alike, and the global
    random state is left alone.
    """
    generator = torch.Generator().manual_seed(features)
    start = torch.randn(features, rank, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(start).Q
    return basis.contiguous()
