"""Which pairs are found in loralib's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cg_optim.discovery import find_lora_pairs
from cg_optim.errors import AdapterError
from tests.lora_layers import (
    M,
    N,
    R,
    Stack,
    check_hooks,
    check_product,
    only_pair,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_loralib_linear() -> None:
    loralib = pytest.importorskip("loralib")
    layer = loralib.Linear(N, M, r=R, lora_alpha=5, fan_in_fan_out=True)
    nn.init.normal_(layer.lora_B)
    pair = only_pair(find_lora_pairs(Stack(layer)))
    assert (pair.name, pair.kind, pair.scaling) == ("layers.0", "loralib.Linear", 2.5)
    assert pair.input_module is layer
    assert pair.output_module is layer
    check_product(pair, layer)
    check_hooks(pair, lambda: layer(torch.randn(3, 4, N)))


def test_loralib_merges_in_eval_mode() -> None:
    loralib = pytest.importorskip("loralib")
    model = Stack(loralib.Linear(N, M, r=R)).eval()
    with pytest.raises(AdapterError, match=r"layers\.0: .*merged.*model\.train\(\)"):
        find_lora_pairs(model)
    assert find_lora_pairs(model.train()).pairs


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("MergedLinear", {"enable_lora": [True, False, True]}, "fused projections"),
        ("MergedLinear", {"enable_lora": [True, True, True]}, "fused projections"),
        ("Embedding", {}, "embedding adapter"),
    ],
)
def test_loralib_left_out(name: str, arguments: dict[str, Any], reason: str) -> None:
    loralib = pytest.importorskip("loralib")
    found = find_lora_pairs(getattr(loralib, name)(N, 3 * M, r=R, **arguments))
    assert found.pairs == ()
    assert found.left_out.keys() == {"lora_A", "lora_B"}
    assert all(text.startswith(reason) for text in found.left_out.values())


@pytest.mark.parametrize(
    ("name", "arguments", "note"),
    [
        ("MergedLinear", {"enable_lora": [False, True, False]}, "in a layer not known"),
        ("Conv2d", {"kernel_size": 3}, "convolution"),
    ],
)
def test_loralib_not_observed(name: str, arguments: dict[str, Any], note: str) -> None:
    loralib = pytest.importorskip("loralib")
    layer = getattr(loralib, name)(N, 3 * M, r=R, lora_alpha=3, **arguments)
    pair = only_pair(find_lora_pairs(layer))
    assert not pair.observed
    assert pair.note.startswith(note)
    assert pair.scaling == 1.5
