"""Nobody waits for an accelerator: no value is read in a training step, hooks included.

The rule is tested four times.  On the CPU with ``host.at_hand`` denying that values can be
read, so that exactly the code of accelerators runs while two modes of torch watch for reads; on
torch's ``meta`` device, which has no values to read or to move to the host; on a GPU, if there is
one, with torch's own alarm; and the results of both ways are compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cg_optim import CGLoRAOptimizer, host
from cg_optim.curvature_store import WARM_UP_STEPS
from tests.models import (
    WIDTH,
    LoRALinear,
    assert_close,
    batch,
    curvature_state,
    loss_of,
    parameters_of,
    tagger,
)

aten = torch.ops.aten
#: Operators whose result the host needs before it can go on, on any accelerator.
WAITING = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.item,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.argwhere,
    aten.allclose,
    aten.bincount,
    aten.multinomial,
    aten.repeat_interleave,
    # These check an error code that the device has written.
    aten._linalg_check_errors,
    aten._linalg_eigh,
    aten._linalg_svd,
    aten.linalg_eig,
    aten.linalg_lstsq,
    aten.linalg_lu,
    aten.linalg_pinv,
}
#: The same in Python, where some of them read memory without an operator.
READING = {
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.is_nonzero,
    Tensor.nonzero,
    torch.allclose,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__contains__,
}


class Waited(Exception):
    pass


class NoOperatorWaits(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        masks = func.overloadpacket in (aten.index, aten.index_put_, aten.index_put) and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]
        )
        if func.overloadpacket in WAITING or masks:
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


class NothingIsRead(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Where a tensor is moved to the device of another one, that is no device by name.
        if func in READING or (func is Tensor.to and "cpu" in args[1:]):
            raise Waited(func.__name__)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def nobody_waits() -> Iterator[None]:
    with NoOperatorWaits(), NothingIsRead():
        yield


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "at_hand", lambda tensor: False)


READS: dict[str, Callable[[Tensor], object]] = {
    "bool": lambda x: bool(x.any()),
    "item": lambda x: x.sum().item(),
    "list": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.__setitem__(x > 0, 1.0),
    "comparison": lambda x: torch.equal(x, x),
    "moved to the host": lambda x: x.to("cpu"),
    "eigenvalues": lambda x: torch.linalg.eigh(x),
    "eigenvalues alone": lambda x: torch.linalg.eigvalsh(x),
    "of any matrix": lambda x: torch.linalg.eigvals(x),
    "singular values": lambda x: torch.linalg.svd(x),
    "pseudoinverse": lambda x: torch.linalg.pinv(x),
    "inverse": lambda x: torch.linalg.inv(x),
    "solution": lambda x: torch.linalg.solve(x, x),
    "least squares": lambda x: torch.linalg.lstsq(x, x),
    "factor": lambda x: torch.linalg.cholesky(x),
    "factors": lambda x: torch.linalg.lu_factor(x),
    "condition": lambda x: torch.where(x > 0),
    "rank": lambda x: torch.linalg.matrix_rank(x),
    "in an operator": lambda x: torch.nonzero(x),
}


@pytest.mark.parametrize("name", READS)
def test_the_watch_sees_every_way_of_reading(name: str) -> None:
    with pytest.raises(Waited), nobody_waits():
        READS[name](torch.eye(3))


#: Which steps are watched: the first, the warm-up, and with and without collection after it.
STEPS = range(2 * WARM_UP_STEPS + 2)


def run(
    optimizer: CGLoRAOptimizer,
    model: nn.Module,
    steps: range,
    watch: Callable[[int], contextlib.AbstractContextManager[object]],
) -> None:
    for step in steps:
        data = batch(step, padded=True)
        with watch(step):
            loss_of(model, data).backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("curvature", ["auto", 3])
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_step_reads_nothing(dtype: torch.dtype, lr: Any, curvature: Any) -> None:
    model = tagger().to(dtype)
    optimizer = CGLoRAOptimizer(model, lr=lr, curvature=curvature)
    run(optimizer, model, STEPS, lambda _: nobody_waits())


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_checkpointing_and_clipping_read_nothing(
    checkpointing: str | None, set_to_none: bool
) -> None:
    model = tagger(checkpointing=checkpointing)
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    for step in STEPS:
        with nobody_waits():
            for part in range(2):
                loss_of(model, batch(10 * step + part)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)


def in_one_bucket(model: nn.Module) -> None:
    """Gradients as views of one tensor, which is what ``gradient_as_bucket_view`` makes."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    bucket = torch.zeros(sum(p.numel() for p in parameters))
    for p, part in zip(parameters, bucket.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


@pytest.mark.parametrize("missed", [None, 1.0, torch.inf])
@pytest.mark.parametrize(("curvature", "init"), [("auto", None), (3, "curvature")])
@pytest.mark.parametrize("bucket", [True, False])
def test_nobody_looks_at_gradients_written_in_place(
    bucket: bool,
    curvature: Any,
    init: str | None,
    missed: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Micro-batches, and backwards that are zeroed in place without a step.

    In a bucket all gradients share a version, which then does not tell who was written to.
    """

    def trained(bucket: bool, watched: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = tagger()
        for block in model.blocks:
            nn.init.zeros_(block.q.lora_B.weight)
        if bucket:
            in_one_bucket(model)
        optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=curvature, init=init)
        for step in range(4):

            def watch(wanted: bool) -> Any:
                return nobody_waits() if wanted else contextlib.nullcontext()

            with watch(watched):
                if missed is not None and watched:
                    (loss_of(model, batch(50 + step)) * missed).backward()
                    optimizer.zero_grad(set_to_none=False)
                for part in range(2):
                    loss_of(model, batch(10 * step + part)).backward()
            with watch(watched):
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        assert not any(optimizer.diagnostics().values())
        return parameters_of(model), curvature_state(model, optimizer)

    expected = trained(bucket=False, watched=False)
    monkeypatch.setattr(host, "at_hand", lambda tensor: False)
    assert_close(trained(bucket=bucket, watched=True), expected)


@pytest.mark.parametrize("init", [None, "curvature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_works_on_values_that_do_not_exist(
    dtype: torch.dtype, init: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs of more than 64 features, of fewer, and plain parameters with weight and bias."""
    # torch knows no autocast there.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    layers = LoRALinear(WIDTH, 100), nn.ReLU(), LoRALinear(100, WIDTH), nn.Linear(WIDTH, 3)
    model = nn.Sequential(*layers).to("meta", dtype)
    optimizer = CGLoRAOptimizer(model, lr=1e-2, init=init)
    for step in STEPS:
        if step % 3 == 0:  # left out, and zeroed in place
            model(torch.empty(5, WIDTH, device="meta", dtype=dtype)).square().sum().backward()
            optimizer.zero_grad(set_to_none=False)
        model(torch.empty(5, WIDTH, device="meta", dtype=dtype)).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=bool(step % 2))
    assert "input_factor" in optimizer.state[layers[2].lora_A.weight]
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.diagnostics()


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.filterwarnings("ignore::cg_optim.errors.NumericalWarning")
def test_bad_values_are_dealt_with_without_reading_them() -> None:
    model = tagger()
    optimizer = CGLoRAOptimizer(model, lr=1e-2)
    run(optimizer, model, range(1), lambda _: contextlib.nullcontext())
    before = parameters_of(model)
    with nobody_waits():
        (loss_of(model, batch(1)) * torch.nan).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in parameters_of(model).items():
        assert torch.equal(value, before[name])
    counts = optimizer.diagnostics()
    assert counts["pair skipped"] == 10
    assert counts["parameter skipped"] == 6


@pytest.mark.parametrize("init", [None, "curvature"])
@pytest.mark.parametrize("curvature", ["auto", 3])
def test_both_ways_train_alike(
    curvature: Any, init: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = tagger()
        for block in model.blocks:
            nn.init.zeros_(block.q.lora_B.weight)
        optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=curvature, init=init)
        run(optimizer, model, range(8), lambda _: contextlib.nullcontext())
        return parameters_of(model), curvature_state(model, optimizer)

    expected = trained()
    monkeypatch.setattr(host, "at_hand", lambda tensor: False)
    assert_close(trained(), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("init", [None, "curvature"])
@pytest.mark.parametrize("curvature", ["auto", 3])
def test_a_step_on_a_gpu_does_not_wait_for_it(curvature: Any, init: str | None) -> None:
    @contextlib.contextmanager
    def alarm() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model = tagger().cuda()
    for block in model.blocks:
        nn.init.zeros_(block.q.lora_B.weight)
    optimizer = CGLoRAOptimizer(model, lr=1e-2, curvature=curvature, init=init)
    for step in range(2 * WARM_UP_STEPS):
        data = tuple(tensor.cuda() for tensor in batch(step, padded=True))
        with alarm():
            loss_of(model, data).backward()  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
