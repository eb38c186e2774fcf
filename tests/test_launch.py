"""Never fewer processes than asked, and never silently."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit import KIT, PATIENCE, launch, make_dataset

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")


@NO_GPU
@pytest.mark.parametrize("config", ["gpu1.yaml", "gpu4.yaml"])
def test_a_gpu_configuration_on_a_machine_without_gpus_is_refused(
    config: str, tmp_path: Path
) -> None:
    result = launch(config, "resnet_main.py", "sample", cwd=tmp_path)
    lines = [line for line in result.err.splitlines() if "resnet_main.py: error:" in line]
    assert len(lines) == 1, result.err
    assert "this machine shows no GPU(s): launch with --config_file" in lines[0]
    assert result.code != 0
    assert not list(tmp_path.iterdir())


def test_a_launcher_that_starts_one_of_four_processes_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "multi_cpu.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\n"
        "num_machines: 1\nnum_processes: 4\nmixed_precision: 'no'\n"
    )
    result = launch(str(config), "resnet_main.py", "sample", cwd=tmp_path)
    assert "asked for several CPU processes and started one" in result.err


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="knows the flags of x86 CPUs"
)
@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_bf16.yaml"])
def test_every_cpu_trains_in_both_precisions_and_hears_of_the_faster(
    config: str, tmp_path: Path
) -> None:
    """An LSTM on two threads, which is oneDNN's, and failed where that does not know bf16."""
    flags = ("--data", "sample", "--emsize", 8, "--nhid", 8, "--dry-run")
    result = launch(config, "lm_main.py", *flags, cwd=tmp_path, env={"OMP_NUM_THREADS": "2"})
    assert result.code == 0, result
    known = set(Path("/proc/cpuinfo").read_text().split())
    native = bool(known & {"avx512_bf16", "amx_bf16"})
    advice = "--config_file accelerate_configs/cpu_bf16.yaml" in result.out
    assert advice == (native and config == "cpu.yaml")
    warning = "=> this CPU has no instructions for bf16" in result.out
    assert warning == (not known & {"avx512bw", "avx_ne_convert"} and config == "cpu_bf16.yaml")


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_a_batch_that_processes_cannot_share_is_refused_once(launcher: str, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set")
    flags = [str(root), "-b", "6"]
    if launcher == "accelerate":
        err = launch("cpu4.yaml", "resnet_main.py", *flags, cwd=tmp_path).err
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
        command += ["--standalone", str(KIT / "resnet_main.py"), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        err = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
        ).stderr
    lines = [line for line in err.splitlines() if "resnet_main.py: error:" in line]
    assert lines == [
        "resnet_main.py: error: --batch-size 6 is for all processes together and cannot be "
        "divided by 4: use a multiple"
    ]
