"""The output of a batch: torn anywhere, it goes on; nothing is lost, nothing is there twice."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError, StorageError
from pellucid.server.batch import batch_output
from pellucid.server.batch.batch_output import FileOutput, Identity, encode_line

NUM_REQUESTS = 12
IDENTITY = Identity({"seed": 1, "input_sha256": "ab"})
RESOLVED = {"backend": "cpu"}


def answer_to(index: int, identity: Identity = IDENTITY) -> dict[str, Any]:
    response = {
        "status_code": 400 if index == 3 else 200,
        "body": {"text": f"é{index}\n" * 20, "error": {"message": "no"}},
    }
    return {"id": identity.answer_id(index), "custom_id": f"c{index}", "response": response, "error": None}


def answer_all(path: Path, *, order: list[int], stop_after: int | None = None) -> list[int]:
    """Answers what is not answered yet, in `order`; at most `stop_after` of it. What it answered."""
    answered = []
    with FileOutput(path, IDENTITY, NUM_REQUESTS) as output:
        if output.is_complete:
            return []
        output.begin(RESOLVED)
        for index in order:
            if len(answered) == stop_after:
                return answered
            if not output.is_done(index):
                output.write(index, answer_to(index))
                answered.append(index)
        assert output.tally.num_failed == 1
        assert output.tally.first_failure == (3, "c3", "no")
        output.finish()
    return answered


WHOLE = b"".join(encode_line(answer_to(index)) for index in range(NUM_REQUESTS))
ORDER = random.Random(0).sample(range(NUM_REQUESTS), NUM_REQUESTS)


def test_the_answers_are_in_the_order_of_the_requests(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert answer_all(out, order=ORDER) == ORDER
    assert out.read_bytes() == WHOLE
    assert os.listdir(tmp_path) == ["out.jsonl"]
    before = out.stat().st_mtime_ns
    assert answer_all(out, order=ORDER) == []
    assert out.stat().st_mtime_ns == before
    assert os.listdir(tmp_path) == ["out.jsonl"]


def check_torn_anywhere(tmp_path: Path) -> None:
    """AssertionError where a journal cut at some byte does not lead to the whole file, or work is done twice."""
    out = tmp_path / "out.jsonl"
    answer_all(out, order=ORDER, stop_after=8)
    assert not out.exists()
    journal = (tmp_path / "out.jsonl.partial").read_bytes()
    header, *lines = journal.splitlines(keepends=True)
    ends = [len(header) + sum(map(len, lines[:count])) for count in range(len(lines) + 1)]
    cuts = {*ends, *(end + 1 for end in ends[:-1]), *(end - 1 for end in ends[1:])}
    for cut in sorted({*cuts, *random.Random(1).sample(range(len(header), len(journal)), 10)}):
        out.unlink(missing_ok=True)
        (tmp_path / "out.jsonl.partial").write_bytes(journal[:cut])
        whole = sum(end <= cut for end in ends) - 1
        answered = answer_all(out, order=ORDER, stop_after=2)  # and stopped a second time
        answered += answer_all(out, order=ORDER)
        assert answered == ORDER[whole:], cut
        assert out.read_bytes() == WHOLE, cut


def test_a_journal_torn_at_any_byte_goes_on(tmp_path: Path) -> None:
    check_torn_anywhere(tmp_path)


@pytest.mark.parametrize("mutant", ["no truncation", "torn lines count", "appends to what is torn"])
def test_the_check_catches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    if mutant == "torn lines count":
        monkeypatch.setattr(batch_output, "_entry", lambda line: (int(line.split(b" ")[0] or 0), answer_to(ORDER[0])))
    elif mutant == "no truncation":
        monkeypatch.setattr(FileOutput, "_resume", lambda self: None)
    else:
        original = FileOutput._open_journal

        def at_the_end(self: FileOutput, end: int) -> None:
            original(self, max(end, self.journal_path.stat().st_size))

        monkeypatch.setattr(FileOutput, "_open_journal", at_the_end)
    with pytest.raises((AssertionError, ValueError)):
        check_torn_anywhere(tmp_path)


def test_zeros_that_a_power_cut_left_are_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answer_all(out, order=ORDER, stop_after=5)
    with (tmp_path / "out.jsonl.partial").open("ab") as journal:
        journal.write(b"\0" * 100 + b"\n" + b'3 {"id": "other"}\n')
    assert answer_all(out, order=ORDER) == ORDER[5:]
    assert out.read_bytes() == WHOLE


def test_a_kill_between_the_last_answer_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(FileOutput, "finish", lambda self: None)
        answer_all(out, order=ORDER)
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl.lock", "out.jsonl.partial"]
    (tmp_path / "out.jsonl.new").write_bytes(WHOLE[:100])
    assert answer_all(out, order=ORDER) == []
    assert out.read_bytes() == WHOLE
    assert os.listdir(tmp_path) == ["out.jsonl"]
    (tmp_path / "out.jsonl.partial").write_bytes(b"left over by a kill after the renaming")
    assert answer_all(out, order=ORDER) == []
    assert os.listdir(tmp_path) == ["out.jsonl"]


def refusal(out: Path, identity: Identity = IDENTITY, num_requests: int = NUM_REQUESTS) -> str:
    with pytest.raises(InvalidRequestError) as caught, FileOutput(out, identity, num_requests):
        pass
    assert caught.value.param == "output"
    return caught.value.message


def test_another_run_is_refused_by_what_is_different(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answer_all(out, order=ORDER, stop_after=5)
    journal = (tmp_path / "out.jsonl.partial").read_bytes()
    text = refusal(out, Identity({"seed": 2, "input_sha256": "ab"}))
    assert "seed 1 (now 2)" in text
    assert "input" not in text
    assert "delete it to begin again" in text
    assert "input_sha256 'ab' (now None)" in refusal(out, Identity({"seed": 1}))
    assert (tmp_path / "out.jsonl.partial").read_bytes() == journal
    answer_all(out, order=ORDER)
    assert "not the result of this command" in refusal(out, Identity({"seed": 2, "input_sha256": "ab"}))
    ids_only = b"".join(b'{"id": "%s"}\n' % IDENTITY.answer_id(index).encode() for index in range(NUM_REQUESTS))
    for other in (ids_only, WHOLE[:-1] + b"x\n", WHOLE + b"{}\n", WHOLE.splitlines(keepends=True)[0], b"", b"hello\n"):
        out.write_bytes(other)
        assert "is there already" in refusal(out)
        assert out.read_bytes() == other


def test_what_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    for text in (b"", b"hello\n", b"{}\n", b'{"pellucid_batch": 1, "resolved": {}}\n', b"[" * 100_000 + b"\n"):
        (tmp_path / "out.jsonl.partial").write_bytes(text)
        assert "is not the journal of a batch" in refusal(tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl.partial").read_bytes() == text


def test_what_was_resolved_is_told_again(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answer_all(out, order=ORDER, stop_after=2)
    with FileOutput(out, IDENTITY, NUM_REQUESTS) as output:
        assert output.resolved == RESOLVED
        output.begin({"backend": "other"})
        assert output.resolved == RESOLVED
        assert output.tally.num_done == 2


def test_a_second_process_is_kept_away(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with FileOutput(out, IDENTITY, NUM_REQUESTS) as output:
        output.begin(RESOLVED)
        with pytest.raises(StorageError, match="another process is at work"), FileOutput(out, IDENTITY, NUM_REQUESTS):
            pass
    with FileOutput(out, IDENTITY, NUM_REQUESTS):
        pass


def test_a_full_disk_keeps_what_was_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    append = FileOutput._append
    room = [4]

    def limited(self: FileOutput, line: bytes) -> None:
        room[0] -= 1
        if room[0] < 0:
            append(self, line[:30])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(FileOutput, "_append", limited)
        with pytest.raises(StorageError, match=r"disk of .* is full: free some space and run the same command again"):
            answer_all(out, order=ORDER)
    assert answer_all(out, order=ORDER) == ORDER[4:]
    assert out.read_bytes() == WHOLE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    for path in (Path("/dev/full"), tmp_path):
        assert "is not a file" in refusal(path)
    with pytest.raises(StorageError, match="cannot write"), FileOutput(tmp_path / "gone" / "out", IDENTITY, 1):
        pass


def test_names_tell_runs_and_requests_apart() -> None:
    names = {Identity({"seed": seed}).name(index) for seed in range(10) for index in range(10)}
    assert len(names) == 100
    assert Identity({"a": 1, "b": 2}).name(0) == Identity({"b": 2, "a": 1}).name(0)


def test_a_lone_surrogate_can_be_written() -> None:
    line = encode_line({"param": "\ud800é"})
    assert line == b'{"param":"\\ud800\xc3\xa9"}\n'
    assert json.loads(line) == {"param": "\ud800é"}
