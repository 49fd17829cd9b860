"""The standard library's texts: what is in them, and that nothing is on two sides of a split."""

import collections
import re
import sys

import pytest

from benchmarks import near_duplicates, stdlib_source, stdlib_texts
from benchmarks.near_duplicates import normalised


def as_text(tensor):
    return bytes(tensor.tolist()).decode("utf-8", "replace")


def word_sets(texts):
    return [frozenset(normalised(text).split()) for text in texts]


def largest_similarity(left, right):
    """Largest Jaccard similarity between the sides, by brute force."""
    best = 0.0
    right = word_sets(right)
    for words in word_sets(left):
        for other in right:
            if len(words) > 0.5 * len(other) and len(other) > 0.5 * len(words):
                best = max(best, len(words & other) / len(words | other))
    return best


class TestNearDuplicates:
    def test_groups(self):
        texts = [
            "Return the size of the write buffer now.",
            "Return the size of the read buffer now.",
            "Something else entirely, about turtles.",
            "return the SIZE of the\nwrite buffer now",
        ]
        groups = near_duplicates.groups(texts)
        assert groups[0] == groups[1] == groups[3] != groups[2]

    def test_links_are_followed(self):
        words = [f"w{'abcdefghijklmnop'[i]}" for i in range(14)]
        chain = [" ".join(words[start : start + 10]) for start in range(4)]
        assert near_duplicates.similarities(chain)[0, 3] < near_duplicates.SIMILARITY
        assert len(set(near_duplicates.groups(chain))) == 1

    def test_similarity_is_the_share_of_common_words(self):
        measured = near_duplicates.similarities(["a b c", "b c d e", "x"])
        assert measured[0, 1] == pytest.approx(2 / 5)
        assert measured[0, 2] == 0
        assert measured[1, 1] == pytest.approx(1)

    def test_texts_without_words_are_nobody_s_duplicates(self):
        assert len(set(near_duplicates.groups(["...", "!!!", "a word"]))) == 3
        assert near_duplicates.groups([]) == []


class TestSource:
    def test_nothing_is_imported(self):
        assert "turtle" in {stdlib_source.module_of(path) for path in stdlib_source.files()}
        assert stdlib_source.read("turtle.py").docstrings
        assert "turtle" not in sys.modules

    def test_functions_have_their_parameters(self):
        functions = {f.name: f for f in stdlib_source.read("json/__init__.py").functions}
        assert functions["json.dumps"].parameters.startswith("obj, *, skipkeys=False")
        methods = {f.name: f for f in stdlib_source.read("tarfile.py").functions}
        assert methods["tarfile.TarFile.add"].parameters.startswith("name, arcname=None")

    def test_code_has_neither_docstrings_nor_comments(self):
        source = stdlib_source.read("textwrap.py")
        assert "def wrap(" in source.code
        assert source.docstrings
        for docstring in source.docstrings:
            assert docstring.splitlines()[0] not in source.code
        assert not re.search(r"^\s*#", source.code, re.MULTILINE)

    def test_nothing_of_this_machine(self):
        assert not any(
            path.startswith(("_sysconfigdata", "site-packages")) for path in stdlib_source.files()
        )


class TestClassification:
    @pytest.fixture(scope="class")
    def splits(self):
        return stdlib_texts.docstring_classification(0)

    def test_sizes(self, splits):
        sizes = [len(part) for part in (splits.train, splits.validation, splits.heldout)]
        assert sum(sizes) > 1800
        for size, share in zip(sizes, stdlib_texts.SHARES, strict=True):
            assert size / sum(sizes) == pytest.approx(share, abs=0.02)

    def test_twelve_classes_on_every_side(self, splits):
        for part in (splits.train, splits.validation, splits.heldout):
            assert part.label_names == list(stdlib_texts.MODULES)
            assert set(part.labels) == set(range(12))
        assert min(collections.Counter(splits.train.labels).values()) >= 50

    def test_no_near_duplicates_on_two_sides(self, splits):
        rest = splits.train.text_a + splits.validation.text_a
        assert largest_similarity(splits.heldout.text_a, rest) < near_duplicates.SIMILARITY
        assert (
            largest_similarity(splits.validation.text_a, splits.train.text_a)
            < near_duplicates.SIMILARITY
        )

    def test_no_text_in_two_modules_or_twice(self, splits):
        parts = (splits.train, splits.validation, splits.heldout)
        texts = [normalised(text) for part in parts for text in part.text_a]
        assert len(set(texts)) == len(texts)

    def test_module_names_are_cut_out(self, splits):
        assert stdlib_texts.without_module_names("An Email for asyncio.") == "An module for module."
        assert stdlib_texts.without_module_names("emails, logging_x") == "emails, module_x"
        for text, label in zip(splits.heldout.text_a, splits.heldout.labels, strict=True):
            name = splits.heldout.label_names[label].strip("_")
            assert not re.search(rf"(?<![a-z]){name}(?![a-z])", text, re.IGNORECASE)

    def test_deterministic_and_different_by_seed(self, splits):
        assert stdlib_texts.docstring_classification(0) == splits
        assert stdlib_texts.docstring_classification(1) != splits


