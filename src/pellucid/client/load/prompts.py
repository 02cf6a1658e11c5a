"""What a load asks: random common words, or the prompts of a file."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pellucid.core.errors import InvalidRequestError

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city"
)
COMMON_WORDS = tuple(_WORDS.split())

Prompt = str | list[Any]
"""A text, or the messages of a conversation."""


def common_words(count: int, seed: int | str) -> Iterator[str]:
    """Prompts of `count` words without end; the same for the same seed."""
    draw = random.Random(seed)
    while True:
        yield " ".join(draw.choice(COMMON_WORDS) for _ in range(count))


def from_file(path: str) -> list[Prompt]:
    """The prompts of a JSONL file: a string a line, or an object with a `prompt` or with `messages`.

    Raises:
        InvalidRequestError: it cannot be read, or a line is something else; the message names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not valid UTF-8"
        raise InvalidRequestError(f"--prompts: {path} cannot be read: {reason}", param="prompts") from None
    found = [_read(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InvalidRequestError(f"--prompts: {path} has no prompt", param="prompts")
    return found


def in_turn(prompts: Sequence[Prompt], start: int) -> Iterator[Prompt]:
    """`prompts` from number `start` on, again and again."""
    return itertools.islice(itertools.cycle(prompts), start % len(prompts), None)


def _read(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    prompt = value.get("messages") or value.get("prompt") if isinstance(value, dict) else value
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(value, dict)):
        return prompt
    raise InvalidRequestError(
        f'--prompts: {where}: expected a string in JSON, {{"prompt": "..."}} or {{"messages": [...]}}', param="prompts"
    )
