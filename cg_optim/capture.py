"""One layer input between forward and backward, kept the way autograd keeps activations.

Used by :mod:`cg_optim.hooks`; separate because everything about memory is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Save(torch.autograd.Function):
    """A node whose only purpose is to keep a tensor the way autograd keeps activations."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None]:
        return None, None


class Capture:
    """One input tensor in one forward pass and the pairs that consume it."""

    __slots__ = (
        "__weakref__",
        "_mask",
        "_saved",
        "_waiting",
        "_x",
        "generation",
        "overwritten",
        "pair_indices",
        "started_at",
    )

    def __init__(self, x: Tensor, generation: int) -> None:
        anchor = torch.empty(0, requires_grad=True)
        save: Any = _Save.apply  # torch leaves it without types
        # Autograd refuses to save inference tensors (frozen features computed earlier).
        kept = x.clone() if x.is_inference() else x.detach()
        # The output and not its grad_fn: up to torch 2.11 a node dies with its output.
        self._saved: Any = save(anchor, kept)
        self._x: Tensor | None = None
        self._mask: Tensor | None = None
        self._waiting = 0
        self.generation = generation
        self.started_at = 0
        #: Whether the model has written to the input since, so that it is lost.
        self.overwritten = False
        self.pair_indices: list[int] = []

    @property
    def started(self) -> bool:
        """Whether a gradient arrived that was not handed over yet."""
        return self._x is not None

    @property
    def rows(self) -> Tensor:
        """The input as ``(rows, n)``, between the first gradient and :meth:`take`."""
        assert self._x is not None
        # One row for an input without batch dimension.
        return self._x.reshape(-1, self._x.shape[-1])

    def accepts(self, pair_index: int) -> bool:
        """A pair joins once per forward; a second use of the same input counts anew."""
        untouched = self._x is None and self._saved is not None
        return untouched and pair_index not in self.pair_indices

    def add_pair(self, pair_index: int) -> None:
        """One more gradient to wait for."""
        self.pair_indices.append(pair_index)
        self._waiting += 1

    def gradient_arrived(self, grad_out: Tensor) -> bool:
        """Note the rows of ``(..., m)`` that have a gradient; True when no pair is missing."""
        if self._x is None:
            if self._saved is None:  # a second backward through a retained graph
                return False
            try:
                # Reading saved tensors is what triggers recomputation under checkpointing.
                (self._x,) = self._saved.grad_fn.saved_tensors
            except RuntimeError as error:
                if "inplace operation" not in str(error):
                    raise
                # The model itself may have no need of what it wrote over (dropout keeps
                # its mask only); then its backward must not fail because of this capture.
                self.overwritten = True
                self.release()
                return False
        has_gradient = grad_out.detach().any(-1).reshape(-1)
        self._mask = has_gradient if self._mask is None else self._mask | has_gradient
        self._waiting -= 1
        return self._waiting == 0

    def mask_unless(self, kept: Tensor) -> None:
        """Mask all rows out where a boolean ``()`` tensor is False."""
        if self._mask is not None:
            self._mask = self._mask & kept.to(self._mask.device)

    def take(self) -> tuple[Tensor, Tensor]:
        """The rows ``(rows, n)`` and their mask ``(rows,)``, released for good.

        Without the release every input would stay alive until the caller drops the
        loss, that is, through the whole next forward pass.
        """
        assert self._mask is not None
        rows, mask = self.rows, self._mask
        self.release()
        return rows, mask

    def release(self) -> None:
        """Let go of the input; gradients that arrive later are ignored."""
        self._x = self._mask = self._saved = None
