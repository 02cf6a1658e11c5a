"""The output of a batch: what was answered survives a kill, and the finished file appears whole.

While a batch runs, OUT.partial is its journal: a line that says what the run is, then a line for each request that was
answered, as soon as it was, with the request's index before it. A kill can tear the last line only, which is then cut
off and its request done again. When all are answered, they are written in the order of the input to OUT.new, which is
renamed to OUT. OUT.lock keeps a second process away.
"""

from __future__ import annotations

import errno
import json
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from pellucid.core.errors import InvalidRequestError, StorageError
from pellucid.weights.cache import commit, exclusive

SYNC_SECONDS = 1.0
"""At most so much is lost where the whole machine stops. A kill of the process loses no line that was written."""

_ENTRY = re.compile(rb"(\d{1,18}) (\{.*\})\n", re.DOTALL)


@dataclass(slots=True)
class Tally:
    """What the answers so far are.

    Attributes:
        num_done: how many there are.
        num_failed: how many of them tell of an error.
        first_failure: the index of the first request of these, its custom_id, and what was wrong.
    """

    num_done: int = 0
    num_failed: int = 0
    first_failure: tuple[int, str, str] | None = None

    def add(self, index: int, answer: dict[str, Any]) -> None:
        """Count the answer to request `index`."""
        self.num_done += 1
        response = answer["response"]
        if response["status_code"] != 200:
            self.num_failed += 1
            if self.first_failure is None or index < self.first_failure[0]:
                self.first_failure = index, answer["custom_id"], response["body"]["error"]["message"]


class BatchOutput(Protocol):
    """Where the answers go."""

    tally: Tally

    def is_done(self, index: int) -> bool:
        """Whether request `index` was answered before."""

    def write(self, index: int, answer: dict[str, Any]) -> None:
        """Take the answer to request `index`."""


