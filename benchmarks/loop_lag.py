"""How late the server's event loop gets to what is due: with nothing to do, while 16 clients stream, and while bodies
of a megabyte come in beside them.

The server runs in this process, where a timer every 2 ms looks how late it is; the clients run in processes of their
own. For each kind of body, one client sends it again and again. Where the model's threads leave no processor free, as
they do by default, the scheduler of the operating system has its share in every figure.

usage: loop_lag.py [MODEL] [--clients 16] [--seconds 5] [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from report import report

from pellucid.client.http import HttpClient
from pellucid.client.openai import OpenAIClient
from pellucid.engine.async_engine import AsyncEngine
from pellucid.server.app import create_app
from pellucid.server.listening import bind, url_of
from pellucid.server.run import WebServer, short_turns, web_config
from pellucid.server.serving import Serving
from pellucid.server.settings import ServerSettings
from pellucid.weights.catalog import DEFAULT_MODEL

INTERVAL_SECONDS = 0.002
WARM_UP_SECONDS = 1.0
TARGET_MS = 20.0
MODEL = "model"
MEGABYTE = 1_000_000
KV_CACHE_BYTES = 256 * 10**6
STREAM = {"model": MODEL, "prompt": "Once upon a time " * 25, "max_tokens": 128, "ignore_eos": True}


def bodies() -> dict[str, tuple[str, Any]]:
    """Of about a megabyte, each by what is in it: a path, and what is sent there."""
    chat, text = "/v1/chat/completions", "The quick brown fox. "
    user = {"role": "user", "content": text}
    return {
        "one character": (chat, {"messages": [{"role": "user", "content": "a" * MEGABYTE}]}),
        "English": (chat, {"messages": [{"role": "user", "content": text * (MEGABYTE // len(text))}]}),
        "Chinese": (chat, {"messages": [{"role": "user", "content": "中文" * (MEGABYTE // 6)}]}),
        "many messages": (chat, {"messages": [user] * (MEGABYTE // 60)}),
        "token ids": ("/v1/completions", {"prompt": [1234] * (MEGABYTE // 6)}),
        "many prompts": ("/v1/completions", {"prompt": ["word"] * (MEGABYTE // 8)}),
        "biases": ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): 1.5 for i in range(MEGABYTE // 13)}}),
        "nested": ("/v1/completions", {"prompt": "x", "metadata": [[[[[]]]]] * (MEGABYTE // 12)}),
        "text to tokenize": ("/tokenize", {"prompt": text * (MEGABYTE // len(text))}),
        "a word to tokenize": ("/tokenize", {"prompt": "".join(random.Random(1).choices("abcdefghij", k=300_000))}),
        "tokens to decode": ("/detokenize", {"tokens": [1234] * (MEGABYTE // 6)}),
    }


# In processes of their own


def stream(url: str, clients: int) -> None:
    """Until it is ended: so many streams at a time."""

    async def run() -> None:
        client = OpenAIClient(url)

        async def one_after_the_other() -> None:
            while True:
                async with client.stream("completions", STREAM) as chunks:
                    async for _ in chunks:
                        pass

        await asyncio.gather(*(one_after_the_other() for _ in range(clients)))

    asyncio.run(run())


def send(url: str, name: str, answers: Any) -> None:
    """Until it is ended: the body of this name, again and again. `answers` counts the answers by their status."""
    path, body = bodies()[name]
    data = json.dumps({"model": MODEL, **body}, ensure_ascii=False).encode()

    async def run() -> None:
        client = HttpClient(url)
        while True:
            async with client.request("POST", path, headers=[("Content-Type", "application/json")], body=data) as got:
                while await got.read_some():
                    pass
                answers[got.status] += 1

    asyncio.run(run())


@asynccontextmanager
async def process(function: Callable[..., None], *arguments: Any) -> AsyncIterator[None]:
    """`function` in a process of its own, ended at the end."""
    running = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
    await asyncio.to_thread(running.start)
    try:
        yield
    finally:
        running.terminate()
        await asyncio.to_thread(running.join)


# In this one


async def lags(seconds: float) -> list[float]:
    """How late a timer of this loop is, in seconds, again and again."""
    loop = asyncio.get_running_loop()
    found: list[float] = []
    done = loop.create_future()
    end = loop.time() + seconds

    def look(due: float) -> None:
        now = loop.time()
        found.append(now - due)
        if now >= end:
            done.set_result(None)
        else:
            loop.call_at(now + INTERVAL_SECONDS, look, now + INTERVAL_SECONDS)

    look(loop.time())
    await done
    return found[1:]


@asynccontextmanager
async def server(args: argparse.Namespace) -> AsyncIterator[str]:
    """The server, ready; its URL."""
    serving = Serving(
        ServerSettings(
            model=args.model,
            served_model_names=(MODEL,),
            port=0,
            threads=args.threads,
            max_num_seqs=args.clients,
            kv_cache_memory=KV_CACHE_BYTES,
        )
    )
    listener = bind("127.0.0.1", 0)
    web = WebServer(web_config(create_app(serving), serving.settings))
    serving.set_ready(await asyncio.to_thread(AsyncEngine, args.model, **serving.settings.engine_options()))
    gc.freeze()  # as `pellucid serve` does
    running = asyncio.create_task(web.serve([listener]))
    try:
        yield url_of(listener)
    finally:
        web.should_exit = web.force_exit = True
        await serving.close()
        await running


async def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {}

    async def look(name: str, answers: Any = None) -> None:
        await asyncio.sleep(WARM_UP_SECONDS)
        start = time.process_time()
        found = np.array(await lags(args.seconds)) * 1e3
        results[name] = {
            "p50_ms": float(np.percentile(found, 50)),
            "p99_ms": float(np.percentile(found, 99)),
            "max_ms": float(found.max()),
            "processor_s": time.process_time() - start,
        }
        if answers is not None:
            results[name]["answers"] = {str(status): number for status, number in enumerate(answers) if number}

    async with server(args) as url:
        await look("idle")
        async with process(stream, url, args.clients):
            await look("streams")
            for name in bodies():
                answers: Any = multiprocessing.get_context("spawn").RawArray("i", 600)
                async with process(send, url, name, answers):
                    await look(f"streams, {name}", answers)
    return {"model": args.model, "clients": args.clients, "target_ms": TARGET_MS, "lag": results}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with short_turns():
        return asyncio.run(measure_all(args))


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['model']}, {result['clients']} streaming clients; lag of the event loop in ms")
    print(f"{'':28s} {'p50':>7s} {'p99':>7s} {'max':>7s}")
    for name, found in result["lag"].items():
        late = "  over the target" if found["p99_ms"] > result["target_ms"] else ""
        answers = ", ".join(f"{number} x {status}" for status, number in found.get("answers", {}).items())
        print(f"{name:28s} {found['p50_ms']:7.2f} {found['p99_ms']:7.2f} {found['max_ms']:7.2f}  {answers}{late}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: 5)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    return report(parser.parse_args(argv), measure, print_result)


if __name__ == "__main__":
    sys.exit(main())
