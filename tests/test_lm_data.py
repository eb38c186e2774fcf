"""Tokens, vocabulary and batches follow the original's rules; files are found or made."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from kit import REAL_DATA, make_corpus

from engine import files
from engine.cli import UserError
from word_language_model import data as lm_data
from word_language_model.settings import WIKITEXT

REAL = REAL_DATA / "wikitext-2-small"


def write(root: Path, train: bytes, valid: bytes = b"a\n", test: bytes = b"a\n") -> Path:
    root.mkdir(parents=True)
    for name, content in (("train", train), ("valid", valid), ("test", test)):
        (root / f"{name}.txt").write_bytes(content)
    return root


def test_words_are_numbered_by_first_appearance_in_train_valid_test(tmp_path: Path) -> None:
    write(tmp_path / "set", b"b a b\n\n  c\n", b"d a\n", "é b <eos>\n".encode())
    corpus = lm_data.load_corpus(str(tmp_path / "set"))
    assert corpus.vocabulary == ["b", "a", "<eos>", "c", "d", "é"]
    assert corpus.train.tolist() == [0, 1, 0, 2, 2, 3, 2]  # an empty line is an <eos>
    assert corpus.valid.tolist() == [4, 1, 2]
    assert corpus.test.tolist() == [5, 0, 2, 2]
    assert corpus.train.dtype == torch.int64


def test_lines_end_where_python_ends_them(tmp_path: Path) -> None:
    """\\r and \\r\\n do; a form feed or a line separator is white space within a line."""
    write(tmp_path / "set", "a\r\nb\rc\x0cd\u2028e\x1cf\n\ng".encode())
    corpus = lm_data.load_corpus(str(tmp_path / "set"))
    words = " ".join(corpus.vocabulary[i] for i in corpus.train)
    assert words == "a <eos> b <eos> c d e f <eos> <eos> g <eos>"


def test_a_byte_order_mark_is_no_part_of_a_word(tmp_path: Path) -> None:
    root = write(tmp_path / "set", b"\xef\xbb\xbfone two\n", b"\xef\xbb\xbftwo\n")
    corpus = lm_data.load_corpus(str(root))
    assert corpus.vocabulary == ["one", "two", "<eos>", "a"]
    assert corpus.valid.tolist() == [1, 2]


def test_columns_and_segments() -> None:
    """The alphabet in four columns, read two rows at a time; y and z do not fit."""
    data = lm_data.batchify(torch.arange(26), 4, "train")
    assert data.tolist() == [[row + 6 * column for column in range(4)] for row in range(6)]
    found = [(n, x.tolist(), y.tolist()) for n, x, y in lm_data.segments(data, 2)]
    assert found[0] == (0, [[0, 6, 12, 18], [1, 7, 13, 19]], [1, 7, 13, 19, 2, 8, 14, 20])
    assert found[2] == (2, [[4, 10, 16, 22]], [5, 11, 17, 23])  # the last, short one is kept
    assert len(found) == lm_data.segment_count(data, 2) == 3
    assert [n for n, _, _ in lm_data.segments(data, 2, first=1)] == [1, 2]
    assert lm_data.segment_count(data, 5) == 1
    with pytest.raises(UserError, match="the train text has 7 words, too few for 4 columns of two"):
        lm_data.batchify(torch.arange(7), 4, "train")


def test_wikitexts_own_file_names_are_found(tmp_path: Path) -> None:
    root = make_corpus(tmp_path / "set")
    plain = lm_data.load_corpus(str(root))
    for part in ("train", "valid", "test"):
        (root / f"{part}.txt").rename(root / f"wiki.{part}.tokens")
    assert torch.equal(lm_data.load_corpus(str(root)).train, plain.train)


def test_the_default_corpus_is_fetched_file_by_file_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transfer itself is tested in test_files.py; here copies stand for it."""
    monkeypatch.chdir(tmp_path)
    made = make_corpus(tmp_path / "made")
    calls = []

    def fetch(url: str, path: Path, *, size: int, digest: str) -> None:
        calls.append((url.rsplit("/", 5)[1:], size, digest[:10]))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made / path.name, path)

    monkeypatch.setattr(files, "download", fetch)
    WIKITEXT.mkdir(parents=True)
    shutil.copyfile(made / "valid.txt", WIKITEXT / "valid.txt")
    corpus = lm_data.load_corpus(str(WIKITEXT))
    assert torch.equal(corpus.train, lm_data.load_corpus(str(made)).train)
    folder = ["main", "word_language_model", "data", "wikitext-2"]
    assert calls == [
        ([*folder, "train.txt"], 10_797_148, "git:2d84b3"),
        ([*folder, "test.txt"], 1_256_449, "git:6f3fc8"),
    ]


@pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")
def test_the_blob_ids_are_wikitexts() -> None:
    """The small corpus has WikiText-2's test text as its training text."""
    content = (REAL / "train.txt").read_bytes()
    size, digest = lm_data.WIKITEXT_FILES["test"]
    assert len(content) == size
    assert digest == f"git:{hashlib.sha1(b'blob %d' % size + bytes(1) + content).hexdigest()}"


@pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")
def test_the_figures_of_real_text() -> None:
    corpus = lm_data.load_corpus(str(REAL))
    assert (len(corpus.train), len(corpus.vocabulary)) == (245_569, 18_328)
    assert lm_data.batchify(corpus.train, 20, "train").shape == (12_278, 20)


def test_the_sample_is_a_corpus_of_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = lm_data.load_corpus("sample")
    text = [(lm_data.SAMPLE / f"{part}.txt").read_bytes() for part in ("train", "valid", "test")]
    lengths = [len(tokens) for tokens in corpus[2:]]
    assert sum(lengths) > 100_000
    assert lengths[0] / sum(lengths) == pytest.approx(0.8, abs=0.1)  # 0.75 with Python 3.13's
    assert {"statement", "the", "(", "<eos>"} <= set(corpus.vocabulary)
    shutil.rmtree(lm_data.SAMPLE)
    lm_data.write_sample(lm_data.SAMPLE)
    again = [(lm_data.SAMPLE / f"{part}.txt").read_bytes() for part in ("train", "valid", "test")]
    assert text == again
