"""The optimizer: parameter groups, hooks, curvature and the step, put together.

The way of one training step::

    forward/backward   hooks.CurvatureObserver  -> curvature_store.CurvatureStore
    step()             1. gradients are checked; nothing has changed yet
                       2. the curvature collected since the last step is folded in
                       3. pairs with gradients:     pair_step.step_pairs -> rule
                       4. all other parameters:     plain_step, torch.optim's AdamW
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from cg_optim import arguments, events
from cg_optim.curvature_store import TRACE, CurvatureStore
from cg_optim.diagnostics import LayerDiagnostics, look_at
from cg_optim.discovery import Discovery
from cg_optim.errors import UnobservedPairWarning, warn
from cg_optim.factor_state import as_factor_state, new_factor_state
from cg_optim.initialisation.first_step import FirstStep, with_changed_gradient
from cg_optim.initialisation.fresh import check_rank
from cg_optim.learning_rate import WITHOUT_PAIRS, default_learning_rate
from cg_optim.linalg import Rung, recorded_rungs
from cg_optim.pair_step import FactorWork, PairWork, step_pairs
from cg_optim.pairs import LoRAPair, factor_ids
from cg_optim.plain_step import step_plain
from cg_optim.precision import autocast_off
from cg_optim.resumable import Group, ResumableOptimizer
from cg_optim.rule import AdamSettings, Moments
from cg_optim.summary import render_summary


class CGLoRAOptimizer(ResumableOptimizer):
    r"""Curvature-guided optimizer for LoRA, a drop-in replacement for ``torch.optim.AdamW``.

    LoRA pairs are found in the model and stepped by Adam in coordinates in which the
    inputs of their layers are white; see :mod:`cg_optim.rule` for the equations.  The
    input curvature ``E[x x^T]`` is collected by hooks during ordinary backward passes.
    Every other trainable parameter gets exactly ``torch.optim.AdamW``.

    >>> optimizer = CGLoRAOptimizer(model, lr=4e-4)  # instead of AdamW(..., lr=2e-4)
    >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Build it before ``torch.compile`` compiles the model: hooks registered later never
    run; ``torch._dynamo.reset()`` after building it makes up for an earlier compilation of
    a model of the same class.  The hooks stay on the model until :meth:`remove_hooks`, or
    leave the ``with`` block when the optimizer is used as a context manager.  A numerical
    failure is absorbed, counted in :meth:`diagnostics` and warned about once per kind.

    ``copy.deepcopy`` and ``pickle`` work on the model and its optimizer *together*, e.g. as
    a tuple: the copied optimizer then trains the copied model.  A copied model alone is
    not observed by the original optimizer.

    Args:
        model_or_params: A module (all its trainable parameters), or parameters, named
            parameters or parameter groups as for any ``torch.optim`` optimizer.
        lr: Learning rate; take twice what AdamW would get, or the same if that was tuned.
            A float or a one-element tensor.
            None: a first guess from the sizes of the LoRA pairs, see
            :func:`~cg_optim.default_learning_rate`; it goes to the parameter groups as a number.
        model: The module in which to look for LoRA pairs when the first argument is
            not a module.
        pairs: Pairs declared by hand, in addition to those found; they take
            precedence.
        momentum: Decay of the mean gradient of LoRA factors, in place of ``betas[0]``: see
            :mod:`cg_optim.rule`.
        betas: Decay of the first and second moment, as in AdamW; LoRA factors use the
            second only, so schedulers that cycle ``betas[0]`` do not reach them.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, as in AdamW, for all parameters.
        damping: Damping of both factors' input curvature relative to its mean eigenvalue.
            Larger is closer to AdamW.
        curvature: ``"auto"`` keeps the leading directions of large inputs and the whole
            matrix of small ones; ``"dense"`` always the whole matrix; an integer that
            many directions; ``None`` no curvature at all, which is AdamW for everything.
        init: ``"curvature"`` points the ``A`` of every pair whose ``B`` is zero along the
            leading directions of the first batch's whitened gradient, at the first step and
            without another pass (:mod:`cg_optim.initialisation.first_step`).  The function
            does not change.  :func:`~cg_optim.curvature_init_` does more, in a phase before
            training.
        strict: Raise at the end of a step in which a numerical failure was absorbed, and
            say where.  For debugging: every step then waits for the accelerator.

    Raises:
        HyperparameterError: If a number is out of range.
        ParameterError: If there is nothing to optimise, or a parameter comes twice, is
            complex, or is not a tensor.
        AdapterError: If the model's adapters are frozen, merged or disabled.
        PairError: If a pair is malformed or two pairs share a parameter.
        InitialisationError: If ``init`` meets a rank that is too large for its layer.
    """

    def __init__(
        self,
        model_or_params: nn.Module | ParamsT,
        lr: float | Tensor | None = None,
        *,
        model: nn.Module | None = None,
        pairs: Iterable[LoRAPair] = (),
        momentum: float = 0.8,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        damping: float = 0.3,
        curvature: str | int | None = "auto",
        init: str | None = None,
        strict: bool = False,
    ) -> None:
        arguments.check_curvature(curvature)
        arguments.check_init(init, curvature)
        defaults = arguments.plain_numbers(
            {
                "lr": WITHOUT_PAIRS if lr is None else lr,
                "momentum": momentum,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "damping": damping,
            }
        )
        arguments.check_group(defaults)
        if init is not None:
            defaults["init_pending"] = True
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
        self._left_out = {}
        self._pairs = []
        self._strict = bool(strict)
        self._events = events.EventCounter(self._strict)
        self._observer = None
        self._store = CurvatureStore(self._pairs, curvature or "auto")
        self._first = FirstStep(self._pairs)
        self._warned_unobserved = False
        found = self._discover()
        arguments.check_not_empty(groups, model)
        if lr is None:
            mine = [parameter for group in groups for parameter in arguments.tensors_of(group)]
            usable, _ = arguments.complete_pairs(found, mine, declared)
            defaults["lr"] = default_learning_rate(usable)
        # Pairs are adopted once all groups are known.
        self._constructed = False
        super().__init__(groups, defaults)
        self._constructed = True
        self._adopt(found)
        if not self._pairs and curvature is not None:
            arguments.warn_without_pairs(known=model is not None or bool(declared))

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

    def _adopt(self, found: Discovery) -> None:
        """Take over the pairs whose two factors are both among the parameters."""
        known = {id(pair.A) for pair in self._pairs}
        usable, self._left_out = arguments.complete_pairs(found, self._parameters(), self._declared)
        for pair in usable:
            if id(pair.A) in known:
                continue
            if self._init_pending() and pair.observed:
                check_rank(pair)
            self._pairs.append(pair)
            for parameter in (pair.A, pair.B):
                if parameter in self.state:  # AdamW stepped it so far
                    self.state[parameter] = as_factor_state(parameter, self.state[parameter])
        if self._observer is None:
            self._observe()
        elif self._observer.active:
            self._observer.watch(self._pairs)

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
            NumericalError: If ``strict`` and something was not finite; what was affected is
                left as it was, everything else has been stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        arguments.check_gradients(self._parameters())
        with autocast_off(self._parameters()):
            self._fold_in_curvature()
            self._step_pairs()
            self._step_others()
        self._count_step()
        self._events.raise_if_strict()
        return loss

    def _step_pairs(self) -> None:
        group_of = self._group_of()
        dampings = [group_of[id(pair.A)]["damping"] for pair in self._pairs]
        moving = [
            (index, pair)
            for index, pair in enumerate(self._pairs)
            if pair.A.grad is not None or pair.B.grad is not None
        ]
        with recorded_rungs() as rungs:
            self._store.damp_together(dampings)
            starts = self._initialise(dampings) if self._init_pending() else {}
            work = [
                with_changed_gradient(
                    self._pair_work(index, pair, group_of, self._states_of(index, pair)),
                    starts.get(index),
                )
                for index, pair in moving
            ]
            stacks = step_pairs(work)
        self._events.add(
            events.PAIR_SKIPPED,
            [stack.mask for stack in stacks],
            lambda: [moving[i][1].name for stack in stacks for i in stack.positions],
        )
        self._events.add(events.FACTORISATION_REPAIRED, [rung >= Rung.JITTER for rung in rungs])

    def _fold_in_curvature(self) -> None:
        if self._observer is None or not self._observer.active or not self._observer.collecting:
            return
        self._warn_if_bypassed(self._observer.flush())
        dropped = self._store.update()
        self._events.add(
            events.CURVATURE_DROPPED,
            dropped.values(),
            lambda: [f"input of {self._pairs[index].name}" for index in dropped],
        )
        self._link_curvature()

    def _warn_if_bypassed(self, bypassed: set[int]) -> None:
        if bypassed and not self._warned_unobserved:
            self._warned_unobserved = True
            warn(
                f"{len(bypassed)} LoRA pair(s) get gradients but their hooks see nothing, e.g. "
                f"{self._pairs[min(bypassed)].name!r}: a fused kernel bypasses the module, its "
                "input is overwritten in place, or a model of this class was compiled before the "
                "optimizer was built (call torch._dynamo.reset() after building it); they are "
                "stepped without input curvature",
                UnobservedPairWarning,
            )

    def _pair_work(
        self,
        index: int,
        pair: LoRAPair,
        group_of: dict[int, Group],
        states: tuple[Group, Group],
    ) -> PairWork:
        a, b = pair.A, pair.B
        state_a, state_b = states
        value_a, value_b = pair.as_matrices(a, b)
        # Of a parameter without gradient not used.
        grad_a, grad_b = pair.as_matrices(
            a if a.grad is None else a.grad, b if b.grad is None else b.grad
        )
        mean_a, mean_b = pair.as_matrices(state_a["exp_avg"], state_b["exp_avg"])
        square_a, square_b = pair.as_matrices(state_a["exp_avg_sq"], state_b["exp_avg_sq"])
        step_a, step_b = state_a["step"], state_b["step"]
        if pair.experts > 1:  # one count for all
            step_a, step_b = step_a.reshape(1), step_b.reshape(1)
        group_a, group_b = group_of[id(a)], group_of[id(b)]
        moments_a, moments_b = Moments(step_a, mean_a, square_a), Moments(step_b, mean_b, square_b)
        return PairWork(
            _factor_work(value_a, None if a.grad is None else grad_a, moments_a, group_a),
            _factor_work(value_b, None if b.grad is None else grad_b, moments_b, group_b),
            self._store.damped(index, group_a["damping"]),
            group_a["damping"],
        )

    def _states_of(self, index: int, pair: LoRAPair) -> tuple[Group, Group]:
        state_a, state_b = self._factor_state(pair.A), self._factor_state(pair.B)
        if pair.observed and TRACE not in state_a:
            state_a.update(self._store.state(index))
        return state_a, state_b

    def _factor_state(self, parameter: Tensor) -> Group:
        state: Group = self.state[parameter]
        if not state:
            state = self.state[parameter] = new_factor_state(parameter)
        return state

    def _step_others(self) -> None:
        """torch.optim's own AdamW for everything that is in no pair."""
        paired = factor_ids(self._pairs)
        others: list[Tensor] = []
        skipped: list[Tensor] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and id(p) not in paired]
            skipped += step_plain(params, [self.state[p] for p in params], group)
            others += params
        self._events.add(events.PARAMETER_SKIPPED, skipped, lambda: self._names_of(others))

    def _names_of(self, parameters: Iterable[Tensor]) -> list[str]:
        named = self._model.named_parameters() if self._model is not None else ()
        names = {id(p): name for name, p in named}
        return [names.get(id(p), f"one of shape {tuple(p.shape)}") for p in parameters]

    def _count_step(self) -> None:
        taken = self._steps_taken() + 1
        for group in self.param_groups:
            group["steps_taken"] = taken
        self._schedule_collection()

    # -------------------------------------------------------------------- looking

    def summary(self) -> str:
        """A table of the pairs (how each is observed) and of what is left to AdamW and why."""
        watched = self._observer is not None and self._observer.active
        held = []
        for index in range(len(self._pairs)):
            source = "hooks" if watched else "hooks removed"
            seen = "" if self._store.has_seen(index) else " (nothing seen yet)"
            held.append(f"{source}, {self._store.describe(index)}{seen}")
        return render_summary(self._pairs, self.param_groups, self._left_out, self._model, held)

    def diagnostics(self) -> dict[str, int]:
        """Counts of numerical events so far; everything zero in a healthy run.

        Keys: ``"pair skipped"`` and ``"parameter skipped"`` (gradients that were not
        finite, or a step that would not have been), ``"curvature update dropped"`` (inputs
        that were not finite), ``"factorisation repaired"`` (a matrix that its damping did
        not make positive definite).  Waits for the GPU.
        """
        return self._events.counts()

    def layer_diagnostics(self) -> list[LayerDiagnostics]:
        """What the optimizer knows about each pair, and the step it would take now.

        Call it after ``backward()`` and before ``zero_grad()``; without gradients the
        numbers about the step are NaN.  They are computed here and now: training is not
        slower, nor another one, whether this is called or not.  One call takes as long as a
        few steps, because pairs are looked at one by one, and waits for the GPU.
        """
        group_of = self._group_of()
        layers = []
        with self._store.only_looked_at():
            for index, pair in enumerate(self._pairs):
                # Looking must not create state: get, not an index into the defaultdict.
                known = [self.state.get(p) or new_factor_state(p) for p in (pair.A, pair.B)]
                missed = self._steps_taken() - max(int(state["step"]) for state in known)
                with autocast_off((pair.A,)):
                    work = self._pair_work(index, pair, group_of, (known[0], known[1]))
                    layers.append(look_at(pair.name, work, self._store.of(index), missed))
        return layers


def _factor_work(value: Tensor, grad: Tensor | None, state: Moments, group: Group) -> FactorWork:
    settings = AdamSettings(group["momentum"], group["betas"][1], group["eps"])
    return FactorWork(value, grad, state, group["lr"], group["weight_decay"], settings)
