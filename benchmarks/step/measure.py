"""One row of the result: the costs of one model at one rank."""

from __future__ import annotations

import copy
import statistics
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from cg_optim import CGLoRAOptimizer

from .layers import MODELS, AdapterStack, Model, make_traffic
from .state import curvature_buffer_bytes, state_bytes
from .stopwatch import (
    NAMES,
    Contender,
    milliseconds,
    resume_after_warm_up,
    summarise,
    take_turns,
)

LR = 1e-4
TIMED_COLUMNS = 2048


def adamw(parameters: list[nn.Parameter], kind: str) -> AdamW:
    """AdamW in its ``foreach`` or ``fused`` implementation."""
    return AdamW(parameters, lr=LR, foreach=kind == "foreach", fused=kind == "fused")


def make_optimizer(name: str, stack: AdapterStack) -> AdamW | CGLoRAOptimizer:
    """One of :data:`NAMES` at its defaults."""
    parameters = list(stack.parameters())
    if name == "cg":
        return CGLoRAOptimizer(parameters, lr=LR, pairs=stack.pairs())
    return adamw(parameters, name.removeprefix("adamw_"))


def measure_model(
    name: str,
    rank: int,
    *,
    layers: int,
    tokens: int,
    cycles: int,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Milliseconds of ``layers`` decoder layers, bytes of all.

    Args:
        name: One of :data:`MODELS`.
        rank: Adapter rank.
        layers: Decoder layers that are timed.
        tokens: Rows of every input.
        cycles: Repeats of the whole refresh schedule.
        device: Where to run.
        dtype: Of activations; the adapters are float32, under autocast if this is not.

    Returns:
        The sizes asked for; ``state_bytes`` and ``buffer_bytes`` of all layers; the medians of
        :func:`~benchmarks.step.stopwatch.summarise` and ``ms_frozen_linears`` for the layers that
        were timed; ``share_estimate``, the part that hooks and optimizer step have in a whole
        training step; on a GPU ``peak_bytes``.
    """
    model = MODELS[name]
    traffic = make_traffic(model, tokens, device, dtype)
    first = AdapterStack(model, rank, layers).to(device)
    contenders = {}
    for contender in NAMES:
        stack = copy.deepcopy(first)
        optimizer = make_optimizer(contender, stack)
        if isinstance(optimizer, CGLoRAOptimizer):
            resume_after_warm_up(optimizer)
        contenders[contender] = Contender(optimizer, partial(stack.forward_backward, traffic))
    del first
    row: dict[str, Any] = {
        "model": name,
        "rank": rank,
        "layers_timed": layers,
        "layers": model.layers,
        "tokens": tokens,
        "state_bytes": state_bytes(model, rank),
        "buffer_bytes": {"cg": curvature_buffer_bytes(model)},
        **summarise(take_turns(contenders, cycles, device)),
    }
    frozen = layers * frozen_layer_ms(model, tokens, device, dtype)
    usual = frozen + row["ms_forward_backward"]
    row["ms_frozen_linears"] = frozen
    row["share_estimate"] = {
        key: extra / (usual + extra)
        for key, step in row["ms"].items()
        for extra in [step + (row["ms_hooks"]["average"] if key == "cg" else 0.0)]
    }
    if torch.device(device).type == "cuda":
        row["peak_bytes"] = {key: _peak_bytes(one) for key, one in contenders.items()}
    return row


def frozen_layer_ms(model: Model, tokens: int, device: str, dtype: torch.dtype) -> float:
    """Estimate of what the frozen linear layers of one decoder layer take, forward and backward.

    One product with part of a weight is timed and the others taken to be as fast: a whole large
    layer need not fit. Frozen weights have an input's gradient only; attention is left out.
    """
    width = min(model.hidden, TIMED_COLUMNS)
    x = torch.randn(tokens, model.hidden, device=device, dtype=dtype)
    weight = torch.randn(model.hidden, width, device=device, dtype=dtype)
    times = [milliseconds(lambda: x @ weight, device) for _ in range(6)][1:]
    weights = sum(linear.in_features * linear.out_features for linear in model.linears())
    return 2 * statistics.median(times) * weights / weight.numel()


def _peak_bytes(contender: Contender) -> int:
    """Memory that a step takes besides what was held before, on a GPU; a collecting step's."""
    while isinstance(contender.optimizer, CGLoRAOptimizer) and not contender.collecting:
        contender.optimizer.step()
    contender.optimizer.zero_grad()
    contender.forward_backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender.optimizer.step()
    return int(torch.cuda.max_memory_allocated() - before)
