"""`/v1/score`, as vLLM has it: how alike texts are. (https://docs.vllm.ai/en/latest/models/pooling_models.html)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pellucid.core.errors import InvalidRequestError
from pellucid.core.outputs import EmbeddingOutput
from pellucid.core.validation import refusal
from pellucid.server.json_fields import required
from pellucid.server.openai.embeddings import POOLING_FIELDS, PoolingRequest, pooling_request, pooling_usage
from pellucid.server.openai.fields import check_names, without_nulls
from pellucid.server.openai.inputs import input_list
from pellucid.server.served_model import ServedModel

NEUTRAL: dict[str, tuple[object, ...]] = {"truncate_prompt_tokens": (), "mm_processor_kwargs": ({},)}
"""Parameters of vLLM that are not supported, with the values that ask for nothing."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What a body asks for.

    Attributes:
        pooled: the texts of `text_1`, and then those of `text_2`.
        num_first: how many are of `text_1`: one, or as many as of `text_2`.
    """

    pooled: PoolingRequest
    num_first: int


def parse_score(body: Mapping[str, Any], model: ServedModel) -> ScoreRequest:
    """The body of `POST /v1/score`.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
        ContextLengthError: a text does not fit into the context.
        ModelNotFoundError: it asks for another model.
    """
    body = without_nulls(body)
    check_names(body, POOLING_FIELDS | {"text_1", "text_2"}, NEUTRAL)
    texts = {name: _texts(name, required("", body, name)) for name in ("text_1", "text_2")}
    num_first, num_second = map(len, texts.values())
    if num_first not in (1, num_second):
        raise InvalidRequestError(
            f"text_1 has {num_first} texts and text_2 has {num_second}: give one for all, or as many", param="text_1"
        )
    return ScoreRequest(pooling_request(body, model, texts), num_first)


def score_body(request: ScoreRequest, outputs: Sequence[EmbeddingOutput], *, name: str, created: int) -> dict[str, Any]:
    """The body that answers `request`, of which `outputs` has one for each text.

    Args:
        name: unique; the body's `id` is made from it.
        created: seconds since 1970.
    """
    first, second = outputs[: request.num_first], outputs[request.num_first :]
    if request.num_first == 1:
        first = [*first] * len(second)
    scores = [cosine(one, other) for one, other in zip(first, second, strict=True)]
    return {
        "id": f"score-{name}",
        "object": "list",
        "created": created,
        "model": request.pooled.model,
        "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
        "usage": pooling_usage(request.pooled),
    }


def cosine(one: EmbeddingOutput, other: EmbeddingOutput) -> float:
    """Of the angle between two embeddings; 0 where one has no direction."""
    a, b = one.embedding.astype(np.float64), other.embedding.astype(np.float64)
    lengths = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float(np.clip((a * b).sum() / lengths, -1, 1)) if lengths else 0.0


def _texts(name: str, value: Any) -> list[Any]:
    texts = input_list(name, value)
    for text in texts:
        if not isinstance(text, str):
            raise refusal(name, value, "a string, or a list of strings")
    return texts
