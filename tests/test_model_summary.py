"""The sizes that model_summary.py prints are those of the model that resnet_main.py builds."""

import json
from pathlib import Path

import pytest
import torch
from kit import Result, error_line, run
from torch import nn
from torchvision import models

from image_classification import model as image_model
from image_classification.settings import STEMS, ModelSpec
from model_summary import describe

PUBLISHED = """\
  conv            3×64×64 → 64×64×64
  pool           64×64×64 → 64×32×32
  block 1        64×32×32 → 64×32×32
  block 2        64×32×32 → 128×16×16
  block 3       128×16×16 → 256×8×8
  block 4         256×8×8 → 512×4×4
  average pool    512×4×4 → 512×1×1
  classifier          512 → 200
Parameters: 11,279,112
"""


def test_the_default_is_the_published_table_below_torchsummarys(tmp_path: Path) -> None:
    result = run("model_summary.py", cwd=tmp_path)
    assert result.code == 0, result
    assert PUBLISHED in result.out
    assert "           Linear-68                  [-1, 200]         102,600" in result.out
    assert result.out.count("11,279,112") == 1
    assert sum(parameters_by_row(result)) == 11_279_112
    assert "Multiply-adds an image: 592,285,696\n" in result.out  # 4 × 148 M of stride 2


def parameters_by_row(result: Result) -> list[int]:
    """The last column of the table of layers, which ends with a rule and nothing below it."""
    *_, rows, rest = result.out.split(f"{'=' * 64}\n")
    assert "Total" not in rest and " MB" not in rest
    return [int(row.split()[-1].replace(",", "")) for row in rows.splitlines()]


@pytest.mark.parametrize("stem", STEMS)
def test_every_stems_sizes_are_those_of_hooks_on_the_model(stem: str, tmp_path: Path) -> None:
    model = image_model.build_model(ModelSpec("resnet18", stem, 20, 64))
    sizes: list[tuple[list[int], list[int]]] = []
    for module in model.children():
        module.register_forward_hook(
            lambda _module, inputs, output: sizes.append(
                (list(inputs[0].shape[1:]), list(output.shape[1:]))
            )
        )
    model(torch.zeros(2, 3, 64, 64))
    flags = ("--stem", stem, "--num-classes", 20, "--json")
    summary = json.loads(run("model_summary.py", *flags, cwd=tmp_path).out)
    found = [(s["input"], s["output"]) for s in summary["stages"]]
    assert found == [size for i, size in enumerate(sizes) if i not in (1, 2)]  # bn1, relu
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())


def test_activation_memory_and_arithmetic_by_hand(tmp_path: Path) -> None:
    """VGG-11 has only convolutions, linear layers, in-place ReLU, pooling and dropout."""
    flags = ("-a", "vgg11", "--num-classes", 10, "--json")
    summary = json.loads(run("model_summary.py", *flags, cwd=tmp_path).out)
    # (channels in, channels out, side of the output, whether pooling follows)
    convolutions = [(3, 64, 64, True), (64, 128, 32, True), (128, 256, 16, False)]
    convolutions += [(256, 256, 16, True), (256, 512, 8, False), (512, 512, 8, True)]
    convolutions += [(512, 512, 4, False), (512, 512, 4, True)]
    linear = [(512 * 49, 4096), (4096, 4096), (4096, 10)]
    products = sum(9 * i * o * side**2 for i, o, side, _ in convolutions)
    assert summary["multiply_adds"] == products + sum(i * o for i, o in linear)

    kept = 4 * 3 * 64**2  # the image
    for _, out, side, pooled in convolutions:
        kept += 4 * out * side**2  # the ReLU's output, which is the next layer's input
        kept += (4 + 8) * out * (side // 2) ** 2 if pooled else 0  # pooled, and int64 indices
    kept -= 4 * 512 * 2**2  # the last one is resized before the classifier reads it
    kept += 4 * 512 * 49
    for _, out in linear[:2]:  # the ReLU's output, dropout's mask and its output
        kept += 4 * out + 1 * out + 4 * out
    assert summary["activation_bytes"] == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("arch", ["vit", "swin_t", "resnet18"])
def test_activation_memory_is_what_autograd_keeps_on_a_cpu(arch: str) -> None:
    spec = ModelSpec(arch, "stock" if arch == "resnet18" else None, 10, 32)
    model: nn.Module
    if arch == "vit":
        model = models.VisionTransformer(32, 8, 2, 2, hidden_dim=32, mlp_dim=64, num_classes=10)
    else:
        model = image_model.build_model(spec)
    weights = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(torch.zeros(2, 3, 32, 32))
    found = describe(model, spec)["activation_bytes"]
    assert found == sum(storage.nbytes() for storage in kept.values()) // 2


def test_a_bare_vision_transformer_has_its_image_size_in_its_weights(tmp_path: Path) -> None:
    spec = ModelSpec("vit_b_32", None, 5, 96)
    torch.save(image_model.build_model(spec).state_dict(), tmp_path / "bare.pth")
    flags = ("--checkpoint", "bare.pth", "-a", "vit_b_32", "--json")
    summary = json.loads(run("model_summary.py", *flags, cwd=tmp_path).out)
    assert ModelSpec(*(summary[key] for key in ModelSpec._fields)) == spec


def test_a_checkpoint_is_enough(tmp_path: Path) -> None:
    spec = ModelSpec("resnet34", "cifar", 5, 48)
    content = {**spec._asdict(), "state_dict": image_model.build_model(spec).state_dict()}
    torch.save(content, tmp_path / "a.pth")
    flags = ("--checkpoint", "a.pth", "--json")
    summary = json.loads(run("model_summary.py", *flags, cwd=tmp_path).out)
    assert ModelSpec(*(summary[key] for key in ModelSpec._fields)) == spec


@pytest.mark.parametrize("arch", ["vit_b_16", "swin_t", "googlenet", "densenet121"])
def test_other_families(arch: str, tmp_path: Path) -> None:
    result = run("model_summary.py", "-a", arch, cwd=tmp_path)
    assert result.code == 0, result
    assert "Multiply-adds an image" in result.out
    # Attention's weights are in its row, though torchsummary sees none of them.
    model = image_model.build_model(ModelSpec(arch, None, 200, 64))
    count = sum(p.numel() for p in model.parameters())
    token = model.class_token.numel() if isinstance(model, models.VisionTransformer) else 0
    assert sum(parameters_by_row(result)) == count - token  # which is of no layer
    assert f"Parameters: {count:,}\n" in result.out


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    spec = ModelSpec("resnet18", "cifar", 5, 32)
    state = image_model.build_model(spec).state_dict()
    torch.save({**spec._asdict(), "state_dict": state}, tmp_path / "a.pth")
    torch.save({"model": "GRU", "vocabulary": ["a"], "state_dict": state}, tmp_path / "text.pt")
    for flags, message in {
        ("-a", "maxvit_t"): "use --image-size 224",
        ("-a", "resnet19"): "did you mean",
        ("--checkpoint", "text.pth"): "no checkpoint",
        ("--checkpoint", "a.pth", "-a", "resnet50"): "a.pth has arch resnet18, not resnet50: leave",
        ("--checkpoint", "a.pth", "--stem", "stock"): "a.pth has stem cifar, not stock: leave",
        ("--checkpoint", "text.pt"): "text.pt: holds the language model GRU, no classifier",
        ("-a", "vgg11", "--stem", "stock"): "--stem is for ResNets, and vgg11 is none",
        ("--image-size", "0"): "must be at least 1",
    }.items():
        assert message in error_line(run("model_summary.py", *flags, cwd=tmp_path))
