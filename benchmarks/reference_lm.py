"""A word language model as it is commonly written, to measure the kit against.

In the manner of pytorch/examples' word_language_model: float32, the log-probabilities of the
whole vocabulary, the loss read back in every step. It knows nothing of the kit, so that nothing
which the kit sets or imports can make it faster or slower.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import rounds
import torch
import torch.nn.functional as F
from rounds import Round
from torch import nn

MODELS = ("Transformer", "LSTM", "CNN")
SIZES = {"words": 33278, "emsize": 200, "nhid": 200, "nlayers": 2}  # WikiText-2's, the original's
NHEAD = 2
KERNEL_SIZE = 4
DROPOUT, CLIP, EVAL_COLUMNS = 0.2, 0.25, 10
MAX_POSITIONS = 5000
LR = {"Transformer": 5.0, "LSTM": 20.0, "CNN": 20.0}


def zipf(count: int, words: int) -> torch.Tensor:
    """`count` tokens; token k is drawn in proportion to 1 / (k + 1), as in a language."""
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(1 / torch.arange(1, words + 1), count, True, generator=generator)


def text(steps: int, columns: int, bptt: int, words: int) -> torch.Tensor:
    """[steps * bptt + 1, columns] of tokens: exactly `steps` segments."""
    length = steps * bptt + 1
    return zipf(length * columns, words).view(columns, length).t().contiguous()


class Transformer(nn.Module):
    """Log-probabilities [t, columns, words] of tokens [t, columns]."""

    def __init__(self, words: int, emsize: int, nhid: int, nlayers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(emsize, NHEAD, dim_feedforward=nhid, dropout=0.1)
        norm = nn.LayerNorm(emsize)
        self.encoder = nn.TransformerEncoder(layer, nlayers, norm, enable_nested_tensor=False)
        self.embedding = nn.Embedding(words, emsize)
        self.decoder = nn.Linear(emsize, words)
        self.drop = nn.Dropout(DROPOUT)
        position = torch.arange(MAX_POSITIONS)[:, None]
        angle = position * torch.exp(torch.arange(0, emsize, 2) * (-math.log(10000.0) / emsize))
        sines = torch.stack([angle.sin(), angle.cos()], dim=2).view(MAX_POSITIONS, 1, emsize)
        self.register_buffer("sines", sines)
        self.mask: torch.Tensor | None = None
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, tokens: torch.Tensor, causal: bool = True) -> torch.Tensor:
        length = len(tokens)
        if not causal:
            self.mask = None
        elif self.mask is None or len(self.mask) != length:
            self.mask = torch.ones(length, length, device=tokens.device).tril().log()
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        assert isinstance(self.sines, torch.Tensor)
        x = self.encoder(self.drop(x + self.sines[:length]), mask=self.mask)
        return F.log_softmax(self.decoder(x), dim=-1)


class LSTM(nn.Module):
    """Log-probabilities [t * columns, words] of tokens [t, columns], and the state after them."""

    def __init__(self, words: int, emsize: int, nhid: int, nlayers: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(DROPOUT)
        self.embedding = nn.Embedding(words, emsize)
        self.rnn = nn.LSTM(emsize, nhid, nlayers, dropout=DROPOUT)
        self.decoder = nn.Linear(nhid, words)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        output, state = self.rnn(self.drop(self.embedding(tokens)), state)
        logits = self.decoder(self.drop(output))
        return F.log_softmax(logits.view(-1, logits.shape[-1]), dim=1), state


class CNN(nn.Module):
    """Log-probabilities [t, columns, words] of tokens [t, columns]; gated convolutions."""

    def __init__(self, words: int, emsize: int, nhid: int, nlayers: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(DROPOUT)
        self.embedding = nn.Embedding(words, emsize)
        sizes = [emsize, *[nhid] * (nlayers - 1)]
        self.layers = nn.ModuleList(nn.Conv1d(size, 2 * nhid, KERNEL_SIZE) for size in sizes)
        self.decoder = nn.Linear(nhid, words)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).permute(1, 2, 0)
        for layer in self.layers:
            gated = F.glu(layer(F.pad(self.drop(x), (KERNEL_SIZE - 1, 0))), dim=1)
            x = gated + x if gated.shape == x.shape else gated
        return F.log_softmax(self.decoder(self.drop(x).permute(2, 0, 1)), dim=-1)


def language_model(model: str, sizes: dict[str, int]) -> nn.Module:
    return {"Transformer": Transformer, "LSTM": LSTM, "CNN": CNN}[model](**sizes)


def segment_loss(
    network: nn.Module, tokens: torch.Tensor, targets: torch.Tensor, state: Any
) -> tuple[torch.Tensor, Any]:
    """Mean loss of a segment, and an LSTM's state after it."""
    if isinstance(network, LSTM):
        output, state = network(tokens, state and tuple(s.detach() for s in state))
    else:
        output = network(tokens)
    return F.nll_loss(output.view(len(targets), -1), targets), state


