"""Never fewer processes than asked, and never silently."""

import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kit import (
    KIT,
    PATIENCE,
    PROBE,
    Result,
    Running,
    error_line,
    launch,
    make_corpus,
    make_dataset,
    run,
)

from engine.launch import find_interface, reason
from engine.stop import _mistake

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")


@NO_GPU
@pytest.mark.parametrize(("config", "hiding"), [("gpu1.yaml", "-1"), ("gpu4.yaml", "")])
def test_a_gpu_configuration_on_a_machine_without_gpus_is_refused(
    config: str, hiding: str, tmp_path: Path
) -> None:
    env = {"CUDA_VISIBLE_DEVICES": hiding}
    result = launch(config, "resnet_main.py", "sample", cwd=tmp_path, env=env)
    lines = [line for line in result.err.splitlines() if "resnet_main.py: error:" in line]
    assert len(lines) == 1, result.err
    assert "a GPU each were asked for, and this machine shows no GPU(s) (" in lines[0]
    assert "; or launch with --config_file accelerate_configs/cpu.yaml" in lines[0]
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


@pytest.mark.parametrize(
    ("launcher", "script"), [("accelerate", "lm_main.py"), ("torchrun", "resnet_main.py")]
)
def test_a_batch_that_processes_cannot_share_is_refused_once(
    launcher: str, script: str, tmp_path: Path
) -> None:
    flags = ["--batch-size", "6"]
    if launcher == "accelerate":
        err = launch("cpu4.yaml", script, *flags, cwd=tmp_path).err
    else:
        make_dataset(tmp_path / "set")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
        command += ["--standalone", str(KIT / script), "set", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        err = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
        ).stderr
    assert [line for line in err.splitlines() if f"{script}: error:" in line] == [
        f"{script}: error: --batch-size 6 is for all processes together and cannot be divided "
        "by 4: use a multiple"
    ]


TINY = ("--data", "sample", "--emsize", 8, "--nhid", 8, "--dry-run")


def test_a_precision_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for precision in ("BF16", "bfloat16", "fp8", "float32", ""):
        line = error_line(
            run("lm_main.py", cwd=tmp_path, env={"ACCELERATE_MIXED_PRECISION": precision})
        )
        assert f"ACCELERATE_MIXED_PRECISION is '{precision}', and not no, bf16 or fp16" in line
    on_cpu = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "yes"}
    line = error_line(run("lm_main.py", cwd=tmp_path, env=on_cpu))
    assert "fp16 needs a GPU: on a CPU launch with --mixed_precision bf16 or no" in line
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".std")]


def test_what_the_kit_does_not_understand_of_a_launcher_is_refused(tmp_path: Path) -> None:
    for name, value in {
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_USE_DEEPSPEED": "True",
        "ACCELERATE_USE_MEGATRON_LM": "1",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_OF_NEXT_YEAR": "on",
    }.items():
        line = error_line(run("lm_main.py", *TINY, cwd=tmp_path, env={name: value}))
        assert f"{name}={value} is for another kind of training" in line
        assert ("--compile" in line) == ("DYNAMO" in name)
    line = error_line(run("lm_main.py", cwd=tmp_path, env={"ACCELERATE_USE_CPU": "perhaps"}))
    assert "ACCELERATE_USE_CPU" in line
    line = error_line(run("lm_main.py", cwd=tmp_path, env={"SLURM_STEP_NUM_TASKS": "2"}))
    assert "srun has started 2 processes that do not know of each other" in line
    harmless = {
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_DYNAMO_BACKEND": "no",
        "ACCELERATE_DYNAMO_MODE": "max-autotune",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_DEBUG_MODE": "1",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "yes",
    }
    assert run("lm_main.py", *TINY, cwd=tmp_path, env=harmless).code == 0


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ("RANK=", "RANK is '', and not a whole number: `unset RANK`"),
        ("WORLD_SIZE=", "WORLD_SIZE is '', and not a whole number: `unset WORLD_SIZE`"),
        ("LOCAL_RANK=x", "LOCAL_RANK is 'x', and not a whole number: `unset LOCAL_RANK`"),
        ("PMI_SIZE=2.0", "PMI_SIZE is '2.0', and not a whole number: `unset PMI_SIZE`"),
        ("MASTER_PORT=a", "MASTER_PORT is 'a', and not a whole number: `unset MASTER_PORT`"),
        ("RANK=3", "RANK=3 without a WORLD_SIZE: `unset RANK`, if"),
        ("LOCAL_RANK=0", "LOCAL_RANK=0 without a WORLD_SIZE: `unset LOCAL_RANK`, if"),
        ("OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_RANK=1 without a WORLD_SIZE: `unset OMPI_"),
        ("WORLD_SIZE=4", "WORLD_SIZE=4 without a RANK: `unset WORLD_SIZE`, if"),
        ("WORLD_SIZE=4 MASTER_ADDR=::1", "WORLD_SIZE=4 without a RANK: `unset WORLD_SIZE`, if"),
        ("RANK=0 WORLD_SIZE=4", "RANK=0 WORLD_SIZE=4 without a MASTER_ADDR: `unset RANK WORLD_SI"),
        ("RANK=3 WORLD_SIZE=1", "RANK=3 WORLD_SIZE=1 is no place among the processes: `unset RA"),
    ],
)
def test_what_an_earlier_launch_has_left_over_is_named(
    variables: str, line: str, tmp_path: Path
) -> None:
    env = dict(pair.split("=") for pair in variables.split())
    began = time.monotonic()
    assert line in error_line(run("lm_main.py", *TINY, cwd=tmp_path, env=env))
    assert time.monotonic() - began < 20  # rank 3 waits 30 seconds for its turn to speak


