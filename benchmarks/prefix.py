"""What a shared prefix saves: time to the first token of a first and of a second request that begin alike.

Every round has a prefix of its own, followed by a few tokens in which the two requests differ. Medians over the rounds.

usage: prefix.py [MODEL] [--prefix 1000] [--suffix 8] [--rounds 7] [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from report import report

from pellucid import LLM, SamplingParams
from pellucid.weights.catalog import DEFAULT_MODEL


def measure(args: argparse.Namespace) -> dict[str, Any]:
    first: list[float] = []
    second: list[float] = []
    cached: list[int] = []
    with LLM(args.model, threads=args.threads, max_model_len=args.prefix + args.suffix + 1) as llm:
        params = SamplingParams(max_tokens=1, temperature=0)

        def token(index: int, salt: int) -> int:
            return (7919 * index + 104_729 * salt) % min(llm.spec.vocab_size, 40_000)

        for number in range(args.rounds + 1):
            prefix = [token(index, number) for index in range(args.prefix)]
            suffixes = [[token(index, -2 * number - other) for index in range(args.suffix)] for other in (1, 2)]
            metrics = [llm.generate(prefix + suffix, params)[0].metrics for suffix in suffixes]
            if number == 0:  # warms up
                continue
            first.append(metrics[0].ttft)
            second.append(metrics[1].ttft)
            cached.append(metrics[1].cached_tokens)
    return {
        "model": args.model,
        "prefix_tokens": args.prefix,
        "suffix_tokens": args.suffix,
        "rounds": args.rounds,
        "cached_tokens": statistics.median(cached),
        "first_ttft_s": first,
        "second_ttft_s": second,
        "median_first_ttft_s": statistics.median(first),
        "median_second_ttft_s": statistics.median(second),
        "ratio": statistics.median(one / two for one, two in zip(first, second, strict=True)),
    }


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['model']}, a prefix of {result['prefix_tokens']} tokens and {result['suffix_tokens']} more")
    print(f"first request:  {1e3 * result['median_first_ttft_s']:7.1f} ms to the first token")
    print(
        f"second request: {1e3 * result['median_second_ttft_s']:7.1f} ms, {result['cached_tokens']:.0f} tokens cached: "
        f"{result['ratio']:.1f} times as quick, median of {result['rounds']} rounds"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--prefix", type=int, default=1000, help="tokens in common (default: 1000)")
    parser.add_argument("--suffix", type=int, default=8, help="tokens after them (default: 8)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    return report(parser.parse_args(argv), measure, print_result)


if __name__ == "__main__":
    sys.exit(main())
