"""What other forms of a chat request are rewritten to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pellucid.core.sampling_params import SamplingParams
from pellucid.server.openai.requests import GenerationRequest
from pellucid.server.served_model import ServedModel


class RecordedChats:
    """Stands in for `parse_chat_completion`, and keeps the bodies."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, body: Mapping[str, Any], model: ServedModel) -> GenerationRequest:
        self.bodies.append(dict(body))
        return GenerationRequest(model.names[0], [[1, 2, 3]], SamplingParams(), True, False)
