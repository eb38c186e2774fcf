"""Files are whole or absent, downloads are verified, archives stay in their folder."""

import errno
import hashlib
import http.server
import os
import random
import stat
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import files
from engine.cli import UserError

# The same in every process: pytest-xdist compares the test ids, which have the digests.
CONTENT = random.Random(0).randbytes(3_000_000)
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
GIT = f"git:{hashlib.sha1(b'blob 3000000' + bytes(1) + CONTENT).hexdigest()}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if self.path == "/broken" else CONTENT)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("digest", [MD5, GIT])
def test_a_download_is_whole(server: str, tmp_path: Path, digest: str) -> None:
    path = tmp_path / "new folder" / "file.zip"
    files.download(f"{server}/file", path, size=len(CONTENT), digest=digest)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("page", "size", "digest", "message"),
    [
        ("/file", len(CONTENT) - 1, MD5, "2,999,999 bytes expected, but there are 3,000,000"),
        ("/file", len(CONTENT) + 1, MD5, "3,000,001 bytes expected, but there are 3,000,000"),
        ("/file", len(CONTENT), "md5:" + "0" * 32, "not the file expected"),
        ("/file", len(CONTENT), "git:" + "0" * 40, "its git hash is"),
        ("/missing", len(CONTENT), MD5, "the server answered 404"),
        ("/broken", len(CONTENT), MD5, "there are 1,000"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    server: str, tmp_path: Path, page: str, size: int, digest: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        files.download(server + page, tmp_path / "file.zip", size=size, digest=digest)
    assert not list(tmp_path.iterdir())


def test_a_download_without_a_server(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused"):
        files.download("http://127.0.0.1:9/x", tmp_path / "x", size=1, digest=MD5)


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.whole_or_absent(path) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with files.whole_or_absent(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_makes_the_folder_and_names_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with files.writing(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    for below in (path / "a", path / "a" / "b"):
        with pytest.raises(UserError, match=f"^cannot write {below}: "), files.writing(below):
            pass
    with pytest.raises(UserError, match=f"^cannot write {path}: "), files.writing(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_file_system_may_be_unable_to_synchronise_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    with files.writing(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with files.whole_or_absent(tmp_path / "file") as temporary:
            temporary.write_text("half")
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with files.whole_or_absent(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_archive_is_unpacked_whole_and_stays_in_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as content:
        content.mkdir("set")
        content.writestr("set/train/a.txt", "a")
        content.writestr("set/../../escaped.txt", "kept within")
        content.writestr("/set/absolute.txt", "kept within")
    here = tmp_path / "below" / "here"
    files.unpack(archive, "set", here)
    found = {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()}
    assert found == {"train/a.txt", "escaped.txt", "set/absolute.txt"}
    assert {*tmp_path.rglob("*.txt")} == {*here.rglob("*.txt")}
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(UserError, match="not a whole zip"):
        files.unpack(archive, "set", tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive.zip", "below"]
