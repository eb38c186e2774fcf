"""What a launcher asked for, compared with what it started; and the device that was found.

Every command builds its Accelerator with `build_accelerator`.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import shutil
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    get_int_from_env,
    parse_flag_from_env,
)

from engine.cli import UserError
from engine.exits import has_temporary_folder
from engine.network import find_interface, meeting_place, reason

# How long processes wait for each other in training, and when they join: longer than any step,
# validation or checkpoint keeps one of them busy.
ANSWER_WITHIN = datetime.timedelta(minutes=10)
# Before training the others wait while a node's first process downloads or decodes.
PREPARED_WITHIN = datetime.timedelta(hours=2)

# How mpirun's families and torchrun name the number of processes that they started.
WORLD_SIZE_VARIABLES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]

# What of the launcher's variables this kit understands or needs not care about. All others
# (FSDP, DeepSpeed, Megatron, ...) have to be off.
KNOWN_VARIABLES = {
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY"),
    *("ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL", "ACCELERATE_ENABLE_RICH"),
    *("ACCELERATE_DYNAMO_MODE", "ACCELERATE_DYNAMO_USE_FULLGRAPH"),  # of the backend, which is no
    *("ACCELERATE_DYNAMO_USE_DYNAMIC", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"),
}
OFF = ("", "no", "none", "false", "0", "off")


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
        broadcast_buffers: whether buffers change in training, and so have to be the same on all
            processes before each step.
    """
    # Huge pages for large tensors: a third of a language model's step was page faults. Torch
    # reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # cuDNN's RNNs sum in a fixed order only with workspaces of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _refuse_unknown_modes()
    asked = get_int_from_env(WORLD_SIZE_VARIABLES, 1)
    asked_here = get_int_from_env(["LOCAL_WORLD_SIZE"], asked)
    launched = _is_launched()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip().startswith("-1")
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
        raise UserError(
            f"{asked_here} process(es) with a GPU each were asked for, and this machine shows "
            f"{devices or 'no'} GPU(s): launch with --config_file accelerate_configs/cpu.yaml or "
            "cpu4.yaml, or with a YAML whose num_processes is the number of GPUs"
        )
    cpu = wants_cpu or devices == 0
    if cpu and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UserError("fp16 needs a GPU: on a CPU launch with --mixed_precision bf16 or no")
    if asked > asked_here and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = find_interface()
    try:
        accelerator = _Accelerator(
            cpu=cpu,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=ANSWER_WITHIN),
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
        # oneDNN's LSTM fails there; torch's own computes, and no layer is slower for it.
        torch.backends.mkldnn.set_flags(False)
    return accelerator


def _is_launched() -> bool:
    """Whether a launcher has set the precision, which by hand says nothing of devices."""
    names = {"ACCELERATE_DYNAMO_MODE", "SLURM_PROCID", *WORLD_SIZE_VARIABLES}
    return "ACCELERATE_MIXED_PRECISION" in os.environ and bool(names & os.environ.keys())


def _refuse_unknown_modes() -> None:
    """Raise `UserError` for what `accelerate launch` or the shell exports and nobody here heeds."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"ACCELERATE_MIXED_PRECISION is {precision!r}, and not no, bf16 or fp16")
    for name, value in sorted(os.environ.items()):
        is_off = value.lower() in OFF or f"{name[-6:]}={value}" == "_STEPS=1"  # of accumulation
        if name.startswith("ACCELERATE_") and name not in KNOWN_VARIABLES and not is_off:
            instead = " (--compile compiles the model)" if "DYNAMO" in name else ""
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


def set_patience(timeout: datetime.timedelta) -> None:
    """How long the processes of a run wait for each other from now on."""
    if dist.is_initialized():
        # Torch before 2.15 knows it by its old name.
        getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)(timeout)


def keep_freed_memory(largest: int) -> None:
    """Have glibc keep the memory of freed tensors for the next step, where it has the say.

    Aligned to huge pages, it would give each back to the kernel, which zeroes the pages anew in
    every step: a sixth of a language model's time, a third of the image loader's.

    Args:
        largest: bytes of a tensor whose memory is kept; in all, twice as many. 2**25 is where
            glibc's own threshold ends, and the most that older versions accept.
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
    """Whether it is a CPU on which oneDNN knows no bf16 (on x86, one without AVX512).

    It then takes 6 (convolutions) to 150 times (products) as long as float32.
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
