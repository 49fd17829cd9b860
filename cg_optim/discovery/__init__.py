"""Find the LoRA pairs of a model by their structure.

Every module is shown to the recognisers in turn; the first that knows it says which of
its parameters belong together.  Nothing is ever paired by order or by counting:
adapters of several names, ranks and libraries can live in one model.

What is not found can be declared by hand with :class:`cg_optim.LoRAPair`.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from cg_optim.discovery.custom_layers import recognise_custom
from cg_optim.discovery.findings import Candidate, Finding, LeftOut, Site, refuse_sharded
from cg_optim.discovery.peft_layers import recognise_peft
from cg_optim.errors import AdapterError
from cg_optim.pairs import LoRAPair

__all__ = ["Discovery", "find_lora_pairs"]

# One function per family of layers; each returns None for modules it does not know.
_RECOGNISERS: tuple[Callable[[Site], list[Finding] | None], ...] = (
    recognise_peft,
    recognise_custom,
)


@dataclass(frozen=True)
class Discovery:
    """What :func:`find_lora_pairs` found.

    Attributes:
        pairs: The pairs to train, in the order of ``model.named_modules()``.
        left_out: Parameter name to short reason, for every trainable parameter that looks
            like LoRA and is not in a pair.  Plain AdamW updates it.
    """

    pairs: tuple[LoRAPair, ...]
    left_out: dict[str, str]


def find_lora_pairs(model: nn.Module) -> Discovery:
    """Find all LoRA pairs of a model that train.

    Knows PEFT (any base layer, several adapters, DoRA and other variants), loralib,
    hand-written layers with customary names, and weight parametrizations.  Call it on
    the model as it is trained: adapters enabled and unmerged.

    Args:
        model: Any module; wrapped in DDP or ``torch.compile`` or not.

    Returns:
        The pairs, and reasons for what was left out.  Both are empty for a model
        without LoRA.

    Raises:
        AdapterError: If adapters are disabled, merged, all frozen, or taken apart by FSDP1
            or DeepSpeed ZeRO-3.
        PairError: If a layer that is clearly LoRA holds factors that do not fit together.
    """
    modules = dict(model.named_modules())
    findings: list[Finding] = []
    for name, module in modules.items():
        findings.extend(_recognise(Site(name, module, modules)))
    names = {parameter: name for name, parameter in model.named_parameters()}
    _refuse_flattened(names)

    left_out: dict[str, str] = {}
    pairs: list[LoRAPair] = []
    for finding in _settle_sharing(findings):
        training = [parameter for parameter in finding.parameters if parameter.requires_grad]
        if isinstance(finding, Candidate) and len(training) == 2:
            pairs.append(LoRAPair(**vars(finding)))
            continue
        for parameter in training:
            left_out.setdefault(names[parameter], _reason(finding, names))
    left_out |= _unpaired(names, pairs, left_out)
    if findings and not pairs and not left_out:
        _refuse_frozen(findings, names)
    return Discovery(tuple(pairs), left_out)


def _recognise(site: Site) -> list[Finding]:
    for recognise in _RECOGNISERS:
        findings = recognise(site)
        if findings is not None:
            return findings
    return []


def _reason(finding: Finding, names: dict[nn.Parameter, str]) -> str:
    if isinstance(finding, LeftOut):
        return finding.reason
    frozen = next(factor for factor in finding.parameters if not factor.requires_grad)
    return f"its partner {names[frozen]} is frozen"


# ------------------------------------------------------------------- shared parameters


def _settle_sharing(findings: list[Finding]) -> list[Finding]:
    """Keep one of several identical pairs, and none of those that share one factor."""
    products = [tuple(map(_memory, finding.parameters)) for finding in findings]
    users: defaultdict[Hashable, set[Hashable]] = defaultdict(set)
    for product in products:
        for memory in product:
            users[memory].add(product)
    occurrences = Counter(products)
    settled: dict[Hashable, Finding] = {}
    for product, finding in zip(products, findings, strict=True):
        if product in settled or isinstance(finding, LeftOut):
            settled.setdefault(product, finding)
        elif any(len(users[memory]) > 1 for memory in product):
            settled[product] = LeftOut(finding.parameters, "shared between several adapters")
        elif occurrences[product] > 1:
            # Hooks would pair the inputs of one layer with the gradients of all of them.
            note = "A and B are tied between layers: gradient-only rule"
            settled[product] = replace(finding, input_module=None, output_module=None, note=note)
        else:
            settled[product] = finding
    return list(settled.values())


def _memory(parameter: nn.Parameter) -> Hashable:
    """What two parameters have in common if stepping on one changes the other.

    PEFT's ``ensure_weight_tying`` makes two parameters that are views of one memory.
    """
    address = 0  # also what a meta or an empty tensor has
    if type(parameter.data) is Tensor:  # subclasses (DTensor, quantized) have no address
        with contextlib.suppress(RuntimeError):  # nor do the tensors of some devices
            address = parameter.data_ptr()
    return (parameter.device, address, parameter.numel()) if address else id(parameter)


# --------------------------------------------------------------------------- left over

_SIDE = re.compile(r"(?:(?<![A-Za-z])|(?<=[lL]o[rR][aA]))(A|a|B|b|down|up)(?![A-Za-z])")


def _unpaired(
    names: dict[nn.Parameter, str], pairs: list[LoRAPair], left_out: dict[str, str]
) -> dict[str, str]:
    """Trainable parameters named like a factor that no recogniser has mentioned."""
    paired = {factor for pair in pairs for factor in (pair.A, pair.B)}
    reasons: dict[str, str] = {}
    for parameter, name in names.items():
        if parameter in paired or name in left_out or not parameter.requires_grad:
            continue
        # "lora_A", "lora_A.0", "lora.A": only the end of the path speaks of the parameter.
        attribute = ".".join(name.removesuffix(".weight").split(".")[-2:])
        side = _SIDE.search(attribute)
        if side and "lora" in attribute.lower() and not attribute.endswith("bias"):
            letter, other = ("A", "B") if side[1] in ("A", "a", "down") else ("B", "A")
            reasons[name] = f"unpaired {letter}: no {other} of that name beside it"
    return reasons


# ---------------------------------------------------------------------------- refusals


def _refuse_frozen(findings: list[Finding], names: dict[nn.Parameter, str]) -> None:
    """Stop at a model whose every adapter is frozen.

    Raises:
        AdapterError: Always.
    """
    first = names[findings[0].parameters[0]]
    raise AdapterError(
        f"{first}: this and all other LoRA parameters are frozen (requires_grad=False), so nothing "
        "would train; load the adapter with is_trainable=True (PEFT, inference_mode=False) or call "
        "requires_grad_(True) on its parameters"
    )


def _refuse_flattened(names: dict[nn.Parameter, str]) -> None:
    """Stop at FSDP1's flat parameters when they contain LoRA.

    Raises:
        AdapterError: If a flat parameter lists a LoRA parameter as its content.
    """
    for parameter in names:
        for content in getattr(parameter, "_fqns", ()):
            if "lora" in content.lower():
                refuse_sharded(content, None)
