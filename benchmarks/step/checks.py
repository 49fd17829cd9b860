"""Whether a step is right (float64 on the CPU), and whether a CUDA graph can hold it."""

from __future__ import annotations

import copy
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cg_optim import CGLoRAOptimizer
from cg_optim.curvature_store import INTERVAL

from .layers import MODELS, AdapterStack, Traffic, make_traffic
from .measure import LR, make_optimizer
from .stopwatch import Contender, milliseconds, resume_after_warm_up

STEPS_BEFORE = 2
"""Steps before the one that is compared, so that moments and curvature are in use."""
GRAPH_TOLERANCE = 1e-3
"""Relative difference of a replayed step from the same step without a graph."""


def step_error(name: str, rank: int, tokens: int, device: str) -> float:
    """Largest relative error of a float32 step over all factors of one decoder layer.

    Both start from the state of the float32 run; the hooks collect, so that the curvature's
    update is part of what is compared.

    Returns:
        The largest ``||move - reference|| / ||reference||``, the reference made in float64 on
        the CPU.
    """
    model = MODELS[name]
    stack = AdapterStack(model, rank, layers=1).to(device)
    optimizer = CGLoRAOptimizer(list(stack.parameters()), lr=LR, pairs=stack.pairs())
    for seed in range(STEPS_BEFORE):
        optimizer.zero_grad()
        stack.forward_backward(make_traffic(model, tokens, device, torch.float32, seed))
        optimizer.step()
    exact = AdapterStack(model, rank, layers=1).double()
    exact.load_state_dict(stack.state_dict())
    reference = CGLoRAOptimizer(list(exact.parameters()), lr=LR, pairs=exact.pairs())
    reference.load_state_dict(optimizer.state_dict())
    moves = []
    for adapters, stepper, where, dtype in (
        (stack, optimizer, device, torch.float32),
        (exact, reference, "cpu", torch.float64),
    ):
        traffic = make_traffic(model, tokens, where, dtype, STEPS_BEFORE)
        passes = partial(adapters.forward_backward, traffic)
        moves.append(_moves(adapters, Contender(stepper, passes)))
    return max(_relative(mine, exactly) for mine, exactly in zip(*moves, strict=True))


def _moves(stack: AdapterStack, contender: Contender) -> list[Tensor]:
    """How far each factor goes in one training step, in float64 on the CPU."""
    before = [p.detach().clone() for p in stack.parameters()]
    contender.optimizer.zero_grad()
    contender.forward_backward()
    contender.optimizer.step()
    pairs = zip(stack.parameters(), before, strict=True)
    return [p.detach().double().cpu() - old.double().cpu() for p, old in pairs]


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def graph_support(
    name: str, rank: int, layers: int, tokens: int, device: str = "cuda"
) -> dict[str, dict[str, Any]]:
    """Try to capture each optimizer's step in a CUDA graph and to replay it.

    AdamW is built with ``capturable=True``, which it wants for this.

    Returns:
        For each kind of step ``supported``, and ``ms`` of a replay or the ``error``.
    """
    model = MODELS[name]
    traffic = make_traffic(model, tokens, device, torch.float32)
    kinds = {"adamw_foreach": True, "adamw_fused": True, "cg_collecting": True, "cg_other": False}
    first = AdapterStack(model, rank, layers).to(device)
    return {
        kind: _try_graph(*(_prepared(first, kind, collecting, traffic) for _ in range(2)))
        for kind, collecting in kinds.items()
    }


def _prepared(
    first: AdapterStack, kind: str, collecting: bool, traffic: Traffic
) -> tuple[AdapterStack, torch.optim.Optimizer]:
    """A copy of ``first`` before a step, its optimizer warmed up; equal at every call."""
    stack = copy.deepcopy(first)
    optimizer = make_optimizer("cg" if kind.startswith("cg") else kind, stack)
    if isinstance(optimizer, CGLoRAOptimizer):
        resume_after_warm_up(optimizer)
    else:
        for group in optimizer.param_groups:
            group["capturable"] = True
    contender = Contender(optimizer, lambda: stack.forward_backward(traffic))
    # A whole interval: all state exists, and a collecting step comes next.
    for _ in range(INTERVAL if collecting else INTERVAL + 1):
        contender.optimizer.zero_grad()
        contender.forward_backward()
        contender.optimizer.step()
    contender.optimizer.zero_grad()
    contender.forward_backward()
    return stack, optimizer


def _try_graph(
    captured: tuple[AdapterStack, torch.optim.Optimizer],
    eager: tuple[AdapterStack, torch.optim.Optimizer],
) -> dict[str, Any]:
    stack, optimizer = captured
    before = [p.detach().clone() for p in stack.parameters()]
    eager[1].step()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            optimizer.step()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return {"supported": False, "error": str(error).strip().partition("\n")[0]}
    difference = max(
        _relative(mine.detach() - old, theirs.detach() - old)
        for mine, theirs, old in zip(stack.parameters(), eager[0].parameters(), before, strict=True)
    )
    if difference > GRAPH_TOLERANCE:
        return {"supported": False, "error": f"the replayed step differs by {difference:.1e}"}
    times = [milliseconds(graph.replay, str(before[0].device)) for _ in range(10)]
    return {"supported": True, "ms": statistics.median(times)}
