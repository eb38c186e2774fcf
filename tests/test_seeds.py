"""Every seed follows from what it is for, and is the same for ever; what repeats a run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.seeds import derive_seed, use_deterministic_kernels


def test_seeds_differ_by_each_part_and_never_change() -> None:
    parts = [(a, b, c) for a in ("order", "dropout") for b in range(3) for c in range(3)]
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert derive_seed("order", 1, 2) == 5219303784323788906  # or every run on record would change
    assert all(0 <= derive_seed(*p) < 2**63 for p in parts)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_repeatable_run_has_no_fused_attention_on_a_gpu(device: str) -> None:
    handler = SimpleNamespace(find_unused_parameters=None)
    accelerator: Any = SimpleNamespace(device=torch.device(device), ddp_handler=handler)
    cuda = torch.backends.cuda

    def fused() -> set[bool]:
        return {
            *(cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled())
        }

    try:
        use_deterministic_kernels(accelerator, True)
        assert handler.find_unused_parameters
        assert fused() == {device == "cpu"}
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    finally:
        use_deterministic_kernels(accelerator, False)
    assert fused() == {True}
    assert handler.find_unused_parameters is (device == "cpu")
    assert cuda.math_sdp_enabled()
