"""The default model, through the engine, as a user gets it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from pellucid import LLM, ModelNotFoundError, SamplingParams
from pellucid.core.outputs import CompletionOutput
from pellucid.weights.catalog import resolve

MODEL = "smollm2-135m-instruct"

pytestmark = pytest.mark.slow


def load(**options: Any) -> LLM:
    try:
        resolve(MODEL, download=False)
    except ModelNotFoundError:
        pytest.skip(f"{MODEL} is not in the cache: pellucid pull {MODEL}")
    return LLM(MODEL, seed=1, **options)


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
    rng = random.Random(0)
    words = ["the", "sea", "light", "of", "a", "quiet", "house", "under", "old", "stars", "and", "rain"]
    shared = " ".join(rng.choices(words, k=150))
    prompts = [shared[: rng.choice([0, 500])] + " ".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(12)]
    params = [
        SamplingParams(max_tokens=20, temperature=rng.choice([0.0, 0.9]), seed=number, logprobs=1, ignore_eos=True)
        for number in range(12)
    ]

    def run(llm: LLM) -> list[list[CompletionOutput]]:
        return [output.outputs for output in llm.generate(prompts, params)]

    alone = []
    for prompt, each in zip(prompts, params, strict=True):
        llm.reset_prefix_cache()
        alone.append(llm.generate(prompt, each)[0].outputs)
    assert run(llm) == alone
    for options in (
        {"threads": 1},
        {"max_num_seqs": 5, "max_num_batched_tokens": 17},
        {"max_model_len": 256, "kv_cache_memory": 12_000_000},
    ):
        with load(**options) as other:
            assert run(other) == alone
