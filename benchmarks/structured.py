"""Structured output: whether answers hold to their JSON schemas, and what masks cost.

First, many schemas (json_schemas.py), each with an answer drawn at temperature 1: it must parse, and validate by the
jsonschema package. An answer that `--tokens` cut off counts as such, not as valid. Then the time to decode a token with
a grammar and without one, in turn within one run: medians over the rounds, and the medians of their ratios. Processor
time is that of all threads; a busy machine changes it least, with `--threads 1`, where no thread spins.

usage: structured.py [MODEL] [--schemas 500] [--tokens 1000] [--rounds 7] [--sequences 1,8] [--seed 0] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from time import process_time
from typing import Any

from json_schemas import make_schemas, validate
from report import report

from pellucid import LLM, InvalidRequestError, SamplingParams, StructuredOutputsParams
from pellucid.weights.catalog import DEFAULT_MODEL

PROMPT = "A list of things in JSON:\n"
COST_TOKENS = 128
ENDLESS = {
    "JSON schema": StructuredOutputsParams(
        json={
            "type": "array",
            "minItems": 1000,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "kind": {"enum": ["plant", "animal"]},
                    "count": {"type": "integer"},
                },
                "required": ["name", "kind", "count"],
                "additionalProperties": False,
            },
        }
    ),
    "JSON schema, short strings": StructuredOutputsParams(
        json={
            "type": "array",
            "minItems": 1000,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 30},
                    "kind": {"enum": ["plant", "animal", "mineral"]},
                    "count": {"type": "integer", "minimum": 0, "maximum": 1000},
                    "tags": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
                },
                "required": ["name", "kind", "count", "tags"],
                "additionalProperties": False,
            },
        }
    ),
    "regular expression": StructuredOutputsParams(regex="([A-Z][a-z ,]{20,200}\\.\n){1000}"),
}
"""Grammars that no answer of COST_TOKENS comes to the end of."""


def check_answers(args: argparse.Namespace) -> dict[str, Any]:
    """An answer to each schema, and how many are valid."""
    if find_spec("jsonschema") is None:
        raise InvalidRequestError("this needs the jsonschema package: pip install jsonschema")
    schemas = make_schemas(args.schemas, args.seed)
    params = [
        SamplingParams(max_tokens=args.tokens, seed=number, structured_outputs=StructuredOutputsParams(json=schema))
        for number, schema in enumerate(schemas)
    ]
    valid = cut_off = 0
    failures: list[str] = []
    with LLM(args.model, threads=args.threads, max_model_len=args.tokens + 64) as llm:
        outputs = llm.generate([PROMPT] * len(schemas), params, progress=sys.stderr.isatty())
        counters = llm.metrics().counters
    for schema, output in zip(schemas, outputs, strict=True):
        completion = output.outputs[0]
        if completion.finish_reason == "length":
            cut_off += 1
            continue
        try:
            validate(completion.text, schema)
            valid += 1
        except Exception as error:
            failures.append(f"{completion.text!r} for {json.dumps(schema, ensure_ascii=False)}: {error}")
    return {
        "schemas": len(schemas),
        "valid": valid,
        "cut_off": cut_off,
        "failures": failures,
        "tokens": counters.output_tokens,
    }


def measure_cost(llm: LLM, num_seqs: int, rounds: int, structured: StructuredOutputsParams) -> dict[str, Any]:
    """Decoding `num_seqs` sequences side by side, with and without: time, and processor time of the whole requests."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    processor: dict[bool, list[float]] = {False: [], True: []}
    variants = {
        False: SamplingParams(max_tokens=COST_TOKENS, seed=0, ignore_eos=True),
        True: SamplingParams(max_tokens=COST_TOKENS, seed=0, structured_outputs=structured),
    }
    for number in range(rounds + 1):
        for has_grammar in (False, True) if number % 2 else (True, False):
            begin = process_time()
            outputs = llm.generate([PROMPT] * num_seqs, variants[has_grammar])
            used = process_time() - begin
            assert all(output.outputs[0].finish_reason == "length" for output in outputs)
            times = [time for output in outputs for time in output.metrics.token_times[0]]
            if number:  # the first warms up
                seconds[has_grammar].append((max(times) - min(times)) / (COST_TOKENS - 1))
                processor[has_grammar].append(used / COST_TOKENS)
    return {
        "sequences": num_seqs,
        "plain_s": statistics.median(seconds[False]),
        "structured_s": statistics.median(seconds[True]),
        "cost": _cost(seconds),
        "processor_cost": _cost(processor),
        "rounds": {"plain_s": seconds[False], "structured_s": seconds[True]},
    }


def _cost(rounds: dict[bool, list[float]]) -> float:
    return statistics.median(one / other - 1 for one, other in zip(rounds[True], rounds[False], strict=True))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    answers = check_answers(args) if args.schemas else None
    costs = []
    if args.rounds:
        with LLM(args.model, threads=args.threads, max_model_len=COST_TOKENS + 64) as llm:
            for name, structured in ENDLESS.items():
                for num_seqs in args.sequences:
                    costs.append({"grammar": name, **measure_cost(llm, num_seqs, args.rounds, structured)})
    return {"model": args.model, "answers": answers, "costs": costs}


def print_result(result: dict[str, Any]) -> None:
    if answers := result["answers"]:
        print(
            f"{result['model']}: {answers['valid']} of {answers['schemas']} answers valid, "
            f"{answers['cut_off']} cut off, {len(answers['failures'])} wrong; {answers['tokens']:,} tokens"
        )
        for failure in answers["failures"]:
            print(f"  {failure}")
    for cost in result["costs"]:
        print(
            f"{cost['grammar']}, {cost['sequences']} at once: {1e3 * cost['plain_s']:.2f} ms a token without, "
            f"{1e3 * cost['structured_s']:.2f} ms with: {cost['cost']:+.1%}, and {cost['processor_cost']:+.1%} "
            f"processor time; medians of {len(cost['rounds']['plain_s'])}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--schemas", type=int, default=500, help="schemas to answer; 0 for none")
    parser.add_argument("--tokens", type=int, default=1000, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of measuring the cost; 0 for none")
    parser.add_argument("--sequences", type=lambda text: [int(each) for each in text.split(",")], default=[1, 8])
    parser.add_argument("--seed", type=int, default=0, help="of the schemas")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    return report(parser.parse_args(argv), measure, print_result)


if __name__ == "__main__":
    sys.exit(main())
