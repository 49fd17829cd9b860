r"""The symmetric inverse square root of small positive definite matrices, without waiting.

Where values are at hand it comes from eigenpairs.  ``torch.linalg.eigh`` reads its error code on
the host, so elsewhere the root is found without: with the Cholesky factor ``M = L L^T`` and the
polar decomposition ``L^T = U H`` it is ``H^{-1} = L^{-T} U`` (Higham, "Functions of Matrices",
2008, Alg. 6.21).  The orthogonal ``U`` is the limit of the dynamically weighted Halley iteration

.. math::
    U \leftarrow U \left( \tfrac{b}{c} I
        + \left( a - \tfrac{b}{c} \right) (I + c\, U^T U)^{-1} \right)

(QDWH: Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31, 2010), whose weights depend on a
lower bound of the singular values alone and are constants here.  Its matrices are at least the
identity, so no factorisation in it can fail.  Rounding can turn ``U``, by no more than it turns
the eigenvectors of ``M``, but leaves it orthogonal: ``K = L^{-T} U`` has ``K K^T = M^{-1}`` even
for a nearly singular ``M``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cg_optim import host
from cg_optim.linalg import Rung, add_to_diagonal, all_finite, damped_cholesky, record_rungs

#: Lower bound of the singular values of a Cholesky factor divided by its Frobenius norm:
#: a matrix of condition 1e16 has a factor of condition 1e8.
LEAST = 1e-10


def inverse_square_root(matrix: Tensor) -> Tensor:
    """``M^{-1/2}`` of a symmetric positive definite ``(..., k, k)`` stack, in float64.

    A matrix that is not positive definite is repaired as by
    :func:`~cg_optim.linalg.damped_cholesky`; the root of one that is not finite is the
    identity.  Both are recorded (:func:`~cg_optim.linalg.recorded_rungs`).
    """
    matrix = matrix.double()
    if host.at_hand(matrix):
        try:
            return _from_eigenpairs(matrix)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            pass
    return _from_polar_factor(matrix)


def _from_eigenpairs(matrix: Tensor) -> Tensor:
    finite = all_finite(matrix)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # One that is not finite must not spoil the others, or make eigh raise for all of them.
    values, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], matrix, eye))
    least = values[..., -1:].abs() * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    least = torch.where(least > 0, least, 1.0)
    low = (values < least).any(-1)
    rung = torch.where(low, int(Rung.EIGENVALUES), int(Rung.CLEAN))
    record_rungs(torch.where(finite, rung, int(Rung.FAILED)))
    root: Tensor = (vectors * torch.maximum(values, least).rsqrt().unsqueeze(-2)) @ vectors.mT
    return root


def _from_polar_factor(matrix: Tensor) -> Tensor:
    factor = damped_cholesky(matrix, 0.0).factor
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse.mT @ orthogonal_polar_factor(factor.mT)


def orthogonal_polar_factor(matrix: Tensor) -> Tensor:
    """``U`` of ``M = U H``, nearest to ``M`` among orthogonal matrices; ``(..., k, k)``, float64.

    Args:
        matrix: Finite, with singular values above :data:`LEAST` times its Frobenius norm.
    """
    u: Tensor = matrix / torch.linalg.matrix_norm(matrix, keepdim=True)
    for a, b, c in WEIGHTS:
        factor = torch.linalg.cholesky_ex(add_to_diagonal(c * (u.mT @ u), 1.0))[0]
        # U (L L^T)^-1 from the right, one triangle after the other.
        solved = torch.linalg.solve_triangular(factor.mT, u, upper=True, left=False)
        solved = torch.linalg.solve_triangular(factor, solved, upper=False, left=False)
        u = (b / c) * u + (a - b / c) * solved
    return u


def halley_weights(least: float) -> tuple[tuple[float, float, float], ...]:
    """``(a, b, c)`` of each iteration until singular values from ``least`` to 1 are all 1."""
    weights = []
    while 1.0 - least > 1e-15:
        square = least * least
        d = (4.0 * (1.0 - square) / square**2) ** (1 / 3)
        root = math.sqrt(1.0 + d)
        a = root + 0.5 * math.sqrt(8.0 - 4.0 * d + 8.0 * (2.0 - square) / (square * root))
        b = (a - 1.0) ** 2 / 4.0
        c = a + b - 1.0
        weights.append((a, b, c))
        least = min(1.0, least * (a + b * square) / (1.0 + c * square))
    return tuple(weights)


WEIGHTS = halley_weights(LEAST)
