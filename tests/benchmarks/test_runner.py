"""The runner and the command line: resuming, failures, stopping, one line for wrong requests."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as main_module
from benchmarks import methods, runner
from benchmarks.__main__ import main
from benchmarks.cells import Result, load_all, save
from benchmarks.execute import run_job
from benchmarks.runner import Comparison, Runner
from benchmarks.works import linear

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")


def comparison(*names, **changes):
    task = replace(linear.tasks("tiny", None, "cpu")[0], steps=4, reporting_seeds=(1,), **changes)
    return Comparison(task, task.study([methods.get(name) for name in names]))


class InThisProcess:
    """Stands in for the fork server; a job runs when its process is started."""

    def __init__(self, run=run_job, exitcode=0):
        self.run, self.exitcode, self.started = run, exitcode, []

    def Process(self, target, args):
        return _Process(self, args[0])


class _Process:
    sentinel = None

    def __init__(self, server, job):
        self.server, self.job, self.exitcode = server, job, server.exitcode
        self.alive = False

    def start(self):
        self.server.started.append(self.job)
        self.server.run(self.job)

    def is_alive(self):
        return self.alive

    def join(self, timeout=None):
        pass

    def terminate(self):
        self.alive = False


@pytest.fixture
def server(monkeypatch):
    threads = torch.get_num_threads()
    found = InThisProcess()
    monkeypatch.setattr(runner, "fork_server", lambda threads: found)
    monkeypatch.setattr(runner, "wait", lambda sentinels, timeout: None)
    yield found
    torch.set_num_threads(threads)


def test_runs_the_plan_and_a_second_run_has_nothing_to_do(server, tmp_path):
    told = []
    one = comparison("adamw", "soap")
    assert Runner([one], tmp_path, report=told.append).run()
    found = list(load_all(tmp_path))
    assert len(found) == len(server.started) == len(one.results)
    assert {result.cell.method for result in found} == {"adamw", "soap"}
    assert one.requests() == []
    assert told[-1].left == 0
    assert told[0].left > told[-1].left
    assert [status.done for status in told] == sorted(status.done for status in told)
    assert all(result.environment["wall_seconds"] >= 0 for result in found)
    server.started.clear()
    assert Runner([comparison("adamw", "soap")], tmp_path).run()
    assert server.started == []


def test_predictions_are_asked_for_in_the_report_only(server, tmp_path):
    Runner([comparison("adamw")], tmp_path).run()
    assert {job.cell.seed for job in server.started if job.predictions} == {1}
    assert {job.cell.seed for job in server.started if not job.predictions} == {0}


def test_a_method_that_raises_is_recorded_and_the_others_go_on(server, tmp_path):
    assert Runner([comparison("adamw", "soap[nonsense=1]")], tmp_path).run()
    by_method = {}
    for result in load_all(tmp_path):
        by_method.setdefault(result.cell.method, set()).add(result.status)
    assert by_method["soap[nonsense=1]"] == {"failed"}
    assert "ok" in by_method["adamw"]
    assert "failed" not in by_method["adamw"]
    again = comparison("adamw", "soap[nonsense=1]")
    assert runner.forget_failures([again], tmp_path) == 3
    assert "failed" not in {result.status for result in load_all(tmp_path)}


def test_a_process_that_dies_is_recorded(server, tmp_path):
    server.run, server.exitcode = lambda job: None, -9
    assert Runner([comparison("adamw")], tmp_path).run()
    results = list(load_all(tmp_path))
    assert {result.status for result in results} == {"failed"}
    assert "exit code -9" in results[0].error
    assert results[0].settings["rank"] == 2


def test_a_cell_that_takes_too_long_is_stopped_and_recorded(server, tmp_path, monkeypatch):
    monkeypatch.setattr(_Process, "start", lambda self: setattr(self, "alive", True))
    assert Runner([comparison("adamw")], tmp_path, time_limit=-1.0).run()
    assert all("TimeoutError" in result.error for result in load_all(tmp_path))


def test_no_cell_is_started_after_the_time(server, tmp_path):
    assert not Runner([comparison("adamw")], tmp_path, until=0.0).run()
    assert server.started == []


def test_estimate_uses_the_seconds_of_finished_cells(tmp_path):
    one = comparison("adamw", "soap")
    cell = one.requests()[0].cell
    one.results[cell] = Result(
        cell,
        "ok",
        final={"choose": 1.0, "report": 1.0},
        environment={"wall_seconds": 8.0},
    )
    seconds = runner._seconds_of(one)
    assert seconds(cell) == 8.0
    assert seconds(replace(cell, steps=2)) == 4.0
    assert seconds(replace(cell, method="soap")) == 8.0


@pytest.mark.slow
def test_in_processes_with_pinned_threads(tmp_path):
    one = comparison("adamw")
    assert Runner([one], tmp_path, jobs=2, threads=1).run()
    results = list(load_all(tmp_path))
    assert "failed" not in {result.status for result in results}
    assert {result.environment["threads"] for result in results} == {1}
    assert all(result.costs["peak_memory"] > 1e7 for result in results)


@pytest.mark.slow
def test_stopping_by_hand_keeps_finished_cells_and_leaves_no_process(tmp_path):
    command = [
        # Far more cells than are done before the signal, however slow this process polls.
        *(sys.executable, "-m", "benchmarks", "linear", "--preset", "quick"),
        *("--methods", "adamw", "soap", "lora+", "full-adamw", "--jobs", "1"),
        *("--out", str(tmp_path)),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # A shell's background job has the signal ignored, and so would have its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(load_all(tmp_path)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1].startswith("stopped")
    assert "Traceback" not in errors
    assert list(load_all(tmp_path))


def test_an_interrupt_waits_until_its_worker_is_known():
    done = []

    def start():
        with runner.interrupts_held():
            signal.raise_signal(signal.SIGINT)
            done.append("started")

    # A shell's background job has the signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert done == ["started"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)


def _tell_blocked(connection):
    connection.send(signal.pthread_sigmask(signal.SIG_BLOCK, set()))


@pytest.mark.slow
def test_workers_never_see_an_interrupt():
    context = runner.fork_server(1)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    here, there = context.Pipe()
    process = context.Process(target=_tell_blocked, args=(there,))
    process.start()
    assert here.poll(60)
    assert signal.SIGINT in here.recv()
    process.join(60)


def test_command_line_end_to_end(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.timing.write_timing", lambda *_: None)
    options = ["--methods", "adamw", "full-adamw", "--seeds", "5", "--out", str(tmp_path)]
    assert main(["linear", "--preset", "tiny", *options]) == 0
    assert "linear c1e2: adamw" in capsys.readouterr().out
    reported = [r for r in load_all(tmp_path) if r.cell.seed == 5]
    assert {result.cell.method for result in reported} == {"adamw", "full-adamw"}
    for result in load_all(tmp_path):
        assert str(tmp_path) not in json.dumps(result.settings | result.environment)


@pytest.mark.parametrize(("memory", "jobs"), [(8, 1), (47, 1), (80, 3), (141, 4)])
def test_a_gpu_has_as_many_cells_at_a_time_as_its_memory_holds(memory, jobs, monkeypatch):
    properties = SimpleNamespace(total_memory=memory * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    options = main_module.arguments(["lm", "--device", "cuda", "--preset", "gpu"])
    assert main_module._default_jobs(options) == jobs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quadratic"], "unknown work"),
        (["linear", "--methods", "sgd"], "unknown method"),
        (["linear", "--methods", "cg[damping"], "unknown method"),
        (["linear", "--tasks", "nothing"], "unknown task"),
        (["linear", "--preset", "gpu"], "no preset"),
        (["linear", "--seeds", "0"], "tuning seed"),
        (["linear", "--jobs", "0"], "at least 1"),
        (["lm", "--data", "missing-folder"], "no such folder"),
        pytest.param(["lm", "--device", "cuda"], "no such device", marks=WITHOUT_GPU),
        ([], "work"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(arguments, words, capsys, tmp_path):
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1
    assert words in said.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("work", "name", "content", "words"),
    [
        ("nlu", "cola/train.tsv", "label\ttext\n1\ta\n", "line 1"),
        ("nlu", "cola/train.tsv", "label\ttext_a\n1\ta\tb\n", "line 2"),
        ("lm", "source/train.txt", "", "is empty"),
        ("lm", "target/train.jsonl", '{"question": 1}\n', "question"),
    ],
)
def test_malformed_data_is_one_line_and_exit_code_2(
    work, name, content, words, capsys, tmp_path, server
):
    data = tmp_path / "data"
    files = {
        "nlu": {
            "cola/train.tsv": "label\ttext_a\n1\ta\n0\tb\n",
            "cola/dev.tsv": "label\ttext_a\n1\tc\n0\td\n",
        },
        "lm": {
            "source/train.txt": "source " * 100,
            "target/train.jsonl": '{"question": "a", "answer": "b"}\n' * 100,
            "target/valid.jsonl": '{"question": "c", "answer": "d"}\n' * 100,
        },
    }[work]  # fmt: skip
    for path, text in {**files, name: content}.items():
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        (data / path).write_text(text)
    code = main(
        [work, "--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "out"),
         "--cache", str(tmp_path / "cache")]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 2, said
    assert len(said.err.strip().splitlines()) == 1
    assert words in said.err
    assert server.started == []


def test_a_missing_split_is_one_line_and_exit_code_2(capsys, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    assert main(["lm", "--preset", "tiny", "--data", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err


def test_failed_records_are_kept_unless_asked_otherwise(server, tmp_path):
    one = comparison("adamw")
    cell = one.requests()[0].cell
    save(Result(cell, "failed", error="x"), tmp_path)
    Runner([one], tmp_path).run()
    assert cell not in {job.cell for job in server.started}
