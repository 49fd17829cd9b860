"""Takes the rule of :mod:`cg_optim.rule` to many pairs at once.

Pairs of equal shape and settings are stacked, stepped by one call of the pure rule, and
written back.  The rule does not know about parameters, groups or dtypes; this module
does not know any mathematics.

What happens once for each pair is kept small: on a GPU a step takes as long as Python needs
for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cg_optim.damped import DampedInput, stack_damped
from cg_optim.linalg import all_finite
from cg_optim.rule import AdamSettings, Direction, Moments, hidden_whitening, whitened_adam
from cg_optim.stacks import in_parts


class FactorWork(NamedTuple):
    """One factor (A or B) of one pair in this step, every tensor as a matrix.

    Attributes:
        value: View of the parameter, ``(rows, d)``; ``(experts, rows, d)`` where one pair of
            parameters holds several experts.
        grad: Its gradient, or None if it takes no part in this step.
        state: ``step``, ``exp_avg`` and ``exp_avg_sq`` as views of the saved tensors;
            ``step`` is ``()``, or ``(1,)`` for all experts.
        lr: Learning rate, a number or a one-element tensor.
        weight_decay: Decoupled weight decay, times ``lr``.
        settings: Adam's constants.
    """

    value: Tensor
    grad: Tensor | None
    state: Moments
    lr: float | Tensor
    weight_decay: float
    settings: AdamSettings


class PairWork(NamedTuple):
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
        damped = self.damped
        # Kind, input size and number of directions: the first tensor has them all.
        curvature = None if damped is None else (type(damped), damped[0].shape)
        return (*_factor_key(self.a), *_factor_key(self.b), curvature, self.damping)

    def elements(self) -> int:
        """Of the largest tensor in a stack of such pairs, for each of them."""
        known = 0 if self.damped is None else self.damped[0].numel()
        return max(self.a.value.numel(), self.b.value.numel(), known)


def _factor_key(factor: FactorWork) -> tuple[Any, ...]:
    value, grad, state, lr, weight_decay, settings = factor
    return (
        value.shape,
        value.dtype,
        value.device,
        state.exp_avg.dtype,
        grad is None,
        settings,
        weight_decay,
        # One learning rate for a whole stack: nothing has to be sent to its device.
        id(lr) if isinstance(lr, Tensor) else lr,
    )


class Skipped(NamedTuple):
    """Which pairs of one stack were left as they were.

    Attributes:
        positions: Where they come in the work given to :func:`step_pairs`.
        mask: Boolean ``(pairs,)``, True where something in the gradients or the state
            was not finite, or would not have been after the step.
    """

    positions: Sequence[int]
    mask: Tensor


def step_pairs(work: Iterable[PairWork]) -> list[Skipped]:
    """Update parameters and state of all pairs in place; one result for each stack."""
    stacks: dict[tuple[Any, ...], list[int]] = {}
    items = list(work)
    for position, item in enumerate(items):
        stacks.setdefault(item.stacking_key(), []).append(position)
    return [
        Skipped(part, _step_stack([items[i] for i in part]))
        for stack in stacks.values()
        for part in in_parts(stack, items[stack[0]].elements())
    ]


def _step_stack(items: list[PairWork]) -> Tensor:
    a, b = [item.a for item in items], [item.b for item in items]
    models = [item.damped for item in items if item.damped is not None]
    damped = stack_damped(models) if models else None
    old_a, old_b = _values(a), _values(b)
    # Both directions are computed before either factor moves: P belongs to this A.
    moves: list[_Move] = []
    if a[0].grad is not None:
        whitening = None if damped is None else damped.whitening()
        before = _moments(a)
        direction = whitened_adam(_grads(a), before, whitening, a[0].settings)
        moves.append(_Move(a, old_a, before, direction, _stepped(a[0], old_a, direction)))
    if b[0].grad is not None:
        before = _moments(b)
        hidden = hidden_whitening(old_a.to(before.exp_avg.dtype), damped, items[0].damping)
        direction = whitened_adam(_grads(b), before, hidden, b[0].settings)
        moves.append(_Move(b, old_b, before, direction, _stepped(b[0], old_b, direction)))
    # A pair moves as a whole or not at all: a step of one factor assumes the other's.
    usable = torch.stack(
        [flag for move in moves for flag in (move.direction.usable, all_finite(move.value))]
    ).all(0)
    if usable.ndim > 1:  # (pairs, experts): they have one count of steps
        usable = usable.all(-1, keepdim=True)
    for move in moves:
        _write_back(move, usable)
    return ~usable.reshape(len(items))


class _Move(NamedTuple):
    """A stack of one factor before and after the step; all tensors lead with ``(pairs,)``."""

    factors: list[FactorWork]
    old_value: Tensor
    before: Moments
    direction: Direction
    value: Tensor


def _values(factors: Sequence[FactorWork]) -> Tensor:
    return torch.stack([f.value for f in factors])


def _grads(factors: Sequence[FactorWork]) -> Tensor:
    grads = [f.grad for f in factors if f.grad is not None]
    return torch.stack(grads).to(factors[0].state.exp_avg.dtype)


def _moments(factors: Sequence[FactorWork]) -> Moments:
    return Moments(
        *(torch.stack(tensors) for tensors in zip(*(f.state for f in factors), strict=True))
    )


def _stepped(factor: FactorWork, old_value: Tensor, direction: Direction) -> Tensor:
    """The new values ``(pairs, rows, d)``, already in the precision of the parameters.

    Computed in that of the state; only after rounding it is known whether they are finite.
    """
    lr = factor.lr
    if isinstance(lr, Tensor):
        # On the host it is read as a number; from another accelerator it has to come over.
        lr = (lr if lr.device.type == "cpu" else lr.to(old_value.device)).reshape(())
    value = old_value.to(direction.value.dtype)
    value = value * (1 - lr * factor.weight_decay) - lr * direction.value
    return value.to(old_value.dtype)


def _write_back(move: _Move, usable: Tensor) -> None:
    keep = usable[..., None, None]
    targets = [f.value for f in move.factors]
    _scatter(targets, torch.where(keep, move.value, move.old_value))
    for field, old, new in zip(Moments._fields, move.before, move.direction.moments, strict=True):
        mask = usable if field == "step" else keep
        _scatter([getattr(f.state, field) for f in move.factors], torch.where(mask, new, old))


def _scatter(targets: list[Tensor], stacked: Tensor) -> None:
    torch._foreach_copy_(targets, list(stacked.unbind(0)))