def test_one_of_one_process_trains(tmp_path: Path) -> None:
    """As a platform that numbers its containers starts it."""
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert run("lm_main.py", *TINY, cwd=tmp_path, env=env).code == 0


@pytest.mark.parametrize("script", ["resnet_main.py", "lm_main.py", "lm_generate.py"])
def test_flags_are_written_out_and_the_old_launcher_has_one_of_its_own(
    script: str, tmp_path: Path
) -> None:
    """A batch script looks for the whole --resume."""
    line = error_line(run(script, "--res", "old.pt", cwd=tmp_path))
    assert "unrecognized arguments: --res" in line
    for flag in (["--local-rank=0"], ["--local_rank", "0"]):
        assert "launch with torchrun" in error_line(run(script, *flag, cwd=tmp_path))


def several(count: int, port: int, **env: str) -> list[dict[str, str]]:
    """The variables with which a launcher starts `count` processes."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [common | {"RANK": str(i), "LOCAL_RANK": str(i), **env} for i in range(count)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_processes_that_cannot_join_say_why(tmp_path: Path) -> None:
    first, _ = several(2, free_port(), GLOO_SOCKET_IFNAME="eth9")
    result = run("lm_main.py", *TINY, cwd=tmp_path, env={**first, "WORLD_SIZE": "1"})
    last = result.err.splitlines()[-1]
    assert result.code == 2
    assert "error: this cannot be launched: Unable to find address for: eth9 (MASTER_ADDR" in last
    assert "GLOO_SOCKET_IFNAME=eth9" in last
    with socket.socket() as occupied:
        occupied.bind(("0.0.0.0", 0))
        occupied.listen()
        port = occupied.getsockname()[1]
        result = run("lm_main.py", *TINY, cwd=tmp_path, env=several(2, port)[0])
    last = result.err.splitlines()[-1]
    assert result.code == 2
    assert "error: the 2 processes cannot join: The server socket has failed to listen" in last
    assert f"MASTER_PORT={port}" in last


def test_the_cause_is_found_in_what_torch_says() -> None:
    duplicate = "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 5d000"
    for text, expected in {
        "NCCL error in: /pytorch/ProcessGroupNCCL.cpp:94, invalid usage, NCCL version 2.27.5\n"
        f"ncclInvalidUsage: This usually reflects invalid usage.\nLast error:\n{duplicate}\n"
        "Exception raised from create at NCCLUtils.cpp (most recent call first):\nframe #0": (
            duplicate
        ),
        "NCCL error in: /pytorch/NCCLUtils.cpp:94, unhandled system error\nLast error:\n": (
            "NCCL error in: /pytorch/NCCLUtils.cpp:94, unhandled system error"
        ),
        "[enforce fail at /p/third_party/gloo/gloo/tcp/device.cc:84] ifa != nullptr. Unable to "
        "find address for: eth9": "Unable to find address for: eth9",
        "[/p/third_party/gloo/gloo/tcp/pair.cc:561] Connection closed by peer [10.0.0.1]:283. This "
        "is typically caused by a remote worker crashing.": (
            "Connection closed by peer [10.0.0.1]:283."
        ),
        "": "RuntimeError",
    }.items():
        assert reason(RuntimeError(text)) == expected


PATIENT = """
import datetime, os, sys, time
import lm_main
from engine import launch, run
from engine.stop import run_script

for module in launch, run:
    module.ANSWER_WITHIN = datetime.timedelta(seconds=4)
load_corpus = lm_main.load_corpus

def download(data):
    if os.environ["RANK"] == "0":
        time.sleep(8)
    return load_corpus(data)

