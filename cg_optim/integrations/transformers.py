"""The Hugging Face Trainer, and TRL's trainers, which are made of it.

:func:`trainer_optimizer` lets ``TrainingArguments`` decide the learning rate and the other
settings they have for AdamW.  :class:`DiagnosticsCallback` puts the optimizer's diagnostics
into the Trainer's logs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers import Trainer, TrainerCallback

from cg_optim.diagnostics import LayerDiagnostics, scalars
from cg_optim.errors import IgnoredSettingWarning, ParameterError, warn
from cg_optim.integrations.wrappers import unwrap
from cg_optim.optimizer import CGLoRAOptimizer
from cg_optim.recorder import RunRecorder


def trainer_optimizer(
    args: Any, model: nn.Module | None = None, **settings: Any
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What to pass to a Trainer as ``optimizer_cls_and_kwargs``.

    >>> Trainer(model, args, ..., optimizer_cls_and_kwargs=trainer_optimizer(args))

    The Trainer itself hands its ``learning_rate``, ``weight_decay``, ``adam_beta1``,
    ``adam_beta2`` and ``adam_epsilon`` to no optimizer it is given; this does.  The
    optimizer is built when training starts, on the model that trains: after TRL has added
    the adapter of its ``peft_config``, and after wrapping.  Biases and normalisation layers
    get no weight decay, as with the Trainer's own AdamW.

    ``adam_beta1`` is for parameters outside LoRA pairs.  The factors of the pairs have a
    momentum of another kind (:mod:`cg_optim.rule`), which ``TrainingArguments`` does not
    know: ``trainer_optimizer(args, momentum=...)``.

    Args:
        args: The ``TrainingArguments``, or TRL's configuration.
        model: Needed only for versions of transformers that hand no model to the optimizer
            (before 5.2); the adapter must be in it already.  Weight decay is then for
            biases and normalisation layers too.
        settings: Arguments of :class:`~cg_optim.CGLoRAOptimizer` that ``args`` does not
            have (``momentum``, ``damping``, ``pairs``...), or that go before those of
            ``args``.

    Warns:
        IgnoredSettingWarning: If ``args`` has an ``adam_beta1`` other than AdamW's, and no
            ``momentum`` is given.
    """
    if args.adam_beta1 != _USUAL_BETA1 and not settings.keys() & {"momentum", "betas"}:
        warn(
            f"adam_beta1={args.adam_beta1:g} goes to the parameters outside LoRA pairs only; the "
            "factors of the pairs keep their momentum unless you write "
            "trainer_optimizer(args, momentum=...)",
            IgnoredSettingWarning,
        )
    if model is not None:
        return CGLoRAOptimizer, {"model": model, **_settings_of(args), **settings}
    return TrainerOptimizerFactory, {"args": args, **settings}


#: The ``adam_beta1`` of ``TrainingArguments`` that nobody has touched.
_USUAL_BETA1 = 0.9


def _settings_of(args: Any) -> dict[str, Any]:
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }


def _by_decay(model: nn.Module) -> list[dict[str, Any]]:
    """The two groups in which the Trainer itself puts the parameters; one may be empty."""
    # The method looks at the model only; it is the one place where the Trainer says which.
    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    training = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in training if name in decayed]},
        {"params": [p for name, p in training if name not in decayed], "weight_decay": 0.0},
    ]


class TrainerOptimizerFactory:
    """Builds the optimizer when the Trainer asks; see :func:`trainer_optimizer`.

    Raises:
        ParameterError: If this version of transformers calls it as an optimizer class.
    """

    def __init__(self, *unexpected: Any, **settings: Any) -> None:
        if unexpected or settings:
            raise ParameterError(
                "this version of transformers gives parameter groups to the optimizer, not the "
                "model, so LoRA pairs cannot be found; write trainer_optimizer(args, model=model)"
            )

    def __call__(self, model: nn.Module, *, args: Any, **settings: Any) -> CGLoRAOptimizer:
        """The optimizer for all that trains in ``model``."""
        return CGLoRAOptimizer(
            _by_decay(model), **{"model": model, **_settings_of(args), **settings}
        )


class DiagnosticsCallback(TrainerCallback):
    """Adds a compact set of the optimizer's diagnostics to the Trainer's logs.

    >>> trainer.add_callback(DiagnosticsCallback(trainer))

    They go where the Trainer's own logs go: ``log_history`` and every tracker in
    ``report_to``; :func:`cg_optim.diagnostics.scalars` lists them.

    Args:
        trainer: The Trainer, for its ``log`` method.
        every: Steps between two looks; the default is the Trainer's ``logging_steps``.
        path: Where to record the run for ``python -m cg_optim.report``; None does not.

    Raises:
        OptimizerTypeError: When training starts with another optimizer.
    """

    def __init__(
        self, trainer: Any, every: int | None = None, path: str | os.PathLike[str] | None = None
    ) -> None:
        self._trainer = trainer
        self._every = every
        self._path = path
        self._recorder: RunRecorder | None = None
        self._seen: list[LayerDiagnostics] | None = None
        self._step, self._lr = 0, 0.0
        self._loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the optimizer before time is spent on training."""
        optimizer = unwrap(kwargs["optimizer"])
        if self._path is not None and state.is_world_process_zero:
            self._recorder = RunRecorder(self._path, optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look while the gradients are there, clipped already."""
        every = self._every or max(1, int(state.logging_steps))
        if (state.global_step + 1) % every == 0:
            ours = unwrap(kwargs["optimizer"])
            self._seen, self._step = ours.layer_diagnostics(), state.global_step
            self._lr = float(ours.param_groups[0]["lr"])

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Remember the training loss of the step that was looked at."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send what the last step showed, after the Trainer's own entry for it."""
        self._send(kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send what the very last step showed."""
        self._send(kwargs["optimizer"])

    def _send(self, optimizer: object) -> None:
        if self._seen is None:
            return
        seen, self._seen = self._seen, None
        self._trainer.log(scalars(seen, unwrap(optimizer).diagnostics().values()))
        if self._recorder is not None:
            self._recorder.write(self._step, seen, self._loss, self._lr)
        self._loss = None
