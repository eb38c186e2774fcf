"""Text is written word by word, at a cost that does not grow, as its user runs it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kit import KIT, error_line, make_corpus, run

import lm_generate
from lm_generate import Reader
from word_language_model import checkpoint as lm_checkpoint
from word_language_model import model as lm_model
from word_language_model.settings import MODELS, RECURRENT

WORDS, BPTT = 40, 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of an epoch: <model>.pt for each of the six."""
    folder = tmp_path_factory.mktemp("models")
    make_corpus(folder / "set")
    size = ("--emsize", 8, "--nhid", 8, "--batch_size", 4, "--bptt", BPTT)
    for model in MODELS:
        flags = ("--model", model, "--data", "set", *size, "--lr", 1, "--epochs", 1)
        assert run("lm_main.py", *flags, "--save", f"{model}.pt", cwd=folder).code == 0
    return folder


@pytest.fixture(autouse=True)
def mkldnn() -> Iterator[None]:
    """A `Reader` switches oneDNN off for its process, and so for the tests after it."""
    yield
    torch.backends.mkldnn.set_flags(True)


def generate(folder: Path, model: str, *flags: object, outf: str = "text") -> str:
    flags = ("--checkpoint", f"{model}.pt", "--outf", outf, *flags)
    result = run("lm_generate.py", *flags, cwd=folder)
    assert result.code == 0, result
    return result.out if outf == "-" else (folder / outf).read_text()


@pytest.mark.parametrize("model", ["LSTM", "Transformer"])
def test_a_seed_writes_its_text_twenty_words_a_line(models: Path, model: str) -> None:
    text = generate(models, model, "--words", 50)
    lines = text.split("\n")
    assert [len(line.split(" ")) for line in lines] == [20, 20, 10, 1]
    assert lines[-1] == ""
    vocabulary = lm_checkpoint.load(models / f"{model}.pt")["vocabulary"]
    assert set(text.split()) <= set(vocabulary)
    assert generate(models, model, "--words", 50, "--data", "nowhere") == text
    assert generate(models, model, "--words", 50, "--cuda", "--model", model, outf="-") == text
    assert generate(models, model, "--words", 50, "--seed", 2) != text


def test_progress_is_reported_as_the_original_does(models: Path) -> None:
    flags = ("--checkpoint", "GRU.pt", "--words", 25, "--log-interval", 10)
    result = run("lm_generate.py", *flags, cwd=models)
    progress = "".join(f"| Generated {i}/25 words\n" for i in (0, 10, 20))
    assert result.out == f"{progress}=> generated.txt\n"
    piped = run("lm_generate.py", *flags, "--outf", "-", cwd=models)
    assert piped.err == progress
    assert piped.out == (models / "generated.txt").read_text()


def test_a_long_text(models: Path) -> None:
    """More words than the Transformer has positions."""
    text = generate(models, "Transformer", "--words", 6000)
    assert len(text.split()) == 6000
    assert text.count("\n") == 300


