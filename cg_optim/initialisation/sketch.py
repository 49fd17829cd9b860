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

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cg_optim import host
from cg_optim.initialisation.jacobi import jacobi_eigenpairs
from cg_optim.initialisation.low_rank import SVD
from cg_optim.whitening import Whitening

#: Directions in the basis beyond the rank ``r``: this many times as many, or as 8.  On the
#: gradients of a language model the rank-``r`` step then has a cosine of 0.94 to the best one.
OVERSAMPLING = 2
#: Random directions outside the basis that tell how much energy is there.
PROBES = 8
#: Far below any scale, so that zero can be divided by.
TINY = 1e-290


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
            matrix = (torch.linalg.qr(start).Q * rows**0.5).to(like.dtype)
            # Without waiting for the copy; a change of precision on the way would wait.
            self._known[key] = matrix.to(like.device, non_blocking=True)
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
    return _with_signs(torch.linalg.svd(corange_sketch, full_matrices=False).Vh.mT)


def _with_signs(vectors: Tensor) -> Tensor:
    """The largest entry of each column made positive: decompositions leave the signs open."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def right_vectors_together(corange_sketches: Sequence[Tensor]) -> list[Tensor]:
    """:func:`right_vectors` of several finite ``(l, n)``, ``l <= n``, without waiting for any."""
    results: list[Tensor] = []
    squares: dict[int, Tensor] = {}
    for index, sketch in enumerate(corange_sketches):
        if host.at_hand(sketch):
            results.append(right_vectors(sketch))
            continue
        # Orthonormal even where the sketch has fewer directions than rows.
        basis, upper = torch.linalg.qr(sketch.mT)
        results.append(basis)
        wide = upper.double()
        wide = wide / wide.abs().amax().clamp_min(TINY)
        squares[index] = wide @ wide.mT
    for index, (_, vectors) in _eigenpairs_together(squares).items():
        results[index] = _with_signs(results[index] @ vectors.to(results[index].dtype))
    return results


def least_squares_together(
    systems: Sequence[tuple[Tensor, Tensor]], smallest: float
) -> list[Tensor]:
    """``C`` of the least norm that minimises ``|M C - N|_F``, for several systems.

    Args:
        systems: ``M`` ``(l, r)`` and ``N`` ``(l, s)`` of each.
        smallest: Singular values of ``M`` below this part of the largest count as zero.

    Returns:
        ``C``, ``(r, s)``, of each.
    """
    results: list[Tensor] = []
    squares: dict[int, Tensor] = {}
    for index, (left, right) in enumerate(systems):
        if host.at_hand(left):
            results.append(torch.linalg.pinv(left, rtol=smallest) @ right)
            continue
        wide = left.double()
        scale = wide.abs().amax().clamp_min(TINY)
        squares[index] = (wide / scale).mT @ (wide / scale)
        projected = (wide / scale).mT @ (right.double() / scale)
        results.append(projected)
    for index, (values, vectors) in _eigenpairs_together(squares).items():
        kept = values > smallest**2 * values[:1]
        inverse = torch.where(kept, 1.0 / torch.where(kept, values, 1.0), 0.0)
        solution = vectors @ (inverse[:, None] * (vectors.mT @ results[index]))
        results[index] = solution.to(systems[index][1].dtype)
    return results


def _eigenpairs_together(matrices: Mapping[int, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Eigenpairs of symmetric float64 ``(k, k)`` matrices; equal sizes in one stack."""
    stacks: dict[tuple[int, torch.device], list[int]] = {}
    for index, matrix in matrices.items():
        stacks.setdefault((len(matrix), matrix.device), []).append(index)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for indices in stacks.values():
        pairs = jacobi_eigenpairs(torch.stack([matrices[index] for index in indices]))
        found.update(zip(indices, zip(*pairs, strict=True), strict=True))
    return found
