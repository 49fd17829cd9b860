"""The methods under comparison: how each is built and where its sweep starts.

To add a peer, write its function in :mod:`benchmarks.optimizers` and an entry in
:data:`METHODS`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from . import optimizers
from .optimizers import Build
from .sweep import Entry
from .usage import UsageError


@dataclass(frozen=True)
class Method:
    """A method: how to build it, and where its sweep starts.

    Attributes:
        name: name on the command line.
        title: name in tables and plots.
        package: distribution it comes from.
        build: makes the optimizer.
        lr: centre of the learning-rate sweep on the language-model task.
        default: learning rate its package sets (that of AdamW where it wraps AdamW), or how it
            chooses one for input size, rank and scaling of the adapters.
        knob: name of the second sensitive setting, the one that would be given in ``options``.
        values: values of the knob to sweep, ``None`` for the package's own first.
        full: whether all weights are trained instead of adapters.
        init: initialisation of the adapters, see :mod:`benchmarks.initialisations`.
        follows: method around whose tuned learning rate the sweep of an initialisation starts.
        priority: methods of a lower number are finished first.
        options: further constructor arguments, from ``name[key=value,...]``.
    """

    name: str
    title: str
    package: str
    build: Build
    lr: float
    default: float | Callable[[int, int, float], float] | None = 1e-3
    knob: str | None = None
    values: tuple[float | None, ...] = (None,)
    full: bool = False
    init: str | None = None
    follows: str | None = None
    priority: int = 2
    revision: Callable[[], str] = field(default=lambda: "")
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return importlib.util.find_spec(self.package) is not None

    def optimizer(self, model: nn.Module, lr: float, knob: float | None) -> Optimizer:
        """Build the optimizer for ``model``.

        Raises:
            TypeError: If its constructor does not know one of the options.
        """
        if self.full:
            model.requires_grad_(True)
        optimizer = self.build(model, lr, knob, dict(self.options))
        # Some packages swallow unknown keywords: the variant would silently be the default.
        known = _constructor_arguments(optimizer)
        for key, _ in self.options:
            if key not in known and key != self.knob:
                raise TypeError(f"{type(optimizer).__name__} has no argument {key!r}")
        return optimizer

    def entry(
        self, lr_scale: float, knobs: bool, adapters: tuple[int, int, float] | None = None
    ) -> Entry:
        """How this method takes part in a study.

        Args:
            lr_scale: factor on the centre of the sweep for this kind of task.
            knobs: whether to sweep the second knob.
            adapters: usual input size, rank and scaling of the task's adapters, if known.
        """
        default = self.default
        if callable(default):
            default = None if adapters is None else default(*adapters)
        return Entry(
            method=self.name,
            lr=self.lr * lr_scale,
            default=default,
            knobs=self.values if knobs else self.values[:1],
            priority=self.priority,
            follows=self.follows,
            revision=self.revision(),
        )


def _constructor_arguments(optimizer: Optimizer) -> set[str]:
    inner = optimizer.inner if isinstance(optimizer, optimizers.Combined) else [optimizer]
    return {name for one in inner for name in inspect.signature(type(one).__init__).parameters}


def _cg_defaults() -> dict[str, Any]:
    try:
        from cg_optim import CGLoRAOptimizer
    except ImportError:
        return {}
    parameters = inspect.signature(CGLoRAOptimizer.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _cg_revision() -> str:
    """A mark that changes with our defaults, so that only then our cells are run again.

    ``RULE_VERSION`` stands for changes of the mathematics that leave the signature alone.
    """
    from cg_optim.rule import RULE_VERSION

    defaults = {key: value for key, value in _cg_defaults().items() if key != "weight_decay"}
    defaults["lr"] = 1e-3  # as it once was: every cell states its own rate
    for switch in ("init", "strict"):  # switched off they leave every number as it was
        if not defaults.get(switch):
            defaults.pop(switch, None)
    mark = f"{RULE_VERSION}{sorted(defaults.items(), key=str)}"
    return hashlib.sha256(mark.encode()).hexdigest()[:8]


def _cg_default_rate(in_features: int, rank: int, scaling: float) -> float:
    from cg_optim.learning_rate import suggested_rate, two_digits

    return two_digits(suggested_rate(in_features, rank, scaling))


def _cg_method() -> Method:
    defaults = _cg_defaults()
    method = Method(
        name="cg",
        title="CGLoRAOptimizer",
        package="cg_optim",
        build=optimizers.cg,
        lr=1e-2,
        default=_cg_default_rate,
        priority=0,
        revision=_cg_revision,
    )
    if "damping" in defaults:
        first = float(defaults["damping"])
        method = replace(method, knob="damping", values=(None, float(f"{10 * first:.3g}")))
    return method


def _all_methods() -> list[Method]:
    adamw = Method("adamw", "AdamW", "torch", optimizers.adamw, lr=1e-2, priority=0)

    return [
        adamw,
        _cg_method(),
        Method(
            "full-adamw", "full weights, AdamW", "torch", optimizers.adamw, 2e-3,
            full=True, priority=0,
        ),
        Method(
            "full-muon", "full weights, Muon", "torch", optimizers.muon, 5e-3,
            full=True, priority=0,
        ),
        Method(
            "nadam", "NAdam", "torch", optimizers.nadam, 1e-2, 2e-3,
            knob="betas", values=(None, 0.8), priority=1,  # the first of them
        ),
        Method("soap", "SOAP", "pytorch_optimizer", optimizers.soap, 1e-2, 3e-3, priority=1),
        Method(
            "lora+", "LoRA+", "peft", optimizers.lora_plus, 3e-3,
            knob="ratio", values=(None, 4.0), priority=1,
        ),
        Method("lora-rite", "LoRA-RITE", "pytorch_optimizer", optimizers.lora_rite, 3e-3),
        Method(
            "riemannian", "Riemannian AdamW", "peft", optimizers.riemannian, 3e-3,
            knob="reg", values=(None, 1.0, 1e-4),
        ),
        Method("muon", "Muon", "torch", optimizers.muon, 1e-2),
        Method("kron", "Kron", "pytorch_optimizer", optimizers.kron, 1e-2, priority=3),
        Method("shampoo", "Shampoo", "pytorch_optimizer", optimizers.shampoo, 1e-2, priority=3),
        Method("lora-fa", "LoRA-FA", "peft", optimizers.lora_fa, 1e-2, priority=3),
        *(_starting(adamw, init, title) for init, title in PEER_STARTS.items()),
    ]  # fmt: skip


PEER_STARTS = {"eva": "EVA", "lora-ga": "LoRA-GA", "pissa": "PiSSA", "corda": "CorDA"}
OUR_STARTS = {
    "curvature-keep": "curvature (keep)",
    "curvature-newton": "curvature (Newton)",
    "curvature-shift": "curvature (shift)",
}


def _starting(method: Method, init: str, title: str) -> Method:
    """``method`` from another start: ``eva`` for AdamW, ``cg-eva`` for ours."""

    def revision() -> str:
        from cg_optim.initialisation.curvature_init import START_VERSION

        return f"{method.revision()}start{START_VERSION}"

    return replace(
        method,
        revision=revision if init in OUR_STARTS else method.revision,
        name=init if method.name == "adamw" else f"{method.name}-{init}",
        title=f"{title} + {method.title}",
        package="peft",
        init=init,
        follows=method.name,
        knob=None,
        values=(None,),
        priority=4,
    )


def _started_methods() -> list[Method]:
    """Starts of ours, and those of all peers for our optimizer."""
    methods = {method.name: method for method in _all_methods()}
    adamw, cg = methods["adamw"], methods["cg"]
    return [
        *(_starting(adamw, init, title) for init, title in OUR_STARTS.items()),
        *(_starting(cg, init, title) for init, title in (PEER_STARTS | OUR_STARTS).items()),
    ]


METHODS: dict[str, Method] = {method.name: method for method in _all_methods()}
STARTED_METHODS = {method.name: method for method in _started_methods()}
"""Further initialisations, which take part where they are named only."""
CEILINGS = tuple(name for name, method in METHODS.items() if method.full)


def _value(text: str) -> Any:
    if ":" in text:  # a tuple: betas=0.9:0.99
        return tuple(_value(part) for part in text.split(":"))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def get(spec: str) -> Method:
    """The method called ``spec``: a name, or a name with options, ``cg[damping=0.3,eps=1e-6]``.

    Options go to the optimizer's constructor, ``a:b`` as the tuple ``(a, b)``; cells of such a
    variant are kept apart.

    Raises:
        UsageError: If there is no such method or the options can't be read.
    """
    match = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", spec.strip())
    name = match.group(1) if match else spec
    known = METHODS | STARTED_METHODS
    if not match or name not in known:
        raise UsageError(f"unknown method {spec!r}; known: {', '.join(known)}")
    method = known[name]
    if not match.group(2):
        return method
    options = []
    for item in match.group(2).split(","):
        key, equals, text = item.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UsageError(f"method {spec!r}: expected name[key=value,...]")
        options.append((key.strip(), _value(text.strip())))
    values = method.values
    if method.knob in dict(options):  # given by hand: not swept
        values = (None,)
    title = f"{method.title} ({match.group(2)})"
    return replace(method, name=spec.strip(), title=title, values=values, options=tuple(options))


def select(specs: Iterable[str] | None) -> list[Method]:
    """The methods called for; all of them without a list."""
    chosen = list(METHODS.values()) if not specs else [get(spec) for spec in specs]
    return list({method.name: method for method in chosen}.values())
