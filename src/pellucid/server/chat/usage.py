"""What the tokens of an answer were for."""

from __future__ import annotations

from collections.abc import Sequence

from pellucid.core.sampling_params import SamplingParams
from pellucid.server.chat.events import ReasoningDelta
from pellucid.server.chat.tools import ChatTurn
from pellucid.tokenizer.detokenizer import IncrementalDetokenizer
from pellucid.tokenizer.tokenizer import Tokenizer


def num_reasoning_tokens(token_ids: Sequence[int], turn: ChatTurn, params: SamplingParams, tokenizer: Tokenizer) -> int:
    """How many tokens of an answer to `turn` come before the first one that says something other than reasoning, the
    markers around it among them; 0 if there is no reasoning."""
    parser = turn.format.parser(turn)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens, continuation=True)
    has_reasoning = False
    for count, token_id in enumerate(token_ids):
        for event in parser.push(detokenizer.push(token_id)):
            if not isinstance(event, ReasoningDelta):
                return count if has_reasoning else 0
            has_reasoning = True
    return len(token_ids) if has_reasoning else 0
