"""GGUF reader: metadata, and tensors as views into the mapped file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.

A file is hostile until checked. Every size is compared with what the file holds before anything is read or allocated,
in Python's unbounded integers, and nothing recurses on input.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from pellucid.core.closing import Closing
from pellucid.core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from pellucid.quant.formats import BlockFormat, row_bytes
from pellucid.weights.tensor import WeightTensor

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_KEY_BYTES = 65_535
_MAX_TENSOR_NAME_BYTES = 64

# Bounds what metadata can cost in memory; the largest vocabularies need about 10 MiB.
_MAX_HEADER_BYTES = 128 << 20
_MAX_ENTRIES = 65_536  # of metadata, and of tensors

_MIN_METADATA_BYTES = 8 + 1 + 4 + 1  # key length, key, type, value
_MIN_TENSOR_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dimension count, dimension, type, offset

_U64 = struct.Struct("<Q")

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}

# Tensor types of ggml that have no codec here, so that an error can name them.
_OTHER_TENSOR_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


class GGUFFile(Closing):
    """An open GGUF file; a context manager.

    Attributes:
        path: where it lies.
        status: of the file, as it was opened.
        version: 2 or 3.
        metadata: by key: int, float, bool or str; arrays of numbers as numpy arrays, arrays of strings as list[str].
        tensors: by name, in the order of the file; each a read-only view of the mapping.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        metadata: dict[str, object],
        tensors: dict[str, WeightTensor],
        mapping: mmap.mmap,
        status: os.stat_result,
    ) -> None:
        self.path = path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self._mapping = mapping
        self.status = status

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Maps the file and reads its header.

        Raises:
            ModelNotFoundError: no such file.
            ModelFileError: the file cannot be read or is malformed; `param` names the field.
            UnsupportedModelError: big-endian, another version, one part of several, a tensor type without a codec.
        """
        path = Path(path)
        mapping, status = _map(path)
        try:
            return cls(path, *_parse(path, mapping), mapping, status)
        except BaseException:
            _unmap(mapping)
            raise

    def close(self) -> None:
        """Drops the tensors and unmaps the file; views still held elsewhere stay valid and keep the mapping alive."""
        self.tensors = {}
        _unmap(self._mapping)

    def require_unchanged(self) -> None:
        """Check that nobody has written to the file, or cut it short, since it was opened. Putting another file in its
        place is no change: the one that is open stays as it is.

        Raises:
            ModelFileError: what was read from it may be of two files; reading on might crash.
        """
        changed = self._mapping.size() != len(self._mapping)
        try:
            now = self.path.stat()
        except OSError:  # moved away
            now = self.status
        if os.path.samestat(now, self.status):
            changed |= now.st_mtime_ns != self.status.st_mtime_ns
        if changed:
            raise ModelFileError(f"{self.path} was changed while it was being read: try again", param="path")

    def release(self, data: NDArray[np.uint8]) -> None:
        """Takes the pages of consumed data out of resident memory, where the platform can; reading it again works.

        Args:
            data: of one of `tensors`, or some of its rows. What is not a view into the file is left as it is.
        """
        if self._mapping.closed:
            return
        start = _address(data) - _address(np.frombuffer(self._mapping, np.uint8))
        if 0 <= start <= len(self._mapping) - data.nbytes:
            _release(self._mapping, start, start + data.nbytes)


def _release(mapping: mmap.mmap, start: int, end: int) -> None:
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    # Whole pages only: a page at either end may hold a neighbour that is still to be read.
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def _address(array: NDArray[np.uint8]) -> int:
    return int(array.ctypes.data)


def _map(path: Path) -> tuple[mmap.mmap, os.stat_result]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path} is not a file: give the path of a .gguf file", param="path")
        if status.st_size < len(_MAGIC):
            raise ModelFileError(f"{path} has {status.st_size} bytes: too short for a GGUF file", param="magic")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), status
    except FileNotFoundError:
        raise ModelNotFoundError(f"no such file: {path}", param="path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or the file shrank to nothing
        raise ModelFileError(f"cannot read {path}: {error}", param="path") from None


def _unmap(mapping: mmap.mmap) -> None:
    try:
        mapping.close()
    except BufferError:  # a view is still held: the mapping goes with the last one
        return


class _Header:
    """A cursor over the header that never reads past its end.

    `field` names what is being read, for errors.
    """

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.mapping = mapping
        self.position = 0
        self.end = min(len(mapping), _MAX_HEADER_BYTES)

    def fail(self, field: str, problem: str) -> NoReturn:
        raise ModelFileError(f"{self.path}: {field}: {problem}", param=field)

    def require(self, size: int, field: str) -> None:
        if size > self.end - self.position:
            limit = "the file" if self.end == len(self.mapping) else f"the {_MAX_HEADER_BYTES >> 20} MiB header limit"
            self.fail(field, f"needs {size} bytes at offset {self.position}, but {limit} ends at {self.end}")

    def peek(self, size: int, field: str) -> bytes:
        self.require(size, field)
        return self.mapping[self.position : self.position + size]

    def raw(self, size: int, field: str) -> bytes:
        data = self.peek(size, field)
        self.position += size
        return data

    def u32(self, field: str) -> int:
        return int.from_bytes(self.raw(4, field), "little")

    def u64(self, field: str) -> int:
        return int.from_bytes(self.raw(8, field), "little")

    def count(self, field: str, item_bytes: int, most: int | None = None) -> int:
        """A 64-bit count of items that take at least `item_bytes` each."""
        count = self.u64(field)
        if most is not None and count > most:
            self.fail(field, f"is {count}; at most {most} are allowed")
        self.require(count * item_bytes, f"{field} = {count}")
        return count

    def name(self, field: str, max_bytes: int) -> str:
        """A key or tensor name: it ends up in messages, so nothing in it may control a terminal."""
        size = int.from_bytes(self.peek(8, f"{field} length"), "little")
        if not 0 < size <= max_bytes:
            self.fail(f"{field} length", f"is {size}; 1 to {max_bytes} bytes are allowed")
        name = self.string(field)
        if not name.isprintable():
            self.fail(field, f"{name!r} has characters that cannot be printed")
        return name

    def string(self, field: str) -> str:
        size = self.u64(f"{field} length")
        try:
            return self.raw(size, field).decode()
        except UnicodeDecodeError as error:
            self.fail(field, f"is not valid UTF-8: {error.reason} at byte {error.start}")

    def strings(self, count: int, field: str) -> list[str]:
        """`count` strings. The loop is the cost of opening a file: hundreds of thousands of tokens and merges."""
        mapping, position, end = self.mapping, self.position, self.end
        length_at = _U64.unpack_from
        result: list[str] = []
        append = result.append
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_at(mapping, position)[0]
                if position > end:
                    break
                append(mapping[start:position].decode())
        except UnicodeDecodeError as error:
            self.fail(f"{field}[{len(result)}]", f"is not valid UTF-8: {error.reason} at byte {error.start}")
        except struct.error:  # no room for a length
            pass
        if len(result) < count:
            self.fail(f"{field}[{len(result)}]", f"runs past the end at {end}")
        self.position = position
        return result

    def numbers(self, count: int, type: int, field: str) -> NDArray[Any]:
        dtype = _NUMBERS[type]
        values = np.frombuffer(self.raw(count * dtype.itemsize, field), dtype)
        if type == _BOOL:
            if (values > 1).any():
                self.fail(field, "a bool must be 0 or 1")
            return values.astype(np.bool_)
        return values.copy()

    def value(self, type: int, field: str) -> object:
        if type == _STRING:
            return self.string(field)
        if type == _ARRAY:
            return self.array(field)
        if type not in _NUMBERS:
            self.fail(f"{field} type", f"is {type}; GGUF has 0 to 12")
        return self.numbers(1, type, field)[0].item()

    def array(self, field: str) -> object:
        type = self.u32(f"{field} element type")
        if type == _ARRAY:
            raise UnsupportedModelError(f"{self.path}: {field}: nested arrays are not supported", param=field)
        if type == _STRING:
            return self.strings(self.count(f"{field} length", item_bytes=8), field)
        if type not in _NUMBERS:
            self.fail(f"{field} element type", f"is {type}; GGUF has 0 to 12")
        return self.numbers(self.count(f"{field} length", _NUMBERS[type].itemsize), type, field)


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    offset: int  # from the start of the data section
    row_bytes: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.row_bytes


def _parse(path: Path, mapping: mmap.mmap) -> tuple[int, dict[str, object], dict[str, WeightTensor]]:
    header = _Header(path, mapping)
    version = _read_version(header)
    tensor_count = header.count("tensor_count", _MIN_TENSOR_INFO_BYTES, _MAX_ENTRIES)
    metadata_count = header.count("metadata_kv_count", _MIN_METADATA_BYTES, _MAX_ENTRIES)
    metadata = _read_metadata(header, metadata_count)
    _refuse_split(path, metadata)
    alignment = _alignment(header, metadata)
    infos = _read_tensor_infos(header, tensor_count, alignment)
    data_start = -(-header.position // alignment) * alignment
    _check_extents(header, infos, data_start)
    _release(mapping, 0, header.position)
    data = np.frombuffer(mapping, np.uint8)
    return version, metadata, {info.name: _view(data, data_start, info) for info in infos}


def _read_version(header: _Header) -> int:
    magic = header.raw(4, "magic")
    if magic != _MAGIC:
        header.fail("magic", f"the file starts with {magic!r}, a GGUF file with {_MAGIC!r}")
    version = header.u32("version")
    if version in (2, 3):
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
        found = "a big-endian file"
    else:
        found = f"version {version}"
    raise UnsupportedModelError(
        f"{header.path}: {found}; little-endian GGUF versions 2 and 3 are supported", param="version"
    )


def _read_metadata(header: _Header, count: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for index in range(count):
        key = header.name(f"metadata key {index}", _MAX_KEY_BYTES)
        if key in metadata:
            header.fail(key, "the key appears twice")
        metadata[key] = header.value(header.u32(f"{key} type"), key)
    return metadata


def _refuse_split(path: Path, metadata: dict[str, object]) -> None:
    parts = metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModelError(
            f"{path}: one of {parts} parts of a split model; merge them first (llama-gguf-split --merge)",
            param="split.count",
        )


def _alignment(header: _Header, metadata: dict[str, object]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        header.fail("general.alignment", f"is {alignment!r}; a positive multiple of 8 is needed")
    return alignment


def _read_tensor_infos(header: _Header, count: int, alignment: int) -> list[_TensorInfo]:
    infos: list[_TensorInfo] = []
    names: set[str] = set()
    for index in range(count):
        info = _read_tensor_info(header, index, alignment)
        if info.name in names:
            header.fail(info.name, "two tensors have this name")
        names.add(info.name)
        infos.append(info)
    return infos


def _read_tensor_info(header: _Header, index: int, alignment: int) -> _TensorInfo:
    name = header.name(f"tensor name {index}", _MAX_TENSOR_NAME_BYTES)
    rank = header.u32(f"{name} dimension count")
    if not 1 <= rank <= _MAX_DIMENSIONS:
        header.fail(f"{name} dimension count", f"is {rank}; 1 to {_MAX_DIMENSIONS} are possible")
    # The file lists the contiguous dimension first.
    shape = tuple(header.u64(f"{name} dimension {axis}") for axis in range(rank))[::-1]
    if 0 in shape:
        header.fail(f"{name} shape", f"{list(shape)} has a zero")
    format = _tensor_format(header, name)
    if shape[-1] % format.block_size:
        header.fail(
            f"{name} shape", f"rows of {shape[-1]} are not whole {format.name} blocks of {format.block_size} elements"
        )
    offset = header.u64(f"{name} offset")
    if offset % alignment:
        header.fail(f"{name} offset", f"{offset} is not a multiple of general.alignment = {alignment}")
    return _TensorInfo(name, format, shape, offset, row_bytes(format, shape[-1]))


def _tensor_format(header: _Header, name: str) -> BlockFormat:
    number = header.u32(f"{name} type")
    try:
        return BlockFormat(number)
    except ValueError:
        found = _OTHER_TENSOR_TYPES.get(number, f"unknown type {number}")
        supported = ", ".join(format.name for format in BlockFormat)
        raise UnsupportedModelError(
            f"{header.path}: tensor {name} is {found}; supported are {supported}", param=f"{name} type"
        ) from None


def _check_extents(header: _Header, infos: list[_TensorInfo], data_start: int) -> None:
    size = len(header.mapping) - data_start
    previous: _TensorInfo | None = None
    for info in sorted(infos, key=lambda info: info.offset):
        if info.end > size:
            header.fail(
                f"{info.name} offset",
                f"{info.format.name} {list(info.shape)} ends {info.end - max(size, 0)} bytes past the end of the file;"
                " the file is cut off or its header is wrong",
            )
        if previous is not None and info.offset < previous.end:
            header.fail(f"{info.name} offset", f"{info.offset} lies inside tensor {previous.name}")
        previous = info


def _view(data: NDArray[np.uint8], data_start: int, info: _TensorInfo) -> WeightTensor:
    rows = data[data_start + info.offset : data_start + info.end].reshape(info.rows, info.row_bytes)
    return WeightTensor(info.format, info.shape, rows)
