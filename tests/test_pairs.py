"""LoRAPair refuses what is not a pair, and views any layout as (r, n) and (m, r)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cg_optim.errors import CGOptimError, PairError
from cg_optim.pairs import LoRAPair, check_unique


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape).to(dtype))


def pair(**changes: Any) -> LoRAPair:
    return LoRAPair(**{"A": parameter(2, 5), "B": parameter(7, 2), **changes})


def test_sizes() -> None:
    assert (pair().rank, pair().in_features, pair().out_features) == (2, 5, 7)
    assert not pair().observed


def test_sizes_when_transposed() -> None:
    transposed = pair(A=parameter(5, 2), B=parameter(2, 7), transposed=True)
    assert (transposed.rank, transposed.in_features, transposed.out_features) == (2, 5, 7)


def test_sizes_of_a_convolution() -> None:
    convolution = pair(A=parameter(2, 5, 3, 3), B=parameter(7, 2, 1, 1))
    assert (convolution.rank, convolution.in_features, convolution.out_features) == (2, 45, 7)
    a_matrix, b_matrix = convolution.as_matrices(convolution.A, convolution.B)
    assert a_matrix.shape == (2, 45)
    assert b_matrix.shape == (7, 2)


def test_observed_with_both_modules() -> None:
    assert pair(input_module=nn.Identity(), output_module=nn.Identity()).observed


def test_experts_come_as_stacks_of_views() -> None:
    several = pair(A=parameter(6, 5), B=parameter(7, 6), experts=3)
    assert (several.rank, several.in_features, several.out_features) == (2, 5, 7)
    downs, ups = several.as_matrices(several.A.detach(), several.B.detach())
    assert torch.equal(downs, several.A.view(3, 2, 5))
    assert torch.equal(ups, torch.stack([several.B[:, e::3] for e in range(3)]))
    downs.zero_()
    ups.zero_()
    assert not several.A.any()
    assert not several.B.any()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_views(transposed: bool) -> None:
    shapes = ((5, 2), (2, 7)) if transposed else ((2, 5), (7, 2))
    declared = pair(A=parameter(*shapes[0]), B=parameter(*shapes[1]), transposed=transposed)
    a_matrix, b_matrix = declared.as_matrices(declared.A.detach(), declared.B.detach())
    assert a_matrix.shape == (2, 5)
    assert b_matrix.shape == (7, 2)
    a_matrix.zero_()
    b_matrix.zero_()
    assert not declared.A.any()
    assert not declared.B.any()


A_TWICE = parameter(3, 3)

REFUSED = {
    "not a tensor": ({"A": nn.Linear(5, 2)}, "A is a Linear"),
    "integers": (
        {"B": nn.Parameter(torch.ones(7, 2, dtype=torch.int8), requires_grad=False)},
        "B has dtype torch.int8",
    ),
    "a vector": ({"A": parameter(5)}, r"A has shape \(5,\)"),
    "one parameter twice": ({"A": A_TWICE, "B": A_TWICE}, "same parameter"),
    "ranks disagree": ({"B": parameter(7, 3)}, "rank 2 but B .* rank 3.*transposed=True"),
    "transposed by mistake": ({"transposed": True}, "rank 5 but B .* rank 7"),
    "only an input": ({"input_module": nn.Identity()}, "output_module is missing"),
    "only an output": ({"output_module": nn.Identity()}, "input_module is missing"),
    "experts zero": ({"experts": 0}, "experts is 0"),
    "experts a truth value": ({"experts": True}, "experts is True"),
    "experts that do not divide": ({"experts": 3}, r"A \(2, 5\).*do not hold 3 experts"),
    "experts of a convolution": (
        {"A": parameter(2, 5, 3, 3), "B": parameter(7, 2, 1, 1), "experts": 2},
        "do not hold 2 experts",
    ),
    "experts observed": (
        {"experts": 2, "input_module": nn.Identity(), "output_module": nn.Identity()},
        "neither transposed nor observed",
    ),
    "scaling zero": ({"scaling": 0.0}, "scaling is 0.0"),
    "scaling infinite": ({"scaling": float("inf")}, "scaling is inf"),
    "scaling as text": ({"scaling": "2"}, "scaling is '2'"),
    "scaling a truth value": ({"scaling": True}, "scaling is True"),
    "scaling not a number": ({"scaling": float("nan")}, "scaling is nan"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PairError, match=message) as caught:
        pair(name="the.layer", **changes)
    assert str(caught.value).startswith("the.layer: ")


def test_error_is_a_value_error() -> None:
    assert issubclass(PairError, ValueError)
    assert issubclass(PairError, CGOptimError)


def test_unique_pairs_pass() -> None:
    check_unique([pair(name="one"), pair(name="two")])


def test_refuses_two_pairs_of_one_name() -> None:
    with pytest.raises(PairError, match="two pairs are named 'one'"):
        check_unique([pair(name="one"), pair(name="one")])


def test_refuses_a_parameter_in_two_pairs() -> None:
    shared = parameter(2, 5)
    with pytest.raises(PairError, match="A of 'two' already belongs to 'one'"):
        check_unique([pair(A=shared, name="one"), pair(A=shared, name="two")])
