"""Cost of a training step with each optimizer; see :mod:`benchmarks.step`.

At the shapes of large models the adapters alone are run, on synthetic activations, and one or a few
decoder layers stand for all; the state of all layers is counted from the shapes. The share of a
whole training step is measured on the small language models of :mod:`benchmarks.works.lm`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
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
    "full": Preset(LARGE, (8, 16, 64), (8,), layers=1, tokens=512, cycles=3),
    "gpu": Preset(LARGE, (8, 16, 64, 256), (8, 256), layers=8, tokens=4096, cycles=6),
}
CHECKED_TOKENS = 256
ERRORS = "step_error_against_float64"


def run_step(preset: str, device: str, out: Path) -> Path:
    """Measure everything of a preset and write ``out/step/<preset>-<device>.json``.

    The file holds ``rows`` (one for each model and rank: ``model``, ``rank``, ``layers_timed``,
    ``layers``, ``state_bytes`` of all layers and ``ms`` of the optimizer step for each optimizer,
    and what :func:`benchmarks.step.measure.measure_model` adds), ``training_step``,
    ``step_error_against_float64``, ``cuda_graph``, and ``failures``, e.g. for lack of memory.
    It is written after every row, and what it holds from the same commit, machine and versions is
    not measured again.
    """
    from ..step import checks, measure, training
    from .lm import BASES, BATCHES

    settings = PRESETS[preset]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    path = out / "step" / f"{preset}-{device}.json"
    head = {
        "preset": preset,
        "settings": {**asdict(settings), "activations": str(dtype).removeprefix("torch.")},
        "environment": environment(device, torch.get_num_threads()),
    }
    record = _started(path, head)

    def add(part: str, key: dict[str, Any], work: Callable[[], list[dict[str, Any]]]) -> None:
        if any(key.items() <= row.items() for row in record[part]):
            return
        try:
            rows = work()
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            record["failures"].append({"part": part, **key, "error": reason})
            rows = []
        record[part] += rows
        write_json(path, record)
        for row in rows:
            print(_LINES[part](row), flush=True)

    def measured(model: str, rank: int) -> list[dict[str, Any]]:
        return [
            measure.measure_model(
                model,
                rank,
                layers=settings.layers,
                tokens=settings.tokens,
                cycles=settings.cycles,
                device=device,
                dtype=dtype,
            )
        ]

    def checked(model: str, rank: int) -> list[dict[str, Any]]:
        tokens = min(settings.tokens, CHECKED_TOKENS)
        error = checks.step_error(model, rank, tokens, device)
        return [{"model": model, "rank": rank, "error": error}]

    for model, rank in product(settings.models, settings.ranks):
        add("rows", {"model": model, "rank": rank}, partial(measured, model, rank))
    for sizes in BATCHES[preset].values():
        work = partial(
            training.measure_training,
            BASES[preset],
            batch_size=sizes["batch"],
            rank=sizes["rank"],
            cycles=settings.cycles,
            device=device,
        )
        add("training_step", {"batch": sizes["batch"], "rank": sizes["rank"]}, work)
    for model, rank in product(settings.models, settings.checked_ranks):
        add(ERRORS, {"model": model, "rank": rank}, partial(checked, model, rank))
    if device != "cpu" and not record["cuda_graph"]:
        # Last, with the rest on disk: a capture that fails can leave the device unusable.
        record["cuda_graph"] = checks.graph_support(
            settings.models[0], settings.ranks[0], settings.layers, settings.tokens, device
        )
        write_json(path, record)
    return path


def _started(path: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The record so far if it is of the same commit, machine, versions and settings."""
    found: dict[str, Any] = {"rows": [], "training_step": [], ERRORS: [], "cuda_graph": {}}
    with contextlib.suppress(OSError, json.JSONDecodeError):
        known = json.loads(path.read_text(encoding="utf-8"))
        # As JSON: tuples come back as lists.
        if json.loads(json.dumps(head)) == {key: known.get(key) for key in head}:
            found.update({key: known[key] for key in found if key in known})
    return {**head, **found, "failures": []}


def _row_line(row: dict[str, Any]) -> str:
    ms, state, share = row["ms"], row["state_bytes"], row["share_estimate"]
    return (
        f"{row['model']} r={row['rank']}: step of {row['layers_timed']} layer(s) "
        + ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items())
        + f"; hooks {row['ms_hooks']['average']:.2f} ms; of a whole training step about "
        f"{share['adamw_fused']:.2%} and {share['cg']:.2%}; state of all {row['layers']} layers "
        f"{state['cg'] / 2**20:.0f} MiB, {state['cg'] / state['adamw_fused']:.2f} x AdamW's"
    )


def _share_line(share: dict[str, Any]) -> str:
    return (
        f"{share['model']} batch {share['batch']} x {share['sequence']}, {share['name']}: "
        f"forward and backward {share['ms_forward_backward']:.1f} ms, hooks "
        f"{share['ms_hooks']:.2f} ms, step {share['ms_step']:.2f} ms: {share['share']:.1%}"
    )


def _error_line(error: dict[str, Any]) -> str:
    return f"{error['model']} r={error['rank']}: step within {error['error']:.1e} of float64"


_LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "rows": _row_line,
    "training_step": _share_line,
    ERRORS: _error_line,
}
