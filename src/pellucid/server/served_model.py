"""What the parsers of request bodies need to know of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pellucid.core.errors import ModelNotFoundError
from pellucid.core.validation import shown
from pellucid.engine.loaded_model import LoadedModel
from pellucid.server.chat.formats import PLAIN_TEXT, ChatFormat, chat_format_of
from pellucid.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The loaded model, as requests see it.

    Attributes:
        names: what requests may call it, at least one.
        tokenizer: text to token ids and back.
        max_model_len: most tokens of a prompt and its continuation together.
        vocab_size: how many token ids there are.
        hidden_size: numbers in a hidden state.
        max_output_tokens: most tokens of all continuations that a request may ask for; None for no limit but the
            context.
        chat_format: how it writes tool calls and reasoning.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    hidden_size: int
    max_output_tokens: int | None = None
    chat_format: ChatFormat = PLAIN_TEXT

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        names: Iterable[str],
        *,
        max_output_tokens: int | None = None,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> ServedModel:
        """A model that is loaded, under these names. Raises what `chat_format_of` does, of the two parsers."""
        tokenizer = loaded.tokenizer
        chat_format = chat_format_of(tokenizer, tool_call_parser=tool_call_parser, reasoning_parser=reasoning_parser)
        vocab_size, hidden_size = loaded.spec.vocab_size, loaded.spec.hidden_size
        return cls(
            tuple(names), tokenizer, loaded.max_model_len, vocab_size, hidden_size, max_output_tokens, chat_format
        )

    def check_name(self, model: str) -> None:
        """Raises ModelNotFoundError unless `model` is one of its names."""
        if model not in self.names:
            raise ModelNotFoundError(
                f"the model {shown(model)} is not served here; this one goes by {', '.join(self.names)}", param="model"
            )
