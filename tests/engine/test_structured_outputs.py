"""Answers follow their grammars in every kind of request, and neither schedule nor company changes a bit of them."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.json_schemas import make_schemas, validate
from pellucid import LLM, AsyncEngine, InvalidRequestError, QueueFullError, SamplingParams, StructuredOutputsParams
from pellucid.backends.registry import load_backend
from pellucid.core.config import BackendConfig, SchedulerConfig, SpeculativeConfig
from pellucid.decoding.grammar import GrammarMatcher
from pellucid.decoding.grammar_compiler import NUM_THREADS, GrammarCompiler
from pellucid.engine import async_engine
from pellucid.weights.loader import open_model
from tests.support.drafters import ScriptedDrafter
from tests.support.engines import CheckedEngine
from tests.support.mutants import mutant
from tests.support.tiny_models import write_tiny_model
from tests.support.tokenizers import byte_level_metadata

pytestmark = pytest.mark.filterwarnings("ignore:the native core is not installed")

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "n": {"type": "integer", "minimum": -20, "maximum": 300},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}
CALLS = {
    "type": "triggered_tags",
    "triggers": ["<f>"],
    "tags": [
        {"begin": f"<f>{name}", "content": {"type": "json_schema", "json_schema": CITY}, "end": "!"} for name in "gh"
    ],
}
MIXED: list[dict[str, Any]] = [
    {"json": CITY},
    {"regex": "(ab|c){1,9}!"},
    {"choice": ["yes", "no", "maybe"]},
    {"grammar": 'root ::= "<" ("x" | "tru" root){1,2} ">"\n'},
    {"structural_tag": {"format": {**CALLS, "at_least_one": True, "stop_after_first": True}}},
]
PROMPTS = ["a", "some longer prompt", "x y z", "the last of them"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = byte_level_metadata()
    size = len(metadata["tokenizer.ggml.tokens"])
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return write_tiny_model(path, vocab_size=size, extra_metadata=metadata)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, threads=1, max_model_len=900) as llm:
        yield llm


def asking(seed: int = 0, /, max_tokens: int = 60, **fields: Any) -> SamplingParams:
    """Sampling with a grammar of `MIXED`, by `seed`."""
    structured = StructuredOutputsParams(**MIXED[seed % len(MIXED)])
    return SamplingParams(seed=seed, max_tokens=max_tokens, structured_outputs=structured, **fields)


def follows(text: str, params: SamplingParams) -> bool:
    asked = params.structured_outputs
    assert asked is not None
    if asked.json is not None:
        value = json.loads(text)
        return set(value) == {"name", "n"} and len(value["name"]) <= 6 and -20 <= value["n"] <= 300
    if asked.regex is not None:
        return re.fullmatch(asked.regex, text) is not None
    if asked.choice is not None:
        return text in asked.choice
    if asked.structural_tag is not None:
        return re.fullmatch(r'<f>[gh]\{"name": ".*", "n": -?[0-9]+\}!', text, re.DOTALL) is not None
    return text.count("<") == text.count(">") > 0


def test_random_logits_hold_to_schemas(llm: LLM) -> None:
    """The hardest case: this model would write anything."""
    pytest.importorskip("jsonschema")
    schemas = make_schemas(40, seed=3)
    params = [
        SamplingParams(seed=seed, max_tokens=800, structured_outputs=StructuredOutputsParams(json=schema))
        for seed, schema in enumerate(schemas)
    ]
    outputs = llm.generate(["x"] * len(schemas), params)
    for schema, output in zip(schemas, outputs, strict=True):
        (completion,) = output.outputs
        assert completion.finish_reason == "stop"
        validate(completion.text, schema)


def test_company_and_schedule_change_nothing(model: Path, llm: LLM) -> None:
    params = [asking(seed, n=1 + seed % 3) for seed in range(8)]
    prompts = [PROMPTS[seed % 4] * (1 + seed) for seed in range(8)]
    alone = [llm.generate(prompt, each)[0].outputs for prompt, each in zip(prompts, params, strict=True)]
    for each, outputs in zip(params, alone, strict=True):
        assert all(follows(output.text, each) for output in outputs if output.finish_reason == "stop")
    assert [each.outputs for each in llm.generate(prompts, params)] == alone
    plain = SamplingParams(seed=1, max_tokens=30, ignore_eos=True)
    company = llm.generate([*prompts, *prompts], [*params, *[plain] * 8])
    assert [each.outputs for each in company[:8]] == alone


def test_preemption_changes_nothing(model: Path, llm: LLM) -> None:
    long = StructuredOutputsParams(regex="([a-c]{10} ){20}!")
    params = [SamplingParams(seed=seed, max_tokens=300, structured_outputs=long) for seed in range(4)]
    expected = [output.outputs for output in llm.generate(PROMPTS, params)]
    assert all(outputs[0].finish_reason == "stop" for outputs in expected)
    block = llm.backend.kv_bytes_per_block()
    with LLM(
        model, threads=1, max_model_len=320, max_num_seqs=4, max_num_batched_tokens=16, kv_cache_memory=7 * block
    ) as small:
        assert [output.outputs for output in small.generate(PROMPTS, params)] == expected
        assert small.metrics().counters.preemptions


@pytest.mark.parametrize("wrong", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_change_nothing(model: Path, llm: LLM, wrong: float, temperature: float) -> None:
    params = [asking(seed, temperature=temperature) for seed in range(8)]
    prompts = [llm.tokenizer.encode(PROMPTS[seed % 4]) for seed in range(8)]
    expected = [llm.generate(prompt, each)[0].outputs for prompt, each in zip(prompts, params, strict=True)]
    truth = {(seed, 0): outputs[0].token_ids for seed, outputs in enumerate(expected)}
    with open_model(model) as model_file:
        backend = load_backend(model_file, BackendConfig("auto", 1), kv_cache_dtype="f16")
    backend.allocate_kv_cache(64)
    engine = CheckedEngine(
        backend,
        llm.tokenizer,
        SchedulerConfig(8, 128),
        num_blocks=64,
        max_model_len=900,
        speculative=SpeculativeConfig("ngram", 4, adaptive=False),
        drafter=ScriptedDrafter(llm.spec.vocab_size, truth, wrong),
    )
    for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(number), prompt, each)
    engine.run()
    assert [engine.replies[str(number)].outputs for number in range(8)] == expected
    assert engine.metrics().counters.accepted_tokens > 40
    backend.close()


def test_a_mask_of_other_tokens_is_noticed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    late = mutant(GrammarMatcher._masks, "self._move_to(token_ids)", "self._move_to(token_ids[:-1])")
    monkeypatch.setattr(GrammarMatcher, "_masks", late)
    with pytest.raises((AssertionError, InvalidRequestError, ValueError)):
        test_company_and_schedule_change_nothing(Path(llm.model_path), llm)


def test_an_answer_that_is_cut_off_says_so(llm: LLM) -> None:
    (output,) = llm.generate("x", asking(0, max_tokens=3))
    assert output.outputs[0].finish_reason == "length"
    assert output.outputs[0].text.startswith('{"')


def test_a_complete_answer_ends_with_stop(llm: LLM) -> None:
    (output,) = llm.generate("x", asking(2, max_tokens=50))
    completion = output.outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert completion.text in MIXED[2]["choice"]
    assert completion.token_ids[-1] in llm.tokenizer.eos_token_ids
    assert llm.tokenizer.decode(completion.token_ids[:-1]) == completion.text


def test_a_stop_token_ends_a_complete_answer(llm: LLM) -> None:
    stop = llm.tokenizer.token_to_id("<|im_start|>")
    assert stop is not None
    params = asking(2, max_tokens=50, stop_token_ids=[stop], banned_token_ids=sorted(llm.tokenizer.eos_token_ids))
    completion = llm.generate("x", params)[0].outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text in MIXED[2]["choice"]


def test_masks_that_leave_nothing_fail_the_request_alone(llm: LLM) -> None:
    impossible = asking(2, min_tokens=50)
    with pytest.raises(InvalidRequestError, match="min_tokens and structured_outputs rule out every token"):
        llm.generate(PROMPTS, [impossible, *[asking(seed) for seed in range(3)]])
    outputs = list(llm.generate_iter(PROMPTS, iter([impossible, *[asking(seed) for seed in range(3)]])))
    assert outputs[0].error is not None
    assert [output.outputs for output in outputs[1:]] == [
        llm.generate(prompt, asking(seed))[0].outputs for seed, prompt in enumerate(PROMPTS[1:])
    ]


def test_a_bad_grammar_is_refused_before_anything_is_computed(llm: LLM) -> None:
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a("))
    before = llm.metrics().counters
    for call in (
        lambda: llm.generate(PROMPTS, [asking(0), bad, asking(1), asking(2)]),
        lambda: llm.stream("x", bad),
    ):
        with pytest.raises(InvalidRequestError, match="unclosed group") as refused:
            call()
        assert refused.value.param == "structured_outputs.regex"
    assert llm.metrics().counters == before
    outputs = list(llm.generate_iter(PROMPTS[:2], iter([bad, asking(0)])))
    assert isinstance(outputs[0].error, InvalidRequestError)
    assert outputs[1].error is None


def test_streams_follow_their_grammar(llm: LLM) -> None:
    params = asking(0)
    text = "".join(token.text for token in llm.stream("x", params))
    assert text == llm.generate("x", params)[0].outputs[0].text
    assert follows(text, params)


def test_plain_requests_cost_nothing_more(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(model, threads=1, max_model_len=200) as plain:
        plain.generate("x", SamplingParams(max_tokens=3))
        engine = plain._engine
        assert engine.intake.grammars._threads is None
        assert engine._constraints._grammars._workers is None
        assert not engine._constraints


class BlockedCompiler:
    """Holds every compilation up until it is released. Whoever submits one waits until it has begun, if it can."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released = threading.Event()
        begun = threading.Semaphore(0)
        free_threads = [begun] * NUM_THREADS
        compile_it, submit = GrammarCompiler._compile, GrammarCompiler.submit

        def held_up(compiler: GrammarCompiler, params: StructuredOutputsParams) -> Any:
            begun.release()
            self.released.wait()
            return compile_it(compiler, params)

        def submitted(compiler: GrammarCompiler, params: StructuredOutputsParams) -> Any:
            compiling = submit(compiler, params)
            if free_threads:
                free_threads.pop().acquire()
            return compiling

        monkeypatch.setattr(GrammarCompiler, "_compile", held_up)
        monkeypatch.setattr(GrammarCompiler, "submit", submitted)


