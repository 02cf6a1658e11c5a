"""Captures through the engine: the same to the bit however a request was run, and invisible in every answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid import LLM, AsyncEngine
from pellucid.backends.base import Backend
from pellucid.backends.reference.capture import Observer
from pellucid.backends.registry import load_backend
from pellucid.core.batch import ForwardBatch, ForwardOutput
from pellucid.core.capture import Captured, CaptureParams, operation_names
from pellucid.core.config import BackendConfig, SchedulerConfig
from pellucid.core.errors import BackendError, CapacityError, InvalidRequestError, QueueFullError
from pellucid.core.outputs import RequestOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine import capture as capture_module
from pellucid.engine import loading
from pellucid.engine.capture import CaptureBook
from pellucid.engine.capture_selection import CaptureSelection
from pellucid.weights.loader import open_model
from tests.support.captures import EVERYTHING, Request, assert_same, captured, run
from tests.support.counting import count_steps
from tests.support.engines import CheckedEngine, make_engine
from tests.support.fake_backend import VOCAB_SIZE
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.tiny_models import write_tiny_model

RNG = np.random.default_rng(3)
PROMPT = RNG.integers(0, VOCAB_SIZE, 75).tolist()
PARAMS = SamplingParams(max_tokens=4, temperature=0.8, seed=7, ignore_eos=True, logprobs=2, detokenize=False)
NEIGHBOURS: list[Request] = [
    (RNG.integers(0, VOCAB_SIZE, length).tolist(), replace(PARAMS, max_tokens=tokens, seed=length), None)
    for length, tokens in ((3, 9), (70, 2), (20, 6))
]
CAPTURING: Request = (PROMPT, PARAMS, EVERYTHING)
PLAIN: Request = (PROMPT, PARAMS, None)
NUM_TOKENS = len(PROMPT) + 3  # the last of the four generated is never computed

Loader = Callable[..., Backend]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that see all, or seven of which six have a window of 40 tokens."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", request.param, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def loader(request: pytest.FixtureRequest, model_path: Path) -> Loader:
    def load(threads: int = 1, kv_cache_dtype: Any = "f16") -> Backend:
        with open_model(model_path) as model_file:
            return load_backend(model_file, BackendConfig(request.param, threads), kv_cache_dtype=kv_cache_dtype)

    if request.param == "cpu":
        pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")
    return load


@pytest.fixture
def backend(loader: Loader) -> Backend:
    return loader()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", vocab_size=VOCAB_SIZE)
    with open_model(path) as model_file:
        return load_backend(model_file, BackendConfig("reference", 1), kv_cache_dtype="f32")


def test_answers_and_captures_are_the_same_however_it_is_run(loader: Loader) -> None:
    backend = loader()
    plain = [run(backend, [request])[0].outputs for request in (PLAIN, *NEIGHBOURS)]
    (alone,) = run(backend, [CAPTURING])
    assert alone.outputs == plain[0]
    for threads in (1, 2):
        backend = loader(threads)
        for budget in (1, 3, 17, 64) if threads == 1 or backend.name == "cpu" else (17,):
            (chunked,) = run(backend, [CAPTURING], max_num_batched_tokens=budget)
            assert chunked.outputs == plain[0], (threads, budget)
            assert_same(chunked.captured, alone.captured)
        for budget in (17, 512):
            first, *others = run(backend, [CAPTURING, *NEIGHBOURS], max_num_batched_tokens=budget)
            assert [reply.outputs for reply in (first, *others)] == plain, (threads, budget)
            assert_same(first.captured, alone.captured)
            assert all(reply.captured is None for reply in others)


def test_two_may_capture_at_once(backend: Backend) -> None:
    requests = [NEIGHBOURS[0], *((*request[:2], EVERYTHING) for request in NEIGHBOURS), CAPTURING]
    replies = run(backend, requests, max_num_batched_tokens=30)
    for reply, request in zip(replies[1:], requests[1:], strict=True):
        assert_same(reply.captured, captured(backend, request))


def test_what_is_captured_has_the_shapes_that_the_documentation_gives(backend: Backend) -> None:
    spec = backend.spec
    found = captured(backend, CAPTURING)
    layers = range(len(spec.layers))
    heads = spec.layers[0].attention.num_attention_heads
    assert found.num_tokens == NUM_TOKENS
    assert found.residual is not None
    assert found.residual.shape == (2 * len(layers) + 1, NUM_TOKENS, spec.hidden_size)
    assert found.residual_points.tolist() == list(range(2 * len(layers) + 1))
    assert found.positions.tolist() == found.queries.tolist() == list(range(NUM_TOKENS))
    assert found.heads.tolist() == list(range(heads))
    assert {layer: array.shape for layer, array in found.mlp.items()} == dict.fromkeys(layers, (NUM_TOKENS, 96))
    assert {layer: array.shape for layer, array in found.attention.items()} == dict.fromkeys(
        layers, (heads, NUM_TOKENS, NUM_TOKENS)
    )
    for array in (found.residual, *found.mlp.values(), *found.attention.values()):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()


def check_attention(backend: Backend, found: Captured) -> None:
    """AssertionError where weights do not sum to 1, or one lies on the future or outside a sliding window."""
    query, key = found.queries[:, None], np.arange(found.num_tokens)
    for layer, weights in found.attention.items():
        window = backend.spec.layers[layer].attention.sliding_window or found.num_tokens
        seen = (key <= query) & (key > query - window)
        assert (weights[:, ~seen] == 0).all(), layer
        assert (weights >= 0).all(), layer
        assert np.abs(weights.sum(-1) - 1).max() <= 1e-5, layer


def test_attention_sums_to_one_over_what_a_query_sees(backend: Backend) -> None:
    check_attention(backend, captured(backend, CAPTURING, max_num_batched_tokens=40))


def test_the_check_catches_a_look_at_the_future_and_a_lost_weight(reference: Backend) -> None:
    found = captured(reference, CAPTURING)
    found.attention[1][2, 5, 6] += np.float32(1e-3)
    with pytest.raises(AssertionError):
        check_attention(reference, found)
    found.attention[1][2, 5, 6] = 0
    check_attention(reference, found)
    found.attention[0][0, 70, 3] = 0
    with pytest.raises(AssertionError):
        check_attention(reference, found)


def test_contributions_add_up_to_the_last_bit(backend: Backend) -> None:
    residual = captured(backend, CAPTURING).residual
    assert residual is not None
    exact = residual.astype(np.float64)
    x = exact[0]
    for contribution in np.diff(exact, axis=0):
        x = x + contribution
    assert np.array_equal(x.astype(np.float32), residual[-1])
    assert (np.abs(np.diff(exact, axis=0)).max(axis=(1, 2)) > 0).all()


def test_a_choice_is_the_same_as_a_part_of_everything(backend: Backend) -> None:
    whole = captured(backend, CAPTURING)
    last = len(backend.spec.layers) - 1
    wish = CaptureParams(
        residual=[-1], mlp=[0], positions=[76, -1, 3], attention=[-1], heads=[2, 1], queries=[0, 64, -1, 77]
    )
    for budget in (512, 17, 2):
        part = captured(backend, (PROMPT, PARAMS, wish), max_num_batched_tokens=budget)
        assert whole.residual is not None
        assert part.positions.tolist() == [3, 74, 76]
        assert part.residual_points.tolist() == [2 * last, 2 * last + 1, 2 * last + 2]
        assert np.array_equal(part.residual, whole.residual[-3:, part.positions])
        assert part.mlp.keys() == {0}
        assert np.array_equal(part.mlp[0], whole.mlp[0][part.positions])
        assert part.queries.tolist() == [0, 64, 74, 77]
        assert part.heads.tolist() == [1, 2]
        assert part.attention.keys() == {last}
        assert np.array_equal(part.attention[last], whole.attention[last][1:3][:, part.queries])
        assert part.operations == []
        assert part.step_tokens == []


def test_tokens_that_never_came_are_left_out(backend: Backend) -> None:
    (plain,) = run(backend, [PLAIN])
    second = plain.outputs[0].token_ids[1]
    params = replace(PARAMS, stop_token_ids=[second])
    found = captured(backend, (PROMPT, params, CaptureParams(residual=[0], positions=[74, 75, 77])))
    assert found.num_tokens == len(PROMPT) + plain.outputs[0].token_ids.index(second) < NUM_TOKENS
    assert found.positions.tolist() == [position for position in (74, 75, 77) if position < found.num_tokens]


def test_preemption_changes_nothing(backend: Backend) -> None:
    alone = captured(backend, CAPTURING)
    backend.allocate_kv_cache(64)
    engine = CheckedEngine(backend, FakeTokenizer(), SchedulerConfig(4, 30), num_blocks=64, max_model_len=320)
    engine.add_request("capturing", PROMPT, PARAMS, capture=EVERYTHING)
    for steps in (4, 3):
        for _ in range(steps):
            engine.step()
        assert engine.scheduler.preempt_last()
    engine.run()
    reply = engine.replies["capturing"]
    assert reply.metrics.preemptions == 2
    assert_same(reply.captured, alone)
    assert reply.captured is not None
    assert sum(reply.captured.step_tokens) > NUM_TOKENS, "the steps before a preemption count"


def fail_together(backend: Backend, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Steps of several sequences fail, after they have written what is captured."""
    original = getattr(backend, name)

    def failing(*arguments: Any) -> Any:
        result = original(*arguments)
        if (arguments[0].num_seqs if name == "forward" else arguments[1].num_rows) > 1:
            raise BackendError("told to fail")
        return result

    monkeypatch.setattr(backend, name, failing, raising=False)


