"""What a process that keeps one processor busy takes of the speed: the same prompts alone and beside it, in turn.

Threads wait for each other at every barrier, so one that is held up holds up all; how they are placed decides how much
(docs/kernels.md). Half the speed is what is left where there are two processors and the busy one is shared fairly.

usage: busy_neighbour.py [MODEL] [--sequences 1,16] [--rounds 5] [--max-tokens 128] [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from report import report

from pellucid import LLM, SamplingParams
from pellucid.client.load import prompts
from pellucid.weights.catalog import DEFAULT_MODEL

PROMPT_WORDS = 100
KV_CACHE_BYTES = 512 * 10**6


def measure(args: argparse.Namespace) -> dict[str, Any]:
    sequences = [int(count) for count in args.sequences.split(",")]
    speeds: dict[int, dict[str, list[float]]] = {count: {"alone": [], "beside": []} for count in sequences}
    options = {"max_num_seqs": max(sequences), "kv_cache_memory": KV_CACHE_BYTES, "enable_prefix_caching": False}
    with LLM(args.model, threads=args.threads, **options) as llm:
        for number in range(args.rounds + 1):
            for count, found in speeds.items():
                texts = list(itertools.islice(prompts.common_words(PROMPT_WORDS, number), count))
                alone = speed(llm, texts, args.max_tokens)
                with busy_process():
                    beside = speed(llm, texts, args.max_tokens)
                if number > 0:  # the first one warms up
                    found["alone"].append(alone)
                    found["beside"].append(beside)
    return {
        "model": args.model,
        "max_tokens": args.max_tokens,
        "rounds": args.rounds,
        "speeds": {
            count: {
                **{way: statistics.median(values) for way, values in found.items()},
                "left": statistics.median(
                    beside / alone for alone, beside in zip(found["alone"], found["beside"], strict=True)
                ),
            }
            for count, found in speeds.items()
        },
    }


def speed(llm: LLM, texts: list[str], max_tokens: int) -> float:
    """Output tokens a second."""
    start = time.perf_counter()
    llm.generate(texts, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    return len(texts) * max_tokens / (time.perf_counter() - start)


@contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def print_result(result: dict[str, Any]) -> None:
    print(
        f"{result['model']}: {PROMPT_WORDS}-word prompts, {result['max_tokens']} new tokens, output tokens a second; "
        f"medians of {result['rounds']} rounds"
    )
    print(" at once    alone  beside a busy process   left")
    for count, found in result["speeds"].items():
        print(f"{count:8d} {found['alone']:8.1f} {found['beside']:22.1f} {found['left']:6.0%}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--sequences", metavar="N,N,...", default="1,16", help="prompts at once (default: 1,16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    return report(parser.parse_args(argv), measure, print_result)


if __name__ == "__main__":
    sys.exit(main())
