from __future__ import annotations

import os
import struct
import sys
import tracemalloc
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pellucid.core.errors import ModelFileError, ModelNotFoundError, PellucidError, UnsupportedModelError
from pellucid.quant.formats import BlockFormat, dequantize, row_bytes
from pellucid.weights import catalog, gguf
from pellucid.weights.gguf import GGUFFile
from tests.support.counting import count_steps
from tests.support.gguf_writer import encode, gguf_bytes, write_gguf

METADATA = {
    "general.architecture": "llama",
    "aaa.one": True,
    "aaa.two": False,
    "llama.block_count": 2,
    "llama.eps": 1e-5,
    "signed": -5,
    "wide": np.uint64(2**63 + 1),
    "double": np.float64(0.1),
    "tokens": ["<s>", "é", "", "𝄞 x"],
    "scores": [0.5, -1.0, 0.0],
    "types": [1, 2, -3],
    "flags": np.array([True, False]),
    "none": [],
}


def sample_tensors() -> dict:
    rng = np.random.default_rng(0)
    return {
        "norm": rng.standard_normal(8).astype(np.float32),
        "weight": encode(rng.standard_normal((4, 64)), BlockFormat.Q4_1),
        "cube": encode(rng.standard_normal((2, 3, 32)), BlockFormat.Q8_0),
    }


SAMPLE = gguf_bytes(METADATA, sample_tensors())
HEADER_BYTES = SAMPLE.index(b"cube") + 4 + 4 + 3 * 8 + 4 + 8


def open_bytes(data: bytes, folder: Path) -> GGUFFile:
    path = folder / "case.gguf"
    path.write_bytes(data)
    return GGUFFile.open(path)


def patched(data: bytes, after: bytes, skip: int, value: bytes) -> bytes:
    """`data` with `value` written `skip` bytes after the end of the only occurrence of `after`."""
    assert data.count(after) == 1
    at = data.index(after) + len(after) + skip
    return data[:at] + value + data[at + len(value) :]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def survives(data: bytes, folder: Path) -> bool:
    """Whether a hostile file ends in a typed error, or in tensors that can be read to their last byte."""
    try:
        with open_bytes(data, folder) as file:
            for tensor in file.tensors.values():
                assert tensor.data.shape[1] == row_bytes(tensor.format, tensor.shape[-1])
                tensor.data.sum()
            repr(file.metadata)
    except PellucidError as error:
        return error.param is not None and str(folder) in error.message
    except Exception:
        return False
    return True


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_was_written(version, tmp_path):
    tensors = sample_tensors()
    with GGUFFile.open(write_gguf(tmp_path / "a.gguf", METADATA, tensors, version=version)) as file:
        assert file.version == version
        assert file.path == tmp_path / "a.gguf"
        assert list(file.metadata) == list(METADATA)
        for key, value in METADATA.items():
            found = file.metadata[key]
            if isinstance(found, np.ndarray):
                assert np.array_equal(found, np.asarray(value))
            elif isinstance(value, float):
                assert found == pytest.approx(value)
            else:
                assert found == value
                assert type(found) is type(value if not isinstance(value, np.generic) else value.item())
        assert list(file.tensors) == list(tensors)
        norm, weight, cube = file.tensors.values()
        assert (norm.format, norm.shape, norm.data.shape) == (BlockFormat.F32, (8,), (1, 32))
        assert (weight.format, weight.shape, weight.data.shape) == (BlockFormat.Q4_1, (4, 64), (4, 40))
        assert (cube.format, cube.shape, cube.data.shape) == (BlockFormat.Q8_0, (2, 3, 32), (6, 34))
        assert np.array_equal(norm.data.view(np.float32)[0], tensors["norm"])
        assert np.array_equal(weight.data, tensors["weight"].data)
        assert np.array_equal(cube.data, tensors["cube"].data)