class Identity:
    """What makes two runs the same one.

    Args:
        settings: whatever has a say in the answers; JSON values by name.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._digest = sha256(json.dumps(settings, sort_keys=True).encode())

    def name(self, index: int) -> str:
        """Unique to request `index` of this run, and the same whenever it is resumed: 24 hexadecimal digits."""
        digest = self._digest.copy()
        digest.update(b"%d" % index)
        return digest.hexdigest()[:24]

    def answer_id(self, index: int) -> str:
        """The `id` of the answer to request `index`."""
        return f"batch_req_{self.name(index)}"


class StreamOutput:
    """Answers to a stream, in the order in which they come. Nothing is kept of them."""

    def __init__(self, stream: BinaryIO) -> None:
        self.tally = Tally()
        self._stream = stream

    def is_done(self, index: int) -> bool:
        return False

    def write(self, index: int, answer: dict[str, Any]) -> None:
        self._stream.write(encode_line(answer))
        self._stream.flush()
        self.tally.add(index, answer)


class FileOutput:
    """Answers to a file, resumable. A context manager, which holds the lock.

    Args:
        path: the finished file.
        identity: of this run.
        num_requests: how many answers there will be.

    Attributes:
        is_complete: whether `path` has them all.
        resolved: what `begin` was given when the run began; None before.

    Raises:
        InvalidRequestError: `path` is something else, or holds or was to hold the answers of another run.
        StorageError: it cannot be written, or another process is at work on it.
    """

    def __init__(self, path: Path, identity: Identity, num_requests: int) -> None:
        self.path = path
        self.journal_path = path.with_name(f"{path.name}.partial")
        self._new_path = path.with_name(f"{path.name}.new")
        self.tally = Tally()
        self.is_complete = False
        self.resolved: dict[str, Any] | None = None
        self._identity = identity
        self._offsets = array("q", [-1]) * num_requests
        self._journal: BinaryIO | None = None
        self._end = 0
        self._synced = monotonic()
        self._lock_path = path.with_name(f"{path.name}.lock")
        self._lock = exclusive(self._lock_path, self._refuse_to_wait)
        if path.exists() and not path.is_file():
            raise InvalidRequestError(f"{path} is not a file; `-` is standard output", param="output")

    def __enter__(self) -> FileOutput:
        with self._storage_errors():
            self._lock.__enter__()
        try:
            with self._storage_errors():
                if self.path.exists():
                    self._check_complete()
                elif self.journal_path.exists():
                    self._resume()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._journal is not None:
                with self._storage_errors():
                    os.fsync(self._journal.fileno())
        finally:
            if self._journal is not None:
                self._journal.close()
            self._unlock()

    def begin(self, resolved: dict[str, Any]) -> None:
        """Write the journal's first line, unless the run is resumed.

        Args:
            resolved: what was found out about the run and must be the same when it is resumed.
        """
        if self._journal is None:
            self.resolved = resolved
            header = encode_line({"pellucid_batch": self._identity.settings, "resolved": resolved})
            with self._storage_errors():
                with self._new_path.open("wb") as new:
                    new.write(header)
                    commit(new, self.journal_path)
                self._open_journal(len(header))

    def is_done(self, index: int) -> bool:
        return self._offsets[index] >= 0

    def write(self, index: int, answer: dict[str, Any]) -> None:
        """Raises StorageError where the disk is full; what was written before stays."""
        assert self._journal is not None
        with self._storage_errors():
            offset = self._end
            self._append(b"%d " % index + encode_line(answer))
            if monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._journal.fileno())
                self._synced = monotonic()
        self._count(index, offset, answer)

    def finish(self) -> None:
        """With all answered, put the file in its place, the answers in the order of the requests. Once is enough."""
        if self.is_complete:
            return
        assert self.tally.num_done == len(self._offsets)
        with self._storage_errors():
            with self.journal_path.open("rb") as journal, self._new_path.open("wb") as new:
                for offset in self._offsets:
                    journal.seek(offset)
                    new.write(journal.readline().partition(b" ")[2])
                commit(new, self.path)
            self.is_complete = True
            self.journal_path.unlink()

    def _resume(self) -> None:
        with self.journal_path.open("rb") as lines:
            header = lines.readline()
            self.resolved = self._check_header(header)
            end = len(header)
            for line in lines:
                entry = _entry(line)
                if entry is None or not self._is_expected(*entry):
                    break
                self._count(entry[0], end, entry[1])
                end += len(line)
        self._open_journal(end)

    def _open_journal(self, end: int) -> None:
        """For more lines after the `end` bytes that are whole."""
        self._journal = self.journal_path.open("r+b", buffering=0)
        self._journal.truncate(end)
        self._journal.seek(end)
        self._end = end

    def _check_header(self, line: bytes) -> dict[str, Any]:
        try:
            header = json.loads(line)
            begun, resolved = dict(header["pellucid_batch"]), dict(header["resolved"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InvalidRequestError(
                f"{self.journal_path} is not the journal of a batch: move it away, or write to another file",
                param="output",
            ) from None
        settings = self._identity.settings
        different = [name for name in {**settings, **begun} if settings.get(name) != begun.get(name)]
        if different:
            was = ", ".join(f"{name} {begun.get(name)!r} (now {settings.get(name)!r})" for name in different)
            raise InvalidRequestError(
                f"{self.journal_path} was begun with {was}: run it as it was begun to go on with it, delete it to "
                "begin again, or write to another file",
                param="output",
            )
        return resolved

    def _check_complete(self) -> None:
        """`path` is there: fine if it is what this run would give, whose ids nobody else has."""
        index = 0
        with self.path.open("rb") as lines:
            for line in lines:
                answer = _json_object(line)
                if answer is None or not self._is_expected(index, answer):
                    break
                self._count(index, 0, answer)
                index += 1
            else:
                self.is_complete = index == len(self._offsets)
        if not self.is_complete:
            raise InvalidRequestError(
                f"{self.path} is there already, and is not the result of this command: delete it, or write to "
                "another file",
                param="output",
            )
        self.journal_path.unlink(missing_ok=True)

    def _is_expected(self, index: int, answer: dict[str, Any]) -> bool:
        if not 0 <= index < len(self._offsets) or self._offsets[index] >= 0:
            return False
        try:
            Tally().add(index, answer)
        except (KeyError, TypeError):  # someone has been at work on the file
            return False
        return bool(answer["id"] == self._identity.answer_id(index))

    def _count(self, index: int, offset: int, answer: dict[str, Any]) -> None:
        self._offsets[index] = offset
        self.tally.add(index, answer)

    def _append(self, line: bytes) -> None:
        assert self._journal is not None
        view = memoryview(line)
        while view:
            view = view[self._journal.write(view) :]
        self._end += len(line)

    def _refuse_to_wait(self, stage: object, done: int, total: int | None) -> None:
        raise StorageError(f"another process is at work on {self.path}: wait for it, or write to another file")

    def _unlock(self) -> None:
        if self.is_complete:
            self._lock_path.unlink(missing_ok=True)
        self._lock.__exit__(None, None, None)

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                message = (
                    f"the disk of {self.path} is full: free some space and run the same command again, which goes on "
                    "from here"
                )
            else:
                message = f"cannot write {self.path}: {error.strerror or error}"
            raise StorageError(message, param="output") from error


def encode_line(value: dict[str, Any]) -> bytes:
    """One line of JSON; a lone surrogate, which UTF-8 cannot write, as JSON's own escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _entry(line: bytes) -> tuple[int, dict[str, Any]] | None:
    """A line of the journal; None where it is torn."""
    match = _ENTRY.fullmatch(line)
    answer = match and _json_object(match[2])
    return (int(match[1]), answer) if match and answer else None


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
