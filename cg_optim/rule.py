r"""The method: how gradients and curvature become a step.  This is the one place to change it.

For one pair ``y = W x + s B A x`` with gradients ``G_A`` ``(r, n)`` and ``G_B`` ``(m, r)``
and input curvature ``X = E[x x^T]`` (damped), both factors are stepped by Adam in
coordinates in which their *input* is white:

.. math::
    K_A K_A^T = X^{-1}, \qquad K_B K_B^T = P^{-1}, \quad P = A X A^T

    \Delta M = -\eta \, \rho \; U K^T, \qquad
    U = \hat m K / (\sqrt{\hat v} + \epsilon), \qquad
    \hat v = \text{EMA}[(G K)^2], \qquad
    \rho = \|U\|_F / \|U K^T\|_F

The second moment takes the part of the output-side curvature (``Q = B^T T B`` for A,
``T`` for B): it is a diagonal estimate of it in the whitened coordinates.  The factor
``rho`` keeps the step as long as Adam's own, which is what makes AdamW's learning rates
carry over ("grafting", Agarwal et al. 2020, arXiv:2002.11803); with ``K = I`` the rule
*is* Adam.  The first moment is kept in plain coordinates, so it stays valid when ``K``
changes.  Every function works on stacks: leading dimensions are batch dimensions.

``X`` and ``P`` carry the same damping relative to their mean eigenvalues.  It is what the
rule is most sensitive to beside the learning rate: little of it fits the training
distribution sooner, much of it stays closer to Adam, which carries over better to inputs
of another distribution (``benchmarks/EXPERIMENTS.md``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cg_optim.damped import DampedInput
from cg_optim.linalg import all_finite, damped_cholesky
from cg_optim.whitening import MatrixWhitening, Whitening

#: Raised with every change of the mathematics or of the curvature's schedule, so that
#: benchmark results of an older method are not taken for this one's.
RULE_VERSION = 2


@dataclass(frozen=True)
class AdamSettings:
    """Adam's constants for one factor; see ``torch.optim.AdamW``."""

    beta1: float
    beta2: float
    eps: float


class Moments(NamedTuple):
    """Adam's state of a stack of matrices.

    Attributes:
        step: ``(...)`` float tensor, number of updates so far.
        exp_avg: ``(..., rows, d)``, mean gradient in plain coordinates.
        exp_avg_sq: ``(..., rows, d)``, mean squared gradient in whitened coordinates.
    """

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Direction(NamedTuple):
    """What to subtract, times the learning rate, and the state that goes with it.

    Attributes:
        value: ``(..., rows, d)``.
        moments: The new state.
        usable: ``(...)`` boolean, False where anything was not finite; the caller then
            uses neither ``value`` nor ``moments``.
    """

    value: Tensor
    moments: Moments
    usable: Tensor


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """``1 - beta^step``, without the cancellation that float32 suffers for beta near 1."""
    if beta == 0:
        return torch.ones_like(step)
    return -torch.expm1(step.double() * math.log(beta))


def whitened_adam(
    grad: Tensor, moments: Moments, whitening: Whitening | None, settings: AdamSettings
) -> Direction:
    """One Adam direction in whitened coordinates, as long as Adam's step there.

    Args:
        grad: ``(..., rows, d)`` gradients.
        moments: State before this step.
        whitening: ``K`` acting on the last dimension; None is plain Adam.
        settings: Adam's constants.
    """
    step = moments.step + 1
    exp_avg = torch.lerp(moments.exp_avg, grad, 1 - settings.beta1)
    whitened = grad if whitening is None else whitening.apply(grad)
    exp_avg_sq = moments.exp_avg_sq * settings.beta2 + whitened.square() * (1 - settings.beta2)

    first = bias_correction(settings.beta1, step).to(grad.dtype)[..., None, None]
    second = bias_correction(settings.beta2, step).sqrt().to(grad.dtype)[..., None, None]
    mean = exp_avg if whitening is None else whitening.apply(exp_avg)
    scale = exp_avg_sq.sqrt() / second + settings.eps
    if settings.eps == 0:
        scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)  # A's gradient at B = 0 is zero
    unit = (mean / first) / scale
    value = unit if whitening is None else _with_norm_of(unit, whitening.apply_transposed(unit))

    usable = all_finite(value) & all_finite(exp_avg_sq)
    return Direction(value, Moments(step, exp_avg, exp_avg_sq), usable)


def _with_norm_of(reference: Tensor, matrix: Tensor) -> Tensor:
    """Scale ``matrix`` to the Frobenius norm of ``reference``; zero stays zero."""
    wanted = torch.linalg.matrix_norm(reference, keepdim=True)
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    return matrix * torch.where(norm > 0, wanted / norm, torch.zeros_like(norm))


def hidden_whitening(
    down: Tensor, damped_input: DampedInput | None, damping: float
) -> MatrixWhitening:
    """Whitening of B's input ``h = A x`` from ``P = A X A^T`` with the current ``A``.

    Args:
        down: ``A``, ``(..., r, n)``.
        damped_input: Damped ``X``, the same as in A's own whitening; None stands for
            isotropic inputs.
        damping: Damping of ``P`` relative to its mean eigenvalue.
    """
    gram = down @ down.mT if damped_input is None else damped_input.hidden_gram(down)
    factor = damped_cholesky(gram, damping).factor
    # Normalised like X: an isotropic P gives the identity, so Adam's eps means the same
    # in every layer.
    mean = factor.square().sum((-2, -1), keepdim=True) / factor.shape[-1]
    factor = factor * mean.rsqrt()
    # B has many more rows than P: one inverse and products beat a triangular solve by far.
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    return MatrixWhitening(inverse.mT)
