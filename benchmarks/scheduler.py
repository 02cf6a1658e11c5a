"""What a step of decoding costs beside the model: scheduling, building arrays, books, text and replies.

Sequences of equal length decode side by side, as `LLM.generate` runs them and as streams that are read in turn; the
steps that give every one of them a token count. Medians over these steps; the share is of the whole step.

usage: scheduler.py [MODEL] [--sequences 1,8,64] [--tokens 128] [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from pellucid import LLM, PellucidError, SamplingParams
from pellucid.core.metrics import StepTimes
from pellucid.core.trace import StepDone, TraceEvent
from pellucid.weights.catalog import DEFAULT_MODEL

PROMPT_TOKENS = 16
PARTS = ("schedule", "build", "postprocess")


class DecodeSteps:
    """A trace sink that keeps the times of the steps in which all of `num_seqs` sequences decode."""

    def __init__(self, num_seqs: int) -> None:
        self.num_seqs = num_seqs
        self.times: list[StepTimes] = []

    def emit(self, event: TraceEvent) -> None:
        if (
            isinstance(event, StepDone)
            and event.num_scheduled_tokens == event.num_sampled_tokens == event.num_running == self.num_seqs
        ):
            self.times.append(event.times)


def measure(model: str, num_seqs: int, *, num_tokens: int, threads: int | None, streamed: bool) -> dict[str, Any]:
    steps = DecodeSteps(num_seqs)
    with LLM(
        model, threads=threads, max_num_seqs=num_seqs, max_model_len=PROMPT_TOKENS + num_tokens, trace=steps
    ) as llm:
        prompts = [
            [(7919 * index + 104_729 * number) % min(llm.spec.vocab_size, 40_000) for index in range(PROMPT_TOKENS)]
            for number in range(num_seqs)
        ]
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=0)
        if streamed:
            streams = [llm.stream(prompt, params) for prompt in prompts]
            while streams:
                streams = [stream for stream in streams if next(stream, None) is not None]
        else:
            llm.generate(prompts, params)
    medians = {
        part: statistics.median(getattr(times, part) for times in steps.times)
        for part in ("total", "forward", "sample", *PARTS)
    }
    shares = [sum(getattr(times, part) for part in PARTS) / times.total for times in steps.times]
    return {
        "sequences": num_seqs,
        "streamed": streamed,
        "steps": len(steps.times),
        "seconds": medians,
        "share": statistics.median(shares),
    }


def print_results(results: list[dict[str, Any]]) -> None:
    columns = ("total", "forward", "sample", *PARTS)
    print(f"{'sequences':14}" + "".join(f"{name:>14}" for name in columns) + "  share")
    for result in results:
        name = f"{result['sequences']}{', streamed' if result['streamed'] else ''}"
        times = "".join(f"{1e3 * result['seconds'][column]:11.3f} ms" for column in columns)
        print(f"{name:14}{times}  {result['share']:.2%}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--sequences", default="1,8,64", help="how many decode side by side (default: 1,8,64)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that each generates (default: 128)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        results = [
            measure(args.model, int(num_seqs), num_tokens=args.tokens, threads=args.threads, streamed=streamed)
            for num_seqs in args.sequences.split(",")
            for streamed in (False, True)
        ]
    except (PellucidError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"model": args.model, "results": results}, indent=2))
    else:
        print_results(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
