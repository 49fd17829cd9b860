"""MiniLM from its package: offline, mean pooling over real tokens, seeded batches, measures."""

import math
import os

import pytest
import torch
import torch.nn.functional as F

from benchmarks import encoder

if not encoder.is_available():
    pytest.skip("the packages of the encoder are not installed", allow_module_level=True)

from benchmarks.adapters import add_lora, linear_layers

TEXTS = ["A short text.", "Something rather different, and a good deal longer.", "Third."]


@pytest.fixture(scope="module")
def pretrained():
    return encoder.load_encoder()


@pytest.fixture(scope="module")
def tokenizer():
    return encoder.load_tokenizer()


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return encoder.tokenize(tokenizer, TEXTS, None, 48)


def test_loads_offline_and_without_pooler(pretrained):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not any("pooler" in name for name, _ in pretrained.named_parameters())
    assert pretrained.config.hidden_size == 384


def test_padding_changes_nothing(pretrained, tokens):
    model = encoder.SentenceEncoder(pretrained).eval()
    with torch.no_grad():
        together = model(tokens.batch([0, 1, 2]))
        alone = torch.cat([model(tokens.batch([row])) for row in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=-1), torch.ones(3))


def test_pretrained_vectors_mean_something(pretrained, tokenizer):
    texts = ["How do I read a file?", "Opening and reading files.", "The weather in Paris is mild."]
    model = encoder.SentenceEncoder(pretrained).eval()
    with torch.no_grad():
        vectors = model(encoder.tokenize(tokenizer, texts, None, 48).batch([0, 1, 2]))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_pairs_and_cutting(tokenizer):
    pairs = encoder.tokenize(tokenizer, ["one two"], ["three four"], 48)
    assert set(pairs.rows[0]["token_type_ids"]) == {0, 1}
    cut = encoder.tokenize(tokenizer, ["word " * 100], ["other " * 100], 20)
    assert len(cut.rows[0]["input_ids"]) == 20
    assert set(cut.rows[0]["token_type_ids"]) == {0, 1}


def test_batches_come_in_a_seeded_order():
    def epoch(seed, batches=3):
        draws = encoder.shuffled_indices(10, 3, seed)
        return [next(draws) for _ in range(batches)]

    assert epoch(0) == epoch(0) != epoch(1)
    first, second = epoch(0, 6)[:3], epoch(0, 6)[3:]
    for batches in (first, second):
        rows = [row for batch in batches for row in batch]
        assert len(set(rows)) == 9
    assert first != second
    assert len(next(encoder.shuffled_indices(2, 16, 0))) == 2


class TestClassifier:
    @pytest.fixture(scope="class")
    def model(self, pretrained):
        return encoder.SentenceClassifier(pretrained, 4, seed=0)

    def test_head_is_seeded(self, pretrained):
        heads = [encoder.SentenceClassifier(pretrained, 4, seed).head.weight for seed in (0, 0, 1)]
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])

    def test_evaluation_is_in_the_order_of_the_rows(self, model, tokens):
        logits = encoder.classifier_logits(model, tokens, batch_size=2)
        with torch.no_grad():
            alone = torch.cat([model.eval()(tokens.batch([row])) for row in range(3)])
        assert torch.allclose(logits, alone, atol=1e-5)
        labels = [int(logits[0].argmax()), int(logits[1].argmin()), int(logits[2].argmax())]
        measured = encoder.evaluate_classifier(model, tokens, labels)
        assert measured["accuracy"] == pytest.approx(2 / 3)
        by_hand = F.cross_entropy(logits, torch.tensor(labels)).item()
        assert measured["loss"] == pytest.approx(by_hand, rel=1e-5)

    def test_adapters_on_the_encoder_and_a_free_head(self):
        adapted = add_lora(encoder.SentenceClassifier(encoder.load_encoder(), 4), 4, 8, 0)
        trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
        heads = {name for name in trained if "head" in name}
        assert {name.rpartition(".")[2] for name in heads} == {"weight", "bias"}
        assert all("lora_" in name for name in trained - heads)
        assert len(trained) == 2 + 2 * 6 * 6
        assert not any("head" in name for name in linear_layers(adapted) if "lora" in name)


class TestSearchMeasures:
    def test_loss_of_indistinguishable_rows(self):
        same = F.normalize(torch.ones(5, 3), dim=-1)
        assert encoder.contrastive_loss(same, same).item() == pytest.approx(math.log(5), rel=1e-5)

    def test_perfect_and_reversed_order(self):
        rows = torch.eye(4)
        assert encoder.contrastive_loss(rows, rows).item() < 1e-6
        assert encoder.reciprocal_ranks(rows, rows).tolist() == [1, 1, 1, 1]
        assert encoder.reciprocal_ranks(rows, rows.flip(0)).tolist() == [0.25] * 4

    def test_ties_count_against_the_right_answer(self):
        same = F.normalize(torch.ones(5, 3), dim=-1)
        assert encoder.reciprocal_ranks(same, same).tolist() == pytest.approx([0.2] * 5)

    def test_evaluate_search(self, pretrained, tokenizer):
        queries = encoder.tokenize(tokenizer, TEXTS, None, 48)
        measured = encoder.evaluate_search(encoder.SentenceEncoder(pretrained), queries, queries)
        assert measured["mrr"] == 1.0
        assert measured["loss"] < 0.01
