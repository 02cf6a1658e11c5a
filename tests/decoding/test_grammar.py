"""Answers follow their grammar to the last byte; masks are a function of the tokens so far and nothing else."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from benchmarks.json_schemas import make_schemas, validate
from pellucid.core.errors import InvalidRequestError
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.decoding import grammar_compiler
from pellucid.decoding.grammar import Grammar, GrammarMatcher
from pellucid.decoding.grammar_compiler import GrammarCompiler
from tests.support.grammars import allowed, compiled, random_answer, random_texts
from tests.support.mutants import mutant
from tests.support.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
ENDS = sorted(TOKENIZER.eos_token_ids)
OBJECT = {
    "type": "object",
    "properties": {"ab": {"enum": ["true", "x"]}, "n": {"type": "integer", "minimum": -9, "maximum": 120}},
    "required": ["ab", "n"],
    "additionalProperties": False,
}
ARITHMETIC_LARK = """
start: sum
sum: product ("+" product)~0..2
product: NUMBER ("*" NUMBER)?
NUMBER: /[1-9][0-9]{0,2}/
"""
ARITHMETIC_GBNF = """
# with a comment
root    ::= product ("+" product){0,2}
product ::= number ("*" number)?
number  ::= [1-9] [0-9]{0,2}
"""


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-z]{2,5}-[0-9]{1,3}",
        r"^(yes|no|maybe)$",
        r"(ab|a)*b{1,2}",
        r'\{"k": "[^"\\]{0,4}"\}',
        r"[äöü€😀]{1,3}",
        r"(?i)HELLO",
        r"[^\n]{1,3}",
        r"x{0}",
    ],
)
def test_answers_match_their_regular_expression(regex: str) -> None:
    for text in random_texts(TOKENIZER, regex=regex):
        assert re.fullmatch(regex, text), text


def test_answers_are_among_the_choices_and_each_can_come() -> None:
    choices = ["a", "ab", "abc", 'say "hi"\n', "back\\slash", "ñandú 日本 😀", "\x00\x1f", "truenull", " space "]
    assert set(random_texts(TOKENIZER, count=200, choice=choices)) == set(choices)


@pytest.mark.parametrize("grammar", [ARITHMETIC_LARK, ARITHMETIC_GBNF], ids=["Lark", "GBNF"])
def test_answers_follow_a_context_free_grammar(grammar: str) -> None:
    number = "[1-9][0-9]{0,2}"
    product = rf"{number}(\*{number})?"
    for text in random_texts(TOKENIZER, grammar=grammar):
        assert re.fullmatch(rf"{product}(\+{product}){{0,2}}", text), text


def test_brackets_balance() -> None:
    grammar = 'root ::= pair\npair ::= "(" (pair | "x"){1,2} ")" | "[" pair? "]"\n'
    for text in random_texts(TOKENIZER, grammar=grammar):
        rest = text.replace("x", "")
        while rest != (rest := rest.replace("()", "").replace("[]", "")):
            pass
        assert not rest, text


def test_json_answers_hold_to_their_schema() -> None:
    pytest.importorskip("jsonschema")
    for schema in make_schemas(60, seed=7):
        for text in random_texts(TOKENIZER, count=1, max_tokens=2000, json=schema):
            validate(text, schema)


def test_json_answers_hold_to_a_recursive_schema() -> None:
    pytest.importorskip("jsonschema")
    tree = {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "v": {"enum": [1, 2]},
                    "of": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                },
                "required": ["v", "of"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    }
    texts = random_texts(TOKENIZER, count=40, json=tree)
    for text in texts:
        validate(text, tree)
    assert max(text.count("[") for text in texts) > 2


def test_any_json_object_and_any_json() -> None:
    for params in ({"json_object": True}, {"json": True}, {"json": "true"}):
        grammar = compiled(TOKENIZER, **params)
        for text in ('{"ab":[1,2.5e-3,null,{"x":"\\u0007 \\n é"}]}', "{}"):
            assert ends(grammar.matcher(), text)
    assert ends(compiled(TOKENIZER, json=True).matcher(), "[1]")
    with pytest.raises(InvalidRequestError):
        compiled(TOKENIZER, json_object=True).matcher().masks(TOKENIZER.encode("[1]"))


def test_white_space_in_json_is_what_was_asked_for() -> None:
    spaced = compiled(TOKENIZER, json=OBJECT, whitespace_pattern=" ").matcher()
    assert ends(spaced, '{ "ab": "x", "n": 3 }')
    with pytest.raises(InvalidRequestError, match="does not follow"):
        spaced.masks(TOKENIZER.encode('{  "ab"'))
    with pytest.raises(InvalidRequestError, match="does not follow"):
        compiled(TOKENIZER, json=OBJECT).matcher().masks(TOKENIZER.encode('{"ab": "x"'))


def test_text_that_is_forced_is_written_as_the_model_would() -> None:
    matcher = compiled(TOKENIZER, json=OBJECT).matcher()
    wanted = TOKENIZER.encode('{"ab":"', add_special_tokens=False)
    for place in range(len(wanted) - 1):
        assert allowed(matcher.masks(wanted[:place])[0]) == [wanted[place]]


def test_nothing_but_an_end_may_follow_a_complete_answer() -> None:
    matcher = compiled(TOKENIZER, choice=["ab"]).matcher()
    assert allowed(matcher.masks(TOKENIZER.encode("ab"))[0]) == ENDS
    assert not set(allowed(matcher.masks([])[0])) & set(ENDS)


def test_stop_tokens_may_come_where_the_answer_may_end_and_only_there() -> None:
    stop = TOKENIZER.token_to_id("<|im_start|>")
    assert stop is not None
    matcher = compiled(TOKENIZER, regex="a|ab").matcher({stop})
    a, ab = TOKENIZER.encode("a"), TOKENIZER.encode("ab")
    assert stop not in allowed(matcher.masks([])[0])
    assert {stop, *ENDS} < set(allowed(matcher.masks(a)[0]))
    assert allowed(matcher.masks(ab)[0]) == sorted({stop, *ENDS})
    rows = matcher.masks(a, [stop, 5])
    assert np.array_equal(rows[0], matcher.masks(a)[0])
    assert len(allowed(rows[1])) == len(allowed(rows[2])) == TOKENIZER.vocab_size
    for end in (stop, *ENDS):
        assert len(allowed(matcher.masks([*a, end])[0])) == TOKENIZER.vocab_size


def test_rows_of_drafts_are_the_masks_after_them() -> None:
    grammar = compiled(TOKENIZER, json=OBJECT)
    rng = np.random.RandomState(1)
    answer = random_answer(grammar.matcher(), TOKENIZER, rng)
    matcher = grammar.matcher()
    for begin in range(len(answer)):
        rows = matcher.masks(answer[:begin], answer[begin : begin + 4])
        for row, end in enumerate(range(begin, min(begin + 4, len(answer)) + 1)):
            assert np.array_equal(rows[row], grammar.matcher().masks(answer[:end])[0])


def test_what_comes_after_a_forbidden_draft_is_left_open() -> None:
    matcher = compiled(TOKENIZER, choice=["ab"]).matcher()
    everything = list(range(TOKENIZER.vocab_size))
    ab, x = TOKENIZER.encode("ab")[0], TOKENIZER.encode("x")[0]
    for drafts in ([x, ab], [ENDS[0], ab]):
        rows = matcher.masks([], drafts)
        assert allowed(rows[0]) == [ab]
        assert allowed(rows[1]) == allowed(rows[2]) == everything
    assert allowed(matcher.masks([], [ab, ENDS[0], x])[1]) == ENDS


def check_all_masks() -> None:
    for seed in range(6):
        check_masks_are_a_function_of_the_tokens(seed)


def check_masks_are_a_function_of_the_tokens(seed: int) -> None:
    """Go to and fro in one matcher, with drafts of all kinds, and compare with one that was never elsewhere."""
    rng = np.random.RandomState(seed)
    params: list[dict[str, Any]] = [{"json": OBJECT}, {"regex": r"(ab|a|é)*b{1,2}"}, {"grammar": ARITHMETIC_LARK}]
    grammar = compiled(TOKENIZER, **params[seed % len(params)])
    answers = [random_answer(grammar.matcher(), TOKENIZER, rng) for _ in range(2)]
    matcher = grammar.matcher()
    for _ in range(30):
        answer = answers[rng.randint(2)]
        begin = rng.randint(len(answer) + 1)
        drafts = answer[begin : begin + rng.randint(4)] + rng.randint(0, TOKENIZER.vocab_size, rng.randint(3)).tolist()
        rows = matcher.masks(answer[:begin], drafts)
        assert np.array_equal(rows[0], grammar.matcher().masks(answer[:begin])[0])
        assert np.array_equal(rows[0], matcher.masks(answer[:begin])[0])


@pytest.mark.parametrize("seed", range(6))
def test_masks_are_a_function_of_the_tokens_so_far(seed: int) -> None:
    check_masks_are_a_function_of_the_tokens(seed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if not self._matcher.rollback(len(matched) - common):", "if False:"),
        ("self._matcher.rollback(len(matched) - common)", "self._matcher.rollback(len(matched) - common - 1)"),
        ("if matched != token_ids[: len(matched)]:", "if len(matched) > len(token_ids):"),
    ],
)
def test_a_faulty_rollback_is_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrammarMatcher, "_move_to", mutant(GrammarMatcher._move_to, old, new))
    with pytest.raises((AssertionError, InvalidRequestError)):
        check_all_masks()


def test_drafts_that_stay_matched_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(GrammarMatcher._masks, "self._matched.append(draft)", "pass")
    monkeypatch.setattr(GrammarMatcher, "_masks", changed)
    with pytest.raises((AssertionError, InvalidRequestError)):
        check_all_masks()


def test_matchers_of_one_grammar_do_not_disturb_each_other() -> None:
    grammar = compiled(TOKENIZER, json=OBJECT)
    alone = [random_answer(grammar.matcher(), TOKENIZER, np.random.RandomState(seed)) for seed in range(16)]

    def answer(seed: int) -> list[int]:
        return random_answer(grammar.matcher(), TOKENIZER, np.random.RandomState(seed))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(answer, range(16))) == alone


def test_what_grows_too_complex_on_the_way_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_LEXER_STATES", 300)
    grammar = GrammarCompiler(TOKENIZER).compile(StructuredOutputsParams(regex="[a-z]{1,2000}[a-y]{1,2000}"), 60)
    matcher = grammar.matcher()
    token_ids = TOKENIZER.encode("abcdefgh" * 100)
    with pytest.raises(InvalidRequestError, match=r"after [0-9]+ tokens of the answer, .*too ") as refused:
        list(map(matcher.masks, beginnings(token_ids)))
    assert refused.value.param == "structured_outputs"
    assert "\n" not in refused.value.message


def check_no_request_stops_another() -> None:
    compiler = GrammarCompiler(TOKENIZER)
    params = StructuredOutputsParams(regex="[a-z]{1,2000}[a-y]{1,2000}")
    token_ids = TOKENIZER.encode("abcdefgh" * 100)
    alone = list(map(compiler.compile(params, 60).matcher().masks, beginnings(token_ids[:100])))
    grammar = GrammarCompiler(TOKENIZER).compile(params, 60)
    other = grammar.matcher()
    assert np.array_equal(other.masks([]), alone[0])
    with pytest.raises(InvalidRequestError):
        list(map(grammar.matcher().masks, beginnings(token_ids)))
    assert np.array_equal(list(map(other.masks, beginnings(token_ids[:100]))), alone)
    assert np.array_equal(list(map(grammar.matcher().masks, beginnings(token_ids[:100]))), alone)


def test_a_request_at_the_limits_does_not_stop_others_of_the_same_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_LEXER_STATES", 300)
    check_no_request_stops_another()
    monkeypatch.setattr(Grammar, "begin_alone", Grammar.begin)
    with pytest.raises(InvalidRequestError):
        check_no_request_stops_another()


def test_a_worn_grammar_is_not_given_to_new_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_LEXER_STATES", 300)
    compiler = GrammarCompiler(TOKENIZER)
    params = StructuredOutputsParams(regex="[a-z]{1,2000}[a-y]{1,2000}")
    grammar = compiler.compile(params, 60)
    assert compiler.compile(params, 60) is grammar
    with pytest.raises(InvalidRequestError):
        list(map(grammar.matcher().masks, beginnings(TOKENIZER.encode("abcdefgh" * 100))))
    assert compiler.compile(params, 60) is not grammar


def test_tokens_that_do_not_follow_the_grammar_are_refused() -> None:
    matcher = compiled(TOKENIZER, choice=["ab"]).matcher()
    with pytest.raises(InvalidRequestError, match="does not follow the grammar"):
        matcher.masks(TOKENIZER.encode("b"))


def test_bits_beyond_the_vocabulary_are_not_set() -> None:
    assert TOKENIZER.vocab_size % 32
    matcher = compiled(TOKENIZER, choice=["ab"]).matcher()
    for row in matcher.masks([], [5, 5]):
        assert max(allowed(row)) < TOKENIZER.vocab_size


def beginnings(token_ids: list[int]) -> list[list[int]]:
    return [token_ids[:end] for end in range(len(token_ids))]


def ends(matcher: GrammarMatcher, text: str) -> bool:
    return set(ENDS) <= set(allowed(matcher.masks(TOKENIZER.encode(text))[0]))
