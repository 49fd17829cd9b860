"""The byte-level Llama: reproducible from its recipe, cached, measured the same way every time."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from benchmarks import language_model as lm
from benchmarks.adapters import add_lora, linear_layers
from benchmarks.datasets import as_bytes

RECIPE = lm.LanguageModelRecipe(
    "counting",
    hidden_size=32,
    layers=2,
    heads=2,
    intermediate_size=48,
    sequence_length=32,
    batch_size=8,
    steps=12,
    learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def text():
    return as_bytes(" ".join(str(number) for number in range(2000)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(text, cache):
    return lm.pretrain(RECIPE, text, cache)


def same(first, second):
    second = second.state_dict()
    return all(torch.equal(value, second[name]) for name, value in first.state_dict().items())


class TestPretraining:
    def test_learns(self, model, text):
        fresh = lm.heldout_loss(lm.build_model(RECIPE), text, 32, 16)
        assert lm.heldout_loss(model, text, 32, 16) < fresh - 1.0

    def test_same_recipe_same_model(self, model, text, tmp_path):
        torch.manual_seed(99)  # what happened before does not matter
        assert same(model, lm.pretrain(RECIPE, text, tmp_path))

    def test_leaves_the_random_state_alone(self, text, tmp_path):
        before = torch.get_rng_state()
        lm.pretrain(RECIPE, text, tmp_path)
        assert torch.equal(before, torch.get_rng_state())

    def test_second_time_comes_from_the_cache(self, model, text, cache):
        calls = []
        again = lm.pretrain(RECIPE, text, cache, lambda *a: calls.append(a))
        assert same(model, again)
        assert not calls
        assert again.training
        assert all(p.requires_grad for p in again.parameters())
        assert [path.suffix for path in cache.iterdir()] == [".pt"]

    def test_progress(self, text, tmp_path):
        calls = []
        lm.pretrain(RECIPE, text, tmp_path, lambda *a: calls.append(a))
        assert [(done, total) for done, total, _ in calls] == [(i, 12) for i in range(1, 13)]
        assert calls[-1][2] < calls[0][2]

    def test_any_change_of_recipe_or_text_is_another_model(self, text):
        digests = {RECIPE.digest(text), RECIPE.digest(text[:-1])}
        for field in dataclasses.fields(RECIPE):
            value = getattr(RECIPE, field.name)
            other = f"{value}x" if isinstance(value, str) else value * 2 + 1
            digests.add(dataclasses.replace(RECIPE, **{field.name: other}).digest(text))
        assert len(digests) == 2 + len(dataclasses.fields(RECIPE))

    def test_interrupted_pretraining_leaves_nothing(self, text, tmp_path):
        def stop(done, total, loss):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            lm.pretrain(RECIPE, text, tmp_path, stop)
        assert not list(tmp_path.iterdir())

    def test_embeddings_are_tied(self, model):
        assert model.lm_head.weight is model.model.embed_tokens.weight


class TestBatches:
    def test_windows_of_the_text(self, text):
        batch = lm.sample_batch(text, 5, 20, torch.Generator().manual_seed(0))
        assert batch.shape == (5, 21)
        assert batch.dtype == torch.int64
        content = bytes(text.tolist())
        assert all(bytes(row.tolist()) in content for row in batch)

    def test_the_generator_decides(self, text):
        draws = [
            lm.sample_batch(text, 5, 20, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        ]
        assert draws[0].equal(draws[1])
        assert not draws[0].equal(draws[2])

    def test_every_window_can_be_drawn(self):
        text = torch.arange(6, dtype=torch.uint8)
        batch = lm.sample_batch(text, 200, 4, torch.Generator().manual_seed(0))
        assert set(batch[:, 0].tolist()) == {0, 1}

    def test_heldout_windows_do_not_overlap_in_what_is_predicted(self):
        text = (torch.arange(1000) % 256).to(torch.uint8)
        positions = torch.arange(1000)
        windows = lm.heldout_windows(positions, 32, 1000)
        predicted = windows[:, 1:].flatten().tolist()
        assert len(set(predicted)) == len(predicted)
        assert windows[-1, -1] == 999
        assert len(lm.heldout_windows(text, 32, 4)) == 4


class TestMeasures:
    def test_loss_is_the_mean_over_bytes(self, model, text):
        model.eval()
        windows = lm.heldout_windows(text, 32, 10)
        logits = lm.heldout_logits(model, text, 32, 10, batch_size=3)
        assert logits.shape == (320, 256)
        by_hand = F.cross_entropy(logits, windows[:, 1:].flatten())
        assert lm.heldout_loss(model, text, 32, 10, batch_size=4) == pytest.approx(by_hand.item())
        assert lm.loss(model, windows).item() == pytest.approx(by_hand.item(), rel=1e-5)
        losses = lm.window_losses(model, text, 32, 10)
        assert losses.mean().item() == pytest.approx(by_hand.item(), rel=1e-5)

    def test_measuring_keeps_the_mode_and_makes_no_graph(self, model, text):
        for training in (True, False):
            model.train(training)
            assert not lm.heldout_logits(model, text, 32, 2).requires_grad
            assert model.training is training


class TestAdapters:
    def test_all_linear_layers_but_the_output(self, model):
        names = linear_layers(model)
        assert len(names) == 7 * RECIPE.layers
        assert not any("lm_head" in name for name in names)

    def test_same_seed_same_function_and_weights(self, text):
        base = lm.build_model(RECIPE)
        before = lm.heldout_loss(base, text, 32, 4)
        adapted = [add_lora(lm.build_model(RECIPE), 4, 8, seed) for seed in (0, 0, 1)]
        assert lm.heldout_loss(adapted[0], text, 32, 4) == pytest.approx(before)
        assert same(adapted[0], adapted[1])
        assert not same(adapted[0], adapted[2])

    def test_only_adapters_are_trained(self):
        before = torch.get_rng_state()
        adapted = add_lora(lm.build_model(RECIPE), 4, 8, 0)
        trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * 7 * RECIPE.layers
        assert all("lora_" in name for name in trained)
        assert torch.equal(before, torch.get_rng_state())