@pytest.mark.parametrize("model", MODELS)
def test_reading_word_by_word_equals_one_pass_over_the_context(models: Path, model: str) -> None:
    """The context of an RNN is all that it read, the others' the last `BPTT` words."""
    path = models / f"{model}.pt"
    built, _ = lm_checkpoint.restore_model(lm_checkpoint.load(path))
    reader = Reader(built, window=BPTT)
    text = torch.randint(WORDS, (4 * BPTT,)).tolist()
    for length in range(1, len(text) + 1):
        logits = reader.read(text[length - 1 : length])
        context = text[:length] if model in RECURRENT else text[:length][-BPTT:]
        with torch.no_grad():
            features, _ = built.features(torch.tensor(context)[:, None], built.initial_hidden(1))
            expected = built.decoder(features)[-1, 0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert len(reader.context) <= BPTT  # or the cost of a word would grow
    prompted = Reader(built, window=BPTT).read(text)
    torch.testing.assert_close(prompted, logits, rtol=0, atol=1e-5)


def test_the_transformer_sees_its_window_and_nothing_before_it(models: Path) -> None:
    path = models / "Transformer.pt"
    built, _ = lm_checkpoint.restore_model(lm_checkpoint.load(path))
    text = list(range(2 * BPTT))
    logits = Reader(built, window=BPTT).read(text)
    for place in range(len(text)):
        changed = [*text[:place], 39, *text[place + 1 :]]
        other = Reader(built, window=BPTT).read(changed)
        assert torch.equal(logits, other) == (place < len(text) - BPTT), place


def test_the_likeliest_word_alone_follows_a_prompt(models: Path) -> None:
    path = models / "LSTM.pt"
    content = lm_checkpoint.load(path)
    built, vocabulary = lm_checkpoint.restore_model(content)
    reader = Reader(built, window=BPTT)
    words = [vocabulary.index("word3"), vocabulary.index("word7")]
    expected = []
    for _ in range(9):
        words = [int(reader.read(words).argmax())]
        expected.append(vocabulary[words[0]])
    for flags in (("--top-k", 1), ("--temperature", 1e-3)):
        text = generate(models, "LSTM", "--words", 9, "--prompt", "word3 word7", *flags)
        assert text.split() == ["word3", "word7", *expected]
    assert generate(models, "LSTM", "--top-k", 999) == generate(models, "LSTM")


def test_words_are_drawn_as_often_as_they_are_likely() -> None:
    class Fixed(Reader):
        def __init__(self) -> None:
            pass

        def read(self, words: list[int]) -> torch.Tensor:
            return torch.tensor([0, 0.4, 0.1, 0, 0.5, 0]).log()

    count = 20_000
    for temperature, expected in ((1.0, [0.4, 0.1, 0.5]), (0.5, [0.16, 0.01, 0.25])):
        args = lm_generate.make_parser().parse(
            ["--words", str(count), "--temperature", str(temperature)]
        )
        generator = torch.Generator().manual_seed(0)
        drawn = torch.tensor(list(lm_generate.generate(Fixed(), [0], generator, args)))
        found = drawn.bincount(minlength=6) / count
        assert found[[0, 3, 5]].sum() == 0
        shares = torch.tensor(expected) / sum(expected)
        torch.testing.assert_close(found[[1, 2, 4]], shares, rtol=0, atol=0.02)


def test_unknown_words_of_a_prompt_are_named(models: Path) -> None:
    flags = ("--checkpoint", "GRU.pt", "--words", 9, "--outf", "-", "--prompt")
    result = run("lm_generate.py", *flags, "word3 colourless green", cwd=models)
    assert result.code == 0
    assert "=> not in the vocabulary, left out: colourless green\n" in result.err
    assert run("lm_generate.py", *flags, "word3", cwd=models).out == result.out
    content = torch.load(models / "GRU.pt", weights_only=True)
    content["vocabulary"][content["vocabulary"].index("word9")] = "<unk>"
    torch.save(content, models / "unk.pt")
    flags = ("--checkpoint", "unk.pt", *flags[2:])
    result = run("lm_generate.py", *flags, "word3 green", cwd=models)
    assert "=> not in the vocabulary, read as <unk>: green\n" in result.err
    assert run("lm_generate.py", *flags, "word3 <unk>", cwd=models).out == result.out


def test_a_reader_that_has_enough_ends_it_quietly(models: Path) -> None:
    command = f"{sys.executable} {KIT / 'lm_generate.py'} --checkpoint GRU.pt --outf - --words 9999"
    done = subprocess.run(
        f"{command} | head -n 1", shell=True, cwd=models, capture_output=True, text=True
    )
    assert len(done.stdout.split()) == 20
    assert "Traceback" not in done.stderr


class RNNModel(torch.nn.Module):
    """As the original pickles it: a module, whose class is code."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = torch.nn.Dropout(0.2)
        self.encoder = torch.nn.Embedding(WORDS, 8)
        self.rnn = torch.nn.GRU(8, 8, 3)
        self.decoder = torch.nn.Linear(8, WORDS)
        self.rnn_type, self.nhid, self.nlayers = "GRU", 8, 3


def test_a_model_of_the_original_is_refused_and_can_be_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = RNNModel()
    torch.save(module, tmp_path / "model.pt")
    line = error_line(run("lm_generate.py", cwd=tmp_path))
    assert "model.pt: holds a pickled module, which is code" in line
    # What the line says to run, in the original's folder, with a stand-in for its data.py.
    recipe = line[line.index('-c "') + 4 : line.rindex('"')]
    (tmp_path / "data.py").write_text(
        "class Corpus:\n    def __init__(self, path):\n        self.dictionary = self\n"
        f"        self.idx2word = [f'word{{i}}' for i in range({WORDS})]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    exec(recipe, {})
    flags = ("--checkpoint", "resaved.pt", "--words", 9, "--outf", "-")
    result = run("lm_generate.py", *flags, cwd=tmp_path)
    assert result.code == 0, result
    assert len(result.out.split()) == 9
    again, _ = lm_checkpoint.restore_model(lm_checkpoint.load(Path("resaved.pt")))
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_bad_input_is_one_line_and_touches_nothing(models: Path) -> None:
    (models / "text").write_text("before")
    content = torch.load(models / "Transformer.pt", weights_only=True)
    torch.save({**content, "nhead": 3}, models / "heads.pt")
    content["state_dict"]["decoder.weight"][3] = torch.nan
    torch.save(content, models / "nan.pt")
    torch.save({"arch": "resnet18", "state_dict": {"a": torch.ones(2)}}, models / "image.pt")
    cases: dict[tuple[object, ...], str] = {
        ("--temperature", 0.0009): "--temperature: must be at least 1e-3, not 0.0009",
        ("--temperature", "nan"): "--temperature: must be at least 1e-3, not nan",
        ("--words", 0): "--words: must be at least 1",
        ("--top-k", 0): "--top-k: must be at least 1",
        ("--model", "LSTM", "--checkpoint", "GRU.pt"): "GRU.pt: holds a GRU, not a LSTM",
        ("--checkpoint", "none.pt"): "no checkpoint none.pt: train one with lm_main.py",
        ("--checkpoint", "image.pt"): "image.pt: holds the image model resnet18",
        ("--checkpoint", "heads.pt"): "heads.pt: --emsize 8 cannot be divided by --nhead 3",
        ("--checkpoint", "nan.pt"): "nan.pt: its weights give no finite likelihoods",
        ("--checkpoint", "GRU.pt", "--outf", "set"): "--outf set: is a directory",
        ("--checkpoint", "GRU.pt", "--outf", "text/x"): "cannot write to text/x: File exists",
    }
    for flags, message in cases.items():
        options = () if "--outf" in flags else ("--outf", "text")
        line = error_line(run("lm_generate.py", *options, *flags, cwd=models))
        assert message in line, (flags, line)
    assert (models / "text").read_text() == "before"


def test_the_window_is_the_one_that_it_was_trained_on(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = []

    class Spy(Reader):
        def __init__(self, model: lm_model.LanguageModel, window: int) -> None:
            windows.append(window)
            super().__init__(model, window)

    monkeypatch.setattr(lm_generate, "Reader", Spy)
    monkeypatch.chdir(models)
    lm_generate.main(["--checkpoint", "Transformer.pt", "--words", "7"])
    assert windows == [BPTT]
