"""Word language models: RNNs and a causal Transformer, with the original's initial weights.

The names of the parameters and the random draws at construction are those of the original's
model.py, so a seed gives its weights to the bit.
"""

from __future__ import annotations

import abc
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from files import whole_or_absent
from runtime import UserError

RECURRENT = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")
MODELS = (*RECURRENT, "Transformer")
DEFAULT_NHEAD = 2
MAX_POSITIONS = 5000
INIT_RANGE = 0.1

# What a model remembers between segments, each [nlayers, columns, nhid]: (h,) for RNNs and GRU,
# (h, c) for LSTM, () for the Transformer.
Hidden = tuple[torch.Tensor, ...]


class ModelSpec(NamedTuple):
    """All that decides a model's weights and outputs; the fields are the flags of lm_main.py."""

    model: str
    words: int  # in the vocabulary
    emsize: int
    nhid: int
    nlayers: int
    nhead: int
    tied: bool


def check_spec(spec: ModelSpec, bptt: int) -> None:
    """Raise `UserError` for sizes that do not go together."""
    if spec.model in RECURRENT:
        if spec.tied and spec.emsize != spec.nhid:
            raise UserError(
                f"--tied needs --nhid equal to --emsize, not {spec.nhid} and {spec.emsize}"
            )
    elif spec.emsize % spec.nhead:
        raise UserError(f"--emsize {spec.emsize} cannot be divided by --nhead {spec.nhead}")
    elif spec.emsize % 2:
        raise UserError(
            f"--emsize {spec.emsize} is odd, and the Transformer's positions are pairs of sine "
            "and cosine: use an even one"
        )
    elif bptt > MAX_POSITIONS:
        raise UserError(f"--bptt {bptt}: the Transformer has {MAX_POSITIONS} positions")


class Dropout(nn.Dropout):
    """nn.Dropout by 16 random bits an element, of which torch's takes 64, one at a time, on a CPU.

    p is rounded to a multiple of 2**-16 there, and what is kept scaled by that. The result does
    not depend on the number of threads.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        dropped = round(self.p * 2**16)
        on_cpu = features.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (self.training and on_cpu and 0 < dropped < 2**16):
            return super().forward(features)
        count = features.numel()
        draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[:count].view_as(features) >= dropped - 2**15
        return features * kept.to(features.dtype).mul_(2**16 / (2**16 - dropped))


class _CachedLoss(torch.autograd.Function):
    """Mean cross entropy of a linear layer on a CPU, with one matrix where autograd has four.

    A CPU spends as long on moving the logits, their logarithms and both gradients through its
    memory as on the matrix products. Here the logits become their own gradient, a few rows at a
    time, so that what lies between stays in the cache. The values are those of `F.linear` and
    `F.cross_entropy`; under autocast the products are in its precision, all else is float32.
    """

    CACHED = 700_000  # logits, in float32 2.8 MB

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        targets: torch.Tensor,
        trains: bool,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            precision = torch.get_autocast_dtype("cpu")
            # The bias is a column more, whose feature is 1: as F.linear's it made this product
            # three times as slow in bf16.
            features = F.pad(features.to(precision), (0, 1), value=1.0)
            columns = weight.new_empty(len(weight), features.shape[1], dtype=precision)
            columns[:, :-1], columns[:, -1] = weight, bias
            weight = columns
            matrix = F.linear(features, weight)
        else:
            matrix = F.linear(features, weight, bias)
        losses = torch.empty(len(features))
        share = torch.full_like(losses, 1 / len(losses))
        threads = torch.get_num_threads()  # which share the rows
        rows = threads * max(1, _CachedLoss.CACHED // (threads * len(weight)))
        for part in (slice(first, first + rows) for first in range(0, len(features), rows)):
            logits, word = matrix[part].float(), targets[part, None]
            if not trains:
                losses[part] = F.cross_entropy(logits, targets[part], reduction="none")
            elif matrix.dtype == torch.float32:
                with torch.enable_grad():
                    logits = logits.detach().requires_grad_()
                    loss = F.cross_entropy(logits, targets[part], reduction="none")
                (matrix[part],) = torch.autograd.grad(loss, logits, share[part])
                losses[part] = loss.detach()
            else:
                # Two thirds of autograd's time, in another order of rounding.
                likelihood = logits.softmax(1)
                chosen = likelihood.gather(1, word)
                if chosen.min() > torch.finfo(torch.float32).tiny:
                    losses[part, None] = -chosen.log()
                else:  # fewer digits, or zero
                    losses[part] = F.cross_entropy(logits, targets[part], reduction="none")
                # -1 is exact; -1 / rows would be rounded, alike in every row.
                matrix[part] = likelihood.scatter_(1, word, -1.0, reduce="add")
        ctx.save_for_backward(features, weight, matrix)
        # As F.cross_entropy sums them, to the bit.
        return F.nll_loss(-losses[:, None], torch.zeros_like(targets))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, weight, by_logits = ctx.saved_tensors
        by_features, by_weight = by_logits @ weight, by_logits.t() @ features
        if by_logits.dtype == torch.float32:
            found, share = (by_features, by_weight, by_logits.sum(0)), gradients[0]
        else:
            found = by_features[:, :-1], by_weight[:, :-1], by_weight[:, -1]
            share = gradients[0] / len(by_logits)
        return *(gradient.float().mul_(share) for gradient in found), None, None


def loss(features: torch.Tensor, decoder: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in float32, of the decoded features.

    Args:
        features: [t, columns, size].
        decoder: from `size` to the words of the vocabulary.
        targets: [t * columns].
    """
    features = features.flatten(0, 1)
    if features.device.type == "cpu" and not torch.compiler.is_compiling():
        trains = torch.is_grad_enabled()
        mean: torch.Tensor = _CachedLoss.apply(
            features, decoder.weight, decoder.bias, targets, trains
        )
        return mean
    return F.cross_entropy(decoder(features).float(), targets)


