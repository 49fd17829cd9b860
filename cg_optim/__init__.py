"""Curvature-guided optimizer for LoRA: ``CGLoRAOptimizer`` in place of ``AdamW``."""

from cg_optim import errors
from cg_optim._version import __version__
from cg_optim.discovery import Discovery, find_lora_pairs
from cg_optim.initialisation import curvature_init_
from cg_optim.learning_rate import default_learning_rate
from cg_optim.optimizer import CGLoRAOptimizer
from cg_optim.pairs import LoRAPair

__all__ = [
    "CGLoRAOptimizer",
    "Discovery",
    "LoRAPair",
    "__version__",
    "curvature_init_",
    "default_learning_rate",
    "errors",
    "find_lora_pairs",
]
