"""A batch through an LLM over the fake backend: every line one answer, whatever is in it."""

from __future__ import annotations

import gc
import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pellucid import LLM, SamplingParams
from pellucid.engine.progress import GenerateProgress
from pellucid.server.batch import batch
from pellucid.server.batch.batch import Batch
from pellucid.server.batch.batch_input import BatchInput
from pellucid.server.batch.batch_output import Identity, Tally
from pellucid.weights.catalog import DEFAULT_MODEL
from tests.support.chat_models import write_chat_model
from tests.support.engines import load_fake_backend
from tests.support.fake_backend import FakeBackend

IDENTITY = Identity({"seed": 1})


class Collected:
    """A BatchOutput in memory."""

    def __init__(self, done: set[int] | None = None) -> None:
        self.done = done or set()
        self.answers: dict[int, dict[str, Any]] = {}
        self.tally = Tally()

    def is_done(self, index: int) -> bool:
        return index in self.done

    def write(self, index: int, answer: dict[str, Any]) -> None:
        assert index not in self.answers, "answered twice"
        self.answers[index] = answer


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    return load_fake_backend(monkeypatch)


@pytest.fixture
def llm(backend: FakeBackend) -> Iterator[LLM]:
    with LLM("fake", max_num_seqs=4) as llm:
        yield llm


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}}


def run(llm: LLM, lines: list[dict[str, Any]], *, done: set[int] | None = None, seed: int = 0) -> Collected:
    batch_input = BatchInput(io.BytesIO(b"\n".join(json.dumps(each).encode() for each in lines)), "in")
    output = Collected(done)
    work = Batch(
        llm, batch_input, output, IDENTITY, served_model_names=["m", "also"], seed=seed, clock=lambda: 1_700_000_000.5
    )
    work.run(GenerateProgress(len(lines), False))
    assert not work._pending
    return output


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["response"]["body"]["choices"]]


def test_an_answer(llm: LLM) -> None:
    (answer,) = run(llm, [line("a", prompt="hello", temperature=0, max_tokens=5)]).answers.values()
    (expected,) = llm.generate("hello", SamplingParams(temperature=0, max_tokens=5))
    name = IDENTITY.name(0)
    completion = expected.outputs[0]
    assert answer == {
        "id": f"batch_req_{name}",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": f"req_{name}",
            "body": {
                "id": f"cmpl-{name}",
                "object": "text_completion",
                "created": 1_700_000_000,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "text": completion.text,
                        "logprobs": None,
                        "finish_reason": completion.finish_reason,
                        "stop_reason": None,
                    }
                ],
                "usage": {
                    "prompt_tokens": 5,
                    "completion_tokens": len(completion.token_ids),
                    "total_tokens": 5 + len(completion.token_ids),
                },
            },
        },
        "error": None,
    }


