"""What a launcher asked for, compared with what it started; the device; the network between.

Every command that can run in several processes builds its Accelerator with `build_accelerator`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import os
import re
import shutil
import socket
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
    get_int_from_env,
    parse_flag_from_env,
)
from tqdm import tqdm

from engine.cli import UserError
from engine.stop import RANKS, has_temporary_folder

# How long processes wait for each other, to join and in training. No step, validation or
# checkpoint takes one of them so long.
ANSWER_WITHIN = datetime.timedelta(minutes=10)
# Before training the others wait while a node's first process downloads or decodes.
PREPARED_WITHIN = datetime.timedelta(hours=2)

WORLD_SIZE_VARIABLES = [*RANKS.values()]
LAUNCH_VARIABLES = [*RANKS, *WORLD_SIZE_VARIABLES, "LOCAL_RANK", "LOCAL_WORLD_SIZE"]

# `ACCELERATE_*` variables that are supported or harmless. All others (FSDP, DeepSpeed, Megatron,
# ...) have to be off.
KNOWN_VARIABLES = {
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY"),
    *("ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL", "ACCELERATE_ENABLE_RICH"),
    *("ACCELERATE_DYNAMO_MODE", "ACCELERATE_DYNAMO_USE_FULLGRAPH"),  # of a backend that is off
    *("ACCELERATE_DYNAMO_USE_DYNAMIC", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"),
}
OFF = ("", "no", "none", "false", "0", "off")

# What gloo and NCCL say when another process has gone or no longer answers ...
LOST = (
    *("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Application timeout"),
    *("remote process", "remote peer", "Connection was likely closed"),
)
# ... and gloo when it could not be reached in the first place.
UNREACHABLE = ("Unable to find", "connectFullMesh", "timed out connecting", "Connection refused")

# The variables that hide GPUs from CUDA and from ROCm.
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# The packages of torch for GPUs before Turing, and for drivers older than 580.
FOR_OLDER = (
    "install torch by the command of pytorch.org for CUDA 12.6, in a fresh .venv (requirements.txt "
    "allows torch 2.11, and make venv keeps it)"
)
ON_CPU = "launch with --config_file accelerate_configs/cpu.yaml or cpu4.yaml"


class _Accelerator(Accelerator):  # type: ignore[misc]  # untyped
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the main process, where Accelerate does so on the first of every node."""
        if self.is_main_process:
            print(*args, **kwargs)


def build_accelerator(broadcast_buffers: bool = True) -> Accelerator:
    """Build the Accelerator that runs exactly what was asked for, or raise `UserError`.

    Accelerate itself starts fewer processes than a YAML names (`MULTI_CPU`), or starts them
    unconnected (`MULTI_GPU` without GPUs), and says nothing.

    Args:
        broadcast_buffers: whether buffers change in training, so that the main process's have to
            be copied to the others before each step.
    """
    # Huge pages for large tensors: a third of a language model's step was page faults. Torch
    # reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # cuDNN's RNNs sum in a fixed order only with workspaces of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # tqdm's own lock is a semaphore. Where workers are spawned (macOS), Python warns at exit that
    # it was left behind.
    tqdm.set_lock(threading.RLock())
    _refuse_leftovers()
    _refuse_unknown_modes()
    asked = get_int_from_env(WORLD_SIZE_VARIABLES, 1)
    asked_here = get_int_from_env(["LOCAL_WORLD_SIZE"], asked)
    cpu = _runs_on_cpu(asked, asked_here)
    if asked > asked_here and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = find_interface()
    joining = InitProcessGroupKwargs(timeout=ANSWER_WITHIN)
    try:
        # The processes join here, and agree on a precision before the Accelerator decides about a
        # loss scale.
        state = PartialState(cpu, **joining.to_kwargs())
        if cpu and dist.is_initialized():
            # Accelerate's own barrier takes the device that torch finds: on a Mac MPS, for which
            # gloo has none, and elsewhere a GPU that ACCELERATE_USE_CPU leaves aside.
            PartialState.wait_for_everyone = lambda _: dist.barrier()
        accelerator = _Accelerator(
            cpu=cpu,
            mixed_precision="fp16" if _lacks_bf16(state.device) else None,
            kwargs_handlers=[
                joining,
                DistributedDataParallelKwargs(broadcast_buffers=broadcast_buffers),
            ],
        )
    except (ValueError, RuntimeError) as error:
        what = f"the {asked} processes cannot join" if asked > 1 else "this cannot be launched"
        raise UserError(f"{what}: {reason(error)}{meeting_place(error)}") from error
    if accelerator.distributed_type != "NO" and accelerator.distributed_type[:6] != "MULTI_":
        raise UserError(
            f"this kit does not know the launcher's mode {accelerator.distributed_type}"
        )
    set_patience(PREPARED_WITHIN)
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for and {accelerator.num_processes} joined: launch with "
            "accelerate launch --config_file accelerate_configs/cpu4.yaml (gpu4.yaml), or torchrun"
        )
    if accelerator.mixed_precision == "bf16" and emulates_bf16(accelerator.device):
        # oneDNN's LSTM fails on such a CPU. Torch's own works, and no layer is slower.
        torch.backends.mkldnn.set_flags(False)
    return accelerator


