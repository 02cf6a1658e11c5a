"""Engines over the fake backend, which check their books at every step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from pellucid.core.config import SchedulerConfig
from pellucid.core.outputs import RequestOutput, TokenOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine import loading
from pellucid.engine.llm_engine import LLMEngine
from pellucid.engine.output_processor import StepOutput
from tests.support.fake_backend import FakeBackend
from tests.support.fake_tokenizer import FakeTokenizer

B = TypeVar("B", bound=FakeBackend)


class CheckedEngine(LLMEngine):
    """Collects what it says.

    Attributes:
        replies: terminal replies by request; a second one for a request is an error.
        tokens: streamed tokens by request.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replies: dict[str, RequestOutput] = {}
        self.tokens: dict[str, list[TokenOutput]] = {}

    def step(self) -> StepOutput:
        return self._checked(super().step())

    def abort(self, request_id: str) -> StepOutput | None:
        output = super().abort(request_id)
        return None if output is None else self._checked(output)

    def run(self, max_steps: int = 100_000) -> None:
        for _ in range(max_steps):
            if not self.has_unfinished():
                return
            self.step()
        raise AssertionError(f"unfinished after {max_steps} steps")

    def _checked(self, output: StepOutput) -> StepOutput:
        self.scheduler.check_integrity()
        for token in output.tokens:
            assert token.request_id not in self.replies, "a token after the terminal reply"
            self.tokens.setdefault(token.request_id, []).append(token)
        for reply in output.finished:
            assert reply.request_id not in self.replies, "a second terminal reply"
            self.replies[reply.request_id] = reply
        return output


def make_engine(
    *,
    num_blocks: int = 64,
    max_model_len: int = 1024,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 128,
    max_waiting: int | None = None,
    max_queue_seconds: float | None = None,
    backend: FakeBackend | None = None,
    windows: Sequence[int | None] = (None,),
    **kwargs: Any,
) -> CheckedEngine:
    """An engine over `backend`, or over a fake one with layers of these `windows`."""
    backend = backend or FakeBackend(windows=windows)
    backend.allocate_kv_cache(num_blocks)
    config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_waiting, max_queue_seconds)
    return CheckedEngine(backend, FakeTokenizer(), config, num_blocks=num_blocks, max_model_len=max_model_len, **kwargs)


def answer_alone(
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    seed: int,
    max_model_len: int = 1024,
    windows: Sequence[int | None] = (None,),
) -> RequestOutput:
    """What a request gets with an engine to itself, in one chunk, without a prefix cache, and with no block given back
    before the end."""
    num_seqs = max(params.num_sequences, params.num_beams)
    engine = make_engine(
        num_blocks=40 * num_seqs * len(windows),
        windows=windows,
        max_model_len=max_model_len,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        seed=seed,
    )
    engine.scheduler.cache._groups_of_window.clear()
    engine.add_request("alone", list(prompt), params)
    engine.run()
    return engine.replies["alone"]


def load_fake_backend(monkeypatch: pytest.MonkeyPatch, kind: type[B] = FakeBackend) -> B:  # type: ignore[assignment]
    """The backend and the context of 2048 tokens that every LLM made from here on has, whatever model it asks for. Its
    model file is this one."""
    backend = kind(max_position_embeddings=2048)
    model_file = SimpleNamespace(spec=backend.spec, metadata={}, status=os.stat(__file__))
    monkeypatch.setattr(loading, "resolve", lambda model, progress: Path(__file__))
    monkeypatch.setattr(loading, "open_model", lambda path: nullcontext(model_file))
    monkeypatch.setattr(loading, "load_backend", lambda model_file, config, kv_cache_dtype: backend)
    monkeypatch.setattr(loading.Tokenizer, "from_gguf", lambda metadata: FakeTokenizer())
    return backend


def check_stream(engine: CheckedEngine, request_id: str) -> None:
    """The tokens streamed for a request are its reply, piece by piece."""
    tokens, reply = engine.tokens[request_id], engine.replies[request_id]
    for completion in reply.outputs:
        own = [token for token in tokens if token.index == completion.index]
        assert "".join(token.text for token in own) == completion.text
        assert [token.token_id for token in own if token.token_id is not None] == completion.token_ids
        if completion.logprobs is not None:
            assert [token.logprobs for token in own if token.token_id is not None] == completion.logprobs
        assert [token.finish_reason for token in own[:-1]] == [None] * (len(own) - 1)
        assert (own[-1].finish_reason, own[-1].stop_reason) == (completion.finish_reason, completion.stop_reason)
    assert [token.request_output for token in tokens] == [None] * (len(tokens) - 1) + [reply]
