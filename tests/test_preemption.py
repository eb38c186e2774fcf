"""Runs that are stopped, killed or let down by their machine, and what is left of them."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import (
    KIT,
    PATIENCE,
    PROBE,
    STOPPED,
    Launched,
    Result,
    Running,
    children,
    error_line,
    launch,
    make_corpus,
    make_dataset,
    read,
    run,
    same_bits,
    scalars,
    wait_for,
)

TINY = ("--data", "set", "--emsize", 8, "--nhid", 8, "--batch_size", 4, "--bptt", 5)
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}


def test_a_signal_stops_and_the_same_command_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Large images: their worker processes get the signal too, as a scheduler sends it."""
    make_dataset(tmp_path / "set", "plain", train=12, side=160)
    flags: list[object] = ["set", "--image-size", 32, "-b", 8, "-j", 1, "--stem", "stock"]
    flags += ["--lr", 0.01, "--epochs", 2, "--seed", 1, "--checkpoint-every", 2]
    flags += ["--resume", "auto", "--output-dir"]
    undisturbed = run("resnet_main.py", *flags, "whole", cwd=tmp_path, env=BF16)
    assert undisturbed.code == 0, undisturbed
    assert "=> no checkpoint whole/checkpoint.pth: starting afresh" in undisturbed.out

    latest = tmp_path / "stopped" / "checkpoint.pth"
    process = Running("resnet_main.py", *flags, "stopped", cwd=tmp_path, env=BF16)
    process.wait_for(latest.exists)
    time.sleep(random.Random(0).uniform(0, 0.2))
    for pid in (*children(process.pid), process.pid):
        os.kill(pid, signal.SIGUSR1)
    result = process.finish()
    assert (result.code, result.err) == (STOPPED, ""), result
    place = re.search(
        r"=> epoch (\d), step (\d+): saved to stopped/checkpoint.pth$", result.out, re.M
    )
    assert place is not None
    assert "=> stopped by SIGUSR1, exit code 75: --resume auto" in result.out

    resumed = run("resnet_main.py", *flags, "stopped", cwd=tmp_path, env=BF16)
    assert (resumed.code, resumed.err) == (0, ""), resumed
    assert re.search(rf"=> loaded .*\(epoch {place[1]}, step {place[2]}\)", resumed.out)
    same_bits(tmp_path / "whole" / "checkpoint.pth", latest)


def test_four_processes_survive_their_launcher_and_end_with_a_lost_one(tmp_path: Path) -> None:
    """Stopped by a signal that kills the launcher, then one rank killed, then run to the end."""
    make_corpus(tmp_path / "set", train=4000)
    flags = ["lm_main.py", *TINY, "--data", tmp_path / "set", "--epochs", 2, "--resume", "auto"]
    flags += ["--checkpoint-every", 10]
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    whole.mkdir()
    disturbed.mkdir()
    assert launch("cpu4.yaml", *flags, cwd=whole, env=BF16).code == 0
    latest = disturbed / "model.checkpoint.pt"

    launched = Launched("cpu4.yaml", *flags, cwd=disturbed, env=BF16)
    wait_for(latest.exists)
    ranks = children(launched.pid)
    assert len(ranks) == 4
    launched.process.send_signal(signal.SIGUSR1)
    stopped = launched.finish()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
    assert "saved to model.checkpoint.pt\n=> stopped by SIGTERM, exit code 75" in stopped.out

    before = latest.stat().st_mtime_ns
    launched = Launched("cpu4.yaml", *flags, cwd=disturbed, env=BF16)
    wait_for(lambda: latest.stat().st_mtime_ns != before)
    started = time.monotonic()
    os.kill(children(launched.pid)[2], signal.SIGKILL)
    lost = launched.finish()
    assert time.monotonic() - started < 120  # and not gloo's two hours
    lines = [line for line in lost.err.splitlines() if "lm_main.py: error:" in line]
    assert len(lines) == 1, lost.err
    assert "another process of the run has gone" in lines[0]
    assert "Traceback" not in lost.err.split("lm_main.py: error:")[0]

    assert launch("cpu4.yaml", *flags, cwd=disturbed, env=BF16).code == 0
    same_bits(whole / "model.checkpoint.pt", latest)


