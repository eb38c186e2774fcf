"""How fast a machine does the arithmetic of a training step, and nothing else.

The contestants that bound the others, and the FLOPs of a step. The FLOPs are the reference's: what
the kit computes beyond them, a loss computed twice for instance, does not count as work.
"""

from __future__ import annotations

import collections
import functools
import warnings
from typing import Any, NamedTuple

import reference_image
import reference_lm
import rounds
import torch
import torch.nn.functional as F
from rounds import Round
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def flops_per_token(work: str, model: str, sizes: dict[str, int], bptt: int) -> float:
    network = reference_lm.language_model(model, sizes)
    data = reference_lm.text(1, 2, bptt, sizes["words"])
    counter = FlopCounterMode(display=False)
    # The counter does not know the FLOPs of oneDNN's LSTM, a single operation.
    without_onednn = torch.backends.mkldnn.flags(enabled=False)
    with warnings.catch_warnings(action="ignore"), without_onednn, counter:
        loss, _ = reference_lm.segment_loss(network, data[:-1], data[1:].view(-1), None)
        if work == "training":
            loss.backward()
    return counter.get_total_flops() / (2 * bptt)


def products(work: str, rows: int, size: int, words: int, dtype: str, flops: float) -> Round:
    """Tokens a second if all of a step's `flops` a token went at the decoder's rate alone.

    That is the rate of the product for the logits and, in training, of those for two gradients.
    """
    kind, device = getattr(torch, dtype), rounds.device()
    features, weight = (torch.randn(n, size, device=device).to(kind) for n in (rows, words))
    logits = torch.randn(rows, words, device=device).to(kind)
    # Into memory that is there already: page faults are not arithmetic.
    logits_out, features_out, weight_out = map(torch.empty_like, (logits, features, weight))

    def multiply(repeats: int) -> None:
        for _ in range(repeats):
            torch.mm(features, weight.t(), out=logits_out)
            if work == "training":
                torch.mm(logits, weight, out=features_out)
                torch.mm(logits.t(), features, out=weight_out)

    multiply(1)
    repeats = max(1, round(1 / rounds.seconds(lambda: multiply(1))))
    count = repeats * 2 * rows * size * words * (3 if work == "training" else 1)
    return lambda: [count / rounds.seconds(lambda: multiply(repeats)) / flops]


def one_word(words: int, size: int, lengths: list[int]) -> Round:
    """Milliseconds of the decoder's product with the features of one word, for each length."""
    device, repeats = rounds.device(), 200
    weight, features = torch.randn(size, words, device=device), torch.randn(1, size, device=device)
    logits = torch.empty(1, words, device=device)

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(features, weight, out=logits)

    return lambda: [1000 * rounds.seconds(multiply) / repeats] * len(lengths)


def flops_per_image(work: str, network: dict[str, Any], image_size: int) -> float:
    with torch.device("meta"):
        model = reference_image.build_network(**network)
        images, targets = torch.empty(2, 3, image_size, image_size), torch.zeros(2).long()
        counter = FlopCounterMode(display=False)
        with counter:
            loss = F.cross_entropy(model(images), targets)
            if work == "training":
                loss.backward()
    return counter.get_total_flops() / 2


class Convolution(NamedTuple):
    """A layer of a network: shapes of its input and its weight, and how they are applied."""

    images: tuple[int, ...]
    kernel: tuple[int, ...]
    options: tuple[Any, ...]  # of F.conv2d after input and weight
    is_first: bool  # its input has no gradient


def layers_of(
    network: dict[str, Any], batch: int, image_size: int
) -> collections.Counter[Convolution]:
    found: collections.Counter[Convolution] = collections.Counter()

    def note(module: nn.Conv2d, inputs: tuple[torch.Tensor], _: object) -> None:
        options = (None, module.stride, module.padding, module.dilation, module.groups)
        shapes = tuple(inputs[0].shape), tuple(module.weight.shape)
        found[Convolution(*shapes, options, not found)] += 1

    with torch.device("meta"):
        model = reference_image.build_network(**network)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(batch, 3, image_size, image_size))
    return found


def convolutions(
    work: str, network: dict[str, Any], batch: int, image_size: int, dtype: str, flops: float
) -> Round:
    """Images a second if all of a step's `flops` an image went at the convolutions' rate alone."""
    kind, device = getattr(torch, dtype), rounds.device()
    repeats = 1 if rounds.on_cpu() else 20
    torch.backends.cudnn.benchmark = True
    layers = layers_of(network, batch, image_size)

    def draw(shape: tuple[int, ...], gradient: bool) -> torch.Tensor:
        values = torch.randn(shape, device=device).to(kind, memory_format=torch.channels_last)
        return values.requires_grad_(gradient and work == "training")

    def convolve(
        layer: Convolution, images: torch.Tensor, kernel: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        inputs = [tensor for tensor in (images, kernel) if tensor.requires_grad]
        for _ in range(repeats):
            output = F.conv2d(images, kernel, *layer.options)
            if inputs:
                torch.autograd.grad(output, inputs, gradient)

    def measured() -> list[float]:
        total = elapsed = 0.0
        for layer, count in layers.items():
            images, kernel = draw(layer.images, not layer.is_first), draw(layer.kernel, True)
            gradient = torch.randn_like(F.conv2d(images, kernel, *layer.options).detach())
            step = functools.partial(convolve, layer, images, kernel, gradient)
            step()
            passes = 1 + images.requires_grad + kernel.requires_grad
            total += count * repeats * passes * 2 * gradient.numel() * kernel[0].numel()
            elapsed += count * rounds.seconds(step)
        return [total / elapsed / flops]

    return measured