lm_main.load_corpus = download
run_script(lm_main.main)
"""


def test_a_download_may_take_long_and_a_hung_process_in_training_is_known(tmp_path: Path) -> None:
    (tmp_path / "patient.py").write_text(PATIENT)
    make_corpus(tmp_path / "set", train=20_000)
    processes = []
    for i, env in enumerate(several(2, free_port())):
        (tmp_path / str(i)).mkdir()
        flags = ["--data", tmp_path / "set", *TINY[2:6], "--log-interval", 1, "--epochs", 99]
        processes.append(
            Running(str(tmp_path / "patient.py"), *flags, cwd=tmp_path / str(i), env=PROBE | env)
        )
    first, hung = processes
    first.wait_for(lambda: "| epoch   1 |     2/" in first.out.read_text())
    os.kill(hung.pid, signal.SIGSTOP)
    started = time.monotonic()
    result = first.finish()
    assert 3 < time.monotonic() - started < 20
    assert result.code == 1
    line = result.err.splitlines()[-1]
    # Gloo says one of several things.
    assert "patient.py: error: another process of the run has gone or hangs (" in line
    assert "Timed out waiting 4000ms" in line or "Application timeout" in line


def test_the_work_of_one_process_is_done_once(tmp_path: Path) -> None:
    first, second = several(2, free_port())
    for script in ("model_summary.py", "lm_generate.py", "export_graph.py"):
        assert run(script, "--no-such-flag", cwd=tmp_path, env=second) == Result(0, "", "")
        error_line(run(script, "--no-such-flag", cwd=tmp_path, env=first))
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    assert run("model_summary.py", cwd=tmp_path, env=mpi) == Result(0, "", "")


def test_memory_that_does_not_suffice_is_one_line(tmp_path: Path) -> None:
    huge = ("--data", "sample", "--emsize", 10**13, "--dry-run")
    line = error_line(run("lm_main.py", *huge, cwd=tmp_path))
    assert "the machine's memory is full: use a smaller --batch-size or model" in line


WINDOWS = """
import ctypes, enum, os, runpy, signal, sys

def no_program(name, *_):
    raise TypeError(f"LoadLibrary() argument 1 must be str, not {name}")

for name in list(sys.modules):
    if name.split(".")[0] in ("engine", "image_classification", "word_language_model", "lm_main"):
        del sys.modules[name]
kept = ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM")
signal.Signals = enum.IntEnum("Signals", {n: int(getattr(signal, n)) for n in kept})
for name in dir(signal):
    if name.startswith("SIG") and name not in (*kept, "SIG_DFL", "SIG_IGN"):
        delattr(signal, name)
for name in ("pthread_sigmask", "pthread_kill", "alarm", "setitimer", "sigwait", "siginterrupt"):
    delattr(signal, name)
for name in [n for n in dir(os) if n.startswith("EX_")] + ["getuid", "getpgid", "killpg", "setsid"]:
    delattr(os, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
ctypes.CDLL = no_program
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="imported" if "--import" in sys.argv else "__main__")
"""


def test_what_only_posix_has_is_done_without(tmp_path: Path) -> None:
    """A stub of Windows: it lacks most signals, fcntl, and what else such programs stumble over."""
    (tmp_path / "windows.py").write_text(WINDOWS)

    def there(script: str, *args: object) -> Result:
        return run(str(tmp_path / "windows.py"), KIT / script, *args, cwd=tmp_path, env=PROBE)

    trained = there("lm_main.py", *TINY[:-1], "--epochs", 1, "--bptt", 500)
    assert trained == Result(0, trained.out, "")
    assert (tmp_path / "model.checkpoint.pt").exists()
    assert there("lm_generate.py", "--words", 5).code == 0
    make_dataset(tmp_path / "set", "plain", side=32)
    flags = ("--image-size", 32, "--stem", "stock", "-b", 24, "--epochs", 1, "-j", 0)
    trained = there("resnet_main.py", "set", *flags)
    assert trained == Result(0, trained.out, "")
    assert (tmp_path / "output" / "resnet18-cpu" / "checkpoint.pth").exists()
    scripts = [path.name for path in KIT.glob("*.py")]
    assert len(scripts) >= 7
    for script in scripts:
        assert there(script, "--import") == Result(0, "", "")


@pytest.mark.parametrize("script", sorted(path.name for path in KIT.glob("*.py")))
def test_help_and_mistaken_flags_do_not_wait_for_torch(script: str, tmp_path: Path) -> None:
    for slow in ("torch", "torchvision", "accelerate", "numpy"):
        (tmp_path / f"{slow}.py").write_text("raise SystemExit('imported')")

    def answer(flag: str, **env: str) -> tuple[int, str, str]:
        command = [sys.executable, str(KIT / script), flag]
        env = {**os.environ, "PYTHONPATH": str(tmp_path), **env}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, err = answer("--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: {script} ")
    assert "examples:" in out
    assert answer("--help", RANK="3", WORLD_SIZE="4") == (0, "", "")
    code, out, err = answer("--no-such-flag")
    assert (code, out) == (2, "")
    assert err.startswith(f"{script}: error: ")
    assert err.endswith(f"(see {script} --help)\n")
    assert err.count("\n") == 1


def test_garbage_is_collected_except_while_a_command_imports() -> None:
    code = """
