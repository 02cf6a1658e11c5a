"""Many prompts through one LLM: order, what is held at a time, refusals, and letting go."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from pellucid import LLM, BackendError, InvalidRequestError, SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.engine import offline
from tests.support.engines import answer_alone, load_fake_backend
from tests.support.fake_backend import FakeBackend

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
SLOW = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
MAX_NUM_SEQS = 4


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    return load_fake_backend(monkeypatch)


@pytest.fixture
def llm(backend: FakeBackend) -> Iterator[LLM]:
    with LLM("fake", seed=5, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=64) as llm:
        yield llm
        if not backend.closed:
            with llm.shared_engine.exclusive():
                pass  # which ends what was dropped
            assert not llm.shared_engine._inboxes
            llm._engine.scheduler.check_idle()


class Counted:
    """A generator of prompts that knows how many were taken."""

    def __init__(self, prompts: Iterable[Any]) -> None:
        self.taken = 0
        self._prompts = prompts

    def __iter__(self) -> Iterator[Any]:
        for prompt in self._prompts:
            self.taken += 1
            yield prompt


def prompt_of(number: int) -> list[int]:
    return [1 + number % 50] * (1 + number % 7)


def live_sequences() -> list[Sequence]:
    return [thing for thing in gc.get_objects() if isinstance(thing, Sequence)]


def check_read_ahead(llm: LLM, num_prompts: int = 300) -> None:
    """AssertionError where more was taken than the window allows, or more sequences lived than it holds."""
    window = offline.WINDOW * MAX_NUM_SEQS
    prompts = Counted(prompt_of(number) for number in range(num_prompts))
    params = (SLOW if number == 0 else GREEDY for number in range(num_prompts))  # the first holds up all the others
    most_ahead = 0
    gc.collect()
    others = {id(thing): thing for thing in live_sequences()}  # of other tests, kept alive so that no id comes again
    for given, _ in enumerate(llm.generate_iter(prompts, params)):
        most_ahead = max(most_ahead, prompts.taken - given)
        if given % 50 == 0:
            gc.collect()  # a sequence and its group refer to each other
            assert sum(id(thing) not in others for thing in live_sequences()) <= offline.IN_FLIGHT * MAX_NUM_SEQS
    assert prompts.taken == num_prompts
    assert most_ahead == window


def test_order_is_kept(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=1 + number % 9, ignore_eos=True, seed=number) for number in range(300)]
    outputs = list(llm.generate_iter((prompt_of(number) for number in range(300)), iter(params)))
    assert [output.prompt_token_ids for output in outputs] == [prompt_of(number) for number in range(300)]
    for number in range(0, 300, 37):
        assert outputs[number].outputs == answer_alone(prompt_of(number), params[number], seed=0).outputs
    again = llm.generate([prompt_of(number) for number in range(9)], params[:9])
    assert [output.outputs for output in again] == [output.outputs for output in outputs[:9]]


def test_no_more_is_read_ahead_than_the_window(llm: LLM) -> None:
    check_read_ahead(llm)


def test_the_check_sees_a_window_that_is_not_kept(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        offline.OfflineRun, "take_below", property(lambda self: 10**9, lambda self, value: None), raising=False
    )
    with pytest.raises(AssertionError):
        check_read_ahead(llm)


def test_an_endless_generator(llm: LLM) -> None:
    prompts = Counted(map(prompt_of, itertools.count()))
    with llm.generate_iter(prompts, GREEDY) as outputs:
        first = [output.prompt_token_ids for output in itertools.islice(outputs, 50)]
    assert first == [prompt_of(number) for number in range(50)]
    assert prompts.taken <= 50 + offline.WINDOW * MAX_NUM_SEQS
    assert not llm._engine.has_unfinished()
    assert list(outputs) == []


def test_the_engine_is_kept_full(llm: LLM, backend: FakeBackend) -> None:
    before = backend.num_forwards
    list(llm.generate_iter(map(prompt_of, range(200)), GREEDY))
    assert backend.num_forwards - before <= 200 * GREEDY.max_tokens / MAX_NUM_SEQS + 10


def test_prompts_that_begin_alike_share_their_beginning(llm: LLM) -> None:
    prefix = [1 + number % 50 for number in range(256)]
    outputs = list(llm.generate_iter(([*prefix, 1 + number] for number in range(40)), GREEDY))
    computed = sum(output.metrics.prompt_tokens - output.metrics.cached_tokens for output in outputs)
    assert computed <= 2 * len(prefix) + 40 * 2


def check_memory(monkeypatch: pytest.MonkeyPatch, *, keep: bool) -> None:
    """AssertionError where four times the prompts take more memory at their peak; `keep` holds on to every output."""

    def peak(num_prompts: int) -> int:
        load_fake_backend(monkeypatch)
        with LLM("fake", max_num_seqs=8, kv_cache_memory=64_000) as llm:
            list(llm.generate_iter(map(prompt_of, range(100)), GREEDY))
            kept = []
            gc.freeze()  # what is there already need not be looked through each time
            tracemalloc.start()
            for output in llm.generate_iter(([1 + n % 50, 1 + n // 50] * 30 for n in range(num_prompts)), GREEDY):
                assert output.error is None
                kept += [output] if keep else []
                if output.prompt_token_ids[0] == 1:
                    gc.collect()  # a sequence and its group refer to each other
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            gc.unfreeze()
        return peak

    assert peak(400) < 1.3 * peak(100)


def test_memory_does_not_grow_with_the_number_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    check_memory(monkeypatch, keep=False)


def test_the_check_sees_memory_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="peak"):
        check_memory(monkeypatch, keep=True)


def test_ten_thousand_prompts(backend: FakeBackend) -> None:
    count = 10_000
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    with LLM("fake") as llm:
        number = 0
        for output in llm.generate_iter((prompt_of(number) for number in range(count)), params):
            assert output.prompt_token_ids == prompt_of(number)
            number += 1
    assert number == count
    assert backend.num_forwards <= count / 64 * 2 + 10


def test_a_refused_prompt_does_not_stop_the_others(llm: LLM, backend: FakeBackend) -> None:
    backend.fail_on = 13
    prompts = ["ab", [99], "", [13], None, "c" * 5000, "ab"]
    outputs = list(llm.generate_iter(prompts, GREEDY))  # type: ignore[arg-type]
    assert [output.error is None for output in outputs] == [True, False, False, False, False, False, True]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", *["error"] * 5, "length"]
    assert [getattr(output.error, "param", None) for output in outputs[1:3]] == ["prompt", "prompt"]
    assert isinstance(outputs[3].error, BackendError)
    assert outputs[0].outputs == outputs[-1].outputs
    bad = [GREEDY, SamplingParams(n=5), {"max_tokens": 3}, GREEDY]
    outputs = list(llm.generate_iter(["a"] * 4, bad))  # type: ignore[arg-type]
    assert [len(output.outputs) for output in outputs] == [1, 5, 1, 1]
    assert [getattr(output.error, "param", None) for output in outputs] == [None, "n", "sampling_params", None]


def test_wrong_arguments_are_refused_at_once(llm: LLM) -> None:
    for prompts in ("text", [1, 2, 3], 5, None):
        with pytest.raises(InvalidRequestError, match="not one prompt"):
            llm.generate_iter(prompts)  # type: ignore[arg-type]
    for params in (5, SamplingParams(n=5)):
        with pytest.raises(InvalidRequestError):
            llm.generate_iter(["a"], params)  # type: ignore[arg-type]
    for prompts, params, message in (
        (["a"] * 3, [GREEDY] * 2, "sampling_params ended after 2, and prompts went on"),
        (["a"] * 2, [GREEDY] * 3, "prompts ended after 2, and sampling_params went on"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            list(llm.generate_iter(prompts, params))
    assert list(llm.generate_iter([])) == []


def test_what_the_generator_raises_is_raised(llm: LLM) -> None:
    def prompts() -> Iterator[str]:
        yield from ["a"] * 20
        raise OSError("the file went away")

    stream = llm.generate_iter(prompts(), GREEDY)
    with pytest.raises(OSError, match="went away"):
        list(stream)
    assert not llm._engine.has_unfinished()
    assert list(stream) == []


def test_letting_go_aborts_what_runs(llm: LLM) -> None:
    stream = llm.generate_iter(map(prompt_of, itertools.count()), itertools.chain([GREEDY], itertools.repeat(SLOW)))
    next(stream)
    assert llm._engine.has_unfinished()
    del stream
    gc.collect()
    llm.generate("x", SamplingParams(max_tokens=1))
    assert not llm._engine.has_unfinished()


def test_two_at_once(llm: LLM) -> None:
    left = llm.generate_iter(map(prompt_of, range(40)), GREEDY)
    right = llm.generate_iter(map(prompt_of, range(40)), GREEDY)
    for one, other in zip(left, right, strict=True):
        assert one.outputs == other.outputs


def test_a_generator_may_use_the_llm(llm: LLM) -> None:
    def prompts() -> Iterator[list[int]]:
        for number in range(10):
            yield llm.generate([prompt_of(number)], GREEDY)[0].outputs[0].token_ids

    assert len(list(llm.generate_iter(prompts(), GREEDY))) == 10


def test_a_closed_llm(llm: LLM) -> None:
    stream = llm.generate_iter(map(prompt_of, range(40)), GREEDY)
    next(stream)
    llm.close()
    with pytest.raises(BackendError, match="closed"):
        list(stream)
