"""How byte-level vocabularies split text before merging, by the name a GGUF file gives (`tokenizer.ggml.pre`).

The patterns are those of the models' own tokenizers, in the syntax of Oniguruma. Several patterns apply one after the
other, each within the pieces of the one before; text that a pattern leaves out is a piece of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pellucid.core.errors import UnsupportedModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACE}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACE}"
_QWEN3_5 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_PATH_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_PATH_SYMBOLS}|{_SPACE}"
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_PATH_SYMBOLS}|{_SPACE}"
)
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001
_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CHINESE_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_PUNCTUATION_AND_BACKTICK = r"[\p{P}\$\+<=>\^~\|`]+"
_THREE_DIGITS = r"[0-9][0-9][0-9]"


WINDOW = 8192
MARGIN = 16
_SPACES, _LETTERS = re.compile(r"\s"), re.compile("[A-Za-z\x80-\U0010ffff]")  # marks are among the letters


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A named way of splitting.

    Attributes:
        patterns: regular expressions, applied in turn.
        ignore_merges: a piece that is a token is taken whole, however merges would build it.
        add_bos: the vocabulary wants BOS in front where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def compile(self) -> Callable[[str], list[str]]:
        """A function from text to pieces in the byte-level alphabet."""
        from tokenizers import Regex, pre_tokenizers

        steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        splitter = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

        return partial(_split_in_windows, splitter.pre_tokenize_str)


def _split_in_windows(split: Callable[[str], list[tuple[str, tuple[int, int]]]], text: str) -> list[str]:
    """The pieces of `split(text)`, which gives each with its place in the text; it holds up all threads for a
    millisecond every 1,500 characters, so that long texts are better split window by window.

    Where one piece ends and the next begins, splitting can begin anew: no pattern looks back.
    """
    pieces: list[str] = []
    begin, window = 0, WINDOW
    while len(text) - begin > window:
        found = split(text[begin : begin + window])
        settled = _settled(text, begin, begin + window) - begin
        kept = len(found)
        while kept and found[kept - 1][1][1] > settled:
            kept -= 1
        if kept:
            pieces += [piece for piece, _ in found[:kept]]
            begin += found[kept - 1][1][1]
            window = WINDOW
        else:
            window *= 2
    pieces += [piece for piece, _ in split(text[begin:])]
    return pieces


def _settled(text: str, begin: int, end: int) -> int:
    """Up to where the pieces of text[begin:end] are those of the whole text.

    The patterns look ahead past what they take: a few characters, all of a run of white space (`\\s*[\\r\\n]+`) or of
    letters (where capitals may come before others).
    """
    place = end - MARGIN
    run = next((each for each in (_SPACES, _LETTERS) if each.match(text, place)), None)
    while run is not None and place > begin and run.match(text, place - 1):
        place -= 1
    return place


_LLAMA3_STYLE = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_LLAMA3_SPLIT_ONLY = PreTokenizer((_LLAMA3,))
_GPT2_STYLE = PreTokenizer((_GPT2,))
_SINGLE_DIGITS = PreTokenizer((_DIGIT, _GPT2))
_QWEN2_STYLE = PreTokenizer((_QWEN2,))
_GPT4O_STYLE = PreTokenizer((_GPT4O,))
_BLOOM_STYLE = PreTokenizer((_BLOOM,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((_PUNCTUATION, _GPT2, r"\p{N}+", _THREE_DIGITS)),
    "gpt-2": _GPT2_STYLE,
    "phi-2": _GPT2_STYLE,
    "mpt": _GPT2_STYLE,
    "olmo": _GPT2_STYLE,
    "jais": _GPT2_STYLE,
    "trillion": _GPT2_STYLE,
    "granite-docling": _GPT2_STYLE,
    "gigachat": _GPT2_STYLE,
    "exaone4": _GPT2_STYLE,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "exaone": _SINGLE_DIGITS,
    "minerva-7b": _SINGLE_DIGITS,
    "falcon": PreTokenizer((_PUNCTUATION_AND_BACKTICK, _GPT2, _THREE_DIGITS)),
    "llama3": _LLAMA3_STYLE,
    "llama-v3": _LLAMA3_STYLE,
    "llama-bpe": _LLAMA3_STYLE,
    "falcon3": _LLAMA3_STYLE,
    "falcon-h1": _LLAMA3_STYLE,
    "pixtral": _LLAMA3_STYLE,
    "midm-2.0": _LLAMA3_STYLE,
    "lfm2": _LLAMA3_STYLE,
    "dbrx": _LLAMA3_SPLIT_ONLY,
    "smaug-bpe": _LLAMA3_SPLIT_ONLY,
    "glm4": _LLAMA3_SPLIT_ONLY,
    "chatglm-bpe": _LLAMA3_SPLIT_ONLY,
    "qwen2": _QWEN2_STYLE,
    "deepseek-r1-qwen": _QWEN2_STYLE,
    "megrez": _QWEN2_STYLE,
    "stablelm2": _QWEN2_STYLE,
    "hunyuan": _QWEN2_STYLE,
    "grok-2": _QWEN2_STYLE,
    "qwen35": PreTokenizer((_QWEN3_5,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": _GPT4O_STYLE,
    "llama4": _GPT4O_STYLE,
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, _DIGIT)),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", _CHINESE_AND_KANA, _DEEPSEEK_V3)),
    "bloom": _BLOOM_STYLE,
    "poro-chat": _BLOOM_STYLE,
    "gpt3-finnish": _BLOOM_STYLE,
    "viking": PreTokenizer((_BLOOM, _DIGIT)),
}


def pre_tokenizer(name: object) -> PreTokenizer:
    """The pre-tokenizer of this name.

    Raises:
        UnsupportedModelError: the file names none, or one that is not known: a guess would give wrong ids.
    """
    if name is None:
        raise UnsupportedModelError(
            "the file does not name its pre-tokenizer (tokenizer.ggml.pre), so its ids cannot be told; "
            "convert the model again with a current converter",
            param="tokenizer.ggml.pre",
        )
    try:
        return PRE_TOKENIZERS[name]  # type: ignore[index]
    except (KeyError, TypeError):
        raise UnsupportedModelError(
            f"the pre-tokenizer {name!r} is not supported; supported are {', '.join(sorted(PRE_TOKENIZERS))}",
            param="tokenizer.ggml.pre",
        ) from None
