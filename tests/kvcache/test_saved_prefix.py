from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pellucid import InvalidRequestError, PrefixFileError, StorageError
from pellucid.kvcache import saved_prefix as module
from pellucid.kvcache.saved_prefix import MAGIC, VERSION, PrefixFile, SavedPrefix, write_prefix
from pellucid.weights import cache

PREFIX = SavedPrefix(
    model_name="tiny.gguf",
    model_sha256="ab" * 32,
    kv_layout="fake 1",
    bytes_per_block=8,
    root_digest="cd" * 32,
    token_ids=list(range(150)),
    num_blocks=2,
    first_blocks=[0, 1],
    messages=[{"role": "user", "content": 'said "hé" \ud800\n'}],
)
BLOCKS = np.arange(24, dtype=np.uint8).reshape(3, 8)
HEADER_AT = 24 + 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "prefix"
    write_prefix(path, PREFIX, [BLOCKS[:2], BLOCKS[2:]])
    return path


def read(path: Path) -> tuple[SavedPrefix, bytes]:
    with PrefixFile.open(path) as file:
        return file.prefix, b"".join(chunk.tobytes() for chunk in file.blocks())


def forged(header: bytes, payload: bytes = BLOCKS.tobytes(), *, version: int = VERSION) -> bytes:
    """A file whose checksums are right, whatever is in it."""
    start = struct.pack("<8sIIQ", MAGIC, version, len(header), len(payload))
    return start + sha256(start + header).digest() + header + payload + sha256(payload).digest()


def forged_fields(**changes: Any) -> bytes:
    return forged(json.dumps({**asdict(PREFIX), **changes}).encode())


def test_what_goes_in_comes_out(path: Path) -> None:
    assert read(path) == (PREFIX, BLOCKS.tobytes())
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
    tokens_only = replace(PREFIX, num_blocks=0, first_blocks=[0, 0], messages=None)
    write_prefix(path, tokens_only, [])
    assert read(path) == (tokens_only, b"")


def test_a_large_payload_comes_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 17)
    with PrefixFile.open(path) as file:
        assert [chunk.tolist() for chunk in file.blocks()] == [BLOCKS[:2].tolist(), BLOCKS[2:].tolist()]
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    with PrefixFile.open(path) as file:
        assert [len(chunk) for chunk in file.blocks()] == [1, 1, 1]


def test_a_file_cut_anywhere_or_enlarged_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for size in reversed(range(len(whole))):
        os.truncate(path, size)
        with pytest.raises(PrefixFileError) as caught:
            read(path)
        assert caught.value.param in ("magic", "size"), size
    path.write_bytes(whole + b"\0")
    with pytest.raises(PrefixFileError, match="cut off or is damaged"):
        read(path)


def test_a_changed_byte_is_found_anywhere(path: Path) -> None:
    whole = path.read_bytes()
    fields = ("magic", "version", "header size", "size", "header", "payload")
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(whole):
            file.seek(position)
            file.write(bytes([byte ^ 1 << position % 8]))
            with pytest.raises(PrefixFileError) as caught:
                read(path)
            assert caught.value.param in fields, position
            file.seek(position)
            file.write(bytes([byte]))
    assert read(path) == (PREFIX, BLOCKS.tobytes())


