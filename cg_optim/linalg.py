"""Damped Cholesky factorisations of stacks of small positive semi-definite matrices.

Shapes: every function takes ``(..., d, d)`` stacks.  A failed factorisation never
raises; it climbs the ladder below on the failed matrices only and reports how far::

    finite? -> rescale, symmetrise -> cholesky_ex -> float64 -> float64 with jitter x10
               (a few times) -> clamped eigenvalues -> shift by the norm
    not finite, or a trace that is not positive -> reported as failed

Precision is raised before jitter: float64 answers the question that was asked, jitter
another one.

Nobody waits for an accelerator: there all rungs but the eigenvalues are computed for all
matrices, in float64 and in one call, and the first that held is selected.  ``eigh`` reads
its own error code on the host, so an indefinite matrix, which no Gram matrix is, is shifted
there.  Four small factorisations instead of one are cheaper than one wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from cg_optim import host

#: Jitter is raised by 10 this often before the eigenvalues are clamped instead: more of
#: it would drown a matrix that has a few bad directions only.
JITTER_STEPS = 2


class Rung(IntEnum):
    """How far up the ladder a factorisation had to go."""

    CLEAN = 0
    FLOAT64 = 1
    JITTER = 2
    EIGENVALUES = 3
    SHIFT = 4
    FAILED = 5


class CholeskyResult(NamedTuple):
    """A stack of lower-triangular factors and what it took to get them.

    Attributes:
        factor: ``(..., d, d)``; the identity where ``rung`` is :attr:`Rung.FAILED`.
        rung: ``(...)`` integer tensor of :class:`Rung` values.
    """

    factor: Tensor
    rung: Tensor


def mean_eigenvalue(matrix: Tensor) -> Tensor:
    """``tr(M) / d`` of a ``(..., d, d)`` stack, the scale relative damping refers to."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def all_finite(matrix: Tensor) -> Tensor:
    """Whether all entries of each matrix of a ``(..., rows, columns)`` stack are finite.

    Extremes propagate NaN, and two reductions are far cheaper than a mask of all entries.
    """
    extreme = torch.maximum(matrix.amax((-2, -1)), -matrix.amin((-2, -1)))
    return extreme < torch.inf


def as_scales(values: Tensor) -> Tensor:
    """``(...)`` as ``(..., 1, 1)``, a number for each matrix of a stack."""
    return values[..., None, None]


def add_to_diagonal(matrix: Tensor, value: Tensor | float) -> Tensor:
    """``M + value I`` for a ``(..., d, d)`` stack and a ``(...)`` tensor of values."""
    damped = matrix.clone()
    addend = value.unsqueeze(-1) if isinstance(value, Tensor) else value
    damped.diagonal(dim1=-2, dim2=-1).add_(addend)
    return damped


def effective_rank(eigenvalues: Tensor) -> float:
    """Exponential of the entropy of eigenvalues ``(n,)`` normalised to sum 1; NaN if all are 0.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    share = eigenvalues / eigenvalues.sum()
    return float(torch.special.entr(share).sum().exp())


_recorded: ContextVar[list[Tensor] | None] = ContextVar("recorded rungs", default=None)


@contextmanager
def recorded_rungs() -> Iterator[list[Tensor]]:
    """Collect the rungs of every factorisation inside the block.

    So that whoever counts failures need not be known to whoever asks for a factor.
    """
    rungs: list[Tensor] = []
    token = _recorded.set(rungs)
    try:
        yield rungs
    finally:
        _recorded.reset(token)


def record_rungs(rungs: Tensor) -> None:
    """Add to what :func:`recorded_rungs` collects, if anybody does."""
    if (recorded := _recorded.get()) is not None:
        recorded.append(rungs)


def damped_cholesky(matrix: Tensor, damping: float, floor: Tensor | float = 0.0) -> CholeskyResult:
    """Cholesky factor of ``M + damping * max(tr(M)/d, floor) I``.

    Relative damping makes the factor of ``c M`` exactly ``sqrt(c)`` times that of
    ``M``: no scale of the data or of the loss has to be known.  A zero matrix without
    a floor has no scale; its factor is the identity, ``sqrt(1 + damping) I``.

    Args:
        matrix: ``(..., d, d)`` symmetric positive semi-definite stack.
        damping: Relative damping, dimensionless, >= 0.
        floor: Lower bound of the scale, for matrices that are zero (B before its
            first step), a number or ``(...)``; same unit as the entries of ``matrix``.

    Returns:
        The factors and the rung each matrix needed.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # Two divisions, by the largest entry and then by the mean eigenvalue, because the
    # trace itself overflows or vanishes near the ends of the range of fp32.
    largest = matrix.abs().amax((-2, -1))
    has_floor = isinstance(floor, Tensor) or floor != 0.0
    if has_floor:
        # A tensor also because torch divides a number by a tensor through its reciprocal.
        floor = floor.to(largest) if isinstance(floor, Tensor) else torch.full_like(largest, floor)
        largest = torch.maximum(largest, floor)
    usable = largest < torch.inf
    some = usable & (largest > 0)
    largest = torch.where(some, largest, 1.0)
    matrix = torch.where(as_scales(some), matrix, eye) / as_scales(largest)
    matrix = 0.5 * (matrix + matrix.mT)
    mean = mean_eigenvalue(matrix)
    if has_floor:
        mean = torch.where(some, mean.clamp_min(floor / largest), mean)
    # Without a positive trace or a floor this is no semi-definite matrix, nor near one.
    usable = usable & (mean > 0)
    normalised = torch.where(as_scales(usable), matrix / as_scales(mean), eye)
    solve = _in_turn if host.at_hand(usable) else _at_once
    factor, rung = solve(normalised, damping)
    factor = factor.to(matrix.dtype) * as_scales(mean.sqrt() * largest.sqrt())
    rung = torch.where(usable, rung, int(Rung.FAILED))
    record_rungs(rung)
    return CholeskyResult(torch.where(as_scales(usable), factor, eye), rung)