def test_another_number_of_processes_goes_on_with_the_same_order(tmp_path: Path) -> None:
    """Without dropout, so that the losses depend on the order alone."""
    make_corpus(tmp_path / "set", train=4000)
    flags: list[object] = [*TINY, "--dropout", 0, "--lr", 2, "--epochs", 1]
    flags += ["--checkpoint-every", 7, "--resume", "auto"]
    assert run("lm_main.py", *flags, "--save", "whole.pt", cwd=tmp_path).code == 0
    process = Running("lm_main.py", *flags, cwd=tmp_path, env={})
    process.wait_for((tmp_path / "model.checkpoint.pt").exists)
    os.kill(process.pid, signal.SIGTERM)
    assert process.finish().code == STOPPED
    resumed = launch("cpu4.yaml", "lm_main.py", *flags, cwd=tmp_path)
    assert resumed.code == 0, resumed
    assert re.search(
        r"=> loaded checkpoint 'model\.checkpoint\.pt' \(epoch 0, step [1-9]", resumed.out
    )
    curves = [scalars(tmp_path / f"{name}.logs") for name in ("whole", "model")]
    for tag, points in curves[0].items():
        assert [value for _, value in curves[1][tag]] == pytest.approx(
            [v for _, v in points], rel=1e-4
        )


