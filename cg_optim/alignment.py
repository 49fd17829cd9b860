r"""Prediction-aligned steps of one LoRA pair, in closed form and in any precision.

For a layer ``y = W x + s B A x`` with ``G = dL/dW`` the best full-rank step, measured by
what it does to the layer's outputs, is ``dW* = -S^-1 G X^-1`` (input curvature
``X = E[x x^T]``, output curvature ``S = E[g g^T]``).  The steps below are the closest
that the two factors can come to it:

.. math::
    \min_{dA, dB} \| S^{1/2} (s\, dB\, A + s\, B\, dA - dW^*) X^{1/2} \|_F

Only the factors' own gradients ``G_A = s B^T G`` and ``G_B = s G A^T`` are needed, and
``T = s^2 S``, the curvature that the gradient of B's output shows.  With
``P = A X A^T`` and ``Q = B^T T B``:

.. math::
    dA = -Q^{-1} G_A (X^{-1} - \tfrac12 A^T P^{-1} A), \qquad
    dB = -(T^{-1} - \tfrac12 B Q^{-1} B^T) G_B P^{-1}

solves the problem (*joint* step).  The solution is unique in ``dB A + B dA`` and free up
to ``(dA + C A, dB - B C)``; this is the one that is symmetric in both factors.  Without
the halves each factor is stepped as if the other stood still (*block* step).  A learning
rate multiplies the result.

These functions are the oracle for everything that approximates them; a training step
never calls them.  Leading dimensions are batch dimensions and broadcast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cg_optim.linalg import Rung, damped_cholesky, mean_eigenvalue


class Factors(NamedTuple):
    """Something that belongs to A and to B: their values, gradients or steps.

    Attributes:
        down: Shaped like ``A``, ``(..., r, n)``.
        up: Shaped like ``B``, ``(..., m, r)``.
    """

    down: Tensor
    up: Tensor


def aligned_step(
    input_curvature: Tensor,
    output_curvature: Tensor,
    factors: Factors,
    gradients: Factors,
    *,
    joint: bool = True,
    damping: float = 0.0,
    first_step: float = 1e-3,
) -> Factors:
    """The prediction-aligned step of a pair.

    The two ``r x r`` matrices are damped relative to their mean eigenvalue.  That never
    overshoots: it shortens the joint step to ``dW* - (I - P_B) dW* (I - P_A)`` with
    contractions ``P_A`` and ``P_B``.  While ``B`` is zero, or tiny, ``Q`` has no scale of
    its own; it is then damped as if the entries of ``B`` were ``first_step``.  ``A``'s
    step is exactly zero at ``B = 0``.

    Args:
        input_curvature: Damped ``X``, ``(..., n, n)``, positive definite.
        output_curvature: Damped ``T = s^2 S``, ``(..., m, m)``, positive definite.
        factors: ``A`` and ``B``.
        gradients: ``G_A`` and ``G_B``, the loss's gradients with respect to them.
        joint: Whether the two steps account for each other.
        damping: Relative damping of ``P`` and ``Q``, >= 0; 0 for the exact projection.
        first_step: Root mean square entry that ``B`` is expected to have after its
            first step, > 0.

    Returns:
        What to add to the factors, times a learning rate; zero where anything of a pair
        was not finite.
    """
    down, up = factors
    hidden = down @ input_curvature @ down.mT
    backward = up.mT @ output_curvature @ up
    # E[tr(B^T T B)] / r for independent entries of that size.
    floor = first_step**2 * output_curvature.shape[-1] * mean_eigenvalue(output_curvature)
    # X and T come damped; anything added here would no longer be the caller's problem.
    x_factor, x_rung = damped_cholesky(input_curvature, 0.0)
    t_factor, t_rung = damped_cholesky(output_curvature, 0.0)
    p_factor, p_rung = damped_cholesky(hidden, damping)
    q_factor, q_rung = damped_cholesky(backward, damping, floor)

    # Q^-1 G_A and G_B P^-1 are shared by the main terms and by the halves.
    down_solved = torch.cholesky_solve(gradients.down, q_factor)
    up_solved = torch.cholesky_solve(gradients.up.mT, p_factor).mT
    down_step = torch.cholesky_solve(down_solved.mT, x_factor).mT
    up_step = torch.cholesky_solve(up_solved, t_factor)
    if joint:
        down_step = (
            down_step - 0.5 * torch.cholesky_solve((down_solved @ down.mT).mT, p_factor).mT @ down
        )
        up_step = up_step - 0.5 * up @ torch.cholesky_solve(up.mT @ up_solved, q_factor)

    usable = torch.isfinite(down_step).all(-1).all(-1) & torch.isfinite(up_step).all(-1).all(-1)
    for rung in (x_rung, t_rung, p_rung, q_rung):
        usable = usable & (rung != Rung.FAILED)
    keep = usable[..., None, None]
    return Factors(
        torch.where(keep, -down_step, torch.zeros_like(down_step)),
        torch.where(keep, -up_step, torch.zeros_like(up_step)),
    )


def weight_change(step: Factors, factors: Factors, scaling: float) -> Tensor:
    """``s (dB A + B dA)``, ``(..., m, n)``: the step as the layer's weight sees it.

    This is the first-order change; ``s dB dA`` is left out.

    Args:
        step: ``dA`` and ``dB``.
        factors: ``A`` and ``B``.
        scaling: ``s``.
    """
    return scaling * (step.up @ factors.down + factors.up @ step.down)
