"""One layer input between forward and backward: which rows count, and that it is let go."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from cg_optim.capture import Capture


def captured(x: Tensor, *pair_indices: int) -> Capture:
    capture = Capture(x, generation=0)
    for index in pair_indices:
        capture.add_pair(index)
    return capture


def test_it_waits_for_every_pair_and_a_row_counts_for_any_of_them() -> None:
    x = torch.randn(2, 2, 3)
    capture = captured(x, 0, 1)
    first, second = torch.zeros(2, 2, 5), torch.zeros(2, 2, 4)
    first[0, 0, 2] = 1.0
    second[1, 1, 0] = -1.0
    assert not capture.started
    assert not capture.gradient_arrived(first)
    assert capture.started
    assert capture.gradient_arrived(second)
    rows, mask = capture.take()
    assert torch.equal(rows, x.reshape(4, 3))
    assert mask.tolist() == [True, False, False, True]
    assert not capture.started


def test_a_gradient_that_is_not_finite_is_one() -> None:
    capture = captured(torch.ones(2, 3), 0)
    assert capture.gradient_arrived(torch.tensor([[float("nan"), 0.0], [0.0, 0.0]]))
    assert capture.take()[1].tolist() == [True, False]


def test_a_pair_joins_once_and_not_after_the_first_gradient() -> None:
    capture = captured(torch.ones(2, 3), 0)
    assert not capture.accepts(0)
    assert capture.accepts(1)
    capture.gradient_arrived(torch.ones(2, 3))
    assert not capture.accepts(1)


def test_after_it_was_taken_nothing_is_awaited() -> None:
    capture = captured(torch.ones(2, 3), 0)
    assert capture.gradient_arrived(torch.ones(2, 3))
    capture.take()
    assert not capture.gradient_arrived(torch.ones(2, 3))
    assert not capture.accepts(1)


def test_rows_can_be_masked_out_later() -> None:
    capture = captured(torch.ones(2, 3), 0)
    capture.mask_unless(torch.tensor(False))  # before any gradient: there is no mask yet
    capture.gradient_arrived(torch.ones(2, 3))
    capture.mask_unless(torch.tensor(True))
    assert capture._mask is not None
    assert capture._mask.all()
    capture.mask_unless(torch.tensor(False))
    assert not capture.take()[1].any()


@pytest.mark.parametrize("taken", [True, False])
def test_the_input_is_let_go(taken: bool) -> None:
    x = torch.ones(2, 3)
    storage = weakref.ref(x.untyped_storage())
    capture = captured(x, 0)
    if taken:
        capture.gradient_arrived(torch.ones(2, 3))
        capture.take()
    else:
        capture.release()
    del x
    gc.collect()
    assert storage() is None


def test_it_is_kept_the_way_autograd_keeps_activations() -> None:
    """So that activation checkpointing and offloading, which hook there, still free it."""
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        seen.append(tensor)
        return len(seen) - 1

    x = torch.randn(2, 3)
    with saved_tensors_hooks(pack, lambda number: 2.0 * seen[number]):
        capture = captured(x, 0)
    capture.gradient_arrived(torch.ones(2, 3))
    assert torch.equal(capture.take()[0], 2.0 * x)


def test_an_input_that_the_model_writes_over_is_lost_without_an_error() -> None:
    x = torch.ones(2, 3)
    capture = captured(x, 0)
    x.add_(1.0)
    assert not capture.gradient_arrived(torch.ones(2, 3))
    assert capture.overwritten
    assert not capture.started


def test_other_errors_of_saved_tensors_are_the_users_to_see() -> None:
    def unpack(_: object) -> Tensor:
        raise RuntimeError("the disk of the offloaded activations is full")

    with saved_tensors_hooks(lambda tensor: tensor, unpack):
        capture = captured(torch.ones(2, 3), 0)
    with pytest.raises(RuntimeError, match="disk"):
        capture.gradient_arrived(torch.ones(2, 3))


def test_inference_tensors_can_be_captured() -> None:
    with torch.inference_mode():
        x = torch.randn(2, 3)
    capture = captured(x, 0)
    capture.gradient_arrived(torch.ones(2, 3))
    assert torch.equal(capture.take()[0], x)
