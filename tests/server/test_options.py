from __future__ import annotations

import re
from pathlib import Path

import pytest

from pellucid.cli.serve import default_of
from pellucid.server.options import GROUPS, OPTIONS, Option

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "server.md"


def row(option: Option) -> str:
    """What the document says of an option."""
    name = option.metavar if option.name == "model" else option.flag
    note = re.search(r" ?\(.*?(?:default: (.*))?\)$", option.help)
    value = default_of(option)
    default = f"`{value}`" if value is not None else (note and note[1]) or ""
    return f"| `{name}` | {default} | {option.help[: note.start()] if note else option.help} |"


def table() -> str:
    """The table of options of the document."""
    lines = ["| option | default | what it does |", "|---|---|---|"]
    for heading, options in GROUPS.items():
        lines += [f"| **{heading}** | | |", *map(row, options)]
    return "\n".join(lines)


def test_the_document_has_every_option_as_it_is() -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8"), f"the table is now:\n{table()}"


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_flags_and_variables_follow_from_the_name(option: Option) -> None:
    assert re.fullmatch(r"--[a-z]+(-[a-z]+)*", option.flag)
    assert re.fullmatch(r"PELLUCID_SERVE_[A-Z]+(_[A-Z]+)*", option.variable)
    assert option.help[0].islower() or option.help.startswith("a ")
    assert not option.help.endswith(".")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_body_bytes", "64KiB", 65536),
        ("max_body_bytes", "2 mib", 2 * 2**20),
        ("max_body_bytes", "3GB", 3 * 10**9),
        ("max_body_bytes", "1.5MiB", "1.5MiB"),
        ("max_body_bytes", "-1", "-1"),
        ("port", "80", 80),
        ("port", "8O", "8O"),
        ("drain_seconds", "1e1", 10.0),
        ("enable_prefix_caching", "No", False),
        ("enable_prefix_caching", "none", "none"),
        ("draft_layers", "0-2,5", [0, 1, 2, 5]),
        ("draft_layers", "2-", [2]),
        ("draft_layers", "0-99999999999", "0-99999999999"),
        ("draft_layers", "x", "x"),
        ("seed", "none", None),
        ("model", "none", "none"),
    ],
)
def test_texts(name: str, text: str, value: object) -> None:
    assert OPTIONS[name].from_text(text) == value