def training(model: str, sizes: dict[str, int], columns: int, bptt: int, steps: int) -> Round:
    """Tokens a second of an epoch of `steps` steps."""
    device = rounds.device()
    network = language_model(model, sizes).to(device)
    data = text(steps, columns, bptt, sizes["words"]).to(device)

    def epoch() -> None:
        network.train()
        total, state = 0.0, None
        for start in range(0, len(data) - 1, bptt):
            targets = data[start + 1 : start + 1 + bptt].view(-1)
            network.zero_grad()
            loss, state = segment_loss(network, data[start : start + bptt], targets, state)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            for parameter in network.parameters():
                assert parameter.grad is not None
                parameter.data.add_(parameter.grad, alpha=-LR[model])
            total += loss.item()

    return lambda: [steps * bptt * columns / rounds.seconds(epoch)]


def validation(model: str, sizes: dict[str, int], columns: int, bptt: int, steps: int) -> Round:
    """Tokens a second of an evaluation of `steps` segments."""
    device = rounds.device()
    network = language_model(model, sizes).to(device)
    data = text(steps, columns, bptt, sizes["words"]).to(device)

    @torch.no_grad()
    def evaluation() -> None:
        network.eval()
        total, state = 0.0, None
        for start in range(0, len(data) - 1, bptt):
            targets = data[start + 1 : start + 1 + bptt].view(-1)
            loss, state = segment_loss(network, data[start : start + bptt], targets, state)
            total += bptt * loss.item()

    return lambda: [steps * bptt * columns / rounds.seconds(evaluation)]


def generation(model: str, sizes: dict[str, int], lengths: list[int], samples: int) -> Round:
    """Milliseconds a word of texts of `lengths` words.

    The Transformer (without a mask) and the CNN read their whole text again for every word. Writing
    every word would take minutes: they write all up to the first length, then `samples` on the way
    to each length, and the time of a word between those is interpolated.
    """
    device = rounds.device()
    network = language_model(model, sizes).to(device).eval()
    words = zipf(max(lengths), sizes["words"])[:, None].to(device)
    marks = list(range(1, lengths[0] + 1))
    for begin, end in itertools.pairwise(lengths):
        stride = 1 if model == "LSTM" else math.ceil((end - begin) / samples)
        marks += reversed(range(end, begin, -stride))

    def write(text: torch.Tensor, state: Any) -> Any:
        if isinstance(network, Transformer):
            output = network(text, causal=False)[-1]
        elif isinstance(network, CNN):
            output = network(text)[-1]
        else:
            output, state = network(text[-1:], state)
        drawn = torch.multinomial(output.squeeze().exp().cpu(), 1)
        torch.cat([text, drawn.to(device)[:, None]])
        return state

    @torch.no_grad()
    def measured() -> list[float]:
        state, times = None, []
        for mark in marks:
            started = time.perf_counter()
            state = write(words[:mark], state)
            times.append(time.perf_counter() - started)
        total = np.interp(range(1, max(lengths) + 1), marks, times).cumsum()
        return [1000 * float(total[length - 1]) / length for length in lengths]

    return measured
