"""The search for a step length on functions whose minimum is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cg_optim.initialisation.step_length import FACTOR, FIRST, search_length


@given(power=st.floats(-3.5, 2.0))
def test_most_of_what_a_parabola_allows_is_gained(power: float) -> None:
    minimum = 10.0**power
    length, loss = search_length(lambda t: (t / minimum - 1) ** 2, 1.0)
    assert loss < 0.3
    assert loss == (length / minimum - 1) ** 2


@given(power=st.floats(-3.0, 2.0))
def test_the_vertex_is_exact_in_the_logarithm(power: float) -> None:
    minimum = 10.0**power
    length, _ = search_length(lambda t: math.log(t / minimum) ** 2 - 100.0, 0.0)
    assert length == pytest.approx(minimum, rel=1e-6)


def test_it_costs_few_evaluations() -> None:
    seen: list[float] = []

    def loss(t: float) -> float:
        seen.append(t)
        return (t / 0.01 - 1) ** 2

    search_length(loss, 1.0)
    assert len(seen) == len(set(seen)) <= 5


@pytest.mark.parametrize("wall", [1e-3, 0.02, 0.5])
def test_lengths_that_break_the_model_are_passed_over(wall: float) -> None:
    def loss(t: float) -> float:
        return math.nan if t > wall else 1 - t

    length, found = search_length(loss, 1.0)
    assert wall / FACTOR <= length <= wall
    assert found == 1 - length


def test_no_step_if_none_helps() -> None:
    assert search_length(lambda t: 1 + t, 1.0) == (0.0, 1.0)
    assert search_length(lambda _: math.inf, 1.0) == (0.0, 1.0)


def test_a_flat_loss_ends_the_search() -> None:
    assert search_length(lambda _: 0.5, 1.0)[1] == 0.5
    assert search_length(lambda _: 0.5, 1.0)[0] <= FIRST
