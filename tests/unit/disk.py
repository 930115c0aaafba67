"""A disk that fails at its n-th change: the process is killed there, or from there on nothing fits any more.

    disk = Disk(monkeypatch)
    with disk.killed_at(7): ...     # that change and all after it are refused, also those of `finally` and `except`
    with disk.full_from(7): ...     # of the changes that need room; files can be removed and shortened
    disk.count                      # how many there were; with None none fails

    before = files_in(directory)    # {"outputs.jsonl": b"...", "predictions": None}
    put_back(directory, before)

The first data that do not come onto the disk are torn: one half of them does.
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest

Files: TypeAlias = dict[str, bytes | None]  # relative paths; None: a directory

_NEED_ROOM = ("replace", "rename", "symlink", "mkdir", "write")
_CHANGES = (*_NEED_ROOM, "unlink", "rmdir", "ftruncate")


class Killed(BaseException):
    """The process is gone."""


class Disk:
    """Counts what changes the disk, and fails from the n-th change on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._fails_at: int | None = None
        self._is_full = self._is_watching = False
        for name in _CHANGES:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        monkeypatch.setattr(Path, "write_bytes", self._watched_write(Path.write_bytes))
        monkeypatch.setattr(shutil, "copyfile", self._watched_copy(shutil.copyfile))

    @contextmanager
    def killed_at(self, number: int | None) -> Iterator[None]:
        """The body ends by a kill at its n-th change, if it comes to one."""
        with self._failing(number, is_full=False), suppress(Killed):
            yield

    @contextmanager
    def full_from(self, number: int | None) -> Iterator[None]:
        """The body's n-th change that needs room has none, nor has any after it."""
        with self._failing(number, is_full=True):
            yield

    @contextmanager
    def of_another(self) -> Iterator[None]:
        """The body is what another process does, on a disk that is sound."""
        was_watching, self._is_watching = self._is_watching, False
        try:
            yield
        finally:
            self._is_watching = was_watching

    def point(self) -> None:
        """A place in the work of another process that this one waits for: it may be killed, or need room there."""
        if self._fails(needs_room=True):
            self._fail(None)

    @contextmanager
    def _failing(self, number: int | None, *, is_full: bool) -> Iterator[None]:
        self.count, self._fails_at, self._is_full, self._is_watching = 0, number, is_full, True
        try:
            yield
        finally:
            self._is_watching = False

    def _fails(self, *, needs_room: bool) -> bool:
        """Whether the change that is about to be made is one that fails; it is counted."""
        if not self._is_watching or (self._is_full and not needs_room):
            return False
        self.count += 1
        return self._fails_at is not None and self.count >= self._fails_at

    def _fail(self, path: object) -> None:
        if self._is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path if isinstance(path, Path) else None)
        raise Killed

    def _watched(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def watched(target: Any, *arguments: Any, **options: Any) -> Any:
            is_lock = sys._getframe(1).f_globals["__name__"].startswith("filelock")
            if is_lock or not self._fails(needs_room=name in _NEED_ROOM):
                return change(target, *arguments, **options)
            if name == "write" and self.count == self._fails_at:
                (data,) = arguments
                n_written = change(target, data[: len(data) // 2])
                if self._is_full:
                    return n_written
            return self._fail(target)

        return watched

    def _watched_write(self, write: Callable[[Path, bytes], int]) -> Callable[[Path, bytes], int]:
        def watched(path: Path, data: bytes) -> int:
            if not self._fails(needs_room=True):
                return write(path, data)
            if self.count == self._fails_at:
                write(path, data[: len(data) // 2])
            self._fail(path)
            return 0

        return watched

    def _watched_copy(self, copy: Callable[..., Any]) -> Callable[..., Any]:
        def watched(source: Path, path: Path, **options: Any) -> Any:
            if not self._fails(needs_room=True):
                return copy(source, path, **options)
            if self.count == self._fails_at:
                with self.of_another():
                    path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
            return self._fail(path)

        return watched


def files_in(directory: Path) -> Files:
    """All that is in a directory, and what it holds; but for locks."""
    found: Files = {}
    for place, directories, names in os.walk(directory):
        inner = place.removeprefix(str(directory)).lstrip(os.sep)
        found |= {os.path.join(inner, name): None for name in directories}
        for name in names:
            if name != ".lock":
                with open(os.path.join(place, name), "rb") as file:
                    found[os.path.join(inner, name)] = file.read()
    return found


def put_back(directory: Path, files: Files) -> None:
    """Makes a directory what it was; only what is another is written."""
    now = files_in(directory)
    for name in sorted(now, reverse=True):  # what is in a directory before the directory
        if name not in files or (files[name] is None) != (now[name] is None):
            path = directory / name
            path.rmdir() if now[name] is None else path.unlink()
            del now[name]
    for name, data in sorted(files.items()):
        if name not in now:
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if data is None else path.write_bytes(data)
        elif data is not None and now[name] != data:
            (directory / name).write_bytes(data)


def without_chance(files: Mapping[str, Any]) -> dict[str, Any]:
    """The same, its temporaries without what is drawn for their names."""
    return {re.sub(r"[0-9a-f]{8}\.tmp", "tmp", name): data for name, data in files.items()}
