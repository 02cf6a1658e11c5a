"""Structural tags (pellucid.core.structural_tag) as grammars of llguidance.

Free text up to a trigger is a lazy lexeme: it ends where the trigger first does, so text never runs past one. A trigger
that is a special token of the vocabulary is a token of the grammar; free text holds no special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from pellucid.core.structural_tag import Format
from pellucid.tokenizer.tokenizer import Tokenizer

JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON beside text is written as Python's `json.dumps` writes it, which is what models were trained on."""
LONGEST_EXPRESSION = 60
"""Longer ones become rules."""


def structural_tag_grammar(text: str, tokenizer: Tokenizer, lark_of: Callable[[str], str]) -> str:
    """What to compile, in llguidance's form.

    Args:
        text: of a checked structural tag.
        lark_of: makes Lark of a grammar in any form.

    Raises:
        ValueError: it holds a grammar that is malformed.
    """
    writer, form = _Writer(tokenizer, lark_of), json.loads(text)["format"]
    start = writer.expression(form)
    rules = [f"start: {start}", r"TEXT: /(.|\n)*/", *writer.rules]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join([*rules, ""])}, *writer.grammars]}, ensure_ascii=False)


class _Writer:
    """Writes formats as expressions of Lark, and the rules that those need.

    Attributes:
        rules: so far, one a line.
        grammars: those that the rules refer to.
    """

    def __init__(self, tokenizer: Tokenizer, lark_of: Callable[[str], str]) -> None:
        self.rules: list[str] = []
        self.grammars: list[dict[str, Any]] = []
        self._lark_of = lark_of
        self._names: dict[str, str] = {}
        self._expressions: dict[int, str] = {}  # by the id of a format, all of which live as long as this
        special = {
            tokenizer.id_to_token(token_id): token_id for token_id in tokenizer.special_ids | tokenizer.eos_token_ids
        }
        self._special = special
        spellings = sorted(filter(None, special), key=len, reverse=True)
        self._splitter = re.compile(f"({'|'.join(map(re.escape, spellings))})") if spellings else None

    def expression(self, form: Format) -> str:
        """`form` as an expression that can stand in a sequence: written once, and short, because what it is part of may
        need it several times."""
        written = self._expressions.get(id(form))
        if written is None:
            written = self._written(form)
            if len(written) > LONGEST_EXPRESSION:
                written = self._rule("part", written)
            self._expressions[id(form)] = written
        return written

    def _written(self, form: Format) -> str:
        kind = form["type"]
        if kind == "const_string":
            return self._literal(form["value"])
        if kind == "any_text":
            return "TEXT"
        if kind == "json_schema":
            options = JSON_OPTIONS
            if "whitespace_pattern" in form:
                options = {"whitespace_flexible": False, "whitespace_pattern": form["whitespace_pattern"]}
            schema = {**form["json_schema"], "x-guidance": options}
            return self._rule("json", f"%json {json.dumps(schema, ensure_ascii=False)}")
        if kind == "regex":
            return self._rule("regex", self._grammar(_regex(form["pattern"])))
        if kind == "grammar":
            return self._rule("grammar", self._grammar({"lark_grammar": self._lark_of(form["grammar"])}))
        if kind == "sequence":
            return _sequence(self.expression(element) for element in form["elements"])
        if kind == "or":
            return self._alternatives([self.expression(element) for element in form["elements"]])
        if kind == "tag":
            return self._tag(form)
        return self._triggered(form) if kind == "triggered_tags" else self._separated(form)

    def _tag(self, tag: Format, *, lazy: bool = False) -> str:
        """A tag; `lazy` if its beginning wins over free text that could begin in the same way."""
        begin, content, end = tag["begin"], tag["content"], tag["end"]
        free = content["type"] == "any_text" and end
        lazy = lazy or free or tag.get("lazy", False)
        written = self._lazy(self._parts(begin)) if begin and lazy else self._literal(begin)
        if free:
            return _sequence([written, self._text_until(end)])
        return _sequence([written, self.expression(content), self._literal(end)])

    def _triggered(self, form: Format) -> str:
        or_text = form.get("or_text", ())
        bodies: dict[str, list[str]] = {}
        for tag in form["tags"]:
            trigger = next(trigger for trigger in form["triggers"] if tag["begin"].startswith(trigger))
            body = self._tag({**tag, "begin": tag["begin"][len(trigger) :]}, lazy=trigger in or_text)
            bodies.setdefault(trigger, []).append(body)
        once = form.get("stop_after_first", False)
        first = self._alternatives([self.expression(tag) for tag in form["tags"]]) if form.get("at_least_one") else ""
        if first and once:
            return first
        found = [
            _sequence([self._text_until(trigger), self._alternatives(alternatives)])
            for trigger, alternatives in bodies.items()
        ]
        text = [self._text_until(trigger) for trigger in or_text]
        if once:
            between = f"({self._alternatives(text)})*" if text else ""
            return _sequence([between, self._alternatives(["TEXT", *found])])
        return _sequence([first, f"({self._alternatives([*found, *text])})* TEXT"])

    def _separated(self, form: Format) -> str:
        tags = self._alternatives([self.expression(tag) for tag in form["tags"]])
        if not form.get("stop_after_first"):
            tags = f"{tags} ({_sequence([self._literal(form['separator']), tags])})*"
        return tags if form.get("at_least_one") else f"({tags})?"

    def _text_until(self, end: str) -> str:
        """Any text up to the first `end`, and that."""
        first, *rest = self._parts(end)
        head = f"TEXT {first}" if first.startswith("<") else self._lazy(["TEXT", first])
        return _sequence([head, *rest])

    def _literal(self, text: str) -> str:
        return " ".join(self._parts(text))

    def _parts(self, text: str) -> list[str]:
        """`text` as string literals and special tokens."""
        pieces = self._splitter.split(text) if self._splitter else [text]
        return [
            f"<[{self._special[piece]}]>" if piece in self._special else json.dumps(piece, ensure_ascii=False)
            for piece in pieces
            if piece
        ]

    def _lazy(self, parts: list[str]) -> str:
        if any(part.startswith("<") for part in parts):
            return " ".join(parts)
        return self._rule("lazy", " ".join(parts), options="[lazy]")

    def _grammar(self, grammar: dict[str, Any]) -> str:
        name = f"grammar{len(self.grammars)}"
        self.grammars.append({"name": name, **grammar})
        return f"@{name}"

    def _alternatives(self, expressions: list[str]) -> str:
        return expressions[0] if len(expressions) == 1 else self._rule("any", " | ".join(expressions))

    def _rule(self, kind: str, body: str, options: str = "") -> str:
        """The name of a rule with this body, which is written once however often it is needed."""
        name = self._names.get(options + body)
        if name is None:
            name = self._names[options + body] = f"{kind}_{len(self._names)}"
            self.rules.append(f"{name}{options}: {body}")
        return name


def _sequence(expressions: Iterable[str]) -> str:
    return " ".join(expression for expression in expressions if expression) or '""'


def _regex(pattern: str) -> dict[str, Any]:
    from llguidance import LLMatcher

    grammar: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]
    return {"lark_grammar": grammar["lark_grammar"]}
