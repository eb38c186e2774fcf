"""The commands of a report: each is run once, its output kept, and what is done is remembered."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine import stop
from engine.cli import UserError
from engine.files import check_writable, writing

KIT = Path(__file__).resolve().parent.parent
# Variables of a launcher, which may have started this script. Its commands must not see them.
LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
EPOCH_ENDS = re.compile(r"^( \* Acc@1|\| end of epoch)", re.MULTILINE)


class Steps:
    """The commands that were run so far in `folder`, kept in its state.json.

    Args:
        settings: the flags that shape the report, by their names.
        identities: tells the files that some of the settings name from others.

    Raises:
        UserError: the folder cannot be written, or holds something else, or a report of other
            settings or files.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], identities: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self.failures: list[str] = []  # of this call
        self.path = folder / "state.json"
        check_writable(folder, "--output-dir")
        self.state: dict[str, Any] = {"settings": settings, "files": {}, "steps": {}}
        if not self.path.exists():
            if foreign := sorted(path.name for path in folder.iterdir()):
                raise UserError(
                    f"{folder} holds what this script did not write ({foreign[0]}): choose "
                    "another --output-dir"
                )
            self.keep()
        try:
            self.state = json.loads(self.path.read_text())
            before, known, _ = (self.state[key] for key in ("settings", "files", "steps"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged or another program's: move it away") from error
        for key, value in settings.items():
            if (found := before.get(key)) != value:
                words = found if isinstance(found, list) else [found]
                raise UserError(
                    f"{folder} holds a report made with --{key.replace('_', '-')} "
                    f"{shlex.join(map(str, words))}: repeat that, or choose another --output-dir"
                )
        for key, identity in identities.items():
            if known.setdefault(key, identity) != identity:
                raise UserError(
                    f"{folder} is of other files in --{key}: choose another --output-dir"
                )

    def keep(self) -> None:
        with writing(self.path) as temporary:
            temporary.write_text(json.dumps(self.state, indent=1))

    def run(self, commands: Mapping[str, list[str]], epochs: int = 0) -> list[str]:
        """Run the commands that are not done; returns the names of all that succeeded.

        Args:
            epochs: of each, if they are trainings. After two of them it is said how long this and
                the remaining trainings will take.
        """
        steps = self.state["steps"]
        for number, (name, command) in enumerate(commands.items()):
            shown, step = shlex.join(command), steps.setdefault(name, {"seconds": 0.0})
            print(f"=> {shown}")
            if (step.get("command"), step.get("code")) == (shown, 0):
                print("   done before")
                continue
            started = time.time()
            forecast = Forecast(len(commands) - number, epochs)
            step |= {"command": shown, "code": -1}
            try:
                step["code"] = execute(command, self.log(name), forecast)
            finally:  # a training that is stopped goes on later, and its time counts
                step["seconds"] += time.time() - started
                self.keep()
            failure = self.failure(name)
            print(f"   {failure or format(step['seconds'], '.0f') + ' s'}")
            if failure:
                self.failures.append(f"{name} {failure}")
        return [name for name in commands if not self.failure(name)]

    def failure(self, name: str) -> str:
        """How a command that was run has failed; empty if it has not."""
        code = self.state["steps"][name]["code"]
        return f"failed with exit code {code}: see {self.log(name)}" if code else ""

    def seconds(self, name: str) -> float:
        return float(self.state["steps"][name]["seconds"])

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def output(self, name: str, start: str) -> str:
        """What a command said last, from the line that begins with `start`, without its files."""
        text = "\n" + self.log(name).read_text("utf-8", "replace")
        return text[text.rindex(f"\n{start}") :].strip("\n").partition("\n=> ")[0]


class Forecast:
    """Says once, after a training's second epoch, how long it and those after it take.

    It is called with what the training has printed since its start, several times a second.
    """

    def __init__(self, trainings: int, epochs: int) -> None:
        self.trainings, self.epochs = trainings, epochs
        self.is_told, self.started = not epochs, time.time()
        self.ends: list[float] = []  # of its epochs, seconds after its start

    def __call__(self, said: str) -> None:
        if self.is_told or len(EPOCH_ENDS.findall(said)) <= len(self.ends):
            return
        self.ends.append(time.time() - self.started)
        if len(self.ends) == min(2, self.epochs):  # the first epoch has the start in it
            one = self.ends[0] + (self.ends[-1] - self.ends[0]) * (self.epochs - 1)
            minutes = self.trainings * one / 60
            print(f"   {self.trainings} trainings as fast as this one: {minutes:.0f} minutes")
            self.is_told = True


def execute(command: list[str], log: Path, watch: Callable[[str], None]) -> int:
    """Run a command of the kit, its output added to `log`; returns its exit code.

    Args:
        watch: is called with all that the command has said, several times a second.

    Raises:
        Stopped: when a signal came; the command has been stopped as well, in order.
    """
    program, *rest = command
    launcher = ["-m", "accelerate.commands.launch"] if program == "accelerate" else []
    argv = [sys.executable, *launcher, *rest[1 if launcher else 0 :]]
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    with log.open("a") as output:
        before = log.stat().st_size
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        try:
            # On a terminal: for how long it has run, and what it says.
            with tqdm(bar_format="   {elapsed} {desc}", leave=False, disable=None) as progress:
                while process.poll() is None:
                    said = log.read_bytes()[before:].decode("utf-8", "replace")
                    *_, last = ["", *said.splitlines()]
                    progress.set_description_str(last[:90])
                    watch(said)
                    time.sleep(0.2)
            return process.returncode
        except stop.Stopped:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            # A launcher ends at once, its training only after it has saved a checkpoint.
            with contextlib.suppress(ProcessLookupError):
                for _ in range(300):
                    os.killpg(process.pid, 0)
                    time.sleep(0.1)
            raise


def script(name: str, *flags: object) -> list[str]:
    return ["python", os.path.relpath(KIT / name), *map(str, flags)]


def launched(config: str, name: str, *flags: object) -> list[str]:
    # Any free port: several runs can share a machine.
    port = ["--main_process_port", "0"] if "4" in config else []
    yaml = os.path.relpath(KIT / "accelerate_configs" / f"{config}.yaml")
    return ["accelerate", "launch", "--config_file", yaml, *port, *script(name, *flags)[1:]]
