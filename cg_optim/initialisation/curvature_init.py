"""The public function: statistics of a few batches, and every adapter set by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cg_optim import arguments
from cg_optim.alignment import Factors
from cg_optim.errors import HyperparameterError, InitialisationError, NumericalWarning, warn
from cg_optim.initialisation.base_weights import BaseWeight, find_base_weights, move
from cg_optim.initialisation.fresh import check_fresh
from cg_optim.initialisation.low_rank import balanced_factors, row_space, with_norm_of
from cg_optim.initialisation.report import InitReport, layer_report
from cg_optim.initialisation.statistics import Statistics, WhitenedLayer
from cg_optim.initialisation.step_length import search_length
from cg_optim.initialisation.surroundings import (
    left_alone,
    progress_bar,
    under_autocast_of_now,
)
from cg_optim.pairs import LoRAPair

MODES = ("keep", "newton", "shift")
#: Raised with every change of what is computed here, so that old measurements can be told apart.
START_VERSION = 3
#: Mean loss of one batch; what a batch is, only this function knows.
LossFunction = Callable[[nn.Module, Any], Tensor]


def curvature_init_(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    mode: str = "keep",
    sampled_loss_fn: LossFunction | None = None,
    length: float | None = None,
    damping: float = 0.3,
    curvature: str | int = "auto",
    pairs: Iterable[LoRAPair] = (),
    seed: int = 0,
    progress: bool = True,
) -> InitReport:
    r"""Set the LoRA factors of a model from the curvature and gradient of a few batches.

    Estimates, for each layer, the input curvature ``X = E[x x^T]``, the output curvature
    ``S = E[g g^T]`` and the leading directions of the gradient whitened by both
    (:mod:`cg_optim.initialisation.low_rank` has the equations).  The first half of the
    batches gives the curvature and the subspace, the second half the step inside it; the
    length of the step is searched on the first batch, to which its coefficients are not
    fitted and whose loss is known.  Two batches are often enough; a single one is used for all.
    No matrix of the size of a weight is built in modes ``"keep"`` and ``"newton"``.

    >>> curvature_init_(model, batches, lambda model, batch: model(**batch).loss)
    >>> optimizer = CGLoRAOptimizer(model, lr=1e-3)

    Modes:

    * ``"keep"``: ``A`` spans the leading right directions, as long as it was before, and
      ``B`` stays zero.  Outputs are bitwise what they were.
    * ``"newton"``: the best rank-``r`` approximation of a Newton step (Curvature-Guided
      LoRA, arXiv:2603.29824, without shift).  Its length is searched on the first batch.
    * ``"shift"``: the same factors, subtracted from the frozen weights, one layer at a
      time, so that the model starts where it was.  ``report.restore_base_()`` moves the
      weights back.

    Only active adapters are changed, and only those with ``B = 0``.  Gradients, hooks,
    ``requires_grad`` and the random state are as before afterwards, also after an error;
    an error in ``loss_fn`` leaves the adapters as they were.  Distributed: call it on every
    rank with the same batches, before the model is wrapped.

    Args:
        model: A model with fresh adapters, in the mode (train or eval) to be seen in.
        batches: A few batches, at least one; all of them are kept in memory.
        loss_fn: Mean loss of one batch; runs the model, under autocast if that is wanted.
        mode: ``"keep"``, ``"newton"`` or ``"shift"``.
        sampled_loss_fn: Like ``loss_fn``, with labels drawn from the model's own
            predictions: makes ``S`` the Fisher (Gauss-Newton) factor.  Without it ``S`` is
            the empirical one, from the true labels.
        length: Length of the Newton step instead of a search; 1 is the full step.
        damping: Damping of ``X`` and ``S`` relative to their mean eigenvalues.
        curvature: How ``X`` and ``S`` are held, as in :class:`~cg_optim.CGLoRAOptimizer`.
        pairs: Pairs declared by hand, in addition to those found.
        seed: Of the sketches and of everything random in the model's forward passes.
        progress: Whether to show a bar, if it takes long and ``tqdm`` is installed.

    Returns:
        Captured energy, effective and suggested rank of every layer.

    Raises:
        InitialisationError: If an adapter is trained already or has a rank above what its
            layer allows, if there is no batch or no layer to initialise, or if mode
            ``"shift"`` meets a quantized or unknown base weight.  Nothing was changed then.
        HyperparameterError: If ``mode``, ``length``, ``damping`` or ``curvature`` is out of
            range.
        AdapterError: If the adapters are frozen, merged or disabled.
        PairError: If a declared pair is none, or two share a parameter or a name.
        ParameterError: If ``model`` is not a module.
    """
    _check_numbers(mode, length, damping, curvature)
    found = arguments.discover(model, arguments.as_pairs(pairs)).pairs
    observed = [pair for pair in found if pair.observed]
    left_out = {pair.name: pair.note or "not observed" for pair in found if not pair.observed}
    if not observed:
        raise InitialisationError(
            f"no LoRA layer of this {type(model).__name__} can be observed; add adapters first, or "
            "declare them with pairs=[LoRAPair(...)]"
        )
    check_fresh(observed)
    bases = find_base_weights(observed) if mode == "shift" else {}
    data = list(batches)
    if not data:
        raise InitialisationError("there is no batch to learn from; pass at least one")
    loss_fn = under_autocast_of_now(loss_fn, observed)
    if sampled_loss_fn is not None:
        sampled_loss_fn = under_autocast_of_now(sampled_loss_fn, observed)

    with left_alone(model, observed, seed):
        statistics = Statistics(observed, curvature, damping, seed)
        loss_at_zero = _observe(
            model, data, loss_fn, sampled_loss_fn, statistics, seed=seed, progress=progress
        )
        layers = {i: statistics.whitened(i) for i in range(len(observed))}
        usable = {observed[i]: layer for i, layer in layers.items() if layer is not None}
        unusable = [observed[i].name for i, layer in layers.items() if layer is None]
        left_out |= dict.fromkeys(unusable, "no gradient, or not a finite one")
        report = InitReport(
            mode,
            tuple(layer_report(p, layer.svd.values, layer.energy) for p, layer in usable.items()),
            left_out,
            bytes_held=statistics.bytes_held(),
        )

        def loss_now() -> float:
            torch.manual_seed(seed)  # the same dropout for every length
            return float(loss_fn(model, data[0]))

        with torch.no_grad():
            if mode == "keep":
                _keep(usable)
            else:
                _newton(usable, length, loss_at_zero, loss_now, report)
                _shift(usable, bases, report)
    return report


def _observe(
    model: nn.Module,
    data: Sequence[Any],
    loss_fn: LossFunction,
    sampled_loss_fn: LossFunction | None,
    statistics: Statistics,
    *,
    seed: int,
    progress: bool,
) -> float:
    """All forward and backward passes; returns the loss of the first batch."""
    first, second = _halves(data)
    losses: list[Tensor] = []

    def learn_from(loss: Tensor) -> Tensor:
        loss.backward()
        statistics.end_of_batch()
        model.zero_grad(set_to_none=True)
        advance()
        return loss.detach()

    passes = len(first) * (1 if sampled_loss_fn is None else 2) + len(second)
    try:
        with progress_bar(passes, progress) as advance, torch.enable_grad():
            for batch in first:
                if sampled_loss_fn is not None:
                    statistics.rows_wanted = False
                    learn_from(sampled_loss_fn(model, batch))
                    statistics.curvature_wanted, statistics.rows_wanted = False, True
                if not losses:
                    torch.manual_seed(seed)  # the dropout that the search will meet
                losses.append(learn_from(loss_fn(model, batch)))
                statistics.curvature_wanted = True
            statistics.start_projecting()
            for batch in second:
                learn_from(loss_fn(model, batch))
    finally:
        statistics.close()
    return float(losses[0])


def _halves(data: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The batches for the curvature and for the gradient; a single one is for both."""
    half = len(data) // 2
    return (data[:half], data[half:]) if half else (data, data)


