"""Forward and backward hooks that show the optimizer each layer's inputs.

For every observed pair the hooks see two tensors: the input ``x`` of its
``input_module`` and the gradient of the output of its ``output_module``.  The way
of the data::

    forward   x enters input_module        -> kept until the pair's output is known
              output leaves output_module  -> a Capture saves x, the output gets a tensor hook
    backward  gradient of that output      -> rows without gradient are masked out,
              last consumer of x done      -> ``consume(x, row_mask, pair_indices)``
    .grad     B's gradient accumulated     -> remembered, see the last rule

Four rules come from how autograd is used in practice:

* Everything is accumulated in *backward*: reentrant checkpointing runs the forward
  twice (once without grad), non-reentrant twice with grad but fires one backward.
* ``x`` is kept by ``save_for_backward`` of a side node, never by a closure, so that
  activation checkpointing still frees it.  The model's own tensors are left alone
  (no view, no in-place restriction, bitwise the same forward).
* Pairs that receive the very same tensor (q, k and v) share one capture.  A row
  counts as soon as one of them has a gradient there.
* Statistics live and die with the gradient they came with.  ``GradScaler`` does not
  call ``step()`` after an overflow; what is zeroed in ``.grad`` before the next backward
  is dropped here as well, and what is accumulated there (micro-batches) adds up here.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cg_optim import host
from cg_optim.capture import Capture
from cg_optim.pairs import LoRAPair
from cg_optim.precision import autocast_off

#: Receives ``x`` as ``(rows, n)``, a boolean ``(rows,)`` mask (True where a gradient
#: arrived) and the indices of the pairs that consumed ``x``.
Consumer = Callable[[Tensor, Tensor, tuple[int, ...]], None]
#: Receives a pair's index, its ``x`` as ``(rows, n)`` and the gradient of its output as
#: ``(rows, m)``, while both are at hand.
GradientConsumer = Callable[[int, Tensor, Tensor], None]
#: Drops what was consumed for a pair since the last update, unless a boolean ``()`` tensor is
#: given and True; returns every pair concerned.
Discarder = Callable[[int, Tensor | None], Collection[int]]


class _TensorHook:
    """Runs when the gradient of one pair's output is known."""

    __slots__ = ("_capture", "_observer", "_pair_index")

    def __init__(self, observer: CurvatureObserver, capture: Capture, pair_index: int) -> None:
        self._observer = weakref.ref(observer)
        self._capture = capture
        self._pair_index = pair_index

    def __call__(self, grad_out: Tensor) -> None:
        observer = self._observer()
        if observer is not None:
            observer._on_gradient(self._capture, self._pair_index, grad_out)


class _AccumulationHook:
    """Runs when the gradient of one pair's B was added to ``B.grad``."""

    __slots__ = ("_observer", "_pair_index")

    def __init__(self, observer: CurvatureObserver | None, pair_index: int) -> None:
        self._observer = weakref.ref(observer) if observer is not None else None
        self._pair_index = pair_index

    def __reduce__(self) -> tuple[type[_AccumulationHook], tuple[None, int]]:
        return _AccumulationHook, (None, self._pair_index)

    def __call__(self, parameter: Tensor) -> None:
        observer = self._observer() if self._observer is not None else None
        if observer is not None and observer.collecting and parameter.grad is not None:
            observer._clock += 1
            observer._accumulated[self._pair_index] = (parameter.grad._version, observer._clock)


class _ModuleHook:
    """A module hook that survives ``copy.deepcopy`` and pickling of the model as a no-op.

    A copied model must not report to the original's observer, nor fail because that
    observer is gone, so a copy holds a dead reference.
    """

    def __init__(self, observer: CurvatureObserver | None, method: str, module_id: int) -> None:
        self._observer = weakref.ref(observer) if observer is not None else None
        self._method = method
        self._module_id = module_id

    def __reduce__(self) -> tuple[type[_ModuleHook], tuple[None, str, int]]:
        return _ModuleHook, (None, self._method, self._module_id)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, *arguments: Any) -> None:
        observer = self._observer() if self._observer is not None else None
        if observer is not None and observer.collecting and torch.is_grad_enabled():
            getattr(observer, self._method)(self._module_id, *arguments)


