"""Architectures, stems and checkpoints of several origins."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import make_dataset
from safetensors.torch import save_file
from torch import nn
from torchvision import models

import resnet_main
from engine import checkpoints
from engine.checkpoints import Checkpoint
from engine.cli import UserError
from image_classification import checkpoint as image_checkpoint
from image_classification import model as image_model
from image_classification.data import find_data
from image_classification.settings import ModelSpec, has_stem

FAMILIES = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5"]
FAMILIES += ["mobilenet_v3_small", "regnet_x_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5"]
FAMILIES += ["squeezenet1_1", "swin_t", "vgg11", "vit_b_16"]


def spec(arch: str = "resnet18", stem: str | None = None, classes: int = 7) -> ModelSpec:
    return ModelSpec(arch, stem, classes, 64)


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_gets_a_head_for_the_dataset(arch: str) -> None:
    model = image_model.build_model(spec(arch, "stride1" if has_stem(arch) else None))
    with torch.no_grad():
        assert model.train()(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    bare = Checkpoint(content={"state_dict": model.state_dict()})
    read = image_checkpoint.read_spec(bare, arch, None)
    assert (read.arch, read.num_classes) == (arch, 7)


@pytest.mark.parametrize(
    ("stem", "conv", "pool", "last"),
    [("stride1", 64, 32, 4), ("stock", 32, 16, 2), ("cifar", 64, 64, 8)],
)
def test_stems_give_the_published_sizes(stem: str, conv: int, pool: int, last: int) -> None:
    model = image_model.build_model(spec(stem=stem))
    sizes: dict[str, tuple[int, ...]] = {}
    for name in ("conv1", "maxpool", "layer1", "layer4", "avgpool"):
        getattr(model, name).register_forward_hook(
            lambda _module, _inputs, output, name=name: sizes.update(
                {name: tuple(output.shape[1:])}
            )
        )
    model(torch.zeros(2, 3, 64, 64))
    assert sizes == {
        "conv1": (64, conv, conv),
        "maxpool": (64, pool, pool),
        "layer1": (64, pool, pool),
        "layer4": (512, last, last),
        "avgpool": (512, 1, 1),
    }


def test_stock_and_stride1_share_a_state_dict_with_torchvision() -> None:
    torch.manual_seed(0)
    stride1 = image_model.build_model(spec(stem="stride1"))
    stock = image_model.build_model(spec(stem="stock"))
    stock.load_state_dict(stride1.state_dict())
    models.resnet18(num_classes=7).load_state_dict(stride1.state_dict())


@pytest.mark.parametrize("arch", ["inception_v3", "maxvit_t", "vit_h_14"])
def test_an_image_size_that_an_architecture_cannot_take_is_refused(arch: str) -> None:
    with pytest.raises(UserError, match=r"cannot take images of 64 px .* use --image-size \d+"):
        image_model.build_model(spec(arch))


def test_near_matches_of_an_unknown_architecture_are_offered() -> None:
    with pytest.raises(UserError, match="'resnet_18': did you mean resnet18"):
        image_model.check_architecture("resnet_18")


@pytest.mark.parametrize("stem", ["stride1", "cifar"])
def test_pretrained_weights_with_a_new_head(
    stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    published = models.resnet18()
    name = models.ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    torch.save(published.state_dict(), folder / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = image_model.build_model(spec(stem=stem), pretrained=True)
    own = model.state_dict()
    same = {
        name
        for name, tensor in published.state_dict().items()
        if own[name].shape == tensor.shape and torch.equal(own[name], tensor)
    }
    new = {"fc.weight", "fc.bias"} | ({"conv1.weight"} if stem == "cifar" else set())
    assert set(published.state_dict()) - same == new


def test_pretrained_weights_under_old_names_and_for_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DenseNet's published files have names of 2017; a ViT's positions are for 224 px."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    dense = models.densenet121()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): tensor
        for name, tensor in dense.state_dict().items()
        if "num_batches_tracked" not in name
    }
    assert old.keys() != dense.state_dict().keys()
    name = models.DenseNet121_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    torch.save(old, folder / name)
    model = image_model.build_model(spec("densenet121"), pretrained=True)
    assert "so new: classifier.bias, classifier.weight\n" in capsys.readouterr().out
    weight = "features.denseblock1.denselayer1.conv1.weight"
    assert torch.equal(model.state_dict()[weight], dense.state_dict()[weight])

    name = models.ViT_B_32_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    torch.save(models.vit_b_32().state_dict(), folder / name)
    image_model.build_model(spec("vit_b_32"), pretrained=True)
    assert "so new: heads.head.bias, heads.head.weight\n" in capsys.readouterr().out


def test_pretrained_without_a_network_says_where_the_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"download it by hand to .*resnet18-f37072fd.pth"):
        image_model.build_model(spec(stem="stock"), pretrained=True)


@pytest.mark.parametrize("wrap", [None, nn.DataParallel])
def test_checkpoints_of_the_original_and_bare_state_dicts_load(
    wrap: type[nn.Module] | None, tmp_path: Path
) -> None:
    model = models.resnet34(num_classes=7)
    state = (wrap(model) if wrap else model).state_dict()
    original = {
        "epoch": 3,
        "arch": "resnet34",
        "state_dict": state,
        "best_acc1": torch.tensor(42.5),
    }
    for content, arch in ((original, None), (state, "resnet34")):
        path = tmp_path / "checkpoint.pth.tar"
        torch.save(content, path)
        loaded = checkpoints.load(path)
        read = image_checkpoint.read_spec(loaded, arch, None)
        assert read == ModelSpec("resnet34", "stock", 7, 64)
        rebuilt = image_model.build_model(read)
        image_checkpoint.load_weights(rebuilt, loaded, read.arch)
        assert torch.equal(rebuilt.state_dict()["fc.weight"], model.fc.weight)
    assert checkpoints.load(path).value("best_acc1", float) is None


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(models.resnet34(num_classes=7).state_dict(), path)
    loaded = checkpoints.load(path)
    with pytest.raises(UserError, match="not a resnet18"):
        image_checkpoint.load_weights(models.resnet18(num_classes=7), loaded, "resnet18")
    with pytest.raises(UserError, match="has shape"):
        image_checkpoint.load_weights(models.resnet34(num_classes=8), loaded, "resnet34")


def other_peoples(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The same weights as other programs save them."""
    state = model.state_dict()
    return {
        "as torch before 0.4.1": {k: v for k, v in state.items() if "num_batches" not in k},
        "sorted": dict(sorted(state.items())),
        "compiled": {f"_orig_mod.{k}": v for k, v in state.items()},
        "compiled, in DataParallel": {f"module._orig_mod.{k}": v for k, v in state.items()},
        "compiled around DataParallel": {f"_orig_mod.module.{k}": v for k, v in state.items()},
        "Lightning's": {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 2},
        "torchvision's references'": {"model": state, "epoch": 3, "optimizer": {}},
    }


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "mnasnet0_5"])
def test_other_peoples_files_give_the_models_own_outputs(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.get_model(arch, num_classes=7).train()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(images)  # for running statistics of its own
        expected = model.eval()(images)
    for name, content in other_peoples(model).items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        restored, found = image_checkpoint.restore_model(checkpoints.load(path), arch, "stock")
        assert found.num_classes == 7, name
        assert torch.equal(restored.eval()(images), expected), name
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    restored, _ = image_checkpoint.restore_model(checkpoints.load(path), arch, "stock")
    assert torch.equal(restored.eval()(images), expected)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"weights\.safetensors: damaged, cut, or no checkpoint"):
        checkpoints.load(path)


