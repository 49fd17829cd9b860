"""Random problems for the property tests, described by a few numbers and a seed.

Drawing whole tensors entry by entry is slow and shrinks to nothing readable; a seed, the
sizes and the conditioning reproduce a failure just as well.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 9)
dampings = st.floats(1e-6, 1e2)
#: Condition numbers up to 1e12, evenly in the logarithm.
conditions = st.floats(0, 12).map(lambda power: 10.0**power)


def scales(largest: float) -> st.SearchStrategy[float]:
    """Factors from ``10**-largest`` to ``10**largest``, evenly in the logarithm."""
    return st.floats(-largest, largest).map(lambda power: 10.0**power)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(source: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)


def orthogonal(source: torch.Generator, size: int) -> Tensor:
    """A random orthogonal float64 matrix."""
    return torch.linalg.qr(gaussian(source, size, size)).Q


def semidefinite(
    source: torch.Generator,
    size: int,
    *,
    condition: float = 10.0,
    rank: int | None = None,
    batch: tuple[int, ...] = (),
) -> Tensor:
    """Symmetric float64 ``(*batch, size, size)`` with eigenvalues from ``1/condition`` to 1.

    Args:
        source: Random numbers.
        size: ``d``.
        condition: Largest over smallest non-zero eigenvalue.
        rank: How many eigenvalues are not zero; all by default.
        batch: Leading dimensions.
    """
    rank = size if rank is None else rank
    eigenvalues = torch.zeros(size, dtype=torch.float64)
    eigenvalues[:rank] = torch.logspace(0, -1, rank, base=condition, dtype=torch.float64)
    vectors = torch.linalg.qr(gaussian(source, *batch, size, size)).Q
    matrix = (vectors * eigenvalues) @ vectors.mT
    return 0.5 * (matrix + matrix.mT)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius distance over the size of ``expected``; the worst one of a stack."""
    difference = torch.linalg.matrix_norm(actual.double() - expected.double())
    return float((difference / torch.linalg.matrix_norm(expected.double())).max())
