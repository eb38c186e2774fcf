"""What a checkpoint of an image classifier says of its model, its classes and its training."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from engine import checkpoints
from engine.checkpoints import Checkpoint
from engine.cli import ArgumentParser, UserError
from engine.launch import refuse_unequal_parts
from image_classification.model import ARCHITECTURES, build_model
from image_classification.settings import (
    DEFAULT,
    MODEL_SETTINGS,
    SETTINGS,
    STEMS,
    ModelSpec,
    has_stem,
)

LARGEST_SIZE = 4096  # pixels a side; a larger image_size in a file is damage
# The last layers of torchvision's models.
HEAD = re.compile(r"(fc|heads?|classifier)\.")
# How torchvision's DenseNets were called before torch 0.4: norm.1.weight for norm1.weight.
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of resnet_main.py, of the original, or others' of torchvision's models.

    Raises:
        UserError: what `checkpoints.load` refuses, and what is no classifier.
    """
    return as_classifier(checkpoints.load(path))


def as_classifier(checkpoint: Checkpoint) -> Checkpoint:
    """`load` of what has been read before."""
    if "vocabulary" in checkpoint:
        raise checkpoint.error(f"holds the language model {checkpoint.get('model')}, no classifier")
    state = checkpoint["state_dict"]
    if not any(map(HEAD.match, state)):
        # Lightning's names begin with an attribute: the model's, or that of a loss with weights.
        owners = {name.partition(".")[0] for name in state}
        models = [owner for owner in owners if any(HEAD.match(n, len(owner) + 1) for n in state)]
        if len(models) != 1:
            raise checkpoint.error(
                "has no fc, head, heads or classifier: not a model of torchvision"
            )
        prefix = f"{models[0]}."
        state = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    checkpoint["state_dict"] = {OLD_DENSENET.sub(r"\1\2.", name): t for name, t in state.items()}
    references = getattr(checkpoint.get("args"), "model", None)
    if "arch" not in checkpoint and references in ARCHITECTURES:  # of torchvision's references
        checkpoint["arch"] = references
    # A vision transformer has a place for each patch, and one for its class token.
    places, patches = (state.get(n) for n in ("encoder.pos_embedding", "conv_proj.weight"))
    if "image_size" not in checkpoint and places is not None and patches is not None:
        if (places.dim(), patches.dim()) != (3, 4) or places.shape[1] < 2:
            raise checkpoint.error("its position embedding is damaged")
        checkpoint["image_size"] = patches.shape[3] * math.isqrt(places.shape[1] - 1)
    return checkpoint


def read_spec(checkpoint: Checkpoint, arch: str | None, stem: str | None) -> ModelSpec:
    """What model a checkpoint holds: its own keys, else flags, else the defaults.

    For a checkpoint without a stem, as the original's, torchvision's own is the default.

    Raises:
        UserError: keys of the wrong type or an architecture that torchvision does not have.
    """
    own = checkpoint.value("arch", str)
    if own and own not in ARCHITECTURES:
        raise checkpoint.error(f"is a {own}, which torchvision does not have")
    arch = own or arch or DEFAULT.arch
    stem = (checkpoint.value("stem", str) or stem or "stock") if has_stem(arch) else None
    if stem not in (None, *STEMS):
        raise checkpoint.error(f"unknown stem {stem!r}: damaged")
    size = checkpoint.value("image_size", int) or DEFAULT.image_size
    if not 1 <= size <= LARGEST_SIZE:
        raise checkpoint.error(f"image_size is {size}: damaged")
    return ModelSpec(arch, stem, count_classes(checkpoint), size)


