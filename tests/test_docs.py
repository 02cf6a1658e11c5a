"""The documents' Python snippets and `pellucid` commands run, and give the output that stands below them.

A document is one session. A snippet's output is the ```text block right after it; `...` in one stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

from pellucid.cli.main import main
from pellucid.weights.catalog import DEFAULT_MODEL, entries, is_cached

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"))
)
RUN = [
    "README.md",
    "docs/api.md",
    "docs/how-inference-works.md",
    "docs/search.md",
    "docs/speculation.md",
    "docs/structured-output.md",
    "docs/tool-calling.md",
]

SNIPPET = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)
SESSION = re.compile(r"```console\n\$ pellucid (?P<command>.*?)\n(?P<output>.*?)```\n", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def check_snippets(text: str, name: str) -> None:
    """Run `text`'s snippets and commands in order; AssertionError where one prints something else."""
    session: dict[str, object] = {"__name__": name}
    found = sorted((*SNIPPET.finditer(text), *SESSION.finditer(text)), key=re.Match.start)
    assert found, f"{name} has no snippet"
    for match in found:
        line = text.count("\n", 0, match.start()) + 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if match.re is SESSION:
                main(shlex.split(match["command"]))
            else:
                code = "\n" * line + match["code"]  # so that a traceback shows the document's lines
                exec(compile(code, name, "exec"), session)
        got = "".join(f"{printed_line.rstrip()}\n" for printed_line in printed.getvalue().splitlines())
        expected = match["output"] or ""
        same = doctest.OutputChecker().check_output(expected, got, doctest.ELLIPSIS)
        assert same, f"{name}:{line} prints\n{got}and not\n{expected}"


def check_links(path: Path, text: str) -> None:
    """AssertionError where a relative link of `text`, which lies at `path`, leads nowhere."""
    for match in LINK.finditer(text):
        file, _, anchor = unquote(match["target"]).partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{path.name} links to {match['target']}, which is not there"
        if anchor:
            headings = HEADING.findall(target.read_text(encoding="utf-8"))
            anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{path.name} links to {match['target']}: {file or path.name} has no such heading"


@pytest.fixture
def default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")
    entry = next(entry for entry in entries() if entry.name == DEFAULT_MODEL)
    if not is_cached(entry):
        pytest.skip(f"{DEFAULT_MODEL} is not in the cache: pellucid pull {DEFAULT_MODEL}")
    monkeypatch.setenv("COLUMNS", "160")  # tables as wide as in the documents, whatever the terminal


@pytest.mark.slow
@pytest.mark.usefixtures("default_model")
@pytest.mark.parametrize("document", RUN)
def test_the_snippets_print_what_they_say(document: str) -> None:
    check_snippets((ROOT / document).read_text(encoding="utf-8"), document)


def test_every_document_with_snippets_is_run() -> None:
    with_snippets = [name for name in DOCUMENTS if SNIPPET.search((ROOT / name).read_text(encoding="utf-8"))]
    assert with_snippets == RUN, "RUN lists the documents whose snippets are run"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    check_links(ROOT / document, (ROOT / document).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        "```python\nprint(1)\n```\n",
        "```python\nx = 1\n```\n\n```text\n1\n```\n",
        "```python\nassert False\n```\n",
        "```console\n$ pellucid --version\npellucid 0.0.0\n```\n",
        "no snippet at all\n",
    ],
)
def test_a_wrong_snippet_is_caught(text: str) -> None:
    with pytest.raises(AssertionError):
        check_snippets(text, "document.md")


def test_snippets_share_a_session() -> None:
    check_snippets("```python\nx = 1\n```\n\n```python\nprint(x, 0.5)\n```\n\n```text\n1 ...\n```\n", "document.md")


@pytest.mark.parametrize("target", ["gone.md", "#gone", "there.md#gone"])
def test_a_dead_link_is_caught(target: str, tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A `first` heading\n")
    text = f"# Here\n[a](there.md) [b](#here) [c](there.md#a-first-heading) [d](https://example.org) [e]({target})\n"
    (tmp_path / "here.md").write_text(text)
    with pytest.raises(AssertionError, match="links to"):
        check_links(tmp_path / "here.md", text)
