"""The cache folder: where it is, one writer at a time, whole files only."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from pellucid.core.errors import StorageError

Stage = Literal["wait", "download", "extract"]

_LOCK_POLL_SECONDS = 0.1
_LOCK_BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)


class Progress(Protocol):
    """Told how far a pull is, ten times a second or less, from the thread that pulls.

    Args:
        stage: "wait" (another process is pulling the same model), "download", or "extract".
        done: bytes done in this stage.
        total: bytes of this stage; None where it is not known.
    """

    def __call__(self, stage: Stage, done: int, total: int | None) -> None: ...


def cache_dir() -> Path:
    """$PELLUCID_CACHE, or the user's cache folder for pellucid."""
    override = os.environ.get("PELLUCID_CACHE")
    return Path(override).expanduser().absolute() if override else _user_cache_dir()


def models_dir() -> Path:
    """The folder of pulled models, in the cache folder."""
    return cache_dir() / "models"


def _user_cache_dir() -> Path:
    try:
        home = Path.home()
    except RuntimeError:
        raise StorageError("there is no home folder to keep models in: set PELLUCID_CACHE to a folder") from None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "pellucid" / "cache"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification ignores a relative one
        return Path(xdg) / "pellucid"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "pellucid"
    return home / ".cache" / "pellucid"


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError of the body into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        raise storage_error(folder, error.errno, error.strerror or str(error)) from error


def storage_error(folder: Path, code: int | None, reason: str) -> StorageError:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"the disk of {folder} is full: free some space, or set PELLUCID_CACHE to another folder")
    return StorageError(f"cannot write to {folder} ({reason}): set PELLUCID_CACHE to a folder that can be written")


@contextmanager
def exclusive(lock_path: Path, progress: Progress | None) -> Iterator[None]:
    """Holds the lock file; waits while another process has it. A lock dies with its process, so none is ever stale."""
    with lock_path.open("ab") as file:
        while not _try_lock(file):
            if progress is not None:
                progress("wait", 0, None)
            time.sleep(_LOCK_POLL_SECONDS)
        yield


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: BinaryIO) -> bool:
        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in _LOCK_BUSY:
                return False
            raise
        return True

else:
    import fcntl

    def _try_lock(file: BinaryIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _LOCK_BUSY:
                return False
            raise
        return True


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that only its owner can read. It takes the place of `path` when the block is done, whole; where the
    block fails, nothing has changed."""
    partial = path.with_name(f".{os.urandom(8).hex()}.partial")
    with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        try:
            yield file
            commit(file, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def commit(partial: BinaryIO, path: Path) -> None:
    """Gives a fully written file its name, so that after a power cut `path` is whole or absent. Closes `partial`."""
    partial.flush()
    os.fsync(partial.fileno())
    partial.close()
    os.replace(partial.name, path)
    if sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
