"""Learning rates and budgets of the demo."""

from __future__ import annotations

from dataclasses import dataclass

from ..language_model import LanguageModelRecipe

ADAMW_LR_CLASSIFIER = 3e-3
ADAMW_LR_LANGUAGE_MODEL = 1e-2
CG_LR_CLASSIFIER = 3e-3
CG_LR_LANGUAGE_MODEL = 1e-2


@dataclass(frozen=True)
class ClassifierSettings:
    """Part 1: a pretrained sentence encoder learns to classify texts.

    Attributes:
        learning_rates: One per optimizer.
        steps, batch_size: The budget.
        evaluations: Held-out evaluations after the first, evenly spaced.
        rank, alpha: LoRA, on all linear layers of the encoder.
        max_length, max_length_pair: Tokens after which a text, or a pair, is cut.
        heldout_texts: Most texts to evaluate on.
        pretrained: ``False`` takes a tiny encoder with random weights (tests).
    """

    learning_rates: dict[str, float]
    steps: int = 96
    batch_size: int = 16
    evaluations: int = 8
    rank: int = 16
    alpha: int = 32
    max_length: int = 48
    max_length_pair: int = 64
    heldout_texts: int = 512
    pretrained: bool = True


@dataclass(frozen=True)
class LanguageModelSettings:
    """Part 2: a byte-level language model of English moves to source code.

    Attributes:
        learning_rates: One per optimizer.
        base: How the base model is made.
        steps, batch_size, length: The budget; ``length`` in bytes.
        evaluations: Held-out evaluations after the first, evenly spaced.
        rank, alpha: LoRA, on all linear layers.
        heldout_windows: Windows of ``length`` bytes to evaluate on.
    """

    learning_rates: dict[str, float]
    base: LanguageModelRecipe
    steps: int = 120
    batch_size: int = 16
    length: int = 128
    evaluations: int = 20
    rank: int = 16
    alpha: int = 32
    heldout_windows: int = 128


@dataclass(frozen=True)
class Preset:
    """Both parts."""

    classifier: ClassifierSettings
    language_model: LanguageModelSettings


_CLASSIFIER_RATES = {"AdamW": ADAMW_LR_CLASSIFIER, "CGLoRAOptimizer": CG_LR_CLASSIFIER}
_LANGUAGE_MODEL_RATES = {
    "AdamW": ADAMW_LR_LANGUAGE_MODEL,
    "CGLoRAOptimizer": CG_LR_LANGUAGE_MODEL,
}

PRESETS = {
    "demo": Preset(
        ClassifierSettings(_CLASSIFIER_RATES),
        LanguageModelSettings(
            _LANGUAGE_MODEL_RATES,
            LanguageModelRecipe("english", batch_size=8, steps=600, learning_rate=2e-3),
        ),
    ),
    # For tests: everything runs, nothing is learned.
    "tiny": Preset(
        ClassifierSettings(
            _CLASSIFIER_RATES,
            steps=4,
            batch_size=4,
            evaluations=4,
            rank=2,
            alpha=4,
            heldout_texts=24,
            pretrained=False,
        ),
        LanguageModelSettings(
            _LANGUAGE_MODEL_RATES,
            LanguageModelRecipe(
                "english",
                hidden_size=32,
                layers=1,
                heads=2,
                intermediate_size=48,
                sequence_length=32,
                batch_size=4,
                steps=4,
            ),
            steps=4,
            batch_size=4,
            length=32,
            evaluations=4,
            rank=2,
            alpha=4,
            heldout_windows=8,
        ),
    ),
}
