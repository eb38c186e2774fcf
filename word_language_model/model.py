"""Word language models: RNNs, a causal Transformer and a gated convolutional network.

The RNNs' and the Transformer's parameter names and random draws at construction are those of the
original's model.py, so a seed gives its weights to the bit. The original has no convolutions.
"""

from __future__ import annotations

import abc
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.cli import UserError
from word_language_model.kernels import Dropout, loss
from word_language_model.settings import MAX_POSITIONS, ModelSpec

INIT_RANGE = 0.1

# cuDNN wants all weights in one chunk, and copies them when a single layer of several is called.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous")

# What a model remembers between segments, each [nlayers, columns, nhid]: (h,) for RNNs and GRU,
# (h, c) for LSTM, () for the Transformer and the CNN.
Hidden = tuple[torch.Tensor, ...]


class LanguageModel(nn.Module, abc.ABC):
    """Features of words, a decoder to the vocabulary, and the loss.

    DistributedDataParallel and mixed precision wrap `forward` alone, so the loss is part of it.
    Evaluation calls `features` and `decoder`, generation calls `last_features`.
    """

    decoder: nn.Linear
    # How many of the last words a prediction can depend on; 0 where the layers set no limit.
    receptive_field: int = 0
    # Whether it has to learn each position in a segment: it then knows those below --bptt only.
    has_positions = False

    @classmethod
    def check(cls, spec: ModelSpec, bptt: int) -> None:
        """Raise `UserError` for sizes that do not go together."""
        if spec.tied and spec.emsize != spec.nhid:
            raise UserError(
                f"--tied needs --nhid equal to --emsize, not {spec.nhid} and {spec.emsize}"
            )

    @abc.abstractmethod
    def features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        """Tokens [t, columns] to features [t, columns, size]; each sees the words up to its own."""

    def last_features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        """Features [columns, size] of the last words, and the hidden state after them."""
        features, hidden = self.features(tokens, hidden)
        return features[-1], hidden

    def initial_hidden(self, columns: int) -> Hidden:
        """What a model remembers before its first word: nothing, or an RNN's zeros."""
        return ()

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor, hidden: Hidden
    ) -> tuple[torch.Tensor, Hidden]:
        """Mean loss of a segment, and the hidden state after it, detached from its history."""
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

    def __init__(self, spec: ModelSpec, dropout: float, layer_dropout: float) -> None:
        super().__init__()
        self.drop = Dropout(dropout)
        self.encoder = nn.Embedding(spec.words, spec.emsize)
        kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(spec.model, nn.RNN)
        options = {"nonlinearity": spec.model[4:].lower()} if kind is nn.RNN else {}
        # torch warns when a single layer is given dropout "between" layers.
        between = dropout if spec.nlayers > 1 else 0.0
        self.rnn = kind(spec.emsize, spec.nhid, spec.nlayers, dropout=between, **options)
        self.decoder = nn.Linear(spec.nhid, spec.words)
        self.init_decoder(self.encoder, spec.tied)

    def features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        embedded = self.drop(self.encoder(tokens))
        if not embedded.is_cuda:
            output, hidden = self._recur(embedded, hidden)
        else:
            # Autocast has cuDNN's RNNs in fp16 even when its own precision is bf16, and without a
            # loss scale small gradients become zero there.
            with torch.autocast("cuda", enabled=False):
                output, hidden = self._recur(embedded, hidden)
        return self.drop(output), hidden

    def _recur(self, x: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        if x.is_cuda and self.training and self.rnn.num_layers > 1:
            return self._layer_by_layer(x, hidden)
        if isinstance(self.rnn, nn.LSTM):
            output, hidden = self.rnn(x, hidden)
            return output, hidden
        output, state = self.rnn(x, *hidden)
        return output, (state,)

    def _layer_by_layer(self, x: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        """The RNN with this module's dropout between its layers, for training on a GPU.

        cuDNN's own dropout ignores a step's seed: it carries its random state from step to step.
        """
        layer_of = getattr(torch, self.rnn.mode.lower())
        after = []
        for layer in range(self.rnn.num_layers):
            x = self.drop(x) if layer else x
            before = tuple(h[layer : layer + 1] for h in hidden)
            weights = self.rnn._flat_weights[4 * layer : 4 * layer + 4]
            state = before if isinstance(self.rnn, nn.LSTM) else before[0]
            x, *ended = layer_of(x, state, weights, True, 1, 0.0, True, False, False)
            after.append(ended)
        return x, tuple(torch.cat(parts) for parts in zip(*after, strict=True))

    def initial_hidden(self, columns: int) -> Hidden:
        rnn = self.rnn
        shape = (rnn.num_layers, columns, rnn.hidden_size)
        # Two tensors for an LSTM: the ONNX exporter takes one given twice for a single input.
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
        added: torch.Tensor = self.dropout(embedded + self.pe[: embedded.shape[0]])
        return added


class TransformerModel(LanguageModel):
    """Embedding times √emsize, positions, causal encoder layers, decoder.

    The layers have a dropout of their own, as in the original, where it is always 0.1.
    """

    has_positions = True

    @classmethod
    def check(cls, spec: ModelSpec, bptt: int) -> None:
        if spec.emsize % spec.nhead:
            raise UserError(f"--emsize {spec.emsize} cannot be divided by --nhead {spec.nhead}")
        if spec.emsize % 2:
            raise UserError(
                f"--emsize {spec.emsize} is odd, and the Transformer's positions are pairs of sine "
                "and cosine: use an even one"
            )
        if bptt > MAX_POSITIONS:
            raise UserError(f"--bptt {bptt}: the Transformer has {MAX_POSITIONS} positions")

    def __init__(self, spec: ModelSpec, dropout: float, layer_dropout: float) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about nested tensors, which nothing here uses
            # The original replaces nn.Transformer's decoder after drawing its weights. Drawing them
            # here too makes all later weights the original's.
            self.encoder = nn.Transformer(
                spec.emsize,
                spec.nhead,
                num_encoder_layers=spec.nlayers,
                dim_feedforward=spec.nhid,
                dropout=layer_dropout,
            ).encoder
        for layer in self.encoder.layers:
            for name in ("dropout", "dropout1", "dropout2"):
                setattr(layer, name, Dropout(layer_dropout))
        self.pos_encoder = PositionalEncoding(spec.emsize, dropout)
        embedding = nn.Embedding(spec.words, spec.emsize)
        self.decoder = nn.Linear(spec.emsize, spec.words)
        self.input_emb = embedding  # drawn before the decoder, listed after it
        self.init_decoder(embedding, spec.tied)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings with positions, [t, columns, size]."""
        embedded = self.input_emb(tokens) * math.sqrt(self.input_emb.embedding_dim)
        positioned: torch.Tensor = self.pos_encoder(embedded)
        return positioned

    def features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        # torch refuses is_causal without a mask, and then does not read the mask.
        mask = nn.Transformer.generate_square_subsequent_mask(
            tokens.shape[0], device=tokens.device, dtype=self.input_emb.weight.dtype
        )
        return self.encoder(self.embed(tokens), mask=mask, is_causal=True), hidden

    def last_features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        """When generating, the last layer computes one position instead of 35."""
        x = self.embed(tokens)
        *lower, top = self.encoder.layers
        for layer in lower:
            x = _layer_output(layer, x, len(x))
        return self.encoder.norm(_layer_output(top, x, 1))[0], hidden


def _layer_output(layer: Any, x: torch.Tensor, positions: int) -> torch.Tensor:
    """The last `positions` of an encoder layer's output for [t, columns, size]; without dropout.

    The layer's own forward spends a fifth of its time, on a single text, in checks and copies.
    """
    attention, last = layer.self_attn, x[-positions:]
    query, key, value = (
        part.unflatten(2, (attention.num_heads, -1)).permute(1, 2, 0, 3)
        for part in F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=2)
    )
    attended = F.scaled_dot_product_attention(
        query[:, :, -positions:], key, value, is_causal=positions > 1
    )
    y = layer.norm1(last + attention.out_proj(attended.permute(2, 0, 1, 3).flatten(2)))
    output: torch.Tensor = layer.norm2(y + layer.linear2(layer.activation(layer.linear1(y))))
    return output


class ConvolutionalModel(LanguageModel):
    """Embedding, gated causal convolutions, decoder (Dauphin et al. 2017).

    A layer sees the `kernel_size` positions up to its own, and zeros before the first one. It
    multiplies a linear convolution by the sigmoid of another, and adds the product to its input
    where both have the same size. Like the Transformer, the model reads every segment by itself.
    """

    def __init__(self, spec: ModelSpec, dropout: float, layer_dropout: float) -> None:
        super().__init__()
        self.drop = Dropout(dropout)
        self.encoder = nn.Embedding(spec.words, spec.emsize)
        sizes = [spec.emsize, *[spec.nhid] * (spec.nlayers - 1)]
        self.layers = nn.ModuleList(
            nn.Conv1d(size, 2 * spec.nhid, spec.kernel_size) for size in sizes
        )
        for layer in self.layers:
            assert isinstance(layer, nn.Conv1d)
            # Keeps the variance of a layer's input in its output (Gehring et al. 2017).
            nn.init.normal_(layer.weight, 0, 2 / math.sqrt(layer.weight[0].numel()))
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.decoder = nn.Linear(spec.nhid, spec.words)
        self.init_decoder(self.encoder, spec.tied)
        self.kernel_size = spec.kernel_size
        self.receptive_field = 1 + spec.nlayers * (spec.kernel_size - 1)

    def features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        x = self.encoder(tokens).permute(1, 2, 0)  # [columns, emsize, t], as convolutions take it
        for layer in self.layers:
            gated = F.glu(layer(F.pad(self.drop(x), (self.kernel_size - 1, 0))), dim=1)
            x = x + gated if x.shape == gated.shape else gated
        return self.drop(x.permute(2, 0, 1)), hidden

    def last_features(self, tokens: torch.Tensor, hidden: Hidden) -> tuple[torch.Tensor, Hidden]:
        """Reads the receptive field alone: what lies before it changes nothing."""
        return super().last_features(tokens[-self.receptive_field :], hidden)


def model_class(kind: str) -> type[LanguageModel]:
    """The class of a --model; its constructor takes the spec and both shares of dropout."""
    kinds = {"Transformer": TransformerModel, "CNN": ConvolutionalModel}
    return kinds.get(kind, RecurrentModel)


def build_model(spec: ModelSpec, dropout: float, layer_dropout: float = 0.0) -> LanguageModel:
    """A model with weights drawn from torch's generator, float32, on the CPU.

    Args:
        layer_dropout: within the Transformer's layers.
    """
    return model_class(spec.model)(spec, dropout, layer_dropout)
