"""The loss and the dropout of a language model, in forms that suit a CPU's caches.

On other devices, and for torch.compile, both are torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Dropout(nn.Dropout):
    """nn.Dropout that draws 16 random bits an element on a CPU, where torch's own draws 64.

    There `p` is rounded to a multiple of 2**-16, and the kept elements are scaled to match. The
    result does not depend on the number of threads.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        dropped = round(self.p * 2**16)
        on_cpu = features.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (self.training and on_cpu and 0 < dropped < 2**16):
            return super().forward(features)
        count = features.numel()
        draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[:count].view_as(features) >= dropped - 2**15
        return features * kept.to(features.dtype).mul_(2**16 / (2**16 - dropped))


CACHED = 700_000  # logits, in float32 2.8 MB


def _widened(matrix: torch.Tensor, last: torch.Tensor | float) -> torch.Tensor:
    """`matrix` in autocast's precision, with `last` as one more column.

    Folds the bias into the weight as one more column, and a 1 into the features: in bf16, F.linear
    with a bias is three times slower. Columns of zeros make their number a multiple of 16, which
    oneDNN multiplies faster.
    """
    size = matrix.shape[1]
    columns = -(-(size + 1) // 16) * 16
    wide = matrix.new_zeros(len(matrix), columns, dtype=torch.get_autocast_dtype("cpu"))
    wide[:, :size], wide[:, size] = matrix, last
    return wide


class _CachedLoss(torch.autograd.Function):
    """Mean cross entropy of a linear layer on a CPU, with one matrix where autograd has four.

    Moving the logits, their logarithms and both gradients through memory takes a CPU as long as
    the matrix products. Here the logits become their own gradient, a few rows at a time, so that
    intermediate values stay in the cache. The results are those of `F.linear` and
    `F.cross_entropy`. Under autocast the products are in its precision, everything else is float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        ctx.size = features.shape[1]
        if torch.is_autocast_enabled("cpu"):
            features, weight = _widened(features, 1.0), _widened(weight, bias)
            matrix = F.linear(features, weight)
        else:
            matrix = F.linear(features, weight, bias)
        losses = torch.empty(len(features))
        share = torch.full_like(losses, 1 / len(losses))
        threads = torch.get_num_threads()  # each gets an equal share of the rows
        rows = threads * max(1, CACHED // (threads * len(weight)))
        for part in (slice(first, first + rows) for first in range(0, len(features), rows)):
            logits, word = matrix[part].float(), targets[part, None]
            if matrix.dtype == torch.float32:
                with torch.enable_grad():
                    logits = logits.detach().requires_grad_()
                    loss = F.cross_entropy(logits, targets[part], reduction="none")
                (matrix[part],) = torch.autograd.grad(loss, logits, share[part])
                losses[part] = loss.detach()
            else:
                # By hand this takes two thirds of autograd's time; it rounds in another order.
                likelihood = logits.softmax(1)
                chosen = likelihood.gather(1, word)
                if chosen.min() > torch.finfo(torch.float32).tiny:
                    losses[part, None] = -chosen.log()
                else:  # a likelihood so small has fewer digits, or is zero
                    losses[part] = F.cross_entropy(logits, targets[part], reduction="none")
                # -1 is exact (`backward` divides). -1 / rows would be rounded, alike in every row.
                matrix[part] = likelihood.scatter_(1, word, -1.0, reduce="add")
        ctx.save_for_backward(features, weight, matrix)
        # Averages the losses as F.cross_entropy does, to the bit.
        return F.nll_loss(-losses[:, None], torch.zeros_like(targets))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, weight, by_logits = ctx.saved_tensors
        by_features, by_weight = by_logits @ weight, by_logits.t() @ features
        if by_logits.dtype == torch.float32:
            found, share = (by_features, by_weight, by_logits.sum(0)), gradients[0]
        else:
            size = ctx.size
            found = by_features[:, :size], by_weight[:, :size], by_weight[:, size]
            share = gradients[0] / len(by_logits)
        return *(gradient.float().mul_(share) for gradient in found), None


class EvaluationLoss:
    """`loss` without gradients, of many segments with the same weights.

    A CPU decodes a few words of the vocabulary at a time, so that their logits never leave the
    cache. Build and call it within one autocast context: it then converts the weights once.
    """

    def __init__(self, decoder: nn.Linear) -> None:
        self.decoder = decoder
        self.wide = None
        if decoder.weight.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            self.wide = _widened(decoder.weight, decoder.bias)

    def __call__(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As `loss`."""
        weight, bias, features = self.decoder.weight, self.decoder.bias, features.flatten(0, 1)
        if features.device.type == "cpu":
            inputs = features if self.wide is None else _widened(features, 1.0)
            total, chosen = torch.zeros(len(features)), torch.zeros(len(features))
            words = max(1, CACHED // len(features))
            for first in range(0, len(weight), words):
                part = slice(first, first + words)
                if self.wide is None:
                    logits = F.linear(inputs, weight[part], bias[part])
                else:
                    logits = F.linear(inputs, self.wide[part]).float()
                mine = (first <= targets) & (targets < first + words)
                chosen[mine] = logits[mine, targets[mine] - first]
                total += logits.exp_().sum(1)
            # Otherwise a logit above 88 has overflowed, or all are so low that digits are lost.
            if total.isfinite().all() and total.min() > torch.finfo(torch.float32).tiny ** 0.5:
                return (total.log() - chosen).mean()
        return F.cross_entropy(F.linear(features, weight, bias).float(), targets)


def loss(features: torch.Tensor, decoder: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in float32, of the decoded features.

    Args:
        features: [t, columns, size].
        decoder: from `size` to the words of the vocabulary.
        targets: [t * columns].
    """
    features = features.flatten(0, 1)
    if features.device.type == "cpu" and not torch.compiler.is_compiling():
        mean: torch.Tensor = _CachedLoss.apply(features, decoder.weight, decoder.bias, targets)
        return mean
    return F.cross_entropy(decoder(features).float(), targets)
