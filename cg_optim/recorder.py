"""Records a training run as lines of JSON, for ``python -m cg_optim.report``.

One line is one look at the run::

    {"step": 30, "loss": 1.71, "lr": 0.001, "events": {"pair skipped": 0, ...},
     "layers": [{"name": "model.layers.0.self_attn.q_proj", "seen": true, ...}, ...]}

``step`` is the number of steps taken before; what is unknown is null.  Lines of
:meth:`RunRecorder.step` have ``"decrease": {"predicted": 0.012, "actual": 0.011}`` as well.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from cg_optim.diagnostics import Decrease, LayerDiagnostics, step_and_compare
from cg_optim.errors import HyperparameterError, RunFileError
from cg_optim.integrations.wrappers import unwrap

#: What every line must have.
REQUIRED = frozenset({"step", "loss", "lr", "events", "layers"})


class RunRecorder:
    """Writes what the optimizer does into a file, one line per look.

    >>> recorder = RunRecorder("run.jsonl", optimizer, every=10)
    >>> loss.backward(); recorder.record(loss); optimizer.step(); optimizer.zero_grad()

    The file is begun anew if the optimizer has taken no step yet, and continued if it has
    (after ``load_state_dict``).  Every line is on the disk when :meth:`record` returns.

    Args:
        path: The file; its folder must exist.
        optimizer: A ``CGLoRAOptimizer``, wrapped by Accelerate or Lightning or not.
        every: Steps between two looks; a look costs as much time as a few optimizer steps.

    Raises:
        HyperparameterError: If ``every`` is not a positive integer.
        OptimizerTypeError: If it is another optimizer.
        OSError: If the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], optimizer: object, every: int = 1) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise HyperparameterError(f"every is {every!r}; expected a positive integer")
        self._optimizer = unwrap(optimizer)
        self._path = Path(path)
        self._every = every
        if self._steps() == 0:
            self._path.write_text("", encoding="utf-8")
        else:
            _end_last_line(self._path)

    def _steps(self) -> int:
        return int(self._optimizer.param_groups[0].get("steps_taken", 0))

    def record(self, loss: float | Tensor | None = None) -> None:
        """Look at the optimizer if it is time; between ``backward()`` and ``step()``.

        Args:
            loss: The loss of this step, a number or a one-element tensor.
        """
        step = self._steps()
        if step % self._every == 0:
            self.write(step, self._optimizer.layer_diagnostics(), loss)

    def step(self, loss_fn: Callable[[], Tensor]) -> Decrease | None:
        """One training step in place of a loop's own; when it is time, it is compared.

        The line then says by how much the loss of this batch was predicted to fall, and by
        how much it fell (:func:`cg_optim.diagnostics.step_and_compare`), for one more
        forward pass.

        Args:
            loss_fn: Returns the loss of one batch, a scalar.

        Returns:
            Both decreases, None in steps that are not looked at.
        """
        step, lr = self._steps(), float(self._optimizer.param_groups[0]["lr"])
        if step % self._every:
            self._optimizer.zero_grad()
            loss_fn().backward()
            self._optimizer.step()
            return None
        losses: list[Tensor] = []
        layers: list[LayerDiagnostics] = []

        def noted() -> Tensor:
            loss = loss_fn()
            losses.append(loss.detach())
            return loss

        hook = self._optimizer.register_step_pre_hook(
            lambda *_: layers.extend(self._optimizer.layer_diagnostics())
        )
        try:
            decrease = step_and_compare(self._optimizer, noted)
        finally:
            hook.remove()
        self.write(step, layers, losses[0], lr, decrease)
        return decrease

    def write(
        self,
        step: int,
        layers: Sequence[LayerDiagnostics],
        loss: float | Tensor | None = None,
        lr: float | None = None,
        decrease: Decrease | None = None,
    ) -> None:
        """Write one line with what was seen before.

        Args:
            step: Number of steps taken before the look.
            layers: From ``optimizer.layer_diagnostics()``.
            loss: The loss, if it is known.
            lr: The learning rate at the look, if a scheduler may have changed it since.
            decrease: Of the loss in this step, if both were found out.
        """
        if lr is None:
            lr = float(self._optimizer.param_groups[0]["lr"])
        record = {
            "step": step,
            "loss": float(loss.detach() if isinstance(loss, Tensor) else loss)
            if loss is not None
            else None,
            "lr": lr,
            "events": self._optimizer.diagnostics(),
            "layers": [asdict(layer) for layer in layers],
        }
        if decrease is not None:
            record["decrease"] = decrease._asdict()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan(record), allow_nan=False) + "\n")


def read_run(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run by rising step, as dicts; the last one of each step.

    A last line cut short by a crash is left out.

    Raises:
        RunFileError: If the file holds something else, or nothing.
        OSError: If the file cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = None if number == len(lines) else line
        if record is None:
            continue
        if not isinstance(record, dict) or not record.keys() >= REQUIRED:
            raise RunFileError(
                f"{path}, line {number}: not a record of a run: {line[:60]!r}; expected what "
                "cg_optim.recorder.RunRecorder writes"
            )
        records[record["step"]] = record
    if not records:
        raise RunFileError(f"{path}: no record in it; was RunRecorder.record() called?")
    return [records[step] for step in sorted(records)]


def _end_last_line(path: Path) -> None:
    """A crash may have cut the last line short; what follows must not be glued to it."""
    if not path.exists():
        path.write_text("", encoding="utf-8")
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
