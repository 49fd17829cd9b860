"""LoRA outside PEFT: loralib, hand-written layers and weight parametrizations.

Pairs are found by name within one module (swapping the word for A gives the name of
B), then by shape.  Three layouts of the stored matrices occur in the wild:

* plain: ``A (r, n)``, ``B (m, r)``, computing ``B A x``;
* transposed: ``A (n, r)``, ``B (r, m)``, computing ``x A B``;
* swapped: ``A (m, r)``, ``B (r, n)``, adding ``A B`` to the weight, so that the parameter
  called A is the up projection.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cg_optim.discovery.findings import (
    CONVOLUTION,
    EMBEDDING,
    Candidate,
    Finding,
    LeftOut,
    Site,
    refuse_merged,
    refuse_sharded,
    weight_of,
)
from cg_optim.discovery.surroundings import Surroundings, looks_up_rows

# The word for A in an attribute's name, standing alone or right behind "lora".
_A_WORD = re.compile(r"(?:(?<![A-Za-z])|(?<=lora)|(?<=LoRA))(A|a|down|Down)(?![A-Za-z])")
_B_WORD_OF = {"A": "B", "a": "b", "down": "up", "Down": "Up"}
# A and B alone say little: other words beside them must not say something else.
_NEUTRAL_WORDS = re.compile(r"(a|b|down|up|w|mat|matrix|weight|factor|q|k|v|o|qkv|[_\d])*")
_STACKED = "more than two dimensions: several experts or heads stacked in one parameter"
_FUSED = "fused projections: B holds the blocks of a grouped product"
_DECLARE = "declare it as a LoRAPair with input_module and output_module to change that"


class _Layout(NamedTuple):
    """How two stored matrices multiply."""

    rank: int
    n: int
    m: int
    transposed: bool = False
    swapped: bool = False

    @property
    def low_rank(self) -> bool:
        return self.rank < min(self.n, self.m)


@dataclass(frozen=True)
class _Slot:
    """An attribute that may be a factor.

    Attributes:
        parameter: The matrix.
        module: The submodule whose ``weight`` it is; ``None`` for a bare parameter.
        key: The key when it lives in a list or dictionary of factors, else empty.
    """

    parameter: nn.Parameter
    module: nn.Module | None = None
    key: str = ""


def recognise_custom(site: Site) -> list[Finding] | None:
    """Pairs among the attributes of one module; ``None`` if there are none.

    Raises:
        AdapterError: If the layer is merged or its factors are sharded.
    """
    slots = _slots(site.module)
    named = [(a_name, b_name) for a_name in slots if (b_name := _partner(a_name, slots))]
    if not named:
        return None
    factors = {name.partition(".")[0] for pair in named for name in pair}
    surroundings = Surroundings.of(site, factors)
    suffixes = [f" ({a_name})" if len(named) > 1 else "" for a_name, _ in named]
    findings = [
        _pair(site, a_name, (slots[a_name], slots[b_name]), surroundings, suffix)
        for (a_name, b_name), suffix in zip(named, suffixes, strict=True)
    ]
    return [finding for finding in findings if finding is not None]


# ------------------------------------------------------------------ finding two names


def _slots(module: nn.Module) -> dict[str, _Slot]:
    # The underscored dictionaries, since named_children() hides tied attributes.
    slots = {name: _Slot(value) for name, value in _parameters_in(module)}
    for name, child in module._modules.items():
        weight = weight_of(child)
        if weight is not None:
            slots[name] = _Slot(weight, child)
        elif isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            slots |= {
                f"{name}.{key}": _Slot(value, None, key) for key, value in _parameters_in(child)
            }
        elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            for key, entry in child._modules.items():
                weight = weight_of(entry)
                if weight is not None:
                    slots[f"{name}.{key}"] = _Slot(weight, entry, key)
    return slots


def _parameters_in(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in module._parameters.items() if value is not None]


def _partner(a_name: str, slots: dict[str, _Slot]) -> str:
    """The attribute called like ``a_name`` with B instead of A; empty if there is none."""
    for word in reversed(list(_A_WORD.finditer(a_name.partition(".")[0]))):
        b_name = a_name[: word.start()] + _B_WORD_OF[word[1]] + a_name[word.end() :]
        if b_name in slots:
            return b_name
    return ""


def _says_lora(text: str, *, bottleneck: bool) -> bool:
    # "adapter" with down and up is usually a bottleneck MLP with a nonlinearity inside.
    words = "lora(?!t)" if bottleneck else "lora(?!t)|adapter|low_?rank"  # not exploration
    return re.search(words, text, re.IGNORECASE) is not None


# ------------------------------------------------------------------- judging one pair


def _pair(
    site: Site, a_name: str, slots: tuple[_Slot, _Slot], surroundings: Surroundings, suffix: str
) -> Finding | None:
    a_slot, b_slot = slots
    parameters = (a_slot.parameter, b_slot.parameter)
    bottleneck = "down" in a_name.lower()
    explicit = _says_lora(a_name, bottleneck=bottleneck)
    if explicit and any(_is_shard(parameter) for parameter in parameters):
        refuse_sharded(f"{site.label}.{a_name}", parameters[0])
    if any(parameter.ndim < 2 for parameter in parameters):
        return LeftOut(parameters, "a vector, not a matrix") if explicit else None

    layout = _layout(a_slot, b_slot, surroundings)
    if not explicit:
        neutral = _NEUTRAL_WORDS.fullmatch(a_name.partition(".")[0].lower())
        if layout is None or not layout.low_rank or not neutral:
            return None
        if not _is_adapter(site, layout, surroundings, bottleneck=bottleneck):
            trains = all(parameter.requires_grad for parameter in parameters)
            if bottleneck or a_slot.key or not trains:
                return None  # an MLP or a bank of matrices, not even LoRA-looking
            looks = f"{a_name} and its B could be LoRA, but no name or layer beside them says so"
            return LeftOut(parameters, f"{looks}; declare a LoRAPair if they are")
    if getattr(site.module, "merged", False) is True:
        remedy = "call model.train() before building the optimizer (loralib merges on .eval())"
        refuse_merged(site.label, remedy)

    reason = _why_left_out(site, a_slot, b_slot, layout, surroundings)
    if reason:
        return LeftOut(parameters, reason)
    if layout is None:  # clearly LoRA and clearly wrong: LoRAPair raises and shows the shapes
        layout = _Layout(1, 0, 0)
    note = _why_unobserved(a_slot, b_slot, layout, surroundings)
    input_module, output_module = (
        (None, None) if note else _observers(site.module, a_slot, b_slot, layout, surroundings)
    )
    if layout.swapped:
        a_slot, b_slot = b_slot, a_slot
    place = _layer_name(site) if surroundings.in_weight else site.label
    return Candidate(
        A=a_slot.parameter,
        B=b_slot.parameter,
        name=place + suffix,
        kind=_kind(site, surroundings),
        scaling=_scaling(site.module, a_slot.key, layout.rank, surroundings),
        input_module=input_module,
        output_module=output_module,
        transposed=layout.transposed,
        note=note,
    )


def _kind(site: Site, surroundings: Surroundings) -> str:
    if surroundings.in_weight:
        return f"parametrize.{type(surroundings.base).__name__.removeprefix('Parametrized')}"
    family = "loralib" if hasattr(site.module, "merge_weights") else "custom"
    return f"{family}.{type(site.module).__name__}"


def _layer_name(site: Site) -> str:
    # <layer>.parametrizations.<tensor>.<index>
    layer, _, parametrization = site.name.rpartition("parametrizations.")
    layer = layer.rstrip(".") or site.label
    return layer if parametrization == "weight.0" else f"{layer} ({parametrization})"


def _is_shard(parameter: nn.Parameter) -> bool:
    # One-dimensional but not empty may be a home-made rank-1 adapter.
    empty = parameter.ndim < 2 and parameter.numel() == 0
    return empty or hasattr(parameter, "ds_shape")


def _is_adapter(
    site: Site, layout: _Layout, surroundings: Surroundings, *, bottleneck: bool
) -> bool:
    """Whether anything besides a name like A says that this is an adapter."""
    texts = (type(site.module).__name__, site.name.rpartition(".")[2])
    if any(_says_lora(text, bottleneck=bottleneck) for text in texts):
        return True
    return not bottleneck and surroundings.fit(layout.n, layout.m)


def _layout(a_slot: _Slot, b_slot: _Slot, surroundings: Surroundings) -> _Layout | None:
    """The way the two shapes multiply that fits the layer best; ``None`` if none does."""
    a_shape, b_shape = a_slot.parameter.shape, b_slot.parameter.shape
    a_rows, a_columns = a_shape[0], math.prod(a_shape[1:])
    b_rows, b_columns = b_shape[0], math.prod(b_shape[1:])
    modules = (a_slot.module, b_slot.module)
    fits: list[_Layout] = []
    if a_rows == b_columns:
        fits.append(_Layout(a_rows, a_columns, b_rows))
    if a_columns == b_rows and not any(isinstance(mod, (nn.Linear, _ConvNd)) for mod in modules):
        fits.append(_Layout(a_columns, a_rows, b_columns, transposed=True))
        if modules == (None, None):
            fits.append(_Layout(a_columns, b_columns, a_rows, swapped=True))
    if surroundings.in_weight:
        # B A, or A B, is added to the weight itself: never x A B.
        fits = [layout for layout in fits if not layout.transposed]
    matching = [layout for layout in fits if surroundings.fit(layout.n, layout.m)] or fits
    return max(matching, key=lambda layout: layout.low_rank, default=None)


def _why_left_out(
    site: Site, a_slot: _Slot, b_slot: _Slot, layout: _Layout | None, surroundings: Surroundings
) -> str:
    """Why the two are no pair although they are LoRA; empty if they are one."""
    if any(looks_up_rows(module) for module in (surroundings.base, a_slot.module)):
        return EMBEDDING
    convolutional = isinstance(a_slot.module, _ConvNd)
    if not convolutional and max(a_slot.parameter.ndim, b_slot.parameter.ndim) > 2:
        return _STACKED
    if convolutional and layout is None:
        return "convolution whose B is grouped or not 1x1: not a product B A"
    enabled = getattr(site.module, "enable_lora", None)
    if isinstance(enabled, (list, tuple)) and sum(map(bool, enabled)) > 1:
        return _FUSED
    return ""


def _why_unobserved(
    a_slot: _Slot, b_slot: _Slot, layout: _Layout, surroundings: Surroundings
) -> str:
    """Why hooks would not see x and the output's gradient; empty if they do."""
    if isinstance(a_slot.module, _ConvNd) or isinstance(surroundings.base, _ConvNd):
        return CONVOLUTION
    bare = a_slot.module is None or b_slot.module is None
    if not bare and not surroundings.in_weight:
        return ""
    if a_slot.key:
        return f"parameters in a list, which may see a part of x only; {_DECLARE}"
    if not surroundings.fit(layout.n, layout.m):
        return f"in a layer not known to map {layout.n} numbers to {layout.m}; {_DECLARE}"
    return ""