def _runs_on_cpu(asked: int, asked_here: int) -> bool:
    """Whether the CPU computes; raises `UserError` for processes that lack the GPUs they ask for.

    Args:
        asked: processes in all.
        asked_here: on this node.
    """
    launched = _is_launched()
    # cpu4.yaml sets -1,-1. A single -1 is set by hand, maybe before a launch that asks for GPUs.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("-1,")
    try:
        wants_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or hidden
    except ValueError as error:
        raise UserError(f"ACCELERATE_USE_CPU: {error}: true or false") from error
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0

    several_asked = launched and "MASTER_ADDR" in os.environ and asked == 1
    if several_asked and not any(name in os.environ for name in WORLD_SIZE_VARIABLES):
        raise UserError(
            "the launcher was asked for several CPU processes and started one (or MASTER_ADDR is "
            "left over in the environment: unset it): use "
            "--config_file accelerate_configs/cpu4.yaml, or torchrun --nproc-per-node N"
        )
    if not wants_cpu and devices < asked_here and (launched or devices > 0):
        hiding = _hiding() and f" ({_hiding()})"
        how = f"--num_processes {devices}" if devices > 1 else "gpu1.yaml"
        why = f"{devices} GPU(s){hiding}: launch with {how}"
        raise UserError(
            f"{asked_here} process(es) with a GPU each were asked for, and this machine shows "
            f"{why if devices else _why_no_gpu()}; or {ON_CPU}"
        )
    cpu: bool = wants_cpu or devices == 0
    if not cpu and torch.cuda.is_available():
        _refuse_unknown_gpu(get_int_from_env(["LOCAL_RANK"], 0) % torch.cuda.device_count())
    if cpu and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UserError("fp16 needs a GPU: on a CPU launch with --mixed_precision bf16 or no")
    return cpu


def _is_launched() -> bool:
    """True under a launcher. The precision variable alone may have been set by hand."""
    names = {"ACCELERATE_DYNAMO_MODE", "SLURM_PROCID", *WORLD_SIZE_VARIABLES}
    return "ACCELERATE_MIXED_PRECISION" in os.environ and bool(names & os.environ.keys())


def _lacks_bf16(device: torch.device) -> bool:
    """Whether bf16 is asked for and a GPU of the run has none in hardware; all processes agree."""
    if device.type != "cuda" or os.environ.get("ACCELERATE_MIXED_PRECISION") != "bf16":
        return False
    return any(gather_object([not _has_fast_bf16(device)]))


def _hiding() -> str:
    return " ".join(f"{name}={os.environ[name]}" for name in HIDING if name in os.environ)


def _why_no_gpu() -> str:
    """That there is no GPU, why in torch's own words, and what mends that."""
    text = "No CUDA GPUs are available"
    try:
        torch.cuda.init()  # says what `is_available` keeps to itself
    except (RuntimeError, AssertionError) as error:
        text = str(error).strip()
    nodes = sorted(Path("/dev").glob("nvidia[0-9]*"))
    is_closed = bool(nodes) and not any(os.access(node, os.R_OK | os.W_OK) for node in nodes)
    driver = re.search(r"found version (\d+)", text)  # the CUDA that it can do: 12020 is 12.2
    if "not compiled with CUDA" in text:
        remedy = "these are packages for CPUs: make venv installs those for CUDA, in a fresh .venv"
    elif driver:
        remedy = "update the driver"
        if int(driver[1]) >= 12000 and (torch.version.cuda or "").startswith("13."):
            remedy += f" to 580 or newer, or {FOR_OLDER}"
    elif "no NVIDIA driver" in text:
        remedy = "install NVIDIA's driver, or start the container with --gpus all"
    elif is_closed:
        remedy = f"this user may not open {nodes[0]}, and `ls -l` shows the group that may"
    elif _hiding():
        remedy = f"{_hiding()} hides them, `unset` shows them"
    else:
        remedy = "`nvidia-smi` shows what the driver sees; restart the machine after its update"
    said = text.partition("? Error ")[2] or text.partition(". ")[0]
    return f"no GPU(s) ({said.splitlines()[0]}): {remedy}"


