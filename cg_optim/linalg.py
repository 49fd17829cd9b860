"""Damped Cholesky factorisations of stacks of small positive semi-definite matrices.

Shapes: every function takes ``(..., d, d)`` stacks.  A failed factorisation never
raises; it climbs the ladder below on the failed matrices only and reports how far::

    finite? -> rescale, symmetrise -> cholesky_ex -> float64 -> float64 with jitter x10
               (a few times) -> clamped eigenvalues -> reported as failed

Precision is raised before jitter: float64 answers the question that was asked, jitter
another one.  The caller keeps its stale factor for matrices reported as
:attr:`Rung.FAILED`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

#: Jitter is raised by 10 this often before the eigenvalues are clamped instead: more of
#: it would drown a matrix that has a few bad directions only.
JITTER_STEPS = 2


class Rung(IntEnum):
    """How far up the ladder a factorisation had to go."""

    CLEAN = 0
    FLOAT64 = 1
    JITTER = 2
    EIGENVALUES = 3
    FAILED = 4


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
    return torch.isfinite(matrix.amax((-2, -1))) & torch.isfinite(matrix.amin((-2, -1)))


def add_to_diagonal(matrix: Tensor, value: Tensor | float) -> Tensor:
    """``M + value I`` for a ``(..., d, d)`` stack and a ``(...)`` tensor of values."""
    damped = matrix.clone()
    addend = value.unsqueeze(-1) if isinstance(value, Tensor) else value
    damped.diagonal(dim1=-2, dim2=-1).add_(addend)
    return damped


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
    # A tensor also because torch divides a number by a tensor through its reciprocal.
    floor = floor.to(largest) if isinstance(floor, Tensor) else torch.full_like(largest, floor)
    largest = torch.maximum(largest, floor)
    usable = torch.isfinite(largest)
    blank = ~usable | (largest == 0)
    matrix = torch.where(blank[..., None, None], eye, matrix)
    largest = torch.where(blank, 1.0, largest)
    matrix = matrix / largest[..., None, None]
    matrix = 0.5 * (matrix + matrix.mT)
    mean = torch.where(blank, 1.0, mean_eigenvalue(matrix).clamp_min(floor / largest))
    # Without a positive trace or a floor this is no semi-definite matrix, nor near one.
    usable = usable & (mean > 0)
    mean = torch.where(usable, mean, 1.0)
    normalised = torch.where(usable[..., None, None], matrix / mean[..., None, None], eye)
    factor, info = torch.linalg.cholesky_ex(add_to_diagonal(normalised, damping))
    rung = torch.where(usable, int(Rung.CLEAN), int(Rung.FAILED))
    failed = (info != 0) & usable
    if bool(failed.any()):
        factor, rung = factor.clone(), rung.clone()
        attempt, needed = _climb(normalised[failed].double(), damping, matrix.dtype)
        factor[failed], rung[failed] = attempt.to(factor.dtype), needed
    factor = factor * (mean.sqrt() * largest.sqrt())[..., None, None]
    return CholeskyResult(torch.where((rung == Rung.FAILED)[..., None, None], eye, factor), rung)


def _climb(matrix: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Everything past the first rung, for float64 matrices ``(count, d, d)`` of unit scale.

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
        factor = torch.where(solved[..., None, None], attempt, factor)
        rung = torch.where(solved, int(Rung.JITTER), rung)
        failed = failed & ~solved
    if bool(failed.any()):
        rung[failed] = int(Rung.EIGENVALUES)
        try:
            eigenvalues, vectors = torch.linalg.eigh(matrix[failed])
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            rung[failed] = int(Rung.FAILED)
        else:
            # M = R^T R with R from a QR factorisation: unlike Cholesky it cannot fail.
            root = (vectors * (eigenvalues.clamp_min(0) + least).sqrt().unsqueeze(-2)).mT
            upper = torch.linalg.qr(root).R
            signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
            factor[failed] = (upper * signs.to(upper).unsqueeze(-1)).mT
    return factor, rung
