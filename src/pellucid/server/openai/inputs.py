"""Texts and token ids of a body: one or many, and of those that are read and not continued, encoded and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pellucid.core.errors import ContextLengthError, InvalidRequestError
from pellucid.core.validation import refusal, shown
from pellucid.server.served_model import ServedModel

MAX_INPUTS = 2048
"""Inputs of one request."""
MAX_INPUT_TOKENS = 300_000
"""Tokens of all of them together. Both limits are OpenAI's."""

_EXPECTED = f"a string, token ids, or a list of 1 to {MAX_INPUTS} of these"


def input_list(name: str, value: Any) -> list[Any]:
    """The inputs that a parameter holds: a string, token ids, or a list of these.

    Raises:
        InvalidRequestError: it is something else, or has none or too many.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise refusal(name, value, _EXPECTED)
    if type(value[0]) is int:
        return [value]
    if len(value) > MAX_INPUTS:
        raise InvalidRequestError(f"{name} must be {_EXPECTED}, not {len(value)} of them", param=name)
    for each in value:
        if not isinstance(each, (str, list)):
            raise refusal(name, each, _EXPECTED)
    return value


def encode_inputs(
    inputs: Mapping[str, Iterable[Any]], model: ServedModel, *, add_special_tokens: bool = True
) -> list[list[int]]:
    """The token ids of all `inputs`, texts or token ids, by the parameter that they come from.

    Raises:
        InvalidRequestError: one is empty or has an id out of the vocabulary, or all together have too many tokens.
        ContextLengthError: one does not fit into the context.
    """
    encoded: list[list[int]] = []
    total = 0
    for name, each in ((name, each) for name, own in inputs.items() for each in own):
        where = f"{name}: number {len(encoded)}"
        if isinstance(each, str):
            token_ids = _encode(each, model, where, name, add_special_tokens=add_special_tokens)
        else:
            token_ids = each
            check_vocabulary(name, token_ids, model)
        if not token_ids:
            raise InvalidRequestError(f"{where} is empty", param=name)
        if len(token_ids) > model.max_model_len:
            raise ContextLengthError(
                f"{where} has {len(token_ids)} tokens, but the context holds {model.max_model_len} tokens "
                "(max_model_len)",
                param=name,
            )
        total += len(token_ids)
        encoded.append(token_ids)
        if total > MAX_INPUT_TOKENS:
            raise InvalidRequestError(
                f"the first {len(encoded)} inputs have {total} tokens together, and one request may have "
                f"{MAX_INPUT_TOKENS}: spread them over several requests",
                param=name,
            )
    return encoded


def _encode(text: str, model: ServedModel, where: str, name: str, *, add_special_tokens: bool) -> list[int]:
    if not text:
        return []
    try:
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens, max_tokens=model.max_model_len)
    except InvalidRequestError as error:  # half a character, or more tokens than are worth counting
        raise type(error)(f"{where}: {error.message}", param=name) from None


def check_vocabulary(name: str, token_ids: list[Any], model: ServedModel) -> None:
    """Raises InvalidRequestError where one of `token_ids` is not an id of the vocabulary."""
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < model.vocab_size:
            raise InvalidRequestError(
                f"{name}: {shown(token_id)} is not a token id; the vocabulary has 0 to {model.vocab_size - 1}",
                param=name,
            )
