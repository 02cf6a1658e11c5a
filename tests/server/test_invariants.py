"""What holds for every answer over HTTP: the stream says what the whole answer says, each event is whole, usage is what
was emitted, no stop string leaks, and nothing depends on who else is being served."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from pellucid.decoding.stop import StopMatcher
from pellucid.engine.request_intake import RequestIntake
from pellucid.server import generation
from pellucid.server.openai import streams
from pellucid.tokenizer.detokenizer import IncrementalDetokenizer
from tests.support.chat_models import TOKENS
from tests.support.mutants import mutant
from tests.support.served_engine import CHAT, COMPLETIONS, ServedEngine, check_events, run
from tests.support.texts import texts

WRITING = "(😀|中文|é|न|e\u0301|👩\u200d💻|🇩🇪|ab| |\n)"
"""What a grammar makes a tiny model write, whose tokens, a byte each, would else be no text: characters of up to four
bytes, and some that are made of several."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["東京", "Zürich", "🏔️"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


FORECAST = {
    "type": "object",
    "properties": {"sky": {"enum": ["☀️", "雨", "<tool_call>[]</tool_call>"]}},
    "required": ["sky"],
    "additionalProperties": False,
}


def serve(test: Callable[[ServedEngine], Any], chat_model: str, **settings: Any) -> None:
    options = {"kv_cache_memory": 1 << 24, "threads": 1, "max_num_seqs": 24, **settings}
    run(test, model=chat_model, **options)


def some_prompts(seed: int) -> list[str]:
    """Of all kinds of text; chats refuse NUL."""
    return [text for text in texts(seed, 40) if text and "\0" not in text]


def random_request(rng: random.Random, prompts: list[str]) -> tuple[str, dict[str, Any]]:
    """A path, and a body that gets the same answer every time."""
    path = rng.choice([COMPLETIONS, CHAT])
    body: dict[str, Any] = {
        "max_tokens": rng.choice([1, 2, 9, 30]),
        "seed": rng.randrange(1000),
        "temperature": rng.choice([0, 1, 1]),
        "n": rng.choice([1, 1, 1, 3]),
        "return_token_ids": rng.random() < 0.7,
    }
    prompt = rng.choice(prompts)
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": prompt}]
        if rng.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": rng.randrange(4)}
    else:
        one: Any = prompt if rng.random() < 0.7 else [rng.randrange(len(TOKENS)) for _ in range(rng.randrange(1, 20))]
        body["prompt"] = one if rng.random() < 0.8 or isinstance(one, list) else [one, prompt[::-1] or "x"]
        if rng.random() < 0.3:
            body["logprobs"] = rng.randrange(4)
        body["echo"] = rng.random() < 0.2
    optional: list[tuple[float, str, Any]] = [
        (0.4, "structured_outputs", {"regex": WRITING + "{1,12}"}),
        (0.4, "stop", rng.sample(["😀", "中", "文é", "ab ", "न", "\n", "b", "e", "\ufffd", "👩\u200d", "ab中文😀"], 3)),
        (0.3, "include_stop_str_in_output", True),
        (0.3, "skip_special_tokens", False),
        (0.2, "strip", True),
        (0.2, "ignore_eos", True),
        (0.2, "min_tokens", 1),
        (0.2, "prompt_logprobs", 1),
    ]
    for chance, name, value in optional:
        if rng.random() < chance:
            body[name] = value
    if body.get("include_stop_str_in_output") and "stop" not in body:
        del body["include_stop_str_in_output"]
    if "structured_outputs" in body:
        body.pop("ignore_eos", None)
    elif path == CHAT and rng.random() < 0.4:
        for name in ("stop", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens", "strip"):
            body.pop(name, None)
        body |= {"tools": [WEATHER], "tool_choice": rng.choice(["required", "auto"]), "max_tokens": 150}
        if body["seed"] % 2:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "weather", "schema": FORECAST}}
    return path, body


def joined(events: list[str]) -> tuple[list[dict[str, Any]], Any]:
    """The choices that the events of a stream add up to, in the form of a whole answer, and the usage told."""
    bodies = check_events(events)
    assert not any("error" in body for body in bodies), bodies[-1]
    choices: dict[int, dict[str, Any]] = {}
    for body in bodies:
        for piece in body["choices"]:
            assert body["usage"] is None
            add(choices.setdefault(piece["index"], {"index": piece["index"]}), piece)
    assert [body["choices"] for body in bodies].count([]) == 1
    assert bodies[-1]["choices"] == []
    return [choices[index] for index in sorted(choices)], bodies[-1]["usage"]


