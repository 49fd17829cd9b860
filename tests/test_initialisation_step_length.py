"""The search for a step length on functions whose minimum is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cg_optim.initialisation.step_length import FACTOR, search_length


@given(power=st.floats(-3.5, 3.5))
def test_the_minimum_of_a_parabola_is_found_to_half_a_grid_step(power: float) -> None:
    minimum = 10.0**power
    length, loss = search_length(lambda t: (t / minimum - 1) ** 2, 1.0)
    assert minimum / FACTOR**0.5 < length < minimum * FACTOR**0.5
    assert loss == (length / minimum - 1) ** 2


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
