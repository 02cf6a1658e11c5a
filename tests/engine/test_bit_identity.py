"""The promise of the whole: a request's logits are the same to the bit whatever runs beside it, however scheduled.

On real executors; the log-probabilities that are compared would show a difference in the last bit.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.backends.base import Backend
from pellucid.backends.registry import load_backend
from pellucid.core.batch import ForwardBatch, ForwardOutput
from pellucid.core.config import BackendConfig, SchedulerConfig
from pellucid.core.errors import BackendError
from pellucid.core.outputs import CompletionOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.weights.loader import open_model
from tests.support.engines import CheckedEngine
from tests.support.fake_backend import VOCAB_SIZE
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.tiny_models import write_tiny_model

MAX_MODEL_LEN = 320
Request = tuple[list[int], SamplingParams]
Answer = list[CompletionOutput]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", request.param, vocab_size=VOCAB_SIZE)


def load(path: Path, name: Any, threads: int | None = None) -> Backend:
    with open_model(path) as model_file:
        try:
            return load_backend(model_file, BackendConfig(name, threads), kv_cache_dtype="f16")
        except BackendError as error:
            if "not installed" in error.message:
                pytest.skip("the native core is not built")
            raise


def answers(
    backend: Backend, requests: list[Request], *, num_blocks: int = 200, preempt: float = 0.0, **options: Any
) -> list[Answer]:
    backend.allocate_kv_cache(num_blocks)
    config = SchedulerConfig(options.pop("max_num_seqs", 16), options.pop("max_num_batched_tokens", 512))
    engine = CheckedEngine(
        backend, FakeTokenizer(), config, num_blocks=num_blocks, max_model_len=MAX_MODEL_LEN, **options
    )
    rng = random.Random(1)
    for number, (prompt, params) in enumerate(requests):
        engine.add_request(str(number), prompt, params)
        for _ in range(rng.randrange(3)):
            engine.step()
            if rng.random() < preempt:
                engine.scheduler.preempt_last()
    engine.run()
    return [engine.replies[str(number)].outputs for number in range(len(requests))]


def random_requests(count: int) -> list[Request]:
    rng = random.Random(2)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(200)]
    requests: list[Request] = []
    for _ in range(count):
        prompt = shared[: rng.choice([0, 0, 64, 130, 200])] + [
            rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 60))
        ]
        params = SamplingParams(
            max_tokens=rng.choice([1, 4, 12]),
            temperature=rng.choice([0.0, 0.9]),
            seed=rng.randrange(2**64),
            n=rng.choice([1, 1, 1, 2]),
            logprobs=2,
            ignore_eos=True,
            detokenize=False,
        )
        requests.append((prompt, params))
    return requests


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_every_schedule_gives_the_same_bits(model_path: Path, name: str) -> None:
    requests = random_requests(12 if name == "reference" else 60)
    backend = load(model_path, name, threads=2)
    alone = [
        answers(backend, [request], enable_prefix_caching=False, max_num_seqs=2, max_num_batched_tokens=512)[0]
        for request in requests
    ]
    assert answers(backend, requests) == alone
    assert answers(backend, requests, max_num_batched_tokens=16) == alone
    assert answers(backend, requests, max_num_seqs=3, max_num_batched_tokens=37, enable_prefix_caching=False) == alone
    assert answers(backend, requests, num_blocks=8, preempt=0.2) == alone
    backend.close()
    other = load(model_path, name, threads=1)
    assert answers(other, requests, max_num_batched_tokens=100) == alone
    other.close()


def test_mutant_batch_dependent_bits_are_caught(model_path: Path) -> None:
    """Logits that differ by one unit in the last place when a sequence is not alone."""
    backend = load(model_path, "reference")
    requests = random_requests(6)
    alone = [answers(backend, [request])[0] for request in requests]
    forward = backend.forward

    def mutant(batch: ForwardBatch) -> ForwardOutput:
        logits = forward(batch).logits
        return ForwardOutput(np.nextafter(logits, np.inf, dtype=np.float32) if batch.num_seqs > 1 else logits)

    backend.forward = mutant  # type: ignore[method-assign]
    assert answers(backend, requests) != alone