def add(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    assert choice.get("finish_reason") is None, "something comes after the end of a choice"
    delta = piece.get("delta")
    if delta is None:
        choice["text"] = choice.get("text", "") + piece["text"]
    else:
        message = choice.setdefault("message", {"content": "", "refusal": None})
        assert ("role" in delta) == ("role" not in message), "the role comes once, and first"
        message["role"] = message.get("role") or delta["role"]
        message["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            add_call(message.setdefault("tool_calls", []), call)
    for name in ("finish_reason", "stop_reason", "prompt_logprobs", "prompt_token_ids"):
        if name in piece:
            choice[name] = piece[name]
    if "token_ids" in piece:
        choice["token_ids"] = choice.get("token_ids", []) + piece["token_ids"]
    logprobs = choice.setdefault("logprobs", None)
    if logprobs is None:
        choice["logprobs"] = piece["logprobs"]
    elif piece["logprobs"] is not None:
        for name, values in piece["logprobs"].items():
            logprobs[name] = None if values is None else logprobs[name] + values


def add_call(calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
    if piece["index"] == len(calls):
        calls.append({"type": "function", "function": {"name": piece["function"]["name"], "arguments": ""}})
    calls[piece["index"]]["function"]["arguments"] += piece["function"].get("arguments", "")


def comparable(choices: list[dict[str, Any]], body: dict[str, Any]) -> list[dict[str, Any]]:
    """Without what a stream tells once for the choices of a prompt, and a whole answer with each."""
    once = {"prompt_logprobs", "prompt_token_ids"}
    told = [{name: value for name, value in choice.items() if name not in once} for choice in choices]
    for first in range(0, len(choices), body["n"]):
        same_prompt = choices[first : first + body["n"]]
        told[first] |= {name: choice[name] for choice in same_prompt for name in once if name in choice}
    for choice in told:
        if choice.get("message", {}).get("tool_calls"):  # their ids are made up, and where nothing is said, it is null
            calls = [
                {name: value for name, value in call.items() if name != "id"}
                for call in choice["message"]["tool_calls"]
            ]
            choice["message"] = {
                **choice["message"],
                "content": choice["message"]["content"] or "",
                "tool_calls": calls,
            }
        if choice["logprobs"] is not None and not any(choice["logprobs"].values()):
            choice["logprobs"] = {name: values or None for name, values in choice["logprobs"].items()}
    return told


async def ask_both_ways(server: ServedEngine, path: str, body: dict[str, Any]) -> None:
    """The whole answer to `body`, and its stream, are held against each other."""
    answer = await server.post(body, path)
    assert answer.status == 200, answer.body
    whole = json.loads(answer.body.decode())
    stream = await server.stream({**body, "stream_options": {"include_usage": True}}, path)
    assert stream.status == 200
    choices, usage = joined(await stream.rest())
    for streamed, told in zip(comparable(choices, body), comparable(whole["choices"], body), strict=True):
        assert streamed.keys() == told.keys()
        for name, value in told.items():
            assert streamed[name] == value, f"the stream has another {name}: {body}"
    usages = [{**each, "prompt_tokens_details": None} for each in (usage, whole["usage"])]
    assert usages[0] == usages[1], "the stream tells another usage"
    if body["return_token_ids"]:
        num_ids = sum(len(choice["token_ids"]) for choice in choices)
        if body.get("echo"):
            num_ids -= sum(len(choice["prompt_token_ids"]) for choice in whole["choices"])
        assert usage["completion_tokens"] == num_ids, "usage is not what was emitted"
    if "structured_outputs" in body and not body.get("echo"):
        check_characters(stream.events, cut_off=any(choice["finish_reason"] == "length" for choice in choices))


def check_characters(events: list[str], *, cut_off: bool) -> None:
    """No event holds a part of a character of a grammar that has whole ones only; the last may be cut off in one."""
    pieces = [
        choice.get("text") or choice.get("delta", {}).get("content") or ""
        for event in events[:-1]
        for choice in json.loads(event)["choices"]
    ]
    broken = [piece for piece in pieces if "\ufffd" in piece]
    assert not broken or cut_off, f"a character was broken: {broken}"


async def random_requests(server: ServedEngine, seed: int, count: int) -> None:
    rng = random.Random(seed)
    requests = [random_request(rng, some_prompts(seed)) for _ in range(count)]
    for first in range(0, count, 8):  # eight at a time, so that several tokens come at once now and then
        await asyncio.gather(*(ask_both_ways(server, *request) for request in requests[first : first + 8]))


@pytest.mark.parametrize("seed", range(4))
def test_streams_are_whole_answers_in_pieces(chat_model: str, seed: int) -> None:
    serve(lambda server: random_requests(server, seed, 40), chat_model)


# Stop strings


async def stopped_answers(server: ServedEngine, count: int) -> None:
    """What comes before a stop string comes, and no event goes beyond it, not even by its first character."""
    rng = random.Random(1)
    for number in range(count):
        body: dict[str, Any] = {
            "prompt": "once",
            "max_tokens": 60,
            "seed": number,
            "structured_outputs": {"regex": WRITING + "{12,20}"},
        }
        text = json.loads((await server.post(body)).body)["choices"][0]["text"]
        begin = rng.randrange(len(text) - 1)
        stop = text[begin : begin + rng.randrange(1, 6)]
        others = [stop + "😀", text[begin + 1 : begin + 2] + "zz", "\ufffd"]
        stream = await server.stream({**body, "stop": [stop, *others]})
        wanted = text[: text.index(stop)]
        seen = ""
        for event in check_events(await stream.rest()):
            (choice,) = event["choices"]
            seen += choice["text"]
            assert wanted.startswith(seen), "a part of a stop string leaked"
            assert "\ufffd" not in seen, "a part of a character leaked"
        assert seen == wanted
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_no_part_of_a_stop_string_leaks(chat_model: str) -> None:
    serve(lambda server: stopped_answers(server, 25), chat_model)


# Others


def test_an_answer_is_the_same_alone_and_among_others(chat_model: str) -> None:
    async def test(server: ServedEngine) -> None:
        rng = random.Random(2)
        requests = [random_request(rng, some_prompts(5)) for _ in range(17)]

        async def choices(path: str, body: dict[str, Any]) -> Any:
            return json.loads((await server.post(body, path)).body)["choices"]

        alone = [await choices(*request) for request in requests]
        for _ in range(2):
            assert await asyncio.gather(*(choices(*request) for request in requests)) == alone
            rng.shuffle(order := list(range(17)))
            requests, alone = [requests[place] for place in order], [alone[place] for place in order]

    serve(test, chat_model)


# Mutants


MUTANTS: dict[str, tuple[Any, str, Any, str]] = {
    "an event lost": (
        streams._TextChoice,
        "deltas",
        mutant(streams._TextChoice.deltas, '"text": text,', '"text": text.replace("b", ""),'),
        "another text",
    ),
    "a token not told": (
        streams._TextChoice,
        "deltas",
        mutant(streams._TextChoice.deltas, 'choice["token_ids"] = token_ids', 'choice["token_ids"] = token_ids[:1]'),
        "another token_ids",
    ),
    "usage of something else": (
        streams,
        "usage",
        lambda *args, **options: {**streams_usage(*args, **options), "completion_tokens": 7},
        "another usage",
    ),
    "no terminal event": (streams.CompletionEvents, "end", lambda self, outputs: b"", "0 terminal events"),
    "two terminal events": (
        streams.CompletionEvents,
        "end",
        lambda self, outputs: streams.DONE + streams.DONE,
        "2 terminal events",
    ),
    "characters in parts": (
        IncrementalDetokenizer,
        "push",
        lambda self, token_id: self._tokenizer.token_bytes(token_id).decode("utf-8", "replace"),
        "another (text|message)",
    ),
    "events in parts": (
        generation,
        "EventStream",
        None,
        "half an event",
    ),
}
streams_usage = streams.usage


class HalfEvents(generation.EventStream):
    """Cuts what it sends."""

    def __init__(self, events: Any, *args: Any, **kwargs: Any) -> None:
        async def halves() -> Any:
            async for piece in events:
                yield piece[:9]
                yield piece[9:]

        super().__init__(halves(), *args, **kwargs)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(chat_model: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, attribute, changed, match = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, changed or HalfEvents)
    with pytest.raises(AssertionError, match=match):
        serve(lambda server: random_requests(server, 0, 24), chat_model, survives=False)


def test_a_mutant_that_holds_nothing_back_is_caught(chat_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopMatcher, "push", mutant(StopMatcher.push, "len(seen) - automaton.depth[node]", "len(seen)"))
    with pytest.raises(AssertionError, match="leaked"):
        serve(lambda server: stopped_answers(server, 25), chat_model, survives=False)


def test_a_mutant_whose_draws_depend_on_others_is_caught(chat_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestIntake, "_request_seed", lambda self, params, arrival_number: arrival_number)
    with pytest.raises(AssertionError):
        test_an_answer_is_the_same_alone_and_among_others(chat_model)
