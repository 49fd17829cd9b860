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

from cg_optim.linalg import add_to_diagonal, damped_cholesky
from cg_optim.whitening import CholeskyWhitening, SpectralWhitening


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


class DampedSpectrum(NamedTuple):
    """``U diag(eigenvalues) U^T + tail (I - U U^T)``.

    Attributes:
        basis: ``U`` with orthonormal columns, ``(..., n, k)``.
        eigenvalues: ``(..., k)``, positive.
        tail: ``(...)``, positive; the eigenvalue outside the basis.
    """

    basis: Tensor
    eigenvalues: Tensor
    tail: Tensor

    @classmethod
    def from_spectrum(
        cls, basis: Tensor, eigenvalues: Tensor, tail: Tensor, mean: Tensor, damping: float
    ) -> DampedSpectrum:
        """Damp a spectrum relative to ``mean = tr(X) / n`` of shape ``(...)``."""
        unit, seen = _unit(mean)
        relative = torch.where(seen[..., None], eigenvalues / unit[..., None], 1.0)
        relative_tail = torch.where(seen, tail / unit, 1.0)
        return cls(
            basis,
            (relative + damping) / (1.0 + damping),
            (relative_tail + damping) / (1.0 + damping),
        )

    def whitening(self) -> SpectralWhitening:
        """The symmetric inverse square root."""
        return SpectralWhitening(self.basis, self.eigenvalues.rsqrt(), self.tail.rsqrt())

    def hidden_gram(self, down: Tensor) -> Tensor:
        """``P = A X A^T`` ``(..., r, r)`` with the damped ``X``, for ``A`` ``(..., r, n)``."""
        inside = down @ self.basis
        excess = (self.eigenvalues - self.tail[..., None]).unsqueeze(-2)
        return self.tail[..., None, None] * (down @ down.mT) + (inside * excess) @ inside.mT


DampedInput = DampedGram | DampedSpectrum


def stack_damped(models: Sequence[DampedInput]) -> DampedInput:
    """Stack models of one kind and shape along a new leading dimension."""
    return type(models[0])(*(torch.stack(tensors) for tensors in zip(*models, strict=True)))


def _unit(mean: Tensor) -> tuple[Tensor, Tensor]:
    """The scale to divide by, and where there is one (inputs seen and not all zero)."""
    seen = mean > 0
    return torch.where(seen, mean, 1.0), seen
