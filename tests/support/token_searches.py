"""Requests that search contrastively or are guided, and their answers over the fake backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from pellucid.core.sampling_params import SamplingParams
from tests.support.engines import CheckedEngine
from tests.support.fake_backend import VOCAB_SIZE

PROMPT = np.random.default_rng(1).integers(1, VOCAB_SIZE, 70).tolist()
CONTRASTIVE = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, penalty_alpha=0.6, top_k=4)
GUIDED = SamplingParams(
    max_tokens=9, temperature=0.8, seed=3, ignore_eos=True, guidance_scale=1.7, negative_prompt="no"
)
GREEDY = SamplingParams(max_tokens=3, temperature=0)


def answered(engine: CheckedEngine, name: str, params: SamplingParams, prompt: Any = PROMPT, **options: Any) -> Any:
    """The only answer to a request, once the engine has nothing left to do."""
    engine.add_request(name, prompt, params, **options)
    engine.run()
    reply = engine.replies[name]
    assert reply.error is None, reply.error
    (output,) = reply.outputs
    return output


def is_forgotten(engine: CheckedEngine) -> bool:
    """Whether the engine keeps nothing of any search."""
    book = engine._searches
    return not any((book._entries, book.guidance, book._hidden_states))
