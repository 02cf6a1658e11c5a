"""A server under load for long, with requests that disconnect: whether its memory stays flat and nothing is left.

Starts `pellucid serve` and puts CLIENTS clients on it, each with its next request as soon as the last is answered; a
share of the requests disconnects at random points (pellucid.client.load.generator). Memory is looked at every INTERVAL
seconds, after long prompts have touched the whole KV cache, which is limited so that they can, and a warm-up.
The slope is that of the least squares line through the second half of the samples. In the end, when all clients are
gone, no sequence may be left and no KV block in use.

The exit status is 1 where something is left, a request failed, or the server logged an error. Linux only.

usage: soak.py [MODEL] [--minutes 30] [--clients 16] [--abort 0.1] [--interval 10] [--kv-cache-memory 256MB] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from report import report
from server_process import Footprint, ServerProcess

from pellucid.client.errors import ServerError
from pellucid.client.load import prompts
from pellucid.client.load.arrivals import Concurrency
from pellucid.client.load.generator import Extent, LoadGenerator, Work
from pellucid.client.load.record import RequestRecord
from pellucid.client.load.summary import summarize
from pellucid.client.openai import OpenAIClient
from pellucid.core.config import BLOCK_SIZE
from pellucid.weights.catalog import DEFAULT_MODEL

FILL_TOKENS = 1000
WARM_UP_REQUESTS = 4  # of each client
IDLE_SECONDS = 60
LEFT_OVER = {
    "unfinished requests": "pellucid_num_requests_unfinished",
    "running sequences": 'pellucid_num_sequences{state="running"}',
    "waiting sequences": 'pellucid_num_sequences{state="waiting"}',
    "paused sequences": 'pellucid_num_sequences{state="paused"}',
    "used KV blocks": 'pellucid_kv_blocks{state="used"}',
}
LAG = "pellucid_event_loop_lag_seconds"


@dataclass(frozen=True, slots=True)
class Sample:
    """The server `seconds` after the soak began."""

    seconds: float
    footprint: Footprint


def measure(args: argparse.Namespace) -> dict[str, Any]:
    options = (args.model, "--max-num-seqs", str(args.clients), "--kv-cache-memory", args.kv_cache_memory)
    with ServerProcess(*options, "--log-level", "warning") as server:
        return asyncio.run(soak(server, args))


async def soak(server: ServerProcess, args: argparse.Namespace) -> dict[str, Any]:
    client = OpenAIClient(server.url)
    model = (await client.models())[0]
    work = Work("chat", model, args.max_tokens, {"ignore_eos": True, "temperature": 0}, args.abort)
    texts = prompts.common_words(100, args.seed)
    clients = Concurrency(args.clients)
    say(args, "filling the KV cache")
    await fill_kv_cache(server, client, model, clients)
    say(args, "warming up")
    await LoadGenerator(client, work, texts).run(clients, Extent(requests=WARM_UP_REQUESTS * args.clients))

    samples: list[Sample] = []
    start = time.perf_counter()

    def look() -> None:
        samples.append(Sample(time.perf_counter() - start, server.footprint()))
        seconds, seen = samples[-1].seconds, samples[-1].footprint
        progress = f"{seconds:6.0f} of {args.minutes * 60:.0f} s: {seen.rss / 1e6:.1f} MB, {seen.files} files"
        say(args, f"{progress}, {ended[0]} requests")

    async def watch() -> None:
        while True:
            look()
            await asyncio.sleep(args.interval)

    ended = [0]

    def count(_: RequestRecord) -> None:
        ended[0] += 1

    watching = asyncio.create_task(watch())
    generator = LoadGenerator(client, work, texts, seed=args.seed, on_record=count)
    result = await generator.run(clients, Extent(seconds=args.minutes * 60))
    watching.cancel()
    look()
    await client.aclose()
    summary = summarize(result, args.max_tokens)
    metrics = await when_idle(server)
    return {
        "model": args.model,
        "clients": args.clients,
        "abort_share": args.abort,
        "load": {
            name: summary[name] for name in ("requests", "completed", "aborted", "failed", "errors", "duration_s")
        },
        "error_messages": summary["error_messages"],
        "output_tokens_per_s": summary["output_tokens_per_s"],
        "ttft_s": summary["ttft_s"],
        "rss_bytes": rss_figures(samples),
        "files": {"first": samples[0].footprint.files, "last": samples[-1].footprint.files},
        "threads": {"first": samples[0].footprint.threads, "last": samples[-1].footprint.threads},
        "left_over": {name: metrics.get(key) for name, key in LEFT_OVER.items()},
        "event_loop_lag_over_s": lag_shares(metrics),
        "logged_errors": [line[:500] for line in server.log_lines(" error ", "Traceback")[:20]],
        "samples": [asdict(sample) for sample in samples],
    }


async def fill_kv_cache(server: ServerProcess, client: OpenAIClient, model: str, clients: Concurrency) -> None:
    """Prompts that are cached in every block there is: memory that is new to a process is no leak."""
    metrics = await server.metrics()
    blocks = sum(count for key, count in metrics.items() if key.startswith("pellucid_kv_blocks"))
    length = min(FILL_TOKENS, int(metrics["pellucid_max_model_len_tokens"]) - 1)
    requests = clients.clients + math.ceil(blocks * BLOCK_SIZE / length)
    draw = random.Random(0)
    texts = ([draw.randrange(10, 200) for _ in range(length)] for _ in range(requests))
    filled = await LoadGenerator(client, Work("completions", model, 1), texts).run(clients, Extent(requests=requests))
    if errors := [record.error for record in filled.records if record.error]:
        raise ServerError(f"the KV cache could not be filled: {errors[0]}")


async def when_idle(server: ServerProcess) -> dict[str, float]:
    """The server's metrics once nothing is left; or after some time, with what is."""
    deadline = time.perf_counter() + IDLE_SECONDS
    while True:
        metrics = await server.metrics()
        if not any(metrics.get(key, 1.0) for key in LEFT_OVER.values()) or time.perf_counter() > deadline:
            return metrics
        await asyncio.sleep(0.5)


