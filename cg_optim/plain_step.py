"""AdamW for the parameters that are in no pair: torch.optim's own functional version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

State = dict[str, Any]


def step_plain(
    parameters: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
) -> list[Tensor]:
    """Step parameters of one group in place exactly as ``torch.optim.AdamW`` would.

    A parameter whose gradient or its square is not finite is left alone together with its
    state.

    Args:
        parameters: Parameters with a gradient.
        states: Their states; filled here at a parameter's first step.
        group: ``lr``, ``betas``, ``eps`` and ``weight_decay``.

    Returns:
        For each device the number of parameters left alone, as a 0-dimensional tensor
        on that device.
    """
    on_cpu: list[tuple[Tensor, State]] = []
    skipped: dict[torch.device, Tensor] = {}
    for parameter, state in zip(parameters, states, strict=True):
        if parameter.grad is None:
            continue
        _initialise(parameter, state)
        # The square, because it goes into the second moment and may overflow.
        unusable = ~torch.isfinite(parameter.grad.square()).all()
        before = skipped.get(parameter.device)
        skipped[parameter.device] = unusable.long() if before is None else before + unusable
        if parameter.device.type != "cpu":
            step_unless(unusable, parameter, state, group)
        elif not bool(unusable):
            on_cpu.append((parameter, state))
    if on_cpu:
        _adamw([p for p, _ in on_cpu], [s for _, s in on_cpu], group)
    return list(skipped.values())


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
