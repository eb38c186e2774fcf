"""Launches without a scheduler: cluster/container.sh, and torchrun on two nodes."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from kit import KIT, PATIENCE, make_corpus, run, same_bits
from slurm import wait_for
from test_lm_main import END

SMALL = ("--emsize", "8", "--nhid", "8", "--batch_size", "4", "--bptt", "5")


def start(command: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def container(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """container.sh as a container starts it: with nothing but its variables, in some folder."""
    places = {"CODE": str(KIT), "DATA": str(folder / "set"), "OUTPUT": str(folder / "output")}
    (folder / "home").mkdir(exist_ok=True)
    places["HOME"] = str(folder / "home")
    command = ["bash", str(KIT / "cluster" / "container.sh"), *arguments]
    return start(command, folder, **{**places, **environment})


def test_a_container_is_stopped_started_again_and_ends_with_the_bits_of_one_run(
    tmp_path: Path,
) -> None:
    make_corpus(tmp_path / "set")
    flags = (*SMALL, "--epochs", "16")
    log = tmp_path / "output" / "logs" / "lm_main.log"
    stopped = container(tmp_path, "lm_main.py", *flags)
    wait_for(lambda: log.exists() and "end of epoch   2" in log.read_text(), str, PATIENCE)
    stopped.send_signal(signal.SIGTERM)
    out = stopped.communicate(timeout=PATIENCE)[0]
    places = re.findall(r"=> (epoch \d+, step \d+): saved to", out)
    assert len(places) == 1, out
    assert stopped.returncode == 75
    ended = container(tmp_path, "lm_main.py", *flags)
    out = ended.communicate(timeout=PATIENCE)[0]
    assert ended.returncode == 0, out
    assert f"({places[0]})" in out
    assert len(END.findall(log.read_text())) == 1

    assert run("lm_main.py", "--data", "set", *flags, cwd=tmp_path).code == 0
    same_bits(tmp_path / "model.checkpoint.pt", tmp_path / "output" / "model.checkpoint.pt")
    assert list((tmp_path / "home").iterdir()) == []

    refused = container(tmp_path, "lm_main.py", *flags, "--model", "GRU")
    (line,) = refused.communicate(timeout=PATIENCE)[0].splitlines()[-1:]
    assert re.match(r"lm_main.py: error: \S+model.checkpoint.pt has model LSTM, not GRU: ", line)
    assert refused.returncode == 2
    assert log.read_text().endswith(f"{line}\n")
    save = tmp_path / "output" / "gru.pt"
    another = container(tmp_path, "lm_main.py", *flags, "--model", "GRU", "--save", str(save))
    out = another.communicate(timeout=PATIENCE)[0]
    assert another.returncode == 0, out
    assert list(save.with_suffix(".logs").glob("events*"))


def test_a_container_uses_every_gpu_that_it_sees(tmp_path: Path) -> None:
    """Seen by a python that counts three, where the kit finds none."""
    counting = tmp_path / "bin" / "python"
    counting.parent.mkdir()
    counting.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 3 || exec {sys.executable} "$@"\n')
    counting.chmod(0o755)
    path = f"{counting.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = container(tmp_path, "resnet_main.py", DATA="sample", PATH=path)
    out = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode != 0
    assert out.count("resnet_main.py: error: 3 process(es) with a GPU each were asked for") == 1


@pytest.mark.parametrize("arguments", [(), ("train.py",)])
def test_a_container_of_another_script_is_refused(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    process = container(tmp_path, *arguments)
    assert process.communicate(timeout=PATIENCE)[0].splitlines() == [
        "container.sh: error: give resnet_main.py or lm_main.py, and its flags"
    ]
    assert process.returncode == 2
    assert not (tmp_path / "output").exists()


def test_two_nodes_of_torchrun_are_one_training(tmp_path: Path) -> None:
    """The README's commands, both nodes here."""
    make_corpus(tmp_path / "set")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--data", "set", *SMALL, "--epochs", "3", "--resume", "auto"]
    launch = ["torchrun", "--nnodes", "2", "--nproc-per-node", "2"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port), "--node-rank"]
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    first, second = (
        start([*launch, rank, str(KIT / "lm_main.py"), *flags], tmp_path, **environment)
        for rank in ("0", "1")
    )
    out, other = (process.communicate(timeout=PATIENCE)[0] for process in (first, second))
    assert first.returncode == second.returncode == 0, (out, other)
    assert "2 nodes, 4 processes on CPU (1 threads each), bf16" in out
    assert len(END.findall(out)) == 1
    assert "epoch" not in other, other