def _head(state: Iterable[str]) -> str:
    """The name of the last layer: of several in the head, the one with the highest number."""
    names = filter(HEAD.match, state)
    last = max(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    return last.rpartition(".")[0]


def count_classes(checkpoint: Checkpoint) -> int:
    """Outputs of the head."""
    weight = checkpoint["state_dict"].get(f"{_head(checkpoint['state_dict'])}.weight")
    if weight is None or not weight.dim() or not len(weight):
        raise checkpoint.error("its head has no outputs: damaged")
    return len(weight)


def load_weights(
    model: nn.Module, checkpoint: Checkpoint, arch: str, new_head: bool = False
) -> list[str]:
    """Load a checkpoint's state dict.

    Args:
        new_head: keep the model's own head, for other classes.

    Returns:
        The names that keep the model's own values.

    Raises:
        UserError: when its names or shapes are not those of the model.
    """
    own = model.state_dict()
    kept = [name for name in own if new_head and name.startswith(f"{_head(own)}.")]
    # torch before 0.4.1 did not count batches, and no figure depends on the count.
    state = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
    # googlenet and inception_v3 are built without their auxiliary heads.
    state |= {
        k: v
        for k, v in checkpoint["state_dict"].items()
        if k in own or not k.lower().startswith("aux")
    }
    state |= {name: own[name] for name in kept}
    checkpoint.load_state(model, state, f"a {arch}; -a says what it is")
    return kept


def restore_model(
    checkpoint: Checkpoint,
    arch: str | None = None,
    stem: str | None = None,
    image_size: int | None = None,
) -> tuple[nn.Module, ModelSpec]:
    """The model that a checkpoint holds, on the CPU, with its weights.

    Args:
        arch, stem: for a checkpoint that does not say what it is; `stem` is for ResNets only.
        image_size: pixels a side, instead of the checkpoint's.

    Raises:
        UserError: what is asked for is not what the checkpoint says.
    """
    spec = read_spec(checkpoint, arch, stem)
    for name, asked in (("arch", arch), ("stem", stem)):
        found = getattr(spec, name)
        if asked and found and asked != found:
            raise UserError(
                f"{checkpoint.path} has {name} {found}, not {asked}: leave the flag out"
            )
    spec = spec._replace(image_size=image_size or spec.image_size)
    model = build_model(spec)
    load_weights(model, checkpoint, spec.arch)
    return model, spec


def refuse_other_classes(checkpoint: Checkpoint, classes: list[str]) -> None:
    own = checkpoint.value("classes", list)
    count = len(own) if own else count_classes(checkpoint)
    if count != len(classes):
        raise checkpoint.error(
            f"has {count} classes and the dataset {len(classes)}: name the data of its training"
        )
    if own and own != classes:
        first, instead = next(pair for pair in zip(own, classes, strict=True) if len({*pair}) > 1)
        raise checkpoint.error(f"knows class {first} where the dataset has {instead}")


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
    found: dict[str, Any] = {}
    if checkpoint:
        spec = read_spec(checkpoint, args.arch, args.stem)
        found = {**_read_settings(checkpoint), "arch": spec.arch, "stem": spec.stem}
    elif args.origin:
        found = read_spec(args.origin, args.arch, args.stem)._asdict()
        found["image_size"] = args.origin.get("image_size")
    asked_stem, asked_size, asked_side = args.stem, args.image_size, args.decode_once
    # A run keeps its seed; an evaluation draws nothing.
    fixed = MODEL_SETTINGS if args.evaluate else (*MODEL_SETTINGS, "seed")
    anew = ", or begin anew (--overwrite, or another --output-dir)"
    changed = parser.settle(
        args,
        found,
        args.resume or args.weights,
        accelerator.print,
        fixed,
        f"leave the flag out{anew if args.resume and not args.evaluate else ''}",
    )
    args.seeded = args.seeded or checkpoint.get("seeded") is True
    if not has_stem(args.arch):
        if asked_stem is not None:
            accelerator.print(f"=> {args.arch} is no ResNet: --stem {asked_stem} is ignored")
        args.stem = None
    is_foreign = bool(found) and found.get("image_size") is None
    if args.pretrained and not checkpoint:
        is_foreign = True
        if asked_stem is None and args.stem:
            args.stem = "stock"
    if is_foreign and asked_size is None:
        args.image_size = None  # the data decides
    if args.evaluate:
        if asked_side is None and args.decode_once:
            accelerator.print(
                "=> evaluated on the images themselves; as in training with "
                f"--decode-once {args.decode_once}"
            )
            args.decode_once = 0
        return changed
    refuse_unequal_parts(args, accelerator)
    if args.sync_bn and args.gradient_accumulation_steps > 1:
        raise UserError("--sync-bn needs all parts of a batch at once: without accumulation")
    if args.sync_bn and accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        raise UserError(
            "--sync-bn works on GPUs only (torch has no SyncBatchNorm for the CPU); --no-sync-bn "
            "overrides a checkpoint's"
        )
    return changed


def _read_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings that a checkpoint holds.

    The original's has learning rate, momentum and weight decay in its optimizer.
    """
    try:
        group = dict(checkpoint["optimizer"]["param_groups"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        group = {}  # of another kind, which a resumed run will refuse
    group["lr"] = group.get("initial_lr")
    return {name: checkpoint.get(name, group.get(name)) for name in SETTINGS}


def default_folder(accelerator: Accelerator, args: argparse.Namespace) -> Path:
    """`output/<arch>-<cpu|cpu4|gpu1|gpu4>`: runs side by side under one `tensorboard --logdir`."""
    arch = args.arch
    if arch is None and args.resume and str(args.resume) != "auto" and not args.evaluate:
        arch = load(args.resume).value("arch", str)
    kind, count = accelerator.device.type.replace("cuda", "gpu"), accelerator.num_processes
    place = kind if (kind, count) == ("cpu", 1) else f"{kind}{count}"
    return Path("output", f"{arch if arch in ARCHITECTURES else DEFAULT.arch}-{place}")
