"""The works as every method sees them: tasks, splits, evaluation, predictions, divergences."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import encoder, methods, metrics, optimizers, training, works
from benchmarks.cells import Cell
from benchmarks.works import linear, lm, nlu

SENTENCES = ["one little text", "another text of words", "a third", "numbers and letters"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders as a user would bring them."""
    folder = tmp_path_factory.mktemp("data")
    texts = {
        "source/train.txt": "the quick brown fox jumps over the lazy dog. " * 60,
        "target/train.txt": "le renard brun saute par dessus le chien. " * 60,
        "target/valid.txt": " ".join(f"le chien {i} dort sous un arbre." for i in range(60)),
        "toy/train.tsv": "label\ttext_a\n"
        + "".join(f"{'odd' if i % 2 else 'even'}\t{SENTENCES[i % 4]} {i}\n" for i in range(60)),
        "toy/dev.tsv": "label\ttext_a\n"
        + "".join(f"{'odd' if i % 2 else 'even'}\t{SENTENCES[i % 4]} {i}\n" for i in range(50, 90)),
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def lm_task(data, cache):
    task = replace(lm.tasks("tiny", data, "cpu")[0], cache=cache)
    lm.prepare(task)
    return task


@pytest.fixture(scope="module")
def nlu_task(data, cache):
    if not encoder.is_available():
        pytest.skip("the packages of the encoder are not installed")
    task = next(task for task in nlu.tasks("tiny", data, "cpu") if task.name == "toy")
    task = replace(task, cache=cache)
    nlu.prepare(task)
    return task


def run(task, method="adamw", lr=1e-3, steps=4, **options):
    cell = Cell(task.work, task.preset, task.name, method, lr, None, 1, steps, task.recipe)
    problem = works.work(task.work).problem(task)
    return training.run(problem, methods.get(method), cell, **options)


# ------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", works.TRAINED)
def test_the_thorough_presets_refine_the_rates_and_try_the_defaults(name, data):
    module = works.work(name)
    for preset in set(module.PRESETS) & set(works.THOROUGH):
        for task in module.tasks(preset, data, "cpu"):
            study = task.study([methods.get("cg")])
            assert study.refine
            assert study.defaults
            entry = study.entry("cg")
            assert entry is not None
            assert entry.default is not None


@pytest.mark.parametrize("name", works.TRAINED)
def test_tasks_have_their_own_recipes_and_disjoint_seeds(name, data):
    module = works.work(name)
    for preset in module.PRESETS:
        for folder in (None, data):
            found = module.tasks(preset, folder, "cpu")
            assert found
            assert len({task.name for task in found}) == len(found)
            assert len({task.recipe for task in found}) == len(found)
            for task in found:
                assert not set(task.tuning_seeds) & set(task.reporting_seeds)
                assert len(task.reporting_seeds) >= 3
                assert "adamw" in task.methods or not task.methods
                assert str(data) not in json.dumps(task.settings)


def test_changed_data_changes_the_recipe(data, tmp_path):
    before = lm.tasks("tiny", data, "cpu")[0].recipe
    changed = tmp_path / "data"
    for name in ("source", "target"):
        (changed / name).mkdir(parents=True)
        for path in (data / name).iterdir():
            (changed / name / path.name).write_bytes(path.read_bytes())
    assert lm.tasks("tiny", changed, "cpu")[0].recipe == before
    (changed / "target" / "valid.txt").write_text("something else " * 50)
    assert lm.tasks("tiny", changed, "cpu")[0].recipe != before


# ------------------------------------------------------------------------ linear


@pytest.mark.parametrize("name", ["c1e0", "c1e4", "three-c1e4"])
def test_linear_problem_has_the_wanted_condition_and_exact_losses(name):
    task = next(task for task in linear.tasks("quick", None, "cpu") if task.name == name)
    instance = linear.draw(task.settings, 1, 0)
    inputs = instance.inputs.double()
    values = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))
    assert values[-1] / values[0] == pytest.approx(task.settings["condition"], rel=0.05)
    problem = linear.problem(task)
    model = problem.base_model(1)
    start = problem.evaluate(model)
    assert start["report"] == pytest.approx(1.0, rel=1e-4)
    assert 0 < start["best_rank_r"] < start["report"]
    with torch.no_grad():  # the exact solution of full fine-tuning
        for layer, drawn in zip(model.children(), problem._instances, strict=True):
            layer.weight.copy_(torch.linalg.lstsq(drawn.inputs, drawn.target).solution.T)
    assert problem.evaluate(model)["report"] < 1e-6


