"""Cost of a training step with each optimizer; see :mod:`benchmarks.step`.

At the shapes of large models the adapters alone are run, on synthetic activations, and one or a few
decoder layers stand for all; the state of all layers is counted from the shapes. The share of a
whole training step is measured on the small language models of :mod:`benchmarks.works.lm`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..cells import environment, write_json


@dataclass(frozen=True)
class Preset:
    """What is measured.

    Attributes:
        models, ranks: every model at every rank.
        checked_ranks: ranks at which a step is compared with float64.
        layers: decoder layers that are run.
        tokens: rows of every activation.
        cycles: repeats of the refresh schedule.
    """

    models: tuple[str, ...]
    ranks: tuple[int, ...]
    checked_ranks: tuple[int, ...]
    layers: int
    tokens: int
    cycles: int


LARGE = ("llama-7b", "llama-13b", "llama-70b")
PRESETS = {
    "tiny": Preset(("toy",), (4,), (4,), layers=2, tokens=16, cycles=1),
    "quick": Preset(LARGE[:1], (8, 16), (8,), layers=1, tokens=512, cycles=3),
    "full": Preset(LARGE, (8, 16, 64), (8,), layers=1, tokens=512, cycles=4),
    "gpu": Preset(LARGE, (8, 16, 64, 256), (8, 256), layers=8, tokens=4096, cycles=10),
}
CHECKED_TOKENS = 256


def run_step(preset: str, device: str, out: Path) -> Path:
    """Measure everything of a preset and write ``out/step/<preset>-<device>.json``.

    The file holds ``rows`` (one for each model and rank: ``model``, ``rank``, ``layers_timed``,
    ``layers``, ``state_bytes`` of all layers and ``ms`` of the optimizer step for each optimizer,
    and what :func:`benchmarks.step.measure.measure_model` adds), ``training_step``,
    ``step_error_against_float64`` and ``cuda_graph``.
    """
    from ..step import checks, measure, training
    from .lm import BASES, BATCHES

    settings = PRESETS[preset]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows: list[dict[str, Any]] = []
    for model in settings.models:
        for rank in settings.ranks:
            row = measure.measure_model(
                model,
                rank,
                layers=settings.layers,
                tokens=settings.tokens,
                cycles=settings.cycles,
                device=device,
                dtype=dtype,
            )
            print(_line(row), flush=True)
            rows.append(row)
    shares = [
        share
        for sizes in BATCHES[preset].values()
        for share in training.measure_training(
            BASES[preset],
            batch_size=sizes["batch"],
            rank=sizes["rank"],
            cycles=settings.cycles,
            device=device,
        )
    ]
    for share in shares:
        print(_share_line(share), flush=True)
    tokens = min(settings.tokens, CHECKED_TOKENS)
    errors = [
        {"model": model, "rank": rank, "error": checks.step_error(model, rank, tokens, device)}
        for model in settings.models
        for rank in settings.checked_ranks
    ]
    graphs: dict[str, Any] = {}
    path = out / "step" / f"{preset}-{device}.json"
    record = {
        "preset": preset,
        "settings": {**asdict(settings), "activations": str(dtype).removeprefix("torch.")},
        "environment": environment(device, torch.get_num_threads()),
        "rows": rows,
        "training_step": shares,
        "step_error_against_float64": errors,
        "cuda_graph": graphs,
    }
    write_json(path, record)
    if device != "cpu":
        # Last, with the rest on disk: a capture that fails can leave the device unusable.
        model, rank = settings.models[0], settings.ranks[0]
        graphs.update(checks.graph_support(model, rank, settings.layers, settings.tokens))
        write_json(path, record)
    return path


def _line(row: dict[str, Any]) -> str:
    ms, state = row["ms"], row["state_bytes"]
    return (
        f"{row['model']} r={row['rank']}: step of {row['layers_timed']} layer(s) "
        + ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items())
        + f"; hooks {row['ms_hooks']['average']:.2f} ms; of a whole training step about "
        f"{row['share_estimate']['adamw_fused']:.2%} and {row['share_estimate']['cg']:.2%}; state of all {row['layers']} layers "
        f"{state['cg'] / 2**20:.0f} MiB, {state['cg'] / state['adamw_fused']:.2f} x AdamW's"
    )


def _share_line(share: dict[str, Any]) -> str:
    return (
        f"{share['model']} batch {share['batch']} x {share['sequence']}, {share['name']}: "
        f"forward and backward {share['ms_forward_backward']:.1f} ms, hooks "
        f"{share['ms_hooks']:.2f} ms, step {share['ms_step']:.2f} ms: {share['share']:.1%}"
    )
