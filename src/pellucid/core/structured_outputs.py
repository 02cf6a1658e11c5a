"""What the text of an answer must look like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import check_boolean, refusal

MAX_SCHEMA_BYTES = 65536
"""Of a JSON schema, and of all choices together."""
MAX_GRAMMAR_BYTES = 16384
"""Of a regular expression, and of a grammar."""
MAX_STRUCTURAL_TAG_BYTES = 262144
"""Of a structural tag as a whole; the schemas, regular expressions and grammars in it have the limits of their own."""
MAX_CHOICES = 4096
KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """What the answer must look like: exactly one of `json`, `json_object`, `regex`, `choice`, `grammar` and
    `structural_tag`. Names follow vLLM's; docs/structured-output.md says what each may hold.

    Attributes:
        json: a JSON schema, as an object or as text; True for any JSON. It is kept as text, properties in order.
        json_object: any JSON object.
        regex: a regular expression (syntax of Rust's regex crate) that the whole answer matches.
        choice: the answers there are.
        grammar: a context-free grammar, in Lark or in GBNF (which has `name ::= ...`).
        structural_tag: text and structures in turns (pellucid.core.structural_tag), as an object or as text. It is kept
            as text.
        whitespace_pattern: regular expression of the white space that JSON may have, once in each place where JSON
            allows any; None for none at all.

    Raises:
        InvalidRequestError: none or several are given, or one is of the wrong type, empty or too large. Whether it is
            sound is seen when it is compiled.
    """

    json: Mapping[str, Any] | str | bool | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None
    structural_tag: Mapping[str, Any] | str | None = None
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        check_boolean(_name("json_object"), self.json_object)
        given = [kind for kind in KINDS if getattr(self, kind) is not None and getattr(self, kind) is not False]
        if self.json is False:
            raise InvalidRequestError(f"{_name('json')} is false, a schema that allows no answer", param=_name("json"))
        if len(given) != 1:
            found = f"not {' and '.join(given)} together" if given else "none is given"
            raise InvalidRequestError(
                f"structured_outputs takes exactly one of {', '.join(KINDS)}: {found}", param="structured_outputs"
            )
        if self.json is not None:
            self._set("json", _schema_text(self.json))
        if self.regex is not None:
            _check_text("regex", self.regex, MAX_GRAMMAR_BYTES)
        if self.grammar is not None:
            _check_text("grammar", self.grammar, MAX_GRAMMAR_BYTES)
        if self.choice is not None:
            self._set("choice", _choices(self.choice))
        if self.structural_tag is not None:
            self._set("structural_tag", _structural_tag_text(self.structural_tag))
        if self.whitespace_pattern is not None:
            _check_text("whitespace_pattern", self.whitespace_pattern, MAX_GRAMMAR_BYTES)
            if self.json is None and not self.json_object:
                raise InvalidRequestError(
                    f"{_name('whitespace_pattern')} is of JSON: it needs json or json_object",
                    param=_name("whitespace_pattern"),
                )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def kind(self) -> str:
        """Which of KINDS is given."""
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))


def _name(field: str) -> str:
    return f"structured_outputs.{field}"


def _check_text(field: str, value: object, max_bytes: int) -> None:
    if not isinstance(value, str) or not value:
        raise refusal(_name(field), value, "a string that is not empty")
    _check_size(field, value, max_bytes)


def _check_size(field: str, text: str, max_bytes: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError(
            f"{_name(field)} holds half a character (a lone surrogate)", param=_name(field)
        ) from None
    if size > max_bytes:
        raise InvalidRequestError(
            f"{_name(field)} is too large: {size:,} bytes, and at most {max_bytes:,} are taken", param=_name(field)
        )


def _schema_text(schema: Any) -> str:
    """The schema as compact JSON text; True, which allows all, as the empty schema."""
    name = _name("json")
    if isinstance(schema, str):
        schema = _parsed("json", schema, MAX_SCHEMA_BYTES)
    if schema is True:
        schema = {}
    if schema is False:
        raise InvalidRequestError(f"{name} is false, a schema that allows no answer", param=name)
    if not isinstance(schema, Mapping):
        raise refusal(name, schema, "a JSON schema: an object, the text of one, or true")
    return _compact("json", schema, MAX_SCHEMA_BYTES)


def _structural_tag_text(tag: Any) -> str:
    """A structural tag as compact JSON text, in its present form (with `format`)."""
    from pellucid.core.structural_tag import checked_format, parts

    form = checked_format(_parsed("structural_tag", tag, MAX_STRUCTURAL_TAG_BYTES) if isinstance(tag, str) else tag)
    for part in parts(form):
        if part["type"] == "json_schema":
            _compact("structural_tag", part["json_schema"], MAX_SCHEMA_BYTES)
        for field in ("pattern", "grammar", "whitespace_pattern"):
            _check_size("structural_tag", part.get(field, ""), MAX_GRAMMAR_BYTES)
    return _compact("structural_tag", {"type": "structural_tag", "format": form}, MAX_STRUCTURAL_TAG_BYTES)


def _parsed(field: str, text: str, max_bytes: int) -> Any:
    import json  # here, because few requests need it and every start would pay for it

    _check_size(field, text, max_bytes)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"{_name(field)} is not valid JSON: {error or 'nested too deeply'}", param=_name(field)
        ) from None


def _compact(field: str, value: Mapping[str, Any], max_bytes: int) -> str:
    """`value` as compact JSON text, properties in order."""
    import json

    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{_name(field)} cannot be written as JSON: {error}", param=_name(field)) from None
    _check_size(field, text, max_bytes)
    return text


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is no JSON")


def _choices(value: Any) -> tuple[str, ...]:
    range_text = f"1 to {MAX_CHOICES} strings that are not empty"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise refusal(_name("choice"), value, range_text)
    choices = tuple(value)
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequestError(
            f"{_name('choice')} must be {range_text}, not {len(choices)} of them", param=_name("choice")
        )
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise refusal(_name("choice"), choice, range_text)
    _check_size("choice", "".join(choices), MAX_SCHEMA_BYTES)
    return tuple(dict.fromkeys(choices))