class LanguageModel(nn.Module, abc.ABC):
    """Features of words, a decoder to the vocabulary, and the loss between them.

    `forward` has the loss inside, because DistributedDataParallel and mixed precision wrap it
    alone; evaluation calls `features` and `decoder`, generation `last_features`.
    """

    decoder: nn.Linear

    @abc.abstractmethod
    def features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        """[t, columns] of tokens to [t, columns, size], each of words up to its own."""

    def last_features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        """[columns, size] of the last words alone, and the hidden state after them."""
        features, hidden = self.features(tokens, hidden)
        return features[-1], hidden

    @abc.abstractmethod
    def initial_hidden(self, columns: int) -> Hidden:
        """What a model remembers before its first word: zeros, for the Transformer nothing."""

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor, hidden: Hidden
    ) -> tuple[torch.Tensor, Hidden]:
        """Mean loss of a segment, and the hidden state after it, without its history."""
        features, hidden = self.features(tokens, hidden)
        return loss(features, self.decoder, targets), tuple(h.detach() for h in hidden)

    def init_decoder(self, embedding: nn.Embedding, tied: bool) -> None:
        """The original's initial ranges; a tied matrix is drawn twice, as there."""
        if tied:
            self.decoder.weight = embedding.weight
        nn.init.uniform_(embedding.weight, -INIT_RANGE, INIT_RANGE)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -INIT_RANGE, INIT_RANGE)


class RecurrentModel(LanguageModel):
    """Embedding, dropout, RNN layers with dropout between them, dropout, decoder."""

    def __init__(self, spec: ModelSpec, dropout: float) -> None:
        super().__init__()
        self.drop = Dropout(dropout)
        self.encoder = nn.Embedding(spec.words, spec.emsize)
        kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(spec.model, nn.RNN)
        options = {"nonlinearity": spec.model[4:].lower()} if kind is nn.RNN else {}
        # torch warns of dropout "between" the layers of one.
        between = dropout if spec.nlayers > 1 else 0.0
        self.rnn = kind(spec.emsize, spec.nhid, spec.nlayers, dropout=between, **options)
        self.decoder = nn.Linear(spec.nhid, spec.words)
        self.init_decoder(self.encoder, spec.tied)

    def features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        embedded = self.drop(self.encoder(tokens))
        if isinstance(self.rnn, nn.LSTM):
            output, hidden = self.rnn(embedded, hidden)
        else:
            output, state = self.rnn(embedded, *hidden)
            hidden = (state,)
        return self.drop(output), hidden

    def initial_hidden(self, columns: int) -> Hidden:
        rnn = self.rnn
        shape = (rnn.num_layers, columns, rnn.hidden_size)
        # Each its own tensor: the exporter takes one given twice for a single input.
        return tuple(
            self.decoder.weight.new_zeros(shape) for _ in range(1 + isinstance(rnn, nn.LSTM))
        )


