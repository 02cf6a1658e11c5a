"""`pellucid bench serve`: a server of the OpenAI API under load, alone or in turn with others."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
from typing import TYPE_CHECKING, Any

from pellucid.cli.parser import add_server_options
from pellucid.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from pellucid.client.load.comparison import Plan, Server

DESCRIPTION = """
Put a load on a server that has the OpenAI API, Pellucid's or any other, and measure what its clients see: time to first
token (TTFT), inter-token latency (ITL), time per output token (TPOT), end-to-end time, output tokens and requests a
second, errors by kind. docs/benchmarks.md says exactly what each figure is.

Requests stream; by default each has 100 random common words as prompt and asks for 128 tokens whatever the model would
say (`ignore_eos`, which OpenAI's own API does not have: --no-ignore-eos). The load is a fixed number of clients, each
with its next request as soon as the last is answered, or requests at random moments (--rate). With --peer, servers are
measured in turn with the same prompts, several rounds of them: medians and ratios are shown.
"""

EXAMPLES = """
pellucid bench serve --url http://127.0.0.1:8000
pellucid bench serve --concurrency 16 --requests 64 --goodput ttft:500 itl:50
pellucid bench serve --rate 1,2,4 --seconds 60 --json
pellucid bench serve --url pellucid=http://127.0.0.1:8000 --peer llama.cpp=http://127.0.0.1:8080 --concurrency 16
"""

DEFAULT_CONCURRENCY = [1, 4, 16]
ROUNDS_WITH_PEERS = 3
SETTLE_SECONDS = 3.0  # threads of some engines spin for a while after their work; the next one waits for that to end
GOODPUT_LIMITS = ("ttft", "itl", "tpot", "e2e")


def counts(text: str) -> list[int]:
    """`1,4,16` -> [1, 4, 16]."""
    values = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"must be integers from 1, as 1,4,16, not {text!r}")
    return values


def rates(text: str) -> list[float]:
    """`0.5,2,inf` -> [0.5, 2.0, inf]."""
    values = [number(part) for part in text.split(",")]
    if not all(value > 0 for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers over 0, as 0.5,2,inf, not {text!r}")
    return values


def goodput_limit(text: str) -> tuple[str, float]:
    """`ttft:500` -> ("ttft", 0.5)."""
    name, _, milliseconds = text.partition(":")
    seconds = number(milliseconds) / 1e3
    if name not in GOODPUT_LIMITS or not seconds > 0:
        names = ", ".join(GOODPUT_LIMITS)
        raise argparse.ArgumentTypeError(f"must be one of {names} with milliseconds, as ttft:500, not {text!r}")
    return name, seconds


def number(text: str) -> float:
    """What is no number is none that compares with one."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        metavar="[NAME=]URL",
        help="the server; /v1 is added where the URL has no path (default: http://127.0.0.1:8000)",
    )
    parser.add_argument("--model", metavar="NAME", help="its name there (default: the first that the server lists)")
    add_server_options(parser)
    load = parser.add_argument_group("load")
    how = load.add_mutually_exclusive_group()
    how.add_argument("--concurrency", type=counts, metavar="N,N", help="clients at once (default: 1,4,16)")
    how.add_argument("--rate", type=rates, metavar="R,R", help="requests a second, at random moments; inf: all at once")
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="with --rate: 1 is a Poisson process, less comes in bursts, more comes evenly (default: 1)",
    )
    extent = load.add_mutually_exclusive_group()
    extent.add_argument(
        "--requests", type=int, metavar="N", help="requests of each run (default: 4 for each client, at least 8)"
    )
    extent.add_argument("--seconds", type=float, metavar="S", help="send requests for so long instead")
    load.add_argument(
        "--abort", type=float, default=0.0, metavar="SHARE", help="share of requests that disconnect at random points"
    )
    load.add_argument("--warmup", type=int, metavar="N", help="requests before all, not counted (default: up to 16)")
    request = parser.add_argument_group("requests")
    request.add_argument("--endpoint", choices=("chat", "completions"), default="chat", help="(default: chat)")
    request.add_argument("--prompt-words", type=int, default=100, metavar="N", help="words of a prompt (default: 100)")
    request.add_argument("--prompts", metavar="FILE", help='JSONL instead: strings, {"prompt": ...}, {"messages": ...}')
    request.add_argument(
        "--seed", type=int, metavar="N", help="same prompts, same moments (default: new ones each run)"
    )
    request.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of each answer (default: 128)")
    request.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(default: 0)")
    request.add_argument("--no-ignore-eos", dest="ignore_eos", action="store_false", help="let the model end answers")
    compared = parser.add_argument_group("comparison")
    compared.add_argument(
        "--peer", action="append", default=[], metavar="NAME=URL", help="a server to measure in turn with the first"
    )
    compared.add_argument(
        "--rounds", type=int, metavar="N", help="times to repeat everything (default: 1; 3 with peers)"
    )
    compared.add_argument(
        "--settle", type=float, metavar="S", help="seconds of rest between runs (default: 3 with peers)"
    )
    result = parser.add_argument_group("result")
    result.add_argument(
        "--goodput",
        nargs="+",
        type=goodput_limit,
        metavar="NAME:MS",
        help="count the requests that keep to all of these limits in milliseconds: ttft:500 itl:50 tpot:50 e2e:5000",
    )
    result.add_argument("--json", action="store_true", help="print one JSON object; times in seconds")
    result.add_argument("--output", metavar="FILE", help="write the JSON object to FILE as well")


