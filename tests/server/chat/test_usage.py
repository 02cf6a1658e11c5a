"""Tokens of reasoning are counted up to the first that says something else."""

from __future__ import annotations

import pytest

from pellucid.core.sampling_params import SamplingParams
from pellucid.server.chat.usage import num_reasoning_tokens
from tests.support.scripted_formats import SCRIPTED, TOKENIZER


@pytest.mark.parametrize(
    ("said", "num"),
    [("", 0), ("hello", 0), ("<so", 3), ("<so>", 4), ("<so>Yes", 4), ("<so>[{}]", 4), ("<>Yes", 0), ("[{}]", 0)],
)
def test_reasoning_tokens(said: str, num: int) -> None:
    held_back = 1 if said.endswith("Yes") and num else 0  # a text is known when the next character comes
    assert num_reasoning_tokens(said.encode(), SCRIPTED, SamplingParams(), TOKENIZER) == num + held_back
