"""Moves the frozen weights under adapters that do not start at zero, and moves them back.

Subtracting ``s B A`` from the base keeps the function while the adapter starts at the Newton
step.  Floating point cannot in general add back what it has subtracted, so the entries in
which that fails (a few percent, none of them if the step is small) are remembered: moving back
is exact to the bit, without a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cg_optim.alignment import Factors
from cg_optim.errors import InitialisationError
from cg_optim.pairs import LoRAPair
from cg_optim.precision import autocast_off

#: About so many entries are moved at a time: few enough to stay in a processor's cache.
BLOCK = 2**17
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
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
        places: Flat indices, in the weight as it is stored, of the entries that adding back gets
            wrong.
        values: What these entries were.
    """

    base: BaseWeight
    start: Factors
    scaling: float
    places: Tensor
    values: Tensor

    def move_back(self) -> None:
        """Give the weight its old value, bit for bit."""
        stored = self.base.parameter.detach()
        # The rounding to undo is that of the device the weight was moved on.
        there = stored.to(self.values.device)
        for block, product in _products(there, self.base.transposed, self.start, self.scaling):
            block.copy_(_plus(block, product))
        there[torch.unravel_index(self.places.long(), there.shape)] = self.values
        if there is not stored:
            stored.copy_(there)


def move(base: BaseWeight, start: Factors, scaling: float) -> MovedWeight:
    """Subtract ``s B A`` from a base weight, in place and a block of rows at a time.

    Args:
        base: The weight.
        start: ``A`` and ``B`` as they are stored, rounded to their own precision.
        scaling: ``s``.
    """
    kept = Factors(start.down.clone(), start.up.clone())
    size = base.parameter.numel()
    index = torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64
    places, values, offset = [], [], 0
    stored = base.parameter.detach()
    for block, product in _products(stored, base.transposed, kept, scaling):
        before = block.clone()
        block.copy_(_plus(before, product, -1.0))
        different = _bits(_plus(block, product)).bitwise_xor_(_bits(before))
        wrong = different.flatten().nonzero().squeeze(-1)
        values.append(before.flatten()[wrong])
        places.append((wrong + offset).to(index))
        offset += block.numel()
    return MovedWeight(base, kept, scaling, torch.cat(places), torch.cat(values))


def _products(
    stored: Tensor, transposed: bool, start: Factors, scaling: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows of the weight as it is stored, each with its part of ``s B A``."""
    wide = torch.promote_types(stored.dtype, torch.float32)
    left, right = scaling * start.up.to(wide), start.down.to(wide)
    if transposed:
        left, right = right.mT, left.mT
    rows = max(1, BLOCK // stored.shape[1])
    for block, part in zip(stored.split(rows), left.split(rows), strict=True):
        with autocast_off((stored,)):
            product = part @ right
        yield block, product


def _plus(matrix: Tensor, product: Tensor, sign: float = 1.0) -> Tensor:
    return torch.add(matrix.to(product.dtype), product, alpha=sign).to(matrix.dtype)


def _bits(matrix: Tensor) -> Tensor:
    """The entries as integers: unlike numbers they tell -0 from 0, and they compare faster."""
    return matrix.view(_INTEGERS[matrix.element_size()])
