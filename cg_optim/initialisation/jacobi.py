r"""Eigenpairs of small symmetric matrices in plain operators, which nobody has to wait for.

``torch.linalg.eigh`` and ``svd`` read their error codes on the host.  Jacobi's method needs no
error code: after a fixed number of sweeps it has converged.  It turns all disjoint pairs of rows
and columns at once, and a round robin brings every two of them together in each sweep (Golub and
Van Loan, "Matrix Computations", section 8.5.6).  Thousands of tiny operators are slower than one
wait, so this is for what is done once in a training run, and for stacks.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: At size 64 most matrices are done after ten, and eigenvalues of a multiplicity are as good as
#: equal.
SWEEPS = 12


def jacobi_eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and vectors of symmetric positive semi-definite matrices.

    Args:
        matrix: ``(..., k, k)``, finite; NaN in one matrix stays in that matrix.

    Returns:
        Eigenvalues ``(..., k)`` and orthonormal vectors as columns, ``(..., k, k)``.
    """
    k = matrix.shape[-1]
    # A bye in the round robin: it is never turned, and its negative eigenvalue comes last.
    size = k + k % 2
    rows = matrix.new_zeros((*matrix.shape[:-2], size, 2 * size))
    rows[..., :k, :k] = matrix
    if size > k:
        rows[..., k, k] = -1.0 - matrix.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
    rows[..., size:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    # One row holds a row of J^T M J and one of J^T, with the product J of all turns so far.
    for _ in range(SWEEPS * (size - 1)):
        inside, turned = rows[..., :size], rows[..., size:]
        diagonal = inside.diagonal(dim1=-2, dim2=-1)
        beside = inside.diagonal(offset=1, dim1=-2, dim2=-1)[..., ::2]
        difference = diagonal[..., ::2] - diagonal[..., 1::2]
        # The smaller of the angles that do it: with it the sweeps converge.
        double = torch.where(difference < 0, -2.0, 2.0) * beside
        angle = (0.5 * torch.atan2(double, difference.abs())).unsqueeze(-1)
        cos, sin = angle.cos(), angle.sin()
        columns = _turn(inside.mT, cos, sin).mT
        rows = _turn(torch.cat([columns, turned], -1), cos, sin)
    values, order = rows[..., :size].diagonal(dim1=-2, dim2=-1).sort(-1, descending=True)
    vectors = rows[..., size:].mT.gather(-1, order.unsqueeze(-2).expand(rows[..., size:].shape))
    return values[..., :k], vectors[..., :k, :k]


def _turn(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each two neighbouring rows by their angle and seat them for the next round."""
    one, other = rows[..., ::2, :], rows[..., 1::2, :]
    top, bottom = cos * one + sin * other, cos * other - sin * one
    # The first stays, all others move on by one place around the table.
    above = torch.cat([top[..., :1, :], bottom[..., :1, :], top[..., 1:-1, :]], -2)
    below = torch.cat([bottom[..., 1:, :], top[..., -1:, :]], -2)
    if top.shape[-2] == 1:
        above, below = top, bottom
    return torch.stack([above, below], -2).flatten(-3, -2)
