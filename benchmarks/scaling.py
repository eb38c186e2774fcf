"""Step time and bytes on the wire of 1, 2 and 4 processes that share the same global batch.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 1 2 --only resnet18

The processes are on this machine's CPU, joined by gloo over the loopback interface, whose
counters are read: nothing else should use that interface. Beside them stands the volume of a
ring's all-reduce: each process sends 2 (n - 1) / n of the gradients' bytes a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lm_throughput
import reference_lm
import resnet_throughput

from engine.stop import leave
from image_classification import model as image_model
from image_classification import settings as image_settings
from image_classification.sources import SAMPLE_CLASSES, SAMPLE_TRAIN
from word_language_model import model as lm_model

SENT = Path("/sys/class/net/lo/statistics/tx_bytes")
IMAGES, COLUMNS, BPTT = 64, 20, 35  # a step, of all processes
JOBS = ("resnet18", *reference_lm.MODELS)


def serve(job: str, steps: int) -> None:
    """A process of a measurement; the main one prints seconds and bytes of a step."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if job == "resnet18":
        flags = ["sample", "-b", str(IMAGES), "--stem", "stock", "--image-size", "64"]
        rows = [i % (len(SAMPLE_CLASSES) * SAMPLE_TRAIN) for i in range(IMAGES * steps)]
        work, count = resnet_throughput.kit("training", flags, rows), IMAGES
    else:
        options: dict[str, Any] = {"model": job, "sizes": reference_lm.SIZES, "bptt": BPTT}
        options |= {"columns": COLUMNS, "steps": steps, "compiled": False}
        work, count = lm_throughput.kit("training", **options), COLUMNS * BPTT
    work()
    if processes > 1:
        dist.barrier()
    before = int(SENT.read_text())
    rate = work()[0]
    if processes > 1:
        dist.barrier()
    figures = {"seconds": count / rate, "bytes": (int(SENT.read_text()) - before) / steps}
    if os.environ.get("RANK", "0") == "0":
        print(f"FIGURES {json.dumps(figures)}", flush=True)
    leave(0)


def measure(job: str, processes: int, steps: int, folder: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", job, "--steps", str(steps)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command[1:1] = [*launcher, str(processes)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not found:
        sys.exit(f"{job} on {processes} processes failed:\n{done.stdout}{done.stderr}")
    figures: dict[str, float] = json.loads(found[0].removeprefix("FIGURES "))
    return figures


def gradient_bytes(job: str) -> int:
    model: torch.nn.Module
    if job == "resnet18":
        model = image_model.build_model(image_settings.ModelSpec("resnet18", "stock", 10, 64))
    else:
        spec = lm_throughput.spec_of(job, reference_lm.SIZES)
        model = lm_model.build_model(spec, dropout=0.0)
    return sum(4 * p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time and bytes on the wire")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--only", nargs="+", choices=JOBS, default=JOBS, metavar="JOB")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of a round (default: %(default)s)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.steps)
    print("job          processes   ms a step (min–max)     of one   MB sent a step   MB of a ring")
    with tempfile.TemporaryDirectory() as folder:
        for job in args.only:
            history: dict[int, list[dict[str, float]]] = {n: [] for n in args.processes}
            for _ in range(args.rounds):
                for processes, figures in history.items():
                    figures.append(measure(job, processes, args.steps, folder))
            first = [figure["seconds"] for figure in history[args.processes[0]]]
            for processes, figures in history.items():
                times = [figure["seconds"] for figure in figures]
                ratio = statistics.median(t / one for t, one in zip(times, first, strict=True))
                sent = statistics.median(figure["bytes"] for figure in figures) / 1e6
                ring = 2 * (processes - 1) * gradient_bytes(job) / 1e6
                low, high = 1000 * min(times), 1000 * max(times)
                print(
                    f"{job:12} {processes:9d} {1000 * statistics.median(times):9.0f} "
                    f"({low:.0f}–{high:.0f}) {ratio:13.2f} {sent:16.1f} {ring:14.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
