"""The protocol's measures, as pure functions of curves and numbers.

Losses are held-out cross-entropies (or squared errors), smaller is better. *Censored* means: not
seen within the budget; such a value is ``None`` here and counts as worse than any seen one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def steps_to_target(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The first evaluated step whose loss is at or below ``target``, ``None`` if there is none."""
    for step, loss in zip(steps, losses, strict=True):
        if loss <= target:
            return step
    return None


def median_censored(values: Sequence[float | None]) -> float | None:
    """Median with censored values above all others; ``None`` if the median itself is censored."""
    if not values:
        return None
    ordered = sorted(math.inf if value is None else value for value in values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return median if math.isfinite(median) else None


def is_diverged(losses: Sequence[float]) -> bool:
    """Whether a run ended non-finite or above its initial loss."""
    return not losses or not all(map(math.isfinite, losses)) or losses[-1] > losses[0]


@dataclass(frozen=True)
class Paired:
    """A difference paired over seeds: its mean and two standard errors of it."""

    mean: float
    spread: float
    count: int

    @property
    def verdict(self) -> str:
        """``lower``, ``higher`` or, within the spread, ``level``."""
        if self.count < 2 or not math.isfinite(self.mean) or abs(self.mean) <= self.spread:
            return "level"
        return "lower" if self.mean < 0 else "higher"


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Paired | None:
    """``ours - theirs`` over the seeds that both have; ``None`` without a common seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    return Paired(*mean_and_spread(differences), len(differences))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and two standard errors; the spread of a single value is infinite."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, 2 * math.sqrt(variance / len(values))


def gap_closed(adamw: float, loss: float, full: float, *, spread: float = 0.0) -> float | None:
    """Share of the gap between tuned AdamW on LoRA and full fine-tuning that a method closes.

    Args:
        adamw: loss of tuned AdamW.
        loss: loss of the method.
        full: loss of the better full fine-tuning.
        spread: two standard errors of ``adamw - full``; within it there is no gap to speak of.

    Returns:
        1 at the level of full fine-tuning, 0 at AdamW's; ``None`` where it does not apply.
    """
    gap = adamw - full
    if not math.isfinite(gap) or not math.isfinite(loss) or gap <= 0 or gap <= spread:
        return None
    return (adamw - loss) / gap


def kl_divergence(reference: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Mean ``KL(reference || other)`` in nats per token.

    Args:
        reference: log-probabilities, shape (..., classes).
        other: log-probabilities of the same tokens.
    """
    if reference.shape != other.shape:
        raise ValueError(
            f"predictions of different tokens: shapes {reference.shape} and {other.shape}"
        )
    first = reference.astype(np.float64)
    second = other.astype(np.float64)
    # A class of probability zero adds nothing, whatever its logarithm says (-inf - x, or NaN).
    with np.errstate(invalid="ignore"):
        terms = np.exp(first) * (first - second)
    return float(np.where(np.isneginf(first), 0.0, terms).sum(-1).mean())


@dataclass(frozen=True)
class Width:
    """An interval of good learning rates; an end that was not left is open."""

    low: float
    high: float
    low_open: bool
    high_open: bool

    @property
    def ratio(self) -> float:
        """``high / low``; a lower bound if an end is open."""
        return self.high / self.low

    @property
    def is_open(self) -> bool:
        """Whether the sweep ended inside the band on some side."""
        return self.low_open or self.high_open


def good_range(losses: Mapping[float, float], level: float) -> Width | None:
    """The contiguous interval of learning rates around the best with a loss of ``level`` or less.

    Ends are interpolated linearly in the loss over the logarithm of the learning rate. Next to a
    diverged run there is nothing to interpolate: the interval ends at the last good value.

    Args:
        losses: learning rate to loss, infinite where the run diverged.
        level: upper end of the band.

    Returns:
        ``None`` if even the best loss is above ``level``.
    """
    rates = sorted(losses)
    finite = [rate for rate in rates if math.isfinite(losses[rate])]
    best = min(finite, key=lambda rate: losses[rate], default=None)
    if best is None or losses[best] > level:
        return None

    def end(direction: int) -> tuple[float, bool]:
        position = rates.index(best)
        while True:
            following = position + direction
            if not 0 <= following < len(rates):
                return rates[position], True
            inside, outside = losses[rates[position]], losses[rates[following]]
            if outside <= level:
                position = following
                continue
            if not math.isfinite(outside):
                return rates[position], False
            share = (level - inside) / (outside - inside)
            start, stop = math.log(rates[position]), math.log(rates[following])
            return math.exp(start + share * (stop - start)), False

    low, low_open = end(-1)
    high, high_open = end(1)
    return Width(low, high, low_open, high_open)


def classification_metrics(
    labels: NDArray[np.integer], predicted: NDArray[np.integer]
) -> dict[str, float]:
    """Accuracy; with two classes also F1 of class 1 and Matthews' correlation."""
    metrics = {"accuracy": float((labels == predicted).mean())}
    if set(np.unique(labels)) <= {0, 1}:
        tp = float(((labels == 1) & (predicted == 1)).sum())
        tn = float(((labels == 0) & (predicted == 0)).sum())
        fp = float(((labels == 0) & (predicted == 1)).sum())
        fn = float(((labels == 1) & (predicted == 0)).sum())
        metrics["f1"] = 2 * tp / max(2 * tp + fp + fn, 1.0)
        denominator = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        metrics["matthews"] = (tp * tn - fp * fn) / denominator if denominator else 0.0
    return metrics


def mean_reciprocal_rank(scores: NDArray[np.floating]) -> float:
    """Mean reciprocal rank of the diagonal of a square score matrix, ties counted against it."""
    ranks = (scores >= np.diagonal(scores)[:, None]).sum(1)
    return float((1.0 / ranks).mean())
