"""What the HTTP layer costs: streams of a server beside `LLM.generate` in this process, the same prompts, in turn.

Both have the same model, threads, sequences at once and KV cache. Each round has prompts of its own, as many for each
of the CLIENTS as REQUESTS says; offline all are given at once. The server's figure has everything in it that its
clients pay for: HTTP, parsing, events, and this process as the client, which shares the processors.

The share is 1 - (server's output tokens a second / offline's). Processor time a token is told beside it, of the server
and of the client, since what else runs on the machine changes it less. Linux only.

usage: http_layer.py [MODEL] [--clients 16] [--requests 2] [--rounds 5] [--endpoint completions] [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from report import report
from server_process import ServerProcess

from pellucid import LLM, SamplingParams
from pellucid.client.errors import ServerError
from pellucid.client.load import prompts
from pellucid.client.load.arrivals import Concurrency
from pellucid.client.load.generator import Extent, LoadGenerator, Work
from pellucid.client.load.summary import summarize
from pellucid.client.openai import OpenAIClient
from pellucid.weights.catalog import DEFAULT_MODEL

PROMPT_WORDS = 100
KV_CACHE_BYTES = 512 * 10**6
WAYS = ("offline", "server")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    limits = ["--max-num-seqs", str(args.clients), "--kv-cache-memory", str(KV_CACHE_BYTES)]
    rounds: list[dict[str, dict[str, float]]] = []
    with (
        LLM(args.model, threads=args.threads, max_num_seqs=args.clients, kv_cache_memory=KV_CACHE_BYTES) as llm,
        ServerProcess(args.model, *limits, *threads, "--log-level", "warning") as server,
    ):
        for number in range(args.rounds + 1):
            texts = list(itertools.islice(prompts.common_words(PROMPT_WORDS, number), args.clients * args.requests))
            found = {"offline": offline(llm, texts, args), "server": asyncio.run(online(server, texts, args))}
            if number > 0:  # the first one warms up
                rounds.append(found)
    ratios = [found["server"]["tokens_per_s"] / found["offline"]["tokens_per_s"] for found in rounds]
    median = {
        way: {name: statistics.median(found[way][name] for found in rounds) for name in rounds[0][way]} for way in WAYS
    }
    return {
        "model": args.model,
        "clients": args.clients,
        "requests": args.clients * args.requests,
        "max_tokens": args.max_tokens,
        "endpoint": args.endpoint,
        "rounds": rounds,
        "median": median,
        "median_ratio": statistics.median(ratios),
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
        "share": 1 - statistics.median(ratios),
    }


def offline(llm: LLM, texts: list[str], args: argparse.Namespace) -> dict[str, float]:
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    asked = texts if args.endpoint == "completions" else [[{"role": "user", "content": text}] for text in texts]
    start, processor = time.perf_counter(), time.process_time()
    outputs = llm.generate(asked, params) if args.endpoint == "completions" else llm.chat(asked, params)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    tokens = sum(output.metrics.output_tokens for output in outputs)
    return {"tokens_per_s": tokens / seconds, "processor_s_per_token": processor / tokens}


async def online(server: ServerProcess, texts: list[str], args: argparse.Namespace) -> dict[str, float]:
    client = OpenAIClient(server.url)
    model = (await client.models())[0]
    work = Work(args.endpoint, model, args.max_tokens, {"ignore_eos": True, "temperature": 0})
    processor = server.processor_seconds()
    result = await LoadGenerator(client, work, iter(texts)).run(Concurrency(args.clients), Extent(requests=len(texts)))
    processor = server.processor_seconds() - processor
    await client.aclose()
    summary = summarize(result, args.max_tokens)
    if summary["failed"] or summary["answers_short_of_max_tokens"]:
        raise ServerError(f"not every answer is whole: {summary['errors']} {summary['error_messages']}")
    tokens = summary["output_tokens"]
    return {
        "tokens_per_s": summary["output_tokens_per_s"],
        "processor_s_per_token": processor / tokens,
        "client_processor_s_per_token": result.own_cost.cpu_seconds / tokens,
        "events_per_token": summary["output_events"] / tokens,
    }


def print_result(result: dict[str, Any]) -> None:
    print(
        f"{result['model']}, {result['endpoint']}, {result['requests']} requests of {result['max_tokens']} tokens, "
        f"{result['clients']} at once; medians of {len(result['rounds'])} rounds"
    )
    median = result["median"]
    for way in WAYS:
        figures = median[way]
        print(
            f"{way:8s} {figures['tokens_per_s']:7.1f} output tok/s, "
            f"{figures['processor_s_per_token'] * 1e3:.3f} ms of processor time a token"
        )
    server, client = (median["server"][f"{who}processor_s_per_token"] for who in ("", "client_"))
    print(
        f"client   {client * 1e3:24.3f} ms of processor time a token, "
        f"{client / (server + client):.1%} of both, "
        f"{median['server']['events_per_token']:.2f} events a token"
    )
    print(
        f"the HTTP layer takes {result['share']:.1%} of the throughput "
        f"(server / offline {result['median_ratio']:.3f}, {result['min_ratio']:.3f} to {result['max_ratio']:.3f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round (default: 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    return report(parser.parse_args(argv), measure, print_result)


if __name__ == "__main__":
    sys.exit(main())