def _check_numbers(
    mode: str, length: float | None, damping: float, curvature: str | int | None
) -> None:
    if mode not in MODES:
        raise HyperparameterError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if length is not None and not 0.0 < length < math.inf:
        raise HyperparameterError(f"length is {length!r}; expected a number > 0, or None")
    arguments.check_damping(damping)
    if curvature is None:
        raise HyperparameterError("curvature is None; expected 'auto', 'dense' or an integer")
    arguments.check_curvature(curvature)


# ---------------------------------------------------------------------- the three modes


def _keep(layers: dict[LoRAPair, WhitenedLayer]) -> None:
    for pair, layer in layers.items():
        down, _ = pair.as_matrices(pair.A.data, pair.B.data)
        rows = row_space(layer.svd.right, pair.rank, layer.k_x)
        down.copy_(with_norm_of(down.to(rows), rows))


def _newton(
    layers: dict[LoRAPair, WhitenedLayer],
    length: float | None,
    loss_at_zero: float,
    loss_now: Callable[[], float],
    report: InitReport,
) -> None:
    """The balanced factors at a given or found length; mode "keep" if no length is any good."""
    full = {
        pair: balanced_factors(layer.svd, pair.rank, layer.k_x, layer.k_s)
        for pair, layer in layers.items()
    }

    def set_length(value: float) -> None:
        for pair, start in full.items():
            root = math.sqrt(value * abs(layers[pair].scale))
            sign = math.copysign(1.0, layers[pair].scale)
            down, up = pair.as_matrices(pair.A.data, pair.B.data)
            down.copy_(root * start.down)
            up.copy_(sign * root * start.up)

    def loss_at(value: float) -> float:
        set_length(value)
        return loss_now()

    if length is None:
        fresh = {pair: Factors(pair.A.detach().clone(), pair.B.detach().clone()) for pair in layers}

        def take_back() -> None:
            for pair, start in fresh.items():
                pair.A.copy_(start.down)
                pair.B.copy_(start.up)

        report.loss_before = loss_at_zero
        try:
            length, report.loss_after = search_length(
                loss_at, loss_at_zero, sum(layer.slope for layer in layers.values())
            )
        except BaseException:
            take_back()
            raise
        if length == 0.0:
            warn(
                "no step along the Newton direction lowers the loss; the adapters start with B = 0 "
                "as in mode 'keep'",
                NumericalWarning,
            )
            take_back()
            _keep(layers)
            report.length = 0.0
            return
    report.length = length
    set_length(length)


def _shift(
    layers: dict[LoRAPair, WhitenedLayer], bases: dict[LoRAPair, BaseWeight], report: InitReport
) -> None:
    """Take the adapters' start out of the frozen weights, one layer after the other."""
    for pair in layers:
        if pair in bases and report.length:
            start = Factors(*pair.as_matrices(pair.A.detach(), pair.B.detach()))
            report.moved[pair.name] = move(bases[pair], start, pair.scaling)
