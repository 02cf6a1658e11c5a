from __future__ import annotations

import random

import pytest

from pellucid.core import kv_windows
from pellucid.core.kv_windows import first_visible_block, max_blocks_held, max_blocks_of_sequence


def visible_blocks(begin: int, end: int, window: int | None) -> set[int]:
    """Blocks that the tokens from `begin` to `end` see or are written to, token by token: the oracle."""
    return {
        seen // 64
        for position in range(begin, end)
        for seen in range(0 if window is None else max(0, position - window + 1), position + 1)
    }


@pytest.mark.parametrize("window", [None, 1, 2, 63, 64, 65, 66, 130])
def test_the_first_visible_block_is_the_first_seen(window: int | None) -> None:
    for position in range(300):
        assert first_visible_block(position, window) == min(visible_blocks(position, position + 1, window))


def most_ever_held(window: int | None, num_tokens: int, max_new_tokens: int) -> int:
    return max(
        len(visible_blocks(begin, min(begin + max_new_tokens, num_tokens), window)) for begin in range(num_tokens)
    )


def check_bound() -> None:
    rng = random.Random(1)
    for _ in range(40):
        window, num_tokens, step = rng.choice([None, rng.randint(1, 140)]), rng.randint(1, 300), rng.randint(1, 200)
        most = most_ever_held(window, num_tokens, step)
        bound = max_blocks_held(window, num_tokens, step)
        assert most <= bound <= most + 1, (window, num_tokens, step)
        assert bound <= max_blocks_held(window, num_tokens + 1, step)


def test_the_bound_holds_and_is_tight() -> None:
    check_bound()
    assert max_blocks_held(512, 4096, 1) == most_ever_held(512, 1100, 1) == 9
    assert max_blocks_of_sequence((None, 512, 512), 4096, 512) == 64 + 2 * 17


def test_mutant_bound_without_the_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    held = kv_windows.max_blocks_held
    monkeypatch.setitem(globals(), "max_blocks_held", lambda window, tokens, step: held(window, tokens, 1))
    with pytest.raises(AssertionError):
        check_bound()
