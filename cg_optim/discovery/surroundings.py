"""What is around two factors in a hand-written layer: the linear layer they adapt.

Its sizes tell which of the stored matrices takes the input, and whether the layer's own
input and output are the x and y of the pair.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import ParametrizationList

from cg_optim.discovery.findings import Site, sizes_of


@dataclass(frozen=True)
class Surroundings:
    """The linear layer that a pair belongs to, as far as it can be seen.

    Attributes:
        base: The layer that is adapted: the module itself if it has a weight, else its
            only child that computes something, or the layer whose weight the module
            parametrizes; ``None`` if there is none or more than one.
        sizes: Input and output size of the module, if it is one layer from x to y.
        siblings: Sizes of the linear layers beside a module that holds factors only.
        in_weight: Whether the product is added to the weight by a parametrization.
    """

    base: nn.Module | None = None
    sizes: tuple[int, int] | None = None
    siblings: frozenset[tuple[int, int]] = frozenset()
    in_weight: bool = False

    @staticmethod
    def of(site: Site, factors: Set[str]) -> Surroundings:
        """Look around a module whose attributes named in ``factors`` hold A and B."""
        parametrized = _parametrized_layer(site)
        if parametrized is not None:
            # Other layers (Conv1D) may store their weight the other way round.
            sizes = sizes_of(parametrized) if isinstance(parametrized, nn.Linear) else None
            return Surroundings(parametrized, sizes, in_weight=True)
        module = site.module
        children = [child for name, child in module.named_children() if name not in factors]
        bases = [child for child in children if not _is_inert(child)]
        if module._parameters.get("weight") is not None:
            bases.append(module)
        if len(bases) == 1:
            return Surroundings(bases[0], sizes_of(module) or _linear_sizes(bases[0]))
        # Several layers, an attention block say: which of them x goes to is unknown.
        siblings = frozenset() if bases else _sibling_sizes(site)
        return Surroundings(None, sizes_of(module), siblings)

    def fit(self, n: int, m: int) -> bool:
        """Whether the module is known to take n numbers and to return m."""
        return self.sizes == (n, m) or (self.sizes is None and (n, m) in self.siblings)

    @property
    def one_layer(self) -> bool:
        """Whether the module is one linear layer with its adapter, or the adapter alone."""
        return self.sizes is not None or bool(self.siblings)


def _parametrized_layer(site: Site) -> nn.Module | None:
    """The layer whose weight this module parametrizes (``nn.utils.parametrize``)."""
    parent = site.parent
    if parent is None or not isinstance(parent.module, ParametrizationList):
        return None
    container = parent.parent
    layer = container.parent if container is not None else None
    return layer.module if layer is not None else None


def _is_inert(module: nn.Module) -> bool:
    """Whether a child leaves x alone but for dropout."""
    leaves = [leaf for leaf in module.modules() if not leaf._modules]
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return all(isinstance(leaf, (nn.Identity, _DropoutNd, *containers)) for leaf in leaves)


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Declared sizes, else those of a two-dimensional weight stored as ``(m, n)``."""
    declared = sizes_of(module)
    weight = module._parameters.get("weight")
    if declared is not None or weight is None or weight.ndim != 2:
        return declared
    return (weight.shape[1], weight.shape[0]) if not looks_up_rows(module) else None


def looks_up_rows(module: nn.Module | None) -> bool:
    """Whether a module is an embedding: its input are row numbers, not vectors."""
    return isinstance(module, nn.Embedding) or hasattr(module, "num_embeddings")


def _sibling_sizes(site: Site) -> frozenset[tuple[int, int]]:
    parent = site.parent
    if parent is None:
        return frozenset()
    layers = [parent.module, *parent.module.children()]
    return frozenset(
        sizes
        for layer in layers
        if layer is not site.module and (sizes := _linear_sizes(layer)) is not None
    )