def test_parameters_of_every_kind(llm: LLM) -> None:
    lines = [
        line("best", prompt="hello", best_of=3, n=2, logprobs=0, seed=3, ignore_eos=True),
        line("echo", prompt="hello", echo=True, max_tokens=0, logprobs=1),
        line("words", prompt="hello", bad_words=["a", "bc"], banned_token_ids=[4], prompt_logprobs=1, strip=True),
        line("none", prompt="hello", allowed_token_ids=[4], banned_token_ids=[4]),
    ]
    best, echo, words, none = (answer["response"] for _, answer in sorted(run(llm, lines).answers.items()))
    assert [choice["index"] for choice in best["body"]["choices"]] == [0, 1]
    assert best["body"]["usage"]["completion_tokens"] == 3 * 16
    means = [sum(choice["logprobs"]["token_logprobs"]) for choice in best["body"]["choices"]]  # of 16 tokens each
    assert means[0] > means[1]
    (choice,) = echo["body"]["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("hello", list("hello"))
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert max(choice["logprobs"]["token_logprobs"][1:]) < 0
    (choice,) = words["body"]["choices"]
    assert not {"a", "d"} & {*choice["text"]}
    assert [entry is None for entry in choice["prompt_logprobs"]] == [True] + [False] * 4
    assert (none["status_code"], none["body"]["error"]["param"]) == (400, "allowed_token_ids")


def test_a_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    lines = [line("a", "/v1/chat/completions", messages=messages, temperature=0, max_completion_tokens=5, n=2)]
    (answer,) = run(llm, lines).answers.values()
    (expected,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=5, n=2))
    choices = answer["response"]["body"]["choices"]
    assert [choice["message"]["content"] for choice in choices] == [each.text for each in expected.outputs]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"method": "GET"}, 400, "method"),
        ({"method": None}, 400, "method"),
        ({"url": "/v1/embeddings"}, 400, "url"),
        ({"url": ["/v1/completions"]}, 400, "url"),
        ({"body": None}, 400, "body"),
        ({"body": []}, 400, "body"),
        ({"priority": 3}, 400, "priority"),
        ({"\ud800": 3}, 400, "\ud800"),
        ({"body": {"model": "m"}}, 400, "prompt"),
        ({"body": {"model": 5, "prompt": "a"}}, 400, "model"),
        ({"body": {"model": "m", "prompt": "a", "stream": True}}, 400, "stream"),
        ({"body": {"model": "m", "prompt": "a", "priority": 1}}, 400, "priority"),
        ({"body": {"model": "m", "prompt": "a", "cache_salt": "x"}}, 400, "cache_salt"),
        ({"body": {"model": "gpt-4", "prompt": "a"}}, 404, "model"),
        ({"body": {"model": "m", "prompt": "a", "logit_bias": {"a": 1}}}, 400, "logit_bias"),
        ({"body": {"model": "m", "prompt": "a", "n": 5}}, 400, "n"),
        ({"body": {"model": "m", "prompt": ""}}, 400, "prompt"),
        ({"body": {"model": "m", "prompt": [99]}}, 400, "prompt"),
        ({"body": {"model": "m", "prompt": "c" * 5000}}, 400, "prompt"),
        ({"body": {"model": "m", "prompt": [13]}}, 500, None),
    ],
)
def test_a_line_that_cannot_be_served_is_answered_with_an_error(
    llm: LLM, backend: FakeBackend, change: dict[str, Any], status: int, param: str | None
) -> None:
    backend.fail_on = 13
    good = [line("a", prompt="hello", max_tokens=2), line("c", prompt="hello", max_tokens=2)]
    output = run(llm, [good[0], {**line("b", prompt="a"), **change}, good[1]])
    assert [output.answers[index]["response"]["status_code"] for index in range(3)] == [200, status, 200]
    answer = output.answers[1]
    assert (answer["custom_id"], answer["error"]) == ("b", None)
    assert answer["response"]["body"]["error"]["param"] == param


def test_one_bad_prompt_of_several(llm: LLM) -> None:
    output = run(llm, [line("a", prompt=["ab", [99], "cd"]), line("b", prompt=["ab", "cd"], max_tokens=3, n=2)])
    error = output.answers[0]["response"]["body"]["error"]
    assert error["message"].startswith("prompt 1 of 3: token id 99")
    assert len(texts(output.answers[1])) == 4
    assert output.answers[1]["response"]["body"]["usage"]["prompt_tokens"] == 4


def test_what_was_answered_before_is_not_done_again(llm: LLM, backend: FakeBackend) -> None:
    lines = [line(f"c{number}", prompt="hello", max_tokens=3) for number in range(10)]
    all_at_once = run(llm, lines).answers
    before = backend.num_forwards
    rest = run(llm, lines, done=set(range(10)) - {4, 7}).answers
    assert rest == {index: all_at_once[index] for index in (4, 7)}
    assert backend.num_forwards - before <= 4
    assert run(llm, lines, done=set(range(10))).answers == {}


