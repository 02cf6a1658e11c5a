"""Aggregate throughput at many requests at once, beside OpenAI-compatible servers of other engines on the same machine.

Each request has a prompt of 100 random common words and asks for 128 greedy tokens, end-of-sequence ignored. Pellucid
runs offline (`LLM.generate`), with at most CONCURRENCY sequences at a time; a peer is driven over HTTP by as many
clients, each with its next request as soon as the last is answered, not streamed. Rounds are interleaved: every engine
once, then again, with prompts that none has seen. Figures are medians over the rounds.

Pellucid's KV cache holds TOKENS_PER_SLOT tokens for each of the concurrent sequences, as a server's slots do, and is
filled before the first round: memory that no request has used yet costs page faults, a tenth of the time on some
virtual machines, until the cache has grown to its limit.

usage: concurrency.py MODEL [--concurrency 1,2,4,8,16,32,64] [--rounds 3] [--requests 2] [--peer NAME=URL ...] [--json]

    --requests  how many requests each of the concurrent ones makes in a round
    --peer      such as llama.cpp=http://127.0.0.1:8080/v1; measured at the same concurrency. The server must have as
                many slots, and its own end-of-sequence handling must follow `ignore_eos`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

from pellucid import LLM, PellucidError, SamplingParams
from pellucid.client.load.prompts import common_words
from pellucid.core.config import num_blocks_for
from pellucid.estimate.memory import kv_bytes_per_block
from pellucid.weights.catalog import resolve
from pellucid.weights.loader import open_model

PROMPT_WORDS = 100
OUTPUT_TOKENS = 128
TOKENS_PER_SLOT = 1024
WARM_UP_SEED = 2**32
SETTLE_SECONDS = 3  # threads of some engines spin for a while after their work; the next one waits for that to end


def prompts(count: int, seed: int) -> list[str]:
    return list(itertools.islice(common_words(PROMPT_WORDS, seed), count))


def open_engine(model: str, concurrency: int) -> LLM:
    """An engine of `concurrency` slots, warm."""
    with open_model(resolve(model)) as file:
        block_bytes = kv_bytes_per_block(file.spec, "f16")
    memory = concurrency * num_blocks_for(TOKENS_PER_SLOT) * block_bytes
    llm = LLM(model, max_num_seqs=concurrency, seed=0, kv_cache_memory=memory, max_model_len=TOKENS_PER_SLOT)
    filling = SamplingParams(temperature=0, max_tokens=1)
    rng = random.Random(WARM_UP_SEED)
    llm.generate([[rng.randrange(llm.spec.vocab_size) for _ in range(1000)] for _ in range(concurrency)], filling)
    return llm


def pellucid_speed(llm: LLM, texts: list[str]) -> float:
    """Output tokens a second."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(texts, params)
    seconds = time.perf_counter() - start
    return sum(output.metrics.output_tokens for output in outputs) / seconds


def peer_speed(url: str, texts: list[str], concurrency: int) -> float:
    """Output tokens a second, by the server's own count."""
    with urllib.request.urlopen(f"{url}/models") as reply:
        model = json.load(reply)["data"][0]["id"]

    def complete(text: str) -> int:
        body = {"model": model, "prompt": text, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return int(json.load(reply)["usage"]["completion_tokens"])

    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as clients:
        tokens = sum(clients.map(complete, texts))
    seconds = time.perf_counter() - start
    if tokens != len(texts) * OUTPUT_TOKENS:
        print(f"{url}: {tokens} tokens for {len(texts)} requests of {OUTPUT_TOKENS}", file=sys.stderr)
    return tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in args.peer)

    if not args.json:
        print(heading(args.model, list(peers)))
    seed = 0
    results = []
    for concurrency in map(int, args.concurrency.split(",")):
        speeds: dict[str, list[float]] = defaultdict(list)
        with open_engine(args.model, concurrency) as llm:
            for _ in range(args.rounds):
                seed += 1
                texts = prompts(args.requests * concurrency, seed)
                time.sleep(SETTLE_SECONDS)
                speeds["Pellucid"].append(pellucid_speed(llm, texts))
                for name, url in peers.items():
                    time.sleep(SETTLE_SECONDS)
                    speeds[name].append(peer_speed(url, texts, concurrency))
        median = {name: statistics.median(values) for name, values in speeds.items()}
        results.append({"concurrency": concurrency, "tokens_per_s": speeds, "median_tokens_per_s": median})
        if not args.json:
            print(row(concurrency, median), flush=True)
    if args.json:
        print(json.dumps({"model": args.model, "rounds": args.rounds, "results": results}, indent=2))


def heading(model: str, peers: list[str]) -> str:
    title = f"{model}: {PROMPT_WORDS}-word prompts, {OUTPUT_TOKENS} new tokens, output tokens a second\n"
    return f"{title}{'at once':>8s} {'Pellucid':>10s}" + "".join(f"{name:>12s} {'ratio':>6s}" for name in peers)


def row(concurrency: int, median: dict[str, float]) -> str:
    ours, *theirs = median.values()
    return f"{concurrency:8d} {ours:10.0f}" + "".join(f"{speed:12.0f} {ours / speed:5.2f}x" for speed in theirs)


if __name__ == "__main__":
    try:
        main()
    except (PellucidError, OSError) as error:
        sys.exit(f"error: {error}")
