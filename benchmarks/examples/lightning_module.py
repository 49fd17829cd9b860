"""Lightning: configure_optimizers, mixed precision, accumulation, clipping, checkpoints."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from cg_optim import CGLoRAOptimizer
from cg_optim.integrations.lightning import DiagnosticsCallback

from .small import CLIP, Windows, language_model_with_lora


class Module(lightning.LightningModule):
    """The model with its optimizer and schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = language_model_with_lora()
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = CGLoRAOptimizer(self, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def train(folder: Path, steps: int = 8, resume: bool = False, **more: Any) -> Module:
    """Train, saving after every fourth step, or go on after the fourth; the trained module."""
    module = Module()
    settings = {
        "accelerator": "cpu",
        "max_steps": steps,
        "precision": "bf16-mixed",
        "accumulate_grad_batches": 2,
        "gradient_clip_val": CLIP,
        "callbacks": [
            ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1),
            DiagnosticsCallback(every=2, path=folder / "run.jsonl"),
        ],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    trainer = lightning.Trainer(**{**settings, **more})
    checkpoint = str(folder / "step=4.ckpt") if resume else None
    loader = DataLoader(Windows(), batch_size=8)
    # Nothing in the optimizer's state needs pickle.
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return module


if __name__ == "__main__":
    import tempfile

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    with tempfile.TemporaryDirectory() as temporary:
        losses = train(Path(temporary)).losses
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
