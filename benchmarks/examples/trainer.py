"""The Hugging Face Trainer: accumulation, clipping, bf16, checkpointing, saving, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from cg_optim import CGLoRAOptimizer
from cg_optim.integrations.transformers import DiagnosticsCallback, trainer_optimizer

from .small import CLIP, Windows, language_model_with_lora


def arguments(folder: Path, **more: Any) -> transformers.TrainingArguments:
    """Settings of the run; ``learning_rate`` and ``weight_decay`` reach the optimizer."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": CLIP,
        "bf16": True,
        "gradient_checkpointing": True,
        "save_steps": 4,
        "logging_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(**{**settings, **more})


def trainer(folder: Path, form: str = "factory", **more: Any) -> transformers.Trainer:
    """A Trainer that is given the optimizer in one of its three forms."""
    model = language_model_with_lora()
    args = arguments(folder, **more)
    forms: dict[str, dict[str, Any]] = {
        # Settings come from the arguments; the Trainer hands over the model it trains.
        "factory": {"optimizer_cls_and_kwargs": trainer_optimizer(args)},
        # Settings are written out; those of the arguments would not be looked at.
        "class": {"optimizer_cls_and_kwargs": (CGLoRAOptimizer, {"model": model, "lr": 1e-2})},
        # Built by hand; the Trainer adds its schedule.
        "instance": {"optimizers": (CGLoRAOptimizer(model, lr=1e-2), None)},
    }
    built = transformers.Trainer(model, args, train_dataset=Windows(), **forms[form])
    built.add_callback(DiagnosticsCallback(built, path=folder / "run.jsonl"))
    return built


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        built = trainer(Path(temporary), *sys.argv[1:])
        built.train()
        # After an interruption: built.train(resume_from_checkpoint=True)
