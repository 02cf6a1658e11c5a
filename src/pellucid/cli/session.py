"""What the commands that run a model share: the prompt, the LLM, the sampling parameters, a streamed answer."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pellucid.cli.sampling_options import DEFAULT_MAX_TOKENS, given_params
from pellucid.cli.structured_options import structured_outputs
from pellucid.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from pellucid import LLM, SamplingParams, SpeculativeConfig
    from pellucid.core.outputs import RequestOutput
    from pellucid.engine.token_stream import TokenStream

Messages = list[dict[str, str]]


def read_text(argument: str | None, what: str) -> str:
    """The text of a positional argument; from standard input where it is `-` or left out and something is piped in.

    One line end at the end of piped text is dropped, as the shell's $(...) does.

    Raises:
        InvalidRequestError: there is no text, or it is not UTF-8.
    """
    if argument is not None and argument != "-":
        if any(0xD800 <= ord(character) < 0xE000 for character in argument):
            raise InvalidRequestError(f"the {what} is not valid UTF-8", param=what)
        return argument
    if argument is None and sys.stdin.isatty():
        raise InvalidRequestError(
            f"no {what}: give one in quotes, or pipe it in (`-` reads standard input)", param=what
        )
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the {what} on standard input is not valid UTF-8: {error.reason} at byte {error.start}", param=what
        ) from None
    return text[:-1].removesuffix("\r") if text.endswith("\n") else text


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """SamplingParams of the sampling options; a draw without a seed gets one here, so that it can be reported.

    Raises:
        InvalidRequestError: an option is out of range.
    """
    from pellucid import SamplingParams

    given = given_params(args)
    if "seed" not in given and args.temperature != 0:
        given["seed"] = int.from_bytes(os.urandom(4), "little")
    return SamplingParams(**{"max_tokens": DEFAULT_MAX_TOKENS, "structured_outputs": structured_outputs(args), **given})


def speculative_config(args: argparse.Namespace) -> SpeculativeConfig | None:
    """What the speculation options ask for; None where nothing is to be guessed.

    Raises:
        InvalidRequestError: an option is out of range, or says how to guess where nothing is to be guessed.
    """
    from pellucid.core.config import speculation

    return speculation(
        args.speculative, num_draft_tokens=args.num_draft_tokens, draft_model=args.draft_model, layers=args.layers
    )


@contextmanager
def load_llm(
    args: argparse.Namespace, *, enable_prefix_caching: bool = True, speculative: SpeculativeConfig | None = None
) -> Iterator[LLM]:
    """The LLM that the model and engine options ask for; fetched first where it must be. Closed on leaving."""
    from pellucid.cli.console import ProgressReport

    with ProgressReport() as progress, garbage_collection_paused():
        from pellucid import LLM

        llm = LLM(
            args.model,
            threads=args.threads,
            max_model_len=args.max_model_len,
            backend=args.backend,
            kv_cache_dtype=args.kv_cache_dtype,
            progress=progress,
            enable_prefix_caching=enable_prefix_caching,
            speculative=speculative,
        )
    try:
        yield llm
    finally:
        llm.close()


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """For imports and the building of a vocabulary: a collection finds nothing there and takes 3% of a cold start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def answer_of(stream: TokenStream) -> RequestOutput:
    """The whole answer of a stream that was read to its end."""
    if stream.request_output is None:
        raise RuntimeError("a stream ended without a terminal reply")
    return stream.request_output


def report_cut(llm: LLM, answer: RequestOutput, args: argparse.Namespace) -> None:
    """Say on standard error that the answer is not whole, unless it is as long as was asked for."""
    completion = answer.outputs[0]
    if completion.finish_reason != "length":
        return
    num_tokens = len(completion.token_ids)
    if not getattr(args, "echo", None):  # else the prompt is among them
        num_tokens += len(answer.prompt_token_ids)
    if num_tokens >= llm.max_model_len:
        print(f"(cut off: the context of {llm.max_model_len} tokens is full)", file=sys.stderr)
    elif args.max_tokens is None:
        print(f"(cut off after {DEFAULT_MAX_TOKENS} tokens; --max-tokens sets the limit)", file=sys.stderr)
