"""Moves the frozen weights under adapters that do not start at zero, and moves them back.

Subtracting ``s B A`` from the base keeps the function while the adapter starts at the Newton
step.  Floating point cannot in general add back what it has subtracted, so the entries in
which that fails (a few percent, none of them if the step is small) are remembered: moving back
is exact to the bit, without a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cg_optim.alignment import Factors
from cg_optim.errors import InitialisationError
from cg_optim.pairs import LoRAPair

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BaseWeight:
    """The frozen weight that a pair is added to.

    Attributes:
        parameter: The weight, ``(m, n)``.
        transposed: Whether it is stored as ``(n, m)``, as ``Conv1D`` of transformers does.
    """

    parameter: nn.Parameter
    transposed: bool

    def matrix(self) -> Tensor:
        """A view of the weight as ``(m, n)``."""
        return self.parameter.detach().t() if self.transposed else self.parameter.detach()


def find_base_weights(pairs: Sequence[LoRAPair]) -> dict[LoRAPair, BaseWeight]:
    """The weights of all layers.

    Raises:
        InitialisationError: If one is quantized or not found, or if two layers share one.
    """
    found = {pair: find_base_weight(pair) for pair in pairs}
    owners: dict[int, str] = {}
    for pair, base in found.items():
        owner = owners.setdefault(id(base.parameter), pair.name)
        if owner != pair.name:
            raise InitialisationError(
                f"{pair.name} and {owner} share one base weight, which cannot be moved for both; "
                "use mode='keep' or mode='newton'"
            )
    return found


def find_base_weight(pair: LoRAPair) -> BaseWeight:
    """The weight of the layer that ``pair`` adapts.

    Raises:
        InitialisationError: If it is quantized, or if the layer has no weight or several
            that fit.
    """
    layer = pair.input_module
    wrapped = getattr(layer, "base_layer", None)
    places = [wrapped] if isinstance(wrapped, nn.Module) else [layer]
    if layer is not None and not isinstance(wrapped, nn.Module):
        places.extend(layer.children())
    fitting = [found for place in places if place is not None for found in _weights_in(place, pair)]
    if len(fitting) != 1:
        raise InitialisationError(
            f"{pair.name}: the frozen weight under the adapter was not found ({len(fitting)} of "
            f"shape {(pair.out_features, pair.in_features)} in its layer); use mode='keep' or "
            "'newton', which leave it alone"
        )
    return fitting[0]


def _weights_in(module: nn.Module, pair: LoRAPair) -> list[BaseWeight]:
    weight = module._parameters.get("weight")
    if weight is None or weight is pair.A or weight is pair.B:
        return []
    quantized = weight.dtype not in _FLOATING or hasattr(module, "quant_state")
    if quantized or hasattr(weight, "quant_state"):
        raise InitialisationError(
            f"{pair.name}: its base weight is quantized ({weight.dtype}) and cannot be moved; use "
            "mode='keep' or mode='newton', which leave it alone"
        )
    shape = (pair.out_features, pair.in_features)
    # nx and nf are what transformers' Conv1D calls its sizes; loralib says fan_in_fan_out.
    transposed = hasattr(module, "nf") or getattr(module, "fan_in_fan_out", False) is True
    wanted = shape[::-1] if transposed else shape
    return [BaseWeight(weight, transposed)] if tuple(weight.shape) == wanted else []


@dataclass(frozen=True)
class MovedWeight:
    """One base weight after it was moved.

    Attributes:
        base: The weight.
        start: The factors it was moved by.
        scaling: ``s``.
        places: Flat indices of the entries that adding back gets wrong.
        values: What these entries were.
    """

    base: BaseWeight
    start: Factors
    scaling: float
    places: Tensor
    values: Tensor

    def move_back(self) -> None:
        """Give the weight its old value, bit for bit."""
        matrix = self.base.matrix()
        restored = _plus(matrix, _product(self.start, self.scaling, matrix)).flatten()
        restored[self.places] = self.values
        matrix.copy_(restored.view_as(matrix))


def move(base: BaseWeight, start: Factors, scaling: float) -> MovedWeight:
    """Subtract ``s B A`` from a base weight, in place; one layer's worth of memory.

    Args:
        base: The weight.
        start: ``A`` and ``B`` as they are stored, rounded to their own precision.
        scaling: ``s``.
    """
    matrix = base.matrix()
    before = matrix.clone()
    product = _product(start, scaling, matrix)
    matrix.copy_(_plus(before, -product))
    wrong = (_plus(matrix, product) != before).flatten()
    places = wrong.nonzero().squeeze(-1)
    kept = Factors(start.down.clone(), start.up.clone())
    return MovedWeight(base, kept, scaling, places, before.flatten()[places].clone())


def _product(start: Factors, scaling: float, like: Tensor) -> Tensor:
    wide = torch.promote_types(like.dtype, torch.float32)
    return scaling * (start.up.to(wide) @ start.down.to(wide))


def _plus(matrix: Tensor, product: Tensor) -> Tensor:
    return (matrix.to(product.dtype) + product).to(matrix.dtype)
