"""The promise of the whole: a request's logits are the same to the bit whatever runs beside it, however scheduled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.backends.base import Backend
from pellucid.backends.reference import backend as reference
from pellucid.core.batch import ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.core.config import BLOCK_SIZE
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.kvcache import cache_manager, prefix_cache
from pellucid.kvcache.cache_manager import CacheManager
from pellucid.kvcache.prefix_cache import PrefixCache
from pellucid.models.spec import AttentionSpec
from tests.support.fake_backend import VOCAB_SIZE
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.mutants import mutant
from tests.support.schedules import SCHEDULES, Request, Run, random_requests, run, run_alone
from tests.support.tiny_models import load_tiny, write_tiny_model

MAX_PROMPT_LEN = 600
MAX_MODEL_LEN = 640


def tiny_model(folder: Path, architecture: str) -> Path:
    return write_tiny_model(folder / "tiny.gguf", architecture, vocab_size=VOCAB_SIZE)


def requests_for(count: int, max_prompt_len: int = MAX_PROMPT_LEN) -> list[Request]:
    stops = ["e", ("ab", "Q"), "z"]
    return random_requests(count, VOCAB_SIZE, max_prompt_len=max_prompt_len, stops=stops, max_tokens=(1, 4, 12, 40))


def alone(backend: Backend, requests: list[Request]) -> Run:
    return run_alone(backend, FakeTokenizer(), requests, max_model_len=MAX_MODEL_LEN)


def scheduled(backend: Backend, requests: list[Request], schedule: str) -> Run:
    return run(backend, FakeTokenizer(), requests, max_model_len=MAX_MODEL_LEN, **SCHEDULES[schedule])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_schedule_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    requests = requests_for(200)
    path = tiny_model(tmp_path, architecture)
    backend = load_tiny(path, "cpu", threads=1)
    wanted = alone(backend, requests)
    runs = {schedule: scheduled(backend, requests, schedule) for schedule in SCHEDULES}
    backend.close()
    backend = load_tiny(path, "cpu", threads=2)
    runs["two threads"] = scheduled(backend, requests, "batched")
    backend.close()
    for name, got in runs.items():
        assert got.answers == wanted.answers, name
        assert got.logits == wanted.logits, name
        assert got.prompt_logprobs == wanted.prompt_logprobs, name
    # They would prove little if none of these happened.
    assert runs["batched"].most_running > 60
    assert runs["preempted"].num_preemptions > 100
    assert runs["cached"].num_cached_tokens > 10_000
    reasons = [output.finish_reason for answer in wanted.answers for output in answer]
    assert reasons.count("stop") > 10 < reasons.count("length")


def test_q8_keys_and_values_give_the_same_bits(tmp_path: Path) -> None:
    requests = requests_for(12)
    path = tiny_model(tmp_path, "gemma3")
    backend = load_tiny(path, "cpu", threads=1, kv_cache_dtype="q8")
    wanted = alone(backend, requests)
    for schedule in SCHEDULES:
        assert scheduled(backend, requests, schedule) == wanted, schedule
    backend.close()
    assert scheduled(load_tiny(path, "cpu", threads=2, kv_cache_dtype="q8"), requests, "batched") == wanted


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_reference_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    requests = requests_for(5, max_prompt_len=150)
    path = tiny_model(tmp_path, architecture)
    backend = load_tiny(path, "reference", threads=1)
    wanted = alone(backend, requests)
    for schedule in SCHEDULES:
        assert scheduled(backend, requests, schedule) == wanted, schedule
    backend.close()
    assert scheduled(load_tiny(path, "reference", threads=2), requests, "batched") == wanted


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_part_of_a_block_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    """The second prompt finds 22 tokens of the first one's partly filled last block, the third 50 of a full one."""
    backend = load_tiny(tiny_model(tmp_path, architecture), "cpu", threads=1)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    tokens = [(7 * index * index + 3) % VOCAB_SIZE for index in range(300)]
    prompts = [tokens[:150] + [1] * 8, tokens[:150] + [2] * 70, tokens[:114] + [3] * 8]
    requests = [(prompt, replace(params, seed=number)) for number, prompt in enumerate(prompts)]
    wanted = alone(backend, requests)
    got = run(
        backend, FakeTokenizer(), requests, max_model_len=MAX_MODEL_LEN, max_num_seqs=1, max_num_batched_tokens=512
    )
    assert got.num_cached_tokens == 150 + 114
    assert got == wanted


# Mutants


