"""How a process stops: signals, exit codes, and one line on stderr from one of several processes.

Every command imports this module before all others and enters through `run_script`. The module
itself imports nothing slow, and from its import on Ctrl-C ends a command without a traceback.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from engine.cli import ArgumentParser, UserError, fall_back_to_stderr, make_unfailing

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

T = TypeVar("T")

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, to be resumed

# The variables for rank and world size of torchrun and of mpirun's families ...
RANKS = {"RANK": "WORLD_SIZE", "PMI_RANK": "PMI_SIZE"}
RANKS |= {f"{mpi}_COMM_WORLD_RANK": f"{mpi}_COMM_WORLD_SIZE" for mpi in ("OMPI", "MV2")}
# ... and srun.
SRUN_RANKS = {"SLURM_PROCID": "SLURM_NTASKS"}

# Error numbers that mean the path itself is bad.
OF_A_PATH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)

# Windows lacks some of them.
STOP_SIGNALS = tuple(
    signum for signum in signal.Signals if signum.name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
)

# A terminal or a scheduler signals all processes, and a launcher then passes the same signal on.
# Signals within this many seconds are one request. A later one means "at once".
SAME_REQUEST = 3.0


_in_script = False  # within `run_script`


class Stopped(BaseException):
    """The signal `signum` asked the run to end. Not an `Exception`, as KeyboardInterrupt is not."""

    def __init__(self, signum: int, is_saved: bool = False) -> None:
        """`is_saved`: whether there is a checkpoint to go on from."""
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.is_saved = signum, is_saved


def _leave_while_loading(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"=> interrupted\n")
    os._exit(128 + signum)


def _runs_a_command() -> bool:
    """Whether a command of the kit is what Python runs, rather than a notebook or a test."""
    script = getattr(sys.modules["__main__"], "__file__", None) or ""
    return bool(script) and Path(script).resolve().parent == Path(__file__).resolve().parent.parent


def has_temporary_folder() -> bool:
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return False
    return True


if _runs_a_command():
    # KeyboardInterrupt would print a traceback through some library, or be swallowed there.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_while_loading)
    # Otherwise every process repeats the warnings of torch's C++, such as that
    # find_unused_parameters costs time. Errors stay.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Threads that wait for each other spin, by default for very long: two trainings at a time on
    # two cores are then ten times slower. libgomp reads this when torch loads it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # torch looks for a folder for compiled kernels even when it compiles none.
    if not has_temporary_folder():
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.sep)


def check_flags(parser: ArgumentParser, *, alone: bool = False) -> None:
    """Answer `--help` and refuse mistaken flags, before the seconds that importing torch takes.

    Args:
        alone: whether the command is the work of one process: all others leave here. `--help` is
            always answered by the first process alone.
    """
    make_unfailing()
    if rank() > 0 and (alone or {"-h", "--help"} & {*sys.argv[1:]}):
        leave(0)
    try:
        parser.parse(None)
    except UserError as error:
        _refuse(str(error))
    # The imports that follow leave no garbage. Searching for it would take a third of their time.
    if not hasattr(sys, "ps1"):  # IPython leaves garbage of its own
        gc.disable()


@contextlib.contextmanager
def handlers_put_back() -> Iterator[None]:
    """Put the former signal handlers back at the end, except within `run_script`.

    Decorates a command's `main`, which a notebook or someone's script may call.
    """
    former = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in former.items():
            if not _in_script and handler is not None:  # None: not set from Python
                signal.signal(signum, handler)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run `main` and leave the process; a `UserError` ends in one line and exit code 2.

    Processes that have not joined yet usually all meet the same mistake. The first to leave makes
    the launcher end the others, so each waits its turn to speak.
    """
    global _in_script
    _in_script = True
    if signal.getsignal(signal.SIGINT) is _leave_while_loading:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    make_unfailing()
    if not gc.isenabled():
        gc.freeze()  # what was imported is never garbage
        gc.enable()
    try:
        main()
        # Python's own exit is not safe: gloo's threads now and then abort the process.
        leave(0)
    except Exception as error:
        if mistake := _mistake(error):
            _refuse(mistake)
        from engine.launch import network_failure

        if lost := _lost_worker(error) or network_failure(error):
            _report(lost)
            leave(1)
        end_workers()
        raise
    except Stopped as stopped:
        fall_back_to_stderr()
        if rank() == 0:
            what = "--resume auto goes on" if stopped.is_saved else "the same command begins again"
            print(f"=> {stopped}, exit code {EXIT_STOPPED}: {what}")
        leave(EXIT_STOPPED)
    except KeyboardInterrupt:
        if rank() == 0:
            print("=> interrupted: no file is left unfinished", file=sys.stderr)
        leave(130)
    finally:  # of a notebook's %run
        _in_script = False


def _refuse(mistake: str) -> NoReturn:
    if _store() is None:
        # Let the launcher's SIGTERM end this process before it repeats another one's message.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        unblock_signals()
        time.sleep(min(10 * rank(), 30))
    _report(mistake)
    leave(EXIT_USER_ERROR)


