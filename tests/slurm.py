"""A SLURM of two nodes on this machine's loopback, for test_cluster.py."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kit import KIT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# `urgent` pre-empts jobs of `normal`, several of which share a node. A job that is queued again
# waits until its credential has expired.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:4
PartitionName=normal Nodes=n[1-2] Default=YES OverSubscribe=FORCE:4 PriorityTier=1
PartitionName=urgent Nodes=n[1-2] OverSubscribe=NO PriorityTier=2 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def wait_for(condition: Callable[[], object], what: Callable[[], str], seconds: float) -> None:
    """Until `condition()`; after `seconds` a `TimeoutError` with `what()`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what())
        time.sleep(0.2)


class Slurm:
    """The daemons, from entering the context to leaving it, and their jobs."""

    def __init__(self) -> None:
        # Not pytest's: the name of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.configuration = self.folder / "slurm.conf"
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.configuration),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        values = {
            "host": socket.gethostname().split(".")[0],
            "ports": _free_ports(3),
            "user": getpass.getuser(),
            "folder": self.folder,
        }
        self.configuration.write_text(CONFIGURATION.format(**values))
        for number in range(4):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        places = [
            f"--{what}-file={self.folder}/munge.{what}" for what in ("key", "log", "pid", "seed")
        ]
        munge_socket = self.folder / "munge.socket"
        self._daemon("munged", "--foreground", "--force", f"--socket={munge_socket}", *places)
        wait_for(munge_socket.exists, self._logs, 20)
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            (self.folder / node).mkdir()
            self._daemon("slurmd", "-D", "-N", node)
        idle = ("sinfo", "--noheader", "--partition=normal", "--states=idle", "--format=%D")
        wait_for(lambda: self._ask(*idle).strip() == "2", self._logs, 40)

    def _daemon(self, *command: str) -> None:
        log = self.folder / f"{len(self.daemons)}.{command[0]}.log"
        with log.open("wb") as output:
            # Killed tests leave no daemon behind.
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches the tests alone, which end them in order
            )
        self.daemons.append(process)

    def _stop(self) -> None:
        self._ask("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
        self._ask("scancel", "--user", getpass.getuser())
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not self._ask("squeue", "--noheader").strip(), str, 20)
        for process in reversed(self.daemons):
            process.terminate()
        for process in self.daemons:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        # What a job may have left, and nobody else's: the folder's name is in its environment.
        mark = str(self.configuration).encode()
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _logs(self) -> str:
        return "\n".join(
            f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}"
            for log in sorted(self.folder.glob("*.log"))
        )

    def _ask(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        ).stdout

    def run(self, *command: object) -> str:
        """The output of a SLURM program, which must succeed."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=KIT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, (command, done.stderr, self._logs())
        return done.stdout.strip()

    def submit(self, options: str, *arguments: object, log: Path) -> Job:
        """`sbatch` with the batch script, from the kit's folder, as a user types it."""
        command = ["sbatch", "--parsable", f"--output={log}", *options.split()]
        return Job(self, self.run(*command, "cluster/slurm.sbatch", *arguments), log)


class Job:
    def __init__(self, slurm: Slurm, number: str, log: Path) -> None:
        self.slurm, self.number, self.log = slurm, number, log

    def __getitem__(self, field: str) -> str:
        """A field of `scontrol show job`: JobState, Restarts, ExitCode, …"""
        text = self.slurm.run("scontrol", "show", "job", self.number)
        match = re.search(rf"\b{field}=(\S+)", text)
        assert match, text
        return match[1]

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def describe(self) -> str:
        shown = self.slurm.run("scontrol", "show", "job", self.number)
        return f"{shown}\n{self.output()}"

    def wait_for_output(self, text: str, seconds: float = 90) -> None:
        wait_for(lambda: text in self.output() or self["JobState"] in ENDED, self.describe, seconds)
        assert text in self.output(), self.describe()

    def wait_for_end(self, seconds: float = 120) -> str:
        """Returns the final state."""
        wait_for(lambda: self["JobState"] in ENDED, self.describe, seconds)
        return self["JobState"]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
