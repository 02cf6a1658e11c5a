"""A prefix on disk: its tokens, and the KV blocks that hold their keys and values.

    magic           8 bytes
    version         uint32; all integers are little-endian
    header size     uint32
    payload size    uint64
    SHA-256         of all that stands before it and of the header
    header          JSON: the fields of `SavedPrefix`
    payload         KV blocks, as `Backend.read_blocks` gives them: of each KV group in turn, by position
    SHA-256         of the payload

A file is hostile until checked: every size is compared with what the file holds before anything is read or allocated,
and no block counts before the last byte has been verified. The checksums find damage, not malice: whoever can forge a
file can put any keys and values in it, so a prefix deserves as much trust as the model it is for.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from pellucid.core.closing import Closing
from pellucid.core.config import BLOCK_SIZE
from pellucid.core.errors import InvalidRequestError, PrefixFileError, StorageError
from pellucid.core.validation import INT32_MAX
from pellucid.weights.cache import replacing

MAGIC = b"\x89PREFIX\n"  # a byte that is no text, and a line end that a transfer as text would change
VERSION = 1

_FIXED = struct.Struct("<8sIIQ")
_DIGEST_BYTES = 32
_MAX_HEADER_BYTES = 64 << 20
_MAX_NAME_CHARACTERS = 1024
_CHUNK_BYTES = 16 << 20

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class SavedPrefix:
    """What a file says of itself.

    Attributes:
        model_name: the model's file name, for messages.
        model_sha256: of the model file, in hexadecimal.
        kv_layout: `Backend.kv_layout` of the blocks.
        bytes_per_block: size of one.
        root_digest: where the chain of the prefix's digests begins, in hexadecimal: it stands for the cache salt.
        token_ids: the whole prefix, a last block that is not full included.
        num_blocks: how many full blocks of the prefix were computed; 0 where only the tokens were saved.
        first_blocks: of each KV group, the first block, by position, that the file has: before it there is nothing
            that a token after the prefix would see.
        messages: the conversation that the prefix is, or None.
    """

    model_name: str
    model_sha256: str
    kv_layout: str
    bytes_per_block: int
    root_digest: str
    token_ids: list[int]
    num_blocks: int
    first_blocks: list[int]
    messages: Messages | None

    @property
    def num_stored_blocks(self) -> int:
        """KV blocks in the file, of all groups."""
        return sum(self.num_blocks - first for first in self.first_blocks)


def write_prefix(path: Path, prefix: SavedPrefix, blocks: Iterable[NDArray[np.uint8]]) -> None:
    """Write a file that only its owner can read, whole or not at all, in the place of what was at `path`.

    Args:
        blocks: uint8 [n, bytes_per_block] each, `prefix.num_stored_blocks` in all.

    Raises:
        InvalidRequestError: the messages hold something that JSON does not.
        StorageError: the file cannot be written; one that was there is as it was.
    """
    try:
        header = json.dumps(asdict(prefix), separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the messages cannot be saved as JSON: {error}", param="messages") from None
    if len(header) > _MAX_HEADER_BYTES:
        raise InvalidRequestError(
            f"tokens and messages take {len(header):,} bytes as JSON; a saved prefix holds {_MAX_HEADER_BYTES:,}",
            param="messages",
        )
    fixed = _FIXED.pack(MAGIC, VERSION, len(header), prefix.num_stored_blocks * prefix.bytes_per_block)
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():
        raise StorageError(f"{path} is not a file: give the path of one", param="path")
    payload = sha256()
    try:
        with replacing(path) as file:
            file.write(fixed + sha256(fixed + header).digest() + header)
            for chunk in blocks:
                payload.update(chunk.data)
                file.write(chunk.data)
            file.write(payload.digest())
    except OSError as error:
        raise _storage_error(path, error) from error


def _storage_error(path: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"the disk of {path} is full: free some space, or save to another place", param="path")
    return StorageError(f"cannot write {path} ({error.strerror}): save to another place", param="path")


class PrefixFile(Closing):
    """A saved prefix, open; a context manager.

    Attributes:
        path: where it lies.
        prefix: what it says of itself: its checksum is right, and the file has the size that this makes.
    """

    def __init__(self, path: Path, prefix: SavedPrefix, file: BinaryIO) -> None:
        self.path = path
        self.prefix = prefix
        self._file = file

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PrefixFile:
        """Open a file and check all but the payload.

        Raises:
            PrefixFileError: it cannot be read, is of another version, or is damaged; `param` names the field.
        """
        path = Path(path)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                _fail(path, "path", "is not a file")
            file = path.open("rb")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise PrefixFileError(f"cannot read {path}: {reason}", param="path") from error
        try:
            return cls(path, _read_header(path, file), file)
        except OSError as error:
            file.close()
            raise PrefixFileError(f"cannot read {path}: {error.strerror}", param="path") from error
        except BaseException:
            file.close()
            raise

    def blocks(self) -> Iterator[NDArray[np.uint8]]:
        """The KV blocks, once: uint8 [n, bytes_per_block] each, of up to 16 MiB where a block is no larger. They count
        only when the iterator has come to its end.

        Raises:
            PrefixFileError: the payload is damaged, or cannot be read.
        """
        size = self.prefix.bytes_per_block
        remaining = self.prefix.num_stored_blocks
        digest = sha256()
        try:
            while remaining:
                chunk = np.empty((min(remaining, max(1, _CHUNK_BYTES // size)), size), np.uint8)
                if self._file.readinto(chunk.data) != chunk.nbytes:  # type: ignore[attr-defined]
                    _fail(self.path, "payload", "was cut short while it was being read")
                digest.update(chunk.data)
                remaining -= len(chunk)
                yield chunk
            found = self._file.read(_DIGEST_BYTES)
        except OSError as error:
            raise PrefixFileError(f"cannot read {self.path}: {error.strerror}", param="payload") from error
        if found != digest.digest():
            _fail(self.path, "payload", "is damaged: its SHA-256 is not the one in the file")

    def close(self) -> None:
        self._file.close()


def _fail(path: Path, field: str, problem: str) -> NoReturn:
    raise PrefixFileError(f"{path}: the {field} {problem}", param=field)


def _read_header(path: Path, file: BinaryIO) -> SavedPrefix:
    size = os.fstat(file.fileno()).st_size
    start = file.read(_FIXED.size + _DIGEST_BYTES)
    if not start.startswith(MAGIC):
        _fail(path, "magic", "is not there: this is not a saved prefix")
    if len(start) < _FIXED.size + _DIGEST_BYTES:
        _fail(path, "size", f"is {size} bytes, less than the start of a saved prefix takes: it was cut off")
    _, version, header_size, payload_size = _FIXED.unpack_from(start)
    if version != VERSION:
        _fail(path, "version", f"is {version}; this version of Pellucid reads {VERSION}: save the prefix again")
    expected = len(start) + header_size + payload_size + _DIGEST_BYTES
    if header_size > _MAX_HEADER_BYTES:
        _fail(path, "header size", f"is {header_size}; at most {_MAX_HEADER_BYTES} bytes are possible: it is damaged")
    if size != expected:
        _fail(path, "size", f"is {size} bytes where {expected} are announced: it was cut off or is damaged")
    header = file.read(header_size)
    if sha256(start[: _FIXED.size] + header).digest() != start[_FIXED.size :]:
        _fail(path, "header", "is damaged: its SHA-256 is not the one in the file")
    prefix = _parse(path, header)
    stored = prefix.num_stored_blocks * prefix.bytes_per_block
    if stored != payload_size:
        _fail(path, "payload size", f"is {payload_size} bytes, but the header speaks of {stored}")
    return prefix


def _parse(path: Path, header: bytes) -> SavedPrefix:
    try:
        values = json.loads(header)
    except (ValueError, RecursionError) as error:
        _fail(path, "header", f"is not JSON: {error}")
    names = [field.name for field in fields(SavedPrefix)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        _fail(path, "header", f"does not have the fields {', '.join(names)}")
    for name in ("model_name", "model_sha256", "kv_layout", "root_digest"):
        text = values[name]
        if not isinstance(text, str) or len(text) > _MAX_NAME_CHARACTERS or not text.isprintable():  # it gets shown
            _fail(path, name, f"is not a text of up to {_MAX_NAME_CHARACTERS} printable characters")
    for name, low in (("bytes_per_block", 1), ("num_blocks", 0)):
        if type(values[name]) is not int or values[name] < low:
            _fail(path, name, f"is not an integer from {low} on")
    for name in ("token_ids", "first_blocks"):
        numbers = values[name]
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            _fail(path, name, "are not a list of integers")
    if not all(0 <= token_id <= INT32_MAX for token_id in values["token_ids"]):
        _fail(path, "token_ids", "are not all from 0 to 2^31 - 1")
    if values["num_blocks"] > len(values["token_ids"]) // BLOCK_SIZE:
        _fail(path, "num_blocks", f"is {values['num_blocks']}, more than {len(values['token_ids'])} tokens fill")
    if not values["first_blocks"] or not all(0 <= first <= values["num_blocks"] for first in values["first_blocks"]):
        _fail(path, "first_blocks", f"are not one a group, each from 0 to num_blocks = {values['num_blocks']}")
    messages = values["messages"]
    if messages is not None and not (
        isinstance(messages, list)
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages)
    ):
        _fail(path, "messages", "are not a list of messages with a role each")
    return SavedPrefix(**values)
