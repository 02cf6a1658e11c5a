"""`pellucid run-batch`: answer a file of requests."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pellucid.cli.parser import add_engine_options, add_model_option, add_speculation_options
from pellucid.core.validation import shown

if TYPE_CHECKING:
    from pellucid.engine.progress import GenerateProgress
    from pellucid.server.batch.batch_input import BatchInput
    from pellucid.server.batch.batch_output import BatchOutput, Identity, Tally

DESCRIPTION = """
Answer every request of a file in the format of the OpenAI Batch API: one JSON object a line, with custom_id, method,
url (/v1/chat/completions or /v1/completions) and body. OUT gets one line for each, in the same order. A request that
cannot be served is answered with an error that names the parameter; the others go on. A file that is not of this format
is refused before anything is computed.

Killed or interrupted at any moment, the same command goes on where it was: nothing is lost and nothing is answered
twice. Until all is done the answers are in OUT.partial; then OUT appears, whole.

The same file and options give the same answers, to the bit, interrupted or not. A request without a seed draws from
--seed and its custom_id.
"""

EXAMPLES = """
pellucid run-batch requests.jsonl answers.jsonl
pellucid run-batch requests.jsonl answers.jsonl --model model.gguf --served-model-name gpt-4o-mini
zcat requests.jsonl.gz | pellucid run-batch - answers.jsonl
pellucid run-batch requests.jsonl - | jq -r .response.body.choices[0].message.content
"""

STANDARD = "-"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="the requests; - reads all of standard input first")
    parser.add_argument(
        "output",
        metavar="OUT",
        help="the answers; - writes each to standard output as it comes, which cannot be resumed",
    )
    add_model_option(parser)
    parser.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="what requests may call the model, and anything else is refused (repeat for several; default: what "
        "--model says)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="from which requests without a seed draw theirs (default: 0)"
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress bar")
    add_engine_options(parser)
    add_speculation_options(parser)


def run(args: argparse.Namespace) -> int:
    from pellucid.cli.console import ProgressReport
    from pellucid.core.validation import UINT64_MAX, check_integer
    from pellucid.server.batch.batch_input import BatchInput
    from pellucid.server.batch.batch_output import FileOutput, Identity, StreamOutput
    from pellucid.weights import catalog

    check_integer("seed", args.seed, 0, UINT64_MAX)
    with open_input(args.input) as file:
        batch_input = BatchInput(file, "standard input" if args.input == STANDARD else args.input)
        with ProgressReport() as progress:
            model_path = catalog.resolve(args.model, progress=progress)
        identity = Identity(settings(args, batch_input, model_path))
        if args.output == STANDARD:
            return answer(args, batch_input, StreamOutput(sys.stdout.buffer), identity)
        with FileOutput(Path(args.output), identity, batch_input.num_requests) as output:
            if output.tally.num_done == batch_input.num_requests:
                output.finish()
                print(
                    f"{args.output} is complete: all {output.tally.num_done:,} requests were answered", file=sys.stderr
                )
                return 0
            return answer(args, batch_input, output, identity)


@contextmanager
def open_input(name: str) -> Iterator[BinaryIO]:
    """The requests, seekable: what comes through a pipe is copied to a temporary file."""
    import tempfile

    file = sys.stdin.buffer if name == STANDARD else open(name, "rb")  # noqa: SIM115
    with file:
        if name != STANDARD and file.seekable():
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy)
            yield copy


def settings(args: argparse.Namespace, batch_input: BatchInput, model_path: Path) -> dict[str, Any]:
    """All that has a say in the answers. A run is resumed only with the same."""
    from pellucid import __version__
    from pellucid.weights.file_hash import file_hash

    return {
        "pellucid": __version__,
        "input_sha256": batch_input.sha256,
        "model_sha256": file_hash(model_path, model_path.stat()),
        "served_model_names": served_model_names(args),
        "seed": args.seed,
        "max_model_len": args.max_model_len,
        "backend": args.backend,
        "kv_cache_dtype": args.kv_cache_dtype,
    }


def served_model_names(args: argparse.Namespace) -> list[str]:
    return args.served_model_name or [args.model]


def answer(args: argparse.Namespace, batch_input: BatchInput, output: BatchOutput, identity: Identity) -> int:
    """Load the model, answer what is not answered yet, and say how it went."""
    from pellucid.cli import session
    from pellucid.engine.progress import GenerateProgress
    from pellucid.server.batch.batch import Batch
    from pellucid.server.batch.batch_output import FileOutput

    file_output = output if isinstance(output, FileOutput) else None
    if file_output is not None and file_output.resolved is not None:  # what was left to choose was chosen then
        args.max_model_len, args.backend = file_output.resolved["max_model_len"], file_output.resolved["backend"]
    done_before, total = output.tally.num_done, batch_input.num_requests
    with session.load_llm(args, speculative=session.speculative_config(args)) as llm:
        if file_output is not None:
            file_output.begin({"max_model_len": llm.max_model_len, "backend": llm.backend_name})
        batch = Batch(
            llm,
            batch_input,
            output,
            identity,
            served_model_names=served_model_names(args),
            seed=args.seed,
        )
        progress = GenerateProgress(total, args.progress, noun="requests", done=done_before)
        try:
            batch.run(progress)
            if file_output is not None:
                file_output.finish()
        except KeyboardInterrupt:
            how = "" if file_output is None else "; the same command goes on from there"
            print(f"interrupted: {output.tally.num_done:,} of {total:,} requests are answered{how}", file=sys.stderr)
            raise
    print(summary(output.tally, progress, done_before), file=sys.stderr)
    return 0


def summary(tally: Tally, progress: GenerateProgress, done_before: int) -> str:
    before = f" ({done_before:,} of them before)" if done_before else ""
    cached = progress.cached_tokens / progress.prompt_tokens if progress.prompt_tokens else 0.0
    seconds = progress.elapsed
    text = (
        f"{tally.num_done:,} requests{before}, {tally.num_failed:,} failed; {progress.prompt_tokens:,} prompt tokens "
        f"({cached:.0%} cached) and {progress.output_tokens:,} output tokens in {seconds:.1f} s: "
        f"{progress.prompt_tokens / seconds:,.0f} tok/s in, {progress.output_tokens / seconds:,.0f} tok/s out"
    )
    if tally.first_failure is not None:
        _, custom_id, message = tally.first_failure
        text += f"\nthe first failure, {shown(custom_id)}: {message}"
    return text
