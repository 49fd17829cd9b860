"""torch.distributed.checkpoint: saved and loaded on an optimizer that has not stepped yet."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from cg_optim import CGLoRAOptimizer
from tests.models import assert_equal, parameters_of, snapshot, tagger, train


def test_distributed_checkpoint_initialises_a_fresh_optimizer_without_moving_anything() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    before = parameters_of(model)
    state = get_optimizer_state_dict(model, optimizer)
    assert_equal(parameters_of(model), before)
    assert set(state["state"]) == set(before)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert "input_gram" in state["state"]["blocks.0.q.lora_A.weight"]


@pytest.mark.parametrize("steps", [3, 13])
def test_distributed_checkpoint_resumes_bitwise_on_a_fresh_optimizer(steps: int) -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    train(model, optimizer, range(steps))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = tagger(seed=7)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = CGLoRAOptimizer(other, lr=0.5)
    set_optimizer_state_dict(other, resumed, saved)
    train(model, optimizer, range(steps, steps + 5))
    train(other, resumed, range(steps, steps + 5))
    assert_equal(snapshot(other, resumed), snapshot(model, optimizer))


def test_sharing_is_still_found_after_an_empty_first_step() -> None:
    """State that exists only to be saved must not keep q, k and v apart for good."""
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    get_optimizer_state_dict(model, optimizer)
    train(model, optimizer, range(2))
    block = model.blocks[0]
    layers = (block.q, block.k, block.v)
    assert len({optimizer.state[x.lora_A.weight]["input_gram"].data_ptr() for x in layers}) == 1


@pytest.mark.filterwarnings("ignore")  # DCP warns that there is one process only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("curvature", ["auto", 3])
def test_through_files_bitwise(tmp_path: Path, dtype: torch.dtype, curvature: str | int) -> None:
    model = tagger().to(dtype)
    optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=curvature)
    train(model, optimizer, range(13))
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)

    other = tagger(seed=7).to(dtype)
    resumed = CGLoRAOptimizer(other, lr=0.5, curvature=curvature)
    weights, state = get_state_dict(other, resumed)
    loaded = {"model": weights, "optimizer": state}
    checkpoint.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(
        other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    train(model, optimizer, range(13, 20))
    train(other, resumed, range(13, 20))
    assert_equal(snapshot(other, resumed), snapshot(model, optimizer))
