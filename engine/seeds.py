"""Where random numbers come from: every seed follows from what it is for, nothing is carried."""

from __future__ import annotations

import hashlib
import os

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from what it belongs to, e.g. ("dropout", seed, epoch, step, rank).

    Hashing keeps the seeds of neighbouring steps and of different purposes unrelated, which sums
    would not.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_generators(device: torch.device, *parts: int | str) -> None:
    """Seed torch's generators by `derive_seed`; torch.manual_seed would take longer."""
    seed = derive_seed(*parts)
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


def agree_on_seed(accelerator: Accelerator, seed: int | None) -> int:
    """`seed`, or one drawn by the main process for all when it is None."""
    if seed is not None:
        return seed
    drawn = [int.from_bytes(os.urandom(4), "big")]
    broadcast_object_list(drawn)
    accelerator.print(f"=> no --seed given: drew --seed {drawn[0]}")
    return drawn[0]


def use_deterministic_kernels(accelerator: Accelerator, deterministic: bool) -> None:
    """Choose a GPU's kernels as the original does: repeatable with a seed, else the fastest.

    To be called before `Accelerator.prepare`.
    """
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    is_cpu = accelerator.device.type == "cpu"
    # After a process's first step DistributedDataParallel re-orders its buckets, and its sums with
    # them: a resumed run would end with other bits. Looking for unused parameters prevents it.
    accelerator.ddp_handler.find_unused_parameters = is_cpu or deterministic
    if accelerator.device.type == "cuda":
        # On a GPU the fused attention kernels' backward passes sum the blocks of a long sequence in
        # no fixed order.
        torch.backends.cuda.enable_flash_sdp(not deterministic)
        torch.backends.cuda.enable_mem_efficient_sdp(not deterministic)
        torch.backends.cuda.enable_cudnn_sdp(not deterministic)
