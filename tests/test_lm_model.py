"""The models: the original's initial weights, causality, the loss, the exported graph."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.cli import UserError
from word_language_model import model as lm_model
from word_language_model.export import export_onnx
from word_language_model.model import build_model, model_class
from word_language_model.settings import MODELS, RECURRENT, ModelSpec

WORDS, EMSIZE, NHID, NLAYERS, NHEAD = 50, 12, 16, 2, 2


def spec(model: str, tied: bool = False) -> ModelSpec:
    nhid = EMSIZE if tied and model != "Transformer" else NHID
    return ModelSpec(model, WORDS, EMSIZE, nhid, NLAYERS, NHEAD, tied)


def drawn_as_the_original_does(model: str, tied: bool) -> dict[str, torch.Tensor]:
    """The rules of the original's constructors, in their order, from torch's own layers."""
    weights: dict[str, torch.Tensor] = {}
    nhid = spec(model, tied).nhid
    if model == "Transformer":
        layer = nn.TransformerEncoderLayer(EMSIZE, NHEAD, NHID)
        other = nn.TransformerDecoderLayer(EMSIZE, NHEAD, NHID)
        for number in range(NLAYERS):  # copies of one, whose matrices are then drawn anew
            for name, value in layer.state_dict().items():
                weights[f"encoder.layers.{number}.{name}"] = value.clone()
        weights["encoder.norm.weight"] = torch.ones(EMSIZE)
        weights["encoder.norm.bias"] = torch.zeros(EMSIZE)
        for value in weights.values():
            if value.dim() > 1:
                nn.init.xavier_uniform_(value)
        for _ in range(6):  # the decoder that nn.Transformer has by default and nothing uses
            for value in other.state_dict().values():
                if value.dim() > 1:
                    nn.init.xavier_uniform_(value.clone())
        embedding, decoder = nn.Embedding(WORDS, EMSIZE), nn.Linear(EMSIZE, WORDS)
        name = "input_emb.weight"
    else:
        embedding = nn.Embedding(WORDS, EMSIZE)
        rnn = {
            "RNN_TANH": lambda: nn.RNN(EMSIZE, nhid, NLAYERS, nonlinearity="tanh"),
            "RNN_RELU": lambda: nn.RNN(EMSIZE, nhid, NLAYERS, nonlinearity="relu"),
            "LSTM": lambda: nn.LSTM(EMSIZE, nhid, NLAYERS),
            "GRU": lambda: nn.GRU(EMSIZE, nhid, NLAYERS),
        }[model]()
        weights |= {f"rnn.{key}": value for key, value in rnn.state_dict().items()}
        decoder = nn.Linear(nhid, WORDS)
        name = "encoder.weight"
    weights[name] = embedding.weight.data.uniform_(-0.1, 0.1)
    weights["decoder.weight"] = decoder.weight.data.uniform_(-0.1, 0.1)
    if tied:
        weights[name] = weights["decoder.weight"]
    weights["decoder.bias"] = torch.zeros(WORDS)
    return weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", [*RECURRENT, "Transformer"])
def test_a_seed_gives_the_originals_weights(model: str, tied: bool) -> None:
    torch.manual_seed(1111)
    expected = drawn_as_the_original_does(model, tied)
    after = torch.rand(3)
    torch.manual_seed(1111)
    built = build_model(spec(model, tied), dropout=0.2)
    assert torch.equal(torch.rand(3), after)  # not one draw more
    state = built.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("model", MODELS)
def test_tied_weights_are_one_matrix(model: str) -> None:
    built = build_model(spec(model, tied=True), dropout=0.0)
    embedding = next(m for m in built.modules() if isinstance(m, nn.Embedding))
    assert built.decoder.weight is embedding.weight
    assert len(list(built.parameters())) == len(built.state_dict()) - 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_a_word_does_not_see_those_after_it(model: str, training: bool) -> None:
    built = build_model(spec(model), dropout=0.5).train(training)
    tokens = torch.randint(WORDS, (9, 3))
    outputs = []
    for changed in (tokens, torch.cat([tokens[:5], (tokens[5:] + 1) % WORDS])):
        torch.manual_seed(0)
        outputs.append(built.features(changed, built.initial_hidden(3))[0])
    assert torch.equal(outputs[0][:5], outputs[1][:5])
    assert not torch.isclose(outputs[0][5:], outputs[1][5:]).all(2).any()


@pytest.mark.parametrize("nlayers", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_the_last_features_are_those_of_all(model: str, nlayers: int) -> None:
    built = build_model(spec(model)._replace(nlayers=nlayers), dropout=0.5).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # norms and biases, too, are all alike at first
            parameter.normal_(0, 0.3)
    for length in (1, 9):
        tokens, before = torch.randint(WORDS, (length, 3)), built.initial_hidden(3)
        last, hidden = built.last_features(tokens, before)
        features, expected = built.features(tokens, before)
        torch.testing.assert_close(last, features[-1])
        torch.testing.assert_close(hidden, expected)


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_the_mean_over_words_and_the_hidden_state_has_no_history(model: str) -> None:
    built = build_model(spec(model), dropout=0.0)
    tokens, targets = torch.randint(WORDS, (7, 3)), torch.randint(WORDS, (21,))
    loss, hidden = built(tokens, targets, built.initial_hidden(3))
    features, _ = built.features(tokens, built.initial_hidden(3))
    log_probabilities = F.log_softmax(built.decoder(features), dim=2).view(21, WORDS)
    expected = -log_probabilities[torch.arange(21), targets].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(hidden) == {"Transformer": 0, "CNN": 0, "LSTM": 2}.get(model, 1)
    assert not any(h.requires_grad for h in hidden)


def test_a_convolution_is_gated_and_sees_zeros_before_the_first_word() -> None:
    """Dauphin et al.'s equation, h(X) = (X * W + b) ⊗ σ(X * V + c), a word and a tap at a time."""
    built = build_model(spec("CNN")._replace(kernel_size=3), dropout=0.0)
    assert isinstance(built, lm_model.ConvolutionalModel)
    torch.nn.init.normal_(built.encoder.weight)
    tokens = torch.randint(WORDS, (6, 1))
    x = built.encoder(tokens)[:, 0]
    for layer in built.layers:
        assert isinstance(layer, nn.Conv1d) and layer.bias is not None
        nn.init.normal_(layer.bias)
        rows = []
        for t in range(len(x)):
            taps = [layer.weight[:, :, 2 - back] @ x[t - back] for back in range(min(3, t + 1))]
            linear, gate = (torch.stack(taps).sum(0) + layer.bias).chunk(2)
            rows.append(linear * gate.sigmoid() + (x[t] if len(x[t]) == len(gate) else 0))
        x = torch.stack(rows)
    torch.testing.assert_close(built.features(tokens, ())[0][:, 0], x)


