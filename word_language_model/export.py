"""Language models as ONNX."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from engine.cli import UserError
from engine.files import Named, writing
from word_language_model.model import LanguageModel


def check_exporter() -> None:
    """Raise `UserError` when a package is missing that `export_onnx` needs."""
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"--onnx-export needs {' and '.join(missing)}: pip install onnx onnxscript")


def onnx_files(path: Path | None) -> list[Named]:
    """What `export_onnx` may write."""
    return [("--onnx-export", p) for p in (path, Path(f"{path}.data"))] if path else []


class _Exported(nn.Module):
    """What the original's forward returns: log-probabilities, and an RNN's hidden state."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, *hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, hidden = self.model.features(tokens, hidden)
        return F.log_softmax(self.model.decoder(features), dim=-1), *hidden


def export_onnx(model: LanguageModel, path: Path, bptt: int) -> None:
    """Write `model` as ONNX, for any number of words and columns.

    RNN_TANH and RNN_RELU take exactly `bptt` words, since torch's exporter unrolls them.
    Weights above 1.5 GB are put into a second file (see `onnx_files`).

    Inputs: tokens [t, columns]; of an RNN also hidden [nlayers, columns, nhid], of an LSTM also
    cell, of the same shape.
    Outputs: log-probabilities [t, columns, words], and the hidden state after the words.
    """
    is_unrolled = any(type(module) is nn.RNN for module in model.modules())
    # Two of each: the exporter would take 1 for a fixed size.
    tokens = torch.zeros(bptt if is_unrolled else 2, 2, dtype=torch.int64)
    hidden = model.initial_hidden(2)
    names = ["hidden", "cell"][: len(hidden)]
    free = {1: torch.export.Dim("columns")}
    sizes: list[object] = [free if is_unrolled else {0: torch.export.Dim("words"), **free}]
    sizes += [tuple(free for _ in hidden)] if hidden else []
    real = Path(os.path.realpath(path))
    with writing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        # The first file names the second, so they have their final names from the start.
        temporary.mkdir()
        torch.onnx.export(
            _Exported(model).eval(),
            (tokens, *hidden),
            temporary / real.name,
            input_names=["tokens", *names],
            output_names=["log_probabilities", *(f"{name}_after" for name in names)],
            dynamic_shapes=tuple(sizes),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
