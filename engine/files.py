"""Files that are whole or absent, verified downloads, and where a command may write."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import http.client
import os
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import psutil
from tqdm import tqdm

from engine.cli import UserError

DOWNLOAD_TIMEOUT = 30  # seconds without a byte


@contextlib.contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block ends.

    The block writes a file or a directory there. When it raises, `path` stays as it was. The next
    write removes what killed processes have left.

    - A directory that another process has put at `path` meanwhile stays.
    - A link is followed: its target is replaced.
    - A device or a pipe is given the content, from the system's temporary folder.
    - If the block makes a directory with a file of `path`'s name, that file goes to `path`, after
      the other files of the directory have gone beside it.
    """
    if _is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            yield temporary
            parts = list(temporary.iterdir()) if temporary.is_dir() else [temporary]
            if len(parts) > 1:
                raise UserError(f"{path} takes one file, and this needs {len(parts)}")
            with parts[0].open("rb") as content, path.open("wb") as stream:
                shutil.copyfileobj(content, stream)
        return
    path = Path(os.path.realpath(path))
    prefix = f".{path.name}.{socket.gethostname()}-"
    for stale in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        owner = stale.name.removeprefix(prefix).removesuffix(".tmp")
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            _remove(stale)
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if (temporary / path.name).is_file():
            path.unlink(missing_ok=True)  # the old file does not fit the new ones beside it
            for part in sorted(temporary.iterdir(), key=lambda part: part.name == path.name):
                _replace(part, path.with_name(part.name))
        elif not temporary.is_dir():
            _replace(temporary, path)
        elif not path.exists():
            temporary.rename(path)
        # Until the directory is synchronised, a power failure may undo the rename. Windows, folders
        # without `r` and some file systems (VirtualBox's shared folders) cannot synchronise it.
        with contextlib.suppress(OSError):
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    finally:
        _remove(temporary)


def _replace(temporary: Path, path: Path) -> None:
    with temporary.open("rb+") as written:
        os.fsync(written.fileno())
    temporary.replace(path)


