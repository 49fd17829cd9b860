"""Checks of everything a user hands over, before anything is built or changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from cg_optim.discovery import Discovery, find_lora_pairs
from cg_optim.errors import (
    GradientError,
    HyperparameterError,
    NoPairsWarning,
    PairError,
    ParameterError,
    warn,
)
from cg_optim.pairs import LoRAPair, check_unique

Group = dict[str, Any]


def check_group(group: Group) -> None:
    """Check the hyper-parameters of one group (or the defaults).

    Raises:
        HyperparameterError: If a value is out of range.
    """
    _check_lr(group["lr"])
    momentum = group["momentum"]
    if not _is_number(momentum) or not 0.0 <= momentum < 1.0:
        raise HyperparameterError(f"momentum is {momentum!r}; expected 0 <= momentum < 1")
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise HyperparameterError(f"betas is {betas!r}; expected two numbers, e.g. (0.9, 0.999)")
    for index, beta in enumerate(betas):
        if not _is_number(beta) or not 0.0 <= beta < 1.0:
            raise HyperparameterError(f"betas[{index}] is {beta!r}; expected 0 <= beta < 1")
    for name in ("eps", "weight_decay"):
        if not _is_number(group[name]) or not 0.0 <= group[name] < math.inf:
            raise HyperparameterError(f"{name} is {group[name]!r}; expected a number >= 0")
    check_damping(group["damping"])
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise HyperparameterError(
                f"{name} is {group[name]!r} in a parameter group; CGLoRAOptimizer has no such "
                "variant, remove it"
            )


def check_damping(damping: object) -> None:
    """Check a relative damping.

    Raises:
        HyperparameterError: If it is not a finite number above 0.
    """
    if not _is_number(damping) or not 0.0 < damping < math.inf:
        raise HyperparameterError(
            f"damping is {damping!r}; expected a number > 0 (relative to the mean curvature)"
        )


def check_one_model(first: nn.Module, second: nn.Module | None) -> None:
    """Refuse two different models.

    Raises:
        ParameterError: If ``model=`` names another module than the first argument.
    """
    if second is not None and second is not first:
        raise ParameterError(
            f"the first argument is a {type(first).__name__} and model= another module "
            f"({type(second).__name__}); give one of them, or parameters and model="
        )


def plain_numbers(group: Group) -> Group:
    """A copy with NumPy's and other real numbers as Python's own, which any state dict holds."""
    return {name: _plain(value) for name, value in group.items()}


def _plain(value: Any) -> Any:
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return float(value)


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, int):  # torch takes no integer beyond 64 bits for a float
        return not isinstance(value, bool) and abs(value) <= 2**53
    return isinstance(value, float)


def _check_lr(lr: object) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise HyperparameterError(
                f"lr is a tensor of shape {tuple(lr.shape)}; expected one element"
            )
        if lr.device.type == "meta":
            raise HyperparameterError("lr is a tensor without a value (on the meta device)")
        lr = lr.item()
    if not _is_number(lr) or not 0.0 <= lr < math.inf:
        raise HyperparameterError(f"lr is {lr!r}; expected a finite number >= 0")


def check_curvature(curvature: object) -> None:
    """Check the ``curvature`` argument.

    Raises:
        HyperparameterError: If it is none of ``"auto"``, ``"dense"``, ``None`` and a
            positive integer.
    """
    if curvature is None or curvature in ("auto", "dense"):
        return
    if isinstance(curvature, int) and not isinstance(curvature, bool) and curvature > 0:
        return
    raise HyperparameterError(
        f"curvature is {curvature!r}; expected 'auto', 'dense', None or a positive integer"
    )


def check_init(init: object, curvature: object) -> None:
    """Check the ``init`` argument.

    Raises:
        HyperparameterError: If it is neither None nor ``"curvature"``, or is given without
            the curvature it needs.
    """
    if init not in (None, "curvature"):
        raise HyperparameterError(f"init is {init!r}; expected 'curvature' or None")
    if init is not None and curvature is None:
        raise HyperparameterError("init is 'curvature' but curvature is None; it needs one")


def as_groups(params: Any) -> list[Group]:
    """Bring parameters, named parameters or groups into a list of groups without empty ones.

    An empty *group* is dropped, because Trainer passes one for LoRA models.

    Raises:
        ParameterError: If ``params`` is a single tensor or is not iterable.
    """
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise ParameterError(
            f"got a {type(params).__name__}; expected a module, parameters, named parameters or "
            "parameter groups (wrap a single tensor in a list)"
        )
    if isinstance(params, set):
        raise ParameterError("parameters come in a set, whose order changes; pass a list")
    entries = list(params)
    if not entries or not isinstance(entries[0], dict):
        return [{"params": entries}] if entries else []
    groups = []
    for group in entries:
        listed = as_list(group)
        if listed["params"]:
            groups.append(listed)
    return groups


def as_list(group: Any) -> Group:
    """Copy a group with its parameters as a list.

    Raises:
        ParameterError: If it is not a dict with ``"params"``.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise ParameterError(f"a parameter group must be a dict with 'params', got {group!r}")
    params = group["params"]
    if isinstance(params, set):
        raise ParameterError("parameters come in a set, whose order changes; pass a list")
    return {**group, "params": [params] if isinstance(params, Tensor) else list(params)}


