"""Linear maps ``K`` with ``K K^T`` the inverse of a damped curvature factor.

A gradient with respect to a weight ``M`` of shape ``(..., rows, d)`` becomes, in the
whitened coordinates ``M K^-T``, the gradient ``G K`` (:meth:`Whitening.apply`).  A
step ``U`` found there is the step ``U K^T`` of the weight
(:meth:`Whitening.apply_transposed`).  All leading dimensions are batch dimensions.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Whitening(Protocol):
    """Multiplication from the right by ``K`` and by ``K^T``."""

    def apply(self, matrix: Tensor) -> Tensor:
        """``M K`` for ``M`` of shape ``(..., rows, d)``."""
        ...

    def apply_transposed(self, matrix: Tensor) -> Tensor:
        """``M K^T`` for ``M`` of shape ``(..., rows, d)``."""
        ...


class LowRankWhitening(NamedTuple):
    """``K = Q root Q^T + outside (I - Q Q^T)``.

    Attributes:
        basis: ``Q``, orthonormal columns, ``(..., d, k)``.
        root: ``(..., k, k)``, symmetric up to rounding.
        outside: ``(...)``, acts on everything orthogonal to the basis.
    """

    basis: Tensor
    root: Tensor
    outside: Tensor

    def apply(self, matrix: Tensor) -> Tensor:
        """``M K``; see :class:`Whitening`."""
        return self._times(matrix, self.root)

    def apply_transposed(self, matrix: Tensor) -> Tensor:
        """``M K^T``."""
        # Not taken for symmetric: the root of a nearly singular matrix is so only roughly.
        return self._times(matrix, self.root.mT)

    def _times(self, matrix: Tensor, root: Tensor) -> Tensor:
        outside = self.outside[..., None, None]
        inside = matrix @ self.basis
        return outside * matrix + (inside @ root - outside * inside) @ self.basis.mT


class CholeskyWhitening(NamedTuple):
    """``K = L^-T`` from a Cholesky factor ``L`` of shape ``(..., d, d)``."""

    factor: Tensor

    def apply(self, matrix: Tensor) -> Tensor:
        """``M L^-T``."""
        solved: Tensor = torch.linalg.solve_triangular(self.factor, matrix.mT, upper=False)
        return solved.mT

    def apply_transposed(self, matrix: Tensor) -> Tensor:
        """``M L^-1``."""
        solved: Tensor = torch.linalg.solve_triangular(self.factor, matrix, upper=False, left=False)
        return solved


class MatrixWhitening(NamedTuple):
    """``K`` itself, ``(..., d, d)``, for a small ``d`` and matrices with many rows."""

    matrix: Tensor

    def apply(self, matrix: Tensor) -> Tensor:
        """``M K``."""
        return matrix @ self.matrix

    def apply_transposed(self, matrix: Tensor) -> Tensor:
        """``M K^T``."""
        return matrix @ self.matrix.mT
