"""`pellucid models`: the catalog."""

from __future__ import annotations

import argparse
from typing import Any

from pellucid.cli.parser import DEFAULT_MODEL

DESCRIPTION = """
List the models that Pellucid knows by name, with their size, their license, and whether they are in the cache. Beside
these names every command takes the path of a .gguf file, or hf:org/repo[:file] for a file on the Hugging Face hub.
"""

EXAMPLES = """
pellucid models
pellucid models --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def describe() -> list[dict[str, Any]]:
    """The catalog as JSON-ready data."""
    from pellucid.weights import catalog

    return [
        {
            "name": entry.name,
            "bytes": entry.size,
            "download_bytes": entry.download_size,
            "license": entry.license,
            "license_url": entry.license_url,
            "cached": catalog.is_cached(entry),
            "path": str(catalog.cached_path(entry)),
            "sha256": entry.sha256,
            "source": entry.source,
            "description": entry.description,
        }
        for entry in catalog.entries()
    ]


def run(args: argparse.Namespace) -> int:
    models = describe()
    if args.json:
        import json

        print(json.dumps(models, ensure_ascii=False, indent=2))
        return 0
    from pellucid.cli.console import format_bytes, print_table

    print_table(
        ("name", "size", "license", "cached", "description"),
        [
            (
                model["name"] + (" (default)" if model["name"] == DEFAULT_MODEL else ""),
                format_bytes(model["bytes"]),
                model["license"],
                "yes" if model["cached"] else "no",
                model["description"],
            )
            for model in models
        ],
        right=("size",),
    )
    return 0
