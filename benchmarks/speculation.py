"""What guessing ahead saves: decoding with speculation beside decoding without, request for request in turn.

Two tasks. In "edit" the model is asked to rewrite a passage with a name changed (one without a chat template goes on
with a copy of it), so that most of the answer is in the prompt. In "random" it draws free text at temperature 1, of
which hardly anything can be guessed. The answers with and without speculation are compared: one that differs ends the
benchmark.

usage: speculation.py [MODEL] [--method ngram] [--num-draft-tokens N] [--fixed] [--draft-model MODEL]
                      [--draft-layers LAYERS] [--task TASK] [--max-tokens 256] [--concurrency 1] [--rounds 7]
                      [--threads N] [--processor-time] [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import report

from pellucid import LLM, BackendError, RequestOutput, SamplingParams, SpeculativeConfig
from pellucid.cli.parser import layer_numbers
from pellucid.weights.catalog import DEFAULT_MODEL

REQUEST = "Rewrite this text and change nothing but Lindmouth to Lindhaven:\n\n"


def prompt_and_params(llm: LLM, task: str, args: argparse.Namespace) -> tuple[list[int], SamplingParams]:
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0, ignore_eos=True, seed=1)
    paragraphs = (Path(__file__).parent / "text.txt").read_text().split("\n\n")
    if task == "random":
        return llm.tokenizer.encode(paragraphs[0]), replace(params, temperature=1)
    passage = "\n\n".join(paragraphs[:2])
    if llm.tokenizer.has_chat_template:
        return llm.tokenizer.apply_chat_template([{"role": "user", "content": REQUEST + passage}]), params
    begun = " ".join(passage.replace("Lindmouth", "Lindhaven").split(" ")[:60])
    return llm.tokenizer.encode(f"Draft:\n\n{passage}\n\nFinal version:\n\n{begun}"), params


def speed(outputs: list[RequestOutput], processor_seconds: float | None) -> float:
    """Tokens a second after the first, of all requests together: of time passed, or of the processor's."""
    times = [each.metrics.token_times[0] for each in outputs]
    passed = max(each[-1] for each in times) - min(each[0] for each in times)
    return sum(len(each) - 1 for each in times) / (processor_seconds or passed)


def run_task(plain: LLM, guessing: LLM, task: str, args: argparse.Namespace) -> dict[str, Any]:
    prompt, params = prompt_and_params(plain, task, args)
    requests = [replace(params, seed=number) for number in range(args.concurrency)]
    speeds: dict[str, list[float]] = {"without": [], "with": []}
    drafts = accepted = steps = tokens = 0
    for number in range(args.rounds + 1):
        answers = {}
        for name, llm in (("without", plain), ("with", guessing)):
            before, begun = llm.metrics().counters.steps, time.process_time()
            outputs = llm.generate([prompt] * len(requests), requests)
            processor_seconds = time.process_time() - begun
            answers[name] = [output.outputs[0].token_ids for output in outputs]
            if number:  # the first round warms up
                speeds[name].append(speed(outputs, processor_seconds if args.processor_time else None))
                if llm is guessing:
                    drafts += sum(output.metrics.draft_tokens for output in outputs)
                    accepted += sum(output.metrics.accepted_tokens for output in outputs)
                    tokens += sum(output.metrics.output_tokens for output in outputs)
                    steps += llm.metrics().counters.steps - before
        if answers["without"] != answers["with"]:
            raise BackendError(f"the answers to '{task}' differ with speculation: that must never be")
    ratios = [new / old for old, new in zip(speeds["without"], speeds["with"], strict=True)]
    return {
        "without_tokens_per_s": statistics.median(speeds["without"]),
        "with_tokens_per_s": statistics.median(speeds["with"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "draft_tokens": drafts,
        "acceptance_rate": accepted / drafts if drafts else 0.0,
        "tokens_per_step": tokens / steps,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"draft_model": args.draft_model, "layers": args.draft_layers}
    if args.num_draft_tokens:
        options["num_draft_tokens"] = args.num_draft_tokens
    config = SpeculativeConfig(args.method, adaptive=not args.fixed, **options)
    tasks = ["edit", "random"] if args.task == "all" else [args.task]
    common: dict[str, Any] = {"threads": args.threads, "max_num_seqs": args.concurrency, "kv_cache_memory": 256 << 20}
    with LLM(args.model, **common) as plain, LLM(args.model, speculative=config, **common) as guessing:
        results = {task: run_task(plain, guessing, task, args) for task in tasks}
    return {
        "model": args.model,
        "method": args.method,
        "num_draft_tokens": config.num_draft_tokens,
        "adaptive": config.adaptive,
        "max_tokens": args.max_tokens,
        "concurrency": args.concurrency,
        "rounds": args.rounds,
        "of": "processor time" if args.processor_time else "time",
        "tasks": results,
    }


def print_result(result: dict[str, Any]) -> None:
    how = "as many as pay" if result["adaptive"] else "always"
    print(
        f"{result['model']}, {result['method']}, up to {result['num_draft_tokens']} draft tokens, {how}; "
        f"{result['concurrency']} at once, {result['max_tokens']} tokens each; median of {result['rounds']} rounds, "
        f"tok/s of {result['of']}"
    )
    for task, item in result["tasks"].items():
        print(
            f"{task:<7} {item['without_tokens_per_s']:7.1f} tok/s without, {item['with_tokens_per_s']:7.1f} with: "
            f"{item['ratio']:.3f} times ({min(item['ratios']):.3f} to {max(item['ratios']):.3f}); "
            f"{item['acceptance_rate']:.0%} of {item['draft_tokens']} drafts accepted, "
            f"{item['tokens_per_step']:.2f} tokens a step"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--method", default="ngram", help="who guesses (default: ngram)")
    parser.add_argument("--num-draft-tokens", type=int, metavar="N", help="most guesses in a step")
    parser.add_argument("--fixed", action="store_true", help="guess that many always, and not as many as pay")
    parser.add_argument("--draft-model", metavar="MODEL", help="with draft_model, who guesses")
    parser.add_argument("--draft-layers", type=layer_numbers, metavar="LAYERS", help="with layer_skip, who guesses")
    parser.add_argument("--task", choices=["edit", "random", "all"], default="all")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's seconds, for a machine that others use too; with --threads 1, since threads that "
        "wait for each other count as well",
    )
    parser.add_argument("--json", action="store_true")
    return report(parser.parse_args(argv), measure, print_result)


if __name__ == "__main__":
    sys.exit(main())