def _refuse_unknown_gpu(index: int) -> None:
    """Raise `UserError` for a GPU for which torch's packages have no kernels."""
    with warnings.catch_warnings(action="ignore"):  # torch's own, of many lines
        major, minor = torch.cuda.get_device_capability(index)
    archs = torch.cuda.get_arch_list()
    if torch.version.hip or not archs or has_kernels(archs, major, minor):
        return
    newest = max(archs, key=_arch_number)
    if 10 * major + minor > _arch_number(newest):
        remedy = "install a newer torch"
    elif major >= 5:
        remedy = FOR_OLDER
    else:
        remedy = "no torch that requirements.txt allows has them"
    raise UserError(
        f"{torch.cuda.get_device_name(index)} is of sm_{major}{minor}, and torch "
        f"{torch.__version__} has kernels for {' '.join(archs)}: {remedy}; or {ON_CPU}"
    )


def _arch_number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))  # 90 for sm_90a


def has_kernels(archs: Sequence[str], major: int, minor: int) -> bool:
    """Whether code for `archs` runs on a GPU of this compute capability.

    A binary (sm_) runs on the later GPUs of its generation, PTX (compute_) on all later ones.
    """
    for arch in archs:
        generation, step = divmod(_arch_number(arch), 10)
        is_later = (generation, step) <= (major, minor)
        if is_later and (generation == major or arch.startswith("compute_")):
            return True
    return False


def _refuse_leftovers() -> None:
    """Raise `UserError` for a launcher's variables that are no numbers, or incomplete."""
    for name in (*LAUNCH_VARIABLES, "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        value = os.environ.get(name, "0")
        if not value.removeprefix("-").isdecimal():
            raise UserError(f"{name} is {value!r}, and not a whole number: `unset {name}`")
    found = [name for name in LAUNCH_VARIABLES if name in os.environ]
    size, rank = get_int_from_env(WORLD_SIZE_VARIABLES, 0), get_int_from_env([*RANKS], 0)
    joins = size > 1 or get_int_from_env(["LOCAL_RANK"], -1) >= 0
    if found and size == 0:
        what = "without a WORLD_SIZE"
    elif size > 1 and not RANKS.keys() & os.environ.keys():
        what = "without a RANK"
    elif rank >= max(size, 1):
        what = "is no place among the processes"
    elif joins and not (os.environ.get("MASTER_ADDR") or dist.is_mpi_available()):
        what = "without a MASTER_ADDR"
    else:
        return
    raise UserError(
        f"{' '.join(f'{name}={os.environ[name]}' for name in found)} {what}: `unset "
        f"{' '.join(found)}`, if an earlier launch has left this over, or launch with a YAML of "
        "accelerate_configs/ or torchrun"
    )


def _refuse_unknown_modes() -> None:
    """Raise `UserError` for variables of the launcher or the shell that the kit would ignore."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"ACCELERATE_MIXED_PRECISION is {precision!r}, and not no, bf16 or fp16")
    for name, value in sorted(os.environ.items()):
        is_off = value.lower() in OFF or f"{name[-6:]}={value}" == "_STEPS=1"  # of accumulation
        if name.startswith("ACCELERATE_") and name not in KNOWN_VARIABLES and not is_off:
            instead = " (--compile compiles the model)" if "DYNAMO" in name else ""
            if name.endswith("_STEPS"):
                instead = " (--gradient-accumulation-steps is a flag of the script)"
            raise UserError(
                f"{name}={value} is for another kind of training than this kit's{instead}: launch "
                "with a YAML of accelerate_configs/, or unset it"
            )
    tasks = get_int_from_env(["SLURM_STEP_NUM_TASKS"], 1)
    if tasks > 1 and not any(name in os.environ for name in WORLD_SIZE_VARIABLES):
        raise UserError(
            f"srun has started {tasks} processes that do not know of each other: start them with "
            "cluster/slurm_task.sh, or one torchrun on each node"
        )


def refuse_unequal_parts(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Raise `UserError` for a global batch that processes and their parts cannot share equally."""
    parts = accelerator.num_processes * args.gradient_accumulation_steps
    if args.batch_size % parts:
        raise UserError(
            f"--batch-size {args.batch_size} is for all processes together and cannot be divided "
            f"by {parts}: use a multiple"
        )


def set_patience(timeout: datetime.timedelta) -> None:
    """How long the processes of a run wait for each other from now on."""
    if dist.is_initialized():
        # Torch before 2.15 knows it by its old name.
        getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)(timeout)


