"""Which texts say nearly the same, so that they can be kept on one side of a split."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

SIMILARITY = 0.7
"""Share of words in common (Jaccard) from which two texts count as near-duplicates."""


def normalised(text: str) -> str:
    """Lower-case words and numbers of ``text``, one space between them."""
    return " ".join(re.findall(r"[a-z]+|\d+", text.lower()))


def similarities(texts: Sequence[str]) -> csr_array:
    """Jaccard similarity of the word sets of all pairs of texts, zeros left out."""
    sets = [sorted(set(normalised(text).split())) for text in texts]
    vocabulary = {word: place for place, word in enumerate(sorted(set().union(*sets)))}
    columns = [vocabulary[word] for words in sets for word in words]
    starts = np.cumsum([0, *(len(words) for words in sets)])
    ones = np.ones(len(columns), dtype=np.float32)
    presence = csr_array((ones, columns, starts), shape=(len(texts), max(1, len(vocabulary))))
    shared = (presence @ presence.T).tocoo()
    sizes = np.diff(starts)
    first, second = shared.coords
    jaccard = shared.data / (sizes[first] + sizes[second] - shared.data)
    return csr_array((jaccard, (first, second)), shape=shared.shape)


def groups(texts: Sequence[str], similarity: float = SIMILARITY) -> list[int]:
    """Number of the group of every text; near-duplicates, also via others, share a group.

    Args:
        texts: The texts.
        similarity: Jaccard similarity of the word sets from which two texts are linked.
    """
    if not texts:
        return []
    linked = similarities(texts)
    linked.data = (linked.data >= similarity).astype(np.float32)
    linked.eliminate_zeros()
    return connected_components(linked, directed=False)[1].tolist()
