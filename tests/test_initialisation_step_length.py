"""The search for a step length on functions whose minimum is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cg_optim.initialisation.step_length import FIRST, STEPS, search_length

powers = st.floats(-6.0, 3.0)


@given(power=powers, bottom=st.floats(0.0, 0.5))
def test_most_of_what_a_parabola_allows_is_gained(power: float, bottom: float) -> None:
    minimum = 10.0**power
    slope = 2.0 * (1.0 - bottom) / minimum

    def loss_at(t: float) -> float:
        return bottom + (1.0 - bottom) * (t / minimum - 1) ** 2

    length, loss = search_length(loss_at, 1.0, slope)
    assert loss == loss_at(length)
    assert loss < bottom + 0.3 * (1.0 - bottom)


@given(power=powers, share=st.floats(0.05, 0.5), bottom=st.floats(0.7, 0.95))
def test_a_slope_that_promises_too_much_costs_little(
    power: float, share: float, bottom: float
) -> None:
    """Held-out losses fall by a fraction of what the slope says, to somewhere above zero."""
    minimum = 10.0**power
    slope = 2.0 * (1.0 - bottom) / minimum / share

    def loss_at(t: float) -> float:
        return bottom + (1.0 - bottom) * (t / minimum - 1) ** 2

    length, loss = search_length(loss_at, 1.0, slope)
    assert length <= FIRST / slope
    assert loss < 1.0


def counting(function, seen: list[float]):
    def loss_at(t: float) -> float:
        seen.append(t)
        return function(t)

    return loss_at


def test_one_forward_pass_is_enough_where_the_first_length_is_good() -> None:
    seen: list[float] = []
    search_length(counting(lambda t: 1.0 - 0.2 * t + 0.2 * t**2, seen), 1.0, slope=0.6)
    assert seen == [FIRST / 0.6]


@pytest.mark.parametrize("wall", [1e-3, 0.02, 0.2])
def test_lengths_that_break_the_model_are_passed_over(wall: float) -> None:
    seen: list[float] = []
    loss_at = counting(lambda t: math.nan if t > wall else 1 - t, seen)
    length, found = search_length(loss_at, 1.0, slope=1.0)
    assert wall / 4 <= length <= wall
    assert found == 1 - length
    assert len(seen) == len(set(seen)) <= STEPS
    assert seen[-1] == length  # the first that is good ends a search that went down


def test_no_step_if_none_helps() -> None:
    assert search_length(lambda t: 1 + t, 1.0, 1.0) == (0.0, 1.0)
    assert search_length(lambda _: math.inf, 1.0, 1.0) == (0.0, 1.0)
    assert search_length(lambda _: 1.0, 1.0, 1.0) == (0.0, 1.0)


@pytest.mark.parametrize(("loss", "slope"), [(math.nan, 1.0), (1.0, 0.0), (1.0, math.nan)])
def test_no_step_without_a_loss_or_a_slope(loss: float, slope: float) -> None:
    length, found = search_length(lambda _: 0.0, loss, slope)
    assert length == 0.0
    assert found is loss


def test_a_negative_loss_has_a_first_length_too() -> None:
    length, loss = search_length(lambda t: (t - 0.05) ** 2 - 1, -1 + 0.05**2, slope=0.1)
    assert 0.04 < length < 0.07
    assert loss < -1 + 0.05**2
