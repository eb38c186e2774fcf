"""How far back models look, found for models whose answer is known by construction."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kit import launch, make_corpus, run
from torch import nn

import lm_context
from engine.cli import UserError
from engine.launch import build_accelerator
from lm_context import Context, Estimate, estimate, findings, measure, predict
from word_language_model.data import load_corpus
from word_language_model.model import (
    ConvolutionalModel,
    Hidden,
    LanguageModel,
    RecurrentModel,
    build_model,
)
from word_language_model.settings import ModelSpec

WORDS, BACK = 11, 4
SPEC = ModelSpec("CNN", WORDS, 8, 8, nlayers=2, nhead=2, tied=False)


def measured(model: LanguageModel, text: torch.Tensor, most: int = 9) -> Context:
    places = torch.arange(most, len(text))
    return measure(build_accelerator(), model, "it", text, places, most)


def echo(length: int = 400) -> torch.Tensor:
    """A text in which every word is the one BACK places before it, but for some."""
    text = torch.randint(WORDS, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in range(BACK, length):
        if place % 10:
            text[place] = text[place - BACK]
    return torch.tensor(text)


def test_a_convolution_that_looks_one_place_up_needs_exactly_that_place() -> None:
    built = build_model(SPEC._replace(emsize=WORDS, nhid=WORDS + 1, nlayers=1), dropout=0.0)
    assert isinstance(built, ConvolutionalModel)
    layer = built.layers[0]
    assert isinstance(layer, nn.Conv1d) and layer.bias is not None
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
        built.encoder.weight.copy_(torch.eye(WORDS))
        layer.weight[:WORDS, :, -BACK] = torch.eye(WORDS)
        layer.bias[WORDS + 1 :] = 9.0  # the gates are open
        built.decoder.weight[:, :WORDS] = 5 * torch.eye(WORDS)
    found = measured(built, echo())
    assert list(found.visible) == [1, 2, 4, 8, 9]
    chance = torch.tensor(WORDS).log()
    for n in (1, 2):
        torch.testing.assert_close(found.visible[n], chance.double().expand(391), check_dtype=False)
    assert found.visible[4].mean() < chance / 2
    assert torch.equal(found.visible[4], found.visible[9])
    assert found.effective == (BACK, BACK, BACK)
    assert found.receptive_field == BACK
    assert found.window == 9 and [*found.shuffled] == [1, 2, 4]
    assert torch.equal(found.shuffled[4], found.visible[9])  # the one word is in its place
    for k in (1, 2):  # else it seldom is
        assert found.disorder(k).value > chance / 2
        assert found.disorder(k).real


@pytest.mark.parametrize("kind", ["RNN_TANH", "CNN"])
def test_a_bigram_model_looks_at_one_word(kind: str) -> None:
    built = build_model(SPEC._replace(model=kind, kernel_size=1), dropout=0.0)
    for name, parameter in built.named_parameters():
        nn.init.normal_(parameter)
        if "weight_hh" in name:
            nn.init.zeros_(parameter)
    found = measured(built, echo(100))
    assert found.effective == (1, 1, 1)
    for losses in [*found.visible.values(), *found.shuffled.values()]:
        torch.testing.assert_close(losses, found.visible[1])


def test_a_shuffle_leaves_the_last_words_in_order_and_loses_none() -> None:
    class Reader(LanguageModel):
        """Keeps what it is given to read."""

        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(1, WORDS)
            self.read: list[torch.Tensor] = []

        def features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
            self.read.append(tokens)
            return tokens[..., None].float(), hidden

    reader, text, places = Reader(), torch.arange(99) % 7, torch.arange(40, 70)
    found = measure(build_accelerator(), reader, "it", text, places, 40)
    assert found.window == 32 and [*found.shuffled] == [1, 2, 4, 8, 16]
    whole = reader.read[5]
    for k, read in zip(found.shuffled, reader.read[7:], strict=True):
        assert read.shape == whole.shape == (32, 30)
        assert torch.equal(read[-k:], whole[-k:])
        assert torch.equal(read.sort(0).values, whole.sort(0).values)
        assert (read[:-k] != whole[:-k]).any(0).all()
        assert len({tuple(column) for column in read.t().tolist()}) == 30


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_an_rnn_starts_from_zeros_as_many_words_back_as_are_visible(kind: str) -> None:
    built = build_model(SPEC._replace(model=kind), dropout=0.0)
    assert isinstance(built, RecurrentModel)
    text, place = echo(50), 30
    for length in (1, 3, 7):
        loss = predict(built, text, torch.tensor([place, 40]), length, torch.zeros(0, 2).long())
        output, _ = built.rnn(built.encoder(text[place - length : place]))
        expected = F.cross_entropy(built.decoder(output[-1]), text[place])
        torch.testing.assert_close(loss[0], expected)


def noise(mean: float, spread: float = 0.1, words: int = 400, seed: int = 0) -> torch.Tensor:
    """Losses of so many words, with that mean."""
    drawn = torch.randn(words, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return mean + spread * (drawn - drawn.mean())


def test_an_estimate_is_the_mean_and_its_standard_error() -> None:
    losses = noise(2.0, words=100)
    assert estimate(losses) == pytest.approx((2.0, losses.std().item() / 10))
    # The error of means of stretches is true where neighbours are alike: 8 equal ones count once.
    assert estimate(losses.repeat_interleave(8)) == pytest.approx(estimate(losses))
    assert str(Estimate(-0.0514, 0.02)) == "-0.051 ± 0.020"
    assert [Estimate(value, 0.1).real for value in (0.21, -0.21, 0.19, -0.19)] == [True] * 2 + [
        False
    ] * 2
    assert not Estimate(0.0, 0.0).real


def test_equal_models_seldom_seem_different() -> None:
    """Differences of mean zero, in which three neighbours are always alike."""
    drawn = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    pairs = drawn.repeat_interleave(3, dim=1)
    assert 5 <= sum(estimate(pair).real for pair in pairs) <= 24  # of 300; one in twenty is 15


def context(
    name: str, means: dict[int, float], spread: float = 0.1, seed: int = 0, **more: Any
) -> Context:
    """One whose losses vary independently for every number of words."""
    visible = {n: noise(mean, spread, seed=seed + n) for n, mean in means.items()}
    return Context(name, visible, **{"shuffled": {}, "window": 4, "receptive_field": 0, **more})


def test_the_effective_context_comes_within_one_percent_of_the_lowest_loss() -> None:
    assert context("it", {1: 4.0, 2: 2.03, 4: 2.015, 8: 2.0}, 0.01).effective == (4, 4, 4)
    # The last loss is not the lowest: what comes near it does not count.
    assert context("it", {1: 4.0, 2: 2.03, 4: 2.0, 8: 2.03}, 0.01).effective == (4, 4, 4)
    # Means with a standard error of 0.01 leave open which of 2.03 and 2.015 are below 2.02.
    assert context("it", {1: 4.0, 2: 2.03, 4: 2.015, 8: 2.0}, 0.2).effective == (4, 2, 8)
    assert context("it", {1: 2.0, 2: 2.0}, 0.0).effective == (1, 1, 1)


def test_the_findings_are_those_of_the_figures() -> None:
    def shuffled(c: Context, rises: dict[int, float], spread: float = 0.1) -> Context:
        basis = c.visible[c.window]
        return c._replace(shuffled={k: basis + noise(r, spread) for k, r in rises.items()})

    transformer = context("Transformer", {1: 6.5, 4: 6.1, 5: 6.2})
    cnn = context("CNN", {1: 6.25, 2: 6.05, 4: 6.0}, receptive_field=4)
    lstm = context("LSTM", {1: 6.01, 4: 6.005})
    contexts = [
        shuffled(transformer, {1: 0.3, 2: 0.1}),
        shuffled(cnn, {1: 0.3, 2: 0.005}),
        shuffled(lstm, {1: 0.005, 2: 0.1}),
    ]
    found = [*findings(contexts)]
    assert found[:6] == [
        "To come within 1 % of its lowest loss, the Transformer needs the last 4 of 5 (95 % "
        "interval 4 to 4), the CNN needs the last 2 of 4, its receptive field (95 % interval 2 to "
        "4) and the LSTM needs the last 1 of 4 (95 % interval 1 to 1). Tried were 1, 2, 4, … and "
        "the most words that each was shown.",
        "From one visible word to the best number of them, the loss falls by 0.400 ± 0.008 nats "
        "for the Transformer (to 4), by 0.250 ± 0.008 nats for the CNN (to 4) and by no more than "
        "chance (0.005 ± 0.008) for the LSTM (to 4).",
        "With all 5 words visible, the loss of the Transformer is 0.100 ± 0.006 nats above its "
        "lowest, which it has with 4.",
        "The order of words counts beyond the last 2 for the Transformer (0.100 ± 0.005 nats), "
        "beyond the last 1 for the CNN (0.300 ± 0.005 nats) and nowhere beyond the last word for "
        "the LSTM: so far back, shuffling raises the loss by more than chance.",
        "With all words visible, the loss of the CNN is 0.005 ± 0.000 nats below that of the LSTM.",
        "With all words visible, the loss of the CNN is 0.200 ± 0.006 nats below that of the "
        "Transformer.",
    ]
    # The same means with ten times the noise.
    wide = [
        shuffled(context("Transformer", {1: 6.5, 4: 6.1, 5: 6.2}, 2.0), {1: 0.1, 2: 0.1}, 2.0),
        context("LSTM", {1: 6.5, 5: 6.1}, 2.0, seed=9),
    ]
    found = [*findings(wide)]
    assert "above its lowest" not in "".join(found)
    assert "counts nowhere beyond the last word for the Transformer:" in found[2]
    assert found[3].startswith("With all words visible, the loss of the LSTM is 0.100 ± ")
    assert found[3].endswith("nats below that of the Transformer, no more than chance.")


def test_a_dead_rnn_needs_no_second_word_and_leaves_no_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vocabulary = load_corpus(str(make_corpus(tmp_path / "set"))).vocabulary
    save("LSTM", tmp_path / "lstm.pt", vocabulary)
    save("RNN_RELU", tmp_path / "dead.pt", vocabulary)
    content = torch.load("dead.pt", weights_only=True)
    for name, tensor in content["state_dict"].items():
        if "bias_ih" in name:
            tensor.fill_(-1000.0)
    torch.save(content, "dead.pt")
    flags = ("--data", "set", "--max-context", 4, "--words", 50)
    for models in (("dead.pt",), ("dead.pt", "lstm.pt")):
        result = run("lm_context.py", *models, *flags, cwd=tmp_path)
        assert result.code == 0 and result.err == "", result
        table = Path("context.csv").read_text()
        assert "nan" not in result.out + table
        assert "the RNN_RELU needs the last 1 of 4 (95 % interval 1 to 1)" in result.out
        assert "by no more than chance (0.000 ± 0.000) for the RNN_RELU (to 1)" in result.out
        assert "nowhere beyond the last word for the RNN_RELU" in result.out
        assert "RNN_RELU,effective context,,1,\n" in table
        assert "RNN_RELU,effective context high,,1,\n" in table
        assert "RNN_RELU,rise when shuffled,2,0.0,0.0\n" in table
        assert Path("context.png").read_bytes().startswith(b"\x89PNG")


def save(model: str, path: Path, vocabulary: list[str], weight: float = 0.5) -> None:
    torch.manual_seed(0)
    spec = SPEC._replace(model=model, words=len(vocabulary))
    built = build_model(spec, dropout=0.0)
    for parameter in built.parameters():
        nn.init.normal_(parameter, 0, weight)
    content = {**spec._asdict(), "bptt": 5, "vocabulary": vocabulary}
    torch.save({**content, "state_dict": built.state_dict()}, path)


def test_the_figures_of_four_processes_are_those_of_one(tmp_path: Path) -> None:
    vocabulary = load_corpus(str(make_corpus(tmp_path / "set"))).vocabulary
    for model in ("LSTM", "Transformer", "CNN"):
        save(model, tmp_path / f"{model.lower()}.pt", vocabulary)
    models = ("lstm.pt", "transformer.pt", "cnn.pt")
    flags = (*models, "--data", "set", "--max-context", 8, "--words", 300)
    outputs = []
    for folder in (tmp_path / "one", tmp_path / "four"):
        command = ("lm_context.py", *flags, "--output-dir", folder)
        four = folder.name == "four"
        result = (
            launch("cpu4.yaml", *command, cwd=tmp_path) if four else run(*command, cwd=tmp_path)
        )
        assert result.code == 0, result
        assert f"=> {4 if four else 1} process" in result.out
        assert (folder / "context.png").read_bytes().startswith(b"\x89PNG")
        lines = [line for line in result.out.splitlines() if not line.startswith("=>")]
        outputs.append((lines, (folder / "context.csv").read_text()))
    assert outputs[0] == outputs[1]
    lines, table = outputs[0]
    assert lines[0] == "Loss of 300 test words by the number of words visible before each:"
    assert lines[1].split()[:6] == ["1", "2", "4", "5", "7", "8"]
    rows = [line.split(",") for line in table.splitlines()[1:]]
    seen = {name: [r[2] for r in rows if r[0] == name and r[1] == "loss"] for name, *_ in rows}
    whole, window = ["1", "2", "4", "8"], ["1", "2", "4", "5"]  # a Transformer's is its --bptt
    assert [*seen.values()] == [whole, window, ["1", "2", "4", "7"]]  # its receptive field
    assert ["CNN", "receptive field", "", "7", ""] in rows
    assert all(float(r[4]) >= 0 for r in rows if r[2])
    ends = {r[0]: float(r[3]) for r in rows if r[1] == "loss"}  # the last has all words visible
    behind = {r[0]: float(r[3]) for r in rows if r[1] == "loss above best"}
    least = min(ends.values())
    assert behind == pytest.approx({name: loss - least for name, loss in ends.items()})
    shuffled = [r[2] for r in rows if r[:2] == ["LSTM", "rise when shuffled"]]
    assert shuffled == ["1", "2", "4"]


def test_one_visible_word_leaves_nothing_to_shuffle(tmp_path: Path) -> None:
    vocabulary = load_corpus(str(make_corpus(tmp_path / "set"))).vocabulary
    save("CNN", tmp_path / "cnn.pt", vocabulary)
    flags = ("cnn.pt", "--data", "set", "--max-context", 1, "--words", 2)
    result = run("lm_context.py", *flags, cwd=tmp_path)
    assert result.code == 0 and result.err == "", result
    assert "shuffl" not in result.out
    assert len(result.out.split("\n\n")) == 2


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    vocabulary = load_corpus(str(make_corpus(tmp_path / "set"))).vocabulary
    save("LSTM", tmp_path / "lstm.pt", vocabulary)
    save("LSTM", tmp_path / "other.pt", vocabulary[:-1])
    save("RNN_RELU", tmp_path / "nan.pt", vocabulary, weight=float("inf"))
    (tmp_path / "file").write_text("a file")
    for flags, message in {
        "lstm.pt": "data/wikitext-2/train.txt is missing and cannot be downloaded",
        "lstm.pt other.pt --data set": "other.pt: has a vocabulary of 39 words and the corpus",
        "none.pt --data set": "none.pt: no such file",
        "nan.pt --data set": "nan.pt: its weights give no finite loss",
        "lstm.pt --data set --max-context 900": "too few to have --max-context 900",
        "lstm.pt --data set --words 1": "--words 1: a standard error takes at least 2",
        "lstm.pt --data set --output-dir file": "cannot write to file",
    }.items():
        with pytest.raises(UserError, match=message):
            lm_context.main(flags.split())
