"""Adam's state of one LoRA factor: its precision, and copies of what was saved."""

from __future__ import annotations

import pytest
import torch

from cg_optim.factor_state import as_factor_state, factor_dtype, new_factor_state


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_moments_have_at_least_single_precision(dtype: torch.dtype, expected: torch.dtype) -> None:
    parameter = torch.ones(2, 3, dtype=dtype)
    assert factor_dtype(parameter) == expected
    state = new_factor_state(parameter)
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"].shape == ()
    assert state["step"].dtype == torch.float32
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name].shape == (2, 3)
        assert state[name].dtype == expected
        assert not state[name].any()
    assert state["exp_avg"].data_ptr() != state["exp_avg_sq"].data_ptr()


def test_moments_are_contiguous_whatever_the_parameter_is() -> None:
    state = new_factor_state(torch.ones(3, 2).T)
    assert state["exp_avg"].is_contiguous()
    assert state["exp_avg_sq"].is_contiguous()


def test_saved_values_are_copied_in_their_precision() -> None:
    parameter = torch.ones(2, 3, dtype=torch.bfloat16)
    saved = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.full((2, 3), 1.0 + 2**-20),
        "exp_avg_sq": torch.ones(1, 3).expand(2, 3),
        "something_else": torch.ones(1),
    }
    state = as_factor_state(parameter, saved)
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(state["exp_avg"], saved["exp_avg"])
    state["exp_avg_sq"].mul_(2.0)
    assert torch.equal(saved["exp_avg_sq"], torch.ones(2, 3))
    assert float(state["step"]) == 7.0
