"""What only a GPU can show; `make test-gpu` runs these alone, elsewhere they are skipped.

Two processes share the one GPU over gloo: the path of several GPUs, without NCCL.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import (
    KIT,
    MEASURED,
    PROBE,
    Launched,
    Running,
    differences,
    launch,
    make_corpus,
    make_dataset,
    read,
    run,
    same_bits,
    scalars,
    wait_for,
)
from torch import nn

import resnet_main
from engine.graphs import WARM_UP, GraphedStep, make_capturable
from engine.launch import build_accelerator
from image_classification.data import DecodedImages, ImageLoader, find_data, move_to_gpu
from word_language_model.data import segments
from word_language_model.model import build_model
from word_language_model.settings import MODELS, ModelSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-gpu"),
]
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
FP16 = {"ACCELERATE_MIXED_PRECISION": "fp16"}
FLOAT32 = {"ACCELERATE_MIXED_PRECISION": "no"}
IMAGES = ("set", "--image-size", 32, "-b", 16, "--stem", "stock", "--lr", 0.01, "--seed", 1)
TEXT = ("--data", "set", "--emsize", 16, "--nhid", 16, "--batch_size", 4, "--bptt", 5, "--lr", 1)


def test_training_with_the_yaml_of_one_gpu(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", train=30)
    result = launch("gpu1.yaml", "resnet_main.py", *IMAGES, "--epochs", 2, cwd=tmp_path)
    assert result.code == 0, result
    assert re.search(r"=> 1 process on NVIDIA.*, bf16", result.out)
    assert "10 validation images of 3 classes, decoded in memory" in result.out
    assert result.out.count("=> the images lie on the GPU: ") == 1  # from the second epoch on
    assert read(tmp_path / "output" / "resnet18-gpu1" / "checkpoint.pth")["epoch"] == 2


def kill_and_resume(
    flags: list[object],
    save: Callable[[Path], list[object]],
    names: tuple[str, str],
    cwd: Path,
    env: dict[str, str],
) -> None:
    """SIGTERM and SIGKILL within an epoch end with the bits of an undisturbed run."""
    checkpoint, logs = names
    whole, disturbed = cwd / "whole", cwd / "disturbed"
    undisturbed = run(*map(str, [*flags, *save(whole)]), cwd=cwd, env=env)
    assert undisturbed.code == 0, undisturbed
    again = list(map(str, [*flags, *save(disturbed)]))
    latest = disturbed / checkpoint
    for signum in (signal.SIGTERM, signal.SIGKILL):
        before = latest.stat().st_mtime_ns if latest.exists() else 0
        process = Running(*again, cwd=cwd, env=env)
        while not latest.exists() or latest.stat().st_mtime_ns == before:
            assert process.process.is_alive()
            time.sleep(0.001)
        assert process.process.pid is not None
        os.kill(process.process.pid, signum)
        stopped = process.finish()
        assert stopped.code == {signal.SIGTERM: 75, signal.SIGKILL: -9}[signum], stopped
    assert read(latest)["step"] > 0 or read(latest)["epoch"] > 0
    resumed = run(*again, cwd=cwd, env=env)
    assert resumed.code == 0, resumed
    assert list(differences(read(whole / checkpoint), read(latest))) == []
    curves = [scalars(folder / logs) for folder in (whole, disturbed)]
    for tag in curves[0].keys() - {MEASURED}:
        assert curves[0][tag] == curves[1][tag], tag


@pytest.mark.parametrize(
    ("precision", "side", "options"),
    [
        (BF16, 64, ()),
        (BF16, 64, ("--compile",)),
        (BF16, 160, ("-j", 2)),  # decoded by workers
        (BF16, 160, ("-j", 2, "--compile")),
        (BF16, 160, ("--decode-once", 80, "--compile")),
        (BF16, 64, ("--gradient-accumulation-steps", 2, "--compile")),
        (FP16, 64, ()),
        (FP16, 64, ("--compile",)),
    ],
)
def test_a_killed_resnet_ends_with_the_bits_of_an_undisturbed_one(
    precision: dict[str, str], side: int, options: tuple[object, ...], tmp_path: Path
) -> None:
    make_dataset(tmp_path / "set", train=170, side=side)
    flags: list[object] = ["resnet_main.py", *IMAGES, "--epochs", 3, "--checkpoint-every", 5]
    flags += ["--resume", "auto", *options]
    names = ("checkpoint.pth", "logs")
    kill_and_resume(flags, lambda folder: ["--output-dir", folder], names, tmp_path, precision)


@pytest.mark.parametrize(
    ("precision", "model", "options"),
    [
        *((BF16, model, ()) for model in MODELS),
        *((FP16, model, ()) for model in ("LSTM", "Transformer")),
        (BF16, "Transformer", ("--use-optimizer", "--lr", 0.01)),
        (BF16, "Transformer", ("--use-optimizer", "--lr", 0.01, "--compile")),
        (FP16, "Transformer", ("--use-optimizer", "--lr", 0.01)),
        (BF16, "LSTM", ("--gradient-accumulation-steps", 2)),
    ],
)
def test_a_killed_language_model_ends_with_the_bits_of_an_undisturbed_one(
    precision: dict[str, str], model: str, options: tuple[object, ...], tmp_path: Path
) -> None:
    """With CUDA graphs, which need no flag; what a step depends on lies in their inputs."""
    make_corpus(tmp_path / "set", train=16_000)
    flags: list[object] = ["lm_main.py", *TEXT, "--model", model, "--epochs", 2, *options]
    flags += ["--checkpoint-every", 20, "--resume", "auto"]
    names = ("model.checkpoint.pt", "model.logs")
    kill_and_resume(
        flags, lambda folder: ["--save", folder / "model.pt"], names, tmp_path, precision
    )


def test_a_run_begun_with_graphs_ends_with_the_same_bits_without(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    flags: list[object] = [*TEXT, "--epochs", 2, "--checkpoint-every", 20, "--save"]
    assert run("lm_main.py", *flags, "a/model.pt", cwd=tmp_path, env=BF16).code == 0
    probe: tuple[Any, ...] = ("kill", "lm_main.py", 1, 20, *flags, "b/model.pt")
    assert run("tests/process_probe.py", *probe, cwd=tmp_path, env=PROBE | BF16).code == 9
    again = ("--data", "set", "--save", "b/model.pt", "--resume", "auto", "--no-compile")
    assert run("lm_main.py", *again, cwd=tmp_path, env=BF16).code == 0
    same_bits(*(tmp_path / folder / "model.checkpoint.pt" for folder in ("a", "b")))


def on_shared_gpu(
    script: str, *flags: object, cwd: Path, precision: str = "no", at: str = "-1 -1"
) -> Launched:
    """The script in two processes on one GPU, killed once it has saved epoch and step `at`."""
    lines = (KIT / "accelerate_configs" / "gpu4.yaml").read_text()
    yaml = cwd / "gpu2.yaml"
    lines = lines.replace("num_processes: 4", "num_processes: 2")
    yaml.write_text(lines.replace("mixed_precision: bf16", f"mixed_precision: '{precision}'"))
    probe = ("tests/process_probe.py", "share", script, *at.split(), *flags)
    return Launched(str(yaml), *probe, cwd=cwd, env=PROBE)


def alike(one: Path, other: Path, least: float) -> None:
    ours, theirs = (read(path)["state_dict"] for path in (one, other))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=least, atol=least)


@pytest.mark.parametrize(
    ("train", "options", "alone"),
    [
        # The last batch is padded.
        (9, ("--cutmix", 1), ("--gradient-accumulation-steps", 2)),
        # Statistics of the whole batch. Dropout differs, so the weights stay as they are.
        (16, ("--lr", 0), ("--no-sync-bn",)),
    ],
)
def test_two_processes_train_what_one_does(
    train: int, options: tuple[object, ...], alone: tuple[object, ...], tmp_path: Path
) -> None:
    make_dataset(tmp_path / "set", train=train)
    flags = (*IMAGES, "--epochs", 3, *options, "--output-dir")
    together = ("--sync-bn",) if "--no-sync-bn" in alone else ()
    two = on_shared_gpu("resnet_main.py", *flags, "two", *together, cwd=tmp_path).finish()
    assert two.code == 0, two
    assert re.search(r"=> 2 processes on NVIDIA.*, float32", two.out)
    assert "=> the images lie on the GPU" in two.out
    probe: tuple[Any, ...] = ("follow", *flags, "one", *alone)
    one = run("tests/process_probe.py", *probe, cwd=tmp_path, env=PROBE | FLOAT32)
    assert one.code == 0, one
    alike(tmp_path / "one" / "checkpoint.pth", tmp_path / "two" / "checkpoint.pth", 1e-3)


@pytest.mark.parametrize("model", ["LSTM", "Transformer"])
def test_two_processes_train_the_language_model_of_two_parts(model: str, tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    flags = (*TEXT, "--model", model, "--lr", 0.5, "--epochs", 2, "--save")
    two = on_shared_gpu("lm_main.py", *flags, "two.pt", cwd=tmp_path).finish()
    assert two.code == 0, two
    parts = ("--no-compile", "--gradient-accumulation-steps", 2)
    assert run("lm_main.py", *flags, "one.pt", *parts, cwd=tmp_path, env=FLOAT32).code == 0
    alike(tmp_path / "one.checkpoint.pt", tmp_path / "two.checkpoint.pt", 1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("script", ["resnet_main.py", "lm_main.py"])
def test_two_killed_processes_end_with_the_bits_of_undisturbed_ones(
    script: str, precision: str, tmp_path: Path
) -> None:
    """By SIGKILL after a checkpoint within an epoch, then by SIGTERM to the launcher."""
    options: dict[str, Any] = {"cwd": tmp_path, "precision": precision}
    if script == "resnet_main.py":
        make_dataset(tmp_path / "set", train=400)
        flags: list[object] = [*IMAGES, "--epochs", 3, "--checkpoint-every", 5, "--output-dir"]
        name, save = "checkpoint.pth", ""
    else:
        make_corpus(tmp_path / "set", train=16_000)
        flags = [*TEXT, "--epochs", 3, "--checkpoint-every", 20, "--save"]
        name, save = "model.checkpoint.pt", "model.pt"
    whole, latest = tmp_path / "a" / name, tmp_path / "b" / name
    assert on_shared_gpu(script, *flags, tmp_path / "a" / save, **options).finish().code == 0
    flags += [tmp_path / "b" / save]
    assert on_shared_gpu(script, *flags, at="0 20", **options).finish().code != 0
    assert read(latest)["step"] == 20
    before = latest.stat().st_mtime_ns
    flags += ["--resume", "auto"]
    disturbed = on_shared_gpu(script, *flags, **options)
    wait_for(lambda: latest.stat().st_mtime_ns != before)
    os.kill(disturbed.pid, signal.SIGTERM)
    assert "saved to" in disturbed.finish().out
    resumed = on_shared_gpu(script, *flags, **options).finish()
    assert resumed.code == 0, resumed
    same_bits(whole, latest)


def test_an_evaluation_gives_the_figures_of_the_cpu(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", train=30, val=60)
    make_corpus(tmp_path / "text" / "set")
    assert run("resnet_main.py", *IMAGES, "--epochs", 2, cwd=tmp_path).code == 0
    assert run("lm_main.py", *TEXT, "--epochs", 1, cwd=tmp_path / "text").code == 0
    image = ("resnet_main.py", "set", "-e", "--resume", "output/resnet18-gpu1/checkpoint.pth")
    for cwd, flags in ((tmp_path, image), (tmp_path / "text", ("lm_main.py", "--evaluate", *TEXT))):
        figures = []
        for env in ({}, {"ACCELERATE_USE_CPU": "true"}):
            result = run(*flags, cwd=cwd, env=env)
            assert result.code == 0, result
            assert ("on CPU" in result.out) == bool(env)
            lines = [line for line in result.out.splitlines() if line.startswith((" * ", "| Eval"))]
            figures.append([float(x) for x in re.findall(r"\d+\.\d+", " ".join(lines))])
        assert len(figures[0]) in (3, 4)
        # An image whose two best classes are equally likely may go either way.
        assert figures[0] == pytest.approx(figures[1], rel=2e-3, abs=2)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_images_on_the_gpu_are_those_in_memory(scaled: bool, train: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (300, 3, 64, 64), dtype=torch.uint8, generator=generator)
    targets = torch.randint(9, (300,), generator=generator)
    sizes = None
    if scaled:
        sizes = torch.randint(50, 500, (300, 2), generator=generator, dtype=torch.int32)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    options: dict[str, Any] = {"batch_size": 64, "image_size": 64, "seed": 3, "workers": 0}
    batches = [
        list(ImageLoader(build_accelerator(), images, train=train, **options).epoch(1))
        for images in (
            DecodedImages(pixels, targets, [], sizes),
            DecodedImages(pixels.cuda(), targets, [], sizes),
        )
    ]
    assert len(batches[0]) == len(batches[1]) == 5
    for one, other in zip(*batches, strict=True):
        assert other.images.is_cuda
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_graph_replays_what_a_step_computes(
    model: str, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with dropout, a hidden state, and a shorter segment at the end."""
    build_accelerator()  # chooses cuBLAS's workspace
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    spec = ModelSpec(model, words=50, emsize=16, nhid=16, nlayers=2, nhead=2, tied=False)
    text = torch.randint(50, (5 * (WARM_UP + 4) + 3, 4), device="cuda")
    ends = []
    for graphed in (False, True):
        torch.manual_seed(0)
        network = build_model(spec, dropout=0.2, layer_dropout=0.1).cuda()
        optimizer = torch.optim.SGD(network.parameters(), 1.0)
        make_capturable(optimizer, torch.device("cuda"))

        def step(
            tokens: torch.Tensor,
            targets: torch.Tensor,
            *hidden: torch.Tensor,
            network: nn.Module = network,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> tuple[torch.Tensor, ...]:
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                loss, hidden = network(tokens, targets, hidden)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.25)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach(), *hidden

        train_step = GraphedStep(step) if graphed else step
        losses = []
        for epoch in range(2 + WARM_UP):
            optimizer.param_groups[0]["lr"].fill_(1.0 / (1 + epoch))
            hidden: Any = network.initial_hidden(4)
            for number, tokens, targets in segments(text, 5):
                torch.manual_seed(100 * epoch + number)
                loss, *hidden = train_step(tokens, targets, *hidden)
                losses.append(loss.clone())
        ends.append([torch.stack(losses), *network.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_step_that_cannot_be_captured_computes_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With dropout: the generator draws again after the failed capture, as if there was none."""
    drop = nn.Dropout(0.5)

    def step(x: torch.Tensor) -> tuple[torch.Tensor]:
        y = drop(x)
        return (y * y.sum().item(),)  # waits for the GPU, which a graph cannot

    results: list[list[torch.Tensor]] = []
    for call in (step, GraphedStep(step)):
        results.append([])
        for number in range(2 * WARM_UP + 2):
            torch.manual_seed(number)
            results[-1].append(call(torch.ones(99, device="cuda"))[0].clone())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert capsys.readouterr().out.count("=> this step cannot become a CUDA graph (") == 1
    torch.ones(9, device="cuda").sum().item()  # on the stream from before


def test_a_shorter_last_batch_needs_no_memory_beside_a_graphs() -> None:
    step = GraphedStep(lambda x: ((x * 2 + 1).double().sum(),))
    full, short = (torch.ones(n << 20, device="cuda") for n in (64, 60))
    for _ in range(WARM_UP + 1):
        step(full)
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    step(short)
    assert torch.cuda.max_memory_reserved() <= before
    for _ in range(WARM_UP + 2):
        for batch in (full, short):
            (total,) = step(batch)
            assert total.item() == 3 * batch.numel()


@pytest.mark.parametrize("model", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
def test_an_rnns_small_gradients_survive_bf16(model: str) -> None:
    """In fp16, which autocast would make of them, these would be zero."""
    spec = ModelSpec(model, words=50, emsize=16, nhid=16, nlayers=2, nhead=2, tied=False)
    torch.manual_seed(0)
    network: Any = build_model(spec, 0.0).cuda()
    tokens = torch.randint(50, (35, 4), device="cuda")
    gradients = []
    for bf16 in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            features, hidden = network.features(tokens, network.initial_hidden(4))
        assert all(h.dtype == torch.float32 for h in hidden)
        gradients.append(torch.autograd.grad(1e-9 * features.sum(), network.rnn.weight_hh_l0)[0])
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_never_waits_for_the_gpu(compiled: bool, tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", train=170)
    flags = [str(tmp_path / "set"), "-b", "32", "--seed", "1", "--cutmix", "1", "--stem", "stock"]
    flags += ["--output-dir", str(tmp_path), *["--compile"] * compiled]
    run, args, checkpoint = resnet_main.begin(flags)
    data = find_data(run.accelerator, args)
    model, optimizer, loader, val_loader = resnet_main.build(run, data, args, checkpoint)
    move_to_gpu(run.accelerator, loader, val_loader)
    model.train()
    step = resnet_main.training_step(run, model, optimizer, args)
    sums = run.begin_epoch(len(loader))

    def take(batch: Any, number: int) -> None:
        assert batch.soft_targets is not None
        run.seed_dropout(args.seed, 0, 1)  # as `train_epoch` does: mixing has seeded the generator
        inputs = (batch.images, batch.targets, batch.weights, batch.soft_targets)
        (values,) = step(*inputs, size=batch.size)
        sums.update(values, number)

    for number, batch in enumerate(loader.epoch(0)):
        take(batch, number)
    batches = loader.epoch(1)
    take(next(batches), 0)  # an epoch begins with a copy of its order and crops
    assert not compiled or (isinstance(step, GraphedStep) and step.captured)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, batch in zip(range(1, 10), batches, strict=False):
            take(batch, number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.carry()[0][-1] == 510 + 320