class CurvatureObserver:
    """Watches the modules of observed pairs and feeds a consumer in backward.

    Args:
        pairs: All pairs of the optimizer; unobserved ones are ignored.
        consumer: Called once per captured input after the last gradient arrived.
        discarder: Called when the gradient that came with a pair's statistics was
            zeroed without a step.

    Attributes:
        collecting: Switch; while False the hooks do nothing.
        gradient_consumer: Also shown the gradients of the outputs, or None.
    """

    def __init__(self, pairs: Sequence[LoRAPair], consumer: Consumer, discarder: Discarder) -> None:
        self.collecting = True
        self.gradient_consumer: GradientConsumer | None = None
        self._consumer = consumer
        self._discarder = discarder
        # For pairs with a backward since the last flush: the version of B.grad right
        # after it, and when that was, counted in gradients accumulated.
        self._accumulated: dict[int, tuple[int, int]] = {}
        self._clock = 0
        # Pairs whose output got a gradient since the last flush.
        self._heard: set[int] = set()
        # Captures made before the last discard are void.
        self._generation = 0
        self._handles: list[RemovableHandle] = []
        # By module and thread: nn.DataParallel runs replicas of one module at once.
        # The version tells whether the layer has written to its input since.
        self._inputs: dict[tuple[int, int], tuple[Tensor, int]] = {}
        # Pairs still to use an input whose module has returned already.
        self._missing: dict[tuple[int, int], set[int]] = {}
        # Autograd has a thread for each device.
        self._lock = threading.RLock()
        self._captures: dict[int, tuple[weakref.ref[Tensor], int, weakref.ref[Capture]]] = {}
        self._pending: dict[int, Capture] = {}
        self.watch(pairs)
        # An optimizer that is dropped takes its hooks along.
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    def watch(self, pairs: Sequence[LoRAPair]) -> None:
        """Put hooks on all pairs; those of before must come first, in the same order.

        What was captured until now stays valid.
        """
        _remove_all(self._handles)
        self._features = {i: p.in_features for i, p in enumerate(pairs)}
        self._factors = {i: p.B for i, p in enumerate(pairs)}
        self._input_of = {i: id(p.input_module) for i, p in enumerate(pairs) if p.observed}
        self._pairs_by_input: dict[int, list[int]] = {}
        self._pairs_by_output: dict[int, list[int]] = {}
        inputs: dict[int, nn.Module] = {}
        outputs: dict[int, nn.Module] = {}
        for index, pair in enumerate(pairs):
            if pair.input_module is None or pair.output_module is None:
                continue
            inputs[id(pair.input_module)] = pair.input_module
            outputs[id(pair.output_module)] = pair.output_module
            self._pairs_by_input.setdefault(id(pair.input_module), []).append(index)
            self._pairs_by_output.setdefault(id(pair.output_module), []).append(index)
            if pair.B.is_leaf and pair.B.requires_grad:
                accumulated = _AccumulationHook(self, index)
                self._handles.append(pair.B.register_post_accumulate_grad_hook(accumulated))
        for module_id, module in inputs.items():
            enter = _ModuleHook(self, "_on_enter", module_id)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        for module_id, module in outputs.items():
            leave = _ModuleHook(self, "_on_output", module_id)
            self._handles.append(module.register_forward_hook(leave))
        self._outlived = {
            id(pair.input_module)
            for pair in pairs
            if pair.input_module is not None
            and all(module is not pair.output_module for module in pair.input_module.modules())
        }
        for module_id, module in inputs.items():
            forget = _ModuleHook(self, "_on_exit", module_id)
            # always_call: an exception in the forward must not leave an activation pinned.
            self._handles.append(module.register_forward_hook(forget, always_call=True))

    @property
    def active(self) -> bool:
        """Whether hooks are registered."""
        return bool(self._handles)

    def remove(self) -> None:
        """Remove every hook and drop what was captured; safe to call twice."""
        _remove_all(self._handles)
        self.discard()

    def discard(self) -> None:
        """Forget captures that wait for gradients (they stay inert if those arrive later)."""
        self._generation += 1
        self._accumulated.clear()
        self._heard.clear()
        self._inputs.clear()
        self._missing.clear()
        self._captures.clear()
        self._pending.clear()

    def flush(self) -> set[int]:
        """Before a step: hand over inputs of which only some consumers got a gradient.

        Returns:
            The observed pairs to whose B a gradient was added since the last flush
            without their hooks seeing one.
        """
        for index in list(self._accumulated):
            if index in self._accumulated and self._factors[index].grad is None:
                self._forget(index)
        bypassed = self._accumulated.keys() - self._heard
        self._accumulated.clear()
        self._heard.clear()
        for capture in list(self._pending.values()):
            self._hand_over(capture)
        self._captures.clear()
        self._inputs.clear()
        self._missing.clear()
        return bypassed

    # ------------------------------------------------------------------ forward

    def _on_enter(self, module_id: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key = module_id, threading.get_ident()
        self._drop_input(key)
        n = self._features[self._pairs_by_input[module_id][0]]
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0:
                if value.shape[-1] == n:
                    self._inputs[key] = value, _version_of(value)
                return

    def _on_exit(self, module_id: int, args: tuple[Any, ...], output: Any) -> None:
        key = module_id, threading.get_ident()
        if module_id in self._outlived and output is not None and key in self._inputs:
            # A's module returns before B's is called.
            self._missing[key] = set(self._pairs_by_input[module_id])
        else:
            self._drop_input(key)

    def _drop_input(self, key: tuple[int, int]) -> None:
        self._inputs.pop(key, None)
        self._missing.pop(key, None)

    def _on_output(self, module_id: int, args: tuple[Any, ...], output: Any) -> None:
        for index in self._pairs_by_output[module_id]:
            key = self._input_of[index], threading.get_ident()
            x, version = self._inputs.get(key, (None, 0))
            if key in self._missing:
                self._missing[key].discard(index)
                if not self._missing[key]:
                    self._drop_input(key)
            if x is None or _version_of(x) != version:
                continue
            if isinstance(output, Tensor) and output.requires_grad:
                self._watch_output(index, x, output)

    def _watch_output(self, index: int, x: Tensor, output: Tensor) -> None:
        if output.ndim > 0 and x.shape[:-1] == output.shape[:-1]:
            capture = self._capture_of(x, index)
            capture.add_pair(index)
            output.register_hook(_TensorHook(self, capture, index))

    def _capture_of(self, x: Tensor, pair_index: int) -> Capture:
        written = _version_of(x)
        known = self._captures.get(id(x))
        if known is not None:
            tensor, version, reference = known
            capture = reference()
            # An id can be reused and a tensor can be written to; both make it another input.
            same = tensor() is x and version == written
            if same and capture is not None and capture.accepts(pair_index):
                return capture
        capture = Capture(x, self._generation)
        self._captures[id(x)] = (weakref.ref(x), written, weakref.ref(capture))
        return capture

    # ----------------------------------------------------------------- backward

    def _on_gradient(self, capture: Capture, pair_index: int, grad_out: Tensor) -> None:
        if not self.collecting or capture.generation != self._generation:
            capture.release()
            return
        with self._lock, torch.no_grad(), autocast_off((grad_out,)):
            if self._drop_if_zeroed(pair_index):
                # Whoever zeroed this gradient hardly left the others.
                for other in list(self._accumulated):
                    self._drop_if_zeroed(other)
            if not capture.started:
                capture.started_at = self._clock
            complete = capture.gradient_arrived(grad_out)
            if not capture.overwritten:
                self._heard.add(pair_index)
            if self.gradient_consumer is not None and capture.started:
                gradients = grad_out.detach().reshape(-1, grad_out.shape[-1])
                self.gradient_consumer(pair_index, capture.rows, gradients)
            if complete:
                self._hand_over(capture)
            elif capture.started:
                self._pending[id(capture)] = capture

    def _drop_if_zeroed(self, pair_index: int) -> bool:
        """Drop what came with the gradient of a pair if that was zeroed since.

        Returns:
            Whether the gradients of other pairs should be looked at as well.
        """
        if pair_index not in self._accumulated:
            return False
        version, accumulated_at = self._accumulated[pair_index]
        grad = self._factors[pair_index].grad
        # zero_grad(set_to_none=False) and unscaling write in place.
        if grad is None or (grad._version != version and host.at_hand(grad)):
            zeroed = grad is None or not bool(grad.any())
            if zeroed:
                self._forget(pair_index)
            return zeroed
        if grad._version == version:
            return False
        self._forget(pair_index, unless=grad.any())
        self._accumulated[pair_index] = grad._version, accumulated_at
        # DistributedDataParallel(gradient_as_bucket_view=True): all gradients of a bucket
        # share one version, so every micro-batch comes here, for each pair.
        return not grad._is_view()

    def _forget(self, pair_index: int, unless: Tensor | None = None) -> None:
        """Drop what was captured and consumed for a pair since the last flush.

        Args:
            pair_index: The pair.
            unless: Boolean ``()`` tensor nobody has looked at: True keeps everything.
        """
        _, accumulated_at = self._accumulated.pop(pair_index)
        for key, capture in list(self._pending.items()):
            # A capture started since then belongs to the backward now running.
            if pair_index in capture.pair_indices and capture.started_at < accumulated_at:
                if unless is None:
                    capture.release()
                    del self._pending[key]
                else:
                    capture.mask_unless(unless)
        concerned = self._discarder(pair_index, unless)
        if unless is None:
            for index in concerned:
                self._accumulated.pop(index, None)

    def _hand_over(self, capture: Capture) -> None:
        self._pending.pop(id(capture), None)
        rows, mask = capture.take()
        self._consumer(rows, mask, tuple(capture.pair_indices))


def _remove_all(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _version_of(x: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not count."""
    return 0 if x.is_inference() else x._version
