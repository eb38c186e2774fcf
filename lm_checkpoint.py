"""Checkpoints of word language models: what is in them is checked before it is used."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

import checkpoint as checkpoints
import lm_model
from lm_model import MODELS, RECURRENT, Hidden, LanguageModel, ModelSpec
from metrics import LossSums
from runtime import Stopped, UserError

RESAVE = (
    "python -c \"import torch, data; m = torch.load('model.pt', weights_only=False); torch.save("
    "{'state_dict': m.state_dict(), 'model': getattr(m, 'rnn_type', 'Transformer'), "
    "'nhead': getattr(m, 'nhead', 2), 'vocabulary': data.Corpus('data/wikitext-2')"
    ".dictionary.idx2word}, 'resaved.pt')\""
)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of lm_main.py, or one of the original that was re-saved as data.

    Raises:
        UserError: what `checkpoint.load` refuses, and what is no language model.
    """
    try:
        content = checkpoints.load(path)
    except UserError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise UserError(
            f"checkpoint {path}: holds a pickled module, which is code, or is no checkpoint; "
            f"nothing was loaded. A model of the original is re-saved, in its folder, by: {RESAVE}"
        ) from error
    if "arch" in content or "classes" in content:
        arch = content.get("arch", "image classifier")
        raise UserError(f"checkpoint {path}: holds the image model {arch}, not a language model")
    if "model" not in content or "vocabulary" not in content:
        raise UserError(
            f"checkpoint {path}: names no model and vocabulary: not a checkpoint of lm_main.py"
        )
    return content


def read_vocabulary(checkpoint: Mapping[str, Any], path: Path) -> list[str]:
    vocabulary: list[str] = checkpoints.value(checkpoint, "vocabulary", list, path) or []
    if not all(isinstance(word, str) for word in vocabulary):
        raise UserError(f"checkpoint {path}: its vocabulary is no list of words: damaged")
    return vocabulary


def read_spec(checkpoint: Mapping[str, Any], path: Path) -> ModelSpec:
    """What model a checkpoint holds; the sizes are those of its weights.

    Raises:
        UserError: values of the wrong type, sizes that do not fit together, or a vocabulary of
            another length than the weights have.
    """
    kind = checkpoints.value(checkpoint, "model", str, path)
    if kind not in MODELS:
        raise UserError(f"checkpoint {path}: unknown model {kind!r}: damaged")
    state = checkpoint["state_dict"]
    if kind in RECURRENT:
        embedding, inner, layer = "encoder.weight", "rnn.weight_hh_l0", "rnn.weight_hh_l"
    else:
        embedding, layer = "input_emb.weight", ".linear2.weight"
        inner = "encoder.layers.0.linear2.weight"
    for name in (embedding, inner, "decoder.weight"):
        if name not in state or state[name].dim() != 2:
            raise UserError(f"checkpoint {path}: lacks {name}: not a {kind}")
    words, emsize = state[embedding].shape
    decoder = state["decoder.weight"]
    spec = ModelSpec(
        model=kind,
        words=words,
        emsize=emsize,
        nhid=state[inner].shape[1],
        nlayers=sum(layer in name for name in state),
        nhead=checkpoints.value(checkpoint, "nhead", int, path) or lm_model.DEFAULT_NHEAD,
        # The same matrix: two that are not tied differ from their first draw on.
        tied=decoder.shape == state[embedding].shape and torch.equal(decoder, state[embedding]),
    )
    count = len(read_vocabulary(checkpoint, path))
    if count != words or spec.nhead < 1:
        raise UserError(
            f"checkpoint {path}: {count} words, {words} embeddings, {spec.nhead} heads: damaged"
        )
    return spec


def load_weights(
    model: LanguageModel, checkpoint: Mapping[str, Any], path: Path, spec: ModelSpec
) -> None:
    """Load a checkpoint's weights.

    Raises:
        UserError: when their names or shapes are not those of the model.
    """
    # A table of sines in the original's state dict.
    state = {k: v for k, v in checkpoint["state_dict"].items() if k != "pos_encoder.pe"}
    checkpoints.load_state(model, state, f"a {spec.model} of lm_main.py", path)


