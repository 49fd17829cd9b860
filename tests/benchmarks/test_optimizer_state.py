"""Bytes of optimizer state, however it is nested."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytorch_optimizer")
from benchmarks.optimizer_state import state_bytes
from benchmarks.optimizers import Combined


def holding(**state):
    """An optimizer of one parameter with this state."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = state
    return optimizer


def test_shared_storage_counts_once():
    shared = torch.zeros(100)
    optimizer = holding(a=shared, b=[shared[:50], {"c": torch.zeros(2)}], d=1)
    assert state_bytes(optimizer) == 4 * 102


def test_objects_count_and_parameters_and_modules_do_not():
    inside = SimpleNamespace(factor=torch.zeros(5).double(), model=torch.nn.Linear(9, 9))
    inside.itself = inside
    optimizer = holding(preconditioner=inside, parameter=torch.nn.Parameter(torch.zeros(50)))
    assert state_bytes(optimizer) == 8 * 5


def test_optimizers_that_step_together_add_up():
    both = Combined([holding(a=torch.zeros(3)), holding(a=torch.zeros(4))])
    assert state_bytes(both) == 4 * 7


def test_of_many_parameters():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in range(1, 201)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    assert state_bytes(optimizer) == sum(2 * 4 * len(p) + 4 for p in parameters)
