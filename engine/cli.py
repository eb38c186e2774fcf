"""What a command takes and prints: flags, settings that a resumed run keeps, standard output."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Number = TypeVar("Number", int, float)


# The end of a training's `--help`.
LAUNCHING = """\
A YAML chooses device, number of processes and precision:
    accelerate launch --config_file accelerate_configs/YAML SCRIPT FLAGS
    cpu.yaml         one process on the CPU, float32
    cpu_bf16.yaml    one process on the CPU, bf16
    cpu4.yaml        four processes on the CPU, float32
    gpu1.yaml        one GPU, bf16
    gpu4.yaml        four GPUs of one machine, bf16
    gpu4_nodes.yaml  two nodes of four GPUs, bf16 (the command is in the file)
Without a launcher: one process, on a GPU if there is one, float32.
"""


class UserError(Exception):
    """A mistake of the user's: one line that names the thing, the place and the remedy."""


class _HelpWithDefaults(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, "", argparse.SUPPRESS) or isinstance(default, bool):
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{action.help} (default: {shown})"


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors of one line, and with settings: flags without a default at first.

    Args:
        doc: a docstring, whose first line says what the command does, and whose first indented
            lines are examples.
        settings: destinations of flags that `parse_args` leaves at None when they are not given,
            for `settle` to fill in.
        note: more for the end of `--help`.
    """

    def __init__(self, doc: str, settings: Collection[str] = (), note: str = "") -> None:
        examples = re.search(r"^(?:    .*\n)+", doc, re.MULTILINE)
        super().__init__(
            description=doc.splitlines()[0],
            epilog=(f"examples:\n{examples[0]}\n" if examples else "") + note,
            formatter_class=_HelpWithDefaults,
            allow_abbrev=False,  # batch scripts look for whole flags
        )
        self.settings = settings
        old = ("--local-rank", "--local_rank")
        self.add_argument(*old, type=_of_the_old_launcher, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        return self.parse_args(argv, argparse.Namespace(**dict.fromkeys(self.settings)))

    def settle(
        self,
        args: argparse.Namespace,
        found: Mapping[str, Any],
        path: Path | None,
        say: Callable[[str], None],
        fixed: Collection[str] = (),
        remedy: str = "",
    ) -> list[str]:
        """Give every setting its value: the flag's, else the checkpoint's, else the default.

        Args:
            found: the settings that the checkpoint at `path` holds; None is no value.
            say: prints a line, for a flag that differs from the checkpoint.
            fixed: settings that no flag can change.
            remedy: what to do about a flag that would.

        Returns:
            The flags that differ from the checkpoint.

        Raises:
            UserError: a flag that differs from a `fixed` setting, or a value in the checkpoint that
                its flag would not take.
        """
        actions = {action.dest: action for action in self._actions}
        changed = []
        for name in self.settings:
            asked, value = getattr(args, name), found.get(name)
            if value is None:
                value = self.get_default(name) if asked is None else asked
            elif asked is not None and asked != value:
                flag = f"--{name.replace('_', '-')}"
                if name in fixed:
                    raise UserError(f"{path} has {name} {value}, not {asked}: {remedy}")
                say(f"=> {path} was trained with {flag} {value}, this run has {asked}")
                changed.append(f"{flag} {asked}")
                value = asked
            else:
                try:
                    value = (
                        self._get_value(actions[name], str(value)) if actions[name].type else value
                    )
                    self._check_value(actions[name], value)
                except argparse.ArgumentError as error:
                    raise UserError(f"checkpoint {path}: {name} is {value!r}: damaged") from error
            setattr(args, name, value)
        return changed


def _of_the_old_launcher(_: str) -> NoReturn:
    raise argparse.ArgumentTypeError(
        "is what `python -m torch.distributed.launch` adds: launch with torchrun"
    )


def nonempty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty: a variable that is not set?")
    return text


def pathname(text: str) -> Path:
    return Path(nonempty(text))


def filename(text: str) -> Path:
    if pathname(text).name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text} is a directory, and a file is wanted")
    return Path(text)


def number(kind: type[Number], text: str) -> Number:
    try:
        return kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}") from error


def positive_int(text: str) -> int:
    return _at_least(1, text)


def non_negative_int(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = number(int, text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must fit 64 bits, which {value} does not")
    return value


def non_negative_float(text: str) -> float:
    value = number(float, text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, not {text}")
    return value


def fraction(text: str) -> float:
    value = number(float, text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 1, not {text}")
    return value


class _Stream(io.TextIOWrapper):
    """A standard stream on which a print always succeeds; what cannot be written is lost.

    Lines are written at once, for whoever watches a log. Characters that the encoding lacks are
    escaped.
    """

    is_product = False  # within `product`
    is_lost = False  # whether a write has failed, and its descriptor was redirected
    refuge: int | None = None  # where to redirect it, instead of to nowhere

    def __init__(self, replaced: Any) -> None:
        # With PYTHONUNBUFFERED its own is raw, and would not keep what could not be written.
        buffer = io.BufferedWriter(getattr(replaced.buffer, "raw", replaced.buffer))
        super().__init__(buffer, replaced.encoding, "backslashreplace", line_buffering=True)
        self.replaced = replaced  # its deletion would close the descriptor

    def write(self, text: str) -> int:
        self._attempt(super().write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(super().flush)

    def _attempt(self, method: Callable[..., Any], *args: str) -> None:
        try:
            method(*args)
        except BlockingIOError:  # a full pipe that another process has set to non-blocking
            os.set_blocking(self.fileno(), True)
            self.flush()
        except OSError as error:
            number, refuge, self.refuge = self.fileno(), self.refuge, None
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(refuge or nowhere.fileno(), number)
            self.flush()  # what the buffer still has
            if self.is_product:
                raise
            # `head` has seen enough, and whoever closes a stream wants to see nothing.
            is_wanted = error.errno in (errno.EPIPE, errno.EBADF)
            if number == 1 and not (self.is_lost or refuge or is_wanted):
                name = Path(sys.argv[0]).name
                print(f"{name}: what is printed gets lost ({error.strerror})", file=sys.stderr)
            self.is_lost = True


def make_unfailing() -> None:
    """Let no print on `sys.stdout` and `sys.stderr` fail; a notebook's own streams stay."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Closed. The next file opened, a checkpoint perhaps, would get this number, and with it
            # all that libraries print. So it is taken, by a file that cannot be written to.
            os.open(os.devnull, os.O_RDONLY)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(number, "w", closefd=False)  # noqa: SIM115
        if type(stream) is io.TextIOWrapper:
            setattr(sys, name, _Stream(stream))


def fall_back_to_stderr() -> None:
    """From now on print to stderr what stdout's reader does not take: Ctrl-C also ends a `tee`."""
    if isinstance(sys.stdout, _Stream):
        sys.stdout.refuge = 2
        if sys.stdout.is_lost:
            os.dup2(2, sys.stdout.fileno())


@contextlib.contextmanager
def product() -> Iterator[None]:
    """Within it, what is printed to stdout is the command's result, and must not get lost.

    A reader that has seen enough ends the block.

    Raises:
        UserError: the result cannot be written.
    """
    stream: Any = sys.stdout
    stream.is_product = True
    try:
        yield
        stream.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        raise UserError(f"cannot write to standard output: {error.strerror}") from error
    finally:
        stream.is_product = False


def listed(parts: Sequence[str]) -> str:
    """The parts as a sentence lists them: a, b and c."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
