"""Checks a state dict against an optimizer before anything of it is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cg_optim.arguments import check_group
from cg_optim.errors import HyperparameterError, StateError
from cg_optim.factor_state import factor_dtype

Shapes = Mapping[str, tuple[int, ...]]

#: State that is counted; everything else is floating point.
COUNTS = ("input_updates",)
#: Columns of length 1; a lower precision may have rounded their entries.
ORTHONORMAL = ("input_basis",)
LARGEST_ENTRY = 1.01
#: ``F`` of a matrix ``F F^T``.
FACTORS = ("input_factor",)
NOT_NEGATIVE = ("step", "exp_avg_sq", "input_trace", "input_updates")


def check(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    expected: Mapping[int, Shapes],
    paired: Collection[int],
) -> None:
    """Refuse a state dict that is damaged or belongs to another model.

    Args:
        state_dict: What ``Optimizer.state_dict`` returned once.
        groups: The optimizer's own parameter groups.
        expected: Names and shapes of the state of each parameter, by its index.
        paired: The ``id`` of every parameter that is a LoRA factor.

    Raises:
        StateError: With what differs; nothing has been changed then.
    """
    check_is_state_dict(state_dict)
    saved_groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(saved_groups, Sequence) or not isinstance(state, Mapping):
        raise StateError("the state dict is damaged: 'state' or 'param_groups' has the wrong type")
    if not all(isinstance(group, Mapping) for group in saved_groups):
        raise StateError("the state dict is damaged: a parameter group is no dict")
    sizes = [len(group["params"]) for group in groups]
    try:
        saved_ids = [list(group["params"]) for group in saved_groups]
    except (TypeError, KeyError) as error:
        raise StateError("the state dict is damaged: a parameter group has no 'params'") from error
    if [len(ids) for ids in saved_ids] != sizes:
        raise StateError(
            f"the state dict has parameter groups of {[len(ids) for ids in saved_ids]} parameters, "
            f"this optimizer of {sizes}; build it for the same model and in the same way"
        )
    if not all(isinstance(i, (int, str)) for ids in saved_ids for i in ids):
        raise StateError("the state dict is damaged: 'params' holds something that is no index")
    required = {"lr", "momentum", "betas", "eps", "weight_decay", "damping"}
    for index, group in enumerate(saved_groups):
        if missing := required - set(group):
            raise StateError(
                f"parameter group {index} of the state dict lacks {sorted(missing)}; "
                "it was not saved by CGLoRAOptimizer"
            )
        _check_numbers(index, group)
    if len({str(i) for ids in saved_ids for i in ids}) != sum(sizes):
        raise StateError("the state dict is damaged: a parameter is listed twice")
    parameters = [parameter for group in groups for parameter in group["params"]]
    position = {saved: i for i, saved in enumerate(i for ids in saved_ids for i in ids)}
    for saved, values in state.items():
        if saved not in position:
            raise StateError(f"the state dict has state for an unknown parameter {saved!r}")
        index = position[saved]
        parameter = parameters[index]
        is_factor = id(parameter) in paired
        # torch.optim holds the state of ordinary parameters in their own precision.
        dtype = factor_dtype(parameter) if is_factor else parameter.dtype
        _check_one(index, values, expected.get(index, {}), dtype)
        if not is_factor and not bool(torch.isfinite(values["exp_avg"].to(dtype).square()).all()):
            # Gradients whose squares overflow are never let in, so nor is their mean.
            raise StateError(f"exp_avg of parameter {index} holds values out of range")


def _check_one(index: int, values: Any, expected: Shapes, dtype: torch.dtype) -> None:
    if not isinstance(values, Mapping):
        raise StateError(f"state of parameter {index} is a {type(values).__name__}, not a dict")
    if set(values) != set(expected):
        raise StateError(
            f"state of parameter {index} has {sorted(map(str, values))}, expected "
            f"{sorted(expected)}; was it saved with another `curvature`, by another version, or by "
            "another optimizer?"
        )
    for name, shape in expected.items():
        value = values[name]
        if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise StateError(
                f"{name} of parameter {index} has shape {got}, expected {tuple(shape)}; "
                "the state belongs to another model or another `curvature`"
            )
        counted = name in COUNTS
        kind_fits = not value.is_floating_point() if counted else value.is_floating_point()
        unusable = value.layout != torch.strided or value.device.type == "meta"
        if not kind_fits or unusable or value.dtype == torch.bool or value.is_complex():
            raise StateError(
                f"{name} of parameter {index} is a {value.dtype} tensor ({value.layout}, on "
                f"{value.device}); expected dense {'integers' if counted else 'floating point'}"
            )
        # In the precision it will have: what is finite in float64 may not be in float32.
        if not counted and not bool(torch.isfinite(value.to(dtype)).all()):
            raise StateError(f"{name} of parameter {index} holds values that are not finite")
        if name in NOT_NEGATIVE and bool((value < 0).any()):
            raise StateError(f"{name} of parameter {index} holds negative values")
        if name in ORTHONORMAL and bool((value.abs() > LARGEST_ENTRY).any()):
            raise StateError(
                f"{name} of parameter {index} holds values above 1, but its columns have length 1"
            )
        if name in FACTORS and not bool(torch.isfinite(value.to(dtype).square().sum())):
            # No later input could wash out a product that is not finite.
            raise StateError(f"{name} of parameter {index} holds values out of range")


def check_is_state_dict(state_dict: object) -> None:
    """Refuse what has not even the outer form of a state dict.

    Raises:
        StateError: If a key is missing or it is not a dict at all.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise StateError(
            "not an optimizer state dict: expected a dict with 'state' and 'param_groups'"
        )


def check_pairs_complete(
    state_dict: Mapping[str, Any], positions: Sequence[tuple[int, int]]
) -> None:
    """Refuse a state dict in which one factor of a pair has state and the other has none.

    Args:
        state_dict: One that passed :func:`check`.
        positions: For each pair the positions of A and B among all parameters.

    Raises:
        StateError: With the position of the factor whose state is missing.
    """
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    for pair in positions:
        missing = [place for place in pair if ids[place] not in state_dict["state"]]
        if len(missing) == 1:
            raise StateError(
                f"the state dict is incomplete: parameter {missing[0]} has no state although the "
                "other factor of its LoRA pair has"
            )


def states_of(state_dict: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[int, Any]:
    """The saved states by the ``id`` of the parameter they belong to."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    state = state_dict["state"]
    return {id(p): state[i] for i, p in zip(ids, parameters, strict=True) if i in state}


def _check_numbers(index: int, group: Mapping[str, Any]) -> None:
    try:
        check_group(dict(group))
    except HyperparameterError as error:
        raise StateError(f"parameter group {index} of the state dict: {error}") from error
    steps = group.get("steps_taken", 0)
    if not isinstance(steps, int) or steps < 0:
        raise StateError(
            f"parameter group {index} of the state dict: steps_taken is {steps!r}; expected a count"
        )
