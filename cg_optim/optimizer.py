"""The optimizer: parameter groups, hooks, curvature and the step, put together.

The way of one training step::

    forward/backward   hooks.CurvatureObserver  -> curvature_store.CurvatureStore
    step()             1. gradients are checked; nothing has changed yet
                       2. the curvature collected since the last step is folded in
                       3. pairs with gradients:     pair_step.step_pairs -> rule
                       4. all other parameters:     plain_step, torch.optim's AdamW
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from cg_optim import arguments, checkpoint, events
from cg_optim.curvature_store import STATE_PREFIX, CurvatureStore, collects_at
from cg_optim.discovery import Discovery
from cg_optim.errors import NoPairsWarning, UnobservedPairWarning
from cg_optim.factor_state import as_factor_state, new_factor_state
from cg_optim.hooks import CurvatureObserver
from cg_optim.pair_step import FactorWork, PairWork, step_pairs
from cg_optim.pairs import LoRAPair
from cg_optim.plain_step import step_plain
from cg_optim.rule import AdamSettings, Moments
from cg_optim.summary import render_summary

Group = dict[str, Any]


class CGLoRAOptimizer(Optimizer):
    r"""Curvature-guided optimizer for LoRA, a drop-in replacement for ``torch.optim.AdamW``.

    LoRA pairs are found in the model and stepped by Adam in coordinates in which the
    inputs of their layers are white; see :mod:`cg_optim.rule` for the equations.  The
    input curvature ``E[x x^T]`` is collected by hooks during ordinary backward passes.
    Every other trainable parameter gets exactly ``torch.optim.AdamW``.

    >>> optimizer = CGLoRAOptimizer(model, lr=1e-3)  # instead of AdamW(model.parameters())
    >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Build it before ``torch.compile`` compiles the model: hooks registered later never
    run; ``torch._dynamo.reset()`` after building it makes up for an earlier compilation of
    a model of the same class.  The hooks stay on the model until :meth:`remove_hooks`, or
    leave the ``with`` block when the optimizer is used as a context manager.  A numerical
    failure is absorbed,
    counted in :meth:`diagnostics` and warned about once per kind.

    ``copy.deepcopy`` and ``pickle`` work on the model and its optimizer *together*, e.g. as
    a tuple: the copied optimizer then trains the copied model.  A copied model alone is
    not observed by the original optimizer.

    Args:
        model_or_params: A module (all its trainable parameters), or parameters, named
            parameters or parameter groups as for any ``torch.optim`` optimizer.
        lr: Learning rate; take what AdamW would get.  A float or a one-element tensor.
        model: The module in which to look for LoRA pairs when the first argument is
            not a module.
        pairs: Pairs declared by hand, in addition to those found; they take
            precedence.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, as in AdamW, for all parameters.
        damping: Damping of both factors' input curvature relative to its mean eigenvalue.
            Larger is closer to AdamW.
        curvature: ``"auto"`` keeps the leading directions of large inputs and the whole
            matrix of small ones; ``"dense"`` always the whole matrix; an integer that
            many directions; ``None`` no curvature at all, which is AdamW for everything.

    Raises:
        HyperparameterError: If a number is out of range.
        ParameterError: If there is nothing to optimise, or a parameter comes twice, is
            complex, or is not a tensor.
        AdapterError: If the model's adapters are frozen, merged or disabled.
        PairError: If a pair is malformed or two pairs share a parameter.
    """

    def __init__(
        self,
        model_or_params: nn.Module | ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        model: nn.Module | None = None,
        pairs: Iterable[LoRAPair] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        damping: float = 0.3,
        curvature: str | int | None = "auto",
    ) -> None:
        arguments.check_curvature(curvature)
        defaults = arguments.plain_numbers(
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "damping": damping,
            }
        )
        arguments.check_group(defaults)
        if isinstance(model_or_params, nn.Module):
            arguments.check_one_model(model_or_params, model)
            model = model_or_params
            groups: Any = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        else:
            groups = arguments.as_groups(model_or_params)
        arguments.check_parameters(groups)
        declared = arguments.as_pairs(pairs)
        self._model = model
        self._declared = declared
        self._representation = curvature
        self._left_out: dict[str, str] = {}
        self._pairs: list[LoRAPair] = []
        self._events = events.EventCounter()
        self._observer: CurvatureObserver | None = None
        self._store = CurvatureStore(self._pairs, curvature or "auto")
        self._warned_unobserved = False
        found = self._discover()
        arguments.check_not_empty(groups, model)
        # Pairs are adopted once all groups are known.
        self._constructed = False
        super().__init__(groups, defaults)
        self._constructed = True
        self._adopt(found)
        if model is None and not declared and curvature is not None:
            warnings.warn(
                "parameters were given without a model, so no LoRA pair is known and every "
                "parameter gets AdamW; pass the model itself, or model=model",
                NoPairsWarning,
                stacklevel=2,
            )
        elif not self._pairs and curvature is not None:
            warnings.warn(
                "no LoRA pair was found among the trainable parameters, so every parameter gets "
                "AdamW; declare pairs by hand with pairs=[LoRAPair(...)] if there are any",
                NoPairsWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------- parameters and pairs

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; LoRA pairs completed by it are found in the model.

        An empty group is ignored.

        Raises:
            HyperparameterError: If a number of the group is out of range.
            ParameterError: If a parameter is unusable or already known.
        """
        group = arguments.plain_numbers(arguments.as_list(param_group))
        if not group["params"]:
            return
        arguments.check_group({**self.defaults, **group})
        arguments.check_parameters([group], known=self._parameters())
        found = self._discover() if self._constructed else None
        super().add_param_group(group)
        self.param_groups[-1]["steps_taken"] = self._steps_taken()
        if found is not None:
            self._adopt(found)

    def _discover(self) -> Discovery:
        if self._representation is None:
            return Discovery((), {})
        return arguments.discover(self._model, self._declared)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _adopt(self, found: Discovery) -> None:
        """Take over the pairs whose two factors are both among the parameters."""
        mine = {id(p) for p in self._parameters()}
        self._left_out = dict(found.left_out)
        known = {id(pair.A) for pair in self._pairs}
        for pair in found.pairs:
            if id(pair.A) in known:
                continue
            missing = [x for x, p in (("A", pair.A), ("B", pair.B)) if id(p) not in mine]
            strided = any(p.ndim > 2 and not p.is_contiguous() for p in (pair.A, pair.B))
            if not missing and not strided:
                self._pairs.append(pair)
                for parameter in (pair.A, pair.B):
                    if parameter in self.state:  # AdamW stepped it so far
                        self.state[parameter] = as_factor_state(parameter, self.state[parameter])
            elif len(missing) < 2 or pair in self._declared:
                verb = "are" if len(missing) == 2 else "is"
                lacking = f"{' and '.join(missing)} {verb} not being optimised"
                reason = lacking if missing else "not contiguous"
                self._left_out[pair.name] = reason
        if self._observer is None:
            self._observe()
        elif self._observer.active:
            self._observer.watch(self._pairs)

    def _observe(self) -> None:
        if any(pair.observed for pair in self._pairs):
            self._observer = CurvatureObserver(
                self._pairs, self._store.consume, self._store.discard_pair
            )
            self._schedule_collection()

    def remove_hooks(self) -> None:
        """Take every hook off the model; training can go on with the last curvature."""
        if self._observer is not None:
            self._observer.remove()
            self._store.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove_hooks()

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients now in ``.grad``.

        Args:
            closure: Re-evaluates the model and returns the loss; run with grad enabled.

        Raises:
            GradientError: If a gradient is sparse or complex; nothing was changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        arguments.check_gradients(self._parameters())
        self._fold_in_curvature()
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        work = [
            self._pair_work(index, pair, group_of)
            for index, pair in enumerate(self._pairs)
            if pair.A.grad is not None or pair.B.grad is not None
        ]
        for skipped in step_pairs(work):
            self._events.add(events.PAIR_SKIPPED, skipped.sum())
        self._step_others()
        self._count_step()
        return loss

    def _fold_in_curvature(self) -> None:
        if self._observer is None or not self._observer.active or not self._observer.collecting:
            return
        self._warn_if_bypassed(self._observer.flush())
        self._events.add(events.CURVATURE_DROPPED, self._store.update())
        self._link_curvature()

    def _link_curvature(self) -> None:
        """Point the saved state to the live tensors, which sharing may have replaced."""
        for index, pair in enumerate(self._pairs):
            if pair.observed and pair.A in self.state:
                self.state[pair.A].update(self._store.state(index))

    def _warn_if_bypassed(self, bypassed: set[int]) -> None:
        if bypassed and not self._warned_unobserved:
            self._warned_unobserved = True
            warnings.warn(
                f"{len(bypassed)} LoRA pair(s) get gradients but their hooks see nothing, e.g. "
                f"{self._pairs[min(bypassed)].name!r}: a fused kernel bypasses the module, its "
                "input is overwritten in place, or a model of this class was compiled before the "
                "optimizer was built (call torch._dynamo.reset() after building it); they are "
                "stepped without input curvature",
                UnobservedPairWarning,
                stacklevel=4,
            )

    def _pair_work(self, index: int, pair: LoRAPair, group_of: dict[int, Group]) -> PairWork:
        state_a, state_b = self._factor_state(pair.A), self._factor_state(pair.B)
        if pair.observed and not any(name.startswith(STATE_PREFIX) for name in state_a):
            state_a.update(self._store.state(index))
        group_a, group_b = group_of[id(pair.A)], group_of[id(pair.B)]
        values = pair.as_matrices(pair.A, pair.B)
        means = pair.as_matrices(state_a["exp_avg"], state_b["exp_avg"])
        squares = pair.as_matrices(state_a["exp_avg_sq"], state_b["exp_avg_sq"])
        no_grad = (torch.empty(0, 0), torch.empty(0, 0))
        grads = pair.as_matrices(
            no_grad[0] if pair.A.grad is None else pair.A.grad,
            no_grad[1] if pair.B.grad is None else pair.B.grad,
        )

        def factor(which: int, parameter: Tensor, group: Group, state: Group) -> FactorWork:
            return FactorWork(
                values[which],
                None if parameter.grad is None else grads[which],
                Moments(state["step"], means[which], squares[which]),
                group["lr"],
                group["weight_decay"],
                AdamSettings(group["betas"][0], group["betas"][1], group["eps"]),
            )

        return PairWork(
            factor(0, pair.A, group_a, state_a),
            factor(1, pair.B, group_b, state_b),
            self._store.damped(index, group_a["damping"]),
            group_a["damping"],
        )

    def _factor_state(self, parameter: Tensor) -> Group:
        if not self.state[parameter]:
            self.state[parameter] = new_factor_state(parameter)
        state: Group = self.state[parameter]
        return state

    def _step_others(self) -> None:
        """torch.optim's own AdamW for everything that is in no pair."""
        paired = {id(p) for pair in self._pairs for p in (pair.A, pair.B)}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and id(p) not in paired]
            for skipped in step_plain(params, [self.state[p] for p in params], group):
                self._events.add(events.PARAMETER_SKIPPED, skipped)

    def _steps_taken(self) -> int:
        return int(self.param_groups[0].get("steps_taken", 0)) if self.param_groups else 0

    def _count_step(self) -> None:
        taken = self._steps_taken() + 1
        for group in self.param_groups:
            group["steps_taken"] = taken
        self._schedule_collection()

    def _schedule_collection(self) -> None:
        if self._observer is not None:
            self._observer.collecting = collects_at(self._steps_taken())

    # ------------------------------------------------------------- save and resume

    @torch.no_grad()
    def load_state_dict(self, state_dict: Group) -> None:
        """Restore what ``state_dict()`` returned, bit for bit.

        Unlike in ``torch.optim``, the state of bf16 and fp16 LoRA factors keeps its
        float32 precision, and a state dict that does not fit is refused as a whole.
        Statistics of a backward without a step are dropped.

        Raises:
            StateError: If the state is damaged or belongs to another model; the
                optimizer is unchanged then.
        """
        # As hooks of torch's own method: after the user's hooks that adapt a state dict,
        # and before those that look at the result.
        incoming: list[Group] = []
        hooks = (
            self.register_load_state_dict_pre_hook(lambda _, given: self._check(given, incoming)),
            self.register_load_state_dict_post_hook(
                lambda _: self._restore_precision(incoming[0]), prepend=True
            ),
        )
        try:
            checkpoint.check_is_state_dict(state_dict)
            super().load_state_dict(dict(state_dict))
        finally:
            for hook in hooks:
                hook.remove()

    def _check(self, state_dict: Group, incoming: list[Group]) -> None:
        checkpoint.check(state_dict, self.param_groups, self._expected_state())
        position = {id(p): i for i, p in enumerate(self._parameters())}
        pairs = [(position[id(pair.A)], position[id(pair.B)]) for pair in self._pairs]
        checkpoint.check_pairs_complete(state_dict, pairs)
        incoming.append(state_dict)

    def _restore_precision(self, state_dict: Group) -> None:
        """Replace what torch has cast to the dtype of the parameters."""
        saved = checkpoint.states_of(state_dict, self._parameters())
        curvatures: dict[int, dict[str, Tensor]] = {}
        for index, pair in enumerate(self._pairs):
            if id(pair.A) not in saved:
                continue
            for parameter in (pair.A, pair.B):
                self.state[parameter] = as_factor_state(parameter, saved[id(parameter)])
            if pair.observed:
                curvatures[index] = {
                    name: value
                    for name, value in saved[id(pair.A)].items()
                    if name.startswith(STATE_PREFIX)
                }
        self._store.load_state(curvatures)
        self._link_curvature()
        if self._observer is not None:
            self._observer.discard()
        self._schedule_collection()

    def __getstate__(self) -> Group:
        names = ("_model", "_declared", "_representation", "_left_out", "_pairs", "_store")
        active = self._observer is not None and self._observer.active
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in names},
            "_hooks_wanted": active or self._observer is None,
        }

    def __setstate__(self, state: Group) -> None:
        state = dict(state)
        wanted = state.pop("_hooks_wanted", None)
        super().__setstate__(state)
        if wanted is None:  # load_state_dict, not a copy
            return
        # Copies of parameters have no gradient, so neither have they its statistics.
        self._store.discard()
        self._events = events.EventCounter()
        self._observer = None
        self._warned_unobserved = False
        self._constructed = True
        self._observe()
        if not wanted:
            self.remove_hooks()

    def _expected_state(self) -> dict[int, dict[str, tuple[int, ...]]]:
        adam = ("exp_avg", "exp_avg_sq")
        curvature = {
            id(pair.A): self._store.expected_state(index)
            for index, pair in enumerate(self._pairs)
            if pair.observed
        }
        return {
            index: {"step": (), **dict.fromkeys(adam, tuple(p.shape)), **curvature.get(id(p), {})}
            for index, p in enumerate(self._parameters())
        }

    # -------------------------------------------------------------------- looking

    def summary(self) -> str:
        """A table of the pairs (how each is observed) and of what is left to AdamW and why."""
        held = [self._store.describe(index) for index in range(len(self._pairs))]
        return render_summary(self._pairs, self.param_groups, self._left_out, self._model, held)

    def diagnostics(self) -> dict[str, int]:
        """Counts of numerical events so far; everything zero in a healthy run.

        Keys: ``"pair skipped"`` and ``"parameter skipped"`` (gradients that were not
        finite), ``"curvature update dropped"`` (inputs that were not finite, or a
        factorisation that failed).  Waits for the GPU.
        """
        return self._events.counts()
