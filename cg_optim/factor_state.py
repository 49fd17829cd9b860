"""Adam's state of one LoRA factor, as it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def factor_dtype(parameter: Tensor) -> torch.dtype:
    """The precision of a factor's state: at least float32."""
    return torch.promote_types(parameter.dtype, torch.float32)


def new_factor_state(parameter: Tensor) -> dict[str, Any]:
    """``step``, ``exp_avg`` and ``exp_avg_sq`` before the first step.

    Contiguous, on the parameter's device, in :func:`factor_dtype`: the moments of bf16
    adapters would lose small gradients.
    """
    exp_avg = torch.zeros(parameter.shape, dtype=factor_dtype(parameter), device=parameter.device)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": exp_avg,
        "exp_avg_sq": torch.zeros_like(exp_avg),
    }


def as_factor_state(parameter: Tensor, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """A copy of saved state, or of AdamW's, in the precision and on the device of a factor's."""
    state = new_factor_state(parameter)
    for name, value in state.items():
        value.copy_(values[name])
    return state