@pytest.mark.parametrize("make", [stdlib_texts.english_text, stdlib_texts.source_code_text])
class TestLanguageModelTexts:
    def test_sizes(self, make):
        split = make()
        assert 1_000_000 < len(split.train) <= stdlib_texts.TEXT_CAP
        assert 50_000 < len(split.heldout) <= stdlib_texts.TEXT_CAP // 10

    def test_no_paragraph_on_both_sides(self, make):
        split = make()
        sides = []
        for text in (as_text(split.train), as_text(split.heldout)):
            keys = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
            sides.append({key for key in keys if len(key) >= stdlib_texts.REPEAT_FROM})
        assert len(sides[1]) > 500
        assert not sides[0] & sides[1]

    def test_same_bytes_again(self, make):
        first = make()
        make.cache_clear()
        again = make()
        assert first.train.equal(again.train)
        assert first.heldout.equal(again.heldout)


def test_docstrings_are_not_in_the_source_code_text():
    english, code = stdlib_texts.english_text(), stdlib_texts.source_code_text()
    english_lines = set(as_text(english.train).splitlines()) | set(
        as_text(english.heldout).splitlines()
    )
    sentences = {line.strip() for line in english_lines if len(line.split()) >= 8}
    lines = [
        line.strip() for part in (code.train, code.heldout) for line in as_text(part).splitlines()
    ]
    assert sum(line in sentences for line in lines) < 0.001 * len(lines)


class TestSearch:
    @pytest.fixture(scope="class")
    def splits(self):
        return stdlib_texts.search_pairs(0)

    def test_sizes(self, splits):
        assert len(splits.train) > 3000
        assert len(splits.choose) + len(splits.report) >= 500
        assert abs(len(splits.choose) - len(splits.report)) <= stdlib_texts.LARGEST_UNSEEN

    def test_modules_are_on_one_side(self, splits):
        sides = [set(part.modules) for part in (splits.train, splits.choose, splits.report)]
        assert not sides[0] & sides[1]
        assert not sides[0] & sides[2]
        assert not sides[1] & sides[2]

    def test_no_near_duplicates_on_two_sides(self, splits):
        rest = splits.train.summaries + splits.choose.summaries
        assert largest_similarity(splits.report.summaries, rest) < near_duplicates.SIMILARITY
        assert (
            largest_similarity(splits.choose.summaries, splits.train.summaries)
            < near_duplicates.SIMILARITY
        )

    def test_pairs_look_as_they_should(self, splits):
        parts = (splits.train, splits.choose, splits.report)
        pairs = {
            s: t for part in parts for s, t in zip(part.signatures, part.summaries, strict=True)
        }
        signature = next(s for s in pairs if s.startswith("json.dumps("))
        assert signature.startswith("json.dumps(obj, *, skipkeys=False")
        assert pairs[signature] == "Serialize ``obj`` to a JSON formatted ``str``."

    def test_deterministic_and_different_by_seed(self, splits):
        assert stdlib_texts.search_pairs(0) == splits
        assert set(stdlib_texts.search_pairs(1).report.modules) != set(splits.report.modules)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One line", "One line"),
        ("First part\ngoes on. Second.\n\nMore.", "First part goes on."),
        ("Title\n\nText.", "Title"),
        ("Uses e.g. this and i.e. that. Then more.", "Uses e.g. this and i.e. that."),
        ("Is it? Yes.", "Is it?"),
    ],
)
def test_first_sentence(docstring, sentence):
    assert stdlib_texts.first_sentence(docstring) == sentence
