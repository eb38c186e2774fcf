"""Kill a real training again and again, and compare its end with that of an undisturbed run.

    python tests/chaos.py --kills 50 resnet
    python tests/chaos.py --kills 10 --config cpu4.yaml lm -- --model GRU

Every start is the same command with `--resume auto`. A kill comes at a random moment: while the
program starts, in training, or while a checkpoint is being written. It is a SIGKILL, SIGTERM,
SIGINT or SIGHUP, with several processes to one of them or to their launcher. In the end every value
of the checkpoint and every point of the curves must be that of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from kit import Launched, children, differing, read
from processes import guard

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOMENTS = ("starting", "training", "writing")
# A command up to the place of its files, and its checkpoint there. Epochs are short.
JOBS = {
    "resnet": (
        "resnet_main.py sample --stem stock --image-size 32 -b 64 --lr 0.02 --seed 1 "
        "--checkpoint-every 3 --output-dir .",
        "checkpoint.pth",
    ),
    "lm": (
        "lm_main.py --data sample --model Transformer --lr 5 --checkpoint-every 4",
        "model.checkpoint.pt",
    ),
}


def start(args: argparse.Namespace, folder: Path, epochs: int) -> Launched:
    flags = (*JOBS[args.job][0].split(), *args.flags, "--epochs", epochs, "--resume", "auto")
    return Launched(args.config, *flags, cwd=folder)


def kill_once(args: argparse.Namespace, latest: Path, rng: random.Random) -> tuple[str, ...]:
    """Start, kill, and wait for the end; returns the signal, the moment and the target."""
    launched = start(args, latest.parent, epochs=10**6)
    signum, moment = rng.choice(SIGNALS), rng.choice(MOMENTS)
    target = rng.choice(["a process", "the launcher"]) if args.config else "the process"
    before = written(latest)

    def pause(seconds: float) -> None:
        time.sleep(seconds)
        if launched.process.poll() is not None:
            sys.exit(f"the training ended by itself: {launched.finish()}")

    while moment != "starting" and written(latest) == before:
        pause(0.05)
    pause(rng.uniform(0, 4))
    while moment == "writing" and not list(latest.parent.glob(".*.tmp")):
        pause(0)
    ranks = children(launched.pid) if target == "a process" else []
    os.kill(rng.choice(ranks or [launched.pid]), signum)
    launched.finish()
    return signum.name, moment, target


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a training and compare its end")
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("flags", nargs="*", help="after --: more flags of the job")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--config", help="a launcher's YAML; without it one process, float32")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the signals")
    args = parser.parse_args()
    guard()
    # What is ignored here, as under nohup, a training would ignore as well; a handler is not
    # inherited.
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit(130))
    rng, counts = random.Random(args.seed), collections.Counter[str]()
    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        killed, whole = (Path(root, name, JOBS[args.job][1]) for name in ("killed", "whole"))
        epochs = 0
        for latest in (killed, whole):
            latest.parent.mkdir()
        for number in range(1, args.kills + 1):
            names = kill_once(args, killed, rng)
            counts.update(names)
            found = read(killed) if killed.exists() else {"epoch": 0, "step": 0}
            place = f"epoch {found['epoch']}, step {found['step']}"
            print(f"{number:3d}: {', '.join(names)}; {place}", flush=True)
            epochs = found["epoch"] + 2
        for latest in (killed, whole):
            result = start(args, latest.parent, epochs).finish()
            if result.code:
                sys.exit(f"a run that nobody disturbed failed: {result}")
        differ = differing(killed, whole)
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    if differ:
        sys.exit(f"not survived after {epochs} epochs: {', '.join(differ[:20])} differ")
    print(f"survived: {args.kills} of {args.kills} kills, {epochs} epochs to the same bits")


if __name__ == "__main__":
    main()
