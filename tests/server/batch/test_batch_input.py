"""The input file of a batch: every line a request with an id of its own, or the file is refused."""

from __future__ import annotations

import io
import json
import tracemalloc

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.server.batch import batch_input
from pellucid.server.batch.batch_input import BatchInput


def read(data: bytes) -> list[tuple[int, int, str]]:
    return [(line.index, line.number, line.custom_id) for line in BatchInput(io.BytesIO(data), "in").lines()]


def problem(data: bytes) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        BatchInput(io.BytesIO(data), "in.jsonl")
    assert caught.value.param == "input"
    return caught.value.message


A, B = b'{"custom_id": "a"}', b'{"custom_id": "b"}'


@pytest.mark.parametrize(
    ("data", "numbers"),
    [
        (A + b"\n" + B + b"\n", (1, 2)),
        (A + b"\n" + B, (1, 2)),
        (A + b"\r\n" + B + b"\r\n", (1, 2)),
        (b"\xef\xbb\xbf" + A + b"\n" + B, (1, 2)),
        (b"\n \n" + A + b"\n\t\r\n\n" + B + b"\n\n", (3, 6)),
    ],
)
def test_lines(data: bytes, numbers: tuple[int, int]) -> None:
    assert read(data) == [(0, numbers[0], "a"), (1, numbers[1], "b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON: "),
        (b"[1]", "a JSON object is expected, not [1]"),
        (b'{"custom_id": "c"} {}', "not valid JSON: Extra data"),
        (b'{"custom_id": "a"}', "custom_id 'a' is that of line 1 too"),
        (b'{"method": "POST"}', "custom_id must be a string that is not empty; it is missing"),
        (b'{"custom_id": ""}', "not ''"),
        (b'{"custom_id": 5}', "not 5"),
        (b'{"custom_id": "\\ud800"}', "lone surrogate"),
        (b'{"custom_id": "c", "x": NaN}', "NaN is no number"),
        (b'{"custom_id": "c", "x": 1' + b"0" * 5000 + b"}", "digits"),
        (b'{"custom_id": "c", "x": {"y": 1, "y": 2}}', "the key 'y' comes twice"),
        (b'{"custom_id": "c", "x": ' + b"[" * 100_000, "nests too deeply"),
        (b'{"custom_id": "\xff"}', "not valid UTF-8: invalid start byte at byte 15"),
        ('{"custom_id": "c"}'.encode("utf-16"), "not valid UTF-8"),
    ],
)
def test_a_line_that_is_no_request_refuses_the_file(line: bytes, message: str) -> None:
    text = problem(A + b"\n" + line + b"\n")
    assert text.startswith("in.jsonl is not a batch file; nothing was computed:\n  line 2: ")
    assert message in text


def test_only_the_first_problems_are_listed() -> None:
    lines = problem(b"x\n" * 100).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  and 90 more"


@pytest.mark.parametrize("data", [b"", b"\n\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_a_request(data: bytes) -> None:
    assert "has no request" in problem(data)


def test_a_line_that_is_too_long_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_input, "MAX_LINE_BYTES", 100_000)
    long = b'{"custom_id": "' + b"x" * 5_000_000 + b'"}'
    data = io.BytesIO(A + b"\n" + long + b"\n" + B + b"\n")
    tracemalloc.start()
    with pytest.raises(InvalidRequestError, match="line 2: longer than 100,000 bytes") as caught:
        BatchInput(data, "in")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "line 3" not in caught.value.message
    assert peak < 1_000_000


@pytest.mark.parametrize("other", [A + b"\n" + b'{"custom_id": "c"}', A, b"x", A + b"\n" + B + b"\n"])
def test_a_file_that_changes_is_noticed(other: bytes) -> None:
    file = io.BytesIO(A + b"\n" + B)
    requests = BatchInput(file, "in")
    file.seek(0)
    file.truncate()
    file.write(other)
    with pytest.raises(InvalidRequestError, match="was changed while it was read"):
        list(requests.lines())


def test_it_is_read_as_it_is_asked_for() -> None:
    data = b"".join(json.dumps({"custom_id": f"c{number}", "x": "y" * 1000}).encode() + b"\n" for number in range(2000))
    requests = BatchInput(io.BytesIO(data), "in")
    tracemalloc.start()
    for line in requests.lines():
        assert line.fields["x"]
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