@pytest.mark.parametrize(("nlayers", "kernel_size"), [(1, 1), (1, 4), (3, 2), (2, 4)])
def test_a_convolution_sees_its_receptive_field_and_nothing_before_it(
    nlayers: int, kernel_size: int
) -> None:
    sizes = spec("CNN")._replace(nlayers=nlayers, kernel_size=kernel_size, emsize=NHID)
    built = build_model(sizes, dropout=0.0)
    assert isinstance(built, lm_model.ConvolutionalModel)
    assert built.receptive_field == 1 + nlayers * (kernel_size - 1)
    embedded: list[torch.Tensor] = []
    built.encoder.register_forward_hook(lambda _m, _i, output: embedded.append(output))
    features, _ = built.features(torch.randint(WORDS, (12, 1)), ())
    (gradient,) = torch.autograd.grad(features[-1].square().sum(), embedded)
    seen = gradient[:, 0].abs().sum(1) > 0
    assert seen.tolist() == [False] * (12 - built.receptive_field) + [True] * built.receptive_field


def test_positions_are_sines_and_cosines() -> None:
    encoding = lm_model.PositionalEncoding(6, 0.0).pe
    assert encoding.shape == (5000, 1, 6)
    for position in (0, 1, 34, 4999):
        for pair in range(3):
            angle = position / 10000 ** (2 * pair / 6)
            found = encoding[position, 0, 2 * pair : 2 * pair + 2].tolist()
            assert found == pytest.approx([math.sin(angle), math.cos(angle)], abs=2e-3)


def test_dropout_reaches_every_layer() -> None:
    for name in MODELS:
        model = build_model(spec(name), dropout=0.37, layer_dropout=0.11)
        rates = {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
        for n, m in model.named_modules():
            if isinstance(m, (nn.RNNBase, nn.MultiheadAttention)):
                rates[n] = m.dropout
        for n, rate in rates.items():
            assert rate == (0.11 if n.startswith("encoder.layers.") else 0.37), (name, n)


def test_sizes_that_do_not_go_together_are_refused() -> None:
    base = spec("Transformer")
    for wrong, message in (
        (base._replace(nhead=5), "--emsize 12 cannot be divided by --nhead 5"),
        (base._replace(emsize=15, nhead=3), "--emsize 15 is odd"),
        (spec("GRU")._replace(tied=True), "--tied needs --nhid equal to --emsize"),
        (spec("CNN")._replace(tied=True), "--tied needs --nhid equal to --emsize"),
    ):
        with pytest.raises(UserError, match=message):
            model_class(wrong.model).check(wrong, 35)
    with pytest.raises(UserError, match="--bptt 5001: the Transformer has 5000 positions"):
        model_class(base.model).check(base, 5001)


@pytest.mark.parametrize("model", MODELS)
def test_the_exported_graph_computes_what_the_model_does(model: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    built = build_model(spec(model), dropout=0.3).eval()
    path = tmp_path / "model.onnx"
    export_onnx(built, path, bptt=7)
    assert list(tmp_path.iterdir()) == [path]
    session = onnxruntime.InferenceSession(path)
    lengths = (7,) if model.startswith("RNN") else (7, 1, 35)
    for length, columns in itertools.product(lengths, (1, 3)):
        tokens = torch.randint(WORDS, (length, columns))
        hidden = tuple(torch.rand_like(h) for h in built.initial_hidden(columns))
        names = ["tokens", "hidden", "cell"][: 1 + len(hidden)]
        assert [i.name for i in session.get_inputs()] == names
        inputs = {name: x.numpy() for name, x in zip(names, (tokens, *hidden), strict=True)}
        found = session.run(None, inputs)
        with torch.no_grad():
            features, hidden = built.features(tokens, hidden)
            expected = (F.log_softmax(built.decoder(features), dim=2), *hidden)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b.numpy(), atol=1e-4)
