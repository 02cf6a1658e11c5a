"""Grammars that are small on paper and large in the works, or nested deeply. As a program: each is refused or served.

usage: python -m tests.support.grammar_bombs [STACK_BYTES]
"""

from __future__ import annotations

import itertools
import json
import string
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pellucid.core.errors import PellucidError
from pellucid.core.structured_outputs import MAX_GRAMMAR_BYTES, MAX_SCHEMA_BYTES, StructuredOutputsParams
from pellucid.decoding import grammar_compiler
from tests.support.grammars import allowed
from tests.support.tokenizers import byte_level_tokenizer


def names() -> Iterator[str]:
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "".join(letters)


def chain(link: str, last: str, wrap: Callable[[list[str]], str], max_bytes: int) -> str:
    """Rules or definitions that each stand on the next, as many as the size limit lets through."""
    links: list[str] = []
    size = len(wrap([]).encode()) + 100
    successors = names()
    name = next(successors)
    while True:
        successor = next(successors)
        piece = link.format(name, successor)
        size += len(piece) + 1
        if size > max_bytes:
            return wrap([*links, last.format(name)])
        links.append(piece)
        name = successor


def rules(link: str) -> dict[str, Any]:
    text = chain(link, '{}:"q"', lambda links: "start:a\n" + "\n".join(links) + "\n", MAX_GRAMMAR_BYTES)
    return {"grammar": text}


def terminals(link: str) -> dict[str, Any]:
    return {"grammar": rules(link)["grammar"].upper().replace("START", "start").replace('"Q"', '"q"')}


def definitions(link: str) -> dict[str, Any]:
    link = '"{}":' + link.replace("{", "{{").replace("}", "}}").replace("NEXT", "#/$defs/{}")
    return {
        "json": chain(
            link, '"{}":{{}}', lambda links: '{"$defs":{' + ",".join(links) + '},"$ref":"#/$defs/a"}', MAX_SCHEMA_BYTES
        )
    }


def doubled(make: Callable[[dict[str, str]], dict[str, Any]]) -> dict[str, Any]:
    """Thirty definitions, each of which has the next one twice."""
    found = {f"a{number}": make({"$ref": f"#/$defs/a{number + 1}"}) for number in range(30)}
    return {"json": {"$defs": {**found, "a30": {"type": "object"}}, "$ref": "#/$defs/a0"}}


def tags_in_tags(depth: int) -> dict[str, Any]:
    """Tags that are written twice in each of which are tags that are written twice."""
    form: dict[str, Any] = {"type": "const_string", "value": "long " * 20}
    for number in range(depth):
        tag = {"begin": f"<{number}>", "content": form, "end": ""}
        several = {"type": "tags_with_separator", "separator": ",", "at_least_one": True}
        free = {"type": "triggered_tags", "triggers": ["<"], "at_least_one": True}
        form = {**(free if number % 2 else several), "tags": [tag]}
    return {"structural_tag": {"format": form}}


def tags(count: int, content: dict[str, Any], *, one_trigger: bool) -> dict[str, Any]:
    found = [{"begin": f"<tag {number}>", "content": content, "end": f"</tag {number}>"} for number in range(count)]
    triggers = ["<tag "] if one_trigger else [tag["begin"] for tag in found]
    return {"structural_tag": {"format": {"type": "triggered_tags", "triggers": triggers, "tags": found}}}


def tag_of(kind: str, **fields: Any) -> dict[str, Any]:
    return {"structural_tag": {"format": {"type": kind, **fields}}}