class PositionalEncoding(nn.Module):
    """Adds sine and cosine of the position to [t, columns, size] (Vaswani et al. 2017)."""

    pe: torch.Tensor

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        position = torch.arange(MAX_POSITIONS, dtype=torch.float)[:, None]
        rate = torch.exp(torch.arange(0, size, 2).float() * (-math.log(10000.0) / size))
        pairs = torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=2)
        self.register_buffer("pe", pairs.reshape(MAX_POSITIONS, 1, size), persistent=False)

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.dropout(embedded + self.pe[: len(embedded)])
        return added


class TransformerModel(LanguageModel):
    """Embedding times √emsize, positions, causal encoder layers, decoder.

    `dropout` reaches the layers as well as the positions; in the original the layers keep 0.1
    whatever is asked.
    """

    def __init__(self, spec: ModelSpec, dropout: float) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about nested tensors, which nothing here uses
            # The original inherits from nn.Transformer and replaces its decoder. That one's
            # weights are drawn all the same, between those that it keeps, so they are here too.
            self.encoder = nn.Transformer(
                spec.emsize,
                spec.nhead,
                num_encoder_layers=spec.nlayers,
                dim_feedforward=spec.nhid,
                dropout=dropout,
            ).encoder
        for layer in self.encoder.layers:
            layer.dropout, layer.dropout1, layer.dropout2 = (Dropout(dropout) for _ in range(3))
        self.pos_encoder = PositionalEncoding(spec.emsize, dropout)
        embedding = nn.Embedding(spec.words, spec.emsize)
        self.decoder = nn.Linear(spec.emsize, spec.words)
        self.input_emb = embedding  # drawn before the decoder, listed after it
        self.init_decoder(embedding, spec.tied)

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[t, columns, size] of words and positions, and [t, t], which hides later words."""
        embedded = self.input_emb(tokens) * math.sqrt(self.input_emb.embedding_dim)
        # Given with is_causal the mask is not read; without it is_causal is refused.
        mask = nn.Transformer.generate_square_subsequent_mask(
            len(tokens), device=embedded.device, dtype=embedded.dtype
        )
        return self.pos_encoder(embedded), mask

    def features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        embedded, mask = self.embed(tokens)
        return self.encoder(embedded, mask=mask, is_causal=True), hidden

    def last_features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        """The uppermost layer computes no other position: a sixth of the time of two saved."""
        x, mask = self.embed(tokens)
        *lower, top = self.encoder.layers
        for layer in lower:
            x = layer(x, src_mask=mask, is_causal=True)
        last = x[-1:]
        last = top.norm1(last + top.self_attn(last, x, x, need_weights=False)[0])
        last = top.norm2(last + top.linear2(top.activation(top.linear1(last))))
        return self.encoder.norm(last)[0], hidden

    def initial_hidden(self, columns: int) -> Hidden:
        return ()


def build_model(spec: ModelSpec, dropout: float) -> LanguageModel:
    """A model with weights drawn from torch's generator, float32, on the CPU."""
    return (RecurrentModel if spec.model in RECURRENT else TransformerModel)(spec, dropout)


class _Exported(nn.Module):
    """What the original's forward returns: log-probabilities, and an RNN's hidden state."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, *hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, hidden = self.model.features(tokens, hidden)
        return F.log_softmax(self.model.decoder(features), dim=-1), *hidden


def export_onnx(model: LanguageModel, path: Path, bptt: int) -> None:
    """Write `model` as ONNX, for one column of `bptt` words.

    Inputs: tokens [bptt, 1], and of an RNN hidden [nlayers, 1, nhid], of an LSTM cell as well.
    Outputs: log-probabilities [bptt, 1, words], and the hidden state after the words.
    """
    names = ["hidden", "cell"][: len(model.initial_hidden(1))]
    try:
        with whole_or_absent(path) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            torch.onnx.export(
                _Exported(model).eval(),
                (torch.zeros(bptt, 1, dtype=torch.int64), *model.initial_hidden(1)),
                temporary,
                input_names=["tokens", *names],
                output_names=["log_probabilities", *(f"{name}_after" for name in names)],
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
