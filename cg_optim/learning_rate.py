"""The learning rate to start from where none is given.

AdamW's best rate for LoRA falls with the width of the model and with the size of the
adapter: every entry of ``A`` and ``B`` moves by about the rate, and the change of the
outputs that this makes adds up over the inputs and the rank.  What was measured for this
optimizer (``benchmarks/EXPERIMENTS.md``, "A default rate that knows the model") is well
described by a rate in proportion to ``1 / n`` and to ``(s sqrt(r))^(-2/3)``, for inputs of
size ``n``, a scaling ``s`` and a rank ``r``.  Below an ``n`` of 128 it stopped to rise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from cg_optim.pairs import LoRAPair

#: Inputs narrower than this are taken to be this wide.
NARROWEST = 128
#: Times ``n (s sqrt(r))^(2/3)``, the rate that suits a few dozen to a few hundred steps.
SCALE = 5.0
#: The rate where there is no pair to go by, ``torch.optim.AdamW``'s.
WITHOUT_PAIRS = 1e-3


def suggested_rate(in_features: int, rank: int, scaling: float) -> float:
    """The rate that suits one pair.

    Args:
        in_features: Input size ``n`` of the layer.
        rank: Rank ``r`` of the adapter.
        scaling: The factor ``s`` in ``y = W x + s B A x``.
    """
    return SCALE / max(in_features, NARROWEST) / math.pow(abs(scaling) * math.sqrt(rank), 2.0 / 3.0)


def two_digits(rate: float) -> float:
    """Rounded: it is a rule of thumb, and easy to repeat and to write down."""
    return float(f"{rate:.2g}")


def default_learning_rate(pairs: Iterable[LoRAPair]) -> float:
    """The learning rate of a model, the median over its pairs, to two significant digits.

    Args:
        pairs: The model's pairs, e.g. ``find_lora_pairs(model).pairs``.

    Returns:
        The rate; AdamW's ``1e-3`` without pairs.
    """
    rates = [suggested_rate(pair.in_features, pair.rank, pair.scaling) for pair in pairs]
    return two_digits(statistics.median(rates)) if rates else WITHOUT_PAIRS
