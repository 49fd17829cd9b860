"""Step costs: bytes against real optimizers, what the runs do, and a small run of everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.step import checks, layers, measure, stopwatch
from benchmarks.step.checks import step_error
from benchmarks.step.layers import MODELS, AdapterStack, make_traffic
from benchmarks.step.measure import make_optimizer, measure_model
from benchmarks.step.state import curvature_buffer_bytes, curvature_state_bytes, state_bytes
from benchmarks.works import step
from benchmarks.works.step import run_step
from cg_optim import CGLoRAOptimizer
from cg_optim.curvature_store import INTERVAL, WARM_UP_STEPS

TOY = MODELS["toy"]
RANK = 4


def one_step(name: str) -> torch.optim.Optimizer:
    stack = AdapterStack(TOY, RANK, TOY.layers)
    optimizer = make_optimizer(name, stack)
    stack.forward_backward(make_traffic(TOY, 16, "cpu", torch.float32))
    optimizer.step()
    return optimizer


def distinct_bytes(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("name", stopwatch.NAMES)
def test_state_bytes_are_those_of_a_real_optimizer(name: str) -> None:
    optimizer = one_step(name)
    held = [value for state in optimizer.state.values() for value in state.values()]
    assert state_bytes(TOY, RANK)[name] == distinct_bytes(held)


def test_buffer_bytes_are_what_the_curvature_holds_besides_its_state() -> None:
    optimizer = one_step("cg")
    held = [
        value
        for curvature in optimizer._store.distinct()
        for value in vars(curvature).values()
        if isinstance(value, Tensor)
    ]
    assert curvature_buffer_bytes(TOY) == distinct_bytes(held) - curvature_state_bytes(TOY)


def test_shared_inputs_are_recognised_and_layers_kept_apart() -> None:
    assert len(one_step("cg")._store.distinct()) == TOY.layers * len(TOY.inputs())


def test_a_resumed_optimizer_collects_in_every_interval() -> None:
    stack = AdapterStack(TOY, RANK, 1)
    optimizer = make_optimizer("cg", stack)
    assert isinstance(optimizer, CGLoRAOptimizer)
    stopwatch.resume_after_warm_up(optimizer)
    traffic = make_traffic(TOY, 16, "cpu", torch.float32)
    contender = stopwatch.Contender(optimizer, lambda: stack.forward_backward(traffic))
    assert optimizer.param_groups[0]["steps_taken"] >= WARM_UP_STEPS
    said, seen = [], []
    for _ in range(2 * INTERVAL):
        said.append(contender.collecting)
        optimizer.zero_grad()
        contender.forward_backward()
        before = optimizer._store.of(0)
        updates = 0 if before is None else int(before.updates)
        optimizer.step()
        after = optimizer._store.of(0)
        seen.append(after is not None and int(after.updates) > updates)
    assert said == seen == [True, *[False] * (INTERVAL - 1)] * 2


def test_summary_of_hand_made_turns() -> None:
    turns = {
        "adamw_foreach": [stopwatch.Turn(False, 10.0, 3.0)] * INTERVAL,
        "adamw_fused": [stopwatch.Turn(False, 12.0, 1.0)] * INTERVAL,
        "cg": [stopwatch.Turn(True, 19.0, 9.0)]
        + [stopwatch.Turn(False, 12.0, 5.0)] * (INTERVAL - 1),
    }
    summary = stopwatch.summarise(turns)
    assert summary["ms_forward_backward"] == 11.0
    assert summary["ms_hooks"]["collecting"] == 8.0
    assert summary["ms_hooks"]["other"] == 1.0
    assert summary["ms_hooks"]["average"] == (8.0 + (INTERVAL - 1) * 1.0) / INTERVAL
    average = (9.0 + (INTERVAL - 1) * 5.0) / INTERVAL
    assert summary["ms"] == {"adamw_foreach": 3.0, "adamw_fused": 1.0, "cg": average}


def test_more_rows_than_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "DISTINCT_ROWS", 3)
    traffic = make_traffic(TOY, 7, "cpu", torch.float32)
    assert [x.shape for x in traffic.inputs] == [(7, n) for n in TOY.inputs()]
    assert [g.shape[1] for g in traffic.output_gradients] == [s.out_features for s in TOY.linears()]
    assert torch.equal(traffic.inputs[0][:3], traffic.inputs[0][3:6])


def test_measuring_under_autocast() -> None:
    row = measure_model(
        "toy", RANK, layers=1, tokens=16, cycles=1, device="cpu", dtype=torch.bfloat16
    )
    assert set(row["ms"]) == set(stopwatch.NAMES)


def test_a_step_agrees_with_float64() -> None:
    assert 0 < step_error("toy", RANK, 64, "cpu") < 1e-3


def test_a_wrong_step_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = AdapterStack.forward_backward

    def in_half_precision(self, traffic):
        original(self, traffic)
        for parameter in self.parameters():
            if parameter.dtype == torch.float32:
                parameter.grad.copy_(parameter.grad.bfloat16())

    monkeypatch.setattr(AdapterStack, "forward_backward", in_half_precision)
    assert step_error("toy", RANK, 64, "cpu") > 1e-3


class FakeGraph:
    """A CUDA graph on the CPU: capturing runs the step, and so the first replay is done."""

    def replay(self) -> None:
        pass


class FakeCapture:
    """What stands for ``torch.cuda.graph``; ``kind`` says how the capture goes."""

    kind = "runs"

    def __init__(self, graph: FakeGraph) -> None:
        pass

    def __enter__(self) -> None:
        if self.kind == "fails":
            raise RuntimeError("operation not permitted\nwhile capturing")

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("kind", ["runs", "fails", "leaves something out"])
def test_how_an_attempt_at_a_graph_ends(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCapture, "kind", kind)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # AdamW refuses capturable=True on a CPU, so only ours can be tried there.
    stack = AdapterStack(TOY, RANK, 1)
    traffic = make_traffic(TOY, 16, "cpu", torch.float32)
    captured, eager = (checks._prepared(stack, "cg_other", False, traffic) for _ in range(2))
    if kind == "leaves something out":
        captured[1].param_groups[0]["lr"] *= 0.9
    found = checks._try_graph(captured, eager)
    if kind == "runs":
        assert found["supported"]
        assert found["ms"] >= 0
    else:
        wanted = "operation not permitted" if kind == "fails" else "the replayed step differs by"
        assert not found["supported"]
        assert found["error"].startswith(wanted)
        assert "\n" not in found["error"]


def test_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(run_step("tiny", "cpu", tmp_path).read_text())
    (row,) = record["rows"]
    assert set(row["ms"]) == set(row["state_bytes"]) == set(stopwatch.NAMES)
    assert all(value > 0 for value in row["ms"].values())
    assert (row["model"], row["rank"], row["layers"], row["layers_timed"]) == ("toy", 4, 2, 2)
    assert 0 < row["share_estimate"]["adamw_fused"] < 1
    shares = {share["name"]: share for share in record["training_step"]}
    assert set(shares) == set(stopwatch.NAMES)
    for share in shares.values():
        extra = share["ms_hooks"] + share["ms_step"]
        assert share["share"] == pytest.approx(extra / (extra + share["ms_forward_backward"]))
    assert record["step_error_against_float64"][0]["error"] < 1e-3
    assert not record["failures"]
    assert record["environment"]["versions"]["torch"]
    assert "x AdamW's" in capsys.readouterr().out


def test_a_second_run_keeps_what_is_there_and_tries_again_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory\ndetails")

    # Others may commit while this runs.
    monkeypatch.setattr(step, "environment", lambda *_: {"commit": "one"})
    with monkeypatch.context() as patch:
        patch.setattr(measure, "measure_model", no_memory)
        first = json.loads(run_step("tiny", "cpu", tmp_path).read_text())
    failure = {"part": "rows", "model": "toy", "rank": 4, "error": "out of memory"}
    assert (first["rows"], first["failures"]) == ([], [failure])
    second = json.loads(run_step("tiny", "cpu", tmp_path).read_text())
    assert second["training_step"] == first["training_step"]
    assert (len(second["rows"]), second["failures"]) == (1, [])
    monkeypatch.setattr(step, "environment", lambda *_: {"commit": "two"})
    third = json.loads(run_step("tiny", "cpu", tmp_path).read_text())
    assert third["training_step"] != second["training_step"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tiny_run_on_a_gpu(tmp_path: Path) -> None:
    record = json.loads(run_step("tiny", "cuda", tmp_path).read_text())
    assert not record["failures"]
    assert record["step_error_against_float64"][0]["error"] < 1e-3
    assert record["rows"][0]["peak_bytes"]["cg"] > 0
    assert record["cuda_graph"]["adamw_fused"]["supported"]
    for kind in record["cuda_graph"].values():
        assert kind["supported"] or kind["error"]