BOMBS: dict[str, dict[str, Any]] = {
    "rules": rules("{}:{}"),
    "rules in brackets": rules("{}:" + "[" * 20 + "{}" + "]" * 20),
    "rules in parentheses": rules("{}:((((((({})))))))"),
    "repeated rules": rules("{}:{}+"),
    "terminals": terminals("{}:{}"),
    "terminals in parentheses": terminals("{}:((((((({})))))))"),
    "references": definitions('{"$ref":"NEXT"}'),
    "nested objects": definitions('{"properties":{"":{"$ref":"NEXT"}}}'),
    "nested arrays": definitions('{"items":{"$ref":"NEXT"}}'),
    "nested tuples": definitions('{"prefixItems":[{"$ref":"NEXT"}]}'),
    "nested maps": definitions('{"additionalProperties":{"$ref":"NEXT"}}'),
    "nested anyOf": definitions('{"anyOf":[{"$ref":"NEXT"},{"type":"null"}]}'),
    "nested allOf": definitions('{"type":"object","allOf":[{"$ref":"NEXT"}]}'),
    "doubled allOf": doubled(lambda one: {"allOf": [one, one]}),
    "doubled anyOf": doubled(lambda one: {"anyOf": [one, one]}),
    "doubled tuples": doubled(lambda one: {"prefixItems": [one, one], "minItems": 2}),
    "products of alternatives": {
        "json": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{n}": {"type": "string"}}}, {"properties": {f"q{n}": {"type": "null"}}}]}
                for n in range(20)
            ]
        }
    },
    "a million items": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}},
    "a long string": {"json": {"type": "string", "minLength": 10**6}},
    "many properties": {"json": {"properties": {f"p{n}": {"type": "string"} for n in range(2500)}}},
    "many values": {"json": {"enum": [f"value number {n}" for n in range(2500)]}},
    "a long constant": {"json": {"const": "word " * 12_000}},
    "multiples": {"json": {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949)]}},
    "deep JSON": {"json": '{"items":' * 2000 + "{}" + "}" * 2000},
    "cyclic": {"json": {"$ref": "#"}},
    "repetitions of repetitions": {"regex": "((a{1,500}){1,500}){1,500}"},
    "a long repetition": {"regex": "a{100000000}"},
    "an exponential automaton": {"regex": "(a|b)*a(a|b){1000}"},
    "deep parentheses": {"regex": "(" * 8000 + "a" + ")" * 8000},
    "intersections": {"grammar": "start: T\nT: " + " & ".join(f"/.*{chr(97 + n)}.{{{n + 20}}}/" for n in range(12))},
    "complement": {"grammar": "start: T\nT: ~/(.*a.{30}b.*)/ & /(.|\\n)*c(.|\\n){30}/\n"},
    "ambiguous": {"grammar": 'start: s\ns: s s s | s s | "a" |\n'},
    "a million rules": {"grammar": 'start: s{1,1000000}\ns: "a" | "b"\n'},
    "deep GBNF": {"grammar": "root ::= " + "(" * 8000 + '"a"' + ")" * 8000 + "\n"},
    "tags in tags": tags_in_tags(7),
    "many tags": tags(2500, {"type": "any_text"}, one_trigger=True),
    "many triggers": tags(2000, {"type": "const_string", "value": "x"}, one_trigger=False),
    "long triggers": tag_of(
        "triggered_tags",
        triggers=["ab" * 2000 + letter for letter in string.ascii_letters],
        tags=[
            {"begin": "ab" * 2000 + letter, "content": {"type": "any_text"}, "end": ""}
            for letter in string.ascii_letters[:10]
        ],
    ),
    "deep JSON in a tag": tag_of("json_schema", json_schema=json.loads('{"items":' * 400 + "{}" + "}" * 400)),
    "definitions in tags": tag_of(
        "or",
        elements=[
            {"type": "json_schema", "json_schema": json.loads(definitions('{"items":{"$ref":"NEXT"}}')["json"])}
            for _ in range(2)
        ],
    ),
    "many alternatives": tag_of("or", elements=[{"type": "const_string", "value": f"{n}"} for n in range(5000)]),
    "a long sequence": tag_of("sequence", elements=[{"type": "any_text"}] * 9000),
    "long GBNF": {"grammar": 'root ::= a\na ::= "x"\n' + "".join(f'r{n} ::= a "y"\n' for n in range(900))},
}


def try_bomb(compiler: grammar_compiler.GrammarCompiler, params: dict[str, Any]) -> str:
    """What came of it: "served", or why not."""
    rng = np.random.RandomState(0)
    try:
        matcher = compiler.compile(StructuredOutputsParams(**params), seconds=120).matcher()
        token_ids: list[int] = []
        while len(token_ids) < 20:
            token_id = int(rng.choice(allowed(matcher.masks(token_ids)[0])))
            if token_id in byte_level_tokenizer().eos_token_ids:
                break
            token_ids.append(token_id)
    except PellucidError as error:
        return error.message if 400 <= error.status < 500 else f"a {type(error).__name__}"
    return "served"


def main() -> None:
    if len(sys.argv) > 1:
        grammar_compiler.STACK_BYTES = int(sys.argv[1])
    compiler = grammar_compiler.GrammarCompiler(byte_level_tokenizer())
    print(json.dumps({name: try_bomb(compiler, params) for name, params in BOMBS.items()}))


if __name__ == "__main__":
    main()