def split_attend(num_parts: Callable[[], int]) -> Callable[..., NDArray[np.float32]]:
    """Attention that folds as many runs of tokens as it is told, as a kernel does that splits them over threads."""

    def attend(
        query: NDArray[np.float32], position: int, read_block: reference.ReadBlock, attention: AttentionSpec
    ) -> NDArray[np.float32]:
        blocks = range(position // BLOCK_SIZE + 1)
        read = [read_block(block, slice(0, min(position + 1 - block * BLOCK_SIZE, BLOCK_SIZE))) for block in blocks]
        keys, values = (np.concatenate(tensors, axis=1) for tensors in zip(*read, strict=True))
        heads = query.reshape(attention.num_key_value_heads, -1, attention.head_dim)
        scores = np.einsum("kgd,ktd->kgt", heads, keys) * np.float32(attention.scale)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        total: Any = 0
        weighted: Any = 0
        for tokens in np.array_split(np.arange(position + 1), num_parts()):
            total += weights[..., tokens].sum(axis=-1, keepdims=True)
            weighted += np.einsum("kgt,ktd->kgd", weights[..., tokens], values[:, tokens])
        return (weighted / total).reshape(query.shape)

    return attend


def test_mutant_attention_split_by_threads_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    threads = [1]
    monkeypatch.setattr(reference, "attend", split_attend(lambda: threads[0]))
    backend = load_tiny(tiny_model(tmp_path, "llama"), "reference", threads=1)
    requests = requests_for(8, max_prompt_len=150)
    one, same = scheduled(backend, requests, "batched"), scheduled(backend, requests, "batched")
    threads[0] = 2
    two = scheduled(backend, requests, "batched")
    assert one == same
    assert one.logits != two.logits


def test_mutant_attention_split_by_the_size_of_the_batch_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = load_tiny(tiny_model(tmp_path, "llama"), "reference", threads=1)
    forward = backend.forward
    num_tokens = [0]

    def counted(batch: ForwardBatch) -> ForwardOutput:
        num_tokens[0] = batch.num_tokens
        return forward(batch)

    monkeypatch.setattr(reference, "attend", split_attend(lambda: 1 if num_tokens[0] > 16 else 4))
    monkeypatch.setattr(backend, "forward", counted)
    requests = requests_for(8, max_prompt_len=150)
    assert scheduled(backend, requests, "chunked").logits != alone(backend, requests).logits


def rounding_by_neighbours(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    forward = backend.forward

    def mutant(batch: ForwardBatch) -> ForwardOutput:
        logits = forward(batch).logits
        return ForwardOutput(np.nextafter(logits, np.inf, dtype=np.float32) if batch.num_seqs > 1 else logits)

    monkeypatch.setattr(backend, "forward", mutant)


def draw_by_row(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    sample = backend.sample

    def mutant(logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        rows = sampling.rows.copy()
        rows["sequence_index"] = np.arange(sampling.num_rows)
        return sample(logits, replace(sampling, rows=rows))

    monkeypatch.setattr(backend, "sample", mutant)


def block_found_whatever_came_before_it(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setattr(cache_manager, "chain_digest", lambda parent, tokens: tokens)
    monkeypatch.setattr(PrefixCache, "find", lambda self, group, key: self._block_of.get((group, key.digest)))


def token_forgotten_after_preemption(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    adopt = CacheManager.adopt

    def mutant(self: CacheManager, sequence: Sequence, *arguments: Any) -> None:
        adopt(self, sequence, *arguments)
        if sequence.group.num_preemptions and sequence.num_tokens - sequence.num_computed_tokens > 1:
            sequence.num_computed_tokens += 1

    monkeypatch.setattr(CacheManager, "adopt", mutant)


def partial_block_one_token_too_long(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    longer = mutant(CacheManager.adopt_partial, "begin + found.num_tokens", "min(end, begin + found.num_tokens + 1)")
    monkeypatch.setattr(CacheManager, "adopt_partial", longer)


def partial_block_whatever_its_tokens(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setattr(prefix_cache, "_num_common_tokens", lambda left, right: min(len(left), len(right)) // 4)


def fork_without_copy(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setattr(backend, "copy_blocks", lambda pairs: None)


@pytest.mark.parametrize(
    ("mutate", "schedule"),
    [
        (rounding_by_neighbours, "batched"),
        (draw_by_row, "batched"),
        (block_found_whatever_came_before_it, "cached"),
        (token_forgotten_after_preemption, "preempted"),
        (partial_block_one_token_too_long, "cached"),
        (partial_block_whatever_its_tokens, "cached"),
        (fork_without_copy, "batched"),
    ],
)
def test_mutants_are_caught(
    mutate: Callable[[pytest.MonkeyPatch, Backend], None],
    schedule: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    backend = load_tiny(tiny_model(tmp_path, "llama"), "cpu", threads=1)
    requests = requests_for(60)
    wanted = alone(backend, requests)
    assert scheduled(backend, requests, schedule) == wanted
    mutate(monkeypatch, backend)
    assert scheduled(backend, requests, schedule) != wanted
