"""Started by the tests, on one and on four processes.

process_probe.py same SMALL LARGE  what an epoch of two datasets is made of (indices and digests
                                   of images), and the weights after one of a linear model
process_probe.py kill COMMAND EPOCH STEP …
                                   the command with these flags, killed once it has saved that
process_probe.py compile …         resnet_main.py with these flags and a compiler that only counts
process_probe.py slow …            resnet_main.py with these flags and slow workers
process_probe.py shm SIZE …        resnet_main.py with these flags and a /dev/shm of its own
process_probe.py follow …          resnet_main.py with these flags and `small_model`; leaves in
                                   steps.pt what the run was after every step
process_probe.py final …          lm_main.py with these flags, stopped after its last epoch
process_probe.py fp16 COMMAND SCALE EPOCH STEP …
                                   the command with these flags, in fp16 on a CPU with a loss scale
                                   that begins at SCALE, killed once it has saved that
process_probe.py share COMMAND EPOCH STEP …
                                   `kill`, with as many processes as there are on one GPU
process_probe.py best ACC1,… …     resnet_main.py with these flags, `small_model`, and these
                                   accuracies for its epochs
"""

import ctypes
import functools
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

import lm_main
import resnet_main
from engine import checkpoints, launch
from engine.launch import build_accelerator
from engine.run import Run
from engine.stop import leave_signals_to_parent, run_script
from image_classification import data
from image_classification.data import ImageLoader, load_dataset
from image_classification.settings import ModelSpec


def same() -> None:
    # As on a Mac, where torch finds a device that gloo cannot use.
    patch.object(torch._C, "_get_accelerator", lambda: torch.device("mps")).start()
    accelerator = build_accelerator()
    for path in sys.argv[2:]:
        with accelerator.local_main_process_first():
            found = load_dataset(path, 32, workers=1, download=False)
        options: dict[str, Any] = {"batch_size": 12, "image_size": 32, "seed": 5, "workers": 1}
        loader = ImageLoader(accelerator, found.train, train=True, **options)
        # Whole, and as a run resumed after its first step has it.
        for batch in (*loader.epoch(2), *loader.epoch(2, start=1)):
            indices = batch.indices.to(accelerator.device)
            parts = (indices, batch.weights, batch.images.contiguous())
            indices, weights, images = accelerator.gather(parts)
            real = weights.bool()
            digest = hashlib.sha256(images[real].numpy().tobytes()).hexdigest()
            accelerator.print("BATCH", indices[real].tolist(), digest)
    train(accelerator, loader)
    accelerator.print(accelerator.num_processes, "processes")
    accelerator.end_training()


def train(accelerator: Accelerator, loader: ImageLoader) -> None:
    """An epoch of a model without batch normalisation, through resnet_main.py's loop."""
    flags = ["-b", "12", "--seed", "5", "-p", "1", "--label-smoothing", "0.1"]
    run, args, _ = resnet_main.begin([*flags, "--output-dir", "linear"])
    torch.manual_seed(0)
    linear = torch.nn.Linear(3 * 32 * 32, 3)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Flatten(), linear)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model, optimizer = run.prepare(model, optimizer)
    step = resnet_main.training_step(run, model, optimizer, args)
    means, _ = resnet_main.train_epoch(run, model, step, loader, args)
    assert run.sums is not None
    samples = sum(row[-1] for row in run.sums.carry())
    accelerator.print("WEIGHTS", *means.values(), samples, *linear.weight.flatten()[::97].tolist())


def kill() -> None:
    main = {"resnet_main.py": resnet_main.main, "lm_main.py": lm_main.main}[sys.argv[2]]
    epoch, step = int(sys.argv[3]), int(sys.argv[4])
    whole_save = checkpoints.save

    def save(content: dict[str, Any], *paths: Any, **options: Any) -> None:
        whole_save(content, *paths, **options)
        if (content["epoch"], content["step"]) == (epoch, step):
            os._exit(9)

    checkpoints.save = save  # type: ignore[assignment]
    run_script(lambda: main(sys.argv[5:]))


def train_in_fp16() -> None:
    """What `build_accelerator` makes on a GPU without bf16, with the CPU in its place."""
    command: Any = {"resnet_main.py": resnet_main, "lm_main.py": lm_main}[sys.argv[2]]
    scale = float(sys.argv.pop(3))

    def build_fp16(**options: bool) -> Accelerator:
        accelerator = build_accelerator(**options)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        # It grows soon, so that gradients overflow again and again.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
        return accelerator

    command.build_accelerator = build_fp16
    patch.object(resnet_main, "build_model", build_small_model).start()
    kill()


