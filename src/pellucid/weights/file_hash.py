"""The SHA-256 of a model file, computed once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from pellucid.core.errors import ModelFileError, PellucidError
from pellucid.weights.cache import cache_dir, replacing

_UNSETTLED_NS = 2_000_000_000
"""A file younger than this may change again without a change of its times, which have the grain of the file system."""


def file_hash(path: Path, status: os.stat_result) -> str:
    """SHA-256 of a whole file, in hexadecimal.

    Every byte counts, so that no two models pass for one another, however alike they are. That takes a second for one
    or two gigabytes, so the result is kept in the cache folder beside the file's size, times, device and inode, and is
    computed again when one of these is another. Where nothing can be kept there, it is computed each time.

    Args:
        path: where the file lies.
        status: of the file that is meant.

    Raises:
        ModelFileError: it is not there any more, or another is in its place.
    """
    try:
        with path.open("rb") as file:
            if _identity(os.fstat(file.fileno())) != _identity(status):
                raise _changed(path)
            known = _recall(status)
            if known is not None:
                return known
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if _identity(os.fstat(file.fileno())) != _identity(status):
                raise _changed(path)
    except OSError as error:
        raise _changed(path) from error
    _remember(status, digest)
    return digest


def _changed(path: Path) -> ModelFileError:
    return ModelFileError(f"{path} has been changed or taken away since it was loaded: load it again", param="path")


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _record_path(status: os.stat_result) -> Path:
    return cache_dir() / "hashes" / f"{status.st_dev:x}-{status.st_ino:x}.json"


def _recall(status: os.stat_result) -> str | None:
    try:
        record = json.loads(_record_path(status).read_bytes())
    except (OSError, ValueError, RecursionError, PellucidError):
        return None
    if not isinstance(record, dict) or record.get("file") != _identity(status):
        return None
    digest = record.get("sha256")
    return digest if isinstance(digest, str) else None


def _remember(status: os.stat_result, digest: str) -> None:
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _UNSETTLED_NS:
        return
    with suppress(OSError, PellucidError):
        path = _record_path(status)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps({"file": _identity(status), "sha256": digest}).encode())
