"""What choosing tokens costs, as a share of a step of decoding.

Sequences decode side by side after a text of 1,000 tokens, so that logits are a model's own and penalties look at as
many tokens; the sampling parameters take turns. Medians over the steps that give every sequence a token. The time of a
row is that of the sampling call, on all its threads, divided by its rows.

usage: sampling.py [MODEL ...] [--sequences 1,16] [--tokens 64] [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import report
from scheduler import DecodeSteps

from pellucid import LLM, SamplingParams

TEXT = Path(__file__).with_name("text.txt")
PROMPT_TOKENS = 1000
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
COMMON: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "common": COMMON,
    "common + DRY": COMMON | {"dry_multiplier": 0.8},
    "common + logprobs": COMMON | {"logprobs": 5},
    "typical-p": {"temperature": 0.8, "typical_p": 0.95},
    "mirostat": {"temperature": 0.8, "mirostat": 2},
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    results = [
        result
        for model in args.models
        for num_seqs in map(int, args.sequences.split(","))
        for result in measure_model(model, num_seqs, num_tokens=args.tokens, threads=args.threads)
    ]
    return {"results": results}


def measure_model(model: str, num_seqs: int, *, num_tokens: int, threads: int | None) -> list[dict[str, Any]]:
    steps = DecodeSteps(num_seqs)
    length = PROMPT_TOKENS + num_tokens
    with LLM(model, threads=threads, max_num_seqs=num_seqs, max_model_len=length, trace=steps) as llm:
        text = llm.tokenizer.encode(TEXT.read_text())
        shared = (text * 2)[: PROMPT_TOKENS - 1]
        prompts = [[*shared, text[number]] for number in range(num_seqs)]
        llm.generate(prompts, SamplingParams(max_tokens=1))  # from here on all begin to decode in the same step
        results = []
        for name, params in PARAMS.items():
            steps.times.clear()
            llm.generate(prompts, SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=0, **params))
            sample = statistics.median(times.sample for times in steps.times)
            total = statistics.median(times.total for times in steps.times)
            results.append(
                {
                    "model": model,
                    "vocab_size": llm.spec.vocab_size,
                    "sequences": num_seqs,
                    "parameters": name,
                    "seconds_per_row": sample / num_seqs,
                    "step_seconds": total,
                    "share": statistics.median(times.sample / times.total for times in steps.times),
                }
            )
    return results


def print_result(result: dict[str, Any]) -> None:
    print(f"{'model':24}{'vocabulary':>10}{'sequences':>11}  {'parameters':18}{'a row':>10}{'step':>12}  share")
    for row in result["results"]:
        print(
            f"{row['model']:24}{row['vocab_size']:10}{row['sequences']:11}  {row['parameters']:18}"
            f"{1e6 * row['seconds_per_row']:7.1f} us{1e3 * row['step_seconds']:9.2f} ms  {row['share']:.2%}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="*", default=MODELS)
    parser.add_argument("--sequences", default="1,16", help="how many decode side by side (default: 1,16)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each generates (default: 64)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    return report(parser.parse_args(argv), measure, print_result)


if __name__ == "__main__":
    sys.exit(main())
