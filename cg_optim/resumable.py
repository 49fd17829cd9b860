"""What an observing optimizer is between its steps: hooks on and off, saved, resumed, copied.

:class:`~cg_optim.CGLoRAOptimizer` adds the parameters it is given and the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from cg_optim import checkpoint, events
from cg_optim.curvature_store import STATE_PREFIX, CurvatureStore, collects_at
from cg_optim.factor_state import as_factor_state
from cg_optim.hooks import CurvatureObserver
from cg_optim.initialisation.first_step import FirstStep, Start
from cg_optim.pairs import LoRAPair, factor_ids

Group = dict[str, Any]


class ResumableOptimizer(Optimizer):
    """An optimizer of LoRA pairs whose inputs are observed by hooks.

    The curvature that the hooks collect is part of the state of each pair's ``A``; the
    number of steps taken is part of every group, because it decides when to collect; so is
    whether the adapters are still to be initialised.
    """

    # Set by the constructor of the subclass before any parameter group is added.
    _model: nn.Module | None
    _declared: tuple[LoRAPair, ...]
    _representation: str | int | None
    _left_out: dict[str, str]
    _pairs: list[LoRAPair]
    _strict: bool
    _events: events.EventCounter
    _observer: CurvatureObserver | None
    _store: CurvatureStore
    _first: FirstStep
    _warned_unobserved: bool
    _constructed: bool

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _group_of(self) -> dict[int, Group]:
        """The group of each parameter, by its ``id``."""
        return {id(p): group for group in self.param_groups for p in group["params"]}

    def _steps_taken(self) -> int:
        return int(self.param_groups[0].get("steps_taken", 0)) if self.param_groups else 0

    # ------------------------------------------------------------------------ hooks

    def _observe(self) -> None:
        """Put hooks on the pairs, if there are any to observe."""
        if any(pair.observed for pair in self._pairs):
            self._observer = CurvatureObserver(self._pairs, self._store.consume, self._discard_pair)
            self._schedule_collection()

    def _discard_pair(self, index: int, unless: Tensor | None) -> set[int]:
        together = self._store.discard_pair(index, unless)
        self._first.discard({index, *together}, unless)
        return together

    def _schedule_collection(self) -> None:
        if self._observer is not None:
            self._observer.collecting = collects_at(self._steps_taken())
            pending = self._init_pending()
            self._observer.gradient_consumer = self._first.consume if pending else None

    def _init_pending(self) -> bool:
        """Whether ``init="curvature"`` was asked for and no step has carried it out yet."""
        return bool(self.param_groups and self.param_groups[0].get("init_pending"))

    def _initialise(self, dampings: Sequence[float]) -> dict[int, Start]:
        """Point each fresh ``A`` along its first gradient; what became of it, by pair."""
        starts = self._first.start(lambda index: self._store.damped(index, dampings[index]))
        if starts:
            for group in self.param_groups:
                group["init_pending"] = False
        return starts

    def remove_hooks(self) -> None:
        """Take every hook off the model; training can go on with the last curvature."""
        if self._observer is not None:
            self._observer.remove()
            self._store.discard()
            self._first.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove_hooks()

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
        paired = factor_ids(self._pairs)
        checkpoint.check(state_dict, self.param_groups, self._expected_state(), paired)
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
        paired = factor_ids(self._pairs)
        for plain, values in self.state.items():
            if id(plain) not in paired:
                # Steps write in place: not into the caller's tensors, nor into expanded ones.
                self.state[plain] = {k: v.detach().clone() for k, v in values.items()}
        self._store.load_state(curvatures)
        self._link_curvature()
        if self._observer is not None:
            self._observer.discard()
        self._first.discard()
        self._schedule_collection()

    def _link_curvature(self) -> None:
        """Point the saved state to the live tensors, which sharing may have replaced."""
        for index, pair in enumerate(self._pairs):
            if pair.observed and pair.A in self.state:
                self.state[pair.A].update(self._store.state(index))

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

    # -------------------------------------------------------------- copy and pickle

    def __getstate__(self) -> Group:
        names = (
            "_model",
            "_declared",
            "_representation",
            "_left_out",
            "_pairs",
            "_store",
            "_strict",
        )
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
        self._first = FirstStep(self._pairs)
        self._events = events.EventCounter(self._strict)
        self._observer = None
        self._warned_unobserved = False
        self._constructed = True
        self._observe()
        if not wanted:
            self.remove_hooks()
