"""What a checkpoint of an image classifier says of its model, its classes and its training."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from engine.checkpoints import Checkpoint
from image_classification.model import ARCHITECTURES, build_model, check_architecture
from image_classification.settings import DEFAULT, STEMS, ModelSpec, has_stem

LARGEST_SIZE = 4096  # pixels a side, of an image size that is not asked for by a flag


def read_spec(checkpoint: Checkpoint, arch: str | None, stem: str | None) -> ModelSpec:
    """What model a checkpoint holds: its own keys, else flags, else the defaults.

    A checkpoint of the original or a bare state dict has no stem; torchvision's own is meant.

    Raises:
        UserError: keys of the wrong type or an architecture that torchvision does not have.
    """
    own = checkpoint.value("arch", str)
    if own and own not in ARCHITECTURES:
        raise checkpoint.error(f"is a {own}, which torchvision does not have")
    arch = own or arch or DEFAULT.arch
    check_architecture(arch)
    stem = (checkpoint.value("stem", str) or stem or "stock") if has_stem(arch) else None
    if stem not in (None, *STEMS):
        raise checkpoint.error(f"unknown stem {stem!r}: damaged")
    size = checkpoint.value("image_size", int) or DEFAULT.image_size
    if not 1 <= size <= LARGEST_SIZE:
        raise checkpoint.error(f"image_size is {size}: damaged")
    return ModelSpec(arch, stem, count_classes(checkpoint), size)


def count_classes(checkpoint: Checkpoint) -> int:
    """Outputs of the head, found by its name: a file may have its tensors in any order."""
    state = checkpoint["state_dict"]
    names = [name for name in state if re.match(r"(fc|heads?|classifier)\.", name)]
    if "vocabulary" in checkpoint:
        raise checkpoint.error(f"holds the language model {checkpoint.get('model')}, no classifier")
    if not names:
        raise checkpoint.error("has no fc, head, heads or classifier: not a model of torchvision")
    # Of a classifier with several layers the one with the highest number.
    head = state[max(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])]
    if not head.dim() or not len(head):
        raise checkpoint.error("its head has no outputs: damaged")
    return len(head)


def load_weights(model: nn.Module, checkpoint: Checkpoint, arch: str) -> None:
    """Load a checkpoint's state dict.

    Raises:
        UserError: when its names or shapes are not those of the model.
    """
    own = model.state_dict()
    # torch before 0.4.1 did not count batches, which no figure depends on.
    state = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
    # googlenet and inception_v3 are built without their auxiliary heads.
    state |= {
        k: v
        for k, v in checkpoint["state_dict"].items()
        if k in own or not k.lower().startswith("aux")
    }
    checkpoint.load_state(model, state, f"a {arch}; -a says what it is")


def restore_model(
    checkpoint: Checkpoint,
    arch: str | None = None,
    stem: str | None = None,
    image_size: int | None = None,
) -> tuple[nn.Module, ModelSpec]:
    """The model that a checkpoint holds, on the CPU, with its weights.

    Args:
        arch, stem: for a checkpoint that does not say what it is.
        image_size: pixels a side, instead of the checkpoint's.
    """
    spec = read_spec(checkpoint, arch, stem)
    spec = spec._replace(image_size=image_size or spec.image_size)
    model = build_model(spec)
    load_weights(model, checkpoint, spec.arch)
    return model, spec


def refuse_other_classes(checkpoint: Checkpoint, classes: list[str]) -> None:
    own = checkpoint.value("classes", list)
    count = len(own) if own else count_classes(checkpoint)
    if count != len(classes):
        raise checkpoint.error(f"has {count} classes and the dataset {len(classes)}")
    if own and own != classes:
        first, instead = next(pair for pair in zip(own, classes, strict=True) if len({*pair}) > 1)
        raise checkpoint.error(f"knows class {first} where the dataset has {instead}")


def read_settings(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, Any]:
    """Those of the settings `names` that a checkpoint holds.

    In a checkpoint of the original, learning rate, momentum and weight decay are the optimizer's.
    """
    optimizer = checkpoint.value("optimizer", dict) or {"param_groups": [{}]}
    try:
        group = dict(optimizer["param_groups"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise checkpoint.error("its optimizer has no settings: damaged") from error
    group["lr"] = group.get("initial_lr")
    return {name: checkpoint.get(name, group.get(name)) for name in names}
