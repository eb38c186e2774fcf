"""The GPUs that people have, by stubs of what torch says there: no bf16, old drivers, full memory.

None of these tests needs a GPU. fp16 computes on the CPU, with the loss scale of torch.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from kit import PROBE, Result, error_line, make_corpus, make_dataset, read, run, same_bits

from engine import launch
from engine.checkpoints import Checkpoint
from engine.cli import UserError
from engine.graphs import WARM_UP, GraphedStep
from engine.launch import describe_run, has_kernels
from image_classification.data import DecodedImages, move_to_gpu

DRIVER = (
    "The NVIDIA driver on your system is too old (found version {}). Please update your GPU "
    "driver by downloading and installing a new version from the URL: ..."
)
UNEXPECTED = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
    "NumCudaDevices() that might have already set an error? Error {}"
)


@pytest.mark.parametrize(
    ("torchs", "hiding", "expected"),
    [
        (DRIVER.format(12020), {}, "too old (found version 12020)): update the driver to 580 or"),
        (DRIVER.format(12020), {}, "the command of pytorch.org for CUDA 12.6, in a fresh .venv"),
        (DRIVER.format(11040), {}, "too old (found version 11040)): update the driver$"),
        (
            "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
            {"CUDA_VISIBLE_DEVICES": "0"},
            "(Found no NVIDIA driver on your system): install NVIDIA's driver, or start the cont",
        ),
        (
            "No CUDA GPUs are available",
            {"CUDA_VISIBLE_DEVICES": ""},
            "(No CUDA GPUs are available): CUDA_VISIBLE_DEVICES= hides them, `unset` shows them$",
        ),
        (
            UNEXPECTED.format("100: no CUDA-capable device is detected"),
            {"CUDA_VISIBLE_DEVICES": "-1"},
            "(100: no CUDA-capable device is detected): CUDA_VISIBLE_DEVICES=-1 hides them",
        ),
        (
            UNEXPECTED.format("804: forward compatibility was attempted on non supported HW"),
            {},
            "(804: forward compatibility was attempted on non supported HW): `nvidia-smi` shows",
        ),
        ("Torch not compiled with CUDA enabled", {}, "make venv installs those for CUDA"),
    ],
)
def test_that_there_is_no_gpu_comes_with_torchs_reason_and_the_remedy(
    torchs: str, hiding: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in launch.HIDING:
        monkeypatch.delenv(name, raising=False)
    for name, value in hiding.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "init", MagicMock(side_effect=RuntimeError(torchs)))
    monkeypatch.setattr(Path, "glob", lambda *_: iter([]))
    line = launch._why_no_gpu()
    assert f"{expected[:-1] if expected.endswith('$') else expected}" in line
    assert line.endswith(expected[:-1]) or not expected.endswith("$")
    assert "http" not in line


def test_a_gpu_that_this_user_may_not_open_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA then says the same as where there is none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    no_gpu = RuntimeError("No CUDA GPUs are available")
    monkeypatch.setattr(torch.cuda, "init", MagicMock(side_effect=no_gpu))
    monkeypatch.setattr(Path, "glob", lambda *_: iter([Path("/dev/nvidia0")]))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "this user may not open /dev/nvidia0" in launch._why_no_gpu()


CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        ((6, 0), CUDA_13, "the command of pytorch.org for CUDA 12.6"),  # P100
        ((7, 0), CUDA_13, "the command of pytorch.org for CUDA 12.6"),  # V100
        ((3, 7), CUDA_13, "no torch that requirements.txt allows has them"),  # K80
        ((13, 0), CUDA_13, "install a newer torch"),
        ((7, 5), CUDA_13, ""),  # T4
        ((8, 9), CUDA_13, ""),  # RTX 40xx
        ((6, 1), ["sm_50", "sm_60", "sm_70"], ""),  # GTX 10xx
        ((13, 0), ["sm_90a", "compute_120"], ""),
        ((9, 0), [], ""),
    ],
)
def test_a_gpu_for_which_torch_has_no_kernels_is_refused(
    capability: tuple[int, int], archs: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Some")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    with pytest.raises(UserError) if expected else contextlib.nullcontext() as refused:
        launch._refuse_unknown_gpu(0)
    if expected:
        assert not has_kernels(archs, *capability)
        line = str(refused and refused.value)
        assert f"NVIDIA Some is of sm_{capability[0]}{capability[1]}, and torch" in line
        assert expected in line


def test_bf16_becomes_fp16_where_one_gpu_of_the_run_lacks_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    cuda = torch.device("cuda")
    for own, others, expected in ((True, [True], False), (True, [False], True), (False, [], True)):
        supported = MagicMock(return_value=own)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        gather = MagicMock(side_effect=lambda flags, others=others: flags + [not o for o in others])
        monkeypatch.setattr(launch, "gather_object", gather)
        assert launch._lacks_bf16(cuda) == expected
        supported.assert_called_with(including_emulation=False)
        assert launch._lacks_bf16(torch.device("cpu")) is False
    accelerator: Any = SimpleNamespace(
        num_processes=1, device=torch.device("cpu"), mixed_precision="fp16"
    )
    second = describe_run(accelerator).splitlines()[1]
    assert second.startswith("=> bf16 was asked for, and GPUs before Ampere do not have it: fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert launch._lacks_bf16(cuda) is False
    assert "asked for" not in describe_run(accelerator)


def test_accelerate_is_told_of_fp16_before_it_makes_its_loss_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for lacks, expected in ((True, "fp16"), (False, None)):
        monkeypatch.setattr(launch, "_lacks_bf16", lambda _, lacks=lacks: lacks)
        made = MagicMock(side_effect=ValueError("made"))
        monkeypatch.setattr(launch, "_Accelerator", made)
        with pytest.raises(UserError, match="made"):
            launch.build_accelerator()
        assert made.call_args.kwargs["mixed_precision"] == expected


def fp16(script: str, scale: float, *args: object, cwd: Path, at: str = "-1 -1") -> Result:
    flags = ("fp16", script, scale, *at.split(), *args)
    return run("tests/process_probe.py", *flags, cwd=cwd, env=PROBE)


IMAGES = ("set", "--image-size", 32, "-b", 4, "-j", 0, "--seed", 1, "--lr", 0.01)
TEXT = ("--data", "set", "--model", "Transformer", "--emsize", 8, "--nhid", 8, "--batch_size", 8)


@pytest.mark.parametrize("script", ["resnet_main.py", "lm_main.py"])
def test_a_loss_scale_is_part_of_the_checkpoint(script: str, tmp_path: Path) -> None:
    """Steps are skipped from the first one on, and whenever the scale has grown too far."""
    flags: tuple[object, ...]
    if script == "resnet_main.py":
        make_dataset(tmp_path / "set", train=16)
        flags = (*IMAGES, "--epochs", 2, "--checkpoint-every", 5)
        where, name, at = "--output-dir", "checkpoint.pth", "1 5"
    else:
        make_corpus(tmp_path / "set")
        flags = (*TEXT, "--use-optimizer", "--lr", 0.01, "--bptt", 10, "--epochs", 2)
        flags += ("--checkpoint-every", 10)
        where, name, at = "--save", "model.checkpoint.pt", "1 10"
    for folder in ("a", "b"):
        place = tmp_path / folder / ("model.pt" if where == "--save" else "")
        if folder == "b":
            killed = fp16(script, 2.0**40, *flags, where, place, cwd=tmp_path, at=at)
            assert killed.code == 9, killed
            flags = (*flags, "--resume", "auto")
        done = fp16(script, 2.0**40, *flags, where, place, cwd=tmp_path)
        assert done.code == 0, done
    same_bits(tmp_path / "a" / name, tmp_path / "b" / name)
    scaler = read(tmp_path / "a" / name)["scaler"]
    assert scaler["growth_interval"] == 4
    assert scaler["scale"] < 2.0**40  # a skipped step halved it, and the run went on


def test_gradients_are_clipped_by_what_they_are_without_the_scale(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    flags = (*TEXT, "--lr", 2, "--bptt", 60, "--epochs", 1, "--clip", 0.1)
    assert fp16("lm_main.py", 2.0**8, *flags, "--save", "half.pt", cwd=tmp_path).code == 0
    assert run("lm_main.py", *flags, "--save", "single.pt", cwd=tmp_path).code == 0
    half, single = (read(tmp_path / f"{name}.pt")["state_dict"] for name in ("half", "single"))
    moved = 0.0
    for name, tensor in single.items():
        torch.testing.assert_close(half[name], tensor, rtol=0.05, atol=2e-3)
        moved = max(moved, (half[name] - tensor).abs().max().item())
    assert moved > 0  # fp16 it was


def test_a_scale_at_which_no_gradient_is_finite_ends_the_run(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set")
    flags = (*IMAGES, "--epochs", 1, "--output-dir", "a")
    line = error_line(fp16("resnet_main.py", 1e-7, *flags, cwd=tmp_path))
    assert "the gradients are not finite in fp16 at any loss scale, in epoch 0" in line
    assert not (tmp_path / "a" / "checkpoint.pth").exists()


def test_a_damaged_scale_is_refused_and_another_precisions_absence_is_not() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for damaged in ({"scale": 2.0}, {**scaler.state_dict(), "scale": "much"}):
        with pytest.raises(UserError, match="its scaler is none of torch's"):
            Checkpoint(Path("a.pt"), {"scaler": damaged}).load_scaler(scaler)
    Checkpoint(Path("a.pt"), {}).load_scaler(scaler)
    assert scaler.get_scale() == 8.0
    Checkpoint(Path("a.pt"), {"scaler": {**scaler.state_dict(), "scale": 2.0}}).load_scaler(scaler)
    assert scaler.get_scale() == 2.0
    Checkpoint(Path("a.pt"), {"scaler": scaler.state_dict()}).load_scaler(None)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """`torch.cuda` whose captures run their body and do not end, as torch's do after an error."""
    stub = MagicMock()

    @contextlib.contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        yield
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    stub.graph = MagicMock(side_effect=graph)
    monkeypatch.setattr(torch, "cuda", stub)
    return stub


