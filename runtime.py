"""What a run stands on: errors meant for the user, the one Accelerator, and seeds.

Every script enters through `run_script` and builds its Accelerator with `build_accelerator`,
so that what was asked of a launcher is compared with what it started in one place.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    get_int_from_env,
)

# How mpirun's families and torchrun name the number of processes they started.
WORLD_SIZE_VARIABLES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake of the user's: one line that names the thing, the place and the remedy."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with its errors in the kit's one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def positive_int(text: str) -> int:
    return _at_least(1, int(text))


def non_negative_int(text: str) -> int:
    return _at_least(0, int(text))


def _at_least(least: int, value: int) -> int:
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must fit 64 bits, which {value} does not")
    return value


def non_negative_float(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, not {text}")
    return value


def run_script(main: Callable[[], None]) -> None:
    """Run `main` and leave the process; a `UserError` ends in one line and exit code 2.

    Under a launcher all processes usually meet the same mistake. The first one to leave makes
    the launcher end the others, so each waits its turn: rank 0 speaks, and a later rank only if
    it is alone with its error.
    """
    # A log file is read while it grows, and beside what goes to stderr.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        main()
    except (UserError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = UserError("the GPU's memory is full: use a smaller --batch-size")
        time.sleep(min(3 * get_int_from_env(["RANK"], 0), 30))
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        leave(EXIT_USER_ERROR)
    except RuntimeError as error:
        # A process that lost its peers has nothing to add to what the first to fail has said.
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not (lost and torch.distributed.is_initialized()):
            raise
        time.sleep(10)
        reason = str(error).splitlines()[0]
        print(f"{Path(sys.argv[0]).name}: lost the other processes: {reason}", file=sys.stderr)
        leave(1)
    except KeyboardInterrupt:
        leave(130)


def leave(code: int) -> NoReturn:
    """Exit at once: the ordinary way waits for process groups whose members may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def build_accelerator() -> Accelerator:
    """Build the Accelerator that runs exactly what was asked for, or raise `UserError`.

    Accelerate itself starts fewer processes than a YAML names (`MULTI_CPU`), or starts them
    unconnected (`MULTI_GPU` without GPUs), and says nothing.
    """
    asked = get_int_from_env(WORLD_SIZE_VARIABLES, 1)
    asked_here = get_int_from_env(["LOCAL_WORLD_SIZE"], asked)
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # by `accelerate launch`
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip().startswith("-1")
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or hidden
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0

    several_asked = launched and "MASTER_ADDR" in os.environ and asked == 1
    if several_asked and not any(name in os.environ for name in WORLD_SIZE_VARIABLES):
        raise UserError(
            "the launcher was asked for several CPU processes and started one (or MASTER_ADDR is "
            "left over in the environment: unset it): use "
            "--config_file accelerate_configs/cpu4.yaml, or torchrun --nproc-per-node N"
        )
    if not wants_cpu and devices < asked_here and (launched or devices > 0):
        raise UserError(
            f"{asked_here} process(es) with a GPU each were asked for, and this machine shows "
            f"{devices or 'no'} GPU(s): launch with --config_file accelerate_configs/cpu.yaml or "
            "cpu4.yaml, or with a YAML whose num_processes is the number of GPUs"
        )
    cpu = wants_cpu or devices == 0
    accelerator = Accelerator(
        cpu=cpu,
        kwargs_handlers=[
            # The others wait while a node's first process downloads or decodes.
            InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2)),
            # Otherwise DistributedDataParallel re-orders its buckets after a process's first
            # step, and gloo's sums with them, so that a resumed run would end with other bits.
            DistributedDataParallelKwargs(find_unused_parameters=cpu),
        ],
    )
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for and {accelerator.num_processes} joined: launch with "
            "accelerate launch --config_file accelerate_configs/… or with torchrun"
        )
    return accelerator


def describe_run(accelerator: Accelerator) -> str:
    """One line for the log: processes, device, precision."""
    processes = accelerator.num_processes
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    threads = f" ({torch.get_num_threads()} threads each)" if device.type == "cpu" else ""
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    plural = "es" if processes > 1 else ""
    return f"=> {processes} process{plural} on {name}{threads}, {precision}"


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from what it belongs to, e.g. ("dropout", seed, epoch, step, rank).

    Hashing keeps seeds of neighbouring steps and purposes unrelated, which sums would not.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def agree_on_seed(accelerator: Accelerator, seed: int | None) -> int:
    """`seed`, or one drawn by the main process for all when it is None."""
    if seed is not None:
        return seed
    drawn = [int.from_bytes(os.urandom(4), "big")]
    broadcast_object_list(drawn)
    accelerator.print(f"=> no --seed given: drew --seed {drawn[0]}")
    return drawn[0]


def use_deterministic_kernels(deterministic: bool) -> None:
    """As the original: a seeded run repeats to the bit on a GPU, an unseeded one is faster."""
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def check_compiler() -> None:
    """Raise `UserError` when torch.compile would fail for want of a C++ compiler."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "c++"))):
        raise UserError("--compile needs a C++ compiler: apt install g++, or leave --compile out")


def check_writable(directory: Path, flag: str) -> None:
    """Make `directory` and write to it now rather than after hours of training.

    Raises:
        UserError: when it cannot be made or written; names the flag that chooses another.
    """
    probe = directory / f".write-test-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error.strerror}; choose another with {flag}"
        ) from error
