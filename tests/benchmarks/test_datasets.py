"""Readers of users' files: what they give, and the one line they say when they cannot."""

import gzip

import pytest
import torch

from benchmarks.datasets import (
    LabelledTexts,
    few_shot,
    read_bytes_text,
    read_jsonl_text,
    read_labelled_tsv,
    split_rows,
)
from benchmarks.errors import DataFileError

SINGLE = 'label\ttext_a\nyes\tOne text.\nno\tIt\'s "another".\nyes\tA third.\n'
PAIRS = "label\ttext_a\ttext_b\n0\ta\tb\n1\tc\td\n"


def write(folder, name, content):
    path = folder / name
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["data.tsv", "data.tsv.gz"])
def test_single_texts(tmp_path, name):
    texts = read_labelled_tsv(write(tmp_path, name, SINGLE))
    assert texts.text_a == ["One text.", 'It\'s "another".', "A third."]
    assert texts.text_b is None
    assert texts.label_names == ["no", "yes"]
    assert texts.labels == [1, 0, 1]


def test_pairs_of_texts(tmp_path):
    texts = read_labelled_tsv(write(tmp_path, "data.tsv", PAIRS))
    assert (texts.text_a, texts.text_b) == (["a", "c"], ["b", "d"])
    assert len(texts) == 2


def test_windows_line_ends_byte_order_mark_and_odd_separators(tmp_path):
    content = "\ufefflabel\ttext_a\r\nx\tone\u2028line\x0chere\r\ny\ttwo\r\n"
    texts = read_labelled_tsv(write(tmp_path, "data.tsv", content))
    assert texts.text_a == ["one\u2028line\x0chere", "two"]


def test_labels_of_the_training_file(tmp_path):
    path = write(tmp_path, "dev.tsv", "label\ttext_a\nb\tx\n")
    assert read_labelled_tsv(path, ["b", "a"]).labels == [0]
    with pytest.raises(DataFileError, match=r"line 2: label 'b' is not one of the 2 known"):
        read_labelled_tsv(path, ["a", "c"])


BROKEN_TSV = {
    "empty": ("", "is empty"),
    "blank": ("\n\n", "is empty"),
    "header": ("text\tlabel\nx\ty\n", "line 1: the header must be label"),
    "no rows": ("label\ttext_a\n", "has a header but no rows"),
    "columns": ("label\ttext_a\nx\ta\ny\ta\tb\n", "line 3: has 3 column(s) where"),
    "blank line": ("label\ttext_a\nx\ta\n\ny\tb\n", "line 3: has 1 column(s) where"),
    "empty text": ("label\ttext_a\nx\ta\ny\t \n", "line 3: column text_a is empty"),
    "empty label": ("label\ttext_a\n\ta\n", "line 2: column label is empty"),
    "one label": ("label\ttext_a\nx\ta\nx\tb\n", "every row has the label 'x'"),
    "not utf-8": (b"label\ttext_a\nx\ta\ny\t\xff\n", "line 3: is not UTF-8: byte 0xff"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_TSV.values(), ids=BROKEN_TSV)
@pytest.mark.parametrize("name", ["data.tsv", "data.tsv.gz"])
def test_broken_tsv_is_one_clear_line(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(DataFileError) as caught:
        read_labelled_tsv(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", [read_labelled_tsv, read_bytes_text, read_jsonl_text])
class TestUnreadableFiles:
    def test_missing(self, tmp_path, reader):
        with pytest.raises(DataFileError, match="no such file"):
            reader(tmp_path / "missing.tsv")

    def test_folder(self, tmp_path, reader):
        with pytest.raises(DataFileError, match="cannot be read"):
            reader(tmp_path)

    def test_not_gzip(self, tmp_path, reader):
        (tmp_path / "data.gz").write_text(SINGLE)
        with pytest.raises(DataFileError, match="not a complete gzip file"):
            reader(tmp_path / "data.gz")

    def test_cut_off_gzip(self, tmp_path, reader):
        (tmp_path / "data.gz").write_bytes(gzip.compress(SINGLE.encode() * 50)[:-12])
        with pytest.raises(DataFileError, match="not a complete gzip file"):
            reader(tmp_path / "data.gz")

    def test_damaged_gzip(self, tmp_path, reader):
        content = bytearray(gzip.compress(SINGLE.encode() * 50))
        content[20:30] = bytes(10)
        (tmp_path / "data.gz").write_bytes(content)
        with pytest.raises(DataFileError, match="not a complete gzip file"):
            reader(tmp_path / "data.gz")

    def test_gzip_under_a_plain_name(self, tmp_path, reader):
        (tmp_path / "data.tsv").write_bytes(gzip.compress(SINGLE.encode()))
        with pytest.raises(DataFileError, match=r"its name must end in \.gz"):
            reader(tmp_path / "data.tsv")


def test_bytes_of_a_text(tmp_path):
    for name in ("a.txt", "a.txt.gz"):
        text = read_bytes_text(write(tmp_path, name, "né\n"))
        assert text.dtype == torch.uint8
        assert bytes(text.tolist()) == "né\n".encode()


def test_json_lines(tmp_path):
    content = '{"question": "Q1", "answer": "A1"}\n{"question": "Q2", "answer": "A2", "x": 1}\n'
    text = read_jsonl_text(write(tmp_path, "a.jsonl.gz", content))
    assert bytes(text.tolist()) == b"Q1\nA1\n\nQ2\nA2\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: has no string in the field 'question'"),
        ('{"question": "Q"}', "line 2: has no string in the field 'answer'"),
    ],
)
def test_broken_json_lines(tmp_path, line, message):
    path = write(tmp_path, "a.jsonl", f'{{"question": "Q", "answer": "A"}}\n{line}\n')
    with pytest.raises(DataFileError, match=message):
        read_jsonl_text(path)


def numbered(count):
    return LabelledTexts(
        [f"text {i}" for i in range(count)], None, [0, 1] * (count // 2), ["a", "b"]
    )


def test_split_is_deterministic_and_complete():
    texts = numbered(100)
    left, right = split_rows(texts, 0.8, seed=0)
    assert (len(left), len(right)) == (80, 20)
    assert sorted(left.text_a + right.text_a) == sorted(texts.text_a)
    assert split_rows(texts, 0.8, seed=0) == (left, right)
    assert split_rows(texts, 0.8, seed=1) != (left, right)


def test_split_keeps_equal_texts_together():
    texts = numbered(100)
    texts.text_a[10:30] = ["The Same  text"] * 10 + ["the same text"] * 10
    for seed in range(5):
        left, right = split_rows(texts, 0.5, seed)
        plain = [{" ".join(text.lower().split()) for text in part.text_a} for part in (left, right)]
        assert not plain[0] & plain[1]


def test_few_shot_takes_that_many_of_every_class():
    texts = numbered(50)
    drawn = few_shot(texts, 8, seed=0)
    assert [drawn.labels.count(label) for label in (0, 1)] == [8, 8]
    assert set(drawn.text_a) <= set(texts.text_a)
    assert few_shot(texts, 8, seed=0) == drawn
    assert few_shot(texts, 8, seed=1) != drawn
    assert len(few_shot(texts, 1000, seed=0)) == len(texts)
