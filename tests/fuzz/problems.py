"""Random training problems, most of them hopeless, and what must hold in all of them.

A problem is one LoRA layer with its data, its scales and the faults that happen to it in
the course of a few steps.  Many problems are trained at once, as the layers of one model
under one optimizer, because that is how they can spoil one another.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cg_optim import CGLoRAOptimizer, host
from cg_optim.errors import CGOptimWarning

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BAD = (math.nan, math.inf, -math.inf)
STEPS = 3

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: x,
    "constant": torch.ones_like,
    "zero": torch.zeros_like,
    "one direction": lambda x: x[:, :1] * torch.ones_like(x),
    "one row": lambda x: x[:1].expand_as(x).clone(),
    "one feature": lambda x: x * (torch.arange(x.shape[1]) == 0),
    "an outlier": lambda x: x * torch.where(torch.arange(x.shape[0]) == 0, 1e6, 1.0)[:, None],
}
FAULTS = ("input", "gradient of A", "gradient of B", "gradient of bias", "output", "no gradient")


class Layer(nn.Module):
    """One problem's layer, in float64 until the whole model is cast."""

    def __init__(self, n: int, m: int, r: int, a_scale: float, b_scale: float) -> None:
        super().__init__()
        self.base_layer = nn.Linear(n, m).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(n, r, bias=False), nn.Linear(r, m, bias=False)
        self.bias = nn.Parameter(torch.zeros(m))  # stepped by AdamW
        self.scaling = 2.0
        with torch.no_grad():
            for layer, scale in ((self.lora_A, a_scale), (self.lora_B, b_scale)):
                layer.weight.copy_(torch.randn(layer.weight.shape) * scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * self.scaling + self.bias


@dataclass
class Problem:
    """What one layer is given."""

    layer: Layer
    rows: int
    inputs: str
    input_scale: float
    loss_scale: float
    factor_scales: tuple[float, float]
    faults: dict[int, tuple[str, float]] = field(default_factory=dict)


@dataclass
class Tally:
    """What a run has seen."""

    problems: int = 0
    healthy: int = 0
    faults: int = 0
    events: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Tally) -> Tally:
        self.problems += other.problems
        self.healthy += other.healthy
        self.faults += other.faults
        self.events += other.events
        return self


def scale(choose: random.Random, largest: float = 30.0) -> float:
    """Half of the time 1, else anything from ``10**-largest`` to ``10**largest``."""
    return 1.0 if choose.random() < 0.5 else 10.0 ** choose.uniform(-largest, largest)


def draw(choose: random.Random) -> Problem:
    """One random problem; torch's global generator makes the entries."""
    n, m = (choose.choice((1, 2, 3, 4, 5, 8, 12)) for _ in range(2))
    r = choose.choice((1, 1, 2, 3, 8, 17))
    if choose.random() < 0.2:  # something ordinary, which the others must not disturb
        b_scale = choose.choice((0.0, 1.0))
        layer = Layer(n, m, r, 1.0, b_scale)
        return Problem(layer, choose.randint(1, 7), "gaussian", 1.0, 1.0, (1.0, b_scale))
    a_scale = 0.0 if choose.random() < 0.1 else scale(choose)
    b_scale = 0.0 if choose.random() < 0.3 else scale(choose)
    problem = Problem(
        Layer(n, m, r, a_scale, b_scale),
        rows=choose.choice((0, 1, 2, 7)),
        inputs=choose.choice(sorted(INPUTS)),
        input_scale=scale(choose),
        loss_scale=scale(choose),
        factor_scales=(a_scale, b_scale),
    )
    for step in range(STEPS):
        if choose.random() < 0.2:
            problem.faults[step] = (choose.choice(FAULTS), choose.choice(BAD))
    return problem


def settings(choose: random.Random) -> dict[str, Any]:
    """Hyper-parameters, ordinary and not."""
    return {
        "lr": choose.choice((0.0, 1e-6, 1e-3, 1e-3, 1e-2, 1e-2, 1.0, 1e3, 1e30)),
        "momentum": choose.choice((0.0, 0.5, 0.8, 0.999)),
        "betas": (
            choose.choice((0.0, 0.5, 0.9, 0.999)),
            choose.choice((0.0, 0.9, 0.999, 1 - 1e-9)),
        ),
        "eps": choose.choice((0.0, 1e-30, 1e-8, 1e-8, 1.0)),
        "weight_decay": choose.choice((0.0, 1e-2, 1.0, 1e10)),
        "damping": 10.0 ** choose.uniform(-6, 2),
        "curvature": choose.choice(("auto", "auto", "dense", 1, 3)),
    }


