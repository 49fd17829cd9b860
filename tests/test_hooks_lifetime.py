"""How long hooks and what they hold live: removal, copies of the model, memory."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from cg_optim import CGLoRAOptimizer
from tests.models import (
    LoRALinear,
    assert_equal,
    batch,
    curvature_state,
    loss_of,
    parameters_of,
    snapshot,
    tagger,
    train,
)


def hook_count(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    ) + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def test_remove_hooks_leaves_nothing_and_training_goes_on() -> None:
    model = tagger()
    assert hook_count(model) == 0
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    assert hook_count(model) > 0
    train(model, optimizer, range(3))
    optimizer.remove_hooks()
    optimizer.remove_hooks()
    assert hook_count(model) == 0
    before = curvature_state(model, optimizer)
    train(model, optimizer, range(3, 6))
    assert_equal(curvature_state(model, optimizer), before)


def test_the_context_manager_removes_the_hooks_after_an_error_too() -> None:
    model = tagger()
    with pytest.raises(KeyError), CGLoRAOptimizer(model) as optimizer:
        optimizer.load_state_dict({"state": {}}["param_groups"])
    assert hook_count(model) == 0


def test_an_optimizer_that_is_dropped_takes_its_hooks_along() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model)
    train(model, optimizer, range(1))
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    assert hook_count(model) == 0
    loss_of(model, batch()).backward()


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _torch_save])
def test_copies_of_the_model_are_inert_and_the_original_keeps_its_hooks(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    for step in range(3):
        double = copied(model)
        loss_of(double, batch(70)).backward()
        train(model, optimizer, [step])
        train(reference, other, [step])
    assert_equal(snapshot(model, optimizer), snapshot(reference, other))
    trained = CGLoRAOptimizer(double, lr=1e-2)
    train(double, trained, range(2))
    assert curvature_state(double, trained)


def test_an_average_of_the_weights_kept_beside_the_training_changes_nothing() -> None:
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(4):
        train(model, optimizer, [step])
        average.update_parameters(model)
        with torch.no_grad():
            loss_of(average, batch(70))
        loss_of(average, batch(71)).backward()  # even if somebody trains it
        train(reference, other, [step])
    assert_equal(snapshot(model, optimizer), snapshot(reference, other))
    assert not torch.equal(average.module.head.weight, model.head.weight)


def test_two_optimizers_on_one_model_see_the_same() -> None:
    model, reference = tagger(), tagger()
    first = CGLoRAOptimizer(model.blocks[0], lr=1e-2)
    second = CGLoRAOptimizer(model.blocks[1], lr=1e-2)
    third = CGLoRAOptimizer(model.blocks[1], lr=1e-2)
    whole = CGLoRAOptimizer(reference.blocks, lr=1e-2)
    for step in range(3):
        loss_of(model, batch(step)).backward()
        first.step()
        second.step()
        model.zero_grad()
        loss_of(reference, batch(step)).backward()
        whole.step()
        reference.zero_grad()
    assert_equal(parameters_of(model.blocks), parameters_of(reference.blocks))
    third.remove_hooks()
    before = curvature_state(model, second)
    loss_of(model, batch(9)).backward()
    second.step()
    changed = curvature_state(model, second)
    assert not torch.equal(*(s["blocks.1.q.lora_A.weight.input_gram"] for s in (before, changed)))


# ---------------------------------------------------------------------------- memory


def test_no_input_is_kept_alive_after_backward() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(LoRALinear(6, 5) for _ in range(2))
    optimizer = CGLoRAOptimizer(model)
    # An array lives as long as the storage of any tensor made of it.
    array = np.ones((5, 6), dtype=np.float32)
    reference = weakref.ref(array)
    x = torch.from_numpy(array)
    loss = model[0](x).square().sum() + model[1](x).square().sum()
    del x, array
    gc.collect()
    assert reference() is not None
    loss.backward()
    gc.collect()
    assert reference() is None
    assert loss.grad_fn is not None
    optimizer.step()
    assert optimizer.state[model[0].lora_A.weight]["input_gram"].any()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_number_of_tensors_does_not_grow() -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(4))
    before = alive()
    train(model, optimizer, range(4, 30))
    loss_of(model, batch())
    assert alive() <= before


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_still_frees_the_inputs_inside_its_segments(reentrant: bool) -> None:
    """The memory that checkpointing saves is not given away again by the hooks."""
    references: list[weakref.ref[np.ndarray]] = []

    def segment(x: Tensor) -> Tensor:
        array = np.ones((5, 6), dtype=np.float32)
        references.append(weakref.ref(array))
        return layer(torch.from_numpy(array)) + x.sum()

    torch.manual_seed(0)
    layer = LoRALinear(6, 5)
    optimizer = CGLoRAOptimizer(nn.ModuleList([layer]))
    loss = segment(torch.ones(2, requires_grad=True)).sum()
    gc.collect()
    assert references.pop()() is not None  # as without checkpointing
    loss = checkpoint(segment, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum()
    gc.collect()
    assert references[0]() is None
    loss.backward()
    optimizer.step()
    assert int(optimizer.state[layer.lora_A.weight]["input_updates"]) == 1
