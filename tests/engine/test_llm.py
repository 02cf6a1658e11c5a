from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pellucid
from pellucid import (
    LLM,
    BackendError,
    CapacityError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelFileError,
    PrefixFileError,
    SamplingParams,
)
from pellucid.engine import loading
from pellucid.engine.scheduler import Scheduler
from pellucid.kvcache.saved_prefix import PrefixFile
from tests.support.engines import answer_alone, load_fake_backend
from tests.support.fake_backend import FakeBackend
from tests.support.fake_tokenizer import FakeTokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    return load_fake_backend(monkeypatch)


@pytest.fixture
def llm(backend: FakeBackend) -> Iterator[LLM]:
    with LLM("fake", seed=5, max_num_seqs=4, max_num_batched_tokens=64) as llm:
        yield llm
        if not backend.closed:
            llm._engine.scheduler.check_integrity()
            with llm.shared_engine.exclusive():
                pass  # which ends what was dropped
            assert not llm.shared_engine._inboxes
            llm._engine.scheduler.check_idle()


def test_one_and_many_prompts(llm: LLM) -> None:
    texts = ["hello", "a longer prompt than that", "x"]
    ids = [FakeTokenizer().encode(text) for text in texts]
    alone = [answer_alone(prompt, GREEDY, seed=0) for prompt in ids]
    for prompts in (texts, ids, tuple(texts), [np.array(prompt) for prompt in ids], [texts[0], *ids[1:]]):
        outputs = llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
        assert [output.outputs for output in outputs] == [output.outputs for output in alone]
        assert [output.prompt_token_ids for output in outputs] == ids
    for prompt in (texts[0], ids[0], tuple(ids[0]), np.array(ids[0])):
        (output,) = llm.generate(prompt, GREEDY)  # type: ignore[arg-type]
        assert output.outputs == alone[0].outputs
    assert llm.generate(texts[0], GREEDY)[0].prompt == texts[0]
    assert llm.generate([]) == []


