"""Chat requests that came in another form: rewritten as bodies of `/v1/chat/completions`, and parsed from there.

So what both forms can say, both get the same tokens for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import check_integer
from pellucid.server.openai.requests import SAMPLING_FIELDS, GenerationRequest, parse_chat_completion
from pellucid.server.openai.response_format import RESPONSE_FORMAT_FIELDS
from pellucid.server.served_model import ServedModel

EXTENSION_FIELDS = (SAMPLING_FIELDS | RESPONSE_FORMAT_FIELDS | {"chat_template_kwargs", "priority", "cache_salt"}) - {
    "response_format",  # each form has its own
    "prompt_logprobs",  # no answer has a place for them
}
"""What a body of another form may have beyond that form, under the names of `/v1/chat/completions`."""

_Renaming = tuple[str, str]


def extensions(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `fields` that are EXTENSION_FIELDS.

    Raises:
        InvalidRequestError: they ask for several answers.
    """
    check_integer("n", fields.get("n", 1), 1, 1, "1: there is one answer")
    return {name: fields[name] for name in EXTENSION_FIELDS & fields.keys()}


def parse_chat_body(body: Mapping[str, Any], model: ServedModel, renamings: tuple[_Renaming, ...]) -> GenerationRequest:
    """`body`, of `/v1/chat/completions`.

    Args:
        renamings: patterns of the names that errors have for what came under other names, and those.

    Raises:
        As `parse_chat_completion`.
    """
    try:
        return parse_chat_completion(body, model)
    except InvalidRequestError as error:
        param = None if error.param is None else _renamed(error.param, renamings)
        raise type(error)(_renamed(error.message, renamings), param=param) from None


def _renamed(text: str, renamings: tuple[_Renaming, ...]) -> str:
    for pattern, name in renamings:
        text = re.sub(rf"\b(?:{pattern})", name, text)
    return text
