"""Which adapters may be initialised: untouched ones of a rank that their layer has."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from cg_optim.errors import InitialisationError
from cg_optim.pairs import LoRAPair


def untouched(pair: LoRAPair) -> Tensor:
    """Boolean ``()``: ``B`` is zero, so that ``A`` can change without changing the function."""
    return ~pair.B.detach().any()


def is_fresh(pair: LoRAPair) -> bool:
    """Whether ``B`` is zero; looks at it."""
    return bool(untouched(pair))


def check_rank(pair: LoRAPair) -> None:
    """Refuse a rank above that of the layer's weight.

    Raises:
        InitialisationError: With the largest rank that is possible.
    """
    largest = min(pair.in_features, pair.out_features)
    if pair.rank > largest:
        raise InitialisationError(
            f"{pair.name}: rank {pair.rank} is too large for a layer of {pair.in_features} inputs "
            f"and {pair.out_features} outputs; use at most {largest} there (PEFT: rank_pattern)"
        )


def check_fresh(pairs: Iterable[LoRAPair]) -> None:
    """Refuse adapters that an initialisation would damage.

    Raises:
        InitialisationError: If a rank is too large or ``B`` is not zero.
    """
    for pair in pairs:
        check_rank(pair)
        if not is_fresh(pair):
            raise InitialisationError(
                f"{pair.name}: its B is not zero, so initialising it would throw away what it "
                "holds; do it before training (PEFT: with init_lora_weights=True)"
            )
