"""The sizes that model_summary.py prints are those of the model that resnet_main.py builds."""

import json
from pathlib import Path

import pytest
import torch
from kit import error_line, run

from image_classification import model as image_model
from image_classification.settings import STEMS, ModelSpec

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
    assert "Total params: 11,279,112" in result.out
    assert "Multiply-adds an image: 592,285,696\n" in result.out  # 4 × 148 M of stride 2


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


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    for flags, message in {
        ("-a", "maxvit_t"): "use --image-size 224",
        ("-a", "resnet19"): "did you mean",
        ("--checkpoint", "text.pth"): "no checkpoint",
        ("--image-size", "0"): "must be at least 1",
    }.items():
        assert message in error_line(run("model_summary.py", *flags, cwd=tmp_path))