def is_healthy(problem: Problem, dtype: torch.dtype, numbers: dict[str, Any]) -> bool:
    """Whether nothing is wrong with a problem, so that it must train beside the others."""
    return (
        not problem.faults
        and problem.rows > 0
        and problem.inputs in ("gaussian", "constant", "one row")
        and problem.input_scale == problem.loss_scale == 1.0
        and problem.factor_scales in ((1.0, 0.0), (1.0, 1.0))
        and dtype in (torch.float32, torch.float64)
        and 1e-3 <= numbers["lr"] <= 1.0
        and numbers["weight_decay"] <= 1.0
    )


def clamp_into_range(model: nn.Module) -> None:
    """Parameters are finite to begin with, whatever the dtype."""
    with torch.no_grad():
        for parameter in model.parameters():
            largest = torch.finfo(parameter.dtype).max
            parameter.copy_(parameter.nan_to_num(0.0, largest, -largest))


def loss_of(problem: Problem, step: int, dtype: torch.dtype) -> Tensor:
    n = problem.layer.base_layer.in_features
    x = INPUTS[problem.inputs](torch.randn(problem.rows, n)) * problem.input_scale
    kind, value = problem.faults.get(step, ("", 0.0))
    if kind == "input" and problem.rows:
        x[-1, -1] = value
    out = problem.layer(x.to(dtype))
    if kind == "output":
        out = out * value
    return out.sin().sum() * problem.loss_scale


def spoil_gradients(problem: Problem, step: int) -> None:
    kind, value = problem.faults.get(step, ("", 0.0))
    layer = problem.layer
    target = {
        "gradient of A": layer.lora_A.weight,
        "gradient of B": layer.lora_B.weight,
        "gradient of bias": layer.bias,
    }.get(kind)
    if target is not None and target.grad is not None:
        target.grad.view(-1)[-1] = value
    if kind == "no gradient":
        layer.lora_A.weight.grad = None


def check(model: nn.Module, optimizer: CGLoRAOptimizer) -> None:
    """Nothing that is not finite ever leaves a step.

    Raises:
        AssertionError: With the name of the first tensor that is not finite.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"state {key} of {name}"] = value
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])
    if not bool(torch.isfinite(flat).all()):
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        raise AssertionError(f"not finite: {bad}")
    for name, tensor in tensors.items():
        if "exp_avg_sq" in name or "trace" in name:
            assert not bool((tensor < 0).any()), name


@contextlib.contextmanager
def without_looking(wanted: bool) -> Iterator[None]:
    """Take the way of accelerators, on which values must not be read."""
    if not wanted:
        yield
        return
    kept, host.at_hand = host.at_hand, lambda tensor: False
    try:
        yield
    finally:
        host.at_hand = kept


def run(seed: int, problems: int = 40) -> Tally:
    """Train some random problems together for a few steps, checking after each.

    Raises:
        AssertionError: If a value that is not finite got out.
    """
    choose = random.Random(seed)
    torch.manual_seed(seed)
    dtype = choose.choice(DTYPES)
    drawn = [draw(choose) for _ in range(problems)]
    model = nn.ModuleList(problem.layer for problem in drawn).to(dtype)
    clamp_into_range(model)
    tally = Tally(problems, faults=sum(len(problem.faults) for problem in drawn))
    with without_looking(choose.random() < 0.25), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CGOptimWarning)
        numbers = settings(choose)
        optimizer = CGLoRAOptimizer(model, **numbers)
        healthy = [p for p in drawn if is_healthy(p, dtype, numbers)]
        before = [problem.layer.lora_B.weight.detach().clone() for problem in healthy]
        for step in range(STEPS):
            losses = [loss_of(problem, step, dtype) for problem in drawn]
            torch.stack(losses).sum().backward()
            for problem in drawn:
                spoil_gradients(problem, step)
            optimizer.step()
            optimizer.zero_grad()
            check(model, optimizer)
        for problem, value in zip(healthy, before, strict=True):
            assert not torch.equal(problem.layer.lora_B.weight, value), "a healthy problem stood"
        tally.healthy = len(healthy)
        tally.events.update(optimizer.diagnostics())
    return tally
