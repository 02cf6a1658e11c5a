"""`stream_options.continuous_usage_stats`: every event of a stream tells what its choice has taken so far."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.server.openai import streams
from tests.support.mutants import mutant
from tests.support.served_engine import CHAT, COMPLETIONS, ServedEngine, check_events, run

HI = [{"role": "user", "content": "hi"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HI}),
    (CHAT, {"messages": HI, "n": 3, "temperature": 1}),
    (COMPLETIONS, {"prompt": "hello"}),
    (COMPLETIONS, {"prompt": ["a", "hello there", [5, 6, 7]], "n": 2}),
    (COMPLETIONS, {"prompt": ["a b c", "hello there"], "echo": True}),
    (
        COMPLETIONS,
        {"prompt": "x", "structured_outputs": {"regex": "(中|😀){4}"}, "max_tokens": 30, "ignore_eos": False},
    ),
]


async def check_usage(server: ServedEngine, path: str, body: dict[str, Any], *, at_end: bool) -> None:
    options = {"include_usage": at_end, "continuous_usage_stats": True}
    asked = {
        "max_tokens": 6,
        "ignore_eos": True,
        "seed": 3,
        "return_token_ids": True,
        "stream_options": options,
        **body,
    }
    stream = await server.stream(asked, path)
    events = check_events(await stream.rest())
    totals = events.pop()["usage"] if at_end else None
    last: dict[int, dict[str, int]] = {}
    num_ids: dict[int, int] = {}
    for event in events:
        (choice,) = event["choices"]
        index, told, before = choice["index"], event["usage"], last.get(choice["index"], {"completion_tokens": 0})
        num_ids[index] = num_ids.get(index, 0) + len(choice.get("token_ids", ()))
        num_echoed = told["prompt_tokens"] if body.get("echo") else 0
        assert told["completion_tokens"] >= before["completion_tokens"]
        assert told["completion_tokens"] >= num_ids[index] - num_echoed, "usage is behind what was emitted"
        assert told["total_tokens"] == told["prompt_tokens"] + told["completion_tokens"]
        last[index] = told
    for index, told in last.items():
        assert told["completion_tokens"] == num_ids[index] - (told["prompt_tokens"] if body.get("echo") else 0)
    if totals is not None:
        prompts = [told["prompt_tokens"] for index, told in last.items() if index % body.get("n", 1) == 0]
        assert sum(prompts) == totals["prompt_tokens"]
        assert sum(told["completion_tokens"] for told in last.values()) == totals["completion_tokens"]


def check_all(chat_model: str, *, survives: bool = True) -> None:
    async def test(server: ServedEngine) -> None:
        for path, body in BODIES:
            for at_end in (True, False):
                await check_usage(server, path, body, at_end=at_end)

    run(test, model=chat_model, kv_cache_memory=1 << 24, threads=1, survives=survives)


def test_every_event_tells_what_its_choice_took_so_far(chat_model: str) -> None:
    check_all(chat_model)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("__init__", "-num if params.echo else 0", "0"),
        ("tail", "self._num[index] +=", "self._num[0] +="),
        ("tail", "token.token_id is not None for", "bool(token.text) for"),
    ],
)
def test_mutants_are_caught(chat_model: str, monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str) -> None:
    monkeypatch.setattr(streams.UsageSoFar, name, mutant(getattr(streams.UsageSoFar, name), old, new))
    with pytest.raises(AssertionError):
        check_all(chat_model, survives=False)
