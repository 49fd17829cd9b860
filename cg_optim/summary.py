"""The table behind ``optimizer.summary()``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cg_optim.pairs import LoRAPair, factor_ids

COLUMNS = ("layer", "kind", "A", "B", "rank", "scaling", "curvature")


def render_summary(
    pairs: Sequence[LoRAPair],
    groups: Iterable[Mapping[str, Any]],
    left_out: Mapping[str, str],
    model: nn.Module | None,
    curvature_of: Sequence[str],
) -> str:
    """One line per pair, then what is left to AdamW and why.

    Args:
        pairs: The pairs being optimised.
        groups: The optimizer's parameter groups.
        left_out: Reasons by parameter name, from discovery.
        model: Where parameter names come from; None if unknown.
        curvature_of: For each observed pair, how its curvature is held and where it comes from.
    """
    rows = [COLUMNS]
    for pair, held in zip(pairs, curvature_of, strict=True):
        observed = held if pair.observed else f"none: {pair.note or 'gradient only'}"
        shapes = (_shape(pair.A), _shape(pair.B))
        rows.append((pair.name, pair.kind, *shapes, str(pair.rank), f"{pair.scaling:g}", observed))
    lines = [*aligned(rows), "", _count(pairs)] if pairs else ["no LoRA pairs", ""]
    return "\n".join([*lines, *_left_to_adamw(pairs, groups, left_out, model)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns are as wide as they need; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _count(pairs: Sequence[LoRAPair]) -> str:
    values = sum(pair.A.numel() + pair.B.numel() for pair in pairs)
    observed = sum(pair.observed for pair in pairs)
    how = [f"{observed} with input curvature"] if observed else []
    if observed < len(pairs):
        how.append(f"{len(pairs) - observed} by the gradient-only rule")
    noun = "pair" if len(pairs) == 1 else "pairs"
    return f"LoRA: {len(pairs)} {noun}, {values:,} values; {' and '.join(how)}"


def _left_to_adamw(
    pairs: Sequence[LoRAPair],
    groups: Iterable[Mapping[str, Any]],
    left_out: Mapping[str, str],
    model: nn.Module | None,
) -> list[str]:
    paired = factor_ids(pairs)
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    others = [p for group in groups for p in group["params"] if id(p) not in paired]
    total = sum(p.numel() for p in others)
    lines = [f"left to AdamW: {len(others)} tensors, {total:,} values"]
    for index, parameter in enumerate(others):
        name = names.get(id(parameter), f"parameter {index}")
        usual = "not a LoRA factor" if parameter.requires_grad else "frozen (requires_grad=False)"
        lines.append(f"  {name} {_shape(parameter)}: {left_out.get(name, usual)}")
    optimised = {names.get(id(p)) for p in others}
    rest = {name: reason for name, reason in left_out.items() if name not in optimised}
    if rest:
        lines.append("not optimised as pairs:")
        lines.extend(f"  {name}: {reason}" for name, reason in rest.items())
    return lines


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
