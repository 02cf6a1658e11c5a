# ruff: noqa: RUF001
"""Generated text: all of Unicode, white space, digits, control characters, emoji, combining marks, long runs."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache

_WORDS = """
the of and to in is that for it was on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
I'm you're he'll we've DON'T can't O'Neil naïve café Ångström straße Übung señor François Zürich Привет мир как дела
γειά σου Κόσμε שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก こんにちは世界 你好世界 안녕하세요 세계 xin chào thế giới
def return import class lambda self.x __init__ foo_bar camelCase HTTPServer https://example.org/a?b=c&d=1
user@example.com 3.14159 1,000,000 2024-05-17 12:34:56 0x7fff +49 #include <stdio.h> std::vector<int> x+=1; // TODO
{} [] () == != <= >= && || ... --- *** ### $100 50% ½ ² №
"""
_EMOJI = "😀 😂 🥲 👍🏽 👩\u200d💻 👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇫🇷 🇩🇪 ❤️ ✈️ 🧑🏿\u200d🚀 ☎ ⌚ 1️⃣ #️⃣ 🦙 🚀"
_MARKUP = """
<b> </b> <table> <tr> <td> <h1> <|im_start|> <|im_end|> <|endoftext|> <bos> <eos> <unk> <pad> <s> </s> <0x0A> [INST]
"""
WORDS, EMOJI, MARKUP = _WORDS.split(), _EMOJI.split(), _MARKUP.split()
WHITE_SPACE = " \t\n\r\v\f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f\u202a\u202e\ufe0f\ufe0e"
CONTROLS = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
DIGITS = "0123456789٠١٢٣४५६０１２Ⅷ④⅔²𝟘𝟙"
PUNCTUATION = "".join(chr(c) for c in range(0x21, 0x7F) if not chr(c).isalnum()) + "«»“”‘’—–…¿¡、。「」・％"


@cache
def assigned() -> str:
    """Every assigned character, without surrogates and private use."""
    return "".join(chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cs", "Co", "Cn"))


@cache
def combining() -> str:
    return "".join(character for character in assigned() if unicodedata.combining(character))


def any_character(rng: random.Random) -> str:
    while True:
        code = rng.randrange(0x110000)
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def _pick(rng: random.Random, alphabet: str, most: int) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(1, most)))


KINDS: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: " ".join(rng.choices(WORDS, k=rng.randint(1, 12))),
    lambda rng: _pick(rng, assigned(), 12),
    lambda rng: "".join(any_character(rng) for _ in range(rng.randint(1, 6))),
    lambda rng: _pick(rng, WHITE_SPACE, 8),
    lambda rng: _pick(rng, DIGITS, 14),
    lambda rng: _pick(rng, CONTROLS, 6),
    lambda rng: _pick(rng, PUNCTUATION, 10),
    lambda rng: _pick(rng, INVISIBLE, 4),
    lambda rng: "".join(rng.choices(EMOJI, k=rng.randint(1, 5))),
    lambda rng: rng.choice("aeiouEnkк") + _pick(rng, combining(), 5),
    lambda rng: rng.choice(" \n\ta1.=-あ!e") * rng.choice((2, 3, 5, 8, 16, 17, 31, 40, 100)),
    lambda rng: rng.choice(MARKUP),
    lambda rng: " " * rng.randint(1, 31) + rng.choice(WORDS),
    lambda rng: rng.choice(WORDS).upper() + rng.choice("'ʼ’") + rng.choice(("s", "LL", "re", "D", "t")),
)


def texts(seed: int, count: int) -> Iterator[str]:
    """`count` strings, the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = [rng.choice(KINDS)(rng) for _ in range(rng.choice((1, 1, 2, 3, 5)))]
        yield rng.choice(("", "", " ", "\n")).join(parts)