def rss_figures(samples: Sequence[Sample]) -> dict[str, float]:
    late = samples[len(samples) // 2 :]
    sizes = [sample.footprint.rss for sample in samples]
    return {
        "first": sizes[0],
        "last": sizes[-1],
        "max": max(sizes),
        "slope_per_hour": 3600 * slope([(sample.seconds, sample.footprint.rss) for sample in late]),
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least squares line; 0 through a single point."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def lag_shares(metrics: dict[str, float]) -> dict[str, float]:
    """Share of the looks at which the server's event loop was later than so many seconds."""
    count = metrics.get(f"{LAG}_count", 0.0)
    prefix = f'{LAG}_bucket{{le="'
    buckets = {key[len(prefix) : -2]: value for key, value in metrics.items() if key.startswith(prefix)}
    return {le: 1 - value / count for le, value in buckets.items() if le != "+Inf"} if count else {}


def say(args: argparse.Namespace, text: str) -> None:
    """Tell on standard error how far things are."""
    if not args.json:
        print(text, file=sys.stderr, flush=True)


def print_result(result: dict[str, Any]) -> None:
    load, rss = result["load"], result["rss_bytes"]
    print(
        f"{result['model']}, {result['clients']} clients, {result['abort_share']:.0%} of the requests disconnect: "
        f"{load['duration_s'] / 60:.1f} minutes"
    )
    print(
        f"{load['requests']} requests: {load['completed']} answered, {load['aborted']} disconnected, "
        f"{load['failed']} failed {load['errors'] or ''}; {result['output_tokens_per_s']:.0f} output tok/s"
    )
    print(
        f"memory: {rss['first'] / 1e6:.1f} MB at first, {rss['last'] / 1e6:.1f} at last, {rss['max'] / 1e6:.1f} at "
        f"most; {rss['slope_per_hour'] / 1e6:+.2f} MB an hour in the second half"
    )
    print(f"open files: {result['files']['first']} at first, {result['files']['last']} at last")
    over = [(le, share) for le, share in result["event_loop_lag_over_s"].items() if float(le) >= 0.02]
    if over:
        le, share = min(over, key=lambda pair: float(pair[0]))
        print(f"the server's event loop was over {float(le) * 1e3:.0f} ms late in {share:.2%} of the looks")
    left = {name: count for name, count in result["left_over"].items() if count != 0}
    print("left over: " + (", ".join(f"{count} {name}" for name, count in left.items()) or "nothing"))
    for kind, message in result["error_messages"].items():
        print(f"{kind}: {message}")
    for line in result["logged_errors"]:
        print(f"log: {line}")


def is_clean(result: dict[str, Any]) -> bool:
    """Whether nothing is left, nothing failed and no error was logged."""
    return not (
        result["load"]["failed"] or result["logged_errors"] or any(c != 0 for c in result["left_over"].values())
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--abort", type=float, default=0.1, help="share of requests that disconnect (default: 0.1)")
    parser.add_argument("--interval", type=float, default=10, help="seconds between looks (default: 10)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--kv-cache-memory", default="256MB", help="of the server (default: 256MB)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    left: list[bool] = []

    def measure_and_judge(args: argparse.Namespace) -> dict[str, Any]:
        result = measure(args)
        left.append(not is_clean(result))
        return result

    return report(parser.parse_args(argv), measure_and_judge, print_result) or int(any(left))


if __name__ == "__main__":
    sys.exit(main())
