"""How methods look in plots: the same everywhere, ours in front."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "cg"
DPI = 100
COLOURS = 192
NEAR = 8
"""Colours of the palette, and how far (of 255) they stay from the lines' own."""

_SOLID, _DASHED, _DOTTED = "-", (0, (5, 2)), (0, (1, 1.2))
_STYLES: dict[str, tuple[str, Any, str]] = {
    "cg": ("#d62728", _SOLID, "o"),
    "adamw": ("#111111", _SOLID, "s"),
    "full-adamw": ("#666666", _DASHED, "D"),
    "full-muon": ("#a0a0a0", _DASHED, "d"),
    "soap": ("#1f77b4", _SOLID, "^"),
    "lora+": ("#ff7f0e", _SOLID, "v"),
    "lora-rite": ("#2ca02c", _SOLID, "<"),
    "riemannian": ("#9467bd", _SOLID, ">"),
    "muon": ("#17becf", _SOLID, "p"),
    "kron": ("#bcbd22", _SOLID, "h"),
    "shampoo": ("#8c564b", _SOLID, "P"),
    "lora-fa": ("#e377c2", _SOLID, "X"),
    "eva": ("#1f77b4", _DOTTED, "^"),
    "lora-ga": ("#2ca02c", _DOTTED, "<"),
    "pissa": ("#9467bd", _DOTTED, ">"),
    "corda": ("#8c564b", _DOTTED, "P"),
}
_OTHERS = ("#e7969c", "#7b4173", "#637939", "#3182bd", "#e6550d", "#756bb1", "#843c39", "#31a354")
_VARIANTS = ("#ff9896", "#8b0000", "#e6550d", "#c51b8a", "#fdae6b", "#7a0177")


def style(method: str) -> dict[str, Any]:
    """Line properties of a method; a variant of ours is a dashed line of a reddish colour."""
    if method in _STYLES:
        colour, dashes, marker = _STYLES[method]
    else:
        base = method.partition("[")[0]
        colours = _VARIANTS if base == OURS else _OTHERS
        colour = colours[zlib.crc32(method.encode()) % len(colours)]
        dashes, marker = _DASHED, "o" if base == OURS else "*"
    front = {OURS: (3.0, 10), "adamw": (2.2, 9)}
    width, order = front.get(method, (1.4, 5))
    return {
        "color": colour, "linestyle": dashes, "marker": marker, "linewidth": width, "zorder": order,
    }  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with a palette, a third of the size; lines keep their colours exactly."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    image = Image.fromarray(pixels[..., :3].copy())
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    named = {to_rgb(line.get_color()) for line in lines} | {(1.0, 1.0, 1.0)}
    exact = [tuple(round(255 * part) for part in colour) for colour in sorted(named)]
    adapted = np.array(image.quantize(COLOURS).getpalette()).reshape(-1, 3)
    # Pillow looks colours up in coarse boxes: a neighbour of an exact one would take its place.
    apart = [row for row in adapted.tolist() if min(map(partial(_distance, row), exact)) > NEAR]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for colour in (*exact, *apart)[:COLOURS] for part in colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


def _distance(one: Sequence[int], other: Sequence[int]) -> int:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that no window system and no global state knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")
