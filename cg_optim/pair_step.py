"""Takes the rule of :mod:`cg_optim.rule` to many pairs at once.

Pairs of equal shape and settings are stacked, stepped by one call of the pure rule, and
written back.  The rule does not know about parameters, groups or dtypes; this module
does not know any mathematics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cg_optim.damped import DampedInput, stack_damped
from cg_optim.linalg import all_finite
from cg_optim.rule import AdamSettings, Direction, Moments, hidden_whitening, whitened_adam


@dataclass(frozen=True)
class FactorWork:
    """One factor (A or B) of one pair in this step, every tensor as a 2-D matrix.

    Attributes:
        value: View of the parameter, ``(rows, d)``.
        grad: Its gradient, or None if it takes no part in this step.
        state: ``step``, ``exp_avg`` and ``exp_avg_sq`` as views of the saved tensors.
        lr: Learning rate, a number or a 0-dimensional tensor.
        weight_decay: Decoupled weight decay, times ``lr``.
        settings: Adam's constants.
    """

    value: Tensor
    grad: Tensor | None
    state: Moments
    lr: float | Tensor
    weight_decay: float
    settings: AdamSettings


@dataclass(frozen=True)
class PairWork:
    """One pair in this step.

    Attributes:
        a: The down projection.
        b: The up projection.
        damped: Its damped input curvature, None where nothing is known.
        damping: The relative damping of both factors' curvature.
    """

    a: FactorWork
    b: FactorWork
    damped: DampedInput | None
    damping: float

    def stacking_key(self) -> tuple[Any, ...]:
        """Pairs with equal keys can be stacked."""
        shapes = tuple(tuple(tensor.shape) for tensor in self.damped or ())
        factors = tuple(
            (f.value.shape, f.value.device, f.state.exp_avg.dtype, f.grad is None, f.settings)
            for f in (self.a, self.b)
        )
        return (*factors, type(self.damped), shapes, self.damping)


def step_pairs(work: Iterable[PairWork]) -> list[Tensor]:
    """Update parameters and state of all pairs in place.

    Returns:
        For each stack a boolean ``(pairs,)`` tensor, True where the pair was skipped
        because something in its gradients or state was not finite.
    """
    stacks: dict[tuple[Any, ...], list[PairWork]] = {}
    for item in work:
        stacks.setdefault(item.stacking_key(), []).append(item)
    return [_step_stack(items) for items in stacks.values()]


def _step_stack(items: list[PairWork]) -> Tensor:
    a, b = [item.a for item in items], [item.b for item in items]
    models = [item.damped for item in items if item.damped is not None]
    damped = stack_damped(models) if models else None
    # Both directions are computed before either factor moves: P belongs to this A.
    moves: list[tuple[list[FactorWork], Moments, Direction]] = []
    if a[0].grad is not None:
        whitening = None if damped is None else damped.whitening()
        before = _moments(a)
        moves.append((a, before, whitened_adam(_grads(a), before, whitening, a[0].settings)))
    if b[0].grad is not None:
        before = _moments(b)
        down = torch.stack([f.value for f in a]).to(before.exp_avg.dtype)
        hidden = hidden_whitening(down, damped, items[0].damping)
        moves.append((b, before, whitened_adam(_grads(b), before, hidden, b[0].settings)))
    # A pair moves as a whole or not at all: a step of one factor assumes the other's.
    usable = torch.stack([direction.usable for _, _, direction in moves]).all(0)
    stepped = [_stepped(factors, direction) for factors, _, direction in moves]
    for value in stepped:
        usable = usable & all_finite(value)
    for (factors, before, direction), value in zip(moves, stepped, strict=True):
        _write_back(factors, before, direction, value, usable)
    return ~usable


def _grads(factors: Sequence[FactorWork]) -> Tensor:
    grads = [f.grad for f in factors if f.grad is not None]
    return torch.stack(grads).to(factors[0].state.exp_avg.dtype)


def _moments(factors: Sequence[FactorWork]) -> Moments:
    return Moments(
        *(torch.stack(tensors) for tensors in zip(*(f.state for f in factors), strict=True))
    )


def _stepped(factors: Sequence[FactorWork], direction: Direction) -> Tensor:
    """The new values ``(pairs, rows, d)`` in the precision of the state."""
    value = torch.stack([f.value for f in factors]).to(direction.value.dtype)
    lr = _column([f.lr for f in factors], value)
    weight_decay = _column([f.weight_decay for f in factors], value)
    return value * (1 - lr * weight_decay) - lr * direction.value


def _column(numbers: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """One number per pair as ``(pairs, 1, 1)``; tensors stay on their device."""
    if any(isinstance(number, Tensor) for number in numbers):
        tensors = [torch.as_tensor(number).to(like).reshape(()) for number in numbers]
        return torch.stack(tensors)[:, None, None]
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)[:, None, None]


def _write_back(
    factors: Sequence[FactorWork],
    before: Moments,
    direction: Direction,
    value: Tensor,
    usable: Tensor,
) -> None:
    keep = usable[:, None, None]
    old_value = torch.stack([f.value for f in factors])
    _scatter([f.value for f in factors], torch.where(keep, value.to(old_value.dtype), old_value))
    for field, old, new in zip(Moments._fields, before, direction.moments, strict=True):
        mask = usable if old.ndim == 1 else keep
        _scatter([getattr(f.state, field) for f in factors], torch.where(mask, new, old))


def _scatter(targets: list[Tensor], stacked: Tensor) -> None:
    torch._foreach_copy_(targets, list(stacked.unbind(0)))
