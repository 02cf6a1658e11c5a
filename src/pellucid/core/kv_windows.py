"""Which KV blocks a sequence needs under an attention window; a window of None sees everything."""

from __future__ import annotations

from collections.abc import Iterable

from pellucid.core.config import BLOCK_SIZE, num_blocks_for


def first_visible_block(position: int, window: int | None) -> int:
    """Index of the first block that the token at `position` sees, and with it every token after it."""
    return 0 if window is None else max(0, position - window + 1) // BLOCK_SIZE


def max_blocks_held(window: int | None, num_tokens: int, max_new_tokens: int) -> int:
    """Most blocks that a sequence of `num_tokens`, computed up to `max_new_tokens` a step, holds at any time.

    Before each step it gives back what the step's first token does not see, so that it never holds more than what
    `window - 1 + max_new_tokens` tokens in a row can touch.
    """
    num_blocks = num_blocks_for(num_tokens)
    if window is None:
        return num_blocks
    visible = window - 1 + min(max_new_tokens, num_tokens)
    return min(num_blocks, (visible + BLOCK_SIZE - 2) // BLOCK_SIZE + 1)


def max_blocks_of_sequence(windows: Iterable[int | None], num_tokens: int, max_new_tokens: int) -> int:
    """`max_blocks_held` over KV groups of these windows."""
    return sum(max_blocks_held(window, num_tokens, max_new_tokens) for window in windows)