def test_gguf_package_reads_the_same(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", METADATA | {"none": ["x"]}, sample_tensors())
    with GGUFFile.open(path) as file:
        assert_equals_oracle(file)


@pytest.mark.parametrize("alignment", [8, 24, 64, 4096])
def test_alignment_is_honoured(alignment, tmp_path):
    tensors = sample_tensors()
    path = write_gguf(tmp_path / "a.gguf", METADATA | {"general.alignment": alignment}, tensors)
    with GGUFFile.open(path) as file:
        assert np.array_equal(file.tensors["cube"].data, tensors["cube"].data)


def test_a_file_without_tensors(tmp_path):
    with GGUFFile.open(write_gguf(tmp_path / "vocab.gguf", METADATA)) as file:
        assert file.tensors == {}


def test_data_is_a_read_only_view_that_outlives_the_file(tmp_path):
    with GGUFFile.open(write_gguf(tmp_path / "a.gguf", METADATA, sample_tensors())) as file:
        data = file.tensors["weight"].data
        copy = data.copy()
        assert not data.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            data[0, 0] = 1
    assert file.tensors == {}
    assert np.array_equal(data, copy)
    file.close()


def resident_bytes(path: Path) -> int:
    """Resident bytes of this process's mappings of `path`."""
    resident, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return resident


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_release_drops_the_pages_and_keeps_the_data(tmp_path):
    megabyte = np.ones(1 << 18, np.float32)
    path = write_gguf(tmp_path / "a.gguf", {}, {"a": megabyte, "b": 2 * megabyte, "c": megabyte})
    with GGUFFile.open(path) as file:
        for tensor in file.tensors.values():
            tensor.data.sum()
        before = resident_bytes(path)
        file.release(file.tensors["b"].data)
        assert before - resident_bytes(path) >= (1 << 20) - 8192  # pages at both ends are shared with neighbours
        assert (file.tensors["a"].data.view(np.float32) == 1).all()
        assert (file.tensors["b"].data.view(np.float32) == 2).all()
        copy = encode(3 * megabyte).data
        file.release(copy)
        assert (copy.view(np.float32) == 3).all()


def test_opens_a_large_vocabulary_in_a_few_steps_a_token(tmp_path):
    count = 20_000
    metadata = {
        "tokens": [f"token {index}" for index in range(count)],
        "scores": np.zeros(count, np.float32),
        "types": np.ones(count, np.int32),
    }
    path = write_gguf(tmp_path / "vocab.gguf", metadata)
    files: list[GGUFFile] = []
    assert count_steps(lambda: files.append(GGUFFile.open(path))) < 10 * count
    with files[0] as file:
        assert file.metadata["tokens"][-1] == f"token {count - 1}"


HOSTILE = {
    "other magic": (b"GGML" + SAMPLE[4:], "magic"),
    "no tensor count": (SAMPLE[:12], "tensor_count"),
    "tensor count": (SAMPLE[:8] + u64(2**64 - 1) + SAMPLE[16:], "tensor_count"),
    "more tensors than there are": (SAMPLE[:8] + u64(30) + SAMPLE[16:], "tensor name 3 length"),
    "metadata count": (SAMPLE[:16] + u64(2**63) + SAMPLE[24:], "metadata_kv_count"),
    "key length 0": (SAMPLE[:24] + u64(0) + SAMPLE[32:], "metadata key 0 length"),
    "key length": (SAMPLE[:24] + u64(2**64 - 20) + SAMPLE[32:], "metadata key 0 length"),
    "key not UTF-8": (SAMPLE.replace(b"aaa.one", b"aaa.\xffne"), "metadata key 1"),
    "key that controls the terminal": (SAMPLE.replace(b"aaa.one", b"aaa.\x1b[m"), "metadata key 1"),
    "key twice": (SAMPLE.replace(b"aaa.two", b"aaa.one"), "aaa.one"),
    "value type": (patched(SAMPLE, b"aaa.one", 0, u32(13)), "aaa.one type"),
    "bool 2": (patched(SAMPLE, b"aaa.one", 4, b"\x02"), "aaa.one"),
    "bool 2 in an array": (patched(SAMPLE, b"flags", 16, b"\x02"), "flags"),
    "string length": (patched(SAMPLE, b"general.architecture", 4, u64(2**64 - 1)), "general.architecture"),
    "string not UTF-8": (SAMPLE.replace(b"llama\x07", b"ll\xc3\xc3a\x07"), "general.architecture"),
    "element type": (patched(SAMPLE, b"scores", 4, u32(13)), "scores element type"),
    "array length": (patched(SAMPLE, b"scores", 8, u64(2**62)), "scores length = 4611686018427387904"),
    "strings": (patched(SAMPLE, b"tokens", 8, u64(2**61)), "tokens length = 2305843009213693952"),
    "token length": (patched(SAMPLE, b"tokens", 16, u64(2**64 - 8)), "tokens[0]"),
    "token not UTF-8": (SAMPLE.replace("é".encode(), b"\xc3\xff"), "tokens[1]"),
    "tensor name length": (patched(SAMPLE, b"norm", -12, u64(65)), "tensor name 0 length"),
    "tensor name twice": (
        gguf_bytes({}, {"norm": np.ones(8), "morn": np.ones(8)}).replace(b"morn", b"norm"),
        "norm",
    ),
    "rank 0": (patched(SAMPLE, b"norm", 0, u32(0)), "norm dimension count"),
    "rank 5": (patched(SAMPLE, b"norm", 0, u32(5)), "norm dimension count"),
    "zero dimension": (patched(SAMPLE, b"norm", 4, u64(0)), "norm shape"),
    "shape past the end": (patched(SAMPLE, b"cube", 20, u64(2**10)), "cube offset"),
    "shape of 2^189 elements": (patched(SAMPLE, b"cube", 4, u64(2**63) * 3), "cube offset"),
    "half a block": (patched(SAMPLE, b"weight", 4, u64(48)), "weight shape"),
    "offset not aligned": (patched(SAMPLE, b"weight", 24, u64(33)), "weight offset"),
    "offset past the end": (patched(SAMPLE, b"weight", 24, u64(2**64 - 32)), "weight offset"),
    "overlap": (patched(SAMPLE, b"cube", 32, u64(32)), "cube offset"),
    "alignment 0": (gguf_bytes({"general.alignment": 32}).replace(u32(32), u32(0)), "general.alignment"),
    "alignment 12": (gguf_bytes({"general.alignment": 32}).replace(u32(32), u32(12)), "general.alignment"),
    "alignment true": (gguf_bytes({"general.alignment": True}), "general.alignment"),
    "data cut off": (SAMPLE[:-40], "cube offset"),
    "no data": (SAMPLE[:HEADER_BYTES], "norm offset"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_field_is_named(case, tmp_path):
    data, field = HOSTILE[case]
    with pytest.raises(ModelFileError) as caught:
        open_bytes(data, tmp_path)
    assert caught.value.param == field
    assert field in caught.value.message
    assert "case.gguf" in caught.value.message


UNSUPPORTED = {
    "version 1": (b"GGUF" + u32(1) + SAMPLE[8:], "version 1;"),
    "version 4": (b"GGUF" + u32(4) + SAMPLE[8:], "version 4;"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + SAMPLE[8:], "big-endian"),
    "tensor type of ggml": (patched(SAMPLE, b"weight", 20, u32(10)), "tensor weight is Q2_K; supported are F32, "),
    "tensor type of nobody": (patched(SAMPLE, b"weight", 20, u32(999)), "tensor weight is unknown type 999"),
    "nested arrays": (patched(SAMPLE, b"scores", 4, u32(9)), "scores: nested arrays"),
    "one part of several": (gguf_bytes({"split.count": np.uint16(3)}), "one of 3 parts"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_sound_but_unsupported_is_named(case, tmp_path):
    data, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModelError) as caught:
        open_bytes(data, tmp_path)
    assert message in caught.value.message


def test_a_header_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_MAX_HEADER_BYTES", 64)
    with pytest.raises(ModelFileError, match="header limit"):
        open_bytes(SAMPLE, tmp_path)


def test_paths_that_are_no_model_files(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no such file.*missing\.gguf"):
        GGUFFile.open(tmp_path / "missing.gguf")
    with pytest.raises(ModelFileError, match="not a file"):
        GGUFFile.open(tmp_path)
    with pytest.raises(ModelFileError, match="cannot read"):
        GGUFFile.open("a\0b")
    with pytest.raises(ModelFileError, match="cannot read"):
        GGUFFile.open(tmp_path / ("x" * 5000))
    with pytest.raises(ModelFileError, match="too short"):
        open_bytes(b"", tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match="not a file"):
        GGUFFile.open(tmp_path / "pipe.gguf")


def test_a_file_cut_at_every_byte_is_refused(tmp_path):
    for size in range(len(SAMPLE)):
        if SAMPLE[size:].strip(b"\0"):  # the padding at the end may be missing
            with pytest.raises(PellucidError):
                open_bytes(SAMPLE[:size], tmp_path)
            assert survives(SAMPLE[:size], tmp_path)


@pytest.mark.parametrize("change", [1, 255, 127, 128])
def test_every_header_byte_changed_is_survived(change, tmp_path):
    """Covers each field +-1 and its largest bytes."""
    tracemalloc.start()
    try:
        for position in range(HEADER_BYTES):
            data = bytearray(SAMPLE)
            data[position] = (data[position] + change) % 256
            assert survives(bytes(data), tmp_path), position
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@given(
    edits=st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.binary(min_size=1, max_size=9)), max_size=6),
    size=st.one_of(st.just(len(SAMPLE)), st.integers(0, len(SAMPLE))),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_is_survived(edits, size, tmp_path):
    data = bytearray(SAMPLE)
    for position, value in edits:
        data[position : position + len(value)] = value
    tracemalloc.start()
    try:
        assert survives(bytes(data[:size]), tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("check", ["require", "_check_extents", "fail"])
def test_damage_is_noticed_where_a_check_is_missing(check, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf if check.startswith("_") else gguf._Header, check, lambda *args: None)
    damaged = [SAMPLE[:size] for size in range(8, HEADER_BYTES + 64)]
    assert not all(survives(data, tmp_path) for data in damaged)


def assert_equals_oracle(file: GGUFFile) -> None:
    reader = oracle.GGUFReader(str(file.path))
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for key, field in fields.items():
        found = file.metadata[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents()
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for expected, found in zip(reader.tensors, file.tensors.values(), strict=True):
        assert int(expected.tensor_type) == found.format
        assert expected.shape.tolist()[::-1] == list(found.shape)
        assert np.array_equal(np.ascontiguousarray(expected.data).view(np.uint8).reshape(found.data.shape), found.data)


@pytest.mark.slow
@pytest.mark.parametrize("entry", catalog.entries(), ids=lambda entry: entry.name)
def test_a_real_file_equals_the_gguf_package(entry):
    if not catalog.is_cached(entry):
        pytest.skip(f"{entry.name} is not in the cache: pellucid pull {entry.name}")
    with GGUFFile.open(catalog.cached_path(entry)) as file:
        assert_equals_oracle(file)
        for tensor in file.tensors.values():
            rows = tensor.data[:64]
            expected = oracle.quants.dequantize(rows, oracle.GGMLQuantizationType(int(tensor.format)))
            assert np.array_equal(dequantize(rows, tensor.format), expected)
