"""How byte-level vocabularies split text before merging, by the name a GGUF file gives (`tokenizer.ggml.pre`).

The patterns are those of the models' own tokenizers, in the syntax of Oniguruma. Several patterns apply one after the
other, each within the pieces of the one before; text that a pattern leaves out is a piece of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from unicodedata import category

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


WINDOW = 2048  # characters
MARGIN = 16
_BETWEEN_LETTERS = frozenset("PSZN")
"""What the general categories of characters begin with that are neither letters nor marks, nor unknown to Python."""

Ends = Callable[[str], Iterable[int]]
"""Where each piece of a text ends."""


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

    def compile(self) -> Callable[[str], Iterator[str]]:
        """A function from text to its pieces."""
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        )
        # The library lets other threads run only in whole tokenizers. In this one each piece is a token.
        pipeline = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        pipeline.pre_tokenizer = splitter

        def ends(text: str) -> Iterable[int]:
            return [end for _, (_, end) in splitter.pre_tokenize_str(text)]

        def ends_meanwhile(text: str) -> Iterable[int]:
            encoding = pipeline.encode_batch([text], add_special_tokens=False)[0]
            places = map(encoding.token_to_chars, range(len(encoding)))
            return (place[1] for place in places if place is not None)

        return partial(_split_in_windows, ends, ends_meanwhile)


def _split_in_windows(ends: Ends, ends_meanwhile: Ends, text: str) -> Iterator[str]:
    """The pieces of `text`, found window by window.

    Where one piece ends and the next begins, splitting can begin anew: no pattern looks back.

    Args:
        ends: holds up all threads, for up to 3 ms a window.
        ends_meanwhile: the same, but lets them run: for windows that must be longer, since in all of one is no place
            where a piece is sure to end.
    """
    begin, window = 0, WINDOW
    while begin < len(text):
        end = min(begin + window, len(text))
        settled = end if end == len(text) else _settled(text, begin, end)
        start = begin
        for piece_end in (ends if window == WINDOW else ends_meanwhile)(text[begin:end]):
            if begin + piece_end > settled:
                break
            yield text[start : begin + piece_end]
            start = begin + piece_end
        window = WINDOW if start > begin else 2 * window
        begin = start


def _settled(text: str, begin: int, end: int) -> int:
    """Up to where the pieces of text[begin:end] are those of the whole text.

    The patterns look ahead past what they take: a few characters, all of a run of white space (`\\s*[\\r\\n]+`) or of
    letters and marks (where capitals may come before others).
    """
    place = end - MARGIN
    belongs = next((each for each in (_is_space, _may_be_letter) if each(text[place])), None)
    while belongs is not None and place > begin and belongs(text[place - 1]):
        place -= 1
    return place


def _is_space(character: str) -> bool:
    return character.isspace()


def _may_be_letter(character: str) -> bool:
    return character.isalpha() or category(character)[0] not in _BETWEEN_LETTERS


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
