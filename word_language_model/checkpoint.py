"""Checkpoints of word language models: what is in them is checked before it is used."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from engine import checkpoints
from engine.checkpoints import Checkpoint
from engine.cli import UserError
from word_language_model.model import LanguageModel, build_model
from word_language_model.settings import (
    DEFAULT_KERNEL_SIZE,
    DEFAULT_NHEAD,
    MODELS,
    ModelSpec,
    check_spec,
)

RESAVE = (
    "python -c \"import torch, data; m = torch.load('model.pt', weights_only=False); torch.save("
    "{'state_dict': m.state_dict(), 'model': getattr(m, 'rnn_type', 'Transformer'), "
    "'nhead': getattr(m, 'nhead', 2), 'vocabulary': data.Corpus('data/wikitext-2')"
    ".dictionary.idx2word}, 'resaved.pt')\""
)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of lm_main.py, or one of the original that was re-saved as data.

    Raises:
        UserError: what `checkpoints.load` refuses, and what is no language model.
    """
    try:
        checkpoint = checkpoints.load(path)
    except UserError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise UserError(
            f"checkpoint {path}: holds a pickled module, which is code, or is no checkpoint; "
            f"nothing was loaded. A model of the original is re-saved, in its folder, by: {RESAVE}"
        ) from error
    if "arch" in checkpoint or "classes" in checkpoint:
        arch = checkpoint.get("arch", "image classifier")
        raise checkpoint.error(f"holds the image model {arch}, not a language model")
    if "model" not in checkpoint or "vocabulary" not in checkpoint:
        raise checkpoint.error("names no model and vocabulary: not a checkpoint of lm_main.py")
    return checkpoint


def read_vocabulary(checkpoint: Checkpoint) -> list[str]:
    vocabulary: list[str] = checkpoint.value("vocabulary", list) or []
    if not all(isinstance(word, str) for word in vocabulary):
        raise checkpoint.error("its vocabulary is no list of words: damaged")
    return vocabulary


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """What model a checkpoint holds; its sizes are those of the weights.

    Raises:
        UserError: a value of the wrong type, weights that a model needs and the checkpoint lacks,
            or a vocabulary of another length than the embedding has.
    """
    kind = checkpoint.value("model", str)
    if kind not in MODELS:
        raise checkpoint.error(f"unknown model {kind!r}: damaged")
    state = checkpoint["state_dict"]
    embedding, layer, dimensions = {
        "Transformer": ("input_emb.weight", "encoder.layers.{}.linear2.weight", 2),
        "CNN": ("encoder.weight", "layers.{}.weight", 3),
    }.get(kind, ("encoder.weight", "rnn.weight_hh_l{}", 2))
    first = layer.format(0)
    for name, expected in ((embedding, 2), (first, dimensions), ("decoder.weight", 2)):
        if name not in state or state[name].dim() != expected:
            raise checkpoint.error(f"lacks {name}: not a {kind}")
    nhid, kernel_size = state[first].shape[1], checkpoint.value("kernel_size", int)
    if kind == "CNN":
        nhid, kernel_size = state[first].shape[0] // 2, state[first].shape[2]
    words, emsize = state[embedding].shape
    nhead = checkpoint.value("nhead", int) or DEFAULT_NHEAD
    count = len(read_vocabulary(checkpoint))
    if count != words or nhead < 1:
        raise checkpoint.error(f"{count} words, {words} embeddings, {nhead} heads: damaged")
    return ModelSpec(
        model=kind,
        words=words,
        emsize=emsize,
        nhid=nhid,
        nlayers=sum(layer.format(number) in state for number in range(len(state))),
        nhead=nhead,
        # Equal values are one matrix: two matrices differ from their first draw on.
        tied=torch.equal(state["decoder.weight"], state[embedding]),
        kernel_size=kernel_size or DEFAULT_KERNEL_SIZE,
    )


def load_weights(model: LanguageModel, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights.

    Raises:
        UserError: when their names or shapes are not those of the model.
    """
    # A table of sines in the original's state dict.
    state = {k: v for k, v in checkpoint["state_dict"].items() if k != "pos_encoder.pe"}
    checkpoint.load_state(model, state, f"a {checkpoint['model']} of lm_main.py")


def restore_model(checkpoint: Checkpoint) -> tuple[LanguageModel, list[str]]:
    """The model of a checkpoint, ready to evaluate, and its vocabulary."""
    spec = read_spec(checkpoint)
    try:
        check_spec(spec, bptt=1)
    except UserError as error:
        raise checkpoint.error(str(error)) from error
    model = build_model(spec, dropout=0.0)
    load_weights(model, checkpoint)
    return model.eval(), read_vocabulary(checkpoint)


def refuse_other_words(checkpoint: Checkpoint, words: list[str]) -> None:
    own = read_vocabulary(checkpoint)
    if own != words:
        raise checkpoint.error(
            f"has a vocabulary of {len(own)} words and the corpus another, of {len(words)}: use "
            "the --data that it was trained on"
        )
