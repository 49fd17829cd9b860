"""Accelerate: prepare, accumulation, mixed precision, clipping, save_state and load_state."""

from __future__ import annotations

from pathlib import Path

import accelerate
import torch
from torch.utils.data import DataLoader

from cg_optim import CGLoRAOptimizer
from cg_optim.diagnostics import scalars

from .small import CLIP, Windows, language_model_with_lora


def train(
    folder: Path, epochs: int = 2, mixed_precision: str = "bf16", resume: bool = False
) -> list[float]:
    """Train, saving after every epoch, or go on after the one that was saved; the losses."""
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2
    )
    model = language_model_with_lora()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)  # before prepare(), on the bare model
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    loader = DataLoader(Windows(), batch_size=8)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if resume:
        accelerator.load_state(str(folder))
    losses = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    # Accelerate's wrapper hides the method; the optimizer is inside.
                    accelerator.log(scalars(optimizer.optimizer.layer_diagnostics()))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
        accelerator.save_state(str(folder))
    return losses


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        losses = train(Path(temporary))
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
