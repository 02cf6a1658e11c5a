"""`pellucid inspect`: what is in a model file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pellucid.cli.parser import DEFAULT_MODEL

if TYPE_CHECKING:
    from pellucid.weights.gguf import GGUFFile

DESCRIPTION = """
Show what a model file holds: its architecture and sizes, its tokenizer, how its weights are encoded, and, on request,
every tensor and every metadata field. Reads the header only, so it takes no time on a large file.
"""

EXAMPLES = f"""
pellucid inspect                             the default model, {DEFAULT_MODEL}
pellucid inspect model.gguf --tensors        every tensor: shape, encoding, bytes
pellucid inspect gemma-3-270m --metadata     every field of the header
pellucid inspect model.gguf --json | jq .tensors
"""

SHOWN_ITEMS = 4
SHOWN_CHARACTERS = 160

Fact = tuple[str, object]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"a .gguf file, a name from `pellucid models`, or hf:org/repo[:file] (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--metadata", action="store_true", help="list every metadata field (long values shortened)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    from pellucid.cli.console import ProgressReport
    from pellucid.weights import catalog
    from pellucid.weights.gguf import GGUFFile

    with ProgressReport() as progress:
        path = catalog.resolve(args.model, progress=progress)
    with GGUFFile.open(path) as file:
        if args.json:
            import json

            print(json.dumps(describe(file), ensure_ascii=False, indent=2))
        else:
            print_summary(file)
            if args.tensors:
                print_tensors(file)
            if args.metadata:
                print_metadata(file)
    return 0


def summarize(file: GGUFFile) -> list[Fact]:
    """The facts of a file by name, in the order to show them; what a file does not say is left out."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")

    def of_architecture(key: str) -> object:
        return metadata.get(f"{architecture}.{key}")

    heads, key_value_heads = of_architecture("attention.head_count"), of_architecture("attention.head_count_kv")
    facts: list[Fact] = [
        ("path", str(file.path)),
        ("file_bytes", file.path.stat().st_size),
        ("gguf_version", file.version),
        ("name", metadata.get("general.name")),
        ("license", metadata.get("general.license")),
        ("architecture", architecture),
        ("supported", support(file)),
        ("parameters", sum(math.prod(tensor.shape) for tensor in file.tensors.values())),
        ("context_length", of_architecture("context_length")),
        ("layers", of_architecture("block_count")),
        ("hidden_size", of_architecture("embedding_length")),
        ("intermediate_size", of_architecture("feed_forward_length")),
        ("attention_heads", heads),
        ("key_value_heads", key_value_heads),
        ("head_dim", of_architecture("attention.key_length") or head_dim(of_architecture("embedding_length"), heads)),
        ("rope_theta", of_architecture("rope.freq_base")),
        ("sliding_window", of_architecture("attention.sliding_window")),
        ("vocab_size", vocab_size(metadata.get("tokenizer.ggml.tokens"))),
        ("tokenizer", metadata.get("tokenizer.ggml.model")),
        ("pre_tokenizer", metadata.get("tokenizer.ggml.pre")),
        ("chat_template", "tokenizer.chat_template" in metadata),
    ]
    return [(name, value) for name, value in facts if value is not None]


def head_dim(hidden_size: object, heads: object) -> int | None:
    """GGUF leaves the head size out where it is hidden_size / heads."""
    if isinstance(hidden_size, int) and isinstance(heads, int) and heads > 0 and hidden_size % heads == 0:
        return hidden_size // heads
    return None


def vocab_size(tokens: object) -> int | None:
    return len(tokens) if isinstance(tokens, list) else None


def support(file: GGUFFile) -> str:
    """`yes`, or why Pellucid cannot run this file."""
    from pellucid.core.errors import PellucidError
    from pellucid.weights.loader import open_model

    try:
        open_model(file.path).close()
    except PellucidError as error:
        return f"no: {error.message}"
    return "yes"


def format_totals(file: GGUFFile) -> list[tuple[str, int, int, int]]:
    """(encoding, tensors, parameters, bytes), most bytes first."""
    totals: dict[str, tuple[int, int, int]] = {}
    for tensor in file.tensors.values():
        count, parameters, size = totals.get(tensor.format.name, (0, 0, 0))
        totals[tensor.format.name] = (count + 1, parameters + math.prod(tensor.shape), size + tensor.data.nbytes)
    return sorted(((name, *total) for name, total in totals.items()), key=lambda row: -row[3])


def describe(file: GGUFFile) -> dict[str, Any]:
    """All of it as JSON-ready data. Arrays of more than a few items are given by length and first items."""
    return {
        "summary": dict(summarize(file)),
        "formats": [
            {"format": name, "tensors": count, "parameters": parameters, "bytes": size}
            for name, count, parameters, size in format_totals(file)
        ],
        "tensors": [
            {"name": name, "format": tensor.format.name, "shape": list(tensor.shape), "bytes": tensor.data.nbytes}
            for name, tensor in file.tensors.items()
        ],
        "metadata": {key: json_value(value) for key, value in file.metadata.items()},
    }


def json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN and no infinity
    if isinstance(value, (str, int, float)):
        return value
    if len(value) <= SHOWN_ITEMS:
        return [json_value(item) for item in plain(value)]
    return {"length": len(value), "first": [json_value(item) for item in plain(value[:SHOWN_ITEMS])]}


def plain(values: Any) -> Iterable[Any]:
    """A list from a list or a numpy array."""
    return values if isinstance(values, list) else values.tolist()


def print_summary(file: GGUFFile) -> None:
    from pellucid.cli.console import format_bytes, format_count, one_line, print_table

    facts = dict(summarize(file))
    facts["file_bytes"] = f"{facts['file_bytes']:,} ({format_bytes(file.path.stat().st_size)})"
    parameters = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    facts["parameters"] = f"{parameters:,} ({format_count(parameters)})"
    facts["chat_template"] = "yes" if facts["chat_template"] else "no"
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):<{width}}{one_line(str(value))}")
    totals = format_totals(file)
    if not totals:
        return
    print()
    all_bytes = sum(row[3] for row in totals)
    print_table(
        ("encoding", "tensors", "parameters", "bytes", "share", "bits/weight"),
        [
            (name, count, f"{weights:,}", format_bytes(size), f"{size / all_bytes:.1%}", f"{8 * size / weights:.3g}")
            for name, count, weights, size in totals
        ],
        right=("tensors", "parameters", "bytes", "share", "bits/weight"),
    )


def print_tensors(file: GGUFFile) -> None:
    from pellucid.cli.console import print_table

    print()
    print_table(
        ("tensor", "encoding", "shape", "bytes"),
        [
            (name, tensor.format.name, " x ".join(map(str, tensor.shape)), f"{tensor.data.nbytes:,}")
            for name, tensor in file.tensors.items()
        ],
        right=("shape", "bytes"),
    )


def print_metadata(file: GGUFFile) -> None:
    from pellucid.cli.console import print_table

    print()
    print_table(("field", "value"), [(key, shortened(value)) for key, value in file.metadata.items()])


def shortened(value: Any) -> str:
    """A value on one line; what is left out is counted."""
    if isinstance(value, str):
        rest = len(value) - SHOWN_CHARACTERS
        return f"{value[:SHOWN_CHARACTERS]} ... ({rest:,} more characters)" if rest > 0 else value
    if isinstance(value, (bool, int, float)):
        return str(value)
    items = ", ".join(repr(item) for item in plain(value[:SHOWN_ITEMS]))
    rest = len(value) - SHOWN_ITEMS
    return f"[{items}, ... ({rest:,} more)]" if rest > 0 else f"[{items}]"
