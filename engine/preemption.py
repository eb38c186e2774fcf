"""Signals that ask a training to end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader

from engine.cli import UserError
from engine.exits import STOP_SIGNALS, Stopped, unblock_signals
from engine.launch import ANSWER_WITHIN

T = TypeVar("T")

# The terminal or the scheduler signals all processes, and a launcher passes the signal on to them
# once more: within this many seconds it is one request, and not the second that means "at once".
SAME_REQUEST = 3.0


class Preemption:
    """Lets a stop signal end a training on all processes after the same step.

    A signal raises `Stopped`: within `deferred()` at the next `check()`, elsewhere at once. A
    second one ends the process on the spot. A launcher that dies takes its processes along in
    the same way.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.signum, self.since, self.is_deferred = 0, 0.0, False
        # A gloo group of its own: reading a flag over NCCL would make the CPU wait for the GPU.
        several = accelerator.num_processes > 1
        self.group: Any = dist.new_group(backend="gloo", timeout=ANSWER_WITHIN) if several else None
        self.pending: tuple[torch.Tensor, Any] | None = None
        for signum in STOP_SIGNALS:
            # Ignored by nohup: the run is to outlive its terminal.
            if signum.name != "SIGHUP" or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._note)
        unblock_signals()  # one that came during the start arrives now
        # Set by `accelerate launch` and torchrun, and by nobody by hand. Without them the parent is
        # a shell, whose end means nothing.
        launched = {"ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        if launched and sys.platform == "linux":
            pr_set_pdeathsig = 1  # of linux/prctl.h
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and time.monotonic() - self.since > SAME_REQUEST:
            with contextlib.suppress(OSError):
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
        finally:
            self.is_deferred = False

    def check(self, is_last: bool = False) -> None:
        """Raise `Stopped` when a signal has come to any process; all call it equally often.

        Several processes learn here what was known at the call before, so that none waits.

        Args:
            is_last: wait for what is known now, as there is no next call.
        """
        agreed = self.signum
        if self.group is not None:
            # The highest number wins: SIGTERM over SIGUSR1 over SIGINT over SIGHUP.
            flag = torch.tensor([self.signum])
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
            known = [self.pending, (flag, work) if is_last else None]
            self.pending = None if is_last else (flag, work)
            agreed = 0
            for sent in filter(None, known):
                sent[1].wait()
                agreed = max(agreed, int(sent[0]))
        if agreed:
            # This process's own signal may still be on its way: it is the same request.
            self.signum, self.since = agreed, time.monotonic()
            raise Stopped(agreed)


def start_workers(loader: DataLoader[T]) -> Iterator[T]:
    """`iter(loader)`; the stop signals are kept from its workers until they ignore them.

    Raises:
        UserError: the machine has no room for them.
    """
    can_block = hasattr(signal, "pthread_sigmask")  # which Windows lacks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if can_block else set()
    try:
        return iter(loader)
    except OSError as error:  # of a fork, or of a semaphore, which lies in /dev/shm
        raise UserError(
            f"cannot start {loader.num_workers} worker processes ({error.strerror}): use fewer "
            "--workers (0: none), or give them more room (memory, processes, /dev/shm)"
        ) from error
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: a signal to the whole group is for the training alone."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    # A parent that ends clears its workers away by SIGTERM. They go on for as long as the step
    # under way may still need them.
    if hasattr(signal, "alarm"):  # which Windows lacks
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    unblock_signals()
