"""A model as the parsers of request bodies see it."""

from __future__ import annotations

from typing import Any

from pellucid.server.served_model import ServedModel
from tests.support.fake_tokenizer import FakeTokenizer


def served_model(*names: str, tokenizer: Any = None, **limits: Any) -> ServedModel:
    """One with the fake tokenizer, called "m" unless `names` say otherwise."""
    tokenizer = tokenizer or FakeTokenizer()
    return ServedModel(names or ("m",), tokenizer, 1000, tokenizer.vocab_size, 8, **limits)
