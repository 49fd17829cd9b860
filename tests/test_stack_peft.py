"""PEFT's life cycle of adapters: several, switched, added, deleted, disabled, merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from cg_optim import CGLoRAOptimizer
from cg_optim.errors import AdapterError
from tests.models import assert_equal, parameters_of
from tests.test_hooks_lifetime import hook_count

peft = pytest.importorskip("peft")


def config(**arguments: Any) -> Any:
    return peft.LoraConfig(r=2, target_modules=["0", "2"], **arguments)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    return peft.get_peft_model(base, config())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 2) -> set[str]:
    """Train; the names of the parameters that moved."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(times):
        model(torch.randn(6, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def named(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if f".{adapter}." in n}


def test_only_the_active_adapter_moves_and_a_new_one_can_join(model: Any) -> None:
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    assert step(model, optimizer) == set(named(model, "default"))
    model.add_adapter("two", config())
    model.set_adapter("two")
    second = named(model, "two")
    optimizer.add_param_group({"params": list(second.values()), "lr": 3e-2})
    assert step(model, optimizer) == set(second)
    for name, parameter in second.items():
        assert ("input_gram" in optimizer.state[parameter]) == ("lora_A" in name)
    model.set_adapter("default")
    assert step(model, optimizer) == set(named(model, "default"))


def test_each_adapter_may_have_an_optimizer_of_its_own(model: Any) -> None:
    first = CGLoRAOptimizer(model, lr=1e-2)
    model.add_adapter("two", config())
    model.set_adapter("two")
    second = CGLoRAOptimizer(model, lr=1e-2)
    assert step(model, second) == set(named(model, "two"))
    model.set_adapter("default")
    assert step(model, first) == set(named(model, "default"))
    assert not any({**first.diagnostics(), **second.diagnostics()}.values())


def test_deleting_an_adapter_lets_the_others_train_on(model: Any) -> None:
    model.add_adapter("two", config())
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    step(model, optimizer)
    model.delete_adapter("two")
    assert step(model, optimizer) == set(named(model, "default"))


def test_a_pass_with_the_adapter_disabled_or_merged_leaves_no_trace(model: Any) -> None:
    twin = copy.deepcopy(model)
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(twin, lr=1e-2)
    torch.manual_seed(1)
    step(model, optimizer)
    with model.disable_adapter():
        model(torch.ones(1, 8))
    base = copy.deepcopy(model.get_base_model().state_dict())
    model.merge_adapter()
    model(torch.ones(1, 8))
    model.unmerge_adapter()
    model.get_base_model().load_state_dict(base)  # unmerging rounds
    torch.manual_seed(2)
    step(model, optimizer)
    torch.manual_seed(1)
    step(twin, other)
    torch.manual_seed(2)
    step(twin, other)
    assert_equal(parameters_of(model), parameters_of(twin))


def test_merging_for_good_leaves_a_model_without_hooks(model: Any) -> None:
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    step(model, optimizer)
    x = torch.randn(3, 8)
    expected = model(x).detach()
    merged = model.merge_and_unload()
    assert hook_count(merged) == 0
    torch.testing.assert_close(merged(x), expected)
    optimizer.step()


def test_merged_disabled_and_frozen_adapters_are_refused(model: Any) -> None:
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merge"):
        CGLoRAOptimizer(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(AdapterError, match="disable"):
        CGLoRAOptimizer(model)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(AdapterError, match=r"frozen|requires_grad"):
        CGLoRAOptimizer(frozen)
    assert hook_count(model) == hook_count(frozen) == 0


def test_adapter_weights_saved_by_peft_hold_no_hooks(model: Any, tmp_path: Any) -> None:
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    step(model, optimizer)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert_equal(parameters_of(loaded), parameters_of(model))


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_rslora": True}])
def test_variants_of_the_layer_train_with_healthy_numbers(variant: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    model = peft.get_peft_model(base, config(**variant))
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    moved = step(model, optimizer, 3)
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(optimizer.diagnostics().values())
