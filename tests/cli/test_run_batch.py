"""`pellucid run-batch`: killed at any moment, it goes on; and what it says."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pellucid.cli.main import main
from pellucid.engine.llm_engine import LLMEngine
from pellucid.server.batch.batch_output import FileOutput
from pellucid.weights.cache import exclusive

pytestmark = pytest.mark.filterwarnings("ignore:the native core is not installed")

NUM_REQUESTS = 60


def line(number: int, **body: Any) -> dict[str, Any]:
    if number % 3:
        url = "/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": f"number {number}"}], **body}
    else:
        url, body = "/v1/completions", {"prompt": [f"number {number}", "another"], "logprobs": 1, **body}
    body = {"model": "tiny", "max_tokens": 5 + number * 7 % 60, "ignore_eos": True, **body}
    if number % 4 == 0:
        body["temperature"] = 0
    if number == 7:
        body["tools"] = ["hammer"]
    return {"custom_id": f"request-{number}", "method": "POST", "url": url, "body": body}


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line(number)) + "\n" for number in range(NUM_REQUESTS)))
    return path


def command(model: str, *arguments: object) -> list[str]:
    options = ["--model", model, "--served-model-name", "tiny", "--threads", "1"]
    return [sys.executable, "-m", "pellucid", "run-batch", *map(str, arguments), *options]


def run(model: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(model, *arguments), capture_output=True, text=True, timeout=120, **options)


def answers_in(data: bytes) -> list[bytes]:
    """The whole answers of a file or of a journal, without the time at which they were given."""
    lines = [re.sub(rb"^\d+ ", b"", each) for each in data.splitlines(keepends=True) if b'"custom_id"' in each[:80]]
    return [re.sub(rb'"created":\d+', b"", each) for each in lines if each.endswith(b"\n")]


def kill_after(num_answers: int, process: subprocess.Popen[bytes], journal: Path) -> None:
    """Kill a run some time after its journal has so many answers, unless it ends before."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and len(answers_in(journal.read_bytes())) >= num_answers:
            time.sleep(random.uniform(0, 0.02))
            break
        time.sleep(0.002)
    process.kill()
    process.wait()


def test_killed_again_and_again_it_loses_nothing_and_does_nothing_twice(
    chat_model: str, requests: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.partial"
    assert run(chat_model, requests, whole).returncode == 0
    expected = answers_in(whole.read_bytes())
    assert len(expected) == NUM_REQUESTS
    kept: list[bytes] = []
    for num_answers in (0, 1, 9, 30):
        kill_after(num_answers, subprocess.Popen(command(chat_model, requests, out)), journal)
        if out.exists():  # a busy machine may let the run go on to its end before it is killed
            break
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        assert lines[: len(kept)] == kept  # what was answered is still there, with the time of its first answer
        kept = [each for each in lines if each.endswith(b"\n")]
    result = run(chat_model, requests, out)
    assert result.returncode == 0, result.stderr
    assert answers_in(out.read_bytes()) == expected
    final = set(out.read_bytes().splitlines(keepends=True))
    assert all(each.partition(b" ")[2] in final for each in kept[1:])
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "whole.jsonl"]
    again = run(chat_model, requests, out)
    assert (again.returncode, again.stderr) == (0, f"{out} is complete: all 60 requests were answered\n")


