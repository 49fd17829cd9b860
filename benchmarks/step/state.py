"""Bytes of optimizer state for all layers, counted from shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cg_optim.input_curvature import new_input_curvature, state_shapes

from .layers import Model

FLOAT = 4
COUNTER = 8
"""The curvature counts its updates in int64."""


def state_bytes(model: Model, rank: int) -> dict[str, int]:
    """State of each optimizer for float32 adapters in all layers."""
    adamw = adamw_state_bytes(model, rank)
    return {
        "adamw_foreach": adamw,
        "adamw_fused": adamw,
        "cg": adamw + curvature_state_bytes(model),
    }


def adamw_state_bytes(model: Model, rank: int) -> int:
    """Two moments and a step count per parameter."""
    sizes = [(linear.out_features + linear.in_features) * rank for linear in model.linears()]
    return model.layers * FLOAT * sum(2 * size + 2 for size in sizes)


def curvature_state_bytes(model: Model) -> int:
    """The default input curvature, once for every distinct input."""
    total = 0
    for features in model.inputs():
        for name, shape in state_shapes(features, "auto").items():
            total += math.prod(shape) * (COUNTER if name == "updates" else FLOAT)
    return model.layers * total


def curvature_buffer_bytes(model: Model) -> int:
    """What the default curvature holds between steps besides its state: the sums being collected.

    Not part of ``state_dict()``, but of the memory a training needs.
    """
    held = 0
    for features in model.inputs():
        # On the meta device tensors have sizes but no memory.
        curvature = new_input_curvature(features, torch.empty(0, device="meta"), "auto")
        tensors = [value for value in vars(curvature).values() if isinstance(value, Tensor)]
        held += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return model.layers * held - curvature_state_bytes(model)