def restore_model(checkpoint: Mapping[str, Any], path: Path) -> tuple[LanguageModel, list[str]]:
    """The model of a checkpoint, ready to evaluate, and its vocabulary."""
    spec = read_spec(checkpoint, path)
    try:
        lm_model.check_spec(spec, bptt=1)
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    model = lm_model.build_model(spec, dropout=0.0)
    load_weights(model, checkpoint, path, spec)
    return model.eval(), read_vocabulary(checkpoint, path)


def refuse_other_words(checkpoint: dict[str, Any], words: list[str], path: Path) -> None:
    own = read_vocabulary(checkpoint, path)
    if own != words:
        pairs = zip(own, words, strict=False)
        first = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(own), len(words)))
        raise UserError(
            f"checkpoint {path} has {len(own)} words and the corpus {len(words)}, different from "
            f"number {first} on: use the --data that it was trained on"
        )


class TrainingState:
    """Where a run is: all that its checkpoint adds to weights and optimizer.

    Attributes:
        epoch: epochs that are done.
        step: steps that are done in the one under way.
        annealed: how many times the learning rate was divided by four.
        best_val_loss: the lowest of the epochs done, None before the first.
        hidden: after `step`, of this process's columns.
        sums: losses of the epoch under way, None before its first step.
        carried: what `sums` starts from when a run is resumed within an epoch.
        stopped: the Ctrl-C that ended training, after which the best model is still tested.
    """

    def __init__(self) -> None:
        self.epoch = self.step = self.annealed = 0
        self.best_val_loss: float | None = None
        self.hidden: Hidden = ()
        self.sums: LossSums | None = None
        self.carried: list[list[float]] | None = None
        self.stopped: Stopped | None = None


def restore(
    checkpoint: dict[str, Any],
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    steps: int,
    args: argparse.Namespace,
) -> TrainingState:
    """Take up the run that `checkpoint` holds, in epochs of `steps`; weights alone start anew."""
    path = args.resume
    run = TrainingState()
    for name in ("epoch", "step", "annealed"):
        number = checkpoints.value(checkpoint, name, int, path) or 0
        if number < 0:
            raise UserError(f"checkpoint {path}: {name} is {number}: damaged")
        setattr(run, name, number)
    run.best_val_loss = checkpoints.value(checkpoint, "best_val_loss", float, path)
    if run.step:
        for name in ("batch_size", "bptt"):
            if checkpoint.get(name) != getattr(args, name):
                raise UserError(
                    f"checkpoint {path} lies within an epoch of {name} {checkpoint.get(name)}: "
                    f"resume it with that, or from the end of an epoch"
                )
        run.carried = checkpoints.sums(checkpoint, 2, path)
        run.hidden = tuple(checkpoints.value(checkpoint, "hidden", list, path) or ())
        shapes = [h.shape for h in model.initial_hidden(args.batch_size)]
        if (
            run.step > steps
            or [getattr(h, "shape", None) for h in run.hidden] != shapes
            or not run.carried
        ):
            raise UserError(
                f"checkpoint {path}: its step, sums or hidden state are not those of a "
                f"{args.model} on this corpus"
            )
    checkpoints.load_optimizer(optimizer, checkpoint, path)
    return run


def take_best(
    accelerator: Accelerator, model: LanguageModel, spec: ModelSpec, run: TrainingState, path: Path
) -> None:
    """Give `model` the weights that did best on the validation text, on every process."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        best = load(path) if run.best_val_loss is not None and path.is_file() else {}
        if best and best.get("best_val_loss") == run.best_val_loss:
            load_weights(model, best, path, spec)
        else:  # before the first epoch's end, or resumed with another --save
            print(f"=> {path} does not hold this run's best weights: testing the last ones")
    if accelerator.num_processes > 1:
        for parameter in model.parameters():
            parameter.data.copy_(broadcast(parameter.data))
