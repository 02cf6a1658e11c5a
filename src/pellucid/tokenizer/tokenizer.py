"""Text to token ids and back."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any

from pellucid.core.errors import ContextLengthError, InvalidRequestError, ModelFileError
from pellucid.tokenizer.added_tokens import AddedTokenMatcher
from pellucid.tokenizer.encoders import TextEncoder
from pellucid.tokenizer.least_tokens import least_tokens
from pellucid.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pellucid.tokenizer.chat_template import ChatTemplate


TOKENS_AT_ONCE = 1 << 12
"""Of a long text that is decoded: the part during which no other thread runs."""
LONG_TEXT = 1 << 16
"""Characters. Shorter texts are encoded sooner than it is found out whether they can fit anywhere."""


class Tokenizer:
    """A model's tokenizer. Made by `from_gguf` or `from_file`; safe to use from several threads.

    Attributes:
        bos_token_id, eos_token_id, unknown_token_id, padding_token_id: None where the model has none.
        eos_token_ids: every id that ends generation (end of text, of turn, of message).
        special_ids: ids that stand for no text.
        chat_template: Jinja source, or None.
        strips_leading_space: decoding takes one space off the front, which encoding put there.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: TextEncoder,
        added_tokens: AddedTokenMatcher,
        *,
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        unknown_token_id: int | None = None,
        padding_token_id: int | None = None,
        chat_template: str | None = None,
        strips_leading_space: bool = False,
    ) -> None:
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._added_tokens = added_tokens
        self._prefix_ids = list(prefix_ids)
        self._suffix_ids = list(suffix_ids)
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.eos_token_ids = frozenset(eos_token_ids)
        self.unknown_token_id = unknown_token_id
        self.padding_token_id = padding_token_id
        self.chat_template = chat_template
        self.strips_leading_space = strips_leading_space

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """From the metadata of a GGUF file (the `tokenizer.*` keys of the GGUF specification).

        Raises:
            ModelFileError: a field is missing or malformed.
            UnsupportedModelError: another kind of vocabulary or pre-tokenizer.
        """
        from pellucid.tokenizer.loader import tokenizer_from_gguf

        return tokenizer_from_gguf(metadata)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Tokenizer:
        """From a `tokenizer.json`, and the `tokenizer_config.json` and `chat_template.jinja` beside it, if they are.

        Raises:
            ModelNotFoundError: no such file.
            ModelFileError: the file is malformed.
            UnsupportedModelError: a pipeline other than byte-level or SentencePiece-style BPE.
        """
        from pellucid.tokenizer.tokenizer_json import tokenizer_from_file

        return tokenizer_from_file(path)

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    @property
    def special_ids(self) -> frozenset[int]:
        return self._vocabulary.special_ids

    def is_special(self, token_id: int) -> bool:
        """Whether `token_id` stands for no text. Raises InvalidRequestError if it is not in the vocabulary."""
        self._vocabulary.check_id(token_id)
        return token_id in self._vocabulary.special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; a character may be spread over several. Raises InvalidRequestError out of range."""
        return self._vocabulary.token_bytes(token_id)

    def id_to_token(self, token_id: int) -> str:
        """The token as the vocabulary spells it. Raises InvalidRequestError if out of range."""
        self._vocabulary.check_id(token_id)
        return self._vocabulary.tokens[token_id]

    def first_difference(self, other: Tokenizer) -> int | None:
        """The first id that stands for another token in `other`, or for none in one of the two; None if there is none.

        Tokens are compared as the vocabularies spell them.
        """
        tokens, others = self._vocabulary.tokens, other._vocabulary.tokens
        for token_id, (token, its) in enumerate(zip(tokens, others, strict=False)):
            if token != its:
                return token_id
        return None if len(tokens) == len(others) else min(len(tokens), len(others))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        return self._vocabulary.find(token)

    # Encoding

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        parse_special: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Ids of `text`.

        Args:
            add_special_tokens: adds BOS and EOS where the model wants them.
            parse_special: special tokens spelled out in `text` count as such; else they are plain text.
            max_tokens: a long text that is sure to have more is refused and not encoded. There may be more ids all the
                same.

        Raises:
            InvalidRequestError: `text` is not a string, or holds a lone surrogate.
            ContextLengthError: see `max_tokens`.
        """
        check_text(text)
        self._check_length(text, max_tokens)
        ids = self._prefix_ids.copy() if add_special_tokens else []
        self._append_text(ids, text, parse_special=parse_special, at_start=True)
        if add_special_tokens:
            ids += self._suffix_ids
        return ids

    def encode_batch(
        self, texts: Iterable[str], *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[list[int]]:
        """`encode` of each text; same arguments and errors."""
        return [self.encode(text, add_special_tokens=add_special_tokens, parse_special=parse_special) for text in texts]

    def prepare(self) -> None:
        """Does now, say while weights are loaded, what the first prompt would wait for.

        Raises:
            ModelFileError: the vocabulary holds a token twice. (A faulty chat template is an error only of its use.)
        """
        self.encode(" a 1", parse_special=self.has_chat_template)
        if self.has_chat_template:
            with suppress(ModelFileError):
                self._template  # noqa: B018

    def _check_length(self, text: str, max_tokens: int | None) -> None:
        if max_tokens is None or len(text) < LONG_TEXT or self._added_tokens.swallows:
            return
        spelled = self._encoder.spelled(self._encoder.prepare(text))
        if spelled is None:
            return
        found = least_tokens(spelled, self._vocabulary.longest_tokens, max_tokens)
        if found > max_tokens:
            raise ContextLengthError(
                f"the prompt has {found} tokens or more, but only {max_tokens} fit in the context (max_model_len)",
                param="prompt",
            )

    def _append_text(self, ids: list[int], text: str, *, parse_special: bool, at_start: bool) -> None:
        text = self._encoder.prepare(text)
        position = 0
        for match in self._added_tokens.matches(text, parse_special=parse_special):
            if match.start > position:
                ids += self._encoder.encode(text[position : match.start], at_start=at_start and position == 0)
            ids.append(match.token.token_id)
            position = match.end
        if position < len(text):
            ids += self._encoder.encode(text[position:], at_start=at_start and position == 0)

    # Decoding

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, continuation: bool = False) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD, one for each maximal subpart (Unicode 3.9, D93b).

        Args:
            skip_special_tokens: tokens that stand for no text give none.
            continuation: the text goes on after other text, so a leading space stays where it would be stripped.

        Raises:
            InvalidRequestError: an id is out of range.
        """
        skip = self.special_ids if skip_special_tokens else frozenset()
        token_bytes = self._vocabulary.token_bytes
        decoder = getincrementaldecoder("utf-8")("replace")
        parts: list[str] = []
        remaining = iter(ids)
        while part := list(islice(remaining, TOKENS_AT_ONCE)):
            spelled = [(token_id, token_bytes(token_id)) for token_id in part]
            parts.append(decoder.decode(b"".join([token for token_id, token in spelled if token_id not in skip])))
        text = "".join([*parts, decoder.decode(b"", final=True)])
        return text.removeprefix(" ") if self.strips_leading_space and not continuation else text

    # Chat

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    @cached_property
    def _template(self) -> ChatTemplate:
        from pellucid.tokenizer.chat_template import ChatTemplate

        if self.chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template (it is a base model, not tuned for chat); "
                "give it text to continue instead: `pellucid generate`, or LLM.generate",
                param="messages",
            )

        def token(token_id: int | None) -> str | None:
            return None if token_id is None else self._vocabulary.tokens[token_id]

        return ChatTemplate(
            self.chat_template,
            bos_token=token(self.bos_token_id),
            eos_token=token(self.eos_token_id),
            unk_token=token(self.unknown_token_id),
            pad_token=token(self.padding_token_id),
        )

    @property
    def chat_template_variables(self) -> frozenset[str]:
        """The names that the chat template reads and does not set itself.

        Raises:
            InvalidRequestError: no template.
            ModelFileError: the template is faulty.
        """
        return self._template.variables

    def render_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: object,
    ) -> str:
        """The text that `apply_chat_template` encodes. Same arguments and errors."""
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **template_kwargs
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        **template_kwargs: object,
    ) -> list[int]:
        """Ids of a conversation, as the model's chat template writes it.

        Special tokens take effect where the template writes them. The same characters in a message or a tool stay
        text, so nothing a user writes can end a turn or start another.

        Args:
            messages: mappings with `role` and `content` (text, or parts of type "text").
            add_generation_prompt: ends with the opening of an assistant turn.
            tools: JSON-schema descriptions of functions, for templates that offer them.
            max_tokens: as for `encode`; nor may there be more messages.
            template_kwargs: see `chat_template.TEMPLATE_KWARGS`.

        Raises:
            InvalidRequestError: no template, malformed messages, or the template refuses them.
            ContextLengthError: see `max_tokens`.
            ModelFileError: the template itself is faulty or exceeds its budget.
        """
        if max_tokens is not None and len(messages) > max_tokens:
            raise ContextLengthError(
                f"there are {len(messages)} messages, but only {max_tokens} tokens fit in the context with one that "
                "follows (max_model_len)",
                param="messages",
            )
        marked = self._template.render_marked(
            messages,
            [token.text for token in self._added_tokens.special],
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **template_kwargs,
        )
        self._check_length(marked.text.replace(marked.mark, ""), max_tokens)
        text = self._encoder.prepare(marked.text)
        ids: list[int] = []
        position = 0
        for match in self._added_tokens.matches(text, parse_special=True):
            if match.token.special:
                plain = text[position : match.start].replace(marked.mark, "")
                self._append_text(ids, plain, parse_special=False, at_start=position == 0)
                ids.append(match.token.token_id)
                position = match.end
        self._append_text(ids, text[position:].replace(marked.mark, ""), parse_special=False, at_start=position == 0)
        return ids


def check_text(text: object, param: str = "prompt") -> None:
    """Raises InvalidRequestError unless `text` is a string that UTF-8 can write."""
    if not isinstance(text, str):
        raise InvalidRequestError(f"text is expected, not {type(text).__name__}", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, "
            "which is not valid Unicode text",
            param=param,
        ) from None
