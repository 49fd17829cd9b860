"""Lightning: the optimizer's diagnostics in whatever loggers the Trainer has."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch.callbacks import Callback

from cg_optim.diagnostics import LayerDiagnostics, scalars
from cg_optim.integrations.wrappers import unwrap
from cg_optim.recorder import RunRecorder


class DiagnosticsCallback(Callback):
    """Sends a compact set of the optimizer's diagnostics to the Trainer's loggers.

    >>> Trainer(callbacks=[DiagnosticsCallback()], ...)

    :func:`cg_optim.diagnostics.scalars` lists them.  They describe the gradients before
    Lightning clips them.

    Args:
        every: Steps between two looks; the default is the Trainer's ``log_every_n_steps``.
        path: Where to record the run for ``python -m cg_optim.report``; None does not.

    Raises:
        OptimizerTypeError: At the first step of another optimizer.
    """

    def __init__(
        self, every: int | None = None, path: str | os.PathLike[str] | None = None
    ) -> None:
        self._every = every
        self._path = path
        self._recorder: RunRecorder | None = None
        self._seen: list[LayerDiagnostics] | None = None
        self._step, self._lr = 0, 0.0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Look while the gradients are there, and send it."""
        every = self._every or max(1, int(trainer.log_every_n_steps))
        if (trainer.global_step + 1) % every:
            return
        ours = unwrap(optimizer)
        self._seen, self._step = ours.layer_diagnostics(), int(trainer.global_step)
        self._lr = float(ours.param_groups[0]["lr"])
        numbers = scalars(self._seen, ours.diagnostics().values())
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=self._step)
        if self._path is not None and trainer.is_global_zero and self._recorder is None:
            self._recorder = RunRecorder(self._path, ours)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what was seen, with the loss of the batch."""
        seen, self._seen = self._seen, None
        if seen is None or self._recorder is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        # Lightning divides the loss that it differentiates by the number of batches.
        scale = trainer.accumulate_grad_batches
        loss = None if loss is None else loss * scale
        self._recorder.write(self._step, seen, loss, self._lr)
