"""A byte-level Llama: built from a recipe, pretrained once, cached, measured."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from .datasets import as_numpy
from .evaluation import device_of, evaluating

Progress = Callable[[int, int, float], None]
"""Called with the steps done, the steps in all, and the last training loss."""

VOCABULARY = 256
"""Tokens are bytes."""

LONGEST_SEQUENCE = 1024
"""Positions the model knows, more than any recipe here uses."""

CACHE_FORMAT = 1
"""To be raised when the code below gives another model for the same recipe."""


@dataclass(frozen=True)
class LanguageModelRecipe:
    """Everything that decides a pretrained model, besides the text itself.

    Attributes:
        texts: Name of the pretraining text, for people; the text's bytes are hashed too.
        hidden_size, layers, heads, intermediate_size: Shape of the Llama.
        sequence_length: Bytes per training sequence.
        batch_size: Sequences per step.
        steps: Training steps: they, and never seconds, decide the result.
        learning_rate: Peak of the schedule (linear warm-up, linear decay to 0).
        weight_decay: Decoupled weight decay of the matrices.
        bf16: Whether forward passes run under bfloat16 autocast.
        seed: Initial weights and order of the data.
    """

    texts: str
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 344
    sequence_length: int = 128
    batch_size: int = 32
    steps: int = 400
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    bf16: bool = False
    seed: int = 0

    def digest(self, text: Tensor) -> str:
        """Name of the cached model: recipe, text and the code's format."""
        settings = json.dumps({"format": CACHE_FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(settings.encode() + as_numpy(text).tobytes()).hexdigest()[:20]


def build_model(recipe: LanguageModelRecipe) -> transformers.LlamaForCausalLM:
    """A ``LlamaForCausalLM`` over bytes with tied embeddings and random weights."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=LONGEST_SEQUENCE,
        tie_word_embeddings=True,
        use_cache=False,
        # Bytes have no special tokens: byte 0, 1 and 2 are bytes like all others.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return transformers.LlamaForCausalLM(config)


def pretrain(
    recipe: LanguageModelRecipe,
    text: Tensor,
    cache_dir: str | Path,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> transformers.LlamaForCausalLM:
    """The model pretrained on ``text`` (uint8), from the cache if it was made before.

    Args:
        recipe: Decides the result together with ``text``.
        text: The pretraining text.
        cache_dir: Folder of the cached weights; made if it is missing.
        progress: Called after every step; not at all when the cache has the model.
        device: Where to train.

    Returns:
        The model on the CPU, in float32 and training mode, all parameters trainable.
    """
    model = build_model(recipe)
    cached = Path(cache_dir) / f"language-model-{recipe.digest(text)}.pt"
    if cached.exists():
        model.load_state_dict(torch.load(cached, map_location="cpu", weights_only=True))
        return model.train()
    _train(model.to(device), recipe, text.to(device), progress)
    model.cpu()
    cached.parent.mkdir(parents=True, exist_ok=True)
    # A reader, or another process at the same work, must never see half a file.
    handle, temporary = tempfile.mkstemp(dir=cached.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(model.state_dict(), file)
        os.replace(temporary, cached)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return model


def _train(
    model: nn.Module, recipe: LanguageModelRecipe, text: Tensor, progress: Progress | None
) -> None:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    warm_up = max(1, recipe.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1 - step / recipe.steps)
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    model.train()
    for step in range(1, recipe.steps + 1):
        batch = sample_batch(text, recipe.batch_size, recipe.sequence_length, generator)
        with torch.autocast(text.device.type, torch.bfloat16, enabled=recipe.bf16):
            value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, recipe.steps, float(value.detach()))
    optimizer.zero_grad()


def sample_batch(text: Tensor, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """``batch_size`` random windows of ``length + 1`` bytes, int64, on the text's device.

    Args:
        text: ``uint8`` bytes, at least ``length + 1`` of them.
        batch_size: Number of windows.
        length: Bytes to predict in each window.
        generator: A CPU generator: the same draws on every device.
    """
    starts = torch.randint(len(text) - length, (batch_size,), generator=generator)
    return _windows(text, starts, length)


def heldout_windows(text: Tensor, length: int, count: int) -> Tensor:
    """``count`` windows of ``length + 1`` bytes, evenly spaced; fewer where they would overlap."""
    count = max(1, min(count, (len(text) - 1) // length))
    last = len(text) - length - 1
    starts = torch.linspace(0, last, count, dtype=torch.float64).long()
    return _windows(text, starts, length)


def _windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    offsets = torch.arange(length + 1)
    return text[(starts[:, None] + offsets).to(text.device)].long()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte of predicting ``batch[:, 1:]``."""
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def window_losses(
    model: nn.Module, text: Tensor, length: int = 128, count: int = 128, batch_size: int = 64
) -> Tensor:
    """Cross-entropy per byte of each of :func:`heldout_windows`, in evaluation mode."""
    parts = []
    with evaluating(model):
        for batch in heldout_windows(text, length, count).split(batch_size):
            tokens = batch.to(device_of(model))
            logits = model(input_ids=tokens[:, :-1]).logits.float()
            losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            parts.append(losses.mean(1).cpu())
    return torch.cat(parts)


def heldout_loss(
    model: nn.Module, text: Tensor, length: int = 128, count: int = 128, batch_size: int = 64
) -> float:
    """Mean cross-entropy per byte over :func:`heldout_windows`, in evaluation mode."""
    return float(window_losses(model, text, length, count, batch_size).double().mean())


def heldout_logits(
    model: nn.Module, text: Tensor, length: int = 128, count: int = 128, batch_size: int = 64
) -> Tensor:
    """Float32 logits ``(tokens, 256)`` over :func:`heldout_windows`, on the CPU."""
    with evaluating(model):
        parts = [
            model(input_ids=batch[:, :-1].to(device_of(model))).logits.float().flatten(0, 1).cpu()
            for batch in heldout_windows(text, length, count).split(batch_size)
        ]
    return torch.cat(parts)