def keep_freed_memory(largest: int) -> None:
    """Make glibc keep freed tensors' memory for the next step. Does nothing without glibc.

    Otherwise the kernel takes each tensor's pages back and zeroes them anew in every step: a sixth
    of a language model's time, a third of the image loader's.

    Args:
        largest: bytes of the largest tensor to keep; twice as many are kept in all. Older versions
            of glibc accept at most 2**25.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (TypeError, AttributeError):  # Windows, and libraries other than glibc
        return
    if not mallopt(m_mmap_threshold, largest):
        mallopt(m_mmap_threshold, 2**25)
    mallopt(m_trim_threshold, min(2 * largest, 2**31 - 1))


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
        yaml = "cpu_bf16" if device.type == "cpu" else "gpu1"
        how = f"--config_file accelerate_configs/{yaml}.yaml"
        if processes > 1:
            how = "--mixed_precision bf16"
        line += f"\n=> bf16 is usually faster on this device: accelerate launch {how} ..."
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" != accelerator.mixed_precision:
        line += "\n=> bf16 was asked for, and GPUs before Ampere do not have it: fp16, with a loss "
        line += "scale, takes its place"
    if accelerator.mixed_precision == "bf16" and emulates_bf16(accelerator.device):
        line += "\n=> this CPU has no instructions for bf16 and is many times slower in it than in "
        line += "float32: accelerate launch --mixed_precision no ..."
    return line


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(device.type == "cpu" and has_units)


def emulates_bf16(device: torch.device) -> bool:
    """Whether `device` is a CPU on which oneDNN has no bf16 (on x86, one without AVX512).

    There bf16 takes 6 times (convolutions) to 150 times (matrix products) as long as float32.
    """
    if not (device.type == "cpu" and torch.backends.mkldnn.is_available()):
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_compiler() -> None:
    """Raise `UserError` when torch.compile would fail for want of a C++ compiler or a folder."""
    if not has_temporary_folder():
        raise UserError("--compile needs a temporary folder: TMPDIR=/a/folder names one")
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "c++"))):
        raise UserError("--compile needs a C++ compiler: apt install g++, or leave --compile out")


def network_failure(error: Exception) -> str | None:
    """The line for an error in which processes do not reach each other; None for any other."""
    if not isinstance(error, RuntimeError):
        return None
    if dist.is_initialized() and any(phrase in str(error) for phrase in LOST):
        return (
            f"another process of the run has gone or hangs ({reason(error)}): --resume auto goes "
            "on from the last checkpoint"
        )
    if where := meeting_place(error):
        return f"the processes of the run cannot work together: {reason(error)}{where}"
    return None


def reason(error: Exception) -> str:
    """The message of an error of torch, without the places in its source."""
    text = str(error).split("\nException raised from")[0]
    text = text.rpartition("Last error:\n")[2].strip() or text.strip() or type(error).__name__
    line = text.splitlines()[0].split(" This is typically caused")[0]
    return re.sub(r"^\[(?:enforce fail at )?\S*gloo\S*\] (?:\S+ != \S+ )?", "", line)


def meeting_place(error: Exception) -> str:
    """The variables that say where processes meet; empty for an error that is not the network's."""
    if not (isinstance(error, dist.DistError) or any(p in str(error) for p in UNREACHABLE)):
        return ""
    names = ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    found = (f"{name}={os.environ[name]}" for name in names if name in os.environ)
    return f" ({' '.join(found)})"


def find_interface() -> str:
    """The network interface between the nodes, for gloo.

    Gloo's own choice is the address that the node's name resolves to, and may be 127.0.1.1. This
    is NCCL's choice: what NCCL_SOCKET_IFNAME says, else what leads to the main process, else the
    first one. Loopback and Docker's come last.
    """
    addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    asked = os.environ.get("NCCL_SOCKET_IFNAME", "")
    names = tuple(filter(None, asked.lstrip("^=").split(",")))
    towards_main = ""
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", ""), 9))  # sends nothing
        towards_main = probe.getsockname()[0]

    def preference(interface: str) -> list[bool]:
        own = {address.address for address in addresses[interface]}
        is_named = interface in names if "=" in asked else interface.startswith(names)
        return [
            bool(names) and is_named == asked.startswith("^"),
            any(address.startswith("127.") for address in own),
            towards_main not in own,
            interface.startswith(("docker", "br-", "veth", "virbr")),
        ]

    inet: list[str] = [
        name
        for name, own in addresses.items()
        if name in states
        and states[name].isup  # an alias has no state of its own
        and any(a.family in (socket.AF_INET, socket.AF_INET6) for a in own)
    ]
    return min(inet, key=preference)
