"""What the hooks collect: the right rows, once, whatever way the model is run."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cg_optim import CGLoRAOptimizer, LoRAPair
from cg_optim.errors import UnobservedPairWarning
from tests.models import (
    LoRALinear,
    assert_close,
    assert_equal,
    batch,
    loss_of,
    parameters_of,
    snapshot,
    tagger,
    train,
)

N, M = 6, 5


def layer(seed: int = 0, **arguments: Any) -> LoRALinear:
    torch.manual_seed(seed)
    return LoRALinear(N, M, **arguments)


def wrapped(*layers: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(layers)


def gram(optimizer: CGLoRAOptimizer, of: LoRALinear) -> Tensor:
    return optimizer.state[of.lora_A.weight]["input_gram"]


def mean_gram(*inputs: Tensor) -> Tensor:
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
    return rows.T @ rows / len(rows)


# ------------------------------------------------------------------ which rows count


@pytest.mark.parametrize("shape", [(N,), (7, N), (2, 3, N), (2, 1, 3, N)])
def test_the_mean_over_all_rows_of_any_shape(shape: tuple[int, ...]) -> None:
    one = layer()
    optimizer = CGLoRAOptimizer(wrapped(one))
    x = torch.randn(shape)
    one(x).square().sum().backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x))


def test_an_input_given_by_name() -> None:
    one = layer()
    optimizer = CGLoRAOptimizer(wrapped(one))
    x = torch.randn(4, N)
    one(x=x).square().sum().backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x))


def test_rows_without_gradient_are_left_out() -> None:
    one = layer()
    optimizer = CGLoRAOptimizer(wrapped(one))
    x = torch.randn(4, 3, N)
    one(x)[:, :2].square().sum().backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x[:, :2]))


def test_a_module_used_twice_adds_up() -> None:
    one = layer()
    optimizer = CGLoRAOptimizer(wrapped(one))
    x, y = torch.randn(4, N), torch.randn(3, N)
    (one(x).square().sum() + one(y).square().sum()).backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x, y))


def test_the_same_input_used_twice_by_one_module_counts_twice() -> None:
    one = layer(p=0.5)
    optimizer = CGLoRAOptimizer(wrapped(one))
    x, y = torch.randn(4, N), torch.randn(3, N)
    (one(x).square().sum() + one(x).sin().sum() + one(y).square().sum()).backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x, x, y))


def test_a_model_may_overwrite_an_input_that_its_own_backward_does_not_need() -> None:
    one = layer(p=0.5)  # dropout: A sees a copy of x, and autograd keeps no x at all
    optimizer = CGLoRAOptimizer(wrapped(one))
    before = one.lora_B.weight.detach().clone()
    x = torch.randn(7, N)
    y = one(x)
    x.add_(1)
    y.square().sum().backward()
    with pytest.warns(UnobservedPairWarning, match="overwritten"):
        optimizer.step()
    assert not torch.equal(one.lora_B.weight, before)
    assert gram(optimizer, one).count_nonzero() == 0


def test_an_input_that_its_layer_overwrites_is_not_taken_for_the_input() -> None:
    class Overwriting(LoRALinear):
        def forward(self, x: Tensor) -> Tensor:
            low = self.lora_A(x * 1.0)
            base = self.base_layer(x)
            x.mul_(3.0)
            return base + self.lora_B(low)

    torch.manual_seed(0)
    one = Overwriting(N, M)
    optimizer = CGLoRAOptimizer(wrapped(one))
    one(torch.randn(7, N)).square().sum().backward()
    with pytest.warns(UnobservedPairWarning, match="overwritten"):
        optimizer.step()
    assert gram(optimizer, one).count_nonzero() == 0


def test_an_input_written_to_between_two_layers_is_two_inputs() -> None:
    one, two = layer(), layer(1)
    optimizer = CGLoRAOptimizer(wrapped(one, two), curvature="dense")
    x = torch.randn(4, N)
    before = x.clone()
    one(before).square().sum().backward()
    before.mul_(3.0)
    two(before).square().sum().backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x))
    assert_close(gram(optimizer, two), mean_gram(3 * x))


def test_an_input_written_to_before_backward_is_lost_for_the_first_layer_only() -> None:
    one, two = layer(p=0.5), layer(1, p=0.5)
    optimizer = CGLoRAOptimizer(wrapped(one, two), curvature="dense")
    x = torch.randn(4, N)
    written = x.clone()
    first = one(written)
    written.mul_(3.0)
    (first.square().sum() + two(written).square().sum()).backward()
    with pytest.warns(UnobservedPairWarning, match="overwritten"):
        optimizer.step()
    assert gram(optimizer, one).count_nonzero() == 0
    assert_close(gram(optimizer, two), mean_gram(3 * x))


def test_a_tensor_in_the_place_of_a_dead_one_is_another_input() -> None:
    """Python gives the ``id`` of an input that nobody holds any more to the next tensor."""
    one, two = layer(p=0.5), layer(1, p=0.5)  # dropout: autograd does not hold x itself
    optimizer = CGLoRAOptimizer(wrapped(one, two), curvature="dense")
    first, second = torch.randn(4, N), torch.randn(4, N)
    x = first.clone()
    place, out = id(x), one(x)
    del x
    others = []
    for _ in range(1000):
        y = second.clone()
        if id(y) == place:
            break
        others.append(y)
    else:
        pytest.skip("no tensor took the place")
    (out.square().sum() + two(y).square().sum()).backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(first))
    assert_close(gram(optimizer, two), mean_gram(second))


def test_a_pair_whose_modules_are_not_nested() -> None:
    """A's own input and B's own output, as home-made layers and declared pairs have it."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(N, 2, bias=False), nn.Linear(2, M, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(functional.dropout(self.first(x * 1.0), 0.1))

    torch.manual_seed(0)
    branch = Branch()
    pair = LoRAPair(
        branch.first.weight,
        branch.second.weight,
        input_module=branch.first,
        output_module=branch.second,
    )
    optimizer = CGLoRAOptimizer(branch, pairs=[pair])
    x, y = torch.randn(4, N), torch.randn(2, 3, N)
    (branch(x).square().sum() + branch(y).square().sum()).backward()
    branch.first(torch.randn(3, N))  # B is not called with it
    optimizer.step()
    optimizer.zero_grad()
    assert_close(optimizer.state[branch.first.weight]["input_gram"], mean_gram(x, y))
    array = np.ones((3, N), dtype=np.float32)
    reference = weakref.ref(array)
    loss = branch.second(branch.first(torch.from_numpy(array))).sum()
    del array
    assert reference() is not None
    loss.backward()
    gc.collect()
    assert reference() is None


