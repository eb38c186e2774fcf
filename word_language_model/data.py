"""The text of a word language model: finding it, tokens, and batches of contiguous columns.

Words, the order of the vocabulary and the batches are those of the original's data.py and
main.py, so that a seed leads to the same run.
"""

from __future__ import annotations

import array
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from engine import files
from engine.cli import UserError
from engine.files import Named, writing
from word_language_model.settings import WIKITEXT

WIKITEXT_URL = (
    "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2"
)
# Size in bytes and git's name of the blob.
WIKITEXT_FILES = {
    "train": (10_797_148, "git:2d84b35af79e411d73ea7cae83c73964c6ac83b4"),
    "valid": (1_121_681, "git:eec944eb2d9e46061cd34a6913528797db6842fc"),
    "test": (1_256_449, "git:6f3fc88e4cd88456ea892971f9f12243e8428624"),
}
SAMPLE = Path("data/sample-text")
SAMPLE_PARTS = {"train": 0.8, "valid": 0.9, "test": 1.0}  # where each ends
END = "<eos>"


class Corpus(NamedTuple):
    """Tokens of the three parts, [length] of int64 positions in `vocabulary`."""

    root: Path
    vocabulary: list[str]
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor


def corpus_files(name: str) -> list[Named]:
    """All files that a command may read of the corpus `name`, a value of --data."""
    root = files.built_in(SAMPLE) if name == "sample" else Path(name)
    names = (name for part in WIKITEXT_FILES for name in (f"{part}.txt", f"wiki.{part}.tokens"))
    return [("--data", root / name) for name in names]


def load_corpus(name: str) -> Corpus:
    """Tokenise the corpus `name`, a value of --data. WikiText-2 and the sample are fetched or made.

    Words are what white space separates, and every line ends with one more, `<eos>`. They are
    numbered in the order of their first appearance. WikiText-2 takes 0.7 s.

    Raises:
        UserError: a missing folder or file; a failed download; a file that is empty, unreadable or
            not UTF-8 (its byte is named).
    """
    root = Path(name)
    if name == "sample":
        root = files.built_in(SAMPLE)
        if not root.exists():
            write_sample(root)
    if not root.is_dir() and root != WIKITEXT:
        what = "is a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"corpus {root}: {what} (try --data sample, the built-in one)")
    numbers: dict[str, int] = {}
    parts = []
    for path in [_find_part(root, part) for part in WIKITEXT_FILES]:
        words = _read(path).replace("\n", f" {END} ").split()
        for word in dict.fromkeys(words):
            numbers.setdefault(word, len(numbers))
        tokens = array.array("q", map(numbers.__getitem__, words))
        parts.append(torch.frombuffer(tokens, dtype=torch.int64))  # a list would take twice as long
    return Corpus(root, list(numbers), *parts)


def _find_part(root: Path, part: str) -> Path:
    plain, published = root / f"{part}.txt", root / f"wiki.{part}.tokens"
    for path in (plain, published):
        if path.is_file():
            return path
    if root != WIKITEXT:
        raise UserError(f"corpus {root}: has neither {plain.name} nor {published.name}")
    size, digest = WIKITEXT_FILES[part]
    url = f"{WIKITEXT_URL}/{plain.name}"
    print(f"=> downloading {url} to {plain}", flush=True)
    try:
        files.download(url, plain, size=size, digest=digest)
    except UserError as error:
        raise UserError(
            f"{plain} is missing and cannot be downloaded ({error}): put it there by hand, name "
            "another folder with --data, or try the built-in corpus: --data sample"
        ) from error
    return plain


def write_sample(root: Path) -> None:
    """Write Python's own language reference as a corpus of 120,000 to 140,000 words with <eos>.

    Raises:
        UserError: when the folder cannot be written.
    """
    from pydoc_data.topics import topics  # half a megabyte that no other corpus needs

    text = "\n".join(topics[name] for name in sorted(topics))
    lines = [" ".join(re.findall(r"\w+|[^\w\s]", line)) for line in text.splitlines()]
    lines = [line for line in lines if line]
    with writing(root) as temporary:
        temporary.mkdir()
        start = 0
        for part, end in SAMPLE_PARTS.items():
            stop = round(end * len(lines))
            content = "".join(f"{line}\n" for line in lines[start:stop])
            (temporary / f"{part}.txt").write_text(content, encoding="utf-8")
            start = stop


def _read(path: Path) -> str:
    """The text of a file, every line ended by \\n; the file may have \\r\\n or \\r."""
    try:
        # Decoded at once: a stream would count a bad byte's place from its last buffer.
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")  # a byte-order mark
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{path}: byte {error.start} (0x{byte:02x}) is not UTF-8: convert the file"
        ) from error
    if not text:
        raise UserError(f"{path}: is empty")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if text.endswith("\n") else f"{text}\n"


def identity(tokens: torch.Tensor) -> str:
    """A fingerprint of a text [length]."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:24]


def batchify(tokens: torch.Tensor, columns: int, part: str) -> torch.Tensor:
    """Cut [length] into contiguous columns, [length // columns, columns]; the rest is dropped.

    Raises:
        UserError: when the columns would be too short to predict a single word.
    """
    rows = len(tokens) // columns
    if rows < 2:
        raise UserError(
            f"the {part} text has {len(tokens)} words, too few for {columns} columns of two: use "
            f"a longer text{' or a smaller --batch-size' if part == 'train' else ''}"
        )
    return tokens[: rows * columns].view(columns, rows).t().contiguous()


def segments(
    data: torch.Tensor, bptt: int, first: int = 0
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (step, tokens [t, columns], targets [t * columns]) from step `first` on.

    Targets are the next tokens. t is `bptt`, and the rest of the text in the last segment.
    """
    for step in range(first, segment_count(data, bptt)):
        start = step * bptt
        stop = min(start + bptt, len(data) - 1)
        yield step, data[start:stop], data[start + 1 : stop + 1].reshape(-1)


def segment_count(data: torch.Tensor, bptt: int) -> int:
    return -(-(len(data) - 1) // bptt)
