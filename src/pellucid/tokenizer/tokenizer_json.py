"""A tokenizer from a `tokenizer.json`, the format of the `tokenizers` library.

Accepted are the pipelines of decoder models: BPE over bytes (GPT-2 and after) and BPE in the manner of SentencePiece
(Llama 2, Gemma). Normalizers and pre-tokenizers are run by the library itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from pellucid.tokenizer.added_tokens import AddedToken, AddedTokenMatcher
from pellucid.tokenizer.byte_pair_encoding import BytePairEncoder, merge_symbols
from pellucid.tokenizer.loader import end_of_generation
from pellucid.tokenizer.tokenizer import Tokenizer
from pellucid.tokenizer.vocabulary import SPACE_SYMBOL, Alphabet, TokenType, Vocabulary

_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def tokenizer_from_file(path: str | PathLike[str]) -> Tokenizer:
    """See `Tokenizer.from_file`."""
    path = Path(path)
    source = _read_json(path)
    if source is None:
        raise ModelNotFoundError(f"{path} does not exist")
    model = _mapping(source.get("model"), "model")
    if model.get("type", "BPE") != "BPE":
        raise _unsupported("model", model.get("type"), "BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _unsupported(f"model.{option}", model[option], "none")
    added = [_mapping(entry, "added_tokens") for entry in source.get("added_tokens") or ()]
    alphabet, strips_leading_space = _decoding(source.get("decoder"))
    vocabulary = _vocabulary(model, added, alphabet)
    config = _read_json(path.with_name("tokenizer_config.json")) or {}
    names = {**(_read_json(path.with_name("special_tokens_map.json")) or {}), **config}

    def token_id(name: str) -> int | None:
        token = names.get(f"{name}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        return vocabulary.find(token) if isinstance(token, str) else None

    bos, eos = token_id("bos"), token_id("eos")
    prefix, suffix = _surrounding(source.get("post_processor"), vocabulary)
    prefix = _honour(config.get("add_bos_token"), bos, prefix)
    suffix = _honour(config.get("add_eos_token"), eos, suffix)
    normalized = [_added(entry) for entry in added if _matched_normalized(entry)]
    raw = [_added(entry) for entry in added if not _matched_normalized(entry)]
    return Tokenizer(
        vocabulary,
        _PipelineEncoder(vocabulary, source, model, normalized),
        AddedTokenMatcher(
            [token for token in raw if not token.special], lambda: [token for token in raw if token.special]
        ),
        prefix_ids=prefix,
        suffix_ids=suffix,
        bos_token_id=bos,
        eos_token_id=eos,
        eos_token_ids=end_of_generation(vocabulary, [eos, *_declared_ends(path, vocabulary)]),
        unknown_token_id=token_id("unk"),
        padding_token_id=token_id("pad"),
        chat_template=_chat_template(path, config),
        strips_leading_space=strips_leading_space,
    )


class _PipelineEncoder:
    """Normalizer, pre-tokenizer and merges of one `tokenizer.json`.

    Args:
        normalized_tokens: added tokens that are looked for in normalized text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        source: Mapping[str, Any],
        model: Mapping[str, Any],
        normalized_tokens: list[AddedToken],
    ) -> None:
        self._vocabulary = vocabulary
        self._model = model
        pre_tokenizer: Any = source.get("pre_tokenizer")
        self._prefixes_start = _prepend_scheme(pre_tokenizer) == "first"
        if self._prefixes_start:  # the library decides by the place in its own input, which here is a stretch of text
            if pre_tokenizer["type"] != "Metaspace":
                raise _unsupported("pre_tokenizer", "a nested Metaspace with prepend_scheme 'first'", "a plain one")
            pre_tokenizer = {**pre_tokenizer, "prepend_scheme": "never"}
        pipeline = _library_tokenizer(
            normalizer=source.get("normalizer"),
            pre_tokenizer=pre_tokenizer,
            model={"type": "BPE", "vocab": {}, "merges": []},
        )
        self._normalize: Callable[[str], str] = pipeline.normalizer.normalize_str if pipeline.normalizer else str
        self._normalized_tokens = AddedTokenMatcher(
            [replace(token, text=self._normalize(token.text)) for token in normalized_tokens], list
        )
        splitter = pipeline.pre_tokenizer
        self._ids: dict[str, int] = model["vocab"]
        self._ranks = _ranks(model.get("merges"))
        self._byte_fallback = bool(model.get("byte_fallback")) and all(token in self._ids for token in _BYTE_TOKENS)
        self._unknown = model.get("unk_token")
        self._bpe = BytePairEncoder(
            (lambda text: [piece for piece, _ in splitter.pre_tokenize_str(text)]) if splitter else lambda text: [text],
            self._encode_piece,
        )

    def prepare(self, text: str) -> str:
        return text

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        text = self._normalize(text)
        ids: list[int] = []
        position = 0
        for match in self._normalized_tokens.matches(text, parse_special=False):
            ids += self._encode_stretch(text[position : match.start], at_start and position == 0)
            ids.append(match.token.token_id)
            position = match.end
        return ids + self._encode_stretch(text[position:], at_start and position == 0)

    def spelled(self, text: str) -> bytes | None:
        return None  # a normalizer may leave anything out

    def _encode_stretch(self, text: str, at_start: bool) -> list[int]:
        if not text:
            return []
        if at_start and self._prefixes_start and text[0] not in (" ", SPACE_SYMBOL):
            text = SPACE_SYMBOL + text
        return self._bpe.encode(text)

    def _encode_piece(self, piece: str) -> list[int]:
        if self._model.get("ignore_merges") and piece in self._ids:
            return [self._ids[piece]]
        symbols = merge_symbols(list(self._symbols(piece)), lambda left, right: self._ranks.get((left, right)))
        try:
            return [self._ids[symbol] for symbol in symbols]
        except KeyError as error:
            raise ModelFileError(f"the merges build {error.args[0]!r}, which is not a token", param="merges") from None

    def _symbols(self, piece: str) -> Iterator[str]:
        unknown = False
        for character in piece:
            if character in self._ids:
                yield character
                unknown = False
            elif self._byte_fallback:
                yield from (_BYTE_TOKENS[byte] for byte in character.encode())
            elif self._unknown is not None:
                if not (unknown and self._model.get("fuse_unk")):
                    yield self._unknown
                unknown = True


