"""Loss and dropout of a CPU: torch's values, or as good as those."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from word_language_model.kernels import Dropout, EvaluationLoss, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.99])
def test_dropout_drops_its_share_scales_the_rest_and_repeats(p: float, dtype: torch.dtype) -> None:
    dropout = Dropout(p)
    features = torch.ones(301, 333, dtype=dtype, requires_grad=True)  # 100,233: no multiple of 4
    torch.manual_seed(1)
    dropped = dropout(features)
    dropped.sum().backward()
    assert dropped.dtype == dtype
    assert features.grad is not None
    assert torch.equal(features.grad, dropped)
    kept = dropped[dropped != 0]
    assert kept.unique().tolist() == pytest.approx([1 / (1 - p)], rel=0.01)
    deviation = math.sqrt(p * (1 - p) / features.numel())
    assert len(kept) / features.numel() == pytest.approx(1 - p, abs=4 * deviation)
    # Neighbours, which share a random number, are dropped independently.
    pairs = (dropped.flatten()[:-1] != 0) & (dropped.flatten()[1:] != 0)
    assert pairs.float().mean().item() == pytest.approx((1 - p) ** 2, abs=6 * deviation)
    torch.manual_seed(1)
    assert torch.equal(dropout(features), dropped)
    assert not torch.equal(dropout(features), dropped)
    assert dropout.eval()(features) is features


@pytest.mark.parametrize(("count", "words"), [(1, 40), (30, 33278), (301, 5000)])
def test_the_loss_of_float32_is_cross_entropys_to_the_bit(count: int, words: int) -> None:
    """In parts of some 20 rows, of 140, and in one."""
    torch.manual_seed(0)
    decoder = nn.Linear(16, words)
    features = torch.randn(count, 1, 16, requires_grad=True)
    targets = torch.randint(words, (count,))
    ours = loss(features, decoder, targets)
    plain = F.cross_entropy(decoder(features).flatten(0, 1), targets)
    assert ours == plain
    inputs = [features, decoder.weight, decoder.bias]
    for mine, autograds in zip(
        *(torch.autograd.grad(x, inputs) for x in (ours, plain)), strict=True
    ):
        assert torch.equal(mine, autograds)
    # Evaluation takes the vocabulary in parts; with logits that float32's exp cannot hold, at once.
    for shift in (0, 100, -100, -1000):
        with torch.inference_mode():
            decoder.bias.add_(shift)
            evaluated = EvaluationLoss(decoder)(features, targets)
        assert evaluated.item() == pytest.approx(plain.item(), rel=1e-4 if shift else 1e-5)


@pytest.mark.parametrize("count", [3, 140, 3001])
def test_the_loss_of_bf16_is_autocasts_with_gradients_as_good(count: int) -> None:
    """Against float32: it may be no further from it than an autocast linear layer is."""
    torch.manual_seed(0)
    decoder = nn.Linear(16, 500)
    features = torch.randn(count, 1, 16, requires_grad=True)
    targets = torch.randint(500, (count,))

    def gradients(mean: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(3 * mean, [features, decoder.weight, decoder.bias]))

    exact = loss(features, decoder, targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss(features, decoder, targets)
        with torch.no_grad():
            evaluated = EvaluationLoss(decoder)(features, targets)
        plain = F.cross_entropy(decoder(features).flatten(0, 1).float(), targets)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=1e-3)
    assert ours.item() == pytest.approx(evaluated.item(), rel=1e-6)
    rows = zip(*map(gradients, (exact, ours, plain)), strict=True)
    for right, mine, autocasts in rows:
        assert (mine - right).norm() <= 1.1 * (autocasts - right).norm()
    # Logits beyond float32's exp, and one that is not a number.
    with torch.autocast("cpu", torch.bfloat16):
        for factor in (100, 1000):
            beyond = loss(factor * features, decoder, targets)
            with torch.no_grad():
                evaluated = EvaluationLoss(decoder)(factor * features, targets)
            assert 40 < evaluated < math.inf
            assert beyond.item() == pytest.approx(evaluated.item(), rel=1e-6)
        assert loss(math.nan * features, decoder, targets).isnan()