def test_a_run_stopped_in_validation_does_not_train_its_epoch_again(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set", train=400, valid=100_000)
    flags = [*TINY, "--epochs", 1, "--checkpoint-every", 20, "--resume", "auto"]
    assert run("lm_main.py", *flags, "--save", "whole.pt", cwd=tmp_path).code == 0
    process = Running("lm_main.py", *flags, cwd=tmp_path, env={})
    process.wait_for((tmp_path / "model.checkpoint.pt").exists)
    time.sleep(0.3)  # one more step comes before the validation
    os.kill(process.pid, signal.SIGTERM)
    stopped = process.finish()
    assert "=> epoch 0, step 21: saved to model.checkpoint.pt" in stopped.out
    resumed = run("lm_main.py", *flags, cwd=tmp_path)
    assert resumed.code == 0
    assert resumed.err == ""
    same_bits(*(tmp_path / f"{name}.checkpoint.pt" for name in ("whole", "model")))


WAITING = """
import sys, time
from engine import stop
from engine.launch import build_accelerator

def main():
    stop.SAME_REQUEST = 0.5
    preemption = stop.Preemption(build_accelerator())
    if sys.argv[1] == "deferred":
        with preemption.deferred():
            print("ready", flush=True)
            time.sleep(60)
    print("ready", flush=True)
    time.sleep(60)

stop.run_script(main)
"""


def test_a_signal_outside_training_stops_at_once_and_a_second_within_it(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)

    def signalled(how: str, pauses: list[float]) -> Result:
        process = Running(str(tmp_path / "waiting.py"), how, cwd=tmp_path, env={})
        process.wait_for(lambda: "ready" in process.out.read_text())
        for pause in pauses:
            time.sleep(pause)
            os.kill(process.pid, signal.SIGTERM)
        return process.finish()

    outside = signalled("not", [0])
    assert outside.code == STOPPED
    assert "=> stopped by SIGTERM, exit code 75: the same command begins again" in outside.out
    within = signalled("deferred", [0, 0.1, 0.8])
    assert within.code == 128 + signal.SIGTERM
    assert within.err == "=> a second signal: stopped at once\n"


LAST_MOMENT = """
import os, signal, sys
import lm_main
from engine.stop import run_script
from engine.run import Run

whole = Run.end_of_epoch

def end_of_epoch(run, *args):
    whole(run, *args)
    if run.epoch == 1 and os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGUSR1)

Run.end_of_epoch = end_of_epoch
run_script(lambda: lm_main.main(sys.argv[2:]))
"""


def test_a_signal_after_the_last_step_is_not_swallowed(tmp_path: Path) -> None:
    """It comes to one of four processes, after the last epoch has been saved."""
    make_corpus(tmp_path / "set")
    (tmp_path / "last.py").write_text(LAST_MOMENT)
    flags = (2, *TINY, "--epochs", 1)
    result = launch("cpu4.yaml", tmp_path / "last.py", *flags, cwd=tmp_path, env=PROBE)
    assert "=> epoch 1, step 0: saved to model.checkpoint.pt" in result.out, result
    assert "=> stopped by SIGUSR1, exit code 75" in result.out
    assert "End of training" not in result.out
    assert read(tmp_path / "model.checkpoint.pt")["is_best"] is True


def test_a_lost_connection_stops_torchrun_in_order_and_nohup_keeps_a_process(
    tmp_path: Path,
) -> None:
    make_corpus(tmp_path / "set", train=8000)
    script = [str(KIT / "lm_main.py"), *map(str, TINY), "--checkpoint-every", "5", "--epochs"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = ["nohup", *torchrun, "--nproc-per-node", "2", *script, "999", "--save", "two.pt"]
    with (tmp_path / "log").open("w") as log:
        two = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        wait_for((tmp_path / "two.checkpoint.pt").exists)
        two.send_signal(signal.SIGHUP)
        two.wait(PATIENCE)
    assert re.search(r"=> epoch \d+, step \d+: saved to two", (tmp_path / "log").read_text())

    shell = f"nohup {shlex.join([sys.executable, *script, '3'])} > log 2>&1 & echo $!; sleep 999"
    env = {**os.environ, **BF16}
    parent = subprocess.Popen(["bash", "-c", shell], cwd=tmp_path, env=env, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    wait_for((tmp_path / "model.checkpoint.pt").exists)
    for child in children(parent.pid):
        os.kill(child, signal.SIGHUP)
    parent.kill()
    parent.wait()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert "End of training" in (tmp_path / "log").read_text()
    assert read(tmp_path / "model.checkpoint.pt")["epoch"] == 3


@pytest.mark.parametrize("script", ["lm_main.py", "diff_eval.py"])
def test_ctrl_c_while_libraries_load_leaves_no_traceback(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(KIT / script)]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: "torch" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE)[0] == b"=> interrupted\n"
    assert process.returncode == 130


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for little."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_checkpoint(
    small_disk: Path, tmp_path: Path
) -> None:
    make_corpus(tmp_path / "set", train=8000)
    flags = [*TINY, "--save", "disk/model.pt", "--log-dir", "logs", "--resume", "auto"]
    flags += ["--checkpoint-every", 10]
    process = Running("lm_main.py", *flags, "--epochs", 3, cwd=tmp_path, env={})
    latest = small_disk / "model.checkpoint.pt"
    process.wait_for(latest.exists)
    (small_disk / "another").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    line = error_line(process.finish())
    assert "cannot write disk/model.checkpoint.pt (" in line
    assert "the one before it is kept" in line
    step = read(latest)["step"]
    (small_disk / "another").unlink()
    resumed = run("lm_main.py", *flags, "--epochs", 1, cwd=tmp_path)
    assert resumed.code == 0, resumed
    assert f"(epoch 0, step {step})" in resumed.out


def test_a_log_directory_that_fills_up_ends_the_run_in_one_line(
    small_disk: Path, tmp_path: Path
) -> None:
    make_corpus(tmp_path / "set")
    process = Running("lm_main.py", *TINY, "--log-dir", "disk", cwd=tmp_path, env={})
    process.wait_for(lambda: list(small_disk.glob("events*")))
    (small_disk / "another").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    line = error_line(process.finish())
    assert "cannot write to disk: No space left on device; choose another with --log-dir" in line
    assert read(tmp_path / "model.checkpoint.pt")["epoch"] >= 1


def damage(path: Path, rng: random.Random) -> None:
    """Cut a file, or change a byte of it."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        del content[place:]
    else:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumed(tmp_path: Path) -> None:
    make_corpus(tmp_path / "set")
    flags = [*TINY, "--resume", "auto"]
    assert run("lm_main.py", *flags, "--save", "whole.pt", "--epochs", 3, cwd=tmp_path).code == 0
    assert run("lm_main.py", *flags, "--epochs", 2, cwd=tmp_path).code == 0
    latest, previous = (tmp_path / f"model.checkpoint{x}.pt" for x in ("", ".previous"))
    damage(latest, random.Random(3))
    resumed = run("lm_main.py", *flags, "--epochs", 3, cwd=tmp_path)
    assert resumed.code == 0, resumed
    assert "=> checkpoint model.checkpoint.pt: damaged, cut, or no checkpoint" in resumed.out
    assert "=> loaded checkpoint 'model.checkpoint.previous.pt' (epoch 1, step 0)" in resumed.out
    same_bits(tmp_path / "whole.checkpoint.pt", latest)

    contents = []
    for path in (latest, previous):
        damage(path, random.Random(4))
        contents.append(path.read_bytes())
    line = error_line(run("lm_main.py", *flags, "--epochs", 4, cwd=tmp_path))
    assert "model.checkpoint.pt" in line and "model.checkpoint.previous.pt" in line
    assert "no whole checkpoint is left" in line
    assert contents == [path.read_bytes() for path in (latest, previous)]


@pytest.mark.parametrize("side", [64, 160])
def test_a_dataset_that_vanishes(side: int, tmp_path: Path) -> None:
    """Small images stay mapped to the end; large ones are missed in one line."""
    make_dataset(tmp_path / "set", "plain", train=30, side=side)
    flags = ["set", "--image-size", 32, "-b", 8, "-j", 1, "--stem", "stock", "--lr", 0.01]
    flags += ["--epochs", 2, "--checkpoint-every", 1]
    process = Running("resnet_main.py", *flags, cwd=tmp_path, env={})
    process.wait_for((tmp_path / "output" / "resnet18-cpu" / "checkpoint.pth").exists)
    (tmp_path / "set").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    result = process.finish()
    if side == 64:
        assert result.code == 0, result
    else:
        line = error_line(result)
        assert "the images of set have gone: restore them, and --resume auto goes on" in line
    assert read(tmp_path / "output" / "resnet18-cpu" / "checkpoint.pth")["step"] >= 0


@pytest.mark.parametrize("script", ["resnet_main.py", "lm_main.py"])
def test_an_evaluation_never_starts_afresh(script: str, tmp_path: Path) -> None:
    line = error_line(run(script, "--evaluate", "--resume", "auto", cwd=tmp_path))
    assert re.search(r"no checkpoint \S+checkpoint\.pth? to evaluate: name one", line)


def test_a_worker_ignores_signals_from_its_start_and_its_death_is_one_line(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", "plain", train=40, side=160)
    flags = ("set", "--image-size", 32, "--stem", "stock", "-b", 2, "-j", 1, "-p", 1)
    running = Running("tests/process_probe.py", "slow", *flags, cwd=tmp_path, env=PROBE)
    running.wait_for(lambda: children(running.pid))
    (worker,) = children(running.pid)
    for signum in (signal.SIGINT, signal.SIGUSR1):
        os.kill(worker, signum)
    running.wait_for(lambda: "Epoch: [0][" in running.out.read_text())
    os.kill(worker, signal.SIGKILL)
    since = time.monotonic()
    result = running.finish()
    assert time.monotonic() - since < 45  # and not the minute for which torch would wait
    assert result.code == 1, result
    (line,) = result.err.splitlines()
    assert "a worker process has gone (killed by signal: Killed): if memory was short" in line


def can_mount() -> bool:
    command = ["unshare", "-m", "true"]
    there = shutil.which(command[0])
    return bool(there) and not subprocess.run(command, capture_output=True).returncode


@pytest.mark.skipif(not can_mount(), reason="only root can give a process a /dev/shm of its own")
def test_too_little_shared_memory_is_one_line(tmp_path: Path) -> None:
    """Too little for a batch, for the second one, and for the workers' semaphores."""
    make_dataset(tmp_path / "set", "plain", val=20, side=160)
    flags = ("set", "-e", "--image-size", 224, "-a", "squeezenet1_1", "-j", 1)
    for size, batch, message in (
        ("2m", 20, "too little shared memory (No space left on device (28)): enlarge /dev/shm"),
        ("2m", 10, "too little shared memory (No space left on device (28)): enlarge /dev/shm"),
        ("4k", 1, "cannot start 1 worker processes (No space left on device): use fewer"),
    ):
        probe = ("shm", size, *flags, "-b", batch)
        line = error_line(run("tests/process_probe.py", *probe, cwd=tmp_path, env=PROBE))
        assert message in line
