"""Measures on curves and numbers made by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import metrics


def test_steps_to_target_is_the_first_evaluation_at_or_below():
    steps, losses = [0, 10, 20, 30], [3.0, 2.0, 2.5, 1.0]
    assert metrics.steps_to_target(steps, losses, 2.0) == 10
    assert metrics.steps_to_target(steps, losses, 1.5) == 30
    assert metrics.steps_to_target(steps, losses, 5.0) == 0
    assert metrics.steps_to_target(steps, losses, 0.5) is None
    assert metrics.steps_to_target([0, 10], [3.0, math.nan], 2.0) is None


def test_censored_values_count_as_worse_than_all_others():
    assert metrics.median_censored([10, None, 30]) == 30
    assert metrics.median_censored([10, None, None]) is None
    assert metrics.median_censored([10, 20]) == 15
    assert metrics.median_censored([10, None]) is None
    assert metrics.median_censored([]) is None


def test_diverged_is_non_finite_or_above_the_start():
    assert not metrics.is_diverged([2.0, 3.0, 1.9])
    assert metrics.is_diverged([2.0, 1.0, 2.1])
    assert metrics.is_diverged([2.0, math.nan])
    assert metrics.is_diverged([])


def test_paired_difference_needs_more_than_its_spread():
    ours, theirs = {1: 1.0, 2: 1.1, 3: 1.2}, {1: 1.1, 2: 1.2, 3: 1.3, 4: 9.0}
    difference = metrics.paired_difference(ours, theirs)
    assert difference.count == 3
    assert difference.mean == pytest.approx(-0.1)
    assert difference.verdict == "lower"
    assert metrics.paired_difference(theirs, ours).verdict == "higher"
    noisy = metrics.paired_difference({1: 1.0, 2: 2.0, 3: 1.0}, {1: 1.5, 2: 1.2, 3: 1.4})
    # Differences -0.5, 0.8, -0.4: mean -1/30, standard error 0.4177.
    assert noisy.spread == pytest.approx(2 * 0.41767, rel=1e-4)
    assert noisy.verdict == "level"
    assert metrics.paired_difference({1: 1.0}, {1: 2.0}).verdict == "level"
    assert metrics.paired_difference({1: 1.0}, {2: 2.0}) is None


def test_gap_closed():
    assert metrics.gap_closed(2.0, 1.5, 1.0) == 0.5
    assert metrics.gap_closed(2.0, 0.5, 1.0) == 1.5
    assert metrics.gap_closed(2.0, 2.5, 1.0) == -0.5
    assert metrics.gap_closed(1.0, 1.0, 2.0) is None
    assert metrics.gap_closed(2.0, 1.5, 1.9, spread=0.2) is None
    assert metrics.gap_closed(2.0, math.inf, 1.0) is None


def test_kl_of_two_coins():
    fair, biased = np.log([[0.5, 0.5]] * 3), np.log([[0.25, 0.75]] * 3)
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert metrics.kl_divergence(fair, biased) == pytest.approx(expected)
    assert metrics.kl_divergence(biased, fair) == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    )
    assert metrics.kl_divergence(fair, fair) == 0
    with pytest.raises(ValueError, match="different tokens"):
        metrics.kl_divergence(fair, fair[:2])


def test_kl_of_impossible_classes():
    certain = np.array([[0.0, -np.inf]])
    fair = np.log([[0.5, 0.5]])
    assert metrics.kl_divergence(certain, fair) == pytest.approx(math.log(2))
    assert metrics.kl_divergence(certain, certain) == 0


def test_kl_survives_half_precision():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 50, 256))
    second = first + 0.3 * second

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    first, second = log_softmax(first), log_softmax(second)
    exact = metrics.kl_divergence(first, second)
    stored = metrics.kl_divergence(first.astype(np.float16), second.astype(np.float16))
    assert stored == pytest.approx(exact, rel=0.02)


def test_good_range_is_interpolated_between_the_grid():
    losses = {1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}
    width = metrics.good_range(losses, 1.5)
    assert width.low == pytest.approx(10**-2.5)
    assert width.high == pytest.approx(10**-1.75)
    assert not width.is_open
    assert width.ratio == pytest.approx(10**0.75)


def test_good_range_ends_beside_a_diverged_run_and_is_open_at_the_edge():
    width = metrics.good_range({1e-3: 1.1, 1e-2: 1.0, 1e-1: math.inf}, 1.5)
    assert (width.low, width.high) == (1e-3, 1e-2)
    assert (width.low_open, width.high_open) == (True, False)
    assert metrics.good_range({1e-2: 1.0}, 0.5) is None
    assert metrics.good_range({1e-2: math.inf}, 0.5) is None


def test_good_range_is_contiguous():
    losses = {1e-4: 1.0, 1e-3: 2.0, 1e-2: 0.9, 1e-1: 2.0}
    width = metrics.good_range(losses, 1.2)
    assert width.low > 1e-3


@given(st.lists(st.floats(0.5, 3.0), min_size=3, max_size=9), st.floats(1.0, 2.0))
def test_good_range_contains_the_best_and_grows_with_the_level(losses, factor):
    curve = {10.0**-i: loss for i, loss in enumerate(losses)}
    best = min(sorted(curve), key=curve.get)
    narrow = metrics.good_range(curve, min(losses) * 1.01)
    wide = metrics.good_range(curve, min(losses) * 1.01 * factor)
    assert wide.low <= narrow.low <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= narrow.high <= wide.high


def test_classification_metrics_by_hand():
    labels, predicted = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])
    found = metrics.classification_metrics(labels, predicted)
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    # tp 2, tn 1, fp 1, fn 1
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert set(metrics.classification_metrics(np.array([0, 2]), np.array([0, 1]))) == {"accuracy"}
    constant = metrics.classification_metrics(labels, np.ones(5, dtype=int))
    assert constant["matthews"] == 0


def test_mean_reciprocal_rank_counts_ties_against():
    scores = np.array([[3.0, 1.0, 2.0], [5.0, 4.0, 1.0], [1.0, 1.0, 1.0]])
    assert metrics.mean_reciprocal_rank(scores) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