def run(args: argparse.Namespace) -> int:
    from pellucid.cli.bench_serve_report import print_result

    check(args)
    if args.output is not None:  # rather now than after minutes of measuring
        open(args.output, "a", encoding="utf-8").close()
    result = asyncio.run(measure(args))
    text = json.dumps(result, ensure_ascii=False, indent=2)
    if args.output is not None:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    if args.json:
        print(text)
    else:
        print_result(result)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises InvalidRequestError where an option is out of its range."""
    for name in ("requests", "prompt_words", "max_tokens", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidRequestError(f"--{name.replace('_', '-')} must be at least 1, not {value}", param=name)
    for name in ("seconds", "burstiness"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InvalidRequestError(f"--{name} must be a number over 0, not {value:g}", param=name)
    for name, most in (("settle", math.inf), ("temperature", math.inf), ("abort", 1), ("warmup", math.inf)):
        value = getattr(args, name)
        if (value is not None and not 0 <= value <= most) or value == math.inf:
            upper = "" if math.isinf(most) else f" and at most {most:g}"
            raise InvalidRequestError(f"--{name} must be at least 0{upper}, not {value:g}", param=name)
    if args.seconds is not None and math.inf in (args.rate or ()):
        raise InvalidRequestError(
            "--rate inf sends all requests at once: say how many with --requests, not for how long", param="seconds"
        )
    if args.rate is None and args.burstiness != 1:
        raise InvalidRequestError(
            "--burstiness is about requests at random moments: give --rate too", param="burstiness"
        )


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every server under every load, in turn. JSON-ready."""
    from pellucid.cli.load_progress import LoadProgress
    from pellucid.client.errors import ServerError
    from pellucid.client.load.comparison import compare

    plan = plan_of(args)
    servers: list[Server] = []
    try:
        for number, text in enumerate([args.url, *args.peer]):
            servers.append(await connect(args, text, is_first=number == 0, taken=[server.name for server in servers]))
        with LoadProgress(len(plan.loads) * plan.rounds * len(servers)) as progress:
            results = await compare(servers, plan, progress)
    except ServerError as error:
        if "ignore_eos" in error.message:
            raise ServerError(f"{error.message}\n--no-ignore-eos leaves that field out") from None
        raise
    finally:
        for server in servers:
            await server.client.aclose()
    return {
        "servers": [{"name": s.name, "url": s.client.origin, "model": s.work.model} for s in servers],
        "endpoint": args.endpoint,
        "prompts": f"{args.prompt_words} random common words" if args.prompts is None else args.prompts,
        "max_tokens": args.max_tokens,
        "ignore_eos": args.ignore_eos,
        "temperature": args.temperature,
        "abort_share": args.abort,
        "rounds": plan.rounds,
        "seed": plan.seed,
        "results": results,
    }


def plan_of(args: argparse.Namespace) -> Plan:
    from pellucid.client.load import prompts
    from pellucid.client.load.arrivals import Concurrency, Load, Rate
    from pellucid.client.load.comparison import Plan
    from pellucid.client.load.generator import Extent

    loads: list[Load]
    if args.rate is None:
        loads = [Concurrency(clients) for clients in args.concurrency or DEFAULT_CONCURRENCY]
    else:
        loads = [Rate(rate, args.burstiness) for rate in args.rate]
    is_given = args.requests is not None or args.seconds is not None
    return Plan(
        loads=loads,
        rounds=args.rounds or (ROUNDS_WITH_PEERS if args.peer else 1),
        seed=int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed,
        extent=Extent(args.requests, args.seconds) if is_given else None,
        warm_ups=args.warmup,
        settle=args.settle if args.settle is not None else SETTLE_SECONDS if args.peer else 0.0,
        prompt_words=args.prompt_words,
        prompts=None if args.prompts is None else prompts.from_file(args.prompts),
        goodput=None if args.goodput is None else dict(args.goodput),
    )


async def connect(args: argparse.Namespace, text: str, *, is_first: bool, taken: list[str]) -> Server:
    """The server that `text` names, with the model that it is asked for.

    The model, the key and the headers that were given are the first server's, and no other's business.

    Raises:
        ServerError: it gives no list of its models.
        InvalidRequestError: the URL, a header or the key cannot be used, or the name is `taken`.
    """
    from pellucid.client.load.comparison import Server
    from pellucid.client.load.generator import Work
    from pellucid.client.openai import OpenAIClient

    name, url = split_name(text)
    if is_first:
        api_key = args.api_key or os.environ.get("OPENAI_API_KEY")
        client = OpenAIClient(url, api_key=api_key, headers=args.header, read_timeout=args.timeout)
    else:
        client = OpenAIClient(url, read_timeout=args.timeout)
    name = name or client.origin.partition("://")[2]
    if name in taken:
        raise InvalidRequestError(f"two servers go by the name {name}: give --peer NAME=URL", param="peer")
    model = args.model if is_first and args.model is not None else (await client.models())[0]
    fields = {"temperature": args.temperature, **({"ignore_eos": True} if args.ignore_eos else {})}
    return Server(name, client, Work(args.endpoint, model, args.max_tokens, fields, args.abort))


def split_name(text: str) -> tuple[str, str]:
    """`NAME=URL` -> ("NAME", "URL"); without a name, ("", "URL")."""
    name, equals, url = text.partition("=")
    return (name, url) if equals and "://" not in name else ("", text)
