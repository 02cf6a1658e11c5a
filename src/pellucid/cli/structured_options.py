"""The options that say what an answer must look like (docs/structured-output.md)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pellucid.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from pellucid import StructuredOutputsParams


def add_structured_output_options(parser: argparse.ArgumentParser) -> None:
    """Options that fill a StructuredOutputsParams; at most one of them can be given."""
    group = parser.add_argument_group(
        "structured output", "what the answer must look like; at most one of them (docs/structured-output.md)"
    ).add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="FILE", help="JSON that holds to the schema in FILE")
    group.add_argument("--json-object", action="store_true", help="any JSON object")
    group.add_argument("--regex", metavar="REGEX", help="text that matches this regular expression as a whole")
    group.add_argument("--choice", action="append", metavar="TEXT", help="this text (repeat, and the model chooses)")
    group.add_argument("--grammar", metavar="FILE", help="text that follows the grammar in FILE, in Lark or GBNF")


def structured_outputs(args: argparse.Namespace) -> StructuredOutputsParams | None:
    """What the options ask the answer to look like; None for anything.

    Raises:
        InvalidRequestError: a file cannot be read, or what was given cannot be used.
    """
    given: dict[str, Any] = {
        "json": None if args.json_schema is None else _read(args.json_schema, "--json-schema"),
        "json_object": args.json_object or None,
        "regex": args.regex,
        "choice": args.choice,
        "grammar": None if args.grammar is None else _read(args.grammar, "--grammar"),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    from pellucid import StructuredOutputsParams

    return StructuredOutputsParams(**given)


def _read(name: str, option: str) -> str:
    """The text of a file that an option names."""
    try:
        with open(name, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError as error:
        reason = f"not valid UTF-8: {error.reason} at byte {error.start}"
    raise InvalidRequestError(f"{option}: {name} cannot be read: {reason}", param=option)