import gc
from engine.cli import ArgumentParser
from engine.stop import check_flags, run_script
check_flags(ArgumentParser("A command."))
print(gc.isenabled())
run_script(lambda: print(gc.isenabled()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=KIT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\nTrue\n", "")


@pytest.mark.parametrize(
    ("torchs", "line"),
    [
        ("allocate shared memory(shm) for file </t>: Success (0)", "memory (No space left on"),
        ("open shared memory object </t> in mode: Permission denied (13)", "memory (Permission"),
        ("open shared memory object </t> in mode: Too many open files (24)", "`ulimit -n`"),
        ("received 0 items of ancdata", "`ulimit -n`"),
        ("CUDA error: out of memory", "the GPU's memory is full: use a smaller --batch-size, or"),
        ("CUDA error: out of memory", "--gradient-accumulation-steps 2"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "memory is"),
        ("CUDA error: no kernel image is available for execution", "CUDA_VISIBLE_DEVICES=-1"),
    ],
)
def test_what_torch_says_of_a_full_machine_is_one_line_with_a_remedy(
    torchs: str, line: str
) -> None:
    said = _mistake(RuntimeError(torchs))
    assert said is not None
    assert line in said


def test_gloo_takes_the_interface_that_nccl_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the main process's address is IPv6 or unknown, and an address has an alias."""
    own = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0:1": "10.0.0.9", "eth0": "10.0.0.5"}
    inet = {name: [SimpleNamespace(family=socket.AF_INET, address=a)] for name, a in own.items()}
    states = {name: SimpleNamespace(isup=True) for name in own if ":" not in name}
    monkeypatch.setattr("engine.launch.psutil.net_if_addrs", lambda: inet)
    monkeypatch.setattr("engine.launch.psutil.net_if_stats", lambda: states)
    for main in ("fd00::1", "no-such-host.invalid", ""):
        monkeypatch.setenv("MASTER_ADDR", main)
        for asked, expected in (
            *(("", "eth0"), ("eth", "eth0"), ("=eth0", "eth0")),
            *(("docker,eth", "eth0"), ("docker", "docker0"), ("^eth", "docker0")),
        ):
            monkeypatch.setenv("NCCL_SOCKET_IFNAME", asked)
            assert find_interface() == expected, (main, asked)


@pytest.mark.parametrize("variable", ["", "OMP_WAIT_POLICY=ACTIVE", "GOMP_SPINCOUNT=7"])
def test_waiting_threads_spin_briefly_unless_told_otherwise(variable: str, tmp_path: Path) -> None:
    """Set before torch, whose libgomp reads it once; a stub of torch tells."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    stub = f"import os\nraise SystemExit(str([os.environ.get(name) for name in {names}]))"
    (tmp_path / "torch.py").write_text(stub)
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= dict([variable.split("=")] if variable else []) | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(KIT / "resnet_main.py")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    expected = {"": [None, "3000"], names[0]: ["ACTIVE", None], names[1]: [None, "7"]}
    assert done.stderr == f"{expected[variable.split('=')[0]]}\n"


CALLED = """
import os, signal, sys
import lm_main
from engine import stop

def handlers():
    return [signal.getsignal(signum) for signum in stop.STOP_SIGNALS]

def attempt(*flags):
    try:
        lm_main.main([*sys.argv[1:], *flags])
        how = "returned"
    except BaseException as error:
        how = type(error).__name__
    print(how, handlers() == before, flush=True)

def stopped(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*args)

evaluate = lm_main.evaluate
signal.signal(signal.SIGTERM, lambda *_: None)
before = handlers()
attempt()
attempt("--no-such-flag")
lm_main.evaluate = stopped
attempt()
lm_main.evaluate = evaluate
stop.run_script(attempt)
"""


def test_a_main_that_is_called_leaves_no_signal_handlers_behind(tmp_path: Path) -> None:
    (tmp_path / "called.py").write_text(CALLED)
    result = run(str(tmp_path / "called.py"), *TINY, cwd=tmp_path, env=PROBE)
    said = [line for line in result.out.splitlines() if line.endswith(("True", "False"))]
    assert said == ["returned True", "UserError True", "Stopped True", "returned False"], result
