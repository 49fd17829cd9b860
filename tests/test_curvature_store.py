"""Sharing of input curvature between pairs: it saves memory and never changes a number."""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cg_optim.curvature_store import CurvatureStore
from cg_optim.pairs import LoRAPair
from tests.models import assert_equal
from tests.strategies import gaussian, generator

FEATURES, PAIRS = 6, 3
#: What happens between two updates: the pairs that receive one tensor, for each tensor.
updates = st.lists(
    st.lists(st.sets(st.integers(0, PAIRS - 1), min_size=1), max_size=3), min_size=1, max_size=4
)


def pairs(count: int = PAIRS) -> list[LoRAPair]:
    shapes = ((2, FEATURES), (4, 2))
    return [LoRAPair(*(nn.Parameter(torch.zeros(shape)) for shape in shapes)) for _ in range(count)]


def consume(store: CurvatureStore, rows: Tensor, *indices: int) -> None:
    store.consume(rows, torch.ones(len(rows), dtype=torch.bool), indices)


@given(updates=updates, representation=st.sampled_from(["dense", 2]))
def test_every_pair_has_what_it_would_have_alone(
    updates: list[list[set[int]]], representation: str | int
) -> None:
    source = generator(0)
    together = CurvatureStore(pairs(), representation)
    alone = [CurvatureStore(pairs(1), representation) for _ in range(PAIRS)]
    for update in updates:
        for indices in update:
            rows = gaussian(source, 5, FEATURES, dtype=torch.float32)
            consume(together, rows, *sorted(indices))
            for index in indices:
                consume(alone[index], rows, 0)
        together.update()
        for store in alone:
            store.update()
    for index in range(PAIRS):
        assert_equal(together.state(index), alone[index].state(0))


def test_what_arrives_together_is_held_once_until_one_comes_alone() -> None:
    store, source = CurvatureStore(pairs(), "dense"), generator(1)
    consume(store, gaussian(source, 5, FEATURES, dtype=torch.float32), 0, 1, 2)
    assert store.of(0) is store.of(1) is store.of(2)
    store.update()
    consume(store, gaussian(source, 5, FEATURES, dtype=torch.float32), 1)
    assert store.of(0) is store.of(2)
    assert store.of(1) is not store.of(0)
    assert len(store.distinct()) == 2


def test_saved_state_is_shared_again_where_it_is_equal() -> None:
    store, source = CurvatureStore(pairs(), "dense"), generator(2)
    consume(store, gaussian(source, 5, FEATURES, dtype=torch.float32), 0, 2)
    consume(store, gaussian(source, 5, FEATURES, dtype=torch.float32), 1)
    store.update()
    saved = {index: store.state(index) for index in range(PAIRS)}
    other = CurvatureStore(pairs(), "dense")
    other.load_state(saved)
    assert other.of(0) is other.of(2)
    assert other.of(1) is not other.of(0)
    assert_equal({index: other.state(index) for index in range(PAIRS)}, saved)


def test_a_pair_saved_before_its_first_input_joins_the_others_later() -> None:
    store = CurvatureStore(pairs(2), "dense")
    store.state(0)
    assert not store.has_seen(0)
    consume(store, torch.ones(3, FEATURES), 0, 1)
    store.update()
    assert store.of(0) is store.of(1)
    assert store.has_seen(0)


def test_rows_are_dropped_for_all_that_share_them_unless_told_otherwise() -> None:
    store = CurvatureStore(pairs(), "dense")
    consume(store, torch.ones(3, FEATURES), 0, 1)
    consume(store, torch.ones(3, FEATURES), 2)
    assert store.discard_pair(0, torch.tensor(True)) == {0, 1}
    store.update()
    assert store.has_seen(0)
    before = copy.deepcopy(store.state(0))
    consume(store, 2 * torch.ones(3, FEATURES), 0, 1)
    assert store.discard_pair(1, torch.tensor(False)) == {0, 1}
    store.update()
    assert_equal(store.state(0), before)
    assert CurvatureStore(pairs(), "dense").discard_pair(0) == set()
