"""Compiling is bounded in size and time, and wrong grammars are refused with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError, QueueFullError
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.decoding import grammar_compiler
from pellucid.decoding.grammar import Grammar
from pellucid.decoding.grammar_compiler import GrammarCompiler
from pellucid.tokenizer import Tokenizer
from tests.support.grammars import compiled
from tests.support.tokenizers import byte_level_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = byte_level_tokenizer()
AB = StructuredOutputsParams(choice=["ab"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"regex": "a(b"}, "unclosed group"),
        ({"regex": r"\bfoo"}, "not supported"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: rule\n"}, "unknown name"),
        ({"grammar": 'begin: "a"\n'}, "start"),
        ({"grammar": 'root ::= "a" b\n'}, "as GBNF .*'b' not found"),
        ({"grammar": 'root ::= ("a"\n'}, "as GBNF .*Expected"),
        ({"grammar": 'top ::= "a"\n'}, "as GBNF .*root"),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"not": {}}}, 'Unimplemented keys: ."not"'),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "string", "format": "shoe-size"}}, "shoe-size"),
        ({"json": {"type": "string", "pattern": "a(b"}}, "unclosed group"),
        ({"json": {"$ref": "#/$defs/none"}}, "none"),
        ({"json": {"$ref": "https://example.com/schema.json"}}, "example.com"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 4}}, "Unsatisfiable|minimum"),
        ({"json": {"$ref": "#"}}, "cannot be fulfilled"),
        ({"json_object": True, "whitespace_pattern": "("}, "unclosed group"),
    ],
)
def test_a_wrong_grammar_is_refused_with_the_reason(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        compiled(TOKENIZER, **params)
    assert refused.value.status == 400
    assert refused.value.param is not None
    assert refused.value.param.startswith("structured_outputs.")
    assert "\n" not in refused.value.message


def run_bombs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.support.grammar_bombs", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_grammars_that_explode_are_refused_or_served_but_nothing_breaks() -> None:
    done = run_bombs()
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert not [name for name, result in results.items() if result.startswith("a ")]
    assert results["nested objects"] == results["rules"] == results["doubled allOf"] == "served"
    for refused in ("deep JSON", "deep parentheses", "deep GBNF", "multiples", "products of alternatives", "cyclic"):
        assert results[refused] != "served"


@pytest.mark.skipif(sys.platform != "linux", reason="how a process dies differs")
def test_an_ordinary_stack_would_not_do() -> None:
    assert run_bombs(str(8 << 20)).returncode < 0


def test_grammars_are_kept_those_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "CACHED_GRAMMARS", 2)
    compiler = GrammarCompiler(TOKENIZER)
    first, second, third = (StructuredOutputsParams(choice=[text]) for text in ("a", "b", "c"))
    grammars = [compiler.compile(params) for params in (first, second)]
    assert compiler.compile(StructuredOutputsParams(choice=("a",))) is grammars[0]
    compiler.compile(third)
    assert compiler.compile(first) is grammars[0]
    assert compiler.compile(second) is not grammars[1]


class BlockedCompiler(GrammarCompiler):
    """Compiles nothing before it is released."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER)
        self.released = threading.Event()
        self.begun = threading.Semaphore(0)

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        self.begun.release()
        self.released.wait()
        return super()._compile(params)


def test_nobody_waits_longer_than_the_time_limit() -> None:
    compiler = BlockedCompiler()
    compiler.prepare().result(60)
    others = [compiler.submit(StructuredOutputsParams(choice=[text])) for text in "ab"]
    for _ in others:
        compiler.begun.acquire()
    with pytest.raises(QueueFullError, match=r"0\.01 s") as busy:  # both threads are taken
        compiler.compile(AB, seconds=0.01)
    assert busy.value.status == 429
    slow = compiler.too_slow(others[0], 5.0)
    assert isinstance(slow, InvalidRequestError)
    assert "more than 5 s" in slow.message
    compiler.released.set()
    assert others[1].result(60).vocab_size == TOKENIZER.vocab_size
    assert compiler.compile(AB, seconds=60)


def test_the_time_of_a_grammar_begins_once_the_vocabulary_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    build, submit = grammar_compiler.build_vocabulary, GrammarCompiler.submit

    def built(tokenizer: Tokenizer) -> Any:
        vocabulary = build(tokenizer)
        order.append("vocabulary")
        return vocabulary

    def submitted(compiler: GrammarCompiler, params: StructuredOutputsParams) -> Any:
        order.append("grammar")
        return submit(compiler, params)

    monkeypatch.setattr(grammar_compiler, "build_vocabulary", built)
    monkeypatch.setattr(GrammarCompiler, "submit", submitted)
    compiler = GrammarCompiler(TOKENIZER)
    compiler.compile(AB, 60)
    compiler.compile(StructuredOutputsParams(choice=["x"]), 60)
    assert order == ["vocabulary", "grammar", "grammar"]


def test_compiling_goes_on_in_a_forked_child() -> None:
    compiler = GrammarCompiler(TOKENIZER)
    compiler.compile(StructuredOutputsParams(choice=["a"]), 60)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            compiler.compile(AB, 60).matcher().masks([])
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_a_model_without_an_end_is_refused() -> None:
    class Endless:
        eos_token_ids: frozenset[int] = frozenset()

    with pytest.raises(InvalidRequestError, match="no end-of-sequence token"):
        GrammarCompiler(Endless()).compile(AB, 60)  # type: ignore[arg-type]


def test_nothing_of_it_is_loaded_before_it_is_asked_for() -> None:
    code = "import sys, pellucid, pellucid.engine.llm, pellucid.engine.async_engine\nprint('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
