"""The default model, through the engine, as a user gets it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pellucid import LLM, ModelNotFoundError, SamplingParams, SpeculativeConfig
from pellucid.weights.catalog import resolve
from tests.support.schedules import SCHEDULES, random_requests, run, run_alone

MODEL = "smollm2-135m-instruct"

pytestmark = pytest.mark.slow


def load(model: str = MODEL, **options: Any) -> LLM:
    try:
        resolve(model, download=False)
    except ModelNotFoundError:
        pytest.skip(f"{model} is not in the cache: pellucid pull {model}")
    return LLM(model, seed=1, **options)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with load() as llm:
        yield llm


def test_it_knows_france(llm: LLM) -> None:
    (output,) = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=4))
    assert output.outputs[0].text.startswith(" Paris")


def test_a_chat_ends_by_itself(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=200))
    assert output.outputs[0].finish_reason == "stop"
    assert "ello" in output.outputs[0].text
    assert "<|im_end|>" not in output.outputs[0].text
    streamed = list(llm.stream(messages, SamplingParams(temperature=0, max_tokens=200)))
    assert "".join(token.text for token in streamed) == output.outputs[0].text


def test_schedules_never_change_a_bit(llm: LLM) -> None:
    requests = random_requests(60, 40_000, max_prompt_len=600, stops=[" the", ("e", "a")], max_tokens=(1, 8, 24))
    options = {"max_model_len": 640}
    wanted = run_alone(llm.backend, llm.tokenizer, requests, **options)
    for name, schedule in SCHEDULES.items():
        got = run(llm.backend, llm.tokenizer, requests, **options, **schedule)
        assert got.answers == wanted.answers, name
        assert got.logits == wanted.logits, name
    with load(threads=1) as other:
        got = run(other.backend, other.tokenizer, requests, **options, **SCHEDULES["batched"])
        assert got == wanted


@pytest.mark.parametrize("model", [MODEL, "gemma-3-270m"])
def test_guesses_never_change_a_bit(model: str) -> None:
    """As many as pay, and always; of texts that repeat, so that many are right. Logprobs tell of the last bit."""
    text = "one two three four five six seven eight nine ten " * 30
    prompts = [text[50 * number :] for number in range(6)]
    params = [
        SamplingParams(temperature=temperature, seed=9, max_tokens=40, logprobs=5, ignore_eos=True, n=number % 2 + 1)
        for number, temperature in enumerate((0.0, 0.0, 0.3, 0.7, 0.7, 1.0))
    ]
    with load(model, max_model_len=640) as llm:
        wanted = [output.outputs for output in llm.generate(prompts, params)]
    for adaptive in (True, False):
        config = SpeculativeConfig("ngram", 6, adaptive=adaptive)
        with load(model, max_model_len=640, speculative=config) as llm:
            outputs = llm.generate(prompts, params)
            assert [output.outputs for output in outputs] == wanted
            assert adaptive or sum(output.metrics.accepted_tokens for output in outputs) > 50


@pytest.mark.parametrize("model", [MODEL, "gemma-3-270m"])
def test_a_saved_prefix_brings_the_same_bits_back(model: str, tmp_path: Path) -> None:
    """Of Gemma, with more tokens than its sliding window shows."""
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=5, ignore_eos=True)
    path = tmp_path / "prefix"
    with load(model, max_model_len=1024, max_num_seqs=2) as llm:
        prompt = [1000 + 7 * number % 20_000 for number in range(720)]
        (computed,) = llm.generate(prompt, params)
        assert llm.save_prefix(prompt[:700], path) == 640
    with load(model, max_model_len=1024, max_num_seqs=2) as llm:
        assert llm.load_prefix(path) == 640
        (found,) = llm.generate(prompt, params)
    assert (computed.metrics.cached_tokens, found.metrics.cached_tokens) == (0, 640)
    assert found.outputs == computed.outputs
