"""What a run stands on: errors meant for the user, the one Accelerator, signals, and seeds.

Every script enters through `run_script` and builds its Accelerator with `build_accelerator`,
so that what was asked of a launcher is compared with what it started in one place. A training
that may be asked to stop holds a `Preemption`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
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
EXIT_STOPPED = os.EX_TEMPFAIL  # 75: stopped by a signal, to be resumed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher passes on what its processes may have had from the terminal or the scheduler
# already: within so many seconds it is one request, and not the second that means "at once".
SAME_REQUEST = 3.0


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


class Stopped(BaseException):
    """A signal, `signum`, asked the run to end; like KeyboardInterrupt no ordinary exception."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def run_script(main: Callable[[], None]) -> None:
    """Run `main` and leave the process; a `UserError` ends in one line and exit code 2.

    Of several processes one speaks. Before they are joined, all usually meet the same mistake,
    and the first to leave makes the launcher end the others: each waits its turn.
    """
    # A log file is read while it grows, and beside what goes to stderr.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    script = Path(sys.argv[0]).name
    try:
        main()
        # Not through the interpreter's end, where gloo's threads now and then abort the process.
        leave(0)
    except (UserError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = UserError("the GPU's memory is full: use a smaller --batch-size")
        if not dist.is_initialized():
            # From one that left earlier, too: its SIGTERM may have had to wait for the start's end.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            time.sleep(min(10 * get_int_from_env(["RANK"], 0), 30))
        if _is_first_to_speak():
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
        leave(EXIT_USER_ERROR)
    except RuntimeError as error:
        # A process that lost its peers has nothing to add to what the first to fail has said.
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not (lost and dist.is_initialized()):
            raise
        if _is_first_to_speak():
            print(
                f"{script}: error: another process of the run has gone (killed, or its machine "
                "lost): --resume auto goes on from the last checkpoint",
                file=sys.stderr,
            )
        leave(1)
    except Stopped as stopped:
        if get_int_from_env(["RANK"], 0) == 0:
            print(f"=> {stopped}, exit code {EXIT_STOPPED}: --resume auto goes on")
        leave(EXIT_STOPPED)
    except KeyboardInterrupt:
        leave(130)


def _is_first_to_speak() -> bool:
    """Whether no other process of the run has reported its end, as far as that can be known."""
    if not dist.is_initialized():
        return True
    try:
        return int(dist.distributed_c10d._get_default_store().add("ended", 1)) == 1
    except RuntimeError:  # the store went with the process or the launcher that kept it
        return True


def leave(code: int) -> NoReturn:
    """Exit at once: the ordinary way waits for process groups and workers that may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


class _Accelerator(Accelerator):  # type: ignore[misc]  # untyped
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the main process, where Accelerate does so on the first of every node."""
        if self.is_main_process:
            print(*args, **kwargs)


def build_accelerator(deterministic: bool = True) -> Accelerator:
    """Build the Accelerator that runs exactly what was asked for, or raise `UserError`.

    Accelerate itself starts fewer processes than a YAML names (`MULTI_CPU`), or starts them
    unconnected (`MULTI_GPU` without GPUs), and says nothing.

    Args:
        deterministic: whether a resumed run on several GPUs has to sum gradients in the order
            of an undisturbed one. On a CPU it always does.
    """
    # Huge pages for large tensors: a third of a language model's step was page faults. Torch
    # reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
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
    accelerator = _Accelerator(
        cpu=cpu,
        kwargs_handlers=[
            # The others wait while a node's first process downloads or decodes.
            InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2)),
            # Otherwise DistributedDataParallel re-orders its buckets after a process's first
            # step, and its sums with them, so that a resumed run would end with other bits.
            DistributedDataParallelKwargs(find_unused_parameters=cpu or deterministic),
        ],
    )
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for and {accelerator.num_processes} joined: launch with "
            "accelerate launch --config_file accelerate_configs/… or with torchrun"
        )
    if accelerator.mixed_precision == "bf16" and emulates_bf16(accelerator.device):
        # oneDNN's LSTM fails there; torch's own computes, and no layer is slower for it.
        torch.backends.mkldnn.set_flags(False)
    return accelerator


