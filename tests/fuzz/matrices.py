"""Random matrices for the failure ladder of :mod:`cg_optim.linalg`."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from cg_optim.linalg import Rung, damped_cholesky
from tests.fuzz.problems import without_looking

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "semidefinite": lambda x: x @ x.mT,
    "rank one": lambda x: x[..., :1] @ x[..., :1].mT,
    "nearly singular": lambda x: torch.ones_like(x) + 1e-7 * (x @ x.mT),
    "symmetric": lambda x: x + x.mT,
    "anything": lambda x: x,
    "slightly indefinite": lambda x: torch.diag_embed(
        torch.where(torch.arange(x.shape[-1]) == 0, -1e-5, x[..., 0].abs() + 0.1)
    ),
    "zero": torch.zeros_like,
    "NaN inside": lambda x: torch.where(x > 1.5, math.nan, x @ x.mT),
    "infinity inside": lambda x: torch.where(x > 1.5, math.inf, x @ x.mT),
}


def run(seed: int, together: int = 200) -> Counter[str]:
    """Factorise a stack of random matrices of one kind and scale.

    Returns:
        How often each rung was needed.

    Raises:
        AssertionError: If a factor is not finite, not invertible, or not one of the matrix.
    """
    choose = random.Random(seed)
    torch.manual_seed(seed)
    dtype = choose.choice((torch.float32, torch.float64))
    size, kind = choose.randint(1, 9), choose.choice(sorted(KINDS))
    matrix = KINDS[kind](torch.randn(together, size, size, dtype=torch.float64))
    matrix = (matrix * 10.0 ** choose.uniform(-45, 38)).to(dtype)
    damping = choose.choice((0.0, 10.0 ** choose.uniform(-9, 2)))
    with without_looking(choose.random() < 0.25):
        factor, rung = damped_cholesky(matrix, damping)
    assert bool(torch.isfinite(factor).all()), seed
    assert bool((factor.diagonal(dim1=-2, dim2=-1) > 0).all()), seed
    exact = rung <= Rung.FLOAT64
    if bool(exact.any()):
        check_factor(factor[exact].double(), matrix[exact].double(), damping, seed)
    return Counter({Rung(r).name: int((rung == r).sum()) for r in Rung})


def check_factor(factor: Tensor, matrix: Tensor, damping: float, seed: int) -> None:
    """``L L^T`` is the damped symmetric part, up to the rounding of float32."""
    size = matrix.shape[-1]
    matrix = 0.5 * (matrix + matrix.mT)
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    # A matrix of zeros has no scale; its factor is the identity, damped.
    matrix = torch.where((mean == 0)[:, None, None], torch.eye(size, dtype=matrix.dtype), matrix)
    mean = torch.where(mean == 0, 1.0, mean)
    wanted = matrix + (damping * mean)[:, None, None] * torch.eye(size, dtype=matrix.dtype)
    norm = torch.linalg.matrix_norm(wanted / mean[:, None, None])
    error = torch.linalg.matrix_norm((factor @ factor.mT - wanted) / mean[:, None, None])
    assert bool((error <= 1e-5 * size * norm).all()), seed