def _observers(
    module: nn.Module, a_slot: _Slot, b_slot: _Slot, layout: _Layout, surroundings: Surroundings
) -> tuple[nn.Module, nn.Module]:
    """The modules that see x and the gradient of the output."""
    if surroundings.in_weight and surroundings.base is not None:
        return surroundings.base, surroundings.base
    if a_slot.module is None or b_slot.module is None:
        return module, module
    # An entry of a list may be routed to, and a block with several layers has several
    # inputs: only the input of A itself is certain then.
    takes_x = surroundings.sizes is not None and surroundings.sizes[0] == layout.n
    return (module if takes_x and not a_slot.key else a_slot.module), b_slot.module


def _scaling(module: nn.Module, key: str, rank: int, surroundings: Surroundings) -> float:
    """The constant factor in front of ``B A x``; 1 when the layer does not tell.

    Attention blocks call something else ``scale``, so that the unspecific names count
    only on a module that is one linear layer.
    """

    def number(*names: str) -> float:
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, dict):
                value = value.get(key)
            if isinstance(value, Tensor):
                # A trainable factor changes: no constant to speak of.
                constant = value.numel() == 1 and not value.requires_grad
                value = value.item() if constant and not value.is_meta else None
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
        return 0.0

    one_layer = surroundings.one_layer
    factor = number("lora_scaling", "lora_scale", *(("scaling", "scale") if one_layer else ()))
    if factor:
        return factor
    stored_rank = number("lora_r", "lora_rank", "lora_dim", "r", "rank")
    if lora_alpha := number("lora_alpha"):
        return lora_alpha / (stored_rank or rank)
    alpha = number("alpha") if one_layer else 0.0
    return alpha / (stored_rank or 1.0) if alpha else 1.0