def keep_freed_memory(largest: int) -> None:
    """Have glibc keep the memory of freed tensors for the next step, where it has the say.

    Aligned to huge pages, it would give each back to the kernel, which zeroes the pages anew in
    every step: a sixth of a language model's time, a third of the image loader's.

    Args:
        largest: bytes of a tensor whose memory is kept; in all, twice as many. 2**25 is where
            glibc's own threshold ends, and the most that older versions accept.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        if not mallopt(m_mmap_threshold, largest):
            mallopt(m_mmap_threshold, 2**25)
        mallopt(m_trim_threshold, min(2 * largest, 2**31 - 1))


class Preemption:
    """Lets SIGTERM, SIGINT and SIGUSR1 stop a training on all processes after the same step.

    A signal raises `Stopped`: within `deferred()` at the next `check()`, elsewhere at once. A
    second one ends the process on the spot. A launcher that dies takes its processes along in
    the same way.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.signum, self.since, self.is_deferred = 0, 0.0, False
        # Of its own, since the GPUs' group cannot tell without a synchronisation.
        several = accelerator.num_processes > 1
        self.group: Any = dist.new_group(backend="gloo") if several else None
        self.pending: tuple[torch.Tensor, Any] | None = None
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._note)
        # Blocked by cluster/slurm_task.sh: what came during the start comes now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        if launched and sys.platform == "linux":
            pr_set_pdeathsig = 1  # of linux/prctl.h
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and time.monotonic() - self.since > SAME_REQUEST:
            os.write(2, b"=> a second signal: stopped at once\n")
            os._exit(128 + signum)
        if not self.signum:
            self.signum, self.since = signum, time.monotonic()
            if not self.is_deferred:
                raise Stopped(signum)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it a signal waits for `check`."""
        self.is_deferred = True
        try:
            yield
            if self.pending is not None:
                self.pending[1].wait()
        finally:
            self.is_deferred = False

    def check(self) -> None:
        """Raise `Stopped` when a signal has come to any process; all call it equally often.

        What several processes know of each other is from the call before, so that none waits.
        """
        agreed = self.signum
        if self.group is not None:
            before = self.pending
            # The highest number wins: SIGTERM over SIGUSR1 over SIGINT.
            flag = torch.tensor([self.signum])
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
            self.pending = flag, work
            agreed = 0
            if before is not None:
                before[1].wait()
                agreed = int(before[0])
        if agreed:
            # This process's own signal may still be on its way: it is the same request.
            self.signum, self.since = agreed, time.monotonic()
            raise Stopped(agreed)


def leave_signals_to_parent(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: a signal to the whole group is for the training alone."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    # By SIGTERM a parent that ends also clears away its workers, and waits for them: they go on
    # as long as it may take to finish a step.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def describe_run(accelerator: Accelerator) -> str:
    """Nodes, processes, device and precision, and what a faster precision would be."""
    processes = accelerator.num_processes
    nodes = processes // get_int_from_env(["LOCAL_WORLD_SIZE"], processes)
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    threads = f" ({torch.get_num_threads()} threads each)" if device.type == "cpu" else ""
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    plural = "es" if processes > 1 else ""
    several = f"{nodes} nodes, " if nodes > 1 else ""
    line = f"=> {several}{processes} process{plural} on {name}{threads}, {precision}"
    if accelerator.mixed_precision == "no" and _has_fast_bf16(device):
        line += "\n=> bf16 would be much faster on this device: accelerate launch --config_file "
        line += f"accelerate_configs/{'cpu_bf16' if device.type == 'cpu' else 'gpu1'}.yaml …"
    if accelerator.mixed_precision == "bf16" and emulates_bf16(accelerator.device):
        line += "\n=> this CPU has no instructions for bf16 and is many times slower in it than in "
        line += "float32: accelerate launch --mixed_precision no …"
    return line


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(device.type == "cpu" and has_units)


def emulates_bf16(device: torch.device) -> bool:
    """Whether it is a CPU on which oneDNN knows no bf16 (on x86, one without AVX512).

    It then takes 6 (convolutions) to 150 times (products) as long as float32.
    """
    if not (device.type == "cpu" and torch.backends.mkldnn.is_available()):
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
    """cuDNN's, as in the original: those of a seeded run repeat to the bit, others are faster."""
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
