"""`pellucid tokenize`: how text becomes tokens, and back."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pellucid.cli.parser import add_model_option
from pellucid.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from pellucid.tokenizer import Tokenizer

DESCRIPTION = """
Show the tokens that a model reads for a text: their ids, the pieces of the vocabulary, and the bytes each stands for.
Or turn ids back into text with --decode. Text that looks like a special token (<|im_start|>) stays text unless
--special asks for it to be read as one.
"""

EXAMPLES = """
pellucid tokenize "What is the capital of France?"
pellucid tokenize --ids-only < letter.txt
pellucid tokenize --decode 504 3575 282 4649
pellucid tokenize --model gemma-3-270m "¿Qué tal?" --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the text; from standard input if it is - or piped in")
    add_model_option(parser)
    parser.add_argument("--decode", nargs="+", type=int, metavar="ID", help="turn these token ids into text instead")
    parser.add_argument(
        "--no-bos", dest="bos", action="store_false", help="leave out the tokens that the model puts around every text"
    )
    parser.add_argument("--special", action="store_true", help="read special tokens written in the text as themselves")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--ids-only", action="store_true", help="print the ids on one line, nothing else")
    output.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from pellucid.cli import session

    if args.decode is not None and args.text is not None:
        raise InvalidRequestError("give a text or --decode, not both", param="text")
    text = None if args.decode is not None else session.read_text(args.text, "text")
    tokenizer = load_tokenizer(args.model)
    if text is None:
        ids = args.decode
    else:
        ids = tokenizer.encode(text, add_special_tokens=args.bos, parse_special=args.special)
    if args.ids_only:
        print(*ids)
    elif args.json:
        import json

        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        print(json.dumps({"text": decoded, "tokens": [describe(tokenizer, i) for i in ids]}, ensure_ascii=False))
    elif text is None:
        from pellucid.cli.console import write_text

        write_text(tokenizer.decode(ids, skip_special_tokens=False) + "\n")
    else:
        print_tokens(tokenizer, ids)
    return 0


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model; its weights are not read.

    Raises:
        PellucidError: as catalog.resolve, GGUFFile.open and Tokenizer.from_gguf.
    """
    from pellucid.cli.console import ProgressReport
    from pellucid.tokenizer import Tokenizer
    from pellucid.weights import catalog
    from pellucid.weights.gguf import GGUFFile

    with ProgressReport() as progress:
        path = catalog.resolve(model, progress=progress)
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file.metadata)


def describe(tokenizer: Tokenizer, token_id: int) -> dict[str, Any]:
    """One token as JSON-ready data; `bytes` in hexadecimal, since a character may be spread over several tokens."""
    return {
        "id": token_id,
        "piece": tokenizer.id_to_token(token_id),
        "bytes": tokenizer.token_bytes(token_id).hex(),
        "special": tokenizer.is_special(token_id),
    }


def print_tokens(tokenizer: Tokenizer, ids: list[int]) -> None:
    from pellucid.cli.console import print_table

    print_table(
        ("position", "id", "piece", "text", "bytes", ""),
        [
            (
                position,
                token_id,
                tokenizer.id_to_token(token_id),
                repr(tokenizer.token_bytes(token_id).decode(errors="replace")),
                tokenizer.token_bytes(token_id).hex(" "),
                "special" if tokenizer.is_special(token_id) else "",
            )
            for position, token_id in enumerate(ids)
        ],
        right=("position", "id"),
    )
    print(f"{len(ids)} tokens")
