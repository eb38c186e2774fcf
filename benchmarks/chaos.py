"""Kill a real training again and again, and compare its end with an undisturbed run's.

    python benchmarks/chaos.py resnet --kills 50
    python benchmarks/chaos.py lm --kills 50 --precision bf16 -- --model GRU
    python benchmarks/chaos.py lm --kills 10 --processes 4

Every start is the same command with `--resume auto`. A kill comes at a random moment: while the
program starts, in training, or while a checkpoint is being written; by SIGKILL, SIGTERM, SIGINT,
SIGHUP or SIGUSR1; with several processes to one of them or to their launcher. After some kills the
latest checkpoint is damaged as well, as a failing disk would. In the end every value of the
checkpoint and every point of the curves must be that of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

KIT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(KIT))

from engine import checkpoints
from engine.cli import UserError

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, *STOPPING)
MOMENTS = ("starting", "training", "training", "writing", "writing")
STOPPED = 75
MEASURED = "Throughput/train"  # the only thing of a run that is no function of its arguments
# Processes that ought to have ended: longer than a launcher's own patience of 30 seconds.
PATIENCE = 60.0


class Job(NamedTuple):
    """A training whose files are in one folder; epochs are short, to have many of their ends."""

    flags: list[str]
    checkpoint: str
    logs: str
    first_step: str  # in what it prints


RESNET = "--stem stock --image-size 32 -b 64 --lr 0.02 --seed 1 -p 1 --checkpoint-every 3"
TRANSFORMER = "--model Transformer --lr 5 --log-interval 1 --checkpoint-every 4"
JOBS = {
    "resnet": Job(
        ["resnet_main.py", "sample", *RESNET.split(), "--output-dir"],
        "checkpoint.pth",
        "logs",
        "Epoch: [",
    ),
    "lm": Job(
        ["lm_main.py", "--data", "sample", *TRANSFORMER.split(), "--save"],
        "model.checkpoint.pt",
        "model.logs",
        "| epoch ",
    ),
}


def differences(one: object, other: object, where: str = "") -> Iterator[str]:
    """The places where two checkpoints, or parts of them, do not have the same bits."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield where
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            yield from differences(one.get(key), other.get(key), f"{where}/{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            yield where
        for number, pair in enumerate(zip(one, other, strict=False)):
            yield from differences(*pair, f"{where}/{number}")
    elif type(one) is not type(other) or one != other:
        yield where


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every TensorBoard curve of a folder, as TensorBoard shows it."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def newest(*paths: Path) -> tuple[int, int]:
    """Epoch and step of the first file that is whole, as the next start will find it."""
    for path in paths:
        try:
            content = checkpoints.load(path)
        except UserError:
            continue
        return content["epoch"], content["step"]
    return 0, 0


class Training:
    """One start of the job: a process, or a launcher and its four."""

    def __init__(self, args: argparse.Namespace, folder: Path, epochs: int) -> None:
        job = JOBS[args.job]
        script, *flags = job.flags
        flags.append(str(folder / "model.pt" if args.job == "lm" else folder))
        command = [sys.executable]
        if args.processes > 1:
            command += ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
            command += ["--config_file", str(KIT / "accelerate_configs" / "cpu4.yaml")]
            command += ["--num_processes", str(args.processes)]
            command += ["--mixed_precision", args.precision]
        command += [str(KIT / script), *flags, *args.flags]
        command += ["--epochs", str(epochs), "--resume", "auto"]
        environment = dict(os.environ)
        if args.processes > 1:
            environment["OMP_NUM_THREADS"] = "1"
        else:
            environment["ACCELERATE_MIXED_PRECISION"] = args.precision
            environment["ACCELERATE_USE_CPU"] = "true"
        self.folder, self.job, self.script = folder, job, script
        self.log = folder.with_suffix(".log")
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=folder.parent, env=environment, stdout=output, stderr=output
            )

    def text(self) -> str:
        return self.log.read_text()

    def ranks(self) -> list[int]:
        """The pids of the training processes."""
        children = subprocess.run(
            ["pgrep", "-f", f"{self.script}.*{self.folder}"], capture_output=True, text=True
        )
        return [pid for pid in map(int, children.stdout.split()) if pid != self.process.pid]

    def wait_for(self, moment: str, rng: random.Random) -> bool:
        """Until a random time within `moment`; False when the process ended before."""
        if moment == "starting":
            deadline = time.monotonic() + rng.uniform(0, 6)
        else:
            while self.job.first_step not in self.text():
                if self.process.poll() is not None:
                    return False
                time.sleep(0.05)
            deadline = time.monotonic() + rng.uniform(0, 4)
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return False
            time.sleep(0.01)
        if moment == "writing":
            while not list(self.folder.glob(".*.tmp")):
                if self.process.poll() is not None:
                    return False
            time.sleep(rng.uniform(0, 0.1))
        return True

    def finish(self) -> int:
        """Wait for all processes to end, and return the exit code."""
        code = self.process.wait()
        deadline = time.monotonic() + PATIENCE
        while self.ranks():
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {self.ranks()} hang:\n{self.text()}")
            time.sleep(0.1)
        return code


