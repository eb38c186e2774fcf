"""Checkpoints of word language models, whose content is checked before it is used."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from engine import checkpoints
from engine.checkpoints import Checkpoint
from engine.cli import ArgumentParser, UserError
from engine.launch import refuse_unequal_parts
from word_language_model.model import LanguageModel, build_model, model_class
from word_language_model.settings import MODEL_SETTINGS, MODELS, SETTINGS, ModelSpec

RESAVE = (
    "python -c \"import torch, data; m = torch.load('model.pt', weights_only=False); "
    "t = hasattr(m, 'input_emb'); e = m.input_emb if t else m.encoder; torch.save("
    "{'state_dict': m.state_dict(), 'model': 'Transformer' if t else m.rnn_type, "
    "'emsize': e.embedding_dim, 'nhid': m.encoder.layers[0].linear1.out_features if t else m.nhid, "
    "'nlayers': m.encoder.num_layers if t else m.nlayers, 'nhead': m.nhead if t else 2, "
    "'tied': m.decoder.weight is e.weight, 'kernel_size': 4, "
    "'vocabulary': data.Corpus('data/wikitext-2').dictionary.idx2word}, 'resaved.pt')\""
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
    """What model a checkpoint holds.

    Raises:
        UserError: a value that is missing or of the wrong type, or sizes that do not go together.
    """
    sizes: dict[str, Any] = {
        name: checkpoint.get(name) for name in ("emsize", "nhid", "nlayers", "nhead", "kernel_size")
    }
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise checkpoint.error(f"{name} is {size!r}: not written by lm_main.py, or damaged")
    kind, tied = checkpoint.get("model"), checkpoint.get("tied")
    if kind not in MODELS:
        raise checkpoint.error(f"unknown model {kind!r}: damaged")
    if type(tied) is not bool:
        raise checkpoint.error(f"tied is {tied!r}: not written by lm_main.py, or damaged")
    spec = ModelSpec(kind, words=len(read_vocabulary(checkpoint)), tied=tied, **sizes)
    try:
        model_class(kind).check(spec, bptt=1)
    except UserError as error:
        raise checkpoint.error(str(error)) from error
    return spec


def load_weights(model: LanguageModel, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights.

    Raises:
        UserError: when their names or shapes are not those of the model.
    """
    # The original's state dict has a table of sines.
    state = {k: v for k, v in checkpoint["state_dict"].items() if k != "pos_encoder.pe"}
    checkpoint.load_state(model, state, f"a {checkpoint['model']} of lm_main.py")


def restore_model(checkpoint: Checkpoint) -> tuple[LanguageModel, list[str]]:
    """The model of a checkpoint, ready to evaluate, and its vocabulary."""
    model = build_model(read_spec(checkpoint), dropout=0.0)
    load_weights(model, checkpoint)
    return model.eval(), read_vocabulary(checkpoint)


def refuse_other_words(checkpoint: Checkpoint, words: list[str]) -> None:
    own = read_vocabulary(checkpoint)
    if own != words:
        raise checkpoint.error(
            f"has a vocabulary of {len(own)} words and the corpus another, of {len(words)}: use "
            "the --data that it was trained on"
        )


def settle(
    parser: ArgumentParser,
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    accelerator: Accelerator,
) -> list[str]:
    """Give every setting its value, and refuse those that do not go together.

    Returns:
        The flags that differ from the checkpoint.
    """
    found = {}
    if checkpoint:
        found = {
            **{name: checkpoint.get(name) for name in SETTINGS},
            **read_spec(checkpoint)._asdict(),
        }
    # A run keeps its seed; an evaluation draws nothing.
    fixed = MODEL_SETTINGS if args.evaluate else (*MODEL_SETTINGS, "seed")
    anew = "" if args.evaluate else ", or begin anew (--overwrite, or another --save)"
    changed = parser.settle(
        args, found, args.resume, accelerator.print, fixed, f"leave the flag out{anew}"
    )
    if args.dry_run:
        args.epochs = 1
    if not args.evaluate:
        refuse_unequal_parts(args, accelerator)
    model_class(args.model).check(spec_of(args), args.bptt)
    return changed


def spec_of(args: argparse.Namespace, words: int = 0) -> ModelSpec:
    """The model that settled flags ask for."""
    sizes = {name: getattr(args, name) for name in ModelSpec._fields if name != "words"}
    return ModelSpec(words=words, **sizes)


def beside(save: Path) -> tuple[Path, Path]:
    """Where a run with this --save keeps its state and its curves.

    No two values of --save share them: neither `lr0.2` and `lr0.5` nor `m`, `m.pt` and `m.pth`.
    """
    stem = save.name.removesuffix(".pt")
    stem += "." if stem != save.name else "-"
    return save.with_name(f"{stem}checkpoint.pt"), save.with_name(f"{stem}logs")