def test_dropout_on_the_lora_path_does_not_reach_the_statistics() -> None:
    one = layer(p=0.5)
    optimizer = CGLoRAOptimizer(wrapped(one))
    x = torch.randn(40, N)
    one(x).square().sum().backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x))


def test_a_shared_input_counts_a_row_if_any_consumer_has_a_gradient_there() -> None:
    one, two = layer(), layer(1)
    optimizer = CGLoRAOptimizer(wrapped(one, two))
    x = torch.randn(6, N)
    (one(x)[:2].square().sum() + two(x)[1:4].square().sum()).backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x[:4]))
    assert gram(optimizer, one).data_ptr() == gram(optimizer, two).data_ptr()


def test_a_consumer_without_gradient_does_not_hold_up_the_others() -> None:
    one, two = layer(), layer(1)
    optimizer = CGLoRAOptimizer(wrapped(one, two))
    x = torch.randn(6, N)
    unused = two(x)
    one(x).square().sum().backward()
    optimizer.step()
    assert unused.requires_grad
    assert_close(gram(optimizer, one), mean_gram(x))


def test_pairs_that_part_ways_keep_their_own_statistics() -> None:
    one, two = layer(), layer(1)
    apart_one, apart_two = layer(), layer(1)
    optimizer = CGLoRAOptimizer(wrapped(one, two), lr=1e-2)
    first = CGLoRAOptimizer(wrapped(apart_one), lr=1e-2)
    second = CGLoRAOptimizer(wrapped(apart_two), lr=1e-2)
    for step in range(3):
        x, y = torch.randn(6, N), torch.randn(4, N)
        y = x if step == 0 else y
        (one(x).square().mean() + two(y).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for each, module, value in ((first, apart_one, x), (second, apart_two, y)):
            module(value).square().mean().backward()
            each.step()
            each.zero_grad()
    assert_close(parameters_of(wrapped(one, two)), parameters_of(wrapped(apart_one, apart_two)))
    assert not torch.allclose(gram(optimizer, one), gram(optimizer, two))


def test_tokens_routed_to_no_expert_are_no_rows() -> None:
    one, two = layer(), layer(1)
    optimizer = CGLoRAOptimizer(wrapped(one, two))
    x = torch.randn(6, N)
    (one(x).square().sum() + two(x[:0]).square().sum()).backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x))
    assert not gram(optimizer, two).any()
    assert optimizer.diagnostics() == dict.fromkeys(optimizer.diagnostics(), 0)


