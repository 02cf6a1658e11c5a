"""The pictures of docs/decoding.md: well formed, readable in the dark, and one for every transform."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pellucid.decoding import pipeline

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "decoding.md"
FIGURES = sorted((DOCUMENT.parent / "figures").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


def titles(figure: Path) -> list[str]:
    texts = ElementTree.parse(figure).iter(f"{SVG}text")
    return [(text.text or "").strip() for text in texts if text.get("class") == "name"]


def check(transforms: set[str]) -> None:
    drawn = {title for figure in FIGURES for title in titles(figure)}
    missing = transforms - drawn
    assert not missing, f"no picture of {sorted(missing)}: see docs/figures/draw_transforms.py"


def test_every_transform_has_its_picture() -> None:
    masks = {"mask": "banned_token_ids"}
    check({masks.get(name, name) for name in (*pipeline.CONSTRAINTS, *pipeline.WARPERS, *pipeline.MIROSTAT_WARPERS)})


def test_a_transform_without_a_picture_is_caught() -> None:
    with pytest.raises(AssertionError, match="no picture of"):
        check({"top_a"})


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_the_pictures_are_shown_and_have_a_dark_side(figure: Path) -> None:
    assert f"](figures/{figure.name})" in DOCUMENT.read_text(encoding="utf-8")
    (style,) = (element.text or "" for element in ElementTree.parse(figure).iter(f"{SVG}style"))
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    colored = set(re.findall(r"^\s*(\.?[\w, .]+) \{[^}]*fill", light, re.MULTILINE))
    assert len(colored) > 5
    assert colored == set(re.findall(r"^\s*(\.?[\w, .]+) \{[^}]*fill", dark, re.MULTILINE))
