"""How far back models look, found for models whose answer is known by construction."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kit import launch, make_corpus, run
from torch import nn

import lm_context
from engine.cli import UserError
from engine.launch import build_accelerator
from lm_context import Context, findings, measure, predict
from word_language_model.data import load_corpus
from word_language_model.model import ConvolutionalModel, LanguageModel, RecurrentModel, build_model
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
    assert list(found.losses) == [1, 2, 4, 8, 9]
    chance = torch.tensor(WORDS).log().item()
    assert [found.losses[n] for n in (1, 2)] == pytest.approx([chance, chance])
    assert found.losses[4] < chance / 2
    assert found.losses[4] == pytest.approx(found.losses[9])
    assert found.effective == found.receptive_field == BACK
    assert found.influence == [0, 0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["RNN_TANH", "CNN"])
def test_a_bigram_model_looks_at_one_word(kind: str) -> None:
    built = build_model(SPEC._replace(model=kind, kernel_size=1), dropout=0.0)
    for name, parameter in built.named_parameters():
        nn.init.normal_(parameter)
        if "weight_hh" in name:
            nn.init.zeros_(parameter)
    found = measured(built, echo(100))
    assert found.effective == 1
    assert found.influence == [1, *[0] * 8]
    assert len({round(loss, 5) for loss in found.losses.values()}) == 1


def test_there_is_no_gradient_beyond_a_receptive_field() -> None:
    built = build_model(SPEC._replace(nlayers=3, kernel_size=3), dropout=0.0)
    found = measured(built, echo(100))
    assert found.receptive_field == 7
    assert [share > 0 for share in found.influence] == [True] * 7 + [False] * 2
    assert sum(found.influence) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_an_rnn_starts_from_zeros_as_many_words_back_as_are_visible(kind: str) -> None:
    built = build_model(SPEC._replace(model=kind), dropout=0.0)
    assert isinstance(built, RecurrentModel)
    text, place = echo(50), 30
    for length in (1, 3, 7):
        loss, embedded = predict(built, text, torch.tensor([place, 40]), length)
        output, _ = built.rnn(built.encoder(text[place - length : place]))
        expected = F.cross_entropy(built.decoder(output[-1]), text[place])
        torch.testing.assert_close(loss[0], expected)
        assert embedded.shape == (length, 2, 8)


def test_the_effective_context_comes_within_one_percent_of_the_full_loss() -> None:
    assert Context("it", {1: 4.0, 2: 2.03, 4: 2.015, 8: 2.0}, [1.0], 0).effective == 4


def test_the_findings_are_those_of_the_figures() -> None:
    contexts = [
        Context("Transformer", {1: 6.5, 4: 6.1, 5: 6.15}, [0.5, 0.25, 0.125, 0.125], 0),
        Context("CNN", {1: 6.25, 2: 6.05, 3: 6.0, 8: 6.0}, [0.75, 0.125, 0.125, 0.0], 3),
        Context("LSTM", {1: 6.75, 8: 6.5}, [0.25, 0.25, 0.25, 0.25], 0),
    ]
    assert [*findings(contexts)] == [
        "To come within 1 % of its loss with all words visible, the Transformer needs the last 4 "
        "of 5, the CNN needs the last 2 of 3 and the LSTM needs the last 8 of 8.",
        "From one visible word to all of them the loss falls by 0.350 nats for the Transformer, "
        "0.250 nats for the CNN and 0.250 nats for the LSTM; it ends lowest for the CNN, at 6.000.",
        "Of all influence on a prediction, words more than 3 places back have 12.5 % in the "
        "Transformer, 0.0 % in the CNN (its receptive field ends there) and 25.0 % in the LSTM.",
    ]


def test_a_dead_rnn_depends_on_no_word_and_leaves_no_nan(
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
        assert "The predictions of the RNN_RELU depend on no word before.\n" in result.out
        assert "the RNN_RELU needs" not in result.out and "in the RNN_RELU" not in result.out
        assert ("the LSTM needs the last" in result.out) == (len(models) == 2)
        assert "RNN_RELU,effective context,,0\n" in table
        assert "RNN_RELU,influence,1,0.0\n" in table
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
    assert [*seen.values()] == [whole, window, ["1", "2", "4", "7", "8"]]  # its receptive field
    assert ["CNN", "receptive field", "", "7"] in rows


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
        "lstm.pt --data set --output-dir file": "cannot write to file",
    }.items():
        with pytest.raises(UserError, match=message):
            lm_context.main(flags.split())