def _mistake(error: Exception) -> str | None:
    """The line about an error that the user can mend, in the input or the machine; else None."""
    text = str(error)
    if "No usable temporary directory" in text:  # of Python's tempfile
        return "no temporary folder can be written: TMPDIR=/a/folder names one"
    if isinstance(error, UserError):
        return text
    if is_out_of_memory(error):
        return (
            "the GPU's memory is full: use a smaller --batch-size, or train the same one in parts "
            "(--gradient-accumulation-steps 2, 4, ...)"
        )
    if "no kernel image is available" in text:
        return (
            "torch's packages do not know this GPU: the README's \"Install\" has others, and "
            "`CUDA_VISIBLE_DEVICES=-1 python ...` computes on the CPU"
        )
    if "Too many open files" in text or "items of ancdata" in text:  # the latter from a worker
        return "too many files are open: raise `ulimit -n`, or use fewer --workers (0: none)"
    # For a full /dev/shm torch 2.11 gives the wrong reason.
    reasons = text.replace("Success (0)", "No space left on device (28)")
    short = re.search(r"shared memory(\(shm\)| object) .*: (.+)|(Bus error)\.", reasons)
    if isinstance(error, RuntimeError) and short:
        return (
            f"the worker processes have too little shared memory ({short[2] or short[3]}): enlarge "
            "/dev/shm (docker run --shm-size 1g), or use fewer --workers (0: none)"
        )
    # Of torch's and of the system's allocators.
    full = ("DefaultCPUAllocator", "Cannot allocate memory")
    if isinstance(error, MemoryError) or any(phrase in text for phrase in full):
        return "the machine's memory is full: use a smaller --batch-size or model"
    if isinstance(error, OSError) and error.errno in OF_A_PATH and error.filename:
        return f"{error.filename}: {error.strerror}"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory is full: torch's allocator says so, the CUDA driver or a library."""
    said = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    is_torchs = type(error).__name__ == "OutOfMemoryError"
    return is_torchs or any(phrase in str(error) for phrase in said)


def _lost_worker(error: Exception) -> str | None:
    """The line for a DataLoader's worker that has gone; None for any other error."""
    if not str(error).startswith("DataLoader worker (pid"):
        return None
    how = re.search(r"killed by signal: [\w ]+|exit code \d+", f"{error} {error.__cause__}")
    return (
        f"a worker process has gone ({how[0] if how else 'killed'}): if memory was short, use "
        "fewer --workers; --resume auto goes on from the last checkpoint"
    )


def unblock_signals() -> None:
    """Let the signals arrive that cluster/slurm_task.sh blocks until here."""
    if hasattr(signal, "pthread_sigmask"):  # which Windows lacks
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def rank() -> int:
    """This process's number among those that a launcher has started.

    A rank without a world size is left over from an earlier launch: 0, as for a single process.
    """
    for number, count in {**RANKS, **SRUN_RANKS}.items():
        with contextlib.suppress(KeyError, ValueError):
            if 0 <= (own := int(os.environ[number])) < int(os.environ[count]):
                return own
    return 0


def _store() -> Any:
    """The key-value store of the run's processes; None before they have joined."""
    dist = sys.modules.get("torch.distributed")
    return dist.distributed_c10d._get_default_store() if dist and dist.is_initialized() else None


def _report(message: str) -> None:
    """Print the line of an error, unless another process of the run has printed its own."""
    try:
        store = _store()
        if store is not None and store.add("ended", 1) > 1:
            return
    except RuntimeError:  # the store has gone with the process or the launcher that kept it
        pass
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """Exit at once. The ordinary way waits for process groups and workers that may be gone."""
    for signum in STOP_SIGNALS:  # another would change the exit code
        signal.signal(signum, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    end_workers()
    if hasattr(sys, "ps1"):  # IPython's %run: the process is not ours to end, nor its signals
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise SystemExit(code) from None  # IPython stumbles over an error with a context
    os._exit(code)


def end_workers() -> None:
    """Kill the processes that this one has started: its exit would wait a minute for them."""
    if hasattr(signal, "SIGCHLD"):  # torch's handler raises for a worker that is killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


class Preemption:
    """Lets a stop signal end a training on all processes after the same step.

    A signal raises `Stopped`: within `deferred()` at the next `check()`, elsewhere at once. A
    second one ends the process on the spot. When a launcher dies, its processes get SIGTERM and
    stop in the same way.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.signum, self.since, self.is_deferred = 0, 0.0, False
        self.is_saved = False  # whether the run has a checkpoint to go on from
        self.group: Any = None
        self.pending: Any = None  # the tensor and the handle of the last all-reduce
        if accelerator.num_processes > 1:
            import torch.distributed as dist

            from engine.launch import ANSWER_WITHIN

            # A group of its own: reading a flag over NCCL would make the CPU wait for the GPU.
            self.group = dist.new_group(backend="gloo", timeout=ANSWER_WITHIN)
        for signum in STOP_SIGNALS:
            # Under nohup SIGHUP stays ignored: the run is to outlive its terminal.
            if signum.name != "SIGHUP" or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._note)
        unblock_signals()  # one that came during the start arrives now
        # Only `accelerate launch` and torchrun set these. Without them the parent is a shell, and
        # its end means nothing.
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
                raise Stopped(signum, self.is_saved)

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

        Several processes learn here of the signals before the previous call, so that none waits.

        Args:
            is_last: wait for those before this call as well, as there is no next one.
        """
        agreed = self.signum
        if self.group is not None:
            import torch
            import torch.distributed as dist

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
            raise Stopped(agreed, self.is_saved)


def start_workers(loader: DataLoader[T]) -> Iterator[T]:
    """`iter(loader)`, with the stop signals blocked in its workers until they ignore them.

    Raises:
        UserError: the machine has no room for them.
    """
    can_block = hasattr(signal, "pthread_sigmask")  # which Windows lacks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if can_block else set()
    try:
        return iter(loader)
    except OSError as error:  # of a fork, or of a semaphore in /dev/shm
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
    # A parent that ends sends its workers SIGTERM, and its last step may still need them: they stay
    # for a minute.
    if hasattr(signal, "alarm"):  # which Windows lacks
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    unblock_signals()