def test_order_is_kept_over_many_prompts(llm: LLM) -> None:
    prompts = [[1 + number % 50] * (1 + number % 7) for number in range(300)]
    params = [SamplingParams(max_tokens=1 + number % 9, ignore_eos=True) for number in range(300)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [output.metrics.output_tokens for output in outputs] == [1 + number % 9 for number in range(300)]


def test_the_queue_stays_short(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    step = llm._engine.step

    def watched() -> Any:
        nonlocal longest
        longest = max(longest, len(llm._engine._groups))
        return step()

    monkeypatch.setattr(llm._engine, "step", watched)
    llm.generate([[1, 2]] * 100, SamplingParams(max_tokens=2))
    assert 4 <= longest <= 8


def test_the_seed_makes_runs_equal(backend: FakeBackend) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)

    def run(seed: int) -> list[str]:
        llm = LLM("fake", seed=seed)
        return [output.outputs[0].text for output in llm.generate(["a"] * 5, params)]

    assert run(1) == run(1) != run(2)


def test_bad_prompts_are_named_and_nothing_is_computed(llm: LLM, backend: FakeBackend) -> None:
    with pytest.raises(InvalidRequestError, match="prompt 1 of 3: token id 99"):
        llm.generate([[1], [99], [2]])
    with pytest.raises(ContextLengthError, match=r"prompt 2 of 3: .*5000 tokens.*2048"):
        llm.generate(["a", "b", "c" * 5000])
    for prompts, param in ((5, "prompts"), (None, "prompts"), ({"prompt": "x"}, "prompts"), ([None], "prompt")):
        with pytest.raises(InvalidRequestError) as caught:
            llm.generate(prompts)  # type: ignore[arg-type]
        assert caught.value.param == param
    with pytest.raises(InvalidRequestError, match="2 prompts and 1 sampling_params"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(InvalidRequestError, match="must be a SamplingParams"):
        llm.generate("a", {"max_tokens": 5})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="max_num_seqs"):
        llm.generate(["a", "b"], [GREEDY, SamplingParams(n=5)])
    assert backend.num_forwards == 0


def test_a_failure_is_raised_and_the_others_are_aborted(llm: LLM, backend: FakeBackend) -> None:
    backend.fail_on = 13
    with pytest.raises(BackendError, match="token 13"):
        llm.generate([[1], [13], [2]], GREEDY)
    backend.fail_on = None
    assert len(llm.generate([[1], [13]], GREEDY)) == 2


def test_a_defect_fails_what_ran_and_the_next_prompt_is_answered(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llm.stream("hello", GREEDY)
    next(stream)
    monkeypatch.setattr(Scheduler, "postprocess", lambda self, plan, token_ids: 1 / 0)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        llm.generate(["a", "b"], GREEDY)
    monkeypatch.undo()
    with pytest.raises(EngineError):
        list(stream)
    assert llm.generate([[1, 2]], GREEDY)[0].outputs == answer_alone([1, 2], GREEDY, seed=0).outputs


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompt = FakeTokenizer().apply_chat_template(messages)
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt_token_ids == prompt
    assert output.outputs == llm.generate(prompt, GREEDY)[0].outputs
    outputs = llm.chat([messages, [{"role": "user", "content": "ho"}]], GREEDY)
    assert outputs[0].outputs == output.outputs
    assert outputs[1].prompt_token_ids != prompt
    with pytest.raises(InvalidRequestError, match="no content"):
        llm.chat([{"role": "user"}])


def test_stream(llm: LLM) -> None:
    (whole,) = llm.generate("hello", GREEDY)
    tokens = list(llm.stream("hello", GREEDY))
    assert "".join(token.text for token in tokens) == whole.outputs[0].text
    assert [token.token_id for token in tokens] == whole.outputs[0].token_ids
    last = tokens[-1].request_output
    assert last is not None
    assert last.outputs == whole.outputs
    assert tokens[-1].finish_reason == "length"
    messages = [{"role": "user", "content": "hi"}]
    streamed = "".join(token.text for token in llm.stream(messages, GREEDY))
    assert streamed == llm.chat(messages, GREEDY)[0].outputs[0].text


def test_streams_and_generate_interleave(llm: LLM) -> None:
    first, second = llm.stream("hello", GREEDY), llm.stream("world", GREEDY)
    texts = ["", ""]
    for left, right in zip(first, second, strict=True):
        texts[0] += left.text
        texts[1] += right.text
        if len(texts[0]) == 5:
            (between,) = llm.generate("hello", GREEDY)
    assert texts[0] == between.outputs[0].text
    assert texts[1] == llm.generate("world", GREEDY)[0].outputs[0].text


def test_closing_a_stream_aborts_it(llm: LLM) -> None:
    with llm.stream("hello", GREEDY) as stream:
        next(stream)
        next(stream)
    assert stream.request_output is not None
    assert stream.request_output.outputs[0].finish_reason == "abort"
    assert len(stream.request_output.outputs[0].token_ids) == 2
    assert list(stream) == []
    assert not llm._engine.has_unfinished()
    stream.close()


def test_letting_go_of_a_stream_aborts_it(llm: LLM) -> None:
    stream = llm.stream("hello", GREEDY)
    next(stream)
    del stream
    gc.collect()
    llm.generate("x", SamplingParams(max_tokens=1))
    assert not llm._engine.has_unfinished()


def test_a_stream_refuses_at_once_and_raises_what_fails(llm: LLM, backend: FakeBackend) -> None:
    with pytest.raises(InvalidRequestError):
        llm.stream("")
    stream = llm.stream("hello", GREEDY)
    next(stream)
    backend.forward = lambda batch: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        next(stream)
    assert list(stream) == []


def test_an_interrupt_leaves_the_books_whole(llm: LLM, backend: FakeBackend) -> None:
    forward = backend.forward

    def interrupted(batch: Any) -> Any:
        if backend.num_forwards == 5:
            signal.raise_signal(signal.SIGINT)
        return forward(batch)

    backend.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello", "world"], GREEDY)
    assert not llm._engine.has_unfinished()
    backend.forward = forward  # type: ignore[method-assign]
    assert (
        llm.generate("hello", GREEDY)[0].outputs
        == answer_alone(FakeTokenizer().encode("hello"), GREEDY, seed=0).outputs
    )


def test_threads_share_one_engine(llm: LLM) -> None:
    expected = {text: llm.generate(text, GREEDY)[0].outputs for text in "abcdef"}
    got: dict[str, Any] = {}

    def work(text: str) -> None:
        got[text] = llm.generate([text] * 3, GREEDY)[2].outputs

    threads = [threading.Thread(target=work, args=(text,)) for text in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_logits(llm: LLM) -> None:
    prompt = [1, 2, 3]
    (output,) = llm.generate(prompt, GREEDY)
    logits = llm.logits(prompt + output.outputs[0].token_ids)
    assert logits[2:-1].argmax(axis=1).tolist() == output.outputs[0].token_ids
    assert llm.logits(np.array(prompt)).shape == (3, 61)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError):
        llm.logits([])


def test_reset_prefix_cache(llm: LLM) -> None:
    prompt = [7] * 200
    assert [llm.generate(prompt, GREEDY)[0].metrics.cached_tokens for _ in range(2)] == [0, 192]
    llm.reset_prefix_cache()
    assert llm.generate(prompt, GREEDY)[0].metrics.cached_tokens == 0


def test_a_saved_prefix_is_a_hit_in_another_process(
    llm: LLM, backend: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))
    messages = [{"role": "user", "content": "hello " * 40}, {"role": "assistant", "content": "bye"}]
    cases: list[tuple[Any, list[int]]] = [
        ("some text " * 30, FakeTokenizer().encode("some text " * 30)),
        ([7] * 200, [7] * 200),
        (np.array([8] * 70), [8] * 70),
        (messages, FakeTokenizer().apply_chat_template(messages, add_generation_prompt=False)),
    ]
    for prefix, token_ids in cases:
        path = tmp_path / "prefix"
        num_saved = len(token_ids) // 64 * 64
        assert llm.save_prefix(prefix, path) == num_saved > 0
        prompt = [*token_ids, 9]
        (wanted,) = llm.generate(prompt, GREEDY)
        llm.reset_prefix_cache()
        backend.allocate_kv_cache(llm.num_kv_blocks)
        assert llm.load_prefix(str(path)) == num_saved
        (found,) = llm.generate(prompt, GREEDY)
        assert found.metrics.cached_tokens == num_saved
        assert found.outputs == wanted.outputs
    with PrefixFile.open(path) as file:
        assert file.prefix.messages == messages
    assert llm.save_prefix(messages, path, include_kv=False) == 0
    assert llm.load_prefix(path) == 0


def test_what_cannot_be_a_prefix_is_refused(llm: LLM, backend: FakeBackend, tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    for prefix in ("", [], [99], 5, [1.5], [{"role": "user"}]):
        with pytest.raises(InvalidRequestError):
            llm.save_prefix(prefix, path)  # type: ignore[arg-type]
    with pytest.raises(ContextLengthError):
        llm.save_prefix([1] * 2048, path)
    assert not path.exists()
    with pytest.raises(PrefixFileError, match="cannot read"):
        llm.load_prefix(path)
    assert backend.num_forwards == 0


def test_an_interrupt_while_a_prefix_is_computed_leaves_no_file_and_the_books_whole(
    llm: LLM, backend: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))
    forward = backend.forward

    def interrupted(batch: Any) -> Any:
        if backend.num_forwards == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(batch)

    backend.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.save_prefix([5] * 640, tmp_path / "prefix")
    assert backend.num_forwards == 4
    assert not (tmp_path / "prefix").exists()
    backend.forward = forward  # type: ignore[method-assign]
    assert llm.save_prefix([5] * 640, tmp_path / "prefix") == 640
    assert backend.num_forwards == 10  # a block each: what was computed was kept


def test_prefixes_are_saved_and_loaded_while_others_generate(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))
    prompts = [[1 + number] * 150 for number in range(6)]
    expected = [answer_alone(prompt, GREEDY, seed=0).outputs for prompt in prompts]
    got: list[Any] = [None] * len(prompts)

    def work(number: int) -> None:
        for _ in range(5):
            got[number] = llm.generate(prompts[number], GREEDY)[0].outputs
            llm.save_prefix(prompts[number], tmp_path / str(number))
            llm.load_prefix(tmp_path / str(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_close(llm: LLM, backend: FakeBackend) -> None:
    stream = llm.stream("hello", GREEDY)
    next(stream)
    llm.close()
    llm.close()
    assert backend.closed
    for call in (
        lambda: llm.generate("x"),
        lambda: llm.stream("x"),
        lambda: llm.logits([1]),
        lambda: llm.save_prefix([1], Path("prefix")),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(BackendError, match="closed"):
            call()
    assert [token.finish_reason for token in stream] == ["abort"]


def test_arguments(backend: FakeBackend) -> None:
    assert LLM("fake").max_model_len == 2048
    assert LLM("fake", max_model_len=100, max_num_seqs=2).num_kv_blocks == 4
    assert LLM("fake", kv_cache_memory=10_000).num_kv_blocks == 10
    assert LLM("fake", kv_cache_memory=10_000).max_model_len == 640
    with pytest.raises(InvalidRequestError, match="at most 2048"):
        LLM("fake", max_model_len=4096)
    assert backend.closed
    with pytest.raises(CapacityError):
        LLM("fake", max_model_len=2048, kv_cache_memory=10_000)
    for arguments in (
        {"threads": 0},
        {"backend": "gpu"},
        {"kv_cache_dtype": "int3"},
        {"seed": -1},
        {"max_num_seqs": 0},
    ):
        with pytest.raises(InvalidRequestError):
            LLM("fake", **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor_parallel_size"):
        LLM("fake", tensor_parallel_size=2)  # type: ignore[call-arg]


def test_a_tokenizer_of_another_size_is_refused(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTokenizer, "vocab_size", 60)
    with pytest.raises(ModelFileError, match=r"60 tokens.*61 rows"):
        LLM("fake")
    assert backend.closed


def test_what_building_the_tokenizer_raises_is_raised(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(metadata: object) -> None:
        raise ModelFileError("no vocabulary")

    monkeypatch.setattr(loading.Tokenizer, "from_gguf", broken)
    with pytest.raises(ModelFileError, match="no vocabulary"):
        LLM("fake")
    assert backend.closed


def test_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err
    assert "tok/s" in captured.err


def test_public_names() -> None:
    assert pellucid.LLM is LLM
    for name in pellucid.__all__:
        assert getattr(pellucid, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        pellucid.nothing  # noqa: B018


@pytest.mark.parametrize("use", ["generate", "stream", "logits", "close", "next", "stop"])
def test_a_processor_cannot_use_the_llm_that_calls_it(llm: LLM, use: str) -> None:
    stream = llm.stream("other", GREEDY)
    next(stream)
    uses: dict[str, Any] = {
        "generate": lambda: llm.generate("x"),
        "stream": lambda: llm.stream("x"),
        "logits": lambda: llm.logits([1]),
        "close": llm.close,
        "next": lambda: list(stream),
        "stop": stream.close,
    }

    def misuse(token_ids: list[int], logits: Any) -> Any:
        uses[use]()
        return logits

    params = SamplingParams(max_tokens=3, logits_processors=[misuse])
    with pytest.raises(InvalidRequestError, match=r"logits_processors\[0\].*within a step"):
        llm.generate("hello", params)
    assert "".join(token.text for token in stream) == llm.generate("other", GREEDY)[0].outputs[0].text[1:]
