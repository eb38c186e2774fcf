"""Print a classifier's layers with their sizes, its parameters, arithmetic and memory.

python model_summary.py                       # what resnet_main.py trains by default
python model_summary.py -a resnet50 --stem stock
python model_summary.py --checkpoint output/resnet/model_best.pth --json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchsummary
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet

import checkpoint as checkpoints
import image_checkpoint
import image_model
import runtime
from image_model import ARCHITECTURES, DEFAULT_ARCH, DEFAULT_SIZE, DEFAULT_STEM, ModelSpec
from runtime import positive_int

DEFAULT_CLASSES = 200  # Tiny-ImageNet's

# The published table's names of a ResNet's modules.
RESNET_STAGES = {"conv1": "conv", "maxpool": "pool", "avgpool": "average pool", "fc": "classifier"}
RESNET_STAGES |= {f"layer{i}": f"block {i}" for i in range(1, 5)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = runtime.ArgumentParser(description="Print the intermediate sizes of a classifier")
    add = parser.add_argument
    # fmt: off
    add("-a", "--arch", metavar="ARCH",
        help=f"model architecture (default: {DEFAULT_ARCH}): {' | '.join(ARCHITECTURES)}")
    add("--stem", choices=image_model.STEMS,
        help=f"first layers of a ResNet (default: {DEFAULT_STEM})")
    add("--image-size", type=positive_int, metavar="PX", help=f"(default: {DEFAULT_SIZE})")
    add("--num-classes", type=positive_int, metavar="N", help=f"(default: {DEFAULT_CLASSES})")
    add("--checkpoint", type=Path, metavar="PATH", help="describe the model that it holds")
    add("--json", action="store_true", help="print one JSON object instead of the tables")
    # fmt: on
    args = parser.parse_args(argv)

    if args.checkpoint:
        if args.num_classes:
            parser.error("--num-classes: a checkpoint has its own")
        content = checkpoints.load(args.checkpoint)
        spec = image_checkpoint.read_spec(content, args.checkpoint, args.arch, args.stem)
        for flag, value in (("arch", spec.arch), ("stem", spec.stem)):
            if getattr(args, flag) not in (None, value):
                parser.error(f"{args.checkpoint} has {flag} {value}, not {getattr(args, flag)}")
        spec = spec._replace(image_size=args.image_size or spec.image_size)
        model = image_model.build_model(spec)
        image_checkpoint.load_weights(model, content, args.checkpoint, spec.arch)
    else:
        arch = args.arch or DEFAULT_ARCH
        if args.stem and not image_model.has_stem(arch):
            parser.error(f"--stem is for ResNets, and {arch} is none")
        stem = (args.stem or DEFAULT_STEM) if image_model.has_stem(arch) else None
        classes, size = args.num_classes or DEFAULT_CLASSES, args.image_size or DEFAULT_SIZE
        spec = ModelSpec(arch, stem, classes, size)
        model = image_model.build_model(spec)

    summary = describe(model, spec)
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        print_layers(model, spec.image_size)
        print_stages(summary)


def describe(model: nn.Module, spec: ModelSpec) -> dict[str, Any]:
    """Sizes of the stages, parameters, and per image multiply-adds and activation memory.

    Everything comes from one training pass on the meta device, which computes shapes alone.
    `activation_bytes` is what autograd keeps for the backward pass, in float32.
    """
    stages: list[dict[str, Any]] = []
    hooks = []
    for name, module in _stages(model):

        def record(_: nn.Module, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            sizes = {"input": list(inputs[0].shape[1:]), "output": list(output.shape[1:])}
            stages.append({"name": name, **sizes})

        hooks.append(module.register_forward_hook(record))

    tensors = image_model.meta_tensors(model)
    weights = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    batch = 2  # batch normalisation cannot train on one image of 1×1
    images = torch.empty(batch, 3, spec.image_size, spec.image_size, device="meta")
    flops = FlopCounterMode(display=False)
    with flops, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        functional_call(model.train(), tensors, (images,))
    for hook in hooks:
        hook.remove()
    parameters = list(model.parameters())
    return {
        **spec._asdict(),
        "stages": stages,
        "parameters": sum(p.numel() for p in parameters),
        "multiply_adds": flops.get_total_flops() // (2 * batch),
        "activation_bytes": sum(storage.nbytes() for storage in kept.values()) // batch,
    }


def _stages(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules to show: a ResNet's as published, else the top level and its `features`."""
    if isinstance(model, ResNet):
        return [(RESNET_STAGES[n], m) for n, m in model.named_children() if n in RESNET_STAGES]
    stages = []
    for name, child in model.named_children():
        inner = list(child.named_children()) if name == "features" else []
        stages.extend([(f"{name}.{n}", m) for n, m in inner] or [(name, child)])
    return stages


def print_layers(model: nn.Module, image_size: int) -> None:
    """torchsummary's own table, of a pass on the CPU."""
    hooks = []
    for module in model.modules():
        # torchsummary asks every input and output for a size. Attention returns None in place of
        # weights that nobody asked for; a layer of a DenseNet takes a list, or its concatenation.
        if isinstance(module, nn.MultiheadAttention):
            hooks.append(module.register_forward_hook(lambda _m, _i, out: (out[0], out[0][:0])))
        else:
            hooks.append(module.register_forward_pre_hook(_concatenate))
    with torch.no_grad():
        torchsummary.summary(model.eval(), (3, image_size, image_size), device="cpu")
    for hook in hooks:
        hook.remove()


def _concatenate(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[torch.Tensor] | None:
    return (torch.cat(inputs[0], 1),) if isinstance(inputs[0], list) else None


def print_stages(summary: dict[str, Any]) -> None:
    rows = [(s["name"], _size(s["input"]), _size(s["output"])) for s in summary["stages"]]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    stem = f", stem {summary['stem']}" if summary["stem"] else ""
    print(f"{summary['arch']}{stem}, 3×{summary['image_size']}×{summary['image_size']}")
    for name, before, after in rows:
        print(f"  {name:{widths[0]}}  {before:>{widths[1]}} → {after}")
    print(f"Parameters: {summary['parameters']:,}")
    print(f"Multiply-adds an image: {summary['multiply_adds']:,}")
    print(f"Activations kept for backward, an image: {summary['activation_bytes'] / 2**20:.2f} MiB")


def _size(shape: list[int]) -> str:
    return "×".join(map(str, shape))


if __name__ == "__main__":
    runtime.run_script(main)