def test_others_go_on_while_grammars_are_compiled(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = BlockedCompiler(monkeypatch)
    plain = SamplingParams(seed=1, max_tokens=20)

    async def run() -> None:
        async with AsyncEngine(model, threads=1, max_model_len=900) as engine:
            asked = [asyncio.create_task(engine.complete("x", asking(seed))) for seed in range(4)]
            others = await asyncio.gather(*(engine.complete("hello", plain) for _ in range(4)))
            assert all(len(other.outputs[0].token_ids) for other in others)
            assert not any(task.done() for task in asked)
            blocked.released.set()
            for seed, reply in enumerate(await asyncio.gather(*asked)):
                completion = reply.outputs[0]
                assert completion.finish_reason == "length" or follows(completion.text, asking(seed))

    asyncio.run(run())


def test_a_grammar_that_takes_too_long_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = BlockedCompiler(monkeypatch)
    monkeypatch.setattr(async_engine, "COMPILE_SECONDS", 0.05)

    async def run() -> None:
        async with AsyncEngine(model, threads=1, max_model_len=900) as engine:
            replies = await asyncio.gather(
                *(engine.complete("x", asking(seed)) for seed in range(3)), return_exceptions=True
            )
            kinds = sorted(type(reply).__name__ for reply in replies)
            assert kinds == ["InvalidRequestError", "InvalidRequestError", "QueueFullError"]
            assert {reply.status for reply in replies if isinstance(reply, QueueFullError)} == {429}
            assert not engine._requests
            blocked.released.set()
            assert (await engine.complete("x", SamplingParams(max_tokens=3))).outputs

    asyncio.run(run())
    blocked.released.set()


def test_the_time_of_a_grammar_begins_once_the_vocabulary_is_there(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("_get_vocabulary", "submit"):
        work = getattr(GrammarCompiler, name)

        def watched(compiler: GrammarCompiler, *args: Any, name: str = name, work: Any = work) -> Any:
            order.append(f"{name} begins")
            result = work(compiler, *args)
            order.append(f"{name} ends")
            return result

        monkeypatch.setattr(GrammarCompiler, name, watched)

    async def run() -> None:
        async with AsyncEngine(model, threads=1, max_model_len=900) as engine:
            await engine.complete("x", asking(2))

    asyncio.run(run())
    assert order[:3] == ["_get_vocabulary begins", "_get_vocabulary ends", "submit begins"]


def test_a_bad_grammar_concerns_its_own_request_alone(model: Path) -> None:
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(grammar="start: nothing\n"))

    async def run() -> None:
        async with AsyncEngine(model, threads=1, max_model_len=900) as engine:
            replies = await asyncio.gather(
                engine.complete("x", bad), engine.complete("x", asking(2)), return_exceptions=True
            )
            assert isinstance(replies[0], InvalidRequestError)
            assert replies[0].param == "structured_outputs.grammar"
            assert not isinstance(replies[1], BaseException)
            assert replies[1].outputs[0].text in MIXED[2]["choice"]
            assert not engine._requests
            assert engine._num_coming == 0

    asyncio.run(run())


def test_every_beam_follows_its_grammar(llm: LLM) -> None:
    """Alone and beside others; a grammar of few answers gives no more than there are."""
    params = [asking(seed, temperature=0, num_beams=4, n=4) for seed in range(3)]
    alone = [llm.generate(prompt, own)[0].outputs for prompt, own in zip(PROMPTS, params, strict=False)]
    together = [reply.outputs for reply in llm.generate(PROMPTS[:3], params)]
    assert together == alone
    for own, outputs in zip(params, alone, strict=True):
        assert all(follows(output.text, own) for output in outputs if output.finish_reason == "stop")
    few = SamplingParams(
        temperature=0,
        num_beams=5,
        n=5,
        structured_outputs=StructuredOutputsParams(
            regex="[ab]",
        ),
        max_tokens=9,
    )
    (reply,) = llm.generate("x", few)
    assert {output.text for output in reply.outputs} == {"a", "b"}
