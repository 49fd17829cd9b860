r"""Sketches of a layer's gradient, from which its leading singular triplets follow.

The gradient ``D = sum_t d_t x_t^T`` of a layer, ``(m, n)``, is never built.  Hooks see the
rows ``x_t`` and ``d_t`` and add up its products with two thin matrices,

.. math::
    Y = D P = \sum_t d_t (P^T x_t)^T \quad (m, k), \qquad
    Z = Q^T D = \sum_t (Q^T d_t) x_t^T \quad (l, n)

With ``P = K_X \Omega`` and ``Q = K_S \Psi`` for random ``\Omega`` and ``\Psi`` these are
sketches of the *whitened* gradient ``M = K_S^T D K_X``: its range and its row space, taken in
one pass (Tropp et al. 2017, arXiv:1609.00048, Alg. 4).  Sums over rows add up over
micro-batches and over distributed ranks alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cg_optim.initialisation.low_rank import SVD
from cg_optim.whitening import Whitening

#: Columns of the range sketch beyond the rank ``r``: as many again, and at least this many.
#: The other sketch has ``2 k + 1`` rows (Tropp et al., eq. 4.6).
LEAST_OVERSAMPLING = 8


def sketch_sizes(rank: int, out_features: int, in_features: int) -> tuple[int, int]:
    """``(k, l)``; a layer smaller than the sketch is sketched whole, and then exactly."""
    columns = min(rank + max(rank, LEAST_OVERSAMPLING), out_features, in_features)
    return columns, min(2 * columns + 1, out_features)


class TestMatrices:
    """Random test matrices of one run: the same on every device and every distributed rank.

    Their columns are orthogonal and of length ``sqrt(rows)``: in the mean they behave like
    Gaussian ones, and a square one loses nothing.

    Args:
        seed: Another seed, another matrix.
    """

    __test__ = False  # not a test case, whatever pytest makes of the name

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._known: dict[tuple[object, ...], Tensor] = {}

    def get(self, rows: int, columns: int, like: Tensor, stream: int = 0) -> Tensor:
        """A ``(rows, columns)`` matrix in the precision and on the device of ``like``.

        All who ask for the same get the same tensor; it must not be written to.

        Args:
            rows: At least ``columns``.
            columns: How many.
            like: Any tensor.
            stream: Independent matrices for different purposes.
        """
        key = (rows, columns, stream, like.dtype, like.device)
        if key not in self._known:
            source = torch.Generator().manual_seed((self._seed << 1) + stream)
            start = torch.randn(rows, columns, generator=source, dtype=torch.float64)
            self._known[key] = (torch.linalg.qr(start).Q * rows**0.5).to(like.device, like.dtype)
        return self._known[key]


class GradientSketch:
    """The two sums for one layer.

    Args:
        input_test: ``P``, ``(n, k)``.
        k_s: ``K_S``; applied to every row, so that ``Q`` need not be held.
        output_test: ``Psi``, ``(m, l)``, which layers of one size share.
    """

    def __init__(self, input_test: Tensor, k_s: Whitening, output_test: Tensor) -> None:
        self.input_test = input_test
        self.k_s = k_s
        self.output_test = output_test
        n, m = input_test.shape[0], output_test.shape[0]
        #: ``Y``, ``(m, k)``.
        self.range = input_test.new_zeros(m, input_test.shape[1])
        #: ``Z``, ``(l, n)``.
        self.corange = input_test.new_zeros(output_test.shape[1], n)

    def add(self, rows: Tensor, gradients: Tensor) -> None:
        """Add the rows ``x`` ``(N, n)`` and ``d`` ``(N, m)`` of one batch."""
        x, d = rows.to(self.range), gradients.to(self.range)
        self.range.addmm_(d.mT, x @ self.input_test)
        self.corange.addmm_((self.k_s.apply(d) @ self.output_test).mT, x)


def svd_of_sketches(range_sketch: Tensor, corange_sketch: Tensor, output_test: Tensor) -> SVD:
    """Approximate leading singular triplets of ``M`` from ``M Omega`` and ``Psi^T M``.

    Exact up to rounding if the rank of ``M`` is at most ``k``.

    Args:
        range_sketch: ``M Omega``, ``(m, k)``.
        corange_sketch: ``Psi^T M``, ``(l, n)`` with ``l >= k``.
        output_test: ``Psi``, ``(m, l)``.

    Returns:
        ``min(k, n)`` triplets.
    """
    basis = torch.linalg.qr(range_sketch).Q
    # Least squares for W in  (Psi^T Q) W = Psi^T M,  so that  M ~ Q W.
    inner, upper = torch.linalg.qr(output_test.mT @ basis)
    coefficients = torch.linalg.solve_triangular(upper, inner.mT @ corange_sketch, upper=True)
    left, values, right = torch.linalg.svd(coefficients, full_matrices=False)
    return SVD(basis @ left, values, right.mT)


def right_vectors(corange_sketch: Tensor) -> Tensor:
    """Approximate right singular vectors of ``M``, ``(n, min(l, n))``, from ``Psi^T M`` alone."""
    vectors: Tensor = torch.linalg.svd(corange_sketch, full_matrices=False).Vh
    return vectors.mT


def total_energy(corange_sketch: Tensor) -> Tensor:
    """An unbiased estimate of ``|M|_F^2`` from ``Psi^T M``; exact for a square ``Psi``."""
    return corange_sketch.square().sum() / corange_sketch.shape[0]
