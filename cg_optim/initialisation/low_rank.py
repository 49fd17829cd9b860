r"""The start of a LoRA pair nearest to the full Newton step: pure mathematics, any precision.

For a layer ``y = W x + s B A x`` with ``G = dL/dW`` (``(m, n)``), input curvature
``X = E[x x^T]`` and output curvature ``S = E[g g^T]`` the Newton step of the whole weight is
``dW* = -S^-1 G X^-1``.  Curvature-Guided LoRA (arXiv:2603.29824) starts the pair at

.. math::
    \min_{\mathrm{rank}\, r} \| S^{1/2} (\Delta W - \Delta W^*) X^{1/2} \|_F

With any ``K_X K_X^T = X^-1`` and ``K_S K_S^T = S^-1`` this is, by Eckart and Young, a truncated
SVD of the whitened gradient ``M = K_S^T G K_X = U \Sigma V^T``:

.. math::
    \Delta W_0 = B_0 A_0, \qquad
    A_0 = \Sigma_r^{1/2} V_r^T K_X^T, \qquad  B_0 = -K_S U_r \Sigma_r^{1/2}

which is balanced: ``A_0 X A_0^T = B_0^T S B_0 = Sigma_r``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cg_optim.alignment import Factors
from cg_optim.linalg import damped_cholesky
from cg_optim.whitening import CholeskyWhitening, Whitening


class SVD(NamedTuple):
    """Leading singular triplets of a whitened gradient, the largest first.

    Attributes:
        left: ``U``, ``(m, k)``.
        values: Singular values, ``(k,)``.
        right: ``V``, ``(n, k)``.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def newton_step(gradient: Tensor, input_curvature: Tensor, output_curvature: Tensor) -> Tensor:
    """``dW* = -S^-1 G X^-1``, ``(m, n)``, from dense positive definite ``X`` and ``S``."""
    k_x, k_s = _whitening(input_curvature), _whitening(output_curvature)
    whitened = whitened_gradient(gradient, k_x, k_s)
    return -unwhitened(whitened, k_x, k_s)


def best_low_rank_step(
    gradient: Tensor, input_curvature: Tensor, output_curvature: Tensor, rank: int
) -> Factors:
    """The best rank-``rank`` approximation of the Newton step, computed densely.

    This is the oracle for the sketched computation and never part of it.

    Args:
        gradient: ``G``, ``(m, n)``.
        input_curvature: ``X``, ``(n, n)``, positive definite.
        output_curvature: ``S``, ``(m, m)``, positive definite.
        rank: At most ``min(m, n)``.

    Returns:
        The balanced factors ``A_0`` ``(rank, n)`` and ``B_0`` ``(m, rank)``.
    """
    k_x, k_s = _whitening(input_curvature), _whitening(output_curvature)
    left, values, right = torch.linalg.svd(
        whitened_gradient(gradient, k_x, k_s), full_matrices=False
    )
    return balanced_factors(SVD(left, values, right.mT), rank, k_x, k_s)


def whitened_gradient(gradient: Tensor, k_x: Whitening, k_s: Whitening) -> Tensor:
    """``M = K_S^T G K_X`` for ``G`` of shape ``(m, n)``."""
    return k_s.apply(k_x.apply(gradient).mT).mT


def unwhitened(step: Tensor, k_x: Whitening, k_s: Whitening) -> Tensor:
    """``K_S D K_X^T``: a step ``D`` ``(m, n)`` of the whitened weight as one of the weight."""
    return k_s.apply_transposed(k_x.apply_transposed(step).mT).mT


def balanced_factors(svd: SVD, rank: int, k_x: Whitening, k_s: Whitening) -> Factors:
    """``A_0`` and ``B_0`` of the module's documentation from the triplets of ``M``."""
    root = svd.values[:rank].sqrt()[:, None]
    down = k_x.apply_transposed(root * svd.right[:, :rank].mT)
    up = -k_s.apply_transposed(root * svd.left[:, :rank].mT).mT
    return Factors(down, up)


def row_space(right: Tensor, rank: int, k_x: Whitening) -> Tensor:
    """``V_r^T K_X^T``, ``(rank, n)``: the rows of ``A_0``, all equally long in the metric ``X``.

    Args:
        right: ``V``, ``(n, k)``.
        rank: At most ``k``.
        k_x: Whitening of the inputs.
    """
    return k_x.apply_transposed(right[:, :rank].mT)


def with_norm_of(reference: Tensor, down: Tensor) -> Tensor:
    """``down`` with the Frobenius norm of ``reference``, so that learning rates carry over."""
    ratio: Tensor = torch.linalg.matrix_norm(reference) / torch.linalg.matrix_norm(down)
    return down * ratio


def _whitening(curvature: Tensor) -> CholeskyWhitening:
    return CholeskyWhitening(damped_cholesky(curvature, 0.0).factor)
