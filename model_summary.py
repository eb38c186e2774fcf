"""Print a classifier's layers and their sizes, its parameters, arithmetic and memory.

    python model_summary.py                       # what resnet_main.py trains by default
    python model_summary.py -a resnet50 --stem stock
    python model_summary.py --checkpoint output/resnet18-gpu1/model_best.pth --json

The default, a ResNet-18 for 64 px: 11,279,112 parameters and, an image, 592,285,696 multiply-adds
and 6.79 MiB of activations kept for the backward pass.
"""

from __future__ import annotations

from engine.stop import check_flags, run_script  # before slow imports: see engine/stop.py

# isort: split

import contextlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from engine.cli import ArgumentParser, pathname, positive_int, product
from image_classification.settings import DEFAULT, STEMS


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("-a", "--arch", metavar="ARCH",
        help=f"one of torchvision's architectures, else {DEFAULT.arch}; `-a help` lists them")
    add("--stem", choices=STEMS, help=f"first layers of a ResNet, else {DEFAULT.stem}")
    add("--image-size", type=positive_int, metavar="PX", help=f"else {DEFAULT.image_size}")
    add("--num-classes", type=positive_int, metavar="N", help=f"else {DEFAULT.num_classes}")
    add("--checkpoint", type=pathname, metavar="PATH", help="describe the model that it holds")
    add("--json", action="store_true", help="print one JSON object instead of the tables")
    # fmt: on
    return parser


if __name__ == "__main__":
    check_flags(make_parser(), alone=True)


import torch
import torchsummary
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet

from image_classification.checkpoint import load, restore_model
from image_classification.model import build_model
from image_classification.settings import ModelSpec, default_spec, has_stem

# What the published table calls a ResNet's modules.
RESNET_STAGES = {"conv1": "conv", "maxpool": "pool", "avgpool": "average pool", "fc": "classifier"}
RESNET_STAGES |= {f"layer{i}": f"block {i}" for i in range(1, 5)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse(argv)

    if args.checkpoint:
        if args.num_classes:
            parser.error("--num-classes: a checkpoint has its own")
        model, spec = restore_model(load(args.checkpoint), args.arch, args.stem, args.image_size)
    else:
        spec = default_spec(args.arch or DEFAULT.arch)
        flags = {"stem": args.stem, "num_classes": args.num_classes, "image_size": args.image_size}
        spec = spec._replace(**{name: value for name, value in flags.items() if value})
        model = build_model(spec)
    if args.stem and not has_stem(spec.arch):
        parser.error(f"--stem is for ResNets, and {spec.arch} is none")

    summary = describe(model, spec)
    with product():
        if args.json:
            print(json.dumps(summary, indent=2))
        else:
            print_layers(model, spec.image_size)
            print_stages(summary)


def describe(model: nn.Module, spec: ModelSpec) -> dict[str, Any]:
    """The stages' sizes, the parameters, and the multiply-adds and activation bytes per image.

    All of it comes from one forward pass of fake tensors, which computes nothing but shapes. Unlike
    those of the meta device they take the fused attention kernel, which keeps no product of queries
    and keys. `activation_bytes` is what autograd keeps in float32 for the backward pass, without
    weights.
    """
    stages: list[dict[str, Any]] = []
    hooks = []
    for name, module in _stages(model):

        def record(_: nn.Module, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            sizes = {"input": list(inputs[0].shape[1:]), "output": list(output.shape[1:])}
            stages.append({"name": name, **sizes})

        hooks.append(module.register_forward_hook(record))

    fake = FakeTensorMode()
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors: dict[str, torch.Tensor] = {name: fake.from_tensor(t) for name, t in named}
    weights = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    batch = 2  # batch normalisation cannot train on one value per channel
    flops = FlopCounterMode(display=False)
    with fake, flops, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        images = torch.empty(batch, 3, spec.image_size, spec.image_size)
        functional_call(model.train(), tensors, (images,))
    for hook in hooks:
        hook.remove()
    return {
        **spec._asdict(),
        "stages": stages,
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": flops.get_total_flops() // (2 * batch),
        "activation_bytes": sum(storage.nbytes() for storage in kept.values()) // batch,
    }


def _stages(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules: a ResNet's as published, else the top level, with `features` unfolded."""
    if isinstance(model, ResNet):
        return [(RESNET_STAGES[n], m) for n, m in model.named_children() if n in RESNET_STAGES]
    stages = []
    for name, child in model.named_children():
        inner = list(child.named_children()) if name == "features" else []
        stages.extend([(f"{name}.{n}", m) for n, m in inner] or [(name, child)])
    return stages


def print_layers(model: nn.Module, image_size: int) -> None:
    """torchsummary's table of layers, from a forward pass on the CPU.

    Its own parameters of a layer are `weight` and `bias`, which an attention has in other places.
    Here a row has all parameters of its layer but those of another row. The totals below the table
    are left out: they are of its own count, and of arithmetic that overflows.
    """
    hooks, called = [], []
    for module in model.modules():
        # torchsummary takes every input and output for a tensor. Attention returns None for
        # weights that were not asked for. A DenseNet's layer takes a list, or its concatenation.
        if isinstance(module, nn.MultiheadAttention):
            hooks.append(module.register_forward_hook(lambda _m, _i, out: (out[0], out[0][:0])))
        else:
            hooks.append(module.register_forward_pre_hook(_concatenate))
        if module is not model and not isinstance(module, (nn.Sequential, nn.ModuleList)):  # a row
            hooks.append(module.register_forward_hook(lambda m, _i, _out: called.append(m)))
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()) as printed:
        torchsummary.summary(model.eval(), (3, image_size, image_size), device="cpu")
    for hook in hooks:
        hook.remove()
    own: Counter[nn.Module] = Counter()
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        while layer and model.get_submodule(layer) not in called:
            layer = layer.rpartition(".")[0]
        own[model.get_submodule(layer)] += parameter.numel()
    rule, title, double, *lines = printed.getvalue().splitlines()
    print(rule, title, double, sep="\n")
    for module, line in zip(called, lines, strict=False):
        print(f"{line[:-15]}{own.pop(module, 0):>15,}")
    print(double)


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
    run_script(main)