def _is_stream(path: Path) -> bool:
    """Whether `path` is a device or a pipe, which a rename would replace."""
    if path.is_socket():
        raise UserError(f"{path} is a socket, and a file is wanted")
    return path.is_char_device() or path.is_block_device() or path.is_fifo()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`whole_or_absent` in a folder that is made, with a failing disk as a `UserError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def built_in(place: Path) -> Path:
    """Where built-in data lies: at `place`, or in the temporary folder when that is read-only.

    Raises:
        UserError: a folder of the user's is called `sample` as well.
    """
    if Path("sample").is_dir():
        raise UserError(
            "a folder sample is here, and `sample` means the built-in data: name ./sample, or "
            "rename that folder"
        )
    above = next(folder for folder in place.absolute().parents if folder.exists())
    if place.exists() or os.access(above, os.W_OK):
        return place
    owner = os.getuid() if hasattr(os, "getuid") else "mine"
    return Path(tempfile.gettempdir(), f"reproduction-kit-{owner}-{place.name}")


def check_writable(directory: Path, flag: str, name: str = "") -> None:
    """Make `directory` and write to it now rather than after hours of training.

    Args:
        name: of the file that will be put there, if it is one.

    Raises:
        UserError: when it cannot be made or written, or the name is too long; names the flag that
            chooses another.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # With the longest name that a temporary file can have.
        probe = directory / f".{name}.{socket.gethostname()}-{os.getpid():07d}.try"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise unwritable(directory / name, error, flag) from error


def unwritable(path: Path, error: OSError | UnicodeError, flag: str) -> UserError:
    """The line about `path`, which `flag` chooses."""
    reason = getattr(error, "strerror", None) or error
    return UserError(f"cannot write to {path}: {reason}; choose another with {flag}")


Named = tuple[str, Path]  # a path and the flag that chooses it


def refuse_clashes(
    files: Sequence[Named] = (), folders: Sequence[Named] = (), inputs: Sequence[Named] = ()
) -> None:
    """Compare the paths of a command: what it writes (files and folders) and what it reads.

    Raises:
        UserError: two outputs, or an output and an input, are one file, whatever their names; an
            output lies in another output that is a file, or in an input that is a folder.
    """
    outputs, others = [*files, *folders], [*files, *inputs]
    for number, (flag, path) in enumerate(outputs):
        for other_flag, other in [*outputs[number + 1 :], *inputs]:
            if same_place(path, other):
                raise UserError(f"{flag} {path} is the file of {other_flag} too: choose another")
        above = [_place(folder) for folder in Path(os.path.realpath(path)).parents]
        for other_flag, other in others:
            if _place(other) in above:
                raise UserError(f"{flag} {path} lies in {other_flag} {other}: choose another")


def check_outputs(
    files: Sequence[Named], folders: Sequence[Named] = (), inputs: Sequence[Named] = ()
) -> None:
    """Find out, before a command writes anything, whether it can write all that it will.

    Raises:
        UserError: what `refuse_clashes` refuses; a directory where a file is wanted; a name that
            is too long; a folder that cannot be made or written.
    """
    refuse_clashes(files, folders, inputs)
    for flag, path in files:
        try:
            if path.is_dir():
                raise UserError(f"{flag} {path}: is a directory, and a file is wanted")
            if _is_stream(path):
                continue
        except OSError as error:
            raise unwritable(path, error, flag) from error
        if path.is_symlink():
            path = Path(os.path.realpath(path))
        check_writable(path.parent, flag, path.name)
    for flag, path in folders:
        check_writable(path, flag)


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths are one, through links, mounts and other spellings."""
    return _place(one) == _place(other)


def _place(path: Path) -> object:
    real = Path(os.path.realpath(path))
    try:
        folder = real.parent.stat()
    except OSError:  # it is made later
        return real
    return folder.st_dev, folder.st_ino, real.name


def lock(path: Path, flag: str, patience: float) -> IO[str] | None:
    """Make the file at `path`, and lock it for as long as this process lives.

    A POSIX lock ends with the process, even when its workers live on, and works on network disks.
    Where there are no such locks (Windows, some file systems), nothing is locked.

    Args:
        patience: seconds to wait for the end of an earlier process.

    Returns:
        The file; keep it open.

    Raises:
        UserError: another process has locked it; names the flag that chooses another place.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        file = path.open("a+")
    except PermissionError:  # another user's, in a folder that both may write
        return None
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
        if time.monotonic() > deadline:
            # A POSIX lock ends when its process closes the file under any descriptor: this one must
            # not be open when the caller tries again.
            with file:
                file.seek(0)
                raise UserError(
                    f"another run ({file.read() or 'just started'}) writes to {path.parent}: wait "
                    f"for its end, or choose another place with {flag}"
                )
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def download(url: str, path: Path, *, size: int, digest: str) -> None:
    """Fetch `url` to `path` with a progress bar; `path` appears only when size and digest match.

    Args:
        digest: "md5:" and the md5 of the file, or "git:" and git's name of such a blob.

    Raises:
        UserError: no network, a server's refusal, a file of another size or content, a full disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_absent(path) as temporary:
            with (
                urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response,
                tqdm.wrapattr(
                    response, "read", total=size, desc=path.name, disable=None
                ) as content,
                temporary.open("wb") as output,
            ):
                shutil.copyfileobj(content, output)
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
        raise UserError(f"{name}: {size:,} bytes expected, but there are {found_size:,}")
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
    """Unpack a zip archive, which holds `folder`, as `destination`, whole or not at all.

    `ZipFile.extract` itself drops every "..", so no file leaves `destination`.

    Raises:
        UserError: not a zip file, a damaged one, or a full disk.
    """
    try:
        with zipfile.ZipFile(archive) as content, writing(destination) as temporary:
            for member in tqdm(content.infolist(), desc=f"unpacking {archive.name}", disable=None):
                member.filename = member.filename.removeprefix(f"{folder}/") or "./"
                content.extract(member, temporary)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: not a whole zip file ({error}); delete it") from error