def test_a_step_that_cannot_be_captured_is_computed_kernel_by_kernel(
    cuda: MagicMock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also an out-of-memory error at the capture; what the failed step has left is forgotten."""
    gradients: list[float] = []
    ends: list[bool] = []

    def step(x: torch.Tensor) -> tuple[torch.Tensor]:
        gradients.append(float(x))
        total = torch.tensor(sum(gradients))
        gradients.clear()
        return (total,)

    def step_to_capture(x: torch.Tensor) -> tuple[torch.Tensor]:
        if cuda.graph.call_count == 1 and not ends:
            ends.append(True)
            gradients.append(100.0)
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return step(x)

    graphed = GraphedStep(step_to_capture, gradients.clear)
    generator = cuda.default_generators.__getitem__.return_value
    for number in range(2 * WARM_UP + 2):
        (total,) = graphed(torch.tensor(float(number)))
        assert total == number
    assert ends == [True]
    assert cuda.graph.call_count == 1  # it is not tried again
    generator.graphsafe_set_state.assert_called_once_with(generator.clone_state.return_value)
    cuda.set_stream.assert_called_once_with(cuda.current_stream.return_value)
    assert capsys.readouterr().out == (
        "=> this step cannot become a CUDA graph (operation not permitted when stream is "
        "capturing): it is computed kernel by kernel from here on\n"
    )


@pytest.mark.parametrize(
    ("left", "again", "is_taken", "line"),
    [
        (200, 0, False, "=> the images lie on the GPU: 100 MiB"),
        (199, 0, False, "stay in main memory: they take 100 MiB, and the GPU has 199 MiB left"),
        (500, 301, False, "stay in main memory: they take 100 MiB, and the GPU has 199 MiB left"),
        (200, 0, True, "stay in main memory: they take 100 MiB, and the GPU has 200 MiB left"),
    ],
)
def test_images_go_to_a_gpu_that_has_room_for_them(
    left: int, again: int, is_taken: bool, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the graph that an epoch's last batch has dropped as well, and for other programs."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 50.00 MiB.")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (left << 20, 1 << 40))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: again << 20)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    lines: list[str] = []
    accelerator: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), print=lines.append)
    tensor: Any = MagicMock(nbytes=50 << 20)
    tensor.to.side_effect = full if is_taken else ["there", "there as well"]
    images = DecodedImages(tensor, torch.zeros(1), [])
    loaders: Any = [SimpleNamespace(images=images) for _ in range(2)]
    move_to_gpu(accelerator, *loaders)
    assert len(lines) == 1
    assert line in lines[0]
    moved = [loader.images.images for loader in loaders]
    assert moved == (["there", "there as well"] if "lie on" in line else [tensor, tensor])
