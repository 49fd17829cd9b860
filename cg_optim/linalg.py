"""Damped Cholesky factorisations of stacks of small positive semi-definite matrices.

Shapes: every function takes ``(..., d, d)`` stacks.  A failed factorisation never
raises; it climbs the ladder below on the failed matrices only and reports how far::

    symmetrise -> finite? -> cholesky_ex -> jitter x10 (a few times)
               -> float64 -> clamped eigenvalues -> reported as failed

The caller keeps its stale factor for matrices reported as :attr:`Rung.FAILED`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

#: Jitter is raised by 10 this often before precision is raised instead.
JITTER_STEPS = 4


class Rung(IntEnum):
    """How far up the ladder a factorisation had to go."""

    CLEAN = 0
    JITTER = 1
    FLOAT64 = 2
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


def add_to_diagonal(matrix: Tensor, value: Tensor | float) -> Tensor:
    """``M + value I`` for a ``(..., d, d)`` stack and a ``(...)`` tensor of values."""
    damped = matrix.clone()
    addend = value.unsqueeze(-1) if isinstance(value, Tensor) else value
    damped.diagonal(dim1=-2, dim2=-1).add_(addend)
    return damped


def damped_cholesky(matrix: Tensor, damping: float, floor: Tensor | float = 0.0) -> CholeskyResult:
    """Cholesky factor of ``M + damping * max(tr(M)/d, floor) I``.

    Relative damping makes the factor of ``c M`` exactly ``sqrt(c)`` times that of
    ``M``: no scale of the data or of the loss has to be known.

    Args:
        matrix: ``(..., d, d)`` symmetric positive semi-definite stack.
        damping: Relative damping, dimensionless, > 0.
        floor: Lower bound of the scale, for matrices that are zero (B before its
            first step); same unit as the entries of ``matrix``.

    Returns:
        The factors and the rung each matrix needed.
    """
    matrix = 0.5 * (matrix + matrix.mT)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    scale = torch.clamp_min(mean_eigenvalue(matrix), floor)
    # Rescaling to unit mean eigenvalue keeps fp32 clear of overflow and of denormals.
    # A zero matrix without floor has no scale: its damped version is the identity.
    usable = torch.isfinite(matrix).all(-1).all(-1) & torch.isfinite(scale)
    positive = usable & (scale > 0)
    unit = torch.where(positive, scale, torch.ones_like(scale))
    normalised = torch.where(positive[..., None, None], matrix / unit[..., None, None], eye)
    factor, info = torch.linalg.cholesky_ex(add_to_diagonal(normalised, damping))
    rung = torch.where(usable, int(Rung.CLEAN), int(Rung.FAILED))
    failed = (info != 0) & usable
    if bool(failed.any()):
        factor, rung = _climb(normalised, damping, factor, rung, failed)
    factor = torch.where((rung == Rung.FAILED)[..., None, None], eye, factor)
    return CholeskyResult(factor * unit.sqrt()[..., None, None], rung)


def _climb(
    normalised: Tensor, damping: float, factor: Tensor, rung: Tensor, failed: Tensor
) -> tuple[Tensor, Tensor]:
    """Everything past the first rung, for the matrices that failed there."""
    jitter = max(damping, torch.finfo(normalised.dtype).eps)
    for _ in range(JITTER_STEPS):
        jitter *= 10
        attempt, info = torch.linalg.cholesky_ex(add_to_diagonal(normalised, jitter))
        solved = failed & (info == 0)
        factor = torch.where(solved[..., None, None], attempt, factor)
        rung = torch.where(solved, int(Rung.JITTER), rung)
        failed = failed & ~solved
    in_double = normalised.double()
    attempt, info = torch.linalg.cholesky_ex(add_to_diagonal(in_double, damping))
    solved = failed & (info == 0)
    factor = torch.where(solved[..., None, None], attempt.to(factor.dtype), factor)
    rung = torch.where(solved, int(Rung.FLOAT64), rung)
    failed = failed & ~solved
    if bool(failed.any()):
        eigenvalues, vectors = torch.linalg.eigh(in_double[failed])
        clamped = eigenvalues.clamp_min(0) + damping
        rebuilt = (vectors * clamped.unsqueeze(-2)) @ vectors.mT
        attempt, info = torch.linalg.cholesky_ex(rebuilt)
        ok = info == 0
        outcome = torch.where(ok, int(Rung.EIGENVALUES), int(Rung.FAILED))
        factor, rung = factor.clone(), rung.clone()
        factor[failed] = attempt.to(factor.dtype)
        rung[failed] = outcome.to(rung.dtype)
    return factor, rung
