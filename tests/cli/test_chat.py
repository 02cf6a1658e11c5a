from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pellucid import ContextLengthError, SamplingParams, TokenOutput
from pellucid.cli.chat_model import ChatModel
from pellucid.cli.conversation import Conversation, opening
from pellucid.cli.main import main
from pellucid.core.metrics import RequestMetrics
from pellucid.core.outputs import CompletionOutput, RequestOutput

pytestmark = pytest.mark.filterwarnings("ignore:the native core is not installed")


class FakeLLM:
    """Answers with scripted pieces; an exception among them is raised in its place."""

    max_model_len = 100
    tokenizer = SimpleNamespace(has_chat_template=True)

    def __init__(self, *answers: list[str | BaseException]) -> None:
        self.answers = list(answers)
        self.seen: list[list[dict[str, str]]] = []
        self.closed = 0

    def stream(self, messages: Any, params: SamplingParams) -> FakeStream:
        self.seen.append(list(messages))
        pieces = self.answers.pop(0)
        if isinstance(pieces[0], ContextLengthError):
            raise pieces[0]
        return FakeStream(self, pieces)


class FakeStream:
    def __init__(self, llm: FakeLLM, pieces: list[str | BaseException]) -> None:
        self.llm = llm
        self.pieces = pieces
        self.request_output: RequestOutput | None = None

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.closed += 1

    def __iter__(self) -> Iterator[TokenOutput]:
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield TokenOutput("0", 0, 1, piece)
        completion = CompletionOutput(0, "", [1] * len(self.pieces), "stop")
        self.request_output = RequestOutput("0", None, [1, 2], [completion], RequestMetrics())


def conversation_with(llm: FakeLLM, system: str | None = None) -> Conversation:
    args = argparse.Namespace(timing=False, max_tokens=None)
    return Conversation(ChatModel(llm, SamplingParams(), args), opening(system))  # type: ignore[arg-type]


def converse(llm: FakeLLM, *turns: str, system: str | None = None) -> Conversation:
    conversation = conversation_with(llm, system)
    lines = iter(turns)

    def read() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    conversation.read_line = lambda prompt: read()  # type: ignore[method-assign]
    conversation.run()
    return conversation


def test_the_history_grows_by_whole_turns(capsys: pytest.CaptureFixture[str]) -> None:
    llm = FakeLLM(["Hel", "lo"], ["Bye"])
    converse(llm, "hi", "", "   ", "go", system="be brief")
    opening = {"role": "system", "content": "be brief"}
    said = {"role": "user", "content": "hi"}
    assert llm.seen[0] == [opening, said]
    assert llm.seen[1] == [
        opening,
        said,
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "go"},
    ]
    assert capsys.readouterr().out == "Hello\nBye\n"


def test_interrupt_stops_the_answer_and_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    llm = FakeLLM(["one, ", "two, ", KeyboardInterrupt()], ["three"])
    conversation = converse(llm, "count", "go on")
    assert llm.seen[1][1] == {"role": "assistant", "content": "one, two, "}
    assert conversation.messages[-1]["content"] == "three"
    assert llm.closed == 2
    captured = capsys.readouterr()
    assert captured.out == "one, two, three\n"
    assert "(stopped)" in captured.err


def test_an_interrupt_before_the_first_word_takes_the_turn_back() -> None:
    llm = FakeLLM([KeyboardInterrupt()], ["yes"])
    converse(llm, "never mind", "hello")
    assert llm.seen[1] == [{"role": "user", "content": "hello"}]


def test_a_full_context_is_said_and_the_turn_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    llm = FakeLLM(["ok"], [ContextLengthError("the prompt has 120 tokens")], ["fine"])
    converse(llm, "a", "b" * 500, "/clear", "c")
    assert "error: the prompt has 120 tokens\n/clear starts a new conversation." in capsys.readouterr().err
    assert llm.seen[2] == [{"role": "user", "content": "c"}]


def test_clear_keeps_the_system_message() -> None:
    llm = FakeLLM(["ok"], ["ok"])
    converse(llm, "a", "/clear", "b", system="s")
    assert llm.seen[1] == [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    llm = FakeLLM()
    converse(llm, "/help", "/nonsense", "/exit", "never read")
    assert llm.seen == []
    shown = capsys.readouterr().err
    assert "/clear" in shown
    assert "unknown command /nonsense" in shown


def test_a_backslash_goes_on_with_the_next_line() -> None:
    llm = FakeLLM(["ok"])
    converse(llm, "first\\", "second")
    assert llm.seen[0][0]["content"] == "first\nsecond"


def test_an_interrupt_at_the_prompt_drops_the_line_and_stays() -> None:
    llm = FakeLLM(["ok"])
    conversation = conversation_with(llm)
    script: Iterator[str | BaseException] = iter(["half\\", KeyboardInterrupt(), "whole", EOFError()])

    def read(prompt: str) -> str:
        item = next(script)
        if isinstance(item, BaseException):
            raise item
        return item

    conversation.read_line = read  # type: ignore[method-assign]
    conversation.run()
    assert llm.seen == [[{"role": "user", "content": "whole"}]]


def test_piped_turns_with_a_model(chat_model: str, pipe_in, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"hello\nand again\n")
    assert main(["chat", "--model", chat_model, "--max-tokens", "4", "--ignore-eos", "--timing"]) == 0
    captured = capsys.readouterr()
    timings = [line for line in captured.err.splitlines() if " prompt tokens" in line]
    assert len(timings) == 2
    assert ">>>" not in captured.out


def test_a_base_model_is_refused(base_model: str, pipe_in, capsys: pytest.CaptureFixture[str]) -> None:
    pipe_in(b"hello\n")
    assert main(["chat", "--model", base_model]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{base_model} has no chat template" in captured.err