def _library_tokenizer(**parts: object) -> Any:
    from tokenizers import Tokenizer as LibraryTokenizer

    document = {"version": "1.0", "added_tokens": [], **parts}
    try:
        return LibraryTokenizer.from_str(json.dumps(document))
    except Exception as error:
        raise ModelFileError(f"tokenizer.json is refused by its library: {error}", param="tokenizer.json") from None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}", param=path.name) from None
    try:
        return _mapping(json.loads(text), path.name)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not valid JSON: {error}", param=path.name) from None


def _mapping(value: object, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelFileError(f"{param} is a {type(value).__name__}; an object is expected", param=param)
    return value


def _unsupported(param: str, found: object, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"tokenizer.json: {param} is {found!r}; supported is {supported}", param=param)


def _vocabulary(model: Mapping[str, Any], added: list[dict[str, Any]], alphabet: Alphabet) -> Vocabulary:
    ids = _mapping(model.get("vocab"), "model.vocab")
    by_id: dict[Any, Any] = {token_id: token for token, token_id in ids.items()}
    by_id |= {entry.get("id"): entry.get("content") for entry in added}
    if not by_id or not all(type(token_id) is int and type(token) is str for token_id, token in by_id.items()):
        raise ModelFileError("tokenizer.json: tokens are text with a number each", param="model.vocab")
    count = max(by_id) + 1
    if min(by_id) < 0 or count > 2 * len(by_id) + 1024:
        raise ModelFileError("tokenizer.json: token ids are not numbered from 0", param="model.vocab")
    types = np.full(count, TokenType.UNUSED, dtype=np.int32)
    types[list(ids.values())] = TokenType.NORMAL
    if model.get("byte_fallback"):
        types[[ids[token] for token in _BYTE_TOKENS if token in ids]] = TokenType.BYTE
    for entry in added:
        types[entry["id"]] = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
    return Vocabulary([by_id.get(token_id, f"[UNUSED{token_id}]") for token_id in range(count)], types, alphabet)


def _ranks(merges: object) -> dict[tuple[str, str], int]:
    if not isinstance(merges, list):
        raise ModelFileError("tokenizer.json: model.merges is missing", param="model.merges")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelFileError("tokenizer.json: a merge is not a pair of tokens", param="model.merges")
    return {(left, right): rank for rank, (left, right) in enumerate(pairs)}


def _matched_normalized(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("normalized")) and not entry.get("special")


def _added(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        entry["id"],
        entry["content"],
        special=bool(entry.get("special")),
        lstrip=bool(entry.get("lstrip")),
        rstrip=bool(entry.get("rstrip")),
        single_word=bool(entry.get("single_word")),
    )


def _steps(component: object, inner: str) -> list[dict[str, Any]]:
    """A component, or the members of a Sequence."""
    if component is None:
        return []
    component = _mapping(component, inner)
    return component[inner] if component.get("type") == "Sequence" else [component]


def _prepend_scheme(pre_tokenizer: object) -> str | None:
    schemes = [step.get("prepend_scheme") for step in _steps(pre_tokenizer, "pretokenizers")]
    return "first" if "first" in schemes else None


def _decoding(decoder: object) -> tuple[Alphabet, bool]:
    """(alphabet, whether a leading space is stripped)."""
    steps = _steps(decoder, "decoders")
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte_level", False
    if kinds == ["Metaspace"]:
        return "sentencepiece", steps[0].get("prepend_scheme", "always") != "never"
    spaces = {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "}
    if spaces in steps and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return "sentencepiece", any(step.get("start") for step in steps if step["type"] == "Strip")
    raise _unsupported("decoder", kinds, "ByteLevel, Metaspace, or Replace with ByteFallback")


def _surrounding(post_processor: object, vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Ids that are put before and after a text."""
    before: list[int] = []
    after: list[int] = []
    for step in _steps(post_processor, "processors"):
        if step.get("type") == "ByteLevel":
            continue
        if step.get("type") != "TemplateProcessing":
            raise _unsupported("post_processor", step.get("type"), "TemplateProcessing or ByteLevel")
        place = before
        for part in step["single"]:
            if "Sequence" in part:
                place = after
            else:
                place += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    for token_id in (*before, *after):
        vocabulary.check_id(token_id)
    return before, after


def _honour(wanted: object, token_id: int | None, found: list[int]) -> list[int]:
    """`tokenizer_config.json` overrules the post-processor where it says whether to add BOS or EOS."""
    if not isinstance(wanted, bool) or token_id is None:
        return found
    others = [other for other in found if other != token_id]
    return [token_id, *others] if wanted else others


def _declared_ends(path: Path, vocabulary: Vocabulary) -> list[int]:
    config = _read_json(path.with_name("generation_config.json")) or {}
    declared = config.get("eos_token_id")
    ends = declared if isinstance(declared, list) else [] if declared is None else [declared]
    for token_id in ends:
        vocabulary.check_id(token_id)
    return ends


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    beside = path.with_name("chat_template.jinja")
    if beside.exists():
        return beside.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelFileError("tokenizer_config.json: chat_template is not text", param="chat_template")
    return template