def check_draws(llm: LLM) -> None:
    """AssertionError where what a request draws depends on what else is in the file, or on how far the run was."""
    lines = [line(f"c{number}", prompt=["hello", "hello"], max_tokens=8, n=2, ignore_eos=True) for number in range(6)]
    first = run(llm, lines).answers
    drawn = [text for index in range(6) for text in texts(first[index])]
    assert len(set(drawn)) == len(drawn) == 24
    resumed = run(llm, lines, done={0, 1, 2}).answers
    assert resumed == {index: first[index] for index in (3, 4, 5)}
    moved = run(llm, lines[::-1]).answers
    assert [texts(moved[5 - index]) for index in range(6)] == [texts(first[index]) for index in range(6)]
    other = run(llm, lines, seed=1).answers
    redrawn = [text for index in range(6) for text in texts(other[index])]
    assert all(text != before for text, before in zip(redrawn, drawn, strict=True))


def test_requests_without_a_seed_draw_by_their_custom_id(llm: LLM) -> None:
    check_draws(llm)


@pytest.mark.parametrize(
    "seed_of", [lambda line, place: None, lambda line, place: place, lambda line, place: line.index]
)
def test_the_check_catches(llm: LLM, monkeypatch: pytest.MonkeyPatch, seed_of: Any) -> None:
    monkeypatch.setattr(
        Batch, "_params", lambda self, line, params, place: batch.replace(params, seed=seed_of(line, place))
    )
    with pytest.raises(AssertionError):
        check_draws(llm)


def test_a_seed_is_kept(llm: LLM) -> None:
    output = run(llm, [line(custom_id, prompt="hello", max_tokens=8, seed=7) for custom_id in "ab"])
    assert texts(output.answers[0]) == texts(output.answers[1])


def test_the_example_of_the_documentation_is_served(llm: LLM) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
    lines = [json.loads(each) for each in text.splitlines() if each.startswith('{"custom_id"')]
    assert len(lines) == 2
    for each in lines:
        assert each["body"]["model"] == DEFAULT_MODEL
        each["body"]["model"] = "m"
    assert [answer["response"]["status_code"] for answer in run(llm, lines).answers.values()] == [200, 200]


def test_many_lines_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere(Collected):
        def write(self, index: int, answer: dict[str, Any]) -> None:
            assert answer["response"]["status_code"] == 200
            self.tally.num_done += 1
            if self.tally.num_done % 50 == 0:
                gc.collect()  # a sequence and its group refer to each other

    def peak(num_lines: int) -> int:
        lines = (json.dumps(line(f"c{n}", prompt=f"hello {n % 50}" * 20, max_tokens=2)) for n in range(num_lines))
        batch_input = BatchInput(io.BytesIO("\n".join(lines).encode()), "in")
        load_fake_backend(monkeypatch)
        with LLM("fake", max_num_seqs=8, kv_cache_memory=64_000) as llm:
            output = Nowhere()
            work = Batch(llm, batch_input, output, IDENTITY, served_model_names=["m"], seed=0)
            gc.freeze()  # what is there already need not be looked through each time
            tracemalloc.start()
            work.run(GenerateProgress(None, False))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            gc.unfreeze()
            assert output.tally.num_done == num_lines
        return peak

    assert peak(240) < 1.3 * peak(60)


@pytest.mark.filterwarnings("ignore:the native core is not installed")
def test_calls_of_functions(tmp_path: Path) -> None:
    """They hold to their schemas, and one that cannot be held to is the fault of `tools`."""
    url, messages = "/v1/chat/completions", [{"role": "user", "content": "hi"}]

    def tools(**properties: Any) -> list[dict[str, Any]]:
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]

    lines = [
        line("good", url, messages=messages, tools=tools(a={"enum": ["x"]}), tool_choice="required", max_tokens=300),
        line("bad", url, messages=messages, tools=tools(a={"not": {}})),
    ]
    lines[0]["body"]["parallel_tool_calls"] = False
    with LLM(write_chat_model(tmp_path / "chat.gguf"), threads=1) as llm:
        good, bad = (answer["response"] for _, answer in sorted(run(llm, lines).answers.items()))
    (choice,) = good["body"]["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": "x"}'}
    assert bad["status_code"] == 400
    assert bad["body"]["error"]["param"] == "tools"
