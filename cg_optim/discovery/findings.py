"""What a recogniser of LoRA layers is given, and what it hands back.

Recognisers (:mod:`~cg_optim.discovery.peft_layers` and
:mod:`~cg_optim.discovery.custom_layers`) look at structure only.  Whether a pair trains,
is tied to another one or has a frozen half is decided once, for all of them, by
:func:`cg_optim.discovery.find_lora_pairs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cg_optim.errors import AdapterError

CONVOLUTION = "convolution: gradient-only rule"
EMBEDDING = "embedding adapter: rows are looked up, no linear curvature"
ATTENTION = "nn.MultiheadAttention reads merged weights, hooks do not fire: gradient-only rule"


@dataclass(frozen=True)
class Site:
    """One module of a model and where it sits.

    Attributes:
        name: Its path in ``model.named_modules()``; empty for the model itself.
        module: The module.
        modules: All modules of the model by path, to look at the ones around.
    """

    name: str
    module: nn.Module
    modules: Mapping[str, nn.Module]

    @property
    def label(self) -> str:
        """A name for messages: the path, or the class of the model itself."""
        return self.name or type(self.module).__name__

    @property
    def parent(self) -> Site | None:
        """The module holding this one; ``None`` for the model itself."""
        name = self.name.rpartition(".")[0]
        module = self.modules.get(name) if self.name else None
        return None if module is None else Site(name, module, self.modules)


@dataclass(frozen=True)
class Candidate:
    """A pair found by structure; the fields are those of :class:`cg_optim.LoRAPair`."""

    A: nn.Parameter
    B: nn.Parameter
    name: str
    kind: str
    scaling: float = 1.0
    input_module: nn.Module | None = None
    output_module: nn.Module | None = None
    transposed: bool = False
    note: str = ""
    experts: int = 1

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """A and B."""
        return (self.A, self.B)


@dataclass(frozen=True)
class LeftOut:
    """Parameters of a LoRA layer that cannot be in a pair, and why."""

    parameters: tuple[nn.Parameter, ...]
    reason: str


Finding = Candidate | LeftOut


def weight_of(entry: object) -> nn.Parameter | None:
    """The factor an attribute stands for: a parameter, or a module's ``weight``."""
    if isinstance(entry, nn.Module):
        entry = entry._parameters.get("weight")
    return entry if isinstance(entry, nn.Parameter) else None


def refuse_sharded(label: str, factor: Tensor | None) -> None:
    """Stop at factors that a distributed wrapper has flattened or partitioned.

    DeepSpeed ZeRO-3 leaves an empty tensor behind and keeps the shape in ``ds_shape``;
    FSDP1 leaves a one-dimensional view or no parameter at all.

    Raises:
        AdapterError: If the factor is not a whole matrix.
    """
    if factor is not None and factor.ndim >= 2 and not hasattr(factor, "ds_shape"):
        return
    found = "no parameter" if factor is None else f"shape {tuple(factor.shape)}"
    raise AdapterError(
        f"{label}: a LoRA factor is flattened or sharded ({found}), as FSDP1 and DeepSpeed ZeRO-3 "
        "do; its pair cannot be seen. Use DDP, FSDP2 (fully_shard) or ZeRO-1"
    )


def refuse_merged(label: str, remedy: str) -> None:
    """Stop at adapters that are merged into the base weight.

    Raises:
        AdapterError: Always.
    """
    raise AdapterError(
        f"{label}: the adapter is merged into the base weight, so A and B would get no gradient; "
        f"{remedy}"
    )


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """Input and output size a linear-like module declares, or ``None``."""
    for in_name, out_name in _SIZE_ATTRIBUTES:
        n, m = getattr(module, in_name, None), getattr(module, out_name, None)
        if isinstance(n, int) and isinstance(m, int):
            return n, m
    return None


_SIZE_ATTRIBUTES: Sequence[tuple[str, str]] = (
    ("in_features", "out_features"),  # nn.Linear and most quantized linears
    ("in_dim", "out_dim"),  # torchtune
    ("infeatures", "outfeatures"),  # GPTQ
    ("nx", "nf"),  # transformers' Conv1D
)
