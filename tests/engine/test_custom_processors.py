"""Callables of requests: what they get, what they change, and that whatever they do, only their own request fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError
from pellucid.core.outputs import RequestOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.custom_processors import CustomProcessor
from pellucid.engine.step_runner import StepRunner
from tests.support.engines import make_engine
from tests.support.fake_backend import VOCAB_SIZE
from tests.support.mutants import mutant

PROMPT = [5, 6, 7]

Logits = NDArray[np.float32]


def answer(*processors: Callable[..., Any], **params: Any) -> RequestOutput:
    engine = make_engine()
    params = {"seed": 1, "max_tokens": 8, "ignore_eos": True, **params}
    engine.add_request("x", PROMPT, SamplingParams(logits_processors=processors, **params))
    engine.run()
    assert not engine._processors
    return engine.replies["x"]


def only(token: int) -> Callable[[list[int], Logits], Logits]:
    def force(token_ids: list[int], logits: Logits) -> Logits:
        forced = np.full_like(logits, -np.inf)
        forced[token] = 0
        return forced

    return force


def test_what_a_processor_gets() -> None:
    seen: list[tuple[list[int], Logits]] = []

    def watch(token_ids: list[int], logits: Logits) -> Logits:
        seen.append((token_ids, logits))
        assert (type(token_ids), logits.dtype, logits.shape) == (list, np.float32, (VOCAB_SIZE,))
        return logits

    (plain,) = answer().outputs
    (watched,) = answer(watch).outputs
    assert watched == plain
    assert [token_ids for token_ids, _ in seen] == [plain.token_ids[:length] for length in range(8)]


def test_the_prompt_too_where_it_is_asked_for() -> None:
    seen: list[list[int]] = []

    class Watcher:
        def __call__(self, prompt_token_ids: list[int], token_ids: list[int], logits: Logits) -> Logits:
            seen.append(prompt_token_ids + token_ids)
            return logits

    def with_default(token_ids: list[int], logits: Logits, factor: float = 2.0) -> Logits:
        return logits * np.float32(factor)

    (watched,) = answer(Watcher(), with_default).outputs
    assert seen == [PROMPT + watched.token_ids[:length] for length in range(8)]
    assert answer(np.add).error is not None  # a callable without a signature is given two arguments


def test_processors_apply_in_order_and_in_place() -> None:
    def double(token_ids: list[int], logits: Logits) -> Logits:
        logits *= 2
        return logits

    def bring_down(token_ids: list[int], logits: Logits) -> Logits:
        logits[np.argmax(logits)] -= 5
        return logits

    assert answer(only(9)).outputs[0].token_ids == [9] * 8
    assert answer(only(9), temperature=0).outputs[0].token_ids == [9] * 8
    assert answer(only(9), only(11)).outputs[0].token_ids == [11] * 8
    assert (
        answer(double, temperature=0.5).outputs == answer(lambda token_ids, logits: logits * 4, temperature=1).outputs
    )
    assert answer(double, bring_down).outputs != answer(bring_down, double).outputs


def test_every_continuation_has_its_own() -> None:
    def force_by_length(token_ids: list[int], logits: Logits) -> Logits:
        return only(3 + len(token_ids))(token_ids, logits)

    for completion in answer(force_by_length, n=3).outputs:
        assert completion.token_ids == list(range(3, 11))


def test_log_probabilities_are_the_models_own() -> None:
    (plain,) = answer(logprobs=3, temperature=0, max_tokens=1).outputs
    (forced,) = answer(only(9), logprobs=3, temperature=0, max_tokens=1).outputs
    assert plain.logprobs is not None
    assert forced.logprobs is not None
    assert forced.logprobs[0].keys() == {9} | plain.logprobs[0].keys()
    assert all(forced.logprobs[0][token].logprob == item.logprob for token, item in plain.logprobs[0].items())
    assert forced.logprobs[0][9].logprob < -1
    assert forced.cumulative_logprob == forced.logprobs[0][9].logprob


def raising(token_ids: list[int], logits: Logits) -> Any:
    raise ValueError("no luck" * 100)


def with_nan(token_ids: list[int], logits: Logits) -> Any:
    logits[4] = np.nan
    return logits


def with_infinity(token_ids: list[int], logits: Logits) -> Any:
    return np.where(np.arange(VOCAB_SIZE) == 4, np.float32(np.inf), logits)


def without_any(token_ids: list[int], logits: Logits) -> Any:
    return np.full_like(logits, -np.inf)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def unspeakable(token_ids: list[int], logits: Logits) -> Any:
    raise UnspeakableError


DEFECTS: list[tuple[Callable[..., Any], str]] = [
    (raising, "(raising) raised ValueError: no luck"),
    (unspeakable, "(unspeakable) raised UnspeakableError: (no message)"),
    (with_nan, "(with_nan) gave token 4 the logit NaN"),
    (with_infinity, "(with_infinity) gave token 4 the logit +inf"),
    (lambda token_ids, logits: None, "returned None and not the logits"),
    (lambda token_ids, logits: logits.tolist(), "and not the logits"),
    (lambda token_ids, logits: logits[:5], "returned float32 [5], not float32 [61]"),
    (lambda token_ids, logits: logits[None], "returned float32 [1, 61], not float32 [61]"),
    (lambda token_ids, logits: logits.astype(np.float64), "returned float64 [61], not float32 [61]"),
    (lambda: None, "raised TypeError"),
    (without_any, "logits_processors rules out every token after 2 tokens"),
]


@pytest.mark.parametrize(("defect", "message"), DEFECTS)
def test_a_defect_fails_its_own_request_alone(defect: Callable[..., Any], message: str) -> None:
    """In the third step, of a request that forks, between others that go on as if it were not there."""

    def late(token_ids: list[int], logits: Logits) -> Any:
        return defect(token_ids, logits) if len(token_ids) == 2 else logits

    late.__qualname__ = defect.__qualname__
    calls = []

    def count(token_ids: list[int], logits: Logits) -> Logits:
        calls.append(len(token_ids))
        return logits

    params = SamplingParams(max_tokens=12, seed=7, ignore_eos=True, logprobs=2)
    engine = make_engine()
    engine.add_request("before", PROMPT, params)
    engine.add_request(
        "bad",
        PROMPT,
        SamplingParams(max_tokens=12, n=2, seed=9, ignore_eos=True, logits_processors=[count, late]),
        stream=True,
    )
    engine.add_request("after", [*PROMPT, 1], SamplingParams(max_tokens=12, seed=8, logits_processors=[count]))
    num_forwards = engine._backend.num_forwards  # type: ignore[attr-defined]
    engine.run()
    assert engine._backend.num_forwards - num_forwards == 12  # type: ignore[attr-defined]
    reply = engine.replies["bad"]
    assert isinstance(reply.error, InvalidRequestError)
    assert reply.error.param == "logits_processors"
    assert message in reply.error.message
    assert "rules out" in message or reply.error.message.startswith("logits_processors[1] (")
    assert len(reply.error.message) < 400
    assert [len(completion.token_ids) for completion in reply.outputs] == [2, 2]
    assert calls.count(0) == 3  # nobody's processors run twice for it
    alone = make_engine()
    alone.add_request("before", PROMPT, params)
    alone.run()
    assert engine.replies["before"].outputs == alone.replies["before"].outputs
    assert engine.replies["after"].error is None


def test_mutant_failing_the_whole_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    careless = mutant(CustomProcessor.__call__, 'raise self._error(f"raised', 'raise RuntimeError(f"raised')
    monkeypatch.setattr(CustomProcessor, "__call__", careless)
    with pytest.raises(AssertionError):
        test_a_defect_fails_its_own_request_alone(*DEFECTS[0])


def test_mutant_keeping_what_failed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = mutant(StepRunner.run, "if result.failures:", "if False:")
    monkeypatch.setattr(StepRunner, "run", forgetful)
    with pytest.raises(AssertionError):
        test_a_defect_fails_its_own_request_alone(*DEFECTS[0])


def test_ctrl_c_is_not_a_defect() -> None:
    def interrupted(token_ids: list[int], logits: Logits) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(interrupted)
