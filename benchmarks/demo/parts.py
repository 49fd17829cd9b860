"""The two tasks of the demo, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import encoder, language_model, stdlib_texts
from ..adapters import add_lora
from ..datasets import LabelledTexts, read_labelled_tsv, split_rows
from ..errors import DataFileError
from .settings import ClassifierSettings, LanguageModelSettings

FEWEST_ROWS = 20
"""Rows a DATA file needs, so that both sides of the split hold something."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out measures.

    Attributes:
        losses: Cross-entropy of every held-out text or window, in nats.
        accuracy: Share of right answers, where there are labels.
    """

    losses: Tensor
    accuracy: float | None = None

    @property
    def loss(self) -> float:
        """Mean of the losses."""
        return float(self.losses.double().mean())


class Part(ABC):
    """A fine-tuning task: the same model, data and order for every optimizer.

    Attributes:
        key: Name in file names and JSON.
        title: Name for people.
        unit: What the held-out loss is a mean over.
        facts: What the task is made of, for people.
    """

    key: str
    title: str
    unit: str
    facts: str
    settings: ClassifierSettings | LanguageModelSettings

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """The pretrained model with fresh adapters drawn from ``seed``."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Any]:
        """Endless training batches in the order of ``seed``."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean training loss of a batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Evaluation:
        """The model on the held-out data."""


class ClassifierPart(Part):
    """MiniLM-L6 learns to tell texts apart: docstrings by module, or the user's file."""

    key = "classifier"
    unit = "text"

    def __init__(self, settings: ClassifierSettings, data: Path | None = None) -> None:
        self.settings = settings
        if data is None:
            splits = stdlib_texts.docstring_classification()
            train, heldout = splits.train, splits.heldout
            self.title = "MiniLM-L6: docstring -> module of the standard library"
        else:
            train, heldout = user_data(data)
            self.title = f"MiniLM-L6 on {data.name}"
        if len(heldout) > settings.heldout_texts:
            heldout, _ = split_rows(heldout, settings.heldout_texts / len(heldout), seed=0)
        self.facts = (
            f"{len(train.label_names)} classes, {len(train)} training and {len(heldout)} "
            f"held-out texts, batch {settings.batch_size}, {settings.steps} steps"
        )
        self._classes = len(train.label_names)
        tokenizer = encoder.load_tokenizer()
        length = settings.max_length if train.text_b is None else settings.max_length_pair
        self._train = encoder.tokenize(tokenizer, train.text_a, train.text_b, length)
        self._heldout = encoder.tokenize(tokenizer, heldout.text_a, heldout.text_b, length)
        self._train_labels = torch.tensor(train.labels)
        self._heldout_labels = torch.tensor(heldout.labels)

    def model(self, seed: int) -> nn.Module:
        pretrained = encoder.load_encoder() if self.settings.pretrained else _tiny_encoder()
        classifier = encoder.SentenceClassifier(pretrained, self._classes, seed)
        return add_lora(classifier, self.settings.rank, self.settings.alpha, seed)

    def batches(self, seed: int) -> Iterator[tuple[encoder.TokenBatch, Tensor]]:
        for rows in encoder.shuffled_indices(len(self._train), self.settings.batch_size, seed):
            yield self._train.batch(rows), self._train_labels[rows]

    def loss(self, model: nn.Module, batch: tuple[encoder.TokenBatch, Tensor]) -> Tensor:
        texts, labels = batch
        return F.cross_entropy(model(texts), labels)

    def evaluate(self, model: nn.Module) -> Evaluation:
        logits = encoder.classifier_logits(model, self._heldout)
        return Evaluation(
            F.cross_entropy(logits, self._heldout_labels, reduction="none"),
            float((logits.argmax(-1) == self._heldout_labels).float().mean()),
        )


class LanguageModelPart(Part):
    """A byte-level Llama pretrained on English moves to source code."""

    key = "language_model"
    title = "Byte-level Llama: English -> Python source code"
    unit = "byte"

    def __init__(
        self,
        settings: LanguageModelSettings,
        cache: Path,
        progress: language_model.Progress | None = None,
    ) -> None:
        self.settings = settings
        base = language_model.pretrain(
            settings.base, stdlib_texts.english_text().train, cache, progress
        )
        self._base = {name: value.clone() for name, value in base.state_dict().items()}
        text = stdlib_texts.source_code_text()
        # The learning rates were chosen on the first half.
        self._train, self._heldout = text.train, text.heldout[len(text.heldout) // 2 :]
        parameters = sum(p.numel() for p in base.parameters())
        self.facts = (
            f"{parameters / 1e6:.1f} M parameters, pretrained for {settings.base.steps} steps, "
            f"batch {settings.batch_size} x {settings.length} bytes, {settings.steps} steps"
        )

    def model(self, seed: int) -> nn.Module:
        base = language_model.build_model(self.settings.base)
        base.load_state_dict(self._base)
        return add_lora(base, self.settings.rank, self.settings.alpha, seed)

    def batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield language_model.sample_batch(
                self._train, self.settings.batch_size, self.settings.length, generator
            )

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return language_model.loss(model, batch)

    def evaluate(self, model: nn.Module) -> Evaluation:
        settings = self.settings
        return Evaluation(
            language_model.window_losses(
                model, self._heldout, settings.length, settings.heldout_windows
            )
        )


def user_data(path: Path) -> tuple[LabelledTexts, LabelledTexts]:
    """Training and held-out rows of a user's file, 80 : 20, the same ones every time.

    Raises:
        DataFileError: If the file is missing, malformed, or has too few rows.
    """
    texts = read_labelled_tsv(path)
    if len(texts) < FEWEST_ROWS:
        raise DataFileError(path, f"has {len(texts)} rows; at least {FEWEST_ROWS} are needed")
    train, heldout = split_rows(texts, 0.8, seed=0)
    if not len(heldout):
        raise DataFileError(path, "the rows are too much alike to hold any of them out")
    return train, heldout


def _tiny_encoder() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertModel(config, add_pooling_layer=False)
