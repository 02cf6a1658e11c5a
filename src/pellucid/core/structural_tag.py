"""Answers in which free text and structures take turns: structural tags, in the form of XGrammar
(https://xgrammar.mlc.ai/docs/tutorials/structural_tag.html), which vLLM takes too.

Three fields are not of XGrammar's: `or_text` lists those of the triggers after which text goes on where no tag does.
None of them may begin within another one. A tag that is `lazy` wins over text that could begin in the same way.
`whitespace_pattern` says of a JSON schema what it says in StructuredOutputsParams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import check_boolean, refusal, shown

Format = dict[str, Any]

_NAME = "structured_outputs.structural_tag"
_MAX_DEPTH = 16

# The fields of each type of format: how to check them, and whether they may be left out.
_FIELDS: dict[str, dict[str, tuple[str, bool]]] = {
    "const_string": {"value": ("text", False)},
    "json_schema": {"json_schema": ("schema", False), "whitespace_pattern": ("text", True)},
    "regex": {"pattern": ("text", False)},
    "grammar": {"grammar": ("text", False)},
    "any_text": {},
    "sequence": {"elements": ("formats", False)},
    "or": {"elements": ("formats", False)},
    "tag": {
        "begin": ("string", False),
        "content": ("format", False),
        "end": ("string", False),
        "lazy": ("boolean", True),
    },
    "triggered_tags": {
        "triggers": ("texts", False),
        "tags": ("tags", False),
        "at_least_one": ("boolean", True),
        "stop_after_first": ("boolean", True),
        "or_text": ("texts", True),
    },
    "tags_with_separator": {
        "tags": ("tags", False),
        "separator": ("string", False),
        "at_least_one": ("boolean", True),
        "stop_after_first": ("boolean", True),
    },
}


def checked_format(tag: Any) -> Format:
    """The format that a structural tag holds, its form checked; of the older form (`structures` and `triggers`), the
    `triggered_tags` that mean the same.

    Raises:
        InvalidRequestError: it is malformed, or holds what is not supported; the message names the place.
    """
    if not isinstance(tag, Mapping):
        raise refusal(_NAME, tag, "a structural tag: an object, or the text of one")
    fields = dict(tag)
    if fields.pop("type", "structural_tag") != "structural_tag":
        raise refusal(f"{_NAME}.type", tag["type"], '"structural_tag"')
    if "structures" in fields or "triggers" in fields:
        return _checked(_of_structures(fields), _NAME, 0)
    if fields.keys() != {"format"}:
        raise InvalidRequestError(
            f"{_NAME} must hold format, or structures and triggers, not {', '.join(map(shown, fields)) or 'nothing'}",
            param=_NAME,
        )
    return _checked(fields["format"], f"{_NAME}.format", 0)


def parts(form: Format) -> Iterator[Format]:
    """A checked format and all that it is made of."""
    yield form
    inner = form.get("tags") or form.get("elements") or ([form["content"]] if "content" in form else [])
    for part in inner:
        yield from parts(part)


def _of_structures(fields: Mapping[str, Any]) -> Format:
    structures = fields.get("structures")
    if fields.keys() != {"structures", "triggers"} or not isinstance(structures, list | tuple):
        raise InvalidRequestError(
            f"{_NAME} must hold structures, a list of objects, and triggers, a list of texts", param=_NAME
        )
    tags = []
    for index, structure in enumerate(structures):
        name = f"{_NAME}.structures[{index}]"
        if not isinstance(structure, Mapping) or structure.keys() != {"begin", "schema", "end"}:
            raise refusal(name, structure, "an object with begin, schema and end")
        content = {"type": "json_schema", "json_schema": structure["schema"]}
        tags.append({"type": "tag", "begin": structure["begin"], "content": content, "end": structure["end"]})
    return {"type": "triggered_tags", "triggers": fields["triggers"], "tags": tags}


def _checked(form: Any, name: str, depth: int, expected: str = "") -> Format:
    if depth == _MAX_DEPTH:
        raise InvalidRequestError(f"{name} is nested more than {_MAX_DEPTH} deep", param=_NAME)
    if not isinstance(form, Mapping):
        raise _refused(name, form, "an object with a type")
    kind = form.get("type", expected)
    if not isinstance(kind, str) or kind not in _FIELDS or kind != (expected or kind):
        raise _refused(f"{name}.type", kind, f'"{expected}"' if expected else f"one of {', '.join(_FIELDS)}")
    known = _FIELDS[kind]
    for field in form:
        if field != "type" and field not in known:
            raise InvalidRequestError(f"{name}.{field} is not supported; {kind} has {', '.join(known)}", param=_NAME)
    checked: Format = {"type": kind}
    for field, (check, optional) in known.items():
        if field in form:
            checked[field] = _checked_field(check, form[field], f"{name}.{field}", depth)
        elif not optional:
            raise InvalidRequestError(f"{name}.{field} is missing", param=_NAME)
    if kind == "triggered_tags":
        _check_triggers(checked, name)
    return checked


def _checked_field(check: str, value: Any, name: str, depth: int) -> Any:
    if check == "boolean":
        return check_boolean(name, value)
    if check == "schema":
        if not isinstance(value, Mapping | bool) or value is False:
            raise _refused(name, value, "a JSON schema: an object, or true")
        return {} if value is True else value
    if check == "format":
        return _checked(value, name, depth + 1)
    if check in ("string", "text"):
        if not isinstance(value, str) or (check == "text" and not value):
            raise _refused(name, value, "a string" if check == "string" else "a string that is not empty")
        return value
    if not isinstance(value, list | tuple) or not value:
        raise _refused(name, value, "a list that is not empty")
    one, expected = {"texts": ("text", ""), "formats": ("format", ""), "tags": ("format", "tag")}[check]
    if one == "format":
        return [_checked(item, f"{name}[{index}]", depth + 1, expected) for index, item in enumerate(value)]
    return [_checked_field(one, item, f"{name}[{index}]", depth) for index, item in enumerate(value)]


def _check_triggers(form: Format, name: str) -> None:
    for trigger in form.get("or_text", ()):
        if trigger not in form["triggers"]:
            raise _refused(f"{name}.or_text", trigger, "some of the triggers")
    for index, tag in enumerate(form["tags"]):
        matching = [trigger for trigger in form["triggers"] if tag["begin"].startswith(trigger)]
        if len(matching) != 1:
            found = f"{len(matching)} do" if matching else "none does"
            raise InvalidRequestError(
                f"{name}.tags[{index}].begin must begin with exactly one of the triggers: {found}", param=_NAME
            )


def _refused(name: str, value: object, range_text: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {range_text}, not {shown(value)}", param=_NAME)
