"""Image classifiers: torchvision's architectures with a stem and a head for the dataset."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import nn
from torch.func import functional_call
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from engine.cli import UserError
from image_classification.settings import ModelSpec

ARCHITECTURES = sorted(models.list_models(module=models))


def check_architecture(arch: str) -> None:
    if arch not in ARCHITECTURES:
        near = difflib.get_close_matches(arch.lower(), ARCHITECTURES, n=3, cutoff=0.5)
        all_of_them = f"one of {' '.join(ARCHITECTURES)}"
        hint = f"did you mean {' or '.join(near)}?" if near else all_of_them
        raise UserError(f"unknown architecture {arch!r}: {hint}")


def build_model(spec: ModelSpec, pretrained: bool = False) -> nn.Module:
    """A torchvision classifier whose head has `num_classes` outputs.

    A ResNet's stem `stock` is torchvision's: a 7×7 convolution of stride 2, then pooling.
    `stride1` has stride 1 instead, which suits 64 px; the state dict has the same shapes. `cifar`
    is a 3×3 convolution of stride 1 without pooling.

    Args:
        pretrained: take torchvision's ImageNet weights, except for layers whose shape differs
            (the head for another number of classes, the cifar stem).

    Raises:
        UserError: an unknown architecture, one that cannot take images of this size, or weights
            that cannot be downloaded.
    """
    check_architecture(spec.arch)
    model, reason = _try(spec)
    if model is None:
        for size in (96, 128, 160, 192, 224, 256, 299, 384, 448, 518):
            if size > spec.image_size and _try(spec._replace(image_size=size))[0] is not None:
                reason = f"({reason}): use --image-size {size} or another --arch"
                break
        raise UserError(f"{spec.arch} cannot take images of {spec.image_size} px {reason}")
    if pretrained:
        _load_pretrained(model, spec)
    return model


def _construct(spec: ModelSpec) -> nn.Module:
    options: dict[str, Any] = {}
    if spec.arch in ("googlenet", "inception_v3"):
        # With auxiliary heads forward would return several outputs. Torchvision's weights expect
        # inputs normalised as in the TensorFlow models that they come from.
        options = {"aux_logits": False, "init_weights": True, "transform_input": True}
    elif spec.arch.startswith("vit_"):
        options = {"image_size": spec.image_size}
    elif spec.arch.startswith("maxvit"):
        options = {"input_size": (spec.image_size, spec.image_size)}
    model: nn.Module = models.get_model(spec.arch, num_classes=spec.num_classes, **options)
    if isinstance(model, models.ResNet) and spec.stem == "stride1":
        model.conv1.stride = (1, 1)
    elif isinstance(model, models.ResNet) and spec.stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def _try(spec: ModelSpec) -> tuple[nn.Module | None, str]:
    """The model, or None and its error message when it cannot take images of this size."""
    try:
        model = _construct(spec)
        with torch.no_grad():
            images = torch.empty(2, 3, spec.image_size, spec.image_size, device="meta")
            functional_call(model.eval(), meta_tensors(model), (images,))
    # Architectures differ: an assert, a ValueError, or a RuntimeError of some kernel.
    except Exception as error:
        return None, str(error).splitlines()[0] if str(error) else type(error).__name__
    return model.train(), ""


def meta_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers on the meta device, for torch.func.functional_call.

    A forward pass with them and meta images has all shapes and hooks, but no arithmetic.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach().to("meta").requires_grad_(t.requires_grad) for n, t in tensors}


def _load_pretrained(model: nn.Module, spec: ModelSpec) -> None:
    choices = models.get_model_weights(spec.arch)
    # The original's pretrained=True gives torchvision's first weights.
    weights = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)
    try:
        # Torchvision's constructor, since it renames the old keys of some of its files.
        with patch_environment(torch_force_weights_only_load="1"):
            state = models.get_model(spec.arch, weights=weights).state_dict()
    # A file that is something else fails in whichever layer meets it, with its exception.
    except Exception as error:
        reason = getattr(error, "reason", None) or f"{error}".split("\n")[0].split(". ")[0]
        path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        if path.exists():
            raise UserError(
                f"--pretrained: {path} is not the file of {weights.url} ({reason}): delete it, and "
                "it is downloaded again"
            ) from error
        raise UserError(
            f"--pretrained: cannot get {weights.url} ({reason}): download it by hand to {path}"
        ) from error
    if isinstance(model, models.VisionTransformer):
        state = interpolate_embeddings(spec.image_size, model.patch_size, state)
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)
    new = sorted(own.keys() - fitting.keys())
    print(f"=> not in torchvision's weights, so new: {', '.join(new) or 'nothing'}", flush=True)