def test_no_predictor_of_rank_r_beats_the_best_one():
    task = linear.tasks("tiny", None, "cpu")[0]
    instance = linear.draw(task.settings, 1, 0)
    change = instance.best.double() - instance.inputs.double() @ instance.weight.double().T
    singular = torch.linalg.svdvals(change)
    rank = task.settings["rank"]
    assert singular[rank] < 1e-4 * singular[0]
    values = torch.linalg.svdvals(
        instance.target.double() - instance.inputs.double() @ instance.weight.double().T
    )
    # Outputs are X^(1/2)-weighted, so the truncated SVD of the outputs is the optimum.
    lost = values[rank:].square().sum() / values.square().sum()
    assert instance.best_loss == pytest.approx(float(lost), rel=1e-3)


# ---------------------------------------------------------------------------- lm


def test_language_model_trains_from_the_same_base_for_all(lm_task):
    results = {name: run(lm_task, name)[0] for name in ("adamw", "full-adamw")}
    adamw, full = results["adamw"], results["full-adamw"]
    assert adamw.curve["report"][0] == full.curve["report"][0]
    assert adamw.train[0] == pytest.approx(full.train[0], abs=1e-4)
    assert full.status == adamw.status == "ok"
    assert adamw.curve["step"] == [0.0, 4.0]
    assert set(adamw.final) == {"choose", "report"}
    assert adamw.final["choose"] != adamw.final["report"]


def test_language_model_predictions_are_log_probabilities_of_the_report_half(lm_task):
    problem = lm.problem(lm_task)
    model = problem.base_model(0).eval()
    with torch.no_grad():
        logp = problem.predictions(model).astype(np.float64)
    assert logp.shape[1] == 256
    assert np.exp(logp).sum(-1) == pytest.approx(1.0, abs=5e-3)
    windows = problem._halves["report"][: lm.PREDICTED_WINDOWS]
    targets = windows[:, 1:].flatten().numpy()
    loss = -logp[np.arange(len(targets)), targets].mean()
    assert loss == pytest.approx(problem.evaluate(model)["report"], abs=2e-3)


