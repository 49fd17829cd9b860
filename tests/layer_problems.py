"""One layer in the middle of training, in float64, and its prediction-aligned step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from cg_optim.alignment import Factors, aligned_step, weight_change
from tests.strategies import (
    gaussian,
    generator,
    semidefinite,
)

DTYPE = torch.float64


@dataclass(frozen=True)
class Problem:
    """A layer in the middle of training.

    ``metric_out`` is ``S``; ``full_grad`` is ``G``, which the module under test never sees.
    """

    metric_in: Tensor
    metric_out: Tensor
    full_grad: Tensor
    factors: Factors
    scaling: float

    @property
    def gradients(self) -> Factors:
        down, up = self.factors
        return Factors(
            self.scaling * up.mT @ self.full_grad, self.scaling * self.full_grad @ down.mT
        )

    @property
    def output_curvature(self) -> Tensor:
        return self.scaling**2 * self.metric_out

    @property
    def newton(self) -> Tensor:
        """``dW*`` by dense solves."""
        return -torch.linalg.solve(
            self.metric_out, torch.linalg.solve(self.metric_in, self.full_grad.mT).mT
        )

    def step(self, **options: object) -> Factors:
        return aligned_step(
            self.metric_in,
            self.output_curvature,
            self.factors,
            self.gradients,
            **options,  # type: ignore[arg-type]
        )

    def change(self, **options: object) -> Tensor:
        return weight_change(self.step(**options), self.factors, self.scaling)

    def distance(self, change: Tensor) -> float:
        """``|| S^(1/2) (change - dW*) X^(1/2) ||_F``."""
        error = root(self.metric_out) @ (change - self.newton) @ root(self.metric_in)
        return float(torch.linalg.matrix_norm(error))

    def with_(self, **fields: object) -> Problem:
        return Problem(**{**self.__dict__, **fields})  # type: ignore[arg-type]


def make(
    seed: int, n: int, m: int, r: int, *, scaling: float = 1.7, condition: float = 100.0
) -> Problem:
    source = generator(seed)
    return Problem(
        semidefinite(source, n, condition=condition),
        semidefinite(source, m, condition=condition),
        gaussian(source, m, n),
        Factors(gaussian(source, r, n), gaussian(source, m, r)),
        scaling,
    )


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root, from eigenvalues and not from the code under test."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def at_start(seed: int = 0) -> Problem:
    problem = make(seed, 7, 5, 2)
    return problem.with_(factors=problem.factors._replace(up=torch.zeros(5, 2, dtype=DTYPE)))


quick = settings(max_examples=30, deadline=None)
# Sizes (n, m, r): wide, tall, square, rank one, rank as large as it can be.
SHAPES = [(7, 5, 2), (4, 8, 3), (6, 6, 2), (5, 5, 1), (3, 6, 3), (1, 1, 1)]
shapes = st.sampled_from(SHAPES)