def test_mutant_without_checksums_a_changed_byte_goes_unseen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignored = SimpleNamespace(digest=lambda: bytes(32), update=lambda data: None)
    monkeypatch.setattr(module, "sha256", lambda data=b"": ignored)
    write_prefix(path, PREFIX, [BLOCKS])
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"token_ids":[0,1,', b'"token_ids":[0,9,'))
    assert read(path)[0].token_ids[1] == 9


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_name": None}, "model_name"),
        ({"model_sha256": 5}, "model_sha256"),
        ({"kv_layout": ["fake"]}, "kv_layout"),
        ({"root_digest": {}}, "root_digest"),
        ({"model_name": "\x1b[2J"}, "model_name"),
        ({"kv_layout": "x" * 1025}, "kv_layout"),
        ({"bytes_per_block": 0}, "bytes_per_block"),
        ({"bytes_per_block": -8}, "bytes_per_block"),
        ({"bytes_per_block": True}, "bytes_per_block"),
        ({"bytes_per_block": 8.0}, "bytes_per_block"),
        ({"bytes_per_block": 2**62}, "payload size"),
        ({"num_blocks": -1}, "num_blocks"),
        ({"num_blocks": 3}, "num_blocks"),
        ({"num_blocks": 2**63}, "num_blocks"),
        ({"num_blocks": 1}, "payload size"),
        ({"token_ids": "abc"}, "token_ids"),
        ({"token_ids": [1, 2.0]}, "token_ids"),
        ({"token_ids": [True] * 150}, "token_ids"),
        ({"token_ids": [-1] * 150}, "token_ids"),
        ({"token_ids": [2**31] * 150}, "token_ids"),
        ({"token_ids": [10**400] * 150}, "token_ids"),
        ({"first_blocks": []}, "first_blocks"),
        ({"first_blocks": [0, 3]}, "first_blocks"),
        ({"first_blocks": [-1, 0]}, "first_blocks"),
        ({"first_blocks": [0, 0]}, "payload size"),
        ({"first_blocks": [0] * 100_000}, "payload size"),
        ({"messages": {}}, "messages"),
        ({"messages": ["hello"]}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages"),
        ({"more": 1}, "header"),
    ],
)
def test_a_forged_header_is_checked(path: Path, changes: dict[str, Any], field: str) -> None:
    path.write_bytes(forged_fields(**changes))
    with pytest.raises(PrefixFileError) as caught:
        PrefixFile.open(path)
    assert caught.value.param == field
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000, b"{}", b'{"a":' + b"9" * 10_000]
)
def test_a_header_that_is_no_object_is_refused(path: Path, header: bytes) -> None:
    path.write_bytes(forged(header))
    with pytest.raises(PrefixFileError) as caught:
        PrefixFile.open(path)
    assert caught.value.param == "header"


def test_sizes_are_compared_with_the_file_before_anything_is_read(path: Path) -> None:
    start = struct.pack("<8sIIQ", MAGIC, VERSION, 2**32 - 1, 2**64 - 1)
    path.write_bytes(start + bytes(32))
    with pytest.raises(PrefixFileError, match="header size is 4294967295"):
        PrefixFile.open(path)
    path.write_bytes(struct.pack("<8sIIQ", MAGIC, VERSION, 10, 2**64 - 1) + bytes(32))
    with pytest.raises(PrefixFileError, match=r"size is 56 bytes where 184467"):
        PrefixFile.open(path)


def test_another_version_says_so(path: Path) -> None:
    path.write_bytes(forged(json.dumps(asdict(PREFIX)).encode(), version=2))
    with pytest.raises(PrefixFileError, match=r"version is 2; this version of Pellucid reads 1: save the prefix again"):
        PrefixFile.open(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for place, message in ((tmp_path, "is not a file"), (tmp_path / "gone", "No such file"), (Path("a\0b"), "null")):
        with pytest.raises(PrefixFileError, match=message):
            PrefixFile.open(place)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(PrefixFileError, match="is not a file"):
            PrefixFile.open(tmp_path / "pipe")
        with pytest.raises(StorageError, match="is not a file"):
            write_prefix(tmp_path / "pipe", PREFIX, [BLOCKS])


def test_a_file_that_shrinks_while_it_is_read_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    prefix = replace(PREFIX, bytes_per_block=1 << 17)
    write_prefix(path, prefix, [np.zeros((3, 1 << 17), np.uint8)])
    with PrefixFile.open(path) as file:
        blocks = file.blocks()
        next(blocks)
        os.truncate(path, 1 << 17)
        with pytest.raises(PrefixFileError, match="cut short"):
            list(blocks)


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("number", "message"), [(28, r"the disk of .* is full: free some space"), (30, r"cannot write .*: save to another")]
)
def test_a_failed_write_leaves_what_was_there(
    path: Path, number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.os, "fsync", failing(OSError(number, os.strerror(number))))
    with pytest.raises(StorageError, match=message):
        write_prefix(path, replace(PREFIX, kv_layout="other"), [BLOCKS])
    assert read(path)[0] == PREFIX
    assert os.listdir(path.parent) == ["prefix"]


def test_messages_that_are_no_json_are_refused_and_nothing_is_written(path: Path) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for content in (object(), b"bytes", float("nan"), nested):
        with pytest.raises(InvalidRequestError) as caught:
            write_prefix(path, replace(PREFIX, messages=[{"role": "user", "content": content}]), [BLOCKS])
        assert caught.value.param == "messages"
    assert read(path)[0] == PREFIX


def test_a_link_stays_a_link(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    write_prefix(link, replace(PREFIX, kv_layout="other"), [BLOCKS])
    assert link.is_symlink()
    assert read(path)[0].kv_layout == "other"
