"""What an initialisation did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cg_optim.alignment import Factors
from cg_optim.initialisation.base_weights import MovedWeight
from cg_optim.linalg import effective_rank
from cg_optim.pairs import LoRAPair

#: The suggested rank captures this part of a layer's energy.
SUGGESTED_ENERGY = 0.9


@dataclass(frozen=True)
class LayerReport:
    """One layer; energies are squared singular values of its whitened gradient.

    Attributes:
        name: Name of the pair.
        rank: Its rank ``r``.
        captured_energy: Part of the energy in the ``r`` leading directions, 0 to 1.
        effective_rank: How many equally strong directions the gradient is like
            (:func:`cg_optim.linalg.effective_rank` of the energies); what the sketch does not
            hold of them counts as spread evenly, so that this is an upper bound.
        suggested_rank: Smallest rank that captures :data:`SUGGESTED_ENERGY` of the energy;
            the size of the sketch where that is not enough.
    """

    name: str
    rank: int
    captured_energy: float
    effective_rank: float
    suggested_rank: int


def layer_report(pair: LoRAPair, values: Tensor, energy: Tensor) -> LayerReport:
    """Summarise a layer.

    Args:
        pair: The pair.
        values: Leading singular values ``(k,)`` of the whitened gradient, descending.
        energy: The sum of all of its squared singular values.
    """
    squares = values.double().square()
    shares = squares.cumsum(0) / energy.double()
    enough = shares >= SUGGESTED_ENERGY
    suggested = int(enough.int().argmax()) + 1 if bool(enough.any()) else len(values)
    others = min(pair.in_features, pair.out_features) - len(values)
    rest = (energy.double() - squares.sum()).clamp_min(0)
    spectrum = torch.cat([squares, (rest / max(others, 1)).expand(others)])
    return LayerReport(
        pair.name,
        pair.rank,
        min(1.0, float(shares[min(pair.rank, len(shares)) - 1])),
        effective_rank(spectrum),
        suggested,
    )


@dataclass
class InitReport:
    """What :func:`~cg_optim.curvature_init_` did; ``print`` it for a table.

    Attributes:
        mode: ``"keep"``, ``"newton"`` or ``"shift"``.
        layers: One entry for each pair that was initialised.
        left_out: Name to reason, for each pair that kept its old start.
        length: Length of the Newton step taken, None in mode ``"keep"``.
        loss_before: Loss of the batch on which the length was found, None if it was given.
        loss_after: The same with the adapters at their start.
        bytes_held: Most memory that the statistics took, in bytes.
        moved: The base weights moved in mode ``"shift"``, by the name of the pair.
    """

    mode: str
    layers: tuple[LayerReport, ...]
    left_out: dict[str, str]
    length: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    bytes_held: int = 0
    moved: dict[str, MovedWeight] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def restore_base_(self) -> None:
        """Give every moved base weight its old value, bit for bit.

        The trained adapters then need what was moved as well: :meth:`on_restored_base`.
        """
        for moved in self.moved.values():
            moved.move_back()
        self.moved = {}

    def on_restored_base(self, name: str, down: Tensor, up: Tensor) -> Factors:
        """The trained factors of a pair as ones of rank ``2 r`` for the base as it was.

        Args:
            name: Name of the pair; call before :meth:`restore_base_`.
            down: Its ``A`` now, ``(r, n)``.
            up: Its ``B`` now, ``(m, r)``.

        Returns:
            ``A`` ``(2 r, n)`` and ``B`` ``(m, 2 r)`` with ``B A`` the change since then.
        """
        start = self.moved[name].start
        return Factors(torch.cat([down, start.down.to(down)]), torch.cat([up, -start.up.to(up)], 1))

    def __str__(self) -> str:
        lines = [f"curvature initialisation, mode {self.mode!r}"]
        if self.length is not None:
            lines[0] += f", step length {self.length:.3g}"
        if self.loss_before is not None and self.loss_after is not None:
            lines[0] += f", loss {self.loss_before:.4f} -> {self.loss_after:.4f}"
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        lines.append(f"{'layer':<{width}}  rank  captured  effective rank  suggested rank")
        lines.extend(
            f"{layer.name:<{width}}  {layer.rank:>4}  {layer.captured_energy:>8.1%}"
            f"  {layer.effective_rank:>14.1f}  {layer.suggested_rank:>14}"
            for layer in self.layers
        )
        lines.extend(f"{name}: left as it was, {reason}" for name, reason in self.left_out.items())
        return "\n".join(lines)
