from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models

from pellucid.tokenizer.added_tokens import AddedToken, AddedTokenMatcher


def matcher(*tokens: AddedToken) -> AddedTokenMatcher:
    return AddedTokenMatcher(
        [token for token in tokens if not token.special], lambda: [token for token in tokens if token.special]
    )


def split(tokens: AddedTokenMatcher, text: str, *, parse_special: bool = True) -> list[str | int]:
    parts: list[str | int] = []
    position = 0
    for match in tokens.matches(text, parse_special=parse_special):
        parts += [text[position : match.start], match.token.token_id]
        position = match.end
    return [part for part in [*parts, text[position:]] if part != ""]


def library_split(tokens: list[AddedToken], text: str) -> list[str | int]:
    """What the tokenizers library does, with a model that gives one unknown token for what is between."""
    library = LibraryTokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    for token in tokens:
        library.add_tokens(
            [
                LibraryToken(
                    token.text,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                    normalized=False,
                )
            ]
        )
    encoding = library.encode(text)
    found = zip(encoding.ids, encoding.offsets, strict=True)
    return [token_id or text[start:end] for token_id, (start, end) in found]


ALPHABET = "ab< \n"
added_tokens = st.lists(
    st.builds(
        lambda text, lstrip, rstrip, single_word: (text, lstrip, rstrip, single_word),
        st.text("ab<", min_size=1, max_size=4),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    max_size=6,
    unique_by=lambda drawn: drawn[0],
)


@given(added_tokens, st.text(ALPHABET, max_size=24))
def test_splits_as_the_library_does(drawn: list[tuple[str, bool, bool, bool]], text: str) -> None:
    tokens = [
        AddedToken(index + 1, token, special=False, lstrip=lstrip, rstrip=rstrip, single_word=single_word)
        for index, (token, lstrip, rstrip, single_word) in enumerate(drawn)
    ]
    assert split(matcher(*tokens), text) == library_split(tokens, text)


def test_special_tokens_are_matched_only_on_demand() -> None:
    tokens = matcher(AddedToken(1, "<s>", special=True), AddedToken(2, "<b>", special=False))
    assert split(tokens, "x<s><b>", parse_special=True) == ["x", 1, 2]
    assert split(tokens, "x<s><b>", parse_special=False) == ["x<s>", 2]


def test_special_tokens_are_loaded_only_on_demand() -> None:
    def load() -> list[AddedToken]:
        raise AssertionError("not needed")

    tokens = AddedTokenMatcher([AddedToken(2, "<b>", special=False)], load)
    assert split(tokens, "x<b>", parse_special=False) == ["x", 2]
    with pytest.raises(AssertionError, match="not needed"):
        split(tokens, "x<b>", parse_special=True)


def test_longest_first() -> None:
    tokens = matcher(*(AddedToken(count, "\n" * count, special=False) for count in (1, 2, 3)))
    assert split(tokens, "\n" * 8) == [3, 3, 2]


def test_an_empty_token_is_never_matched() -> None:
    assert split(matcher(AddedToken(1, "", special=False)), "ab") == ["ab"]


def test_white_space_of_the_vocabulary_is_swallowed_too() -> None:
    token = AddedToken(1, "<s>", special=False, rstrip=True)
    tokens = AddedTokenMatcher([token], list, extra_white_space="_")
    assert split(tokens, "<s>__ \nx") == [1, "x"]
    assert split(AddedTokenMatcher([token], list), "<s>__ \nx") == [1, "__ \nx"]