def test_weights_of_another_architecture_name_what_they_lack(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(models.vgg11(num_classes=7).state_dict(), path)
    with pytest.raises(UserError, match=r"lacks conv1\.weight: not a resnet18; -a says what"):
        image_checkpoint.restore_model(checkpoints.load(path))


def test_a_cached_file_that_holds_no_weights_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for content in (b"<html>not found</html>", pointer, b"", bytes(3000), b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(UserError) as refusal:
            image_model.build_model(spec(stem="stock"), pretrained=True)
        assert str(refusal.value).startswith(f"--pretrained: {path} is not the file of https://")
        assert "\n" not in str(refusal.value)
    torch.save({"weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match="delete it, and it is downloaded again"):
        image_model.build_model(spec(stem="stock"), pretrained=True)


def test_an_architecture_that_torchvision_does_not_have_names_its_file() -> None:
    for arch in ("resnet50d", "ResNet", "vit_base_patch16_224"):
        checkpoint = Checkpoint(Path("a.pth"), {"arch": arch, "state_dict": {}})
        with pytest.raises(UserError, match=f"a.pth: is a {arch}, which torchvision does not have"):
            image_checkpoint.read_spec(checkpoint, None, None)


def test_weights_as_other_programs_name_them(tmp_path: Path) -> None:
    """Lightning's module has a network and a loss with weights; DenseNets were named otherwise."""
    path = tmp_path / "other.ckpt"
    network = models.resnet18(num_classes=5).state_dict()
    loss = {"criterion.weight": torch.ones(5)}
    torch.save({"state_dict": {**{f"net.{k}": v for k, v in network.items()}, **loss}}, path)
    restored, found = image_checkpoint.restore_model(image_checkpoint.load(path), None, "stock")
    assert (found.arch, found.num_classes) == ("resnet18", 5)
    assert all(torch.equal(v, network[k]) for k, v in restored.state_dict().items())
    twice = {f"{n}.{k}": v for n in ("student", "teacher") for k, v in network.items()}
    torch.save({"state_dict": twice}, path)
    with pytest.raises(UserError, match="has no fc, head, heads or classifier"):
        image_checkpoint.load(path)

    network = models.densenet121(num_classes=5).state_dict()
    old = {re.sub(r"(denselayer\d+\.\w+)(\d)\.", r"\1.\2.", k): v for k, v in network.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, path)
    restored, _ = image_checkpoint.restore_model(image_checkpoint.load(path), "densenet121")
    assert all(torch.equal(v, network[k]) for k, v in restored.state_dict().items())


def test_a_training_may_begin_with_weights_and_a_new_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for classes in (2, 3):
        make_dataset(tmp_path / f"of{classes}", classes=classes)
    names = ["n00000000", "n00000001"]
    own = ModelSpec("resnet34", "cifar", 2, 32)
    weights = image_model.build_model(own).state_dict()
    content = {**own._asdict(), "classes": names, "state_dict": weights}
    torch.save(content, tmp_path / "own.pth")

    def begun(data: str, *flags: str) -> tuple[Any, dict[str, torch.Tensor]]:
        run, args, checkpoint = resnet_main.begin([data, "--weights", "own.pth", "-j", "0", *flags])
        images = find_data(run.accelerator, args)
        model, *_ = resnet_main.build(run, images, args, checkpoint)
        return args, model.state_dict()

    args, found = begun("of3", "--output-dir", "a")
    assert (args.arch, args.stem, args.image_size) == ("resnet34", "cifar", 32)
    assert found["fc.weight"].shape == (3, 512)
    same = {name for name, tensor in weights.items() if torch.equal(tensor, found[name])}
    assert same == weights.keys() - {"fc.weight", "fc.bias"}
    _, found = begun("of2", "--output-dir", "b")
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights.items())
    with pytest.raises(UserError, match=r"own.pth has arch resnet34, not resnet18: leave the flag"):
        begun("of2", "--output-dir", "c", "-a", "resnet18")
