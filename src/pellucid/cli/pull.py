"""`pellucid pull`: fetch a model."""

from __future__ import annotations

import argparse

from pellucid.cli.parser import DEFAULT_MODEL

DESCRIPTION = """
Fetch a model into the cache, so that it is there when it is needed, offline too. What arrives is verified against the
catalog's SHA-256 before it takes its name; an interrupted download leaves nothing half done and can be run again.
A model that is already there is not fetched again.
"""

EXAMPLES = f"""
pellucid pull                                    the default model, {DEFAULT_MODEL}
pellucid pull gemma-3-270m
pellucid pull hf:org/repo:file.gguf              a file on the Hugging Face hub
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"a name from `pellucid models`, or hf:org/repo[:file] (default: {DEFAULT_MODEL})",
    )


def run(args: argparse.Namespace) -> int:
    from pellucid.cli.console import ProgressReport, format_bytes
    from pellucid.weights import catalog

    with ProgressReport() as progress:
        path = catalog.resolve(args.model, progress=progress)
    print(f"{path} ({format_bytes(path.stat().st_size)})")
    for entry in catalog.entries():
        if entry.name == args.model.lower():
            print(f"{entry.description}. License: {entry.license}, {entry.license_url}")
    return 0
