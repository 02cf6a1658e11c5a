from __future__ import annotations

import pytest

from tests.support.tokenizers import VOCABULARIES, gguf_tokenizer, vocabulary_path


def expectations(name: str) -> list[tuple[str, list[int]]]:
    path = vocabulary_path(name)
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().split("\n")
    assert texts.pop() == ""
    assert lines.pop() == ""
    return [(text, [int(token_id) for token_id in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("bulk", [False, True])
def test_ids_of_the_shared_vocabularies(name: str, bulk: bool) -> None:
    tokenizer = gguf_tokenizer(vocabulary_path(name))
    if bulk:
        tokenizer.prepare_bulk()
    for text, ids in expectations(name):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
