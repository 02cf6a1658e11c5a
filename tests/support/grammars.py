"""What tests of grammars share: answers drawn at random from what a grammar allows."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.decoding.grammar import Grammar, GrammarMatcher
from pellucid.decoding.grammar_compiler import GrammarCompiler
from pellucid.tokenizer import Tokenizer


@cache
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def compiled(tokenizer: Tokenizer, **params: Any) -> Grammar:
    return compiler(tokenizer).compile(StructuredOutputsParams(**params), seconds=60)


def allowed(mask: np.ndarray) -> list[int]:
    """The token ids that a mask allows."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()  # type: ignore[no-any-return]


def random_answer(
    matcher: GrammarMatcher, tokenizer: Tokenizer, rng: np.random.RandomState, max_tokens: int = 400
) -> list[int]:
    """Tokens drawn from what is allowed, each as likely as any other, up to the end, which is left out.

    Raises:
        AssertionError: it did not come to an end.
    """
    token_ids: list[int] = []
    while len(token_ids) < max_tokens:
        token_id = int(rng.choice(allowed(matcher.masks(token_ids)[0])))
        if token_id in tokenizer.eos_token_ids:
            return token_ids
        token_ids.append(token_id)
    raise AssertionError(f"no end after {max_tokens} tokens: {tokenizer.decode(token_ids)!r}")


def random_texts(tokenizer: Tokenizer, count: int = 20, max_tokens: int = 400, **params: Any) -> list[str]:
    """Texts of `count` random answers."""
    grammar = compiled(tokenizer, **params)
    rng = np.random.RandomState(0)
    return [
        tokenizer.decode(random_answer(grammar.matcher(), tokenizer, rng, max_tokens), continuation=True)
        for _ in range(count)
    ]
