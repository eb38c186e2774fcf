"""How a process ends: its exit code, one line on stderr, and of several processes one that speaks.

Every command enters through `run_script`, and imports this module before all others: it imports
nothing slow itself, and from then on Ctrl-C ends the process without a traceback.
"""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from engine.cli import ArgumentParser, UserError
from engine.streams import fall_back_to_stderr, make_unfailing

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, to be resumed

# How torchrun, mpirun's families and srun number the processes that they start.
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")

# What a path can have that nobody may search, or that is too long, or no path at all.
OF_A_PATH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)

# Windows lacks some of them.
STOP_SIGNALS = tuple(
    signum for signum in signal.Signals if signum.name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
)


class Stopped(BaseException):
    """A signal, `signum`, asked the run to end; like KeyboardInterrupt no ordinary exception."""

    is_saved = False  # whether there is a checkpoint to go on from

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


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
    # An exception would print where in which library it came, or be swallowed by that.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_while_loading)
    # Every process would print torch's warnings in C++, such as that find_unused_parameters, which
    # keeps four CPU processes exact, costs time. Errors stay.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # torch asks for a folder for compiled kernels also where it compiles none.
    if not has_temporary_folder():
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.sep)


def check_flags(parser: ArgumentParser, *, alone: bool = False) -> None:
    """Answer `--help` and refuse mistaken flags, before the seconds that importing torch takes.

    Args:
        alone: whether the command is the work of one process. Of several that a launcher has
            started, the first then does it, and the others leave here. One gives help in any case.
    """
    make_unfailing()
    if rank() > 0 and (alone or {"-h", "--help"} & {*sys.argv[1:]}):
        leave(0)
    try:
        parser.parse(None)
    except UserError as error:
        _refuse(str(error))
    # The imports that follow leave no garbage, and looking for it takes a third of their time.
    if not hasattr(sys, "ps1"):  # IPython's, whose own garbage stays
        gc.disable()


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run `main` and leave the process; a `UserError` ends in one line and exit code 2.

    Before the processes of a run have joined, all of them usually meet the same mistake, and the
    first to leave makes the launcher end the others: so each waits its turn to speak.
    """
    if signal.getsignal(signal.SIGINT) is _leave_while_loading:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    make_unfailing()
    if not gc.isenabled():
        gc.freeze()  # what was imported is never garbage
        gc.enable()
    try:
        main()
        # Not by the interpreter's own end, in which gloo's threads now and then abort the process.
        leave(0)
    except Exception as error:
        from engine.network import failure

        if mistake := _mistake(error):
            _refuse(mistake)
        if lost := _lost_worker(error) or failure(error):
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


def _refuse(mistake: str) -> NoReturn:
    if _store() is None:
        # Another process may have failed first: unblock the launcher's SIGTERM, so that it ends
        # this one before it repeats the message.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        unblock_signals()
        time.sleep(min(10 * rank(), 30))
    _report(mistake)
    leave(EXIT_USER_ERROR)


def _mistake(error: Exception) -> str | None:
    """The line for what the user can mend: the input, or the machine; None for any other error."""
    text = str(error)
    if "No usable temporary directory" in text:  # of Python's tempfile
        return "no temporary folder can be written: TMPDIR=/a/folder names one"
    if isinstance(error, UserError):
        return text
    if is_out_of_memory(error):
        return "the GPU's memory is full: use a smaller --batch-size"
    if "Too many open files" in text or "items of ancdata" in text:  # the latter of a worker's
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
    """Whether a GPU's memory is full: torch's allocator says so, or the CUDA driver."""
    return type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in str(error)


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
    """Let signals arrive that cluster/slurm_task.sh blocks while Python loads its libraries."""
    if hasattr(signal, "pthread_sigmask"):  # which Windows lacks
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def rank() -> int:
    """This process's number among those that a launcher has started."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def _store() -> Any:
    """What the processes of a run share, once they have joined."""
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
    """Exit at once: the ordinary way waits for process groups and workers that may be gone."""
    for signum in STOP_SIGNALS:  # one more would change the exit code
        signal.signal(signum, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    end_workers()
    if hasattr(sys, "ps1"):  # IPython's %run: the process is not ours to end, nor its signals
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(code)
    os._exit(code)


def end_workers() -> None:
    """Kill the processes that this one has started; its own end would wait a minute for them."""
    if hasattr(signal, "SIGCHLD"):  # whose handler, torch's, raises for a worker that is killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
