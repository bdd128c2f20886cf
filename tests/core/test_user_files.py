"""Files that users bring: what is no regular file is refused at once, and JSON is read strictly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from groundscope.core.errors import ConfigError, DataError, StoreError
from groundscope.core.locks import FileLock, acquire
from groundscope.core.user_files import open_regular, read_bytes, read_json, read_text


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ConfigError, match=r"pipe\.json is not a regular file but a FIFO"):
        read_json(tmp_path / "pipe.json", error=ConfigError)


@pytest.mark.parametrize(("path", "kind"), [("/dev/zero", "character device"), ("/", "directory")])
def test_devices_and_directories_are_refused(path: str, kind: str) -> None:
    with pytest.raises(DataError, match=f"not a regular file but a {kind}"):
        read_bytes(path)


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with open_regular(tmp_path / "b") as file:
        assert file.read() == b"abc"


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


def test_a_file_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(DataError, match="more than the limit of 1000"):
        read_bytes(tmp_path / "large", limit=1000)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice"),
        (b'{"a": ', "invalid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
    ],
)
def test_errors_in_a_document_are_named(tmp_path: Path, data: bytes, problem: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(DataError, match=problem):
        read_json(tmp_path / "x.json")


def test_a_document_is_checked(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(tmp_path / "x.json") == {"a": "é"}
    with pytest.raises(DataError, match=r"x\.json: no list"):
        read_json(tmp_path / "x.json", check=lambda d: None if isinstance(d, list) else "no list")


def test_a_path_with_a_nul_is_one_sentence() -> None:
    with pytest.raises(DataError, match="not a file path"):
        open_regular("a\0b")


def hold(path: Path) -> FileLock:
    return acquire(path, required=False, refuse=lambda holder: f"held by {holder}", transient=True, error=StoreError)


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
def test_the_lock_of_a_store_is_no_link_and_no_fifo(tmp_path: Path, kind: str) -> None:
    lock, outside = tmp_path / ".worker-0.lock", tmp_path / "outside"
    if kind == "link":
        lock.symlink_to(outside)
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with pytest.raises(StoreError, match=r"symbolic link|FIFO or device|a folder"):
        hold(lock)
    assert not outside.exists()
    (lock.rmdir if kind == "folder" else lock.unlink)()
    first = hold(lock)
    with pytest.raises(StoreError, match="held by process"):
        hold(lock)
    first.release()
    assert not lock.exists()
