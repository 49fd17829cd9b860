"""Cost of the optimizer step at the shapes of large models, without their base weights.

One decoder layer is timed, gradients set by hand, so hooks and curvature do not take part; the
state of all layers is counted from the shapes.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cg_optim import CGLoRAOptimizer, LoRAPair

from ..cells import environment, write_json


@dataclass(frozen=True)
class Model:
    """Sizes of a model of Llama's kind; ``kv`` is the width of keys and values."""

    layers: int
    hidden: int
    inner: int
    kv: int

    def linears(self) -> list[tuple[int, int]]:
        """Output and input sizes of one decoder layer's linear layers."""
        h, i = self.hidden, self.inner
        return [(h, h), (self.kv, h), (self.kv, h), (h, h), (i, h), (i, h), (h, i)]


MODELS = {
    "llama-7b": Model(32, 4096, 11008, 4096),
    "llama-13b": Model(40, 5120, 13824, 5120),
    "llama-70b": Model(80, 8192, 28672, 1024),
    "toy": Model(2, 32, 64, 16),
}
PRESETS: dict[str, tuple[tuple[str, ...], tuple[int, ...], int]] = {
    "tiny": (("toy",), (4,), 2),
    "quick": (("llama-7b",), (8, 16), 3),
    "full": (("llama-7b", "llama-13b", "llama-70b"), (8, 16, 64), 5),
    "gpu": (("llama-7b", "llama-13b", "llama-70b"), (8, 16, 64, 256), 20),
}


def adamw_state_bytes(model: Model, rank: int) -> int:
    """State of AdamW in float32 for all layers: two moments and a step count per parameter."""
    sizes = [(m + n) * rank for m, n in model.linears()]
    return model.layers * sum(8 * size + 2 * 4 for size in sizes)


def make_pairs(model: Model, rank: int, device: str) -> list[LoRAPair]:
    """The adapters of one decoder layer, with gradients."""
    pairs = []
    for index, (m, n) in enumerate(model.linears()):
        down = nn.Parameter(torch.randn(rank, n, device=device) / n**0.5)
        up = nn.Parameter(torch.randn(m, rank, device=device) * 0.01)
        for factor in (down, up):
            factor.grad = torch.randn_like(factor)
        pairs.append(LoRAPair(A=down, B=up, name=f"linear{index}", scaling=1.0))
    return pairs


def run_step(preset: str, device: str, out: Path) -> Path:
    """Time the steps of one decoder layer and write ``out/step/<preset>-<device>.json``."""
    models, ranks, repeats = PRESETS[preset]
    rows = [time_steps(name, rank, repeats, device) for name in models for rank in ranks]
    path = out / "step" / f"{preset}-{device}.json"
    about = environment(device, torch.get_num_threads())
    write_json(path, {"preset": preset, "environment": about, "rows": rows})
    return path


def time_steps(name: str, rank: int, repeats: int, device: str) -> dict[str, Any]:
    """Median milliseconds of each optimizer's step, the optimizers taking turns."""
    model = MODELS[name]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for kind in ("foreach", "fused"):
        options: Any = {kind: True}
        parameters = [p for pair in make_pairs(model, rank, device) for p in (pair.A, pair.B)]
        optimizers[f"adamw_{kind}"] = torch.optim.AdamW(parameters, lr=1e-4, **options)
    pairs = make_pairs(model, rank, device)
    factors = [p for pair in pairs for p in (pair.A, pair.B)]
    optimizers["cg_without_curvature"] = CGLoRAOptimizer(
        factors, lr=1e-4, pairs=pairs, curvature=None
    )
    times: dict[str, list[float]] = {key: [] for key in optimizers}
    for turn in range(repeats + 2):
        for key, optimizer in optimizers.items():
            _wait(device)
            start = time.perf_counter()
            optimizer.step()
            _wait(device)
            if turn >= 2:
                times[key].append(1e3 * (time.perf_counter() - start))
    return {
        "model": name,
        "rank": rank,
        "layers_timed": 1,
        "layers": model.layers,
        "adamw_state_bytes": adamw_state_bytes(model, rank),
        "ms": {key: statistics.median(values) for key, values in times.items()},
    }


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
