"""The learning rate that is taken where none is given."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cg_optim import CGLoRAOptimizer, LoRAPair, default_learning_rate
from cg_optim.errors import NoPairsWarning
from cg_optim.learning_rate import NARROWEST, WITHOUT_PAIRS, suggested_rate


def pair(n: int, r: int, scaling: float = 2.0, m: int = 6) -> LoRAPair:
    return LoRAPair(
        nn.Parameter(torch.zeros(r, n)),
        nn.Parameter(torch.zeros(m, r)),
        name=f"{n} {r} {m} {scaling}",
        scaling=scaling,
    )


class TwoLayers(nn.Module):
    """One observed layer, and a plain head."""

    def __init__(self, n: int = 64, r: int = 4) -> None:
        super().__init__()
        self.lora_A = nn.Linear(n, r, bias=False)
        self.lora_B = nn.Linear(r, n, bias=False)
        self.head = nn.Linear(n, 2)

    def pair(self) -> LoRAPair:
        return LoRAPair(self.lora_A.weight, self.lora_B.weight, scaling=0.5)


@given(
    n=st.integers(1, 20_000),
    r=st.integers(1, 512),
    scaling=st.floats(1e-3, 1e3),
    factor=st.integers(2, 8),
)
def test_the_rate_falls_with_width_rank_and_scaling(n, r, scaling, factor):
    rate = suggested_rate(n, r, scaling)
    assert 0 < rate < math.inf
    wider = max(factor * n, NARROWEST) / max(n, NARROWEST)
    assert suggested_rate(factor * n, r, scaling) == pytest.approx(rate / wider)
    assert suggested_rate(n, r, -factor * scaling) == pytest.approx(rate / factor ** (2 / 3))
    assert suggested_rate(n, factor**2 * r, scaling) == pytest.approx(rate / factor ** (2 / 3))


def test_rank_stabilised_scaling_needs_no_other_rate_for_another_rank():
    rates = [suggested_rate(768, r, 16 / math.sqrt(r)) for r in (4, 16, 64)]
    assert rates == pytest.approx([rates[0]] * 3)


def test_the_median_pair_decides_and_two_digits_are_kept():
    pairs = [pair(256, 4), pair(256, 4, m=7), pair(4096, 4)]
    assert default_learning_rate(pairs) == float(f"{suggested_rate(256, 4, 2.0):.2g}")
    assert default_learning_rate(iter(pairs)) == default_learning_rate(pairs[:2])


def test_without_pairs_it_is_that_of_adamw():
    assert (
        default_learning_rate([])
        == WITHOUT_PAIRS
        == torch.optim.AdamW([pair(2, 1).A]).defaults["lr"]
    )


def test_the_optimizer_takes_it_for_all_groups_that_name_none():
    model = TwoLayers()
    expected = default_learning_rate([model.pair()])
    groups = [
        {"params": [model.lora_A.weight, model.lora_B.weight]},
        {"params": model.head.parameters(), "lr": 0.25},
    ]
    optimizer = CGLoRAOptimizer(groups, model=model, pairs=[model.pair()])
    assert [group["lr"] for group in optimizer.param_groups] == [expected, 0.25]
    assert optimizer.defaults["lr"] == expected
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert scheduler.get_last_lr() == [expected / 2, 0.125]


def test_a_rate_that_is_given_is_taken():
    model = TwoLayers()
    assert CGLoRAOptimizer(model, lr=3e-3, pairs=[model.pair()]).param_groups[0]["lr"] == 3e-3


def test_pairs_that_are_not_trained_do_not_count():
    model = TwoLayers()
    with pytest.warns(NoPairsWarning):
        optimizer = CGLoRAOptimizer(model.head.parameters(), model=model)
    assert optimizer.param_groups[0]["lr"] == WITHOUT_PAIRS


def test_without_curvature_the_rate_is_that_of_adamw():
    model = TwoLayers()
    optimizer = CGLoRAOptimizer(model, curvature=None)
    assert optimizer.param_groups[0]["lr"] == WITHOUT_PAIRS


def test_a_loaded_rate_wins_over_the_suggested_one():
    model = TwoLayers()
    saved = CGLoRAOptimizer(model, lr=3e-3, pairs=[model.pair()]).state_dict()
    optimizer = CGLoRAOptimizer(model, pairs=[model.pair()])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 3e-3


def test_copies_and_groups_that_are_added_later_have_it_too():
    model = TwoLayers(128)
    factors = [model.lora_A.weight, model.lora_B.weight]
    optimizer = CGLoRAOptimizer(factors, model=model, pairs=[model.pair()])
    optimizer.add_param_group({"params": list(model.head.parameters())})
    expected = default_learning_rate([model.pair()])
    assert expected != WITHOUT_PAIRS
    for each in (optimizer, copy.deepcopy((model, optimizer))[1]):
        assert [group["lr"] for group in each.param_groups] == [expected] * 2
        assert each.defaults["lr"] == expected