def run_to_end(args: argparse.Namespace, folder: Path, epochs: int) -> None:
    training = Training(args, folder, epochs)
    if training.finish() != 0:
        sys.exit(f"a run that nobody disturbed failed:\n{training.text()}")


def kill_once(args: argparse.Namespace, folder: Path, rng: random.Random) -> tuple[str, str, str]:
    """Start, kill, and wait for the end; returns the signal, the moment and the target."""
    training = Training(args, folder, epochs=10**6)
    moment, signum = rng.choice(MOMENTS), rng.choice(SIGNALS)
    if not training.wait_for(moment, rng):
        sys.exit(f"the training ended by itself:\n{training.text()}")
    victims, target = [training.process.pid], "the process"
    if args.processes > 1:
        target = rng.choice(["the launcher", "a rank"])
        victims = training.ranks() if target == "a rank" else victims
    os.kill(rng.choice(victims or [training.process.pid]), signum)
    code = training.finish()
    orderly = signum != signal.SIGKILL and training.job.first_step in training.text()
    if args.processes == 1 and orderly and code != STOPPED:
        sys.exit(f"exit code {code} after {signum.name} while {moment}:\n{training.text()}")
    return signum.name, moment, target


def damage(path: Path, rng: random.Random) -> None:
    """Cut a file, or change a byte of it."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        del content[place:]
    else:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Kill a training and compare its end", epilog="after --: more of its flags"
    )
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the signals")
    own = sys.argv[1:]
    end = own.index("--") if "--" in own else len(own)
    own, flags = own[:end], own[end + 1 :]
    args = parser.parse_args(own, argparse.Namespace(flags=flags))
    rng = random.Random(args.seed)
    counts: collections.Counter[str] = collections.Counter()
    job = JOBS[args.job]
    started = time.monotonic()
    # What nohup or a shell's background ignores, a training would ignore as well: a handler of this
    # process is none of its children's.
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit(130))

    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        killed, whole = Path(root) / "killed", Path(root) / "whole"
        killed.mkdir()
        whole.mkdir()
        latest = killed / job.checkpoint
        previous = latest.with_name(f"{latest.stem}.previous{latest.suffix}")
        for number in range(args.kills):
            names = kill_once(args, killed, rng)
            counts.update(names)
            epoch, step = newest(latest, previous)
            damaged = previous.exists() and latest.exists() and rng.random() < 0.2
            if damaged:
                damage(latest, rng)
                counts["damaged"] += 1
            print(
                f"{number + 1:3d}: {' '.join(names)}; epoch {epoch}, step {step}"
                + "; damaged" * damaged,
                flush=True,
            )
        epochs = newest(latest, previous)[0] + 2
        run_to_end(args, killed, epochs)
        run_to_end(args, whole, epochs)

        one, other = read(killed / job.checkpoint), read(whole / job.checkpoint)
        differing = list(differences(one, other))
        curves = [scalars(folder / job.logs) for folder in (killed, whole)]
        for tag in curves[1].keys() | curves[0].keys():
            if tag != MEASURED and curves[0].get(tag) != curves[1].get(tag):
                differing.append(f"curve {tag}")
        points = sum(len(points) for points in curves[1].values())
    command = re.sub(r" --(save|output-dir)$", "", " ".join(job.flags))
    print(f"{command} {' '.join(args.flags)} (processes: {args.processes}, {args.precision})")
    for title, keys in {
        "signals": ("SIGKILL", *(signum.name for signum in STOPPING)),
        "moments": ("starting", "training", "writing"),
        "targets": ("the process", "the launcher", "a rank"),
    }.items():
        print(f"  {title}: " + ", ".join(f"{key} {counts[key]}" for key in keys if counts[key]))
    print(f"  latest checkpoint damaged as well: {counts['damaged']}")
    tensors = len(one["state_dict"])
    print(
        f"  {epochs} epochs in {args.kills + 1} starts, {time.monotonic() - started:.0f} s: "
        f"{tensors} tensors, the optimizer and {points} points compared, "
        f"{len(differing) or 'none'} differ"
    )
    if differing:
        sys.exit(f"not survived: {', '.join(differing[:20])}")
    print(f"  survived: {args.kills} of {args.kills} kills")


if __name__ == "__main__":
    main()