def _in_turn(matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The ladder for finite matrices of unit scale ``(..., d, d)``, the failed ones further."""
    factor, info = torch.linalg.cholesky_ex(add_to_diagonal(matrix, damping))
    rung = torch.where(info == 0, int(Rung.CLEAN), int(Rung.FLOAT64))
    failed = info != 0
    if bool(failed.any()):
        factor = factor.clone()
        attempt, needed = _climb(matrix[failed].double(), damping, matrix.dtype)
        factor[failed], rung[failed] = attempt.to(factor.dtype), needed
    return factor, rung


def _at_once(matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The ladder without a look at what failed: all its rungs in one call, in float64.

    What a call costs does not depend on how much is in it here, and float64 answers the
    first rung's question as well.
    """
    least = max(damping, torch.finfo(matrix.dtype).eps)
    attempts = matrix.double().repeat(JITTER_STEPS + 2, *(1 for _ in matrix.shape))
    bound = _negative_bound(attempts[0], least)
    diagonals = attempts.diagonal(dim1=-2, dim2=-1)
    diagonals[0] += damping
    for power in range(1, JITTER_STEPS + 1):
        diagonals[power] += least * 10**power
    diagonals[-1] += bound.unsqueeze(-1)
    factors, info = torch.linalg.cholesky_ex(attempts)
    factor, rung = factors[-1], torch.full_like(info[0], int(Rung.SHIFT), dtype=torch.int64)
    for power in range(JITTER_STEPS, -1, -1):
        held = info[power] == 0
        factor = torch.where(as_scales(held), factors[power], factor)
        rung = torch.where(held, int(Rung.JITTER if power else Rung.CLEAN), rung)
    return factor, rung


def _climb(matrix: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Everything past the first rung, for float64 matrices ``(matrices, d, d)`` of unit scale.

    Args:
        matrix: The matrices, not damped.
        damping: What to add to their diagonals.
        dtype: The precision they came in and that the factors go back to.
    """
    factor, info = torch.linalg.cholesky_ex(add_to_diagonal(matrix, damping))
    rung = torch.full_like(info, int(Rung.FLOAT64), dtype=torch.int64)
    failed = info != 0
    least = max(damping, torch.finfo(dtype).eps)
    for power in range(1, JITTER_STEPS + 1):
        attempt, info = torch.linalg.cholesky_ex(add_to_diagonal(matrix, least * 10**power))
        solved = failed & (info == 0)
        factor = torch.where(as_scales(solved), attempt, factor)
        rung = torch.where(solved, int(Rung.JITTER), rung)
        failed = failed & ~solved
    if bool(failed.any()):
        factor[failed], rung[failed] = _clamped_or_shifted(matrix[failed], least)
    return factor, rung


def _clamped_or_shifted(matrix: Tensor, least: float) -> tuple[Tensor, int]:
    """Factors of matrices whose negative eigenvalues count as zero, plus ``least``."""
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return _shifted(matrix, least), int(Rung.SHIFT)
    # M = R^T R with R from a QR factorisation: unlike Cholesky it cannot fail.
    root = (vectors * (eigenvalues.clamp_min(0) + least).sqrt().unsqueeze(-2)).mT
    upper = torch.linalg.qr(root).R
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (upper * signs.to(upper).unsqueeze(-1)).mT, int(Rung.EIGENVALUES)


def _shifted(matrix: Tensor, least: float) -> Tensor:
    """Factors after adding :func:`_negative_bound`."""
    bound = _negative_bound(matrix, least)
    factor: Tensor = torch.linalg.cholesky_ex(add_to_diagonal(matrix, bound))[0]
    return factor


def _negative_bound(matrix: Tensor, least: float) -> Tensor:
    """The Frobenius norm, which no negative eigenvalue exceeds, and a little more ``(...)``."""
    norm: Tensor = torch.linalg.matrix_norm(matrix)
    return norm * (1 + 1e-6) + least