def tensors_of(group: Group) -> list[Tensor]:
    """The parameters of a group, which may hold ``(name, parameter)`` tuples."""
    return [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]


def check_parameters(groups: Sequence[Group], known: Iterable[Tensor] = ()) -> None:
    """Check the parameters of new groups against each other and those already known.

    Raises:
        ParameterError: If something is not a leaf tensor, is not real floating point, or
            comes twice.
    """
    seen = {id(parameter) for parameter in known}
    for group_index, group in enumerate(groups):
        for index, parameter in enumerate(tensors_of(group)):
            where = f"parameter {index} of group {group_index}"
            if not isinstance(parameter, Tensor):
                raise ParameterError(f"{where} is a {type(parameter).__name__}, not a tensor")
            where += f" (shape {tuple(parameter.shape)})"
            if not parameter.is_floating_point():
                raise ParameterError(
                    f"{where} has dtype {parameter.dtype}; only real floating point parameters "
                    "can be optimised"
                )
            if not (parameter.is_leaf or parameter.retains_grad):
                raise ParameterError(
                    f"{where} is computed from other tensors; pass the leaf parameter itself"
                )
            if id(parameter) in seen:
                raise ParameterError(f"{where} is given twice; list each parameter once")
            seen.add(id(parameter))


def check_gradients(parameters: Iterable[Tensor]) -> None:
    """Refuse gradients that no step can be taken with.

    Raises:
        GradientError: If a gradient is sparse or complex.
    """
    for index, parameter in enumerate(parameters):
        grad = parameter.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise GradientError(
                f"parameter {index} (shape {tuple(parameter.shape)}) has a sparse gradient "
                f"({grad.layout}); use dense gradients (sparse=False in the embedding) or "
                "SparseAdam for it"
            )
        if grad.is_complex():
            raise GradientError(f"parameter {index} has a complex gradient ({grad.dtype})")


def check_not_empty(groups: Sequence[Group], model: nn.Module | None) -> None:
    """Refuse to optimise nothing.

    Raises:
        ParameterError: If no group holds a parameter.
    """
    if any(group["params"] for group in groups):
        return
    reason = (
        "every parameter of the model is frozen; unfreeze the adapter (requires_grad_(True))"
        if model is not None
        else "no parameters were given"
    )
    raise ParameterError(f"there is nothing to optimise: {reason}")


def as_pairs(pairs: object) -> tuple[LoRAPair, ...]:
    """The pairs declared by hand.

    Raises:
        PairError: If they are no collection of :class:`~cg_optim.LoRAPair`.
    """
    if not isinstance(pairs, Iterable):
        raise PairError(f"pairs is a {type(pairs).__name__}; expected a list of LoRAPair")
    declared = tuple(pairs)
    for pair in declared:
        if not isinstance(pair, LoRAPair):
            raise PairError(f"pairs holds a {type(pair).__name__}; expected LoRAPair(A=..., B=...)")
    return declared


def discover(model: nn.Module | None, declared: Sequence[LoRAPair]) -> Discovery:
    """Declared pairs first, then the model's own that do not overlap with them.

    Raises:
        AdapterError: If the model's adapters are frozen, merged or disabled.
        PairError: If declared pairs overlap.
        ParameterError: If the model is not a module.
    """
    check_unique(list(declared))
    if model is None:
        return Discovery(tuple(declared), {})
    if not isinstance(model, nn.Module):
        raise ParameterError(f"model is a {type(model).__name__}; expected an nn.Module")
    found = find_lora_pairs(model)
    taken = {id(p) for pair in declared for p in (pair.A, pair.B)}
    others = [p for p in found.pairs if id(p.A) not in taken and id(p.B) not in taken]
    pairs = (*declared, *others)
    check_unique(list(pairs))
    return Discovery(pairs, found.left_out)


def complete_pairs(
    found: Discovery, parameters: Iterable[Tensor], declared: Sequence[LoRAPair]
) -> tuple[list[LoRAPair], dict[str, str]]:
    """The pairs whose two factors are both being optimised, and why the others are not.

    Args:
        found: Everything :func:`discover` knows.
        parameters: What the optimizer was given.
        declared: Pairs declared by hand; if nothing of them is optimised, that is said too.

    Returns:
        The usable pairs, and reasons by name for everything left out.
    """
    mine = {id(parameter) for parameter in parameters}
    usable, left_out = [], dict(found.left_out)
    for pair in found.pairs:
        missing = [x for x, p in (("A", pair.A), ("B", pair.B)) if id(p) not in mine]
        strided = any(p.ndim > 2 and not p.is_contiguous() for p in (pair.A, pair.B))
        if not missing and not strided:
            usable.append(pair)
        elif len(missing) < 2 or pair in declared:
            verb = "are" if len(missing) == 2 else "is"
            lacking = f"{' and '.join(missing)} {verb} not being optimised"
            left_out[pair.name] = lacking if missing else "not contiguous"
    return usable, left_out


def warn_without_pairs(known: bool) -> None:
    """Say that everything gets AdamW.

    Args:
        known: Whether there was a model to look in, or a pair declared by hand.
    """
    warn(
        "no LoRA pair was found among the trainable parameters, so every parameter gets AdamW; "
        "declare pairs by hand with pairs=[LoRAPair(...)] if there are any"
        if known
        else "parameters were given without a model, so no LoRA pair is known and every parameter "
        "gets AdamW; pass the model itself, or model=model",
        NoPairsWarning,
    )
