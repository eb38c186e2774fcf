"""Standard output and standard error: what cannot be printed neither ends a run nor changes it."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.cli import UserError


class _Stream(io.RawIOBase):
    """The bytes of a standard stream. Those that cannot be written are lost, and nothing raised.

    Args:
        raw: takes them; None for a stream that was closed before the start.
        replaced: Python's own stream, which would close `raw` when it is deleted.
    """

    is_product = False  # within `product`
    falls_back = False  # to stderr, after `fall_back_to_stderr`

    def __init__(self, raw: Any, replaced: io.TextIOWrapper | None = None) -> None:
        self.raw, self.replaced, self.reported = raw, replaced, False

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.raw is not None and bool(self.raw.isatty())

    def fileno(self) -> int:
        if self.raw is None:
            raise io.UnsupportedOperation("a closed stream has no number")
        return int(self.raw.fileno())

    def write(self, data: Any) -> int:
        try:
            self._write_all(memoryview(data))
        except (OSError, ValueError) as error:  # ValueError: somebody has closed the file
            if self.is_product:
                raise
            if self.raw is not None:
                self._lose(data, error)
        return len(data)

    def _write_all(self, rest: memoryview) -> None:
        if self.raw is None:
            raise ValueError("it is closed")
        while rest:
            written = self.raw.write(rest)
            if written is None:  # a pipe that somebody has set to non-blocking, and that is full
                select.select([], [self.raw], [])
            rest = rest[written or 0 :]

    def _lose(self, data: Any, error: OSError | ValueError) -> None:
        rescue = getattr(sys.stderr, "buffer", None)
        if rescue is None or rescue is self:
            return
        if self.falls_back:
            rescue.write(data)
        elif not (self.reported or isinstance(error, BrokenPipeError)):  # `head` has seen enough
            self.reported = True
            reason = getattr(error, "strerror", None) or error
            name = Path(sys.argv[0]).name
            print(f"{name}: what is printed gets lost ({reason})", file=sys.stderr)


def make_unfailing() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams on which a print always succeeds.

    They write line by line: a log file is read while it grows, and its lines keep their order
    beside those of stderr. Characters that the encoding lacks are escaped. Streams that are not
    Python's own, a notebook's, stay.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one. Otherwise a checkpoint could get it, and
            # with it all that libraries write to a standard stream.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream, raw, encoding = getattr(sys, name), None, "utf-8"
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            raw, encoding = getattr(stream.buffer, "raw", stream.buffer), stream.encoding
        elif stream is not None:
            continue
        unfailing: Any = _Stream(raw, stream)
        text = io.TextIOWrapper(unfailing, encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, text)


def fall_back_to_stderr() -> None:
    """From now on print to stderr what stdout's reader does not take: Ctrl-C also ends a `tee`."""
    _Stream.falls_back = True


@contextlib.contextmanager
def product() -> Iterator[None]:
    """Within it, what is printed to stdout is what the command is for.

    A reader that has seen enough ends the block.

    Raises:
        UserError: when it cannot be written.
    """
    stream = getattr(sys.stdout, "buffer", None)
    if not isinstance(stream, _Stream):
        yield
        return
    stream.is_product = True
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to standard output: {reason}") from error
    finally:
        stream.is_product = False