@pytest.fixture
def batch(chat_model: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `run-batch` in this process; (exit code, standard output, standard error)."""

    def run(*arguments: object, names: tuple[str, ...] = ("tiny",)) -> tuple[int, str, str]:
        options = [option for name in names for option in ("--served-model-name", name)]
        code = main(["run-batch", *map(str, arguments), "--model", chat_model, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def few(tmp_path: Path) -> Path:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(line(number, max_tokens=4)) + "\n" for number in range(6, 10)))
    return path


def test_the_summary(batch, few: Path, tmp_path: Path) -> None:
    code, out, err = batch(few, tmp_path / "out.jsonl", "--no-progress")
    assert (code, out) == (0, "")
    first, second = err.splitlines()
    assert re.match(
        r"4 requests, 1 failed; \d+ prompt tokens \(\d+% cached\) and 20 output tokens in [\d.]+ s: ", first
    )
    assert second == "the first failure, 'request-7': tools[0] must be an object, not 'hammer'"


def test_progress_is_shown(batch, few: Path, tmp_path: Path) -> None:
    assert re.search(r"^requests 4/4, .* tok/s out", batch(few, tmp_path / "out.jsonl")[2], re.MULTILINE)


def test_standard_input_and_output(batch, few: Path, tmp_path: Path, pipe_in) -> None:
    batch(few, tmp_path / "out.jsonl")
    expected = answers_in((tmp_path / "out.jsonl").read_bytes())
    pipe_in(few.read_bytes())
    code, out, _ = batch("-", "-")
    assert code == 0
    assert len(out.splitlines()) == 4
    pipe_in(few.read_bytes())
    assert batch("-", tmp_path / "piped.jsonl")[0] == 0
    assert answers_in((tmp_path / "piped.jsonl").read_bytes()) == expected
    assert sorted(answers_in(out.encode())) == sorted(expected)


def test_an_interrupt_says_how_to_go_on(batch, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    batch(requests, whole)
    step = LLMEngine.step
    num_steps = 0

    def interrupted(self: LLMEngine) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 30:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(LLMEngine, "step", interrupted)
        code, _, err = batch(requests, out)
    found = re.search(
        r"interrupted: (\d+) of 60 requests are answered; the same command goes on from there$", err.strip()
    )
    assert code == 130
    assert found
    assert 1 < int(found[1]) < NUM_REQUESTS
    assert not out.exists()
    code, _, err = batch(requests, out)
    assert code == 0
    assert f"60 requests ({found[1]} of them before), 1 failed" in err
    assert answers_in(out.read_bytes()) == answers_in(whole.read_bytes())


def test_stopped_when_all_is_answered_it_needs_no_model_to_end(
    batch, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"

    def stopped(self: FileOutput) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FileOutput, "finish", stopped)
        code, _, err = batch(few, out)
    assert code == 130
    assert "4 of 4 requests are answered; the same command goes on from there" in err
    monkeypatch.setattr("pellucid.cli.session.load_llm", None)
    for _ in range(2):
        assert batch(few, out) == (0, "", f"{out} is complete: all 4 requests were answered\n")
        assert sorted(os.listdir(tmp_path)) == ["few.jsonl", "out.jsonl"]


def test_a_second_process_is_turned_away(batch, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with exclusive(tmp_path / "out.jsonl.lock", None):
        code, _, err = batch(few, out)
    assert (code, out.exists()) == (2, False)
    assert "another process is at work" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", "5"), "seed 0 (now 5)"),
        (("--kv-cache-dtype", "f32"), "kv_cache_dtype 'f16' (now 'f32')"),
        (("--max-model-len", "100"), "max_model_len None (now 100)"),
    ],
)
def test_a_run_with_other_options_is_refused(
    batch, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(LLMEngine, "step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, err = batch(few, out)
    assert (code, out.exists()) == (130, False)
    assert "interrupted: 1 of 4 requests are answered" in err
    code, _, err = batch(few, out, *options)
    assert code == 2
    assert message in err
    few.write_text(few.read_text() + "\n")
    assert "input_sha256" in batch(few, out)[2]


def test_a_file_that_is_no_batch_is_refused_before_the_model_is_loaded(batch, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pellucid.cli.session.load_llm", None)
    (tmp_path / "in.jsonl").write_text('{"custom_id": "a"}\nhello\n')
    code, _, err = batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert code == 2
    assert "line 2: the line is not valid JSON" in err
    assert os.listdir(tmp_path) == ["in.jsonl"]
    code, _, err = batch(tmp_path / "gone.jsonl", tmp_path / "out.jsonl")
    assert (code, err) == (2, f"error: No such file or directory: {tmp_path / 'gone.jsonl'}\n")
    assert batch(tmp_path / "in.jsonl", "-", "--seed", "-1")[0] == 2


def test_the_output_is_not_the_input(batch, few: Path) -> None:
    before = few.read_bytes()
    code, _, err = batch(few, few)
    assert code == 2
    assert "is there already" in err
    assert few.read_bytes() == before


def test_names_of_the_model(batch, few: Path, tmp_path: Path) -> None:
    for name, names, statuses in (("a", ("other", "tiny"), [200, 400, 200, 200]), ("b", (), [404, 400, 404, 404])):
        batch(few, tmp_path / name, names=names)
        answers = [json.loads(each) for each in (tmp_path / name).read_bytes().splitlines()]
        assert [answer["response"]["status_code"] for answer in answers] == statuses


def test_answers_look_as_their_requests_ask(batch, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    described = {"name": "thing", "schema": schema}
    asked: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": described}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "strin"}}}},
        {"structured_outputs": {"regex": "[0-9]{4}"}, "n": 2},
    ]
    bodies = [{"messages": [{"role": "user", "content": "hi"}], "ignore_eos": False, **each} for each in asked]
    requests = [{**line(1), "custom_id": str(number)} for number in range(len(bodies))]
    for request, body in zip(requests, bodies, strict=True):
        request["body"] = {"model": "tiny", "max_tokens": 30, **body}
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    assert batch(path, out, "--no-progress")[0] == 0
    responses = [json.loads(answer)["response"] for answer in out.read_text().splitlines()]
    assert [response["status_code"] for response in responses] == [200, 200, 400, 200]
    said = [[choice["message"]["content"] for choice in each["body"].get("choices", ())] for each in responses]
    assert json.loads(said[0][0])["a"] in (1, 2)
    assert said[1][0] in ("yes", "no")
    assert responses[2]["body"]["error"]["message"] == "structured_outputs.json: Invalid type: strin"
    assert all(re.fullmatch("[0-9]{4}", text) for text in said[3])
    assert len(said[3]) == 2
