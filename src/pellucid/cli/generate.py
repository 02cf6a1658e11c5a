"""`pellucid generate`: answer or continue one prompt."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pellucid.cli.parser import add_engine_options, add_model_option, add_speculation_options
from pellucid.cli.sampling_options import add_sampling_options
from pellucid.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from pellucid import LLM, SamplingParams
    from pellucid.cli.session import Messages
    from pellucid.core.outputs import CompletionOutput, Logprob, RequestOutput, TokenOutput

DESCRIPTION = """
Run a prompt through a model and stream the text to standard output. A model that was trained to converse (its file has
a chat template) gets the prompt as a user's message; any other continues it as it stands, which --raw asks for too.
A timing line follows on standard error: where the time went, and how near decoding came to the read bandwidth of this
machine, measured right after.

The same prompt and options give the same answer every time, to the bit: temperature is 0 unless you set it, and
a run with a temperature prints its seed. The model is fetched on first use.
"""

EXAMPLES = """
pellucid generate "What is the capital of France?"
pellucid generate --raw "Once upon a time" --max-tokens 100 --temperature 0.8 --top-p 0.95
cat letter.txt | pellucid generate --system "Summarize what you are given."
pellucid generate "Name three rivers." --json | jq -r .text
pellucid generate "The sky is" --raw --max-tokens 5 --logprobs 3
pellucid generate "Name a colour." --temperature 1.2 --n 3 --bad-words blue
pellucid generate "Is a whale a fish?" --choice yes --choice no
pellucid generate "Describe Paris." --json-schema city.json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] [PROMPT]"
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the text; from standard input if it is - or piped in"
    )
    add_model_option(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without a chat template")
    kind.add_argument("--chat", action="store_true", help="use the chat template, or fail where the model has none")
    parser.add_argument("--system", metavar="TEXT", help="the system message that comes before the prompt")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object when done, instead of streaming")
    output.add_argument("--no-timing", dest="timing", action="store_false", help="leave the timing line out")
    add_sampling_options(parser)
    add_engine_options(parser)
    add_speculation_options(parser)


def run(args: argparse.Namespace) -> int:
    from pellucid.cli import session

    if args.raw and args.system is not None:
        raise InvalidRequestError("--raw has no chat template to put --system in: leave one out", param="system")
    params = session.sampling_params(args)
    speculative = session.speculative_config(args)
    prompt = session.read_text(args.prompt, "prompt")
    with session.load_llm(args, speculative=speculative) as llm:
        if params.num_sequences > 1:
            answer = print_answers(llm, prompt_for(llm, prompt, args), params, args)
        else:
            answer = print_stream(llm, prompt_for(llm, prompt, args), params, args)
        if args.json:
            print_json(llm, answer, params, args)
            return 0
        session.report_cut(llm, answer, args)
        if args.timing:
            from pellucid.cli import timing

            seed = "" if params.greedy else f", seed {params.seed}"
            print(timing.measure(llm, answer.metrics).line() + seed, file=sys.stderr)
    return 0


def prompt_for(llm: LLM, prompt: str, args: argparse.Namespace) -> str | Messages:
    """The prompt as text to continue, or as the messages of a conversation."""
    wants_template = args.chat or args.system is not None  # of a model without one, that is an error
    if args.raw or not (llm.tokenizer.has_chat_template or wants_template):
        return prompt
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [*opening, {"role": "user", "content": prompt}]


def print_stream(llm: LLM, prompt: str | Messages, params: SamplingParams, args: argparse.Namespace) -> RequestOutput:
    """One answer, as it comes."""
    from pellucid.cli import session

    print_token = token_printer(args)
    with llm.stream(prompt, params) as stream:
        for output in stream:
            print_token(output)
    answer = session.answer_of(stream)
    if not args.json and args.logprobs is None and not answer.outputs[0].text.endswith("\n"):
        print(flush=True)
    return answer


def print_answers(llm: LLM, prompt: str | Messages, params: SamplingParams, args: argparse.Namespace) -> RequestOutput:
    """Several answers, once all have ended, each under its number."""
    from pellucid.cli.console import write_text

    (answer,) = llm.generate(prompt, params) if isinstance(prompt, str) else llm.chat(prompt, params)
    for completion in answer.outputs if not args.json else ():
        if params.n > 1:
            print(f"[{completion.index + 1}]")
        if completion.logprobs is not None:
            for token_id, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
                print_logprobs(token_id, logprobs, llm.tokenizer.decode([token_id], skip_special_tokens=False))
        else:
            write_text(completion.text)
            if not completion.text.endswith("\n"):
                print(flush=True)
    return answer


def token_printer(args: argparse.Namespace) -> Callable[[TokenOutput], None]:
    """What to do with each token as it comes."""
    from pellucid.cli.console import write_text

    if args.json:
        return lambda output: None
    if args.logprobs is not None:

        def print_line(output: TokenOutput) -> None:
            if output.token_id is not None and output.logprobs is not None:
                print_logprobs(output.token_id, output.logprobs, output.text)

        return print_line
    return lambda output: write_text(output.text)


def print_logprobs(token_id: int, logprobs: dict[int, Logprob], text: str) -> None:
    """One line: the token, its log-probability and probability, then the alternatives; `text` alone where nothing is
    known, of the first token of an echoed prompt."""
    from pellucid.cli.console import one_line

    if not logprobs:
        print(one_line(repr(text)))
        return
    chosen = logprobs[token_id]
    alternatives = (
        f"{one_line(repr(item.decoded_token))} {math.exp(item.logprob):.1%}"
        for item in sorted(logprobs.values(), key=lambda item: -item.logprob)
        if item.rank is not None
    )
    shown = one_line(repr(chosen.decoded_token))
    print(f"{shown:<20} {chosen.logprob:8.3f} {math.exp(chosen.logprob):7.1%}   {'  '.join(alternatives)}".rstrip())
    sys.stdout.flush()


def print_json(llm: LLM, answer: RequestOutput, params: SamplingParams, args: argparse.Namespace) -> None:
    import json

    from pellucid.cli import timing

    result: dict[str, Any] = {
        "model": args.model,
        **json_completion(answer.outputs[0]),
        "prompt_token_ids": answer.prompt_token_ids,
        "seed": params.seed,
    }
    if params.n > 1:
        result["outputs"] = [json_completion(completion) for completion in answer.outputs]
    if answer.prompt_logprobs is not None:
        result["prompt_logprobs"] = [entry and json_logprobs(entry) for entry in answer.prompt_logprobs]
    if args.timing:
        result["timing"] = timing.measure(llm, answer.metrics).as_dict()
    print(json.dumps(result, ensure_ascii=False))


def json_completion(completion: CompletionOutput) -> dict[str, Any]:
    result: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        result["logprobs"] = [json_logprobs(step) for step in completion.logprobs]
    if completion.cumulative_logprob is not None:
        result["cumulative_logprob"] = completion.cumulative_logprob
    return result


def json_logprobs(step: dict[int, Logprob]) -> list[dict[str, Any]]:
    return [
        {"token_id": token_id, "token": item.decoded_token, "logprob": item.logprob, "rank": item.rank}
        for token_id, item in step.items()
    ]
