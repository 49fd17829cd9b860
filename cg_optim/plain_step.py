"""AdamW for the parameters that are in no pair: torch.optim's own functional version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cg_optim import host

State = dict[str, Any]


def step_plain(
    parameters: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
) -> list[Tensor]:
    """Step parameters of one group in place exactly as ``torch.optim.AdamW`` would.

    A parameter is left alone together with its state if its gradient or the square of it
    is not finite, or if the parameter would not be finite afterwards; so are all of them
    if the numbers of the group allow no step.

    Args:
        parameters: Parameters with a gradient.
        states: Their states; filled here at a parameter's first step.
        group: ``lr``, ``betas``, ``eps`` and ``weight_decay``.

    Returns:
        For each parameter a boolean ``()`` tensor on its device, True if it was left alone.
    """
    healthy: list[tuple[Tensor, State]] = []
    left_alone: list[Tensor] = []
    for parameter, state in zip(parameters, states, strict=True):
        assert parameter.grad is not None
        _initialise(parameter, state)
        # The square, because it goes into the second moment and may overflow.
        unusable = ~torch.isfinite(parameter.grad.square()).all()
        if not _are_usable(parameter.dtype, group):
            left_alone.append(torch.ones_like(unusable))
            continue
        if not _stays_in_range(parameter.dtype, group):
            unusable = unusable | ~_finite_afterwards(parameter, state, group)
        left_alone.append(unusable)
        if not host.at_hand(parameter):
            step_unless(unusable, parameter, state, group)
        elif not bool(unusable):
            healthy.append((parameter, state))
    if healthy:
        _adamw([p for p, _ in healthy], [s for _, s in healthy], group)
    return left_alone


def _are_usable(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether a step can be computed at all; somebody may have changed the numbers.

    torch raises for numbers that do not fit into the dtype of the parameter.
    """
    beta1, beta2 = group["betas"]
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        return False
    numbers = [group["eps"], group["weight_decay"]]
    if not isinstance(group["lr"], Tensor):
        numbers += [group["lr"] / (1.0 - beta1), group["lr"] * group["weight_decay"]]
    return all(abs(number) <= torch.finfo(dtype).max for number in numbers)


def _stays_in_range(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether no usable gradient can move a finite parameter out of its dtype's range.

    Gradients with finite squares stay below 2e19 in float32 and bfloat16 (1.4e154 in
    float64), and ``eps`` divides at worst, so a step stays below 1e32.  In float16 the
    usual ``eps`` itself is zero.
    """
    lr, eps = group["lr"], group["eps"]
    if dtype == torch.float16 or (isinstance(lr, Tensor) and not host.at_hand(lr)):
        return False
    return 0.0 <= float(lr) <= 1.0 and eps >= 1e-12 and 0.0 <= group["weight_decay"] <= 1.0


def _finite_afterwards(parameter: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
    """Whether a step would leave parameter and state finite, found out on a copy."""
    trial = parameter.detach().clone()
    trial.grad = parameter.grad
    copied = {name: value.clone() for name, value in state.items()}
    fused = None if host.at_hand(parameter) else True
    copied["step"] = copied["step"].to(parameter.device)
    _adamw([trial], [copied], group, fused=fused)
    return torch.stack([torch.isfinite(each).all() for each in (trial, *copied.values())]).all()


def step_unless(
    unusable: Tensor, parameter: Tensor, state: State, group: Mapping[str, Any]
) -> None:
    """Step one parameter unless a boolean on its device is True, without looking at it.

    The kernel that ``AdamW(fused=True)`` uses leaves parameter and state alone if told
    so by ``GradScaler``'s flag; nobody waits for the GPU.
    """
    state["step"] = state["step"].to(parameter.device)  # moves once, after loading
    _adamw([parameter], [state], group, fused=True, found_inf=unusable.float())


def _initialise(parameter: Tensor, state: State) -> None:
    if not state:
        # Not in the default dtype: in bfloat16 the count would stop at 256.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _adamw(
    parameters: list[Tensor],
    states: list[State],
    group: Mapping[str, Any],
    *,
    fused: bool | None = None,
    found_inf: Tensor | None = None,
) -> None:
    lr = group["lr"]
    if fused and isinstance(lr, Tensor):
        lr = lr.float()  # the kernel reads nothing else
    adamw(
        parameters,
        [p.grad for p in parameters],  # type: ignore[misc]
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        # torch refuses a tensor lr in the multi-tensor version.
        foreach=False if isinstance(lr, Tensor) or fused else None,
        fused=fused,
        found_inf=found_inf,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
