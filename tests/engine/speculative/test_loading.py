"""Who guesses, made from a configuration: the same answers, memory within its limit, everything closed in the end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pellucid import LLM, AsyncEngine, SamplingParams, SpeculativeConfig
from pellucid.backends.base import Backend
from pellucid.core.errors import BackendError, CapacityError, InvalidRequestError
from pellucid.core.outputs import CompletionOutput
from pellucid.engine import loading
from pellucid.engine.speculative.draft_model import DraftModelDrafter
from pellucid.models.kv_groups import kv_windows
from pellucid.tokenizer.vocabulary import BYTE_LEVEL_ALPHABET, TokenType
from tests.support.tiny_models import write_tiny_model
from tests.support.tokenizers import model_path

TOKENS = [*BYTE_LEVEL_ALPHABET, "<|endoftext|>", "<|im_start|>"]
PROMPTS = ["abcabcabc", "The hedgehog sleeps in winter. " * 6, "x"]
PARAMS = [
    SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, seed=3, n=2, ignore_eos=True),
    SamplingParams(max_tokens=90, temperature=0.7, seed=4, ignore_eos=True),
]


def vocabulary(tokens: list[str]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [TokenType.NORMAL] * 256 + [TokenType.CONTROL] * (len(tokens) - 256),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 256,
    }


def write(path: Path, architecture: str = "llama", tokens: list[str] = TOKENS, **options: Any) -> str:
    return str(
        write_tiny_model(path, architecture, vocab_size=len(tokens), extra_metadata=vocabulary(tokens), **options)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("model") / "model.gguf", "gemma3")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("model") / "small.gguf", metadata={"llama.context_length": 100})


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[Backend]:
    """Every backend that is loaded."""
    loaded: list[Backend] = []
    load_backend = loading.load_backend

    def noted(*args: Any, **kwargs: Any) -> Backend:
        loaded.append(load_backend(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(loading, "load_backend", noted)
    return loaded


def is_closed(backend: Backend) -> bool:
    try:
        backend.allocate_kv_cache(1)
    except BackendError:
        return True
    return False


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ngram": {},
    "lookahead": {"lookahead_window": 5},
    "layer_skip": {"num_draft_tokens": 5, "layers": [0, 2, 6]},
    "draft_model": {"num_draft_tokens": 5},
}


def configuration(method: Any, small: str, *, adaptive: bool) -> SpeculativeConfig:
    draft_model = small if method == "draft_model" else None
    return SpeculativeConfig(method, adaptive=adaptive, draft_model=draft_model, **CONFIGURATIONS[method])


@pytest.fixture(scope="module")
def wanted(model: str) -> list[list[CompletionOutput]]:
    with LLM(model, kv_cache_memory=1 << 20) as llm:
        return [output.outputs for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("method", CONFIGURATIONS)
def test_answers_are_the_same_however_one_guesses(
    method: str, adaptive: bool, model: str, small: str, wanted: list[list[CompletionOutput]], backends: list[Backend]
) -> None:
    config = configuration(method, small, adaptive=adaptive)
    with LLM(model, kv_cache_memory=1 << 20, speculative=config) as llm:
        assert [output.outputs for output in llm.generate(PROMPTS, PARAMS)] == wanted
        assert adaptive or llm.metrics().counters.draft_tokens > 50  # what pays on this machine is not known
    assert len(backends) == 1 + (method == "draft_model")
    assert all(map(is_closed, backends))


def test_requests_of_many_tasks_share_the_draft_model(
    model: str, small: str, wanted: list[list[CompletionOutput]], backends: list[Backend]
) -> None:
    async def answer(engine: AsyncEngine, prompt: str, params: SamplingParams) -> list[CompletionOutput]:
        stream = engine.generate(prompt, params)
        async for _ in stream:
            pass
        assert stream.request_output is not None
        return stream.request_output.outputs

    async def run() -> list[list[CompletionOutput]]:
        config = configuration("draft_model", small, adaptive=False)
        async with AsyncEngine(model, kv_cache_memory=1 << 20, speculative=config) as engine:
            tasks = [answer(engine, prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
            return list(await asyncio.gather(*tasks))

    assert asyncio.run(run()) == wanted
    assert all(map(is_closed, backends))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([*TOKENS[:65], "XX", *TOKENS[66:]], "token 65 is 'XX' in it and 'A' in the model"),
        (TOKENS[:257], "it has 257 tokens and the model 258"),
        ([*TOKENS, "<|im_end|>"], "it has 259 tokens and the model 258"),
    ],
)
def test_a_draft_model_of_another_vocabulary_is_refused(
    tokens: list[str], message: str, model: str, tmp_path: Path, backends: list[Backend]
) -> None:
    other = write(tmp_path / "other.gguf", tokens=tokens)
    with pytest.raises(InvalidRequestError, match=message) as info:
        LLM(model, speculative=SpeculativeConfig("draft_model", draft_model=other))
    assert info.value.param == "draft_model"
    assert len(backends) == 2
    assert all(map(is_closed, backends))


def test_a_layer_that_the_model_does_not_have_is_refused(model: str, backends: list[Backend]) -> None:
    with pytest.raises(InvalidRequestError, match="layers has 7, but this model has layers 0 to 6"):
        LLM(model, speculative=SpeculativeConfig("layer_skip", layers=[0, 7]))
    assert all(map(is_closed, backends))


def drafter_of(llm: LLM) -> DraftModelDrafter:
    drafter = llm._engine._drafter
    assert isinstance(drafter, DraftModelDrafter)
    return drafter


def test_two_models_share_the_memory_for_keys_and_values(model: str, small: str, backends: list[Backend]) -> None:
    memory = 200_000
    config = configuration("draft_model", small, adaptive=False)
    with LLM(model, kv_cache_memory=memory, max_num_seqs=64, speculative=config) as llm:
        own, drafts = (backend.kv_bytes_per_block() for backend in backends)
        num_draft_blocks = drafter_of(llm)._cache.num_blocks
        assert memory - own - drafts < llm.num_kv_blocks * own + num_draft_blocks * drafts <= memory
        groups = len(kv_windows(backends[0].spec))
        assert abs(llm.num_kv_blocks / groups - num_draft_blocks) <= 2
        assert drafter_of(llm)._max_model_len == 100
    with pytest.raises(CapacityError, match="the model's part of kv_cache_memory"):
        LLM(model, kv_cache_memory=20_000, speculative=config)
    assert all(map(is_closed, backends))


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_models_answer_the_same(name: str) -> None:
    """Prompts longer than a KV block, and for one of them longer than the windows of Gemma 3."""
    path = str(model_path(name))
    prompts = ["The lighthouse keeper counted the ships. " * count for count in (9, 70)]
    params = [
        SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=5, ignore_eos=True),
    ]
    configs = [
        None,
        SpeculativeConfig("layer_skip", 4, adaptive=False),
        SpeculativeConfig("draft_model", 4, adaptive=False, draft_model=path),
    ]
    answers = []
    for config in configs:
        with LLM(path, kv_cache_memory=64 << 20, max_model_len=1024, max_num_seqs=2, speculative=config) as llm:
            answers.append([output.outputs for output in llm.generate(prompts, params)])
            assert config is None or llm.metrics().counters.accepted_tokens > 0
    assert all(answer == answers[0] for answer in answers)