def share_a_gpu() -> None:
    """Joined by gloo, which takes the tensors of a GPU. NCCL refuses two processes on one."""
    os.environ["LOCAL_RANK"] = "0"  # of which torch and Accelerate make the GPU's index
    patch.object(torch.accelerator, "device_count", lambda: int(os.environ["WORLD_SIZE"])).start()
    gloo = functools.partial(InitProcessGroupKwargs, backend="gloo")
    patch.object(launch, "InitProcessGroupKwargs", gloo).start()
    patch.object(resnet_main, "build_model", build_small_model).start()
    kill()


def count_compilations() -> None:
    compile_module, end_of_epoch = torch.nn.Module.compile, Run.end_of_epoch
    count = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    def reported(run: Run, *args: Any) -> None:
        end_of_epoch(run, *args)
        print("COMPILED", count)

    Run.end_of_epoch = reported  # type: ignore[assignment, method-assign]
    torch.nn.Module.compile = lambda *args, **options: compile_module(  # type: ignore[method-assign]
        *args, **options, backend=backend
    )
    run_script(lambda: resnet_main.main(sys.argv[2:]))


def start_slowly() -> None:
    def slow(worker: int) -> None:
        time.sleep(1)
        leave_signals_to_parent(worker)

    patch.object(data, "leave_signals_to_parent", slow).start()
    run_script(lambda: resnet_main.main(sys.argv[2:]))


def give_shared_memory() -> None:
    new_mounts = 0x20000  # CLONE_NEWNS of linux/sched.h
    assert not ctypes.CDLL(None).unshare(new_mounts)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={sys.argv[2]}", "tmpfs", "/dev/shm"]
    subprocess.run(mount, check=True)
    run_script(lambda: resnet_main.main(sys.argv[3:]))


def small_model(classes: int) -> torch.nn.Sequential:
    """Normalisation, dropout, and no kink at which rounding would decide about a gradient."""
    layers: dict[str, torch.nn.Module] = {
        **{"conv1": torch.nn.Conv2d(3, 8, 3, stride=2), "bn1": torch.nn.BatchNorm2d(8)},
        **{"act1": torch.nn.SiLU(), "conv2": torch.nn.Conv2d(8, 16, 3, stride=2)},
        **{"bn2": torch.nn.BatchNorm2d(16), "act2": torch.nn.SiLU()},
        **{"pool": torch.nn.AdaptiveAvgPool2d(2), "flat": torch.nn.Flatten()},
        **{"dropout": torch.nn.Dropout(0.2), "fc": torch.nn.Linear(64, classes)},
    }
    return torch.nn.Sequential(OrderedDict(layers))


def build_small_model(spec: ModelSpec, pretrained: bool) -> torch.nn.Module:
    return small_model(spec.num_classes)


def follow() -> None:
    end_of_step = Run.end_of_step
    steps: list[dict[str, Any]] = []

    def recorded(run: Run, step: int) -> None:
        end_of_step(run, step)
        model = run.accelerator.unwrap_model(run.model)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        buffers = torch.cat([b.detach().flatten() for b in model.buffers()])
        norms = {type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__}
        lr = run.optimizer.param_groups[0]["lr"]
        steps.append({"lr": lr, "weights": weights, "buffers": buffers, "norms": norms})

    def main() -> None:
        resnet_main.main(sys.argv[2:])
        if os.environ.get("RANK", "0") == "0":
            torch.save(steps, "steps.pt")

    Run.end_of_step = recorded  # type: ignore[assignment, method-assign]
    patch.object(resnet_main, "build_model", build_small_model).start()
    run_script(main)


def give_accuracies() -> None:
    given = map(float, sys.argv[2].split(","))

    def evaluate(*_: object) -> dict[str, float]:
        return {"Loss": 1.0, "Acc@1": next(given), "Acc@5": 100.0}

    patch.object(resnet_main, "evaluate", evaluate).start()
    patch.object(resnet_main, "build_model", build_small_model).start()
    run_script(lambda: resnet_main.main(sys.argv[3:]))


def stop_in_the_final_test() -> None:
    take_best = lm_main.take_best

    def take_it_and_stop(*args: Any) -> None:
        take_best(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    patch.object(lm_main, "take_best", take_it_and_stop).start()
    run_script(lambda: lm_main.main(sys.argv[2:]))


PROBES = {
    **{"same": same, "kill": kill, "compile": count_compilations},
    "final": stop_in_the_final_test,
    **{"slow": start_slowly, "shm": give_shared_memory, "follow": follow, "best": give_accuracies},
    **{"fp16": train_in_fp16, "share": share_a_gpu},
}

if __name__ == "__main__":
    PROBES[sys.argv[1]]()