@pytest.mark.parametrize("name", ["forward", "sample"])
def test_a_failed_step_that_is_retried_changes_nothing(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    alone = captured(backend, CAPTURING)
    fail_together(backend, monkeypatch, name)
    first, *others = run(backend, [CAPTURING, *NEIGHBOURS], max_num_batched_tokens=40)
    assert first.captured is not None
    assert_same(first.captured, alone)
    assert sum(first.captured.step_tokens) == NUM_TOKENS, "only steps that succeeded count"
    assert all(reply.error is None for reply in others)


def test_a_request_that_fails_or_is_aborted_gives_what_it_had(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = captured(backend, CAPTURING)
    assert alone.residual is not None
    forward = backend.forward
    for failing in (True, False):
        backend.allocate_kv_cache(64)
        engine = CheckedEngine(backend, FakeTokenizer(), SchedulerConfig(4, 20), num_blocks=64, max_model_len=320)
        engine.add_request("capturing", PROMPT, PARAMS, capture=EVERYTHING)
        engine.step()
        engine.step()
        if failing:

            def failed(batch: ForwardBatch) -> ForwardOutput:
                raise BackendError("told to fail")

            monkeypatch.setattr(backend, "forward", failed)
            engine.step()
            monkeypatch.setattr(backend, "forward", forward)
        else:
            engine.abort("capturing")
        reply = engine.replies["capturing"]
        assert reply.outputs[0].finish_reason == ("error" if failing else "abort")
        assert reply.captured is not None
        assert reply.captured.num_tokens == 40
        assert np.array_equal(reply.captured.residual, alone.residual[:, :40])
        assert np.array_equal(reply.captured.attention[0], alone.attention[0][:, :40, :40])
        assert not engine._captures


def test_a_request_that_was_never_computed_gives_empty_arrays(reference: Backend) -> None:
    reference.allocate_kv_cache(8)
    engine = CheckedEngine(reference, FakeTokenizer(), SchedulerConfig(4, 20), num_blocks=8, max_model_len=320)
    engine.add_request("capturing", PROMPT, PARAMS, capture=EVERYTHING)
    engine.abort("capturing")
    found = engine.replies["capturing"].captured
    assert found is not None
    assert found.num_tokens == 0
    assert found.residual is not None
    assert found.residual.shape == (5, 0, 64)
    assert found.mlp[1].shape == (0, 96)
    assert found.attention[1].shape == (4, 0, 0)
    assert found.operations == []


class TestPrefixCache:
    """A token that comes from the cache is not computed, so there would be nothing to see of it."""

    def replies(self, backend: Backend, *wishes: CaptureParams | None) -> list[Any]:
        backend.allocate_kv_cache(64)
        engine = CheckedEngine(backend, FakeTokenizer(), SchedulerConfig(4, 512), num_blocks=64, max_model_len=320)
        for number, wish in enumerate(wishes):
            engine.add_request(str(number), 3 * PROMPT, PARAMS, capture=wish)  # three full blocks, and some
            engine.run()
        return [engine.replies[str(number)] for number in range(len(wishes))]

    def test_what_is_wanted_is_computed_and_serves_others(self, backend: Backend) -> None:
        first, again, plain = self.replies(backend, EVERYTHING, EVERYTHING, None)
        assert [reply.metrics.cached_tokens for reply in (first, again, plain)] == [0, 0, 224]
        assert_same(again.captured, first.captured)
        assert first.outputs == again.outputs == plain.outputs

    @pytest.mark.parametrize(
        ("wish", "cached"),
        [
            (CaptureParams(operations=True), 224),
            (CaptureParams(residual=True, positions=[-1]), 224),
            (CaptureParams(residual=True, positions=[-1], attention=True, queries=[128]), 128),
            (CaptureParams(attention=True, queries=[127]), 127),
        ],
    )
    def test_tokens_before_the_first_wanted_may_come_from_the_cache(
        self, backend: Backend, wish: CaptureParams, cached: int
    ) -> None:
        fresh, _, hit = self.replies(backend, wish, None, wish)
        assert (fresh.metrics.cached_tokens, hit.metrics.cached_tokens) == (0, cached)
        assert_same(hit.captured, fresh.captured)
        assert hit.outputs == fresh.outputs

    def test_mutant_a_cache_hit_that_skips_wanted_tokens_is_caught(
        self, reference: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(CaptureSelection, "first_token", None)
        first, again = self.replies(reference, EVERYTHING, EVERYTHING)
        with pytest.raises(AssertionError):
            assert_same(again.captured, first.captured)


def test_costs_are_those_of_the_whole_batch(backend: Backend) -> None:
    found = captured(backend, CAPTURING, max_num_batched_tokens=40)
    assert found.step_tokens == [40, 35, 1, 1, 1]
    assert [(cost.layer, cost.name) for cost in found.operations] == operation_names(len(backend.spec.layers))
    assert all(cost.seconds > 0 for cost in found.operations)
    assert {cost.calls for cost in found.operations[:-2]} == {5}
    assert {cost.calls for cost in found.operations[-2:]} == {4}, "the first step had no logits"
    in_batch = run(backend, [CAPTURING, *NEIGHBOURS])[0].captured
    assert in_batch is not None
    assert in_batch.step_tokens == [75 + 3 + 70 + 20, 4, 3, 3]
    only_costs = captured(backend, (PROMPT, PARAMS, CaptureParams(operations=True)))
    assert only_costs.residual is None
    assert only_costs.mlp == only_costs.attention == {}
    assert only_costs.num_tokens == NUM_TOKENS


def test_the_operations_of_a_step_fit_into_its_time(backend: Backend) -> None:
    """They are measured one after another: their sum is no more than the forward pass took, capturing or not."""
    backend.allocate_kv_cache(64)
    engine = CheckedEngine(backend, FakeTokenizer(), SchedulerConfig(4, 512), num_blocks=64, max_model_len=320)
    engine.add_request("capturing", PROMPT, PARAMS, capture=EVERYTHING)
    engine.run()
    found = engine.replies["capturing"].captured
    assert found is not None
    assert sum(cost.seconds for cost in found.operations) <= engine.metrics().step_times.forward


def test_mutant_a_capture_that_leaks_into_the_answer_is_caught(
    reference: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(self: Observer, point: int, x: np.ndarray) -> None:
        for wanted in self._sequences:
            x[wanted.tokens] *= np.float32(1 + 1e-6)

    (plain,) = run(reference, [PLAIN])
    monkeypatch.setattr(Observer, "residual", leaking)
    (reply,) = run(reference, [CAPTURING])
    assert reply.outputs != plain.outputs


def test_mutant_rows_of_a_neighbour_are_caught(reference: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = captured(reference, CAPTURING)
    forward = reference.forward

    def shifted(batch: ForwardBatch) -> ForwardOutput:
        if batch.capture is not None:
            for wanted in batch.capture.sequences:
                wanted.tokens[:] -= wanted.row > 0
        return forward(batch)

    monkeypatch.setattr(reference, "forward", shifted)
    reply = run(reference, [NEIGHBOURS[0], CAPTURING])[1]
    with pytest.raises(AssertionError):
        assert_same(reply.captured, alone)


def test_mutant_pieces_that_outlive_a_preemption_are_caught(
    reference: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_step = capture_module._Collector.begin_step

    def keeping(self: Any, *arguments: Any) -> Any:
        kept = list(self._pieces)
        piece = begin_step(self, *arguments)
        self._pieces[:] = kept
        return piece

    monkeypatch.setattr(capture_module._Collector, "begin_step", keeping)
    with pytest.raises((AssertionError, ValueError)):
        test_preemption_changes_nothing(reference)


def test_without_captures_nothing_is_done(reference: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at an empty book a step, and every batch is the plain one; also once a capture has ended."""
    monkeypatch.setattr(CaptureBook, "commit", None)
    seen: list[ForwardBatch] = []
    engine = make_engine()
    forward = engine._backend.forward
    monkeypatch.setattr(engine._backend, "forward", lambda batch: seen.append(batch) or forward(batch))
    monkeypatch.setattr(CaptureBook, "attach", None)
    monkeypatch.setattr(CaptureBook, "close", None)
    engine.add_request("a", [1, 2, 3], replace(PARAMS, max_tokens=6))
    engine.run()
    assert [batch.capture for batch in seen] == [None] * 6


def test_a_decode_step_takes_as_many_lines_after_a_capture_as_before(reference: Backend) -> None:
    reference.allocate_kv_cache(8)
    engine = CheckedEngine(reference, FakeTokenizer(), SchedulerConfig(4, 512), num_blocks=8, max_model_len=320)

    def steps_of(wish: CaptureParams | None) -> int:
        engine.scheduler.cache.reset_prefix_cache()
        name = f"request-{engine._num_added}"
        engine.add_request(name, PROMPT, replace(PARAMS, max_tokens=20), capture=wish)
        for _ in range(4):
            engine.step()
        steps = count_steps(engine.step)
        engine.abort(name)
        return steps

    steps_of(None)
    before = steps_of(None)
    assert steps_of(EVERYTHING) > before
    assert steps_of(None) == before


def test_refusals(reference: Backend) -> None:
    reference.allocate_kv_cache(8)
    engine = CheckedEngine(
        reference, FakeTokenizer(), SchedulerConfig(4, 512, max_waiting=1), num_blocks=8, max_model_len=320
    )
    for params, wish, param, message in (
        (PARAMS, CaptureParams(residual=[2]), "residual", "residual has 2, but the model has layers 0 to 1"),
        (PARAMS, CaptureParams(attention=True, heads=[4]), "heads", "heads 0 to 3"),
        (PARAMS, CaptureParams(mlp=True, positions=[NUM_TOKENS]), "positions", f"tokens 0 to {NUM_TOKENS - 1} at most"),
        (replace(PARAMS, n=2), EVERYTHING, "n", "n is 2, but a capture is of one continuation"),
        (PARAMS, True, "capture", "must be a CaptureParams, not True"),
    ):
        with pytest.raises(InvalidRequestError, match=message) as refused:
            engine.add_request("capturing", PROMPT, params, capture=wish)  # type: ignore[arg-type]
        assert refused.value.param == param
        assert not engine._captures
    engine.add_request("first", PROMPT, PARAMS, capture=EVERYTHING)
    with pytest.raises(QueueFullError):
        engine.add_request("second", PROMPT, PARAMS, capture=EVERYTHING)
    engine.abort("first")
    assert not engine._captures


def test_memory_beyond_the_limit_is_refused_with_the_sizes(reference: Backend) -> None:
    residual, mlp, attention = 4 * 5 * 78 * 64, 4 * 78 * 96 * 2, 4 * 4 * 78 * 78 * 2
    needed = residual + mlp + attention + residual
    reference.allocate_kv_cache(8)

    def engine(memory: int | None) -> CheckedEngine:
        return CheckedEngine(
            reference,
            FakeTokenizer(),
            SchedulerConfig(4, 512),
            num_blocks=8,
            max_model_len=320,
            capture_memory=memory,
        )

    tight = engine(needed - 1)
    with pytest.raises(CapacityError) as refused:
        tight.add_request("capturing", PROMPT, PARAMS, capture=EVERYTHING)
    assert refused.value.param == "capture"
    for part in ("78 tokens", f"{needed:,}", f"residual {residual:,}", f"mlp {mlp:,}", f"attention {attention:,}"):
        assert part in refused.value.message
    assert f"the limit is {needed - 1:,}: lower max_tokens, or choose fewer layers" in refused.value.message
    tight.add_request("less", PROMPT, replace(PARAMS, max_tokens=1), capture=EVERYTHING)
    tight.run()

    enough = engine(needed)
    enough.add_request("first", PROMPT, PARAMS, capture=EVERYTHING)
    with pytest.raises(CapacityError, match=f"beside {needed:,} of other unfinished requests"):
        enough.add_request("second", PROMPT, PARAMS, capture=CaptureParams(mlp=[0]))
    enough.add_request("costs", PROMPT, PARAMS, capture=CaptureParams(operations=True))
    enough.run()
    enough.add_request("second", PROMPT, PARAMS, capture=EVERYTHING)
    enough.run()
    assert_same(enough.replies["second"].captured, enough.replies["first"].captured)


def test_half_of_the_free_memory_is_the_limit(reference: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "free_memory", lambda: 1000)
    with pytest.raises(CapacityError, match="50% of the free memory is 500"):
        run(reference, [CAPTURING])


def test_memory_that_is_not_to_be_had_fails_the_request_alone(
    reference: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [reply.outputs for reply in run(reference, NEIGHBOURS)]

    def nothing_left(self: Any, *_: int) -> Any:
        raise MemoryError

    monkeypatch.setattr(CaptureSelection, "residual", nothing_left)
    first, *others = run(reference, [CAPTURING, *NEIGHBOURS])
    assert isinstance(first.error, CapacityError)
    assert "no memory is left" in first.error.message
    assert [reply.outputs for reply in others] == plain


def test_an_answer_whose_captures_cannot_be_put_together_says_so(
    reference: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_left(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(capture_module, "_joined", nothing_left)
    (plain,) = run(reference, [PLAIN])
    (reply,) = run(reference, [CAPTURING])
    assert reply.outputs == plain.outputs
    assert reply.captured is None
    assert isinstance(reply.error, CapacityError)


def test_generate_chat_and_stream_take_a_capture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Backend
) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", vocab_size=VOCAB_SIZE)
    monkeypatch.setattr(loading.Tokenizer, "from_gguf", lambda metadata: FakeTokenizer())
    with LLM(path, backend="reference", kv_cache_dtype="f32", kv_cache_memory=1 << 22) as llm:
        expected = captured(reference, CAPTURING)
        for replies in (
            llm.generate([PROMPT, PROMPT], PARAMS, capture=EVERYTHING),
            llm.generate_iter(iter([PROMPT, PROMPT]), PARAMS, capture=EVERYTHING),
        ):
            for reply in replies:
                assert_same(reply.captured, expected)
        with llm.stream(PROMPT, PARAMS, capture=EVERYTHING) as stream:
            *_, last = stream
        assert last.request_output is not None
        assert_same(last.request_output.captured, expected)
        (reply,) = llm.chat([{"role": "user", "content": "hi"}], PARAMS, capture=EVERYTHING)
        assert reply.captured is not None
        assert reply.captured.num_tokens == len(reply.prompt_token_ids) + 3
        assert llm.generate(PROMPT, PARAMS)[0].captured is None
        with pytest.raises(InvalidRequestError, match="layers 0 to 1"):
            llm.generate([PROMPT, PROMPT], PARAMS, capture=CaptureParams(residual=[9]))


def test_the_async_engine_takes_a_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Backend) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", vocab_size=VOCAB_SIZE)
    monkeypatch.setattr(loading.Tokenizer, "from_gguf", lambda metadata: FakeTokenizer())

    async def main() -> list[RequestOutput | None]:
        async with AsyncEngine(path, backend="reference", kv_cache_dtype="f32", kv_cache_memory=1 << 22) as engine:
            whole = await engine.complete(PROMPT, PARAMS, capture=EVERYTHING)
            *_, last = [token async for token in engine.generate(PROMPT, PARAMS, capture=EVERYTHING)]
            with pytest.raises(InvalidRequestError, match="layers 0 to 1"):
                engine.generate(PROMPT, PARAMS, capture=CaptureParams(residual=[9]))
            monkeypatch.setattr(capture_module, "free_memory", lambda: 1000)
            with pytest.raises(CapacityError, match="lower max_tokens"):
                await engine.complete(PROMPT, PARAMS, capture=EVERYTHING)
            return [whole, last.request_output]

    expected = captured(reference, CAPTURING)
    for reply in asyncio.run(main()):
        assert reply is not None
        assert_same(reply.captured, expected)


def test_prompts_wait_for_the_memory_that_their_captures_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Backend
) -> None:
    """Where there is room for one at a time, they follow one another; what never has room is refused."""
    path = write_tiny_model(tmp_path / "tiny.gguf", vocab_size=VOCAB_SIZE)
    monkeypatch.setattr(loading.Tokenizer, "from_gguf", lambda metadata: FakeTokenizer())
    selection = CaptureSelection(EVERYTHING, reference.spec)
    monkeypatch.setattr(capture_module, "free_memory", lambda: 2 * selection.peak_bytes(NUM_TOKENS))
    prompts = [PROMPT, PROMPT[1:], [*PROMPT, 1], PROMPT[2:]]
    with LLM(path, backend="reference", kv_cache_dtype="f32", kv_cache_memory=1 << 22) as llm:
        replies = list(llm.generate_iter(prompts, PARAMS, capture=EVERYTHING))
        assert isinstance(replies[2].error, CapacityError)
        assert replies[2].captured is None
        for index in (0, 1, 3):
            assert replies[index].error is None
            assert_same(replies[index].captured, captured(reference, (prompts[index], PARAMS, EVERYTHING)))
            assert replies[index].captured.step_tokens[0] == len(prompts[index]), "one at a time"
        wish = CaptureParams(mlp=True, positions=[74])
        short = list(llm.generate_iter([PROMPT, PROMPT[:70]], PARAMS, capture=wish))
        assert short[0].error is None
        assert isinstance(short[1].error, InvalidRequestError)
        assert short[1].error.param == "positions"
        with pytest.raises(CapacityError, match="lower max_tokens"):
            llm.generate(prompts, PARAMS, capture=EVERYTHING)
        assert not llm.metrics().running_sequences
