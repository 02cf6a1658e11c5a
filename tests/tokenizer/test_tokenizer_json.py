from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from pellucid.core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from pellucid.tokenizer import Tokenizer
from tests.support.texts import texts

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
NORMALIZED = {"  ", "self", "</think>"}
SPACE = "▁"


def byte_level() -> LibraryTokenizer:
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level_normalized() -> LibraryTokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def llama_legacy() -> LibraryTokenizer:
    tokenizer = LibraryTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def llama_metaspace() -> LibraryTokenizer:
    tokenizer = LibraryTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = llama_legacy().decoder
    return tokenizer


def gemma() -> LibraryTokenizer:
    tokenizer = LibraryTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


PIPELINES: tuple[Callable[[], LibraryTokenizer], ...] = (
    byte_level,
    byte_level_normalized,
    llama_legacy,
    llama_metaspace,
    gemma,
)


@cache
def trained(pipeline: Callable[[], LibraryTokenizer], byte_fallback: bool = True) -> dict[str, Any]:
    """The tokenizer.json of a small vocabulary with special and added tokens."""
    tokenizer = pipeline()
    is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=SPECIAL + ([] if is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if is_byte_level else [SPACE, *"abcdefghijkl"],
        limit_alphabet=300,
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts(12, 400)), trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", lstrip=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken("  ", normalized=True), AddedToken("self", normalized=True, single_word=True)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    document["added_tokens"] = [entry for entry in document["added_tokens"] if not entry["content"].startswith("<0x")]
    document["model"]["byte_fallback"] = byte_fallback and not is_byte_level
    return document


def write(folder: Path, document: dict[str, Any], **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("byte_fallback", [False, True])
def test_ids_are_those_of_the_library(
    tmp_path: Path, pipeline: Callable[[], LibraryTokenizer], byte_fallback: bool
) -> None:
    path = write(tmp_path, trained(pipeline, byte_fallback))
    library, tokenizer = LibraryTokenizer.from_file(str(path)), Tokenizer.from_file(path)
    for text in [
        *texts(13, 700),
        "a<think> b </think> c",
        "self.x itself  self",
        "<s>a",
        " a",
        "▁a",
        "  <|im_start|> a",
        "self" * 3000,
        "aé字😀" * 2000,
    ]:
        ids = library.encode(text).ids
        assert tokenizer.encode(text, parse_special=True) == ids, text
        prefixed = pipeline is llama_legacy and not NORMALIZED.isdisjoint(map(tokenizer.id_to_token, ids))
        if byte_fallback and not prefixed:  # the library decodes such a token with the space it was matched with
            assert tokenizer.decode(ids) == library.decode(ids), text


def test_special_tokens_stay_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(write(tmp_path, trained(byte_level)))
    ids = tokenizer.encode("<|im_end|> <think>")
    assert tokenizer.token_to_id("<|im_end|>") not in ids
    assert tokenizer.token_to_id("<think>") in ids
    assert tokenizer.decode(ids) == "<|im_end|> <think>"


def test_what_lies_beside(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ bos_token }}!"}
    generation = {"eos_token_id": [2, 3]}
    path = write(tmp_path, trained(gemma), tokenizer_config=config, generation_config=generation)
    tokenizer = Tokenizer.from_file(path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.eos_token_ids == {2, 3, 4}
    assert tokenizer.chat_template == "{{ bos_token }}!"
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert Tokenizer.from_file(path).chat_template == "beside"


@pytest.mark.parametrize(
    ("config", "front", "end"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ],
)
def test_bos_and_eos(tmp_path: Path, config: dict[str, object], front: list[int], end: list[int]) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    tokenizer = Tokenizer.from_file(write(tmp_path, trained(byte_level), tokenizer_config=config))
    text = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == front + text + end


def test_several_templates_by_name(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    path = write(tmp_path, trained(byte_level), tokenizer_config={"chat_template": templates})
    assert Tokenizer.from_file(path).chat_template == "d"


def changed(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(trained(byte_level)))
    for key, value in changes.items():
        (document["model"] if key in document["model"] else document)[key] = value
    return document


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [
        ({"model": {"type": "WordPiece"}}, UnsupportedModelError, "model is 'WordPiece'; supported is BPE"),
        ({"model": {"type": "Unigram"}}, UnsupportedModelError, "model is 'Unigram'; supported is BPE"),
        (changed(dropout=0.1), UnsupportedModelError, "model.dropout is 0.1"),
        (changed(end_of_word_suffix="</w>"), UnsupportedModelError, "end_of_word_suffix is '</w>'"),
        (changed(decoder={"type": "WordPiece"}), UnsupportedModelError, r"decoder is \['WordPiece'\]"),
        (changed(post_processor={"type": "BertProcessing"}), UnsupportedModelError, "post_processor is 'Bert"),
        (changed(pre_tokenizer={"type": "Nonsense"}), ModelFileError, "refused by its library"),
        (changed(merges=[["a", "b", "c"]]), ModelFileError, "a merge is not a pair"),
        (changed(merges=None), ModelFileError, "merges is missing"),
        (changed(vocab={"a": 10**9}), ModelFileError, "not numbered from 0"),
        (changed(vocab={"a": "b"}), ModelFileError, "a number each"),
        (changed(vocab=[]), ModelFileError, "model.vocab is a list"),
        ([], ModelFileError, "an object is expected"),
        ({}, ModelFileError, "model is a NoneType"),
    ],
)
def test_refused(tmp_path: Path, document: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Tokenizer.from_file(write(tmp_path, document))


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b""])
def test_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json (is not valid JSON|cannot be read)"):
        Tokenizer.from_file(path)
