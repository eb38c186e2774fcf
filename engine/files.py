"""Files that are whole or absent: atomic writes, verified downloads, safe unpacking."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import socket
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from engine.cli import UserError

DOWNLOAD_TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20


@contextlib.contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block ends.

    The block writes a file or a directory there. When it raises, the temporary is removed and
    `path` stays as it was. Temporaries of killed processes are removed by the next write. A
    directory that another process has put at `path` meanwhile stays.
    """
    prefix = f".{path.name}.{socket.gethostname()}-"
    for stale in path.parent.glob(f"{prefix}*.tmp"):
        owner = stale.name.removeprefix(prefix).removesuffix(".tmp")
        if owner.isdigit() and not _is_running(int(owner)):
            _remove(stale)
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            if not path.exists():
                temporary.rename(path)
        else:
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        # Until the directory is synchronised, a power failure may undo the rename.
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`whole_or_absent` in a folder that is made, with a failing disk as a `UserError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_writable(directory: Path, flag: str) -> None:
    """Make `directory` and write to it now rather than after hours of training.

    Raises:
        UserError: when it cannot be made or written; names the flag that chooses another.
    """
    probe = directory / f".write-test-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error.strerror}; choose another with {flag}"
        ) from error


def download(url: str, path: Path, *, size: int, digest: str) -> None:
    """Fetch `url` to `path` with a progress bar; `path` appears only when size and digest match.

    Args:
        digest: "md5:" and the md5 of the file, or "git:" and git's name of such a blob.

    Raises:
        UserError: no network, a server's refusal, a file of another size or content, a full disk.
    """
    received = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            whole_or_absent(path) as temporary,
            urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response,
            tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as progress,
        ):
            with temporary.open("wb") as output:
                # One byte more than expected is enough to know that the file is another one.
                while chunk := response.read(min(CHUNK, size + 1 - received)):
                    received += output.write(chunk)
                    progress.update(len(chunk))
            check_file(temporary, url, size=size, digest=digest)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {getattr(error, 'reason', f'broke off ({error!r})')}") from error
    except OSError as error:
        raise UserError(f"{url} to {path}: {error.strerror or error}") from error


def check_file(path: Path, name: str, *, size: int, digest: str) -> None:
    """Raise `UserError` unless the file at `path`, called `name`, has this size and digest."""
    found_size = path.stat().st_size
    if found_size != size:
        there = f"more than {size}" if found_size > size else str(found_size)
        raise UserError(f"{name}: {size:,} bytes expected, but there are {there}")
    kind, _, wanted = digest.partition(":")
    blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    hasher = blob if kind == "git" else hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hasher).hexdigest()
    if found != wanted:
        raise UserError(
            f"{name}: its {kind} hash is {found} instead of {wanted}: not the file expected"
        )


def unpack(archive: Path, folder: str, destination: Path) -> None:
    """Unpack `folder` of a zip archive as `destination`, whole or not at all.

    Raises:
        UserError: not a zip file, a damaged one, one without that folder, one with a path that
            leaves it, or a full disk.
    """
    try:
        with zipfile.ZipFile(archive) as content, writing(destination) as temporary:
            members = [m for m in content.infolist() if m.filename.startswith(f"{folder}/")]
            if not members:
                raise UserError(f"{archive}: holds no folder {folder}")
            for member in tqdm(members, desc=f"unpacking {archive.name}", disable=None):
                if ".." in Path(member.filename).parts:
                    raise UserError(f"{archive}: holds a path outside itself: {member.filename}")
                member.filename = member.filename.removeprefix(f"{folder}/") or "./"
                content.extract(member, temporary)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: not a whole zip file ({error}); delete it") from error
