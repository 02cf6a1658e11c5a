"""The argument parser of every subcommand, and the option groups that several of them share."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from pellucid.core.errors import InvalidRequestError

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_BACKEND = "auto"
DEFAULT_KV_CACHE_DTYPE = "f16"
DEFAULT_TIMEOUT = 600.0
MAX_WIDTH = 120


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, which fills paragraphs to the width of the terminal one by one, and leaves those with indented lines
    as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            paragraph if "\n " in paragraph else textwrap.fill(paragraph, min(width, MAX_WIDTH), break_on_hyphens=False)
            for paragraph in text.split("\n\n")
        )


class CommandParser(argparse.ArgumentParser):
    """argparse with typed errors, no abbreviated options, and a suggestion where a name is nearly right."""

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"pellucid {command}",
            description=textwrap.dedent(description).strip(),
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse all of `arguments`.

        Raises:
            InvalidRequestError: an argument is unknown, missing or malformed.
        """
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(self._describe_unknown(unknown))
        return namespace

    def error(self, message: str) -> NoReturn:
        raise InvalidRequestError(f"{message}\n`{self.prog} --help` lists what it takes.", param="command")

    def _describe_unknown(self, unknown: list[str]) -> str:
        import difflib

        unknown = [argument for argument in unknown if argument != "--"]
        option = next((argument.split("=")[0] for argument in unknown if argument.startswith("-")), None)
        if option is None:
            return f"unexpected argument `{unknown[0]}` (a text with spaces needs quotes)"
        if option in self._option_string_actions:
            return f"`{option}` comes after `--`, where options are not read: put it before"
        close = difflib.get_close_matches(option, self._option_string_actions, n=1)
        return f"unknown option `{option}`" + (f": did you mean `{close[0]}`?" if close else "")


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"a name from `pellucid models`, a .gguf file, or hf:org/repo[:file] (default: {DEFAULT_MODEL})",
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that loads a model."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--threads", type=int, metavar="N", help="threads to compute with (default: one for each usable processor)"
    )
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest context in tokens (default: the model's)"
    )
    group.add_argument(
        "--backend",
        default=DEFAULT_BACKEND,
        metavar="NAME",
        help="cpu (the native core), reference (clear numpy, slow), or auto: cpu where it is built (default: auto)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        default=DEFAULT_KV_CACHE_DTYPE,
        metavar="DTYPE",
        help="how the KV cache is stored: f16, bf16, f32 or q8, half as large as f16 (default: f16)",
    )


def header(text: str) -> tuple[str, str]:
    """`NAME: VALUE`."""
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError("must be a name and a value, as 'X-Team: research'")
    return name.strip(), value.strip()


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that talks to a server of the OpenAI API."""
    group = parser.add_argument_group("server")
    group.add_argument("--api-key", metavar="KEY", help="sent as bearer token (default: the variable OPENAI_API_KEY)")
    group.add_argument(
        "--header", action="append", default=[], type=header, metavar="NAME:VALUE", help="sent with every request"
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT,
        metavar="S",
        help="longest silence of the server (default: 600)",
    )


def add_speculation_options(parser: argparse.ArgumentParser) -> None:
    """Options that fill a SpeculativeConfig."""
    group = parser.add_argument_group("speculation")
    group.add_argument(
        "--speculative",
        metavar="METHOD",
        help="guess tokens ahead, which changes no answer: ngram (what followed the same words earlier), lookahead, "
        "layer_skip or draft_model",
    )
    group.add_argument(
        "--num-draft-tokens", type=int, metavar="N", help="most tokens guessed in a step; fewer are where fewer pay"
    )
    group.add_argument("--draft-model", metavar="MODEL", help="with draft_model, the smaller model that guesses")
    group.add_argument(
        "--draft-layers",
        dest="layers",
        type=layer_numbers,
        metavar="LAYERS",
        help="with layer_skip, the layers that guess, as 0-10,19-29 (default: all but the middle quarter)",
    )


def layer_numbers(text: str) -> list[int]:
    """`0-10,19-29`: numbers and ranges, which include their ends."""
    from pellucid.core import config

    return config.layer_numbers(text)
