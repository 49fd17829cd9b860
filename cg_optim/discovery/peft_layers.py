"""LoRA layers of PEFT, recognised by their attributes; PEFT itself is never imported.

A PEFT LoRA layer keeps the dictionaries ``lora_A``, ``lora_B`` and ``scaling``, one
entry per adapter, and computes ``y = base(x) + lora_B(lora_A(dropout(x))) * scaling``.
Quantized and ``Conv1D`` bases change nothing in that.  Variants do: they are listed
in :data:`_OBSERVED_VARIANTS`, and one that is not in the list is not trusted to compute
``B A x`` from what the hooks see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from cg_optim.discovery.findings import (
    ATTENTION,
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
from cg_optim.errors import AdapterError

# Variants whose update is B A x with x the layer's input and B called as a module.
_OBSERVED_VARIANTS = frozenset(
    {
        "ALoraLinearVariant",
        "BdLoraLinearVariant",
        "DoraLinearVariant",
        "MiCALinearVariant",
        "MontecloraLinearVariant",
        "VeloraLinearVariant",
    }
)

_FACTORS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})

_EXTRAS = {
    "lora_magnitude_vector": "DoRA magnitude: one number per output, not a matrix",
    "lora_diag": "KaSA diagonal: one number per rank, not a matrix",
    "lora_E": "AdaLoRA singular values: one number per rank, not a matrix",
}


def recognise_peft(site: Site) -> list[Finding] | None:
    """Findings of a PEFT layer; ``None`` if the module is not one.

    Raises:
        AdapterError: If its adapters are disabled, merged or sharded.
    """
    layer = site.module
    # _modules, not getattr: wrappers (PeftModel, torch.compile) forward attributes.
    lora_a = layer._modules.get("lora_A")
    is_lora = isinstance(lora_a, (nn.ModuleDict, nn.ParameterDict)) and isinstance(
        getattr(layer, "scaling", None), dict
    )
    if is_lora:
        return list(_lora_layer(site))
    if hasattr(type(layer), "adapter_layer_names"):
        return list(_other_tuner(site))
    return None


def _lora_layer(site: Site) -> Iterator[Finding]:
    layer: Any = site.module
    adapters = [*layer.lora_A, *getattr(layer, "lora_embedding_A", ())]
    if adapters:
        _check_in_use(site)
    for adapter in adapters:
        yield _adapter(site, adapter)
    for name, extra in layer.named_children():
        parameters = tuple(extra.parameters())
        if parameters and name.startswith("lora_") and name not in _FACTORS:
            yield LeftOut(parameters, _EXTRAS.get(name, f"{name}: not a LoRA factor"))


def _other_tuner(site: Site) -> Iterator[Finding]:
    """Methods beside LoRA (VeRA, DeLoRA, GraLoRA...): plain AdamW for their matrices."""
    reason = f"PEFT {_tuner_name(site.module)} layer: its update is not a plain product B A"
    for name, child in site.module.named_children():
        training = tuple(parameter for parameter in child.parameters() if parameter.requires_grad)
        if training and "lora" in name.lower():
            yield LeftOut(training, reason)


def _tuner_name(layer: nn.Module) -> str:
    # peft.tuners.<tuner>.layer; the class is often just called Linear.
    package = type(layer).__module__.split(".")
    return package[2] if package[:2] == ["peft", "tuners"] else type(layer).__name__


def _check_in_use(site: Site) -> None:
    """Refuse layers whose forward bypasses A and B.

    Raises:
        AdapterError: If adapters are disabled or merged.
    """
    layer: Any = site.module
    if getattr(layer, "disable_adapters", False) is True:
        raise AdapterError(
            f"{site.label}: adapters are disabled, so nothing would train; call "
            "model.enable_adapter_layers() (PEFT) or model.enable_adapters() (transformers, "
            "diffusers) before building the optimizer"
        )
    merged = getattr(layer, "merged_adapters", None) or getattr(layer, "merged", False)
    if merged:
        refuse_merged(
            site.label, "call model.unmerge_adapter() (PEFT) before building the optimizer"
        )


def _adapter(site: Site, adapter: str) -> Finding:
    layer: Any = site.module
    embedding_a = getattr(layer, "lora_embedding_A", {})
    if adapter in embedding_a:
        return LeftOut((embedding_a[adapter], layer.lora_embedding_B[adapter]), EMBEDDING)

    a_entry = layer.lora_A[adapter]
    if adapter not in layer.lora_B:
        return LeftOut(_parameters_of(a_entry), "unpaired A: the adapter has no lora_B")
    b_entry = layer.lora_B[adapter]
    everything = (*_parameters_of(a_entry), *_parameters_of(b_entry))
    reason = _why_left_out(layer, adapter, (a_entry, b_entry))
    if reason:
        return LeftOut(everything, reason)

    a_weight, b_weight = weight_of(a_entry), weight_of(b_entry)
    refuse_sharded(site.label, a_weight)
    refuse_sharded(site.label, b_weight)
    assert a_weight is not None  # refuse_sharded raised otherwise
    assert b_weight is not None
    variant = _variant(layer, adapter)
    misfit = _misfit(layer, a_entry, b_entry, variant)
    if misfit:
        return LeftOut((a_weight, b_weight), misfit)

    note = _why_unobserved(site, a_weight, variant)
    # aLoRA applies A and B to a subset of the tokens: A's own input has B's rows.
    input_module = a_entry if variant == "ALoraLinearVariant" else layer
    experts = getattr(layer, "num_experts", 1)
    return Candidate(
        A=a_weight,
        B=b_weight,
        name=site.label if adapter == "default" else f"{site.label} ({adapter})",
        kind=f"peft.{type(layer).__name__}" + (f", {experts} experts" if experts > 1 else ""),
        scaling=float(layer.scaling[adapter]),
        input_module=None if note else input_module,
        output_module=None if note else b_entry,
        note=note,
        experts=experts,
    )


def _why_left_out(layer: Any, adapter: str, entries: tuple[Any, Any]) -> str:
    """Why the two entries are no pair of plain matrices that train; empty if they are."""
    if adapter not in _active_adapters(layer):
        return f"adapter {adapter!r} is not active"
    if not all(isinstance(entry, nn.Module) for entry in entries):
        return "AdaLoRA: trainable singular values sit between A and B"
    if any(hasattr(entry, "parametrizations") for entry in entries):
        return "its weight is itself computed by a parametrization"
    return ""


def _parameters_of(entry: nn.Module | nn.Parameter) -> tuple[nn.Parameter, ...]:
    # Biases of B are ordinary parameters and need no explanation.
    if isinstance(entry, nn.Parameter):
        return (entry,)
    return tuple(parameter for parameter in entry.parameters() if parameter.ndim != 1)


def _active_adapters(layer: Any) -> list[str]:
    # PEFT before 0.7 has only active_adapter, a string.
    active = getattr(layer, "active_adapters", getattr(layer, "active_adapter", None))
    if active is None:
        return list(layer.lora_A)
    return [active] if isinstance(active, str) else list(active)


def _variant(layer: Any, adapter: str) -> str:
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    return "" if variant is None else type(variant).__name__


def _misfit(layer: Any, a_entry: Any, b_entry: Any, variant: str) -> str:
    """Why A and B are not the factors of one matrix from x to y; empty if they are."""
    a_shape, b_shape = tuple(a_entry.weight.shape), tuple(b_entry.weight.shape)
    shapes = f"A {a_shape}, B {b_shape}" + (f", {variant}" if variant else "")
    same_rank = a_shape[0] == math.prod(b_shape[1:])
    plain = type(a_entry) is nn.Linear and type(b_entry) is nn.Linear and not variant
    if not same_rank and not plain:  # a plain pair that disagrees is an error: let it raise
        blocks = "grouped convolution" if len(b_shape) > 2 else "blocks or shards in one matrix"
        return f"{blocks}: not a product B A ({shapes})"
    n, m = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if isinstance(n, int) and a_shape[1] != n:
        return f"A does not take the layer's {n} inputs ({shapes})"
    if isinstance(m, int) and b_shape[0] != m:
        return f"B does not give the layer's {m} outputs ({shapes})"
    return ""


def _why_unobserved(site: Site, a_weight: nn.Parameter, variant: str) -> str:
    """Why hooks would not see x and the output's gradient; empty if they do."""
    layer, parent = site.module, site.parent
    if a_weight.ndim > 2:
        return CONVOLUTION
    wrapped = layer._modules.get("base_layer")
    # The out_proj of nn.MultiheadAttention is a LoRA layer whose forward nobody calls.
    if isinstance(wrapped, nn.MultiheadAttention) or (
        parent is not None and isinstance(parent.module, nn.MultiheadAttention)
    ):
        return ATTENTION
    if hasattr(layer, "parameter_name"):
        each = ", a pair for each expert" if getattr(layer, "num_experts", 1) > 1 else ""
        return f"target_parameters{each}: the product is added to the weight, hooks do not fire"
    if variant and variant not in _OBSERVED_VARIANTS:
        return f"{variant}: not known to compute B A x, gradient-only rule"
    return ""