def test_language_model_halves_are_different_text_and_batches_follow_the_seed(lm_task):
    problem = lm.problem(lm_task)
    halves = {
        name: {bytes(row.tolist()) for row in windows} for name, windows in problem._halves.items()
    }
    assert halves["choose"].isdisjoint(halves["report"])
    first, second, other = (next(problem.batches(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert [len(one) for one in problem.singles(first)] == [1] * len(first)


def test_prepared_base_is_made_once(lm_task, monkeypatch):
    monkeypatch.setattr(lm, "_texts", lambda task: pytest.fail("read again"))
    lm.prepare(lm_task)


def test_base_of_the_full_preset_is_the_one_of_the_protocol():
    with torch.device("meta"):
        full = lm.language_model.build_model(lm.BASES["full"])
        gpu = lm.language_model.build_model(lm.BASES["gpu"])
    assert sum(p.numel() for p in full.parameters()) == pytest.approx(4.8e6, rel=0.03)
    assert sum(p.numel() for p in gpu.parameters()) == pytest.approx(1e8, rel=0.03)


# --------------------------------------------------------------------------- nlu


def test_classification_learns_and_has_its_metrics(nlu_task):
    result, logp = run(nlu_task, predictions=True)
    assert {"choose", "report", "accuracy", "f1", "matthews"} <= set(result.final)
    problem = nlu.problem(nlu_task)
    assert logp.shape == (len(problem.halves["report"]), 2)
    labels = problem.halves["report"].labels.numpy()
    chosen = -logp[np.arange(len(labels)), labels].mean()
    assert chosen == pytest.approx(result.final["report"], abs=1e-4)
    expected = metrics.classification_metrics(labels, logp.argmax(-1))
    assert result.final["accuracy"] == expected["accuracy"]


def test_classification_trains_the_head_beside_the_adapters(nlu_task):
    model = training.build(nlu.problem(nlu_task), methods.get("adamw"), 1)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any(name.endswith("head.weight") for name in names)
    assert all("lora" in name or "head" in name for name in names)
    assert not any("head.lora" in name for name in names)


def test_held_out_texts_are_in_one_part_only(nlu_task):
    prepared = torch.load(nlu_task.prepared, weights_only=True)
    rows = {
        part: {tuple(row["input_ids"]) for row in prepared[part]["rows"][0]}
        for part in ("train", "choose", "report")
    }
    assert rows["choose"].isdisjoint(rows["report"])
    # Ten texts of the development file are in the training file as well.
    assert len(prepared["train"]["labels"]) == 50
    assert rows["train"].isdisjoint(rows["choose"] | rows["report"])


def test_few_shot_tasks_take_so_many_texts_of_every_class(data, cache):
    task = next(task for task in nlu.tasks("full", data, "cpu") if task.name == "toy")
    task = replace(task, name="toy-8", settings={**task.settings, "shots": 8}, cache=cache)
    parts = nlu._labelled(task)
    labels = parts["train"].labels
    assert [labels.count(label) for label in (0, 1)] == [8, 8]
    assert len(parts["choose"]) + len(parts["report"]) == 40


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("cola", ("cola", None, None)),
        ("banking77-8", ("banking77", 8, None)),
        ("cola-head5", ("cola", None, 5)),
        ("my-set-8-head10", ("my-set", 8, 10)),
    ],
)
def test_names_of_variants_are_taken_apart(name, parts):
    found = nlu._Name.of(name)
    assert (found.folder, found.shots, found.head_rate) == parts


def test_a_folder_named_like_a_variant_is_a_task_of_its_own(tmp_path):
    (tmp_path / "wiki-2").mkdir()
    for part in ("train", "dev"):
        (tmp_path / "wiki-2" / f"{part}.tsv").write_text("label\ttext_a\n1\ta\n")
    task = next(task for task in nlu.tasks("medium", tmp_path, "cpu") if task.name == "wiki-2")
    assert task.settings["shots"] is None
    assert nlu._files(tmp_path, "wiki-2")[0].parent.name == "wiki-2"


def test_a_head_with_a_rate_of_its_own_learns_faster_for_every_method(nlu_task):
    task = replace(nlu_task, settings={**nlu_task.settings, "head_rate": 5.0})
    nlu.prepare(task)
    problem = nlu.problem(task)
    for name in ("adamw", "cg", "muon", "lora+", "full-adamw"):
        cell = Cell("nlu", "tiny", task.name, name, 1e-3, None, 1, 4, task.recipe)
        trainer = training.Trainer.start(problem, methods.get(name), cell)
        rates = {
            id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]
        }
        head = {rates[id(p)] for p in problem.trainable_besides_lora(trainer.model)}
        assert head == {5e-3}, name
        assert len(rates) == len(optimizers.trainable(trainer.model)), name
        assert min(rates.values()) <= 1e-3, name
        before = [p.clone() for p in problem.trainable_besides_lora(trainer.model)]
        trainer.step()
        after = problem.trainable_besides_lora(trainer.model)
        assert all(not torch.equal(*pair) for pair in zip(before, after, strict=True)), name


def test_classification_has_the_peers_whose_cells_are_committed(data):
    task = next(task for task in nlu.tasks("medium", data, "cpu") if task.name == "toy")
    names = [method.name for method in methods.select(task.methods)]
    assert names == list(nlu.METHODS)
    results = Path(__file__).resolve().parents[2] / "benchmarks/results/nlu/medium/mrpc"
    done = {json.loads(p.read_text())["cell"]["method"] for p in results.glob("*/*.json")}
    assert set(names) <= done


def test_search_pairs_stay_together(monkeypatch, cache):
    if not encoder.is_available():
        pytest.skip("the packages of the encoder are not installed")
    from benchmarks.stdlib_texts import SearchSplits, TextPairs

    def pairs(start, stop):
        numbers = range(start, stop)
        return TextPairs(
            [f"get_{n}(x, y)" for n in numbers], [f"Get number {n}." for n in numbers], ["m"] * 12
        )

    splits = SearchSplits(pairs(0, 12), pairs(12, 24), pairs(24, 36))
    monkeypatch.setattr("benchmarks.stdlib_texts.search_pairs", lambda: splits)
    task = next(task for task in nlu.tasks("tiny", None, "cpu") if task.name == nlu.SEARCH)
    task = replace(task, cache=cache)
    nlu.prepare(task)
    result, _ = run(task, steps=3)
    assert result.final["report"] < result.curve["report"][0]
    assert 0 < result.final["mrr"] <= 1
    problem = nlu.problem(task)
    queries, answers = next(problem.batches(1))
    assert queries["input_ids"].shape[0] == answers["input_ids"].shape[0] == 8
    tokenizer = encoder.load_tokenizer()
    for query, answer in zip(queries["input_ids"], answers["input_ids"], strict=True):
        name = tokenizer.decode(query, skip_special_tokens=True).replace(" ", "")
        summary = tokenizer.decode(answer, skip_special_tokens=True)
        assert re.findall(r"\d+", name) == re.findall(r"\d+", summary)
