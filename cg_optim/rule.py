r"""The method: how gradients and curvature become a step.  This is the one place to change it.

For one pair ``y = W x + s B A x`` with gradients ``G_A`` ``(r, n)`` and ``G_B`` ``(m, r)``
and input curvature ``X = E[x x^T]`` (damped), both factors are stepped by Adam in
coordinates in which their *input* is white:

.. math::
    K_A K_A^T = X^{-1}, \qquad K_B K_B^T = P^{-1}, \quad P = A X A^T

    \Delta M = -\eta \, \rho \, \tau \; U K^T, \qquad
    U = \hat m K / (\sqrt{\hat v} + \epsilon), \qquad
    \hat v = \text{EMA}[(G K)^2],

    \rho = \|U\|_F / \|U K^T\|_F, \qquad
    \tau = \min(1, \sqrt{\max(\text{rows}, d)} / \|U\|_2)

The second moment takes the part of the output-side curvature (``Q = B^T T B`` for A,
``T`` for B): it is a diagonal estimate of it in the whitened coordinates.  The factor
``rho`` keeps the step as long as Adam's own, which is what makes AdamW's learning rates
carry over ("grafting", Agarwal et al. 2020, arXiv:2002.11803).

``tau`` bounds the spectral norm of the step.  A matrix of independent entries of size one
has a spectral norm little above ``sqrt(max(rows, d))``; Adam's first steps have entries of
size one that are *not* independent (the signs of a few outer products), and a spectral
norm up to ``sqrt(min(rows, d))`` times larger.  These are the steps at which too large a
learning rate breaks LoRA; bounded, the same run stands a rate two to three times larger.

``m`` is Nesterov's look-ahead of a momentum shorter than Adam's (0.8 by default), which is
late by a good part of the few hundred steps that fine-tuning takes.  It is kept in plain
coordinates, so it stays valid when ``K`` changes.  Every function works on stacks: leading
dimensions are batch dimensions.

``X`` and ``P`` carry the same damping relative to their mean eigenvalues.  It is what the
rule is most sensitive to beside the learning rate: little of it fits the training
distribution sooner, much of it stays closer to Adam, which carries over better to inputs
of another distribution (``benchmarks/EXPERIMENTS.md``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cg_optim.damped import DampedInput
from cg_optim.linalg import all_finite, as_scales, damped_cholesky
from cg_optim.whitening import MatrixWhitening, Whitening

#: Raised with every change of the mathematics or of the curvature's schedule, so that
#: benchmark results of an older method are not taken for this one's.
RULE_VERSION = 3

#: Largest spectral norm of a step, in units of ``lr * sqrt(max(rows, d))``.
SPECTRAL_BOUND = 1.0


class AdamSettings(NamedTuple):
    """Constants of the step of one factor.

    Attributes:
        momentum: Decay of the mean gradient.
        beta2: Decay of the mean squared gradient, as in ``torch.optim.AdamW``.
        eps: Added to its root.
    """

    momentum: float
    beta2: float
    eps: float


class Moments(NamedTuple):
    """Adam's state of a stack of matrices.

    Attributes:
        step: ``(...)`` float tensor, number of updates so far; its last dimension may be 1.
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
    return -torch.expm1(step * math.log(beta))


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
    momentum = settings.momentum
    exp_avg = torch.lerp(moments.exp_avg, grad, 1 - momentum)
    whitened = grad if whitening is None else whitening.apply(grad)
    exp_avg_sq = torch.addcmul(
        moments.exp_avg_sq * settings.beta2, whitened, whitened, value=1 - settings.beta2
    )

    count = as_scales(step.to(grad.dtype))
    # The look-ahead weighs t + 1 gradients: its weights sum to 1 - momentum^(t + 1).
    first = bias_correction(momentum, count + 1)
    second = bias_correction(settings.beta2, count).sqrt()
    ahead = torch.lerp(exp_avg, grad, 1 - momentum)
    mean = ahead if whitening is None else whitening.apply(ahead)
    spread = exp_avg_sq.sqrt() / second + settings.eps
    if settings.eps == 0:
        spread = spread.clamp_min(torch.finfo(spread.dtype).tiny)  # A's gradient at B = 0 is zero
    unit = (mean / first) / spread
    scale = spectral_shortening(unit)
    value = unit
    if whitening is not None:
        value = whitening.apply_transposed(unit)
        scale = scale * _ratio_of_norms(unit, value)
    value = value * scale

    usable = all_finite(value) & all_finite(exp_avg_sq)
    if settings.beta2 == 1:  # became so in training: nothing to divide by, and a step of zero
        usable = torch.zeros_like(usable)
    return Direction(value, Moments(step, exp_avg, exp_avg_sq), usable)


def _ratio_of_norms(matrix: Tensor, other: Tensor) -> Tensor:
    """``||M||_F / ||O||_F``, ``(..., 1, 1)``; zero where both are."""
    norm = torch.linalg.matrix_norm(other, keepdim=True).clamp_min(torch.finfo(other.dtype).tiny)
    ratio: Tensor = torch.linalg.matrix_norm(matrix, keepdim=True) / norm
    return ratio


def spectral_shortening(matrix: Tensor) -> Tensor:
    """The factor ``tau <= 1`` that brings a step within :data:`SPECTRAL_BOUND`.

    The spectral norm is bounded from above by the Schatten norm of order 32, which needs
    products only: at most ``r^(1/32)`` too large for a matrix of rank ``r``, a tenth for
    rank 16.

    Args:
        matrix: ``(..., rows, d)``.

    Returns:
        ``(..., 1, 1)``.
    """
    rows, columns = matrix.shape[-2:]
    smallest = torch.finfo(matrix.dtype).tiny
    # Entries are scaled to at most one: nothing overflows in the product.
    largest = matrix.abs().amax((-2, -1), keepdim=True).clamp_min(smallest)
    unit = matrix / largest
    power = unit @ unit.mT if rows <= columns else unit.mT @ unit
    # Of norm one, the largest eigenvalue is at least one by the root of the rank, so that the
    # eighth power is far from nothing.
    size = torch.linalg.matrix_norm(power, keepdim=True)
    power = power / size.clamp_min(smallest)
    for _ in range(3):
        power = power @ power
    norm = size.sqrt() * torch.linalg.matrix_norm(power, keepdim=True) ** (1.0 / 16.0)
    # One division after the other: the norm of large entries may be beyond the largest number.
    factor: Tensor = SPECTRAL_BOUND * math.sqrt(max(rows, columns)) / largest / norm
    return factor.clamp_max(1.0)


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
