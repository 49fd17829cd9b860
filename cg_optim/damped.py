"""Damped input curvature ``(X / mean + damping I) / (1 + damping)``, ready for the step.

Two forms of one thing, with the same two methods.  All tensors may be stacked along
leading dimensions (:func:`stack_damped`).  The normalisation makes isotropic inputs give the
identity, so only the *shape* of a step depends on the curvature, not its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cg_optim.inverse_root import inverse_square_root
from cg_optim.linalg import add_to_diagonal, damped_cholesky
from cg_optim.whitening import CholeskyWhitening, LowRankWhitening


class DampedGram(NamedTuple):
    """The damped matrix itself, ``(..., n, n)``, and its Cholesky factor."""

    matrix: Tensor
    factor: Tensor

    @classmethod
    def from_gram(cls, gram: Tensor, mean: Tensor, damping: float) -> DampedGram:
        """Damp ``X`` of shape ``(..., n, n)`` relative to ``mean = tr(X) / n`` ``(...)``."""
        unit, seen = _unit(mean)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        relative = torch.where(seen[..., None, None], gram / unit[..., None, None], eye)
        matrix = add_to_diagonal(relative, damping) / (1.0 + damping)
        # The damping is in the matrix already; this one only guards against rounding.
        guard = torch.finfo(gram.dtype).eps
        return cls(matrix, damped_cholesky(matrix, guard).factor)

    def whitening(self) -> CholeskyWhitening:
        """``K`` with ``K K^T`` the inverse of the damped matrix."""
        return CholeskyWhitening(self.factor)

    def hidden_gram(self, down: Tensor) -> Tensor:
        """``P = A X A^T`` ``(..., r, r)`` with the damped ``X``, for ``A`` ``(..., r, n)``."""
        return down @ self.matrix @ down.mT


class DampedLowRank(NamedTuple):
    """``Q core Q^T + tail (I - Q Q^T)``.

    Attributes:
        basis: ``Q`` with orthonormal columns, ``(..., n, k)``.
        core: Symmetric positive definite, ``(..., k, k)``.
        root: The inverse square root of ``core``, ``(..., k, k)``.
        tail: ``(...)``, positive; the eigenvalue outside the basis.
    """

    basis: Tensor
    core: Tensor
    root: Tensor
    tail: Tensor

    @classmethod
    def from_factors(
        cls,
        bases: Sequence[Tensor],
        factors: Tensor,
        tails: Tensor,
        means: Tensor,
        damping: float,
    ) -> list[DampedLowRank]:
        """Damp ``Q F F^T Q^T + tail (I - Q Q^T)`` of several inputs relative to their means.

        Args:
            bases: ``Q`` of each, ``(n, k)``.
            factors: ``F``, ``(inputs, k, k)``.
            tails: ``(inputs,)``.
            means: ``tr(X) / n``, ``(inputs,)``.
            damping: Relative damping.
        """
        unit, seen = _unit(means)
        # In float64 no rounding comes near any damping that makes a difference.
        wide = factors.double()
        eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
        relative = torch.where(seen[:, None, None], wide @ wide.mT / unit[:, None, None], eye)
        core = add_to_diagonal(relative, damping) / (1.0 + damping)
        root = inverse_square_root(core).to(factors.dtype)
        tail = (torch.where(seen, tails / unit, 1.0) + damping) / (1.0 + damping)
        stacked = core.to(factors.dtype), root, tail
        return [cls(*parts) for parts in zip(bases, *stacked, strict=True)]

    def whitening(self) -> LowRankWhitening:
        """The symmetric inverse square root."""
        return LowRankWhitening(self.basis, self.root, self.tail.rsqrt())

    def hidden_gram(self, down: Tensor) -> Tensor:
        """``P = A X A^T`` ``(..., r, r)`` with the damped ``X``, for ``A`` ``(..., r, n)``."""
        inside = down @ self.basis
        excess = add_to_diagonal(self.core, -self.tail)
        return self.tail[..., None, None] * (down @ down.mT) + inside @ excess @ inside.mT


DampedInput = DampedGram | DampedLowRank


def stack_damped(models: Sequence[DampedInput]) -> DampedInput:
    """Stack models of one kind and shape along a new leading dimension."""
    return type(models[0])(*(torch.stack(tensors) for tensors in zip(*models, strict=True)))


def _unit(mean: Tensor) -> tuple[Tensor, Tensor]:
    """The scale to divide by, and where there is one (inputs seen and not all zero)."""
    seen = mean > 0
    return torch.where(seen, mean, 1.0), seen
