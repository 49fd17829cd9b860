"""What is collected of each layer before it is initialised: X, S and its gradient, in sketches.

First passes give the curvature and a sketch of the gradient's rows, second passes its
projection on them (:mod:`cg_optim.initialisation.sketch`).  Layers with the same input share
``X``.  What is held is ``O((n + m) k)`` numbers for each layer and never a matrix of the size
of its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cg_optim.curvature_store import CurvatureStore
from cg_optim.hooks import CurvatureObserver
from cg_optim.initialisation.low_rank import SVD
from cg_optim.initialisation.sketch import (
    PROBES,
    Projection,
    RowSketch,
    TestMatrices,
    sketch_size,
)
from cg_optim.input_curvature import new_input_curvature
from cg_optim.pairs import LoRAPair
from cg_optim.whitening import Whitening


class WhitenedLayer(NamedTuple):
    """What the statistics of one layer amount to.

    Attributes:
        svd: Leading triplets of ``M = K_S^T D K_X``, in units in which the damped ``X`` and
            ``S`` have mean eigenvalue 1.
        energy: ``|M|_F^2``, estimated.
        k_x: Whitening of the inputs.
        k_s: Whitening of the output gradients.
        scale: What ``-K_S M K_X^T`` must be multiplied by to be the Newton step that
            ``s B A`` stands for, divided by ``s``.
        slope: How fast the loss falls along the step of rank ``r``, to first order and on the
            batches of the second passes: by this much times the length of the step.
    """

    svd: SVD
    energy: Tensor
    k_x: Whitening
    k_s: Whitening
    scale: float
    slope: float


class Statistics:
    """The statistics of all observed pairs; its hooks are on the model until :meth:`close`.

    Args:
        pairs: All pairs, observed or not.
        representation: How curvature is held, as for the optimizer.
        damping: Relative damping of ``X`` and ``S``.
        seed: Seed of the test matrices.
    """

    def __init__(
        self, pairs: Sequence[LoRAPair], representation: str | int, damping: float, seed: int
    ) -> None:
        self._pairs = pairs
        self._damping = damping
        self._inputs = CurvatureStore(pairs, representation)
        self._outputs = {
            index: new_input_curvature(pair.out_features, pair.A, representation)
            for index, pair in enumerate(pairs)
            if pair.observed
        }
        self._tests = TestMatrices(seed)
        #: Whether second passes are under way.
        self.projecting = False
        #: Whether the first passes count for the curvature, and for the rows of the gradient.
        self.curvature_wanted = self.rows_wanted = True
        self._whitenings: dict[int, tuple[Whitening, Whitening]] = {}
        self._sketches = {index: self._row_sketch(index) for index in self._outputs}
        self._projections: dict[int, Projection] = {}
        self._means: dict[int, float] = {}
        self._most_bytes = 0
        self._rows = dict.fromkeys(self._outputs, 0)
        self._curvature_batches = self._gradient_batches = 0
        self._observer = CurvatureObserver(pairs, self._consume, lambda *_: ())
        self._observer.gradient_consumer = self._consume_gradients

    def _row_sketch(self, index: int) -> RowSketch:
        pair = self._pairs[index]
        size = sketch_size(pair.rank, pair.out_features, pair.in_features)
        like = self._outputs[index].trace
        psi = self._tests.get(pair.out_features, size, like, stream=1)
        return RowSketch(psi, pair.in_features)

    def close(self) -> None:
        """Take the hooks off."""
        self._observer.remove()

    # ----------------------------------------------------------------- collecting

    def _consume(self, rows: Tensor, mask: Tensor, indices: tuple[int, ...]) -> None:
        if self.curvature_wanted:
            self._inputs.consume(rows, mask, indices)

    def _consume_gradients(self, index: int, rows: Tensor, gradients: Tensor) -> None:
        if index in self._projections:
            self._projections[index].add(rows, gradients)
        if index in self._sketches and self.rows_wanted:
            self._sketches[index].add(rows, gradients)
        if index in self._outputs and self.curvature_wanted:
            curvature = self._outputs[index]
            mask = gradients.any(-1)
            self._rows[index] += int(mask.sum())
            curvature.accumulate(gradients.to(curvature.device), mask.to(curvature.device))

    def end_of_batch(self) -> None:
        """After each backward pass, while its gradients are still there."""
        self._observer.flush()
        if self.projecting:
            self._gradient_batches += 1
        elif self.curvature_wanted:
            self._curvature_batches += 1
            self._inputs.update()
            for curvature in self._outputs.values():
                curvature.update(1.0 - 1e-6)  # a mean in which all batches count alike

    def start_projecting(self) -> None:
        """From the next batch on, project gradients on the rows found so far.

        Pairs of which nothing usable was seen are left out from here on.
        """
        self.projecting, self.curvature_wanted, self.rows_wanted = True, False, False
        self._note_bytes()  # the curvature goes below
        for index, curvature in self._outputs.items():
            damped_x = self._inputs.damped(index, self._damping)
            if damped_x is None:
                continue
            self._whitenings[index] = (
                damped_x.whitening(),
                curvature.damped(self._damping).whitening(),
            )
            mean_s = float(curvature.trace) / self._pairs[index].out_features
            self._means[index] = self._mean_of_inputs(index) * mean_s
        # The whitenings are all that is needed of the curvature from here on.
        self._inputs, self._outputs = CurvatureStore((), "auto"), {}
        for index, (k_x, _) in self._whitenings.items():
            pair, sketch = self._pairs[index], self._sketches.pop(index)
            n, m = pair.in_features, pair.out_features
            basis = sketch.basis(k_x)
            if basis is not None:
                probes = self._tests.get(n, min(PROBES, n), basis)
                self._projections[index] = Projection(basis, probes, k_x, m)
        self._sketches.clear()

    # -------------------------------------------------------------------- results

    def whitened(self, index: int) -> WhitenedLayer | None:
        """What was collected of a pair; None if it got no gradient, or not a finite one."""
        projection = self._projections.get(index)
        if projection is None:
            return None
        size = projection.columns.abs().max()
        if not bool(torch.isfinite(size) & (size > 0)):
            return None
        k_x, k_s = self._whitenings[index]
        svd, energy = projection.svd(k_s)
        pair, scale = self._pairs[index], self._scale(index)
        captured = float(svd.values[: pair.rank].double().square().sum())
        gradients = _gradient_factor(pair) * self._gradient_batches
        slope = scale * pair.scaling * captured / gradients
        return WhitenedLayer(svd, energy, k_x, k_s, scale, slope)

    def _scale(self, index: int) -> float:
        """See :class:`WhitenedLayer`.

        With a loss that is a mean over ``N`` terms, and with ``d = c g`` where hooks see it,
        ``S = N^2 E[d d^T] / c^2`` and ``G`` is the mean of ``D / c`` over the batches.
        """
        pair = self._pairs[index]
        damped = (1.0 + self._damping) ** 2 * self._means[index]
        terms = self._rows[index] / self._curvature_batches
        seen = _gradient_factor(pair)
        return seen / (damped * terms**2 * self._gradient_batches * pair.scaling)

    def _mean_of_inputs(self, index: int) -> float:
        curvature = self._inputs.of(index)
        assert curvature is not None
        return float(curvature.trace) / self._pairs[index].in_features

    def bytes_held(self) -> int:
        """Most bytes that were held so far; each tensor counts once."""
        self._note_bytes()
        return self._most_bytes

    def _note_bytes(self) -> None:
        held: list[object] = [*self._inputs.distinct(), *self._outputs.values(), self._tests]
        held += [*self._whitenings.values(), *self._sketches.values()]
        held += self._projections.values()
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in _tensors_in(held)}
        now = sum(storage.nbytes() for storage in storages.values())
        self._most_bytes = max(self._most_bytes, now)


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors_in(vars(value))


def _gradient_factor(pair: LoRAPair) -> float:
    """``c`` in ``d = c g``: hooks on B's own module see ``s`` times the layer's gradient."""
    module: nn.Module | None = pair.output_module
    own = module is not None and module._parameters.get("weight") is pair.B
    return pair.scaling if own else 1.0
