r"""The leading singular triplets of a layer's gradient, which is never built.

Two backward passes see the rows ``x_t`` and ``d_t`` of the gradient ``D = sum_t d_t x_t^T``,
``(m, n)``, and add up its products with two thin matrices,

.. math::
    Z = \Psi^T D = \sum_t (\Psi^T d_t) x_t^T \quad (k, n), \qquad
    Y = D P = \sum_t d_t (P^T x_t)^T \quad (m, k)

with a random ``Psi``.  This is the randomised range finder and its projection (Halko et al.
2011, arXiv:0909.4061, Alg. 4.1 and 5.1) for the *whitened* gradient ``M = K_S^T D K_X``: after
the first pass the curvature is known, the rows of ``Z K_X = (K_S^{-1} \Psi)^T M`` are spanned
by an orthonormal basis ``V``, and with ``P = K_X V`` the second pass gives ``M V = K_S^T Y``
exactly.  ``D`` of the two passes may come from different batches: then the coefficients are
not fitted to the noise that chose the basis.  Sums over rows add up over micro-batches and
over distributed ranks alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cg_optim.initialisation.low_rank import SVD
from cg_optim.whitening import Whitening

#: Directions in the basis beyond the rank ``r``: this many times as many, or as 8.  On the
#: gradients of a language model the rank-``r`` step then has a cosine of 0.94 to the best one.
OVERSAMPLING = 2
#: Random directions outside the basis that tell how much energy is there.
PROBES = 8


def sketch_size(rank: int, out_features: int, in_features: int) -> int:
    """``k``; a layer no larger than the sketch is sketched whole, and then exactly."""
    return min(rank + OVERSAMPLING * max(rank, 8), out_features, in_features)


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


class RowSketch:
    """``Z`` of one layer, from the first passes.

    Args:
        output_test: ``Psi``, ``(m, k)``, which layers of one size share.
        in_features: ``n``.
    """

    def __init__(self, output_test: Tensor, in_features: int) -> None:
        self.output_test = output_test
        #: ``Z``, ``(k, n)``.
        self.rows = output_test.new_zeros(output_test.shape[1], in_features)

    def add(self, rows: Tensor, gradients: Tensor) -> None:
        """Add the rows ``x`` ``(N, n)`` and ``d`` ``(N, m)`` of one batch."""
        x, d = rows.to(self.rows), gradients.to(self.rows)
        self.rows.addmm_((d @ self.output_test).mT, x)

    def basis(self, k_x: Whitening) -> Tensor | None:
        """``V``, ``(n, k)``: orthonormal, and nearly all of the row space of ``M``.

        None if nothing or something not finite was seen.
        """
        whitened = k_x.apply(self.rows)
        if not bool(torch.isfinite(whitened).all()) or not bool(whitened.any()):
            return None
        basis: Tensor = torch.linalg.qr(whitened.mT).Q
        return basis


class Projection:
    """``Y`` of one layer, from the second passes.

    Args:
        basis: ``V``, ``(n, k)``, orthonormal.
        probes: A random matrix with ``n`` rows and :data:`PROBES` columns at most.
        k_x: ``K_X``.
        out_features: ``m``.
    """

    def __init__(self, basis: Tensor, probes: Tensor, k_x: Whitening, out_features: int) -> None:
        self.basis = basis
        n, k = basis.shape
        probes = probes[:, : n - k]
        outside = torch.linalg.qr(probes - basis @ (basis.mT @ probes)).Q
        #: ``P`` and beside it the probes, ``(n, k + q)``.
        self.input_test = k_x.apply_transposed(torch.cat([basis, outside], 1).mT).mT
        #: ``Y``, ``(m, k + q)``.
        self.columns = basis.new_zeros(out_features, self.input_test.shape[1])

    def add(self, rows: Tensor, gradients: Tensor) -> None:
        """Add the rows ``x`` ``(N, n)`` and ``d`` ``(N, m)`` of one batch."""
        x, d = rows.to(self.columns), gradients.to(self.columns)
        self.columns.addmm_(d.mT, x @ self.input_test)

    def svd(self, k_s: Whitening) -> tuple[SVD, Tensor]:
        """The triplets of ``M V V^T`` and an estimate of ``|M|_F^2``.

        Exact up to rounding if ``V`` spans the row space of ``M``; the estimate is unbiased.
        """
        whitened = k_s.apply(self.columns.mT).mT
        n, k = self.basis.shape
        left, values, right = torch.linalg.svd(whitened[:, :k], full_matrices=False)
        energy = values.square().sum()
        if outside := whitened.shape[1] - k:
            energy = energy + whitened[:, k:].square().sum() * (n - k) / outside
        return SVD(left, values, self.basis @ right.mT), energy


def right_vectors(corange_sketch: Tensor) -> Tensor:
    """Approximate right singular vectors of ``M``, ``(n, min(l, n))``, from ``Psi^T M`` alone."""
    vectors: Tensor = torch.linalg.svd(corange_sketch, full_matrices=False).Vh
    return vectors.mT
