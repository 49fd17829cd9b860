"""What a LoRA pair is: the two factors, and where their curvature can be seen.

A pair contributes ``scaling * B @ A @ x`` to a layer's output, with ``A`` of shape
``(r, n)`` and ``B`` of shape ``(m, r)``.  Some code stores the transposed matrices
and computes ``x @ A @ B``; :attr:`LoRAPair.transposed` marks those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

from torch import Tensor, nn

from cg_optim.errors import PairError


@dataclass(frozen=True, eq=False)
class LoRAPair:
    """One LoRA adapter of one layer.

    Declare a pair by hand when :func:`cg_optim.find_lora_pairs` does not know the
    model's layout, and hand it to ``CGLoRAOptimizer(model, pairs=[...])``.

    Attributes:
        A: Down projection, a parameter of shape ``(r, n)``; ``(n, r)`` when
            ``transposed``.
        B: Up projection, a parameter of shape ``(m, r)``; ``(r, m)`` when
            ``transposed``.
        name: Unique, human-readable name, e.g. ``"model.layers.0.q_proj"``.
        scaling: The factor ``s`` in ``y = W x + s B A x`` (dimensionless).
        input_module: Module whose first tensor argument is the layer's input ``x``
            (last dimension ``n``).  Pairs whose input modules receive the same tensor
            share one input curvature.  ``None``: the curvature cannot be observed and
            a rule that needs only gradients and weights is used.
        output_module: Module whose output's gradient is, up to a factor, the gradient
            of the layer's output (last dimension ``m``), usually the module holding
            ``B``.  Rows in which that gradient is exactly zero are padding.
        kind: Where the pair comes from, for ``summary()``; e.g. ``"peft.Linear"``.
        transposed: Whether ``A`` and ``B`` are stored as ``(n, r)`` and ``(r, m)``.
        note: Why the pair cannot be observed, for ``summary()``; else empty.
        experts: How many pairs of a mixture of experts are kept in the two parameters, each
            stepped as a pair of its own: ``A`` then has shape ``(experts * r, n)`` with
            the rows of one expert together, ``B`` has ``(m, r * experts)`` with the columns
            of expert ``e`` at ``e::experts``, as PEFT's ``target_parameters`` keeps them.

    Raises:
        PairError: If A and B are not two different matrices of one floating dtype
            and rank, if exactly one module is given, if ``scaling`` is not a finite
            non-zero number, or if ``experts`` does not fit.
    """

    A: nn.Parameter
    B: nn.Parameter
    name: str = "pair"
    scaling: float = 1.0
    input_module: nn.Module | None = None
    output_module: nn.Module | None = None
    kind: str = "declared"
    transposed: bool = False
    note: str = ""
    experts: int = 1

    def __post_init__(self) -> None:
        for letter, factor in (("A", self.A), ("B", self.B)):
            if not isinstance(factor, Tensor):
                raise PairError(
                    f"{self.name}: {letter} is a {type(factor).__name__}; "
                    "pass the nn.Parameter itself"
                )
            if not factor.is_floating_point():
                raise PairError(
                    f"{self.name}: {letter} has dtype {factor.dtype}; "
                    "LoRA factors must be floating point"
                )
            if factor.ndim < 2:
                raise PairError(
                    f"{self.name}: {letter} has shape {tuple(factor.shape)}; expected a matrix"
                )
        if self.A is self.B:
            raise PairError(f"{self.name}: A and B are the same parameter; pass two different ones")
        self._check_experts()
        rank_of_a, _ = self._shape_of(self.A)
        _, rank_of_b = self._shape_of(self.B)
        if rank_of_a != rank_of_b:
            raise PairError(
                f"{self.name}: A {tuple(self.A.shape)} has rank {rank_of_a} but B "
                f"{tuple(self.B.shape)} has rank {rank_of_b}; expected A (r, n) and B (m, r)"
                + ("" if self.transposed else ", or transposed=True for A (n, r) and B (r, m)")
            )
        if (self.input_module is None) != (self.output_module is None):
            missing = "input_module" if self.input_module is None else "output_module"
            raise PairError(
                f"{self.name}: {missing} is missing; give both modules to observe curvature, "
                "or neither"
            )
        scaling: object = self.scaling
        number = isinstance(scaling, Real) and not isinstance(scaling, bool)
        if not number or not math.isfinite(self.scaling) or self.scaling == 0:
            raise PairError(
                f"{self.name}: scaling is {self.scaling!r}; expected a finite number other than 0"
            )

    def _check_experts(self) -> None:
        experts: object = self.experts
        if not isinstance(experts, int) or isinstance(experts, bool) or experts < 1:
            raise PairError(f"{self.name}: experts is {experts!r}; expected a positive integer")
        if experts == 1:
            return
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] % experts:
            raise PairError(
                f"{self.name}: A {tuple(self.A.shape)} and B {tuple(self.B.shape)} do not hold "
                f"{experts} experts; expected A (experts * r, n) and B (m, r * experts)"
            )
        if self.transposed or self.input_module is not None:
            raise PairError(
                f"{self.name}: a pair of several experts can be neither transposed nor observed; "
                "leave out transposed, input_module and output_module"
            )

    def _shape_of(self, factor: Tensor) -> tuple[int, int]:
        rows, columns = factor.shape[0], math.prod(factor.shape[1:])
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def rank(self) -> int:
        """The rank ``r``, of one expert if there are several."""
        return self._shape_of(self.A)[0] // self.experts

    @property
    def in_features(self) -> int:
        """The input size ``n``."""
        return self._shape_of(self.A)[1]

    @property
    def out_features(self) -> int:
        """The output size ``m``."""
        return self._shape_of(self.B)[0]

    @property
    def observed(self) -> bool:
        """Whether hooks can see this pair's input and output gradient."""
        return self.input_module is not None

    def as_matrices(self, a_like: Tensor, b_like: Tensor) -> tuple[Tensor, Tensor]:
        """View tensors shaped like A and B (values, gradients) as ``(r, n)`` and ``(m, r)``.

        Convolution kernels are flattened; the results are views wherever the memory
        layout allows it.  Several experts come as stacks, ``(experts, r, n)`` and
        ``(experts, m, r)``.
        """
        if self.experts > 1:
            of_a = a_like.unflatten(0, (self.experts, self.rank))
            return of_a, b_like.unflatten(1, (self.rank, self.experts)).permute(2, 0, 1)
        a_matrix = a_like if a_like.ndim == 2 else a_like.flatten(1)
        b_matrix = b_like if b_like.ndim == 2 else b_like.flatten(1)
        return (a_matrix.t(), b_matrix.t()) if self.transposed else (a_matrix, b_matrix)


def factor_ids(pairs: Iterable[LoRAPair]) -> set[int]:
    """The ``id`` of every factor of the pairs."""
    return {id(factor) for pair in pairs for factor in (pair.A, pair.B)}


def check_unique(pairs: list[LoRAPair]) -> None:
    """Refuse pairs that share a parameter or a name.

    Raises:
        PairError: If a parameter occurs in two pairs or a name occurs twice.
    """
    owner: dict[int, str] = {}
    names: set[str] = set()
    for pair in pairs:
        if pair.name in names:
            raise PairError(f"two pairs are named {pair.name!r}; give each pair its own name")
        names.add(pair.name)
        for letter, factor in (("A", pair.A), ("B", pair.B)):
            if id(factor) in owner:
                raise PairError(
                    f"{letter} of {pair.name!r} already belongs to {owner[id(factor)]!r}; "
                    "a parameter can be in one pair only"
                )
            owner[id(factor)] = pair.name
