"""Every parameter of the clients' own methods is described, and docs/server-api.md says of each what becomes of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anthropic.resources.messages import Messages
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions
from openai.resources.embeddings import Embeddings
from openai.resources.responses import Responses

from tests.server.openapi.test_fields import alternatives

METHODS: dict[str, tuple[str, Callable[..., Any]]] = {
    "POST /v1/chat/completions": ("/v1/chat/completions", ChatCompletions.create),
    "POST /v1/completions": ("/v1/completions", Completions.create),
    "POST /v1/responses": ("/v1/responses", Responses.create),
    "POST /v1/embeddings": ("/v1/embeddings", Embeddings.create),
    "POST /v1/messages": ("/v1/messages", Messages.create),
    "POST /v1/messages/count_tokens": ("/v1/messages/count_tokens", Messages.count_tokens),
}
OF_THE_CLIENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout", "output_format"}
"""What no body has; a class given as `output_format` is sent as a part of `output_config`."""
HEADERS = {"user_profile_id", "workspace_id"}
"""What Anthropic's client sends as headers."""
REST = "The other fields, those beyond OpenAI's among them, are those of chat completions"
COMMON = {"frequency_penalty", "logit_bias", "n", "presence_penalty", "seed", "stop", "stream", "stream_options"}
COMMON |= {"temperature", "top_p", "user", "model"}


def parameters(method: Callable[..., Any]) -> set[str]:
    return inspect.signature(method).parameters.keys() - OF_THE_CLIENT


def described(heading: str) -> set[str]:
    """What the section of the document tells of."""
    text = Path("docs/server-api.md").read_text()
    (section,) = re.findall(rf"^##+ `{re.escape(heading)}`\n(.*?)(?=^##+ `|\Z)", text, re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`([a-z_]+)(?:[.:][^`]*)?`", section))
    return named | COMMON if REST in section else named


@pytest.mark.parametrize("heading", METHODS)
def test_the_document_tells_of_every_parameter(heading: str) -> None:
    assert parameters(METHODS[heading][1]) - described(heading) == set()


@pytest.mark.parametrize("heading", METHODS)
def test_every_parameter_is_known_here(heading: str) -> None:
    path, method = METHODS[heading]
    known = {name for schema in alternatives(path) for name in schema["properties"]}
    assert parameters(method) - HEADERS - known == set()
