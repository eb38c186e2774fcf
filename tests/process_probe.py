"""Started by test_resnet_main.py on one and on four processes.

process_probe.py same SMALL LARGE  what an epoch of two datasets is made of (indices and digests
                                   of images), and the weights after one of a linear model
process_probe.py kill EPOCH STEP … resnet_main.py with these flags, dead once it has saved that
"""

import argparse
import hashlib
import os
import sys
from typing import Any

import torch
from accelerate import Accelerator

import checkpoint
import image_data
import resnet_main
import runtime
from image_checkpoint import TrainingState


def same() -> None:
    accelerator = runtime.build_accelerator()
    for path in sys.argv[2:]:
        with accelerator.local_main_process_first():
            data = image_data.load(path, 32, seed=5, workers=1, download=False)
        options: dict[str, Any] = {"batch_size": 12, "image_size": 32, "seed": 5, "workers": 1}
        loader = image_data.ImageLoader(accelerator, data.train, train=True, **options)
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


def train(accelerator: Accelerator, loader: image_data.ImageLoader) -> None:
    """An epoch of a model without batch normalisation, through resnet_main.py's loop."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(3 * 32 * 32, 3)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Flatten(), linear)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    args = argparse.Namespace(
        seed=5, batch_size=12, print_freq=1, label_smoothing=0.1, checkpoint_every=0
    )

    def no_op() -> None: ...

    statistics, _ = resnet_main.train_epoch(
        accelerator, model, optimizer, loader, TrainingState(), no_op, no_op, args
    )
    accelerator.print("WEIGHTS", *statistics, *linear.weight.flatten()[::97].tolist())


def kill() -> None:
    epoch, step = int(sys.argv[2]), int(sys.argv[3])
    whole_save = checkpoint.save

    def save(content: dict[str, Any], *paths: Any, **options: Any) -> None:
        whole_save(content, *paths, **options)
        if (content["epoch"], content["step"]) == (epoch, step):
            os._exit(9)

    checkpoint.save = save  # type: ignore[assignment]
    runtime.run_script(lambda: resnet_main.main(sys.argv[4:]))


if __name__ == "__main__":
    {"same": same, "kill": kill}[sys.argv[1]]()
