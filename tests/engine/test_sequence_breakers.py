from __future__ import annotations

from typing import Any

from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.sequence_breakers import MAX_REMEMBERED, SequenceBreakers
from tests.support.engines import make_engine
from tests.support.fake_tokenizer import ALPHABET

TOKENS = [b"", b"a", b"\n", b"b\n", b"", b"\nc", b"ab", b"b", "é".encode(), b"\xc3", b"abab", b""]


class ListTokenizer:
    """Tokens of any bytes.

    Attributes:
        num_read: how many of them were asked for.
    """

    vocab_size = len(TOKENS)

    def __init__(self) -> None:
        self.num_read = 0

    def token_bytes(self, token_id: int) -> bytes:
        self.num_read += 1
        return TOKENS[token_id]


def test_tokens_that_hold_a_string() -> None:
    tokenizer: Any = ListTokenizer()
    breakers = SequenceBreakers(tokenizer, vocab_size=20)
    for strings in (("\n",), ("ab", "b"), ("é",), ("bab",), ("a", "\n"), ("x",), (), ("b\n\n",)):
        data = [string.encode() for string in strings]
        expected = [number for number, token in enumerate(TOKENS) if any(string in token for string in data)]
        assert breakers.token_ids(strings).tolist() == expected, strings
    assert breakers.token_ids(("\n",)).dtype == "int32"
    assert tokenizer.num_read == len(TOKENS)


def test_the_vocabulary_is_read_when_it_is_needed_and_little_is_kept() -> None:
    tokenizer: Any = ListTokenizer()
    breakers = SequenceBreakers(tokenizer, vocab_size=len(TOKENS))
    assert tokenizer.num_read == 0
    first = breakers.token_ids(("a",))
    assert breakers.token_ids(("a",)) is first
    for number in range(3 * MAX_REMEMBERED):
        breakers.token_ids((str(number),))
    assert len(breakers._remembered) == MAX_REMEMBERED


def test_a_request_has_its_breakers() -> None:
    engine = make_engine()
    engine.add_request("dry", [1, 2], SamplingParams(dry_multiplier=1, dry_sequence_breakers=[":", "b"]))
    engine.add_request("plain", [1, 2], SamplingParams())
    assert engine._groups["dry"].dry_breakers.tolist() == [ALPHABET.index("b"), ALPHABET.index(":")]  # type: ignore[union-attr]
    assert engine._groups["plain"].dry_breakers is None


def test_a_repetition_does_not_reach_across_one() -> None:
    """abcd abc -> not d, unless the c of before is a breaker."""
    prompt = [ALPHABET.index(character) for character in "abcdabc"]

    def chosen(**params: Any) -> int:
        engine = make_engine()
        bias = {ALPHABET.index("d"): 50}
        engine.add_request("x", prompt, SamplingParams(max_tokens=1, temperature=0, logit_bias=bias, **params))
        engine.run()
        return engine.replies["x"].outputs[0].token_ids[0]

    d = ALPHABET.index("d")
    assert chosen() == d
    assert chosen(dry_multiplier=100) != d
    assert chosen(dry_multiplier=100, dry_sequence_breakers="c") == d
