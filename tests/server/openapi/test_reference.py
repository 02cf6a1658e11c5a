from __future__ import annotations

import base64
import copy
import hashlib
import re
from html.parser import HTMLParser

from pellucid.server.openapi.document import all_operations, document
from pellucid.server.openapi.reference import POLICY, reference


class Elements(HTMLParser):
    """What a page is made of: tags that are closed in order, attributes, and text."""

    VOID = frozenset(("meta", "link", "br", "img", "input", "hr"))

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page() -> str:
    return reference(document(all_operations(), needs_key=True))


def test_it_has_every_route_and_every_field() -> None:
    text = page()
    for method, path in all_operations():
        assert f'<span class="method">{method.upper()}</span> <code>{path}</code>' in text
    for field in ("messages", "dry_sequence_breakers", "response_format", "stream_options.include_usage"):
        assert f"<code>{field}</code>" in text


def test_nothing_comes_from_elsewhere_and_nothing_runs() -> None:
    elements = Elements(page()).found
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "embed", "form"}
    for tag, attributes in elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")], tag
        assert not (attributes.get("href") or "").startswith(("http:", "https:", "//", "javascript:"))


def test_the_policy_allows_its_own_style_alone() -> None:
    (style,) = re.findall(r"<style>(.*?)</style>", page(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}';" in POLICY
    assert "unsafe" not in POLICY
    assert POLICY.startswith("default-src 'none';")


def test_links_lead_to_what_is_on_the_page() -> None:
    elements = Elements(page()).found
    anchors = [attributes["id"] for _, attributes in elements if attributes.get("id")]
    assert len(set(anchors)) == len(anchors)
    for _, attributes in elements:
        if (target := attributes.get("href") or "").startswith("#"):
            assert target[1:] in anchors, target


def test_what_a_description_says_is_no_markup() -> None:
    changed = copy.deepcopy(document(all_operations(), needs_key=False))
    changed["paths"]["/health"]["get"]["summary"] = "<script>alert(1)</script> & <b>"
    changed["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]["description"] = "`<i>` and <i>"
    text = reference(changed)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in text
    assert "<code>&lt;i&gt;</code> and &lt;i&gt;" in text


def test_it_can_be_read_with_a_keyboard_and_by_machines() -> None:
    elements = Elements(page()).found
    tags = [tag for tag, _ in elements]
    assert ("html", {"lang": "en"}) in elements
    assert tags.count("main") == tags.count("h1") == tags.count("nav") == 1
    skip = next(attributes for tag, attributes in elements if tag == "a")
    assert skip["href"] == "#content"
    for tag, attributes in elements:
        if attributes.get("class") == "scroll" or tag == "pre":
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]
