"""The demo end to end with tiny models, its honesty about noise, and its exit codes."""

import gzip
import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import encoder

if not encoder.is_available():
    pytest.skip("the packages of the encoder are not installed", allow_module_level=True)

from benchmarks.demo import report, settings, training
from benchmarks.demo.__main__ import main
from benchmarks.demo.parts import Evaluation

TSV = "label\ttext_a\ttext_b\n" + "".join(
    f"{'even' if i % 2 == 0 else 'odd'}\tnumber {i}\tthe next is {i + 1}\n" for i in range(40)
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run_demo(capsys, cache, out, *options):
    code = main(["--preset", "tiny", "--cache", str(cache), "--out", str(out), *options])
    return code, capsys.readouterr()


@pytest.mark.slow
def test_end_to_end(capsys, cache, tmp_path):
    code, said = run_demo(capsys, cache, tmp_path / "out")
    assert code == 0, said.err
    for words in ("AdamW", "CGLoRAOptimizer", "100% (4 steps)", "accuracy", "optimizer state, MiB"):
        assert words in said.out
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert [part["part"] for part in record["parts"]] == ["classifier", "language_model"]
    assert {"torch", "peft", "transformers"} <= set(record["environment"]["versions"])
    for part in record["parts"]:
        first, second = part["runs"]
        assert (first["optimizer"], second["optimizer"]) == ("AdamW", "CGLoRAOptimizer")
        assert first["steps"] == second["steps"] == [0, 1, 2, 3, 4]
        # Same initial weights, same first batch; different after that.
        assert first["losses"][0] == second["losses"][0]
        assert first["train"][0] == second["train"][0]
        assert first["losses"][-1] != second["losses"][-1]
        assert len(first["train"]) == 4
        assert first["state_bytes"] > 0
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.slow
def test_own_data_and_several_seeds(capsys, cache, tmp_path):
    path = tmp_path / "mine.tsv.gz"
    path.write_bytes(gzip.compress(TSV.encode()))
    code, said = run_demo(capsys, cache, tmp_path, "--data", str(path), "--seeds", "2")
    assert code == 0, said.err
    assert "mine.tsv.gz" in said.out
    assert "over 2 seeds" in said.out
    record = json.loads((tmp_path / "demo.json").read_text())
    assert "2 classes, 32 training and 8 held-out texts" in record["parts"][0]["facts"]
    assert [run["seed"] for run in record["parts"][0]["runs"]] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("label\ttext\n", "line 1: the header must be"),
        ("label\ttext_a\na\tx\nb\n", "line 3: has 1 column(s)"),
        ("label\ttext_a\na\tx\nb\ty\n", "has 2 rows; at least 20"),
        ("label\ttext_a\n" + "a\tx\nb\tx\n" * 20, "too much alike"),
    ],
)
def test_unusable_data_is_one_line_and_exit_code_2(capsys, tmp_path, content, message):
    path = tmp_path / "mine.tsv"
    if content is not None:
        path.write_text(content)
    code, said = run_demo(capsys, tmp_path, tmp_path / "out", "--data", str(path))
    assert code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_exit_code_of_the_command(tmp_path, capsys, monkeypatch):
    missing = tmp_path / "missing.tsv"
    monkeypatch.setattr(sys, "argv", ["benchmarks.demo", "--data", str(missing)])
    monkeypatch.delitem(sys.modules, "benchmarks.demo.__main__")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("benchmarks.demo", run_name="__main__", alter_sys=True)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"{missing}: no such file\n"


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--seeds", "x"], ["--preset", "huge"]])
def test_wrong_options(options):
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2


def test_output_folder_that_is_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


class TestReport:
    part = SimpleNamespace(unit="text", settings=SimpleNamespace(steps=4))

    def runs(self, base, ours, texts=None):
        """Runs that end at the given losses, one per seed."""
        made = []
        for name, finals in zip(training.OPTIMIZERS, (base, ours), strict=True):
            for seed, final in enumerate(finals):
                run = training.Run(name, 1e-3, seed)
                losses = torch.full((4,), final) if texts is None else final + torch.tensor(texts)
                for step, loss in ((0, torch.full((4,), 9.0)), (2, losses + 0.5), (4, losses)):
                    run.add(step, Evaluation(loss))
                made.append(run)
        return made

    def test_difference_paired_over_seeds(self):
        runs = self.runs([1.0, 2.0, 3.0], [0.9, 1.8, 3.0])
        mean, error = report.difference(runs)
        assert mean == pytest.approx(-0.1)
        assert error == pytest.approx(2 * 0.1 / 3**0.5, rel=1e-4)
        assert "level within noise" in report.verdict(self.part, runs)
        assert "over 3 seeds" in report.verdict(self.part, runs)

    def test_one_seed_says_what_it_cannot_know(self):
        runs = self.runs([1.0], [0.8])
        assert "CGLoRAOptimizer is lower" in report.verdict(self.part, runs)
        assert "One run each" in report.verdict(self.part, runs)
        assert "after 4 of 4 steps" in report.verdict(self.part, runs)
        assert "is higher" in report.verdict(self.part, self.runs([0.5], [1.0]))

    def test_noise_between_texts_counts_with_one_seed(self):
        runs = self.runs([1.0], [0.95])
        runs[1].last = Evaluation(torch.tensor([0.0, 2.0, 0.0, 1.8]))
        assert "level within noise" in report.verdict(self.part, runs)

    def test_divergence_is_said(self):
        assert "diverged" in report.verdict(self.part, self.runs([1.0], [float("nan")]))


def test_evaluations_include_the_budgets_of_the_table():
    assert {24, 48, 96} <= training.evaluation_steps(96, 8)
    assert {25, 50, 100} <= training.evaluation_steps(100, 3)
    for preset in settings.PRESETS.values():
        for part in (preset.classifier, preset.language_model):
            assert set(part.learning_rates) == set(training.OPTIMIZERS)
