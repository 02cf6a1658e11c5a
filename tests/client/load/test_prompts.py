from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pellucid.client.load import prompts
from pellucid.core.errors import InvalidRequestError


def test_common_words_are_as_many_as_asked_and_the_same_for_a_seed() -> None:
    first = list(itertools.islice(prompts.common_words(100, 1), 5))
    assert first == list(itertools.islice(prompts.common_words(100, 1), 5))
    assert first != list(itertools.islice(prompts.common_words(100, 2), 5))
    assert len(set(first)) == 5
    assert {len(prompt.split()) for prompt in first} == {100}
    assert set(" ".join(first).split()) <= set(prompts.COMMON_WORDS)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"a"\n\n{"prompt": "b"}\n{"messages": [{"role": "user", "content": "c"}]}\n')
    found = prompts.from_file(str(path))
    assert found == ["a", "b", [{"role": "user", "content": "c"}]]
    assert list(itertools.islice(prompts.in_turn(found, 4), 4)) == ["b", found[2], "a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"a"\nb\n', "line 2: expected"),
        ("[1]\n", "line 1: expected"),
        ('{"prompt": 1}\n', "line 1: expected"),
        ('{"messages": []}\n', "line 1: expected"),
        ("[" * 100_000, "line 1: expected"),
        ("\n", "has no prompt"),
    ],
)
def test_what_is_no_prompt_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        prompts.from_file(str(path))
    assert caught.value.param == "prompts"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="No such file"):
        prompts.from_file(str(tmp_path / "gone"))
    (tmp_path / "latin").write_bytes(b'"\xff"')
    with pytest.raises(InvalidRequestError, match="not valid UTF-8"):
        prompts.from_file(str(tmp_path / "latin"))