def test_inputs_computed_in_inference_mode() -> None:
    """Frozen features, computed once; dropout makes ordinary tensors of them."""
    one = layer(p=0.25)
    optimizer = CGLoRAOptimizer(wrapped(one))
    with torch.inference_mode():
        x = torch.randn(4, N)
    one(x).square().sum().backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(x.clone()))


def test_one_module_run_by_two_threads_at_once() -> None:
    """As ``nn.DataParallel`` does with its replicas."""
    both_inside = threading.Barrier(2, timeout=30)

    class Meeting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            both_inside.wait()
            return x

    one = layer()
    one.lora_dropout = Meeting()
    optimizer = CGLoRAOptimizer(wrapped(one))
    inputs = [torch.randn(4, N), torch.randn(4, N)]
    with ThreadPoolExecutor(2) as threads:
        outputs = list(threads.map(one, inputs))
    sum(output.square().sum() for output in outputs).backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(*inputs))


# ------------------------------------------------------------- passes without a trace


def test_eval_no_grad_and_inference_passes_leave_no_trace() -> None:
    model, reference = tagger(), tagger()
    optimizer, other = CGLoRAOptimizer(model, lr=1e-2), CGLoRAOptimizer(reference, lr=1e-2)
    for step in range(3):
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                loss_of(model.eval(), batch(50))
        loss_of(model, batch(51))  # with grad, but no backward
        train(model.train(), optimizer, [step])
        train(reference, other, [step])
    assert_equal(snapshot(model, optimizer), snapshot(reference, other))


def test_a_failed_forward_leaves_no_trace() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    one = layer()
    optimizer = CGLoRAOptimizer(wrapped(one), lr=1e-2)
    x = torch.randn(4, N)
    reference = weakref.ref(x)
    healthy, one.lora_dropout = one.lora_dropout, Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        one(x)
    one.lora_dropout = healthy
    del x
    gc.collect()
    assert reference() is None
    y = torch.randn(4, N)
    one(y).square().sum().backward()
    optimizer.step()
    assert_close(gram(optimizer, one), mean_gram(y))


def test_a_gradient_taken_without_accumulating_leaves_no_trace_when_nothing_is_stepped() -> None:
    one = layer()
    optimizer = CGLoRAOptimizer(wrapped(one), lr=1e-2)
    before = parameters_of(one)
    torch.autograd.grad(one(torch.randn(4, N)).square().sum(), one.lora_B.weight)
    optimizer.step()
    assert_equal(parameters_of(one), before)
