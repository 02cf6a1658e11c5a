"""`/v1/score` in two forms: how alike texts are, as vLLM has it, and how probable labels are after items, as SGLang has
it. (https://docs.vllm.ai/en/latest/models/pooling_models.html, https://docs.sglang.ai)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pellucid.core.errors import InvalidRequestError
from pellucid.core.outputs import EmbeddingOutput, LabelOutput
from pellucid.core.pooling_params import labelling
from pellucid.core.validation import check_boolean, refusal
from pellucid.server.http.replies import join_list, join_object, json_bytes
from pellucid.server.json_fields import Neutral, required
from pellucid.server.openai.embeddings import POOLING_FIELDS, PoolingRequest, pooling_request, pooling_usage
from pellucid.server.openai.fields import cache_salt, check_names, model_name, priority, without_nulls
from pellucid.server.openai.inputs import check_vocabulary, encode_inputs, input_list
from pellucid.server.served_model import ServedModel

NEUTRAL: Neutral = {"truncate_prompt_tokens": (), "mm_processor_kwargs": ({},)}
"""Parameters of vLLM that are not supported, with the values that ask for nothing."""


LABEL_FIELDS = frozenset(("query", "items", "label_token_ids", "apply_softmax", "item_first"))
"""Parameters of the form with labels."""


@dataclass(frozen=True, slots=True)
class SimilarityRequest:
    """What a body with texts asks for.

    Attributes:
        pooled: the texts of `text_1`, and then those of `text_2`.
        num_first: how many are of `text_1`: one, or as many as of `text_2`.
    """

    pooled: PoolingRequest
    num_first: int


@dataclass(frozen=True, slots=True)
class LabelRequest:
    """What a body with items asks for.

    Attributes:
        pooled: the query with each item.
        applies_softmax: whether the probabilities of the labels are to be those among the labels alone.
    """

    pooled: PoolingRequest
    applies_softmax: bool


def parse_score(body: Mapping[str, Any], model: ServedModel) -> SimilarityRequest | LabelRequest:
    """The body of `POST /v1/score`.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
        ContextLengthError: a text does not fit into the context.
        ModelNotFoundError: it asks for another model.
    """
    body = without_nulls(body)
    is_similarity = "text_1" in body or "text_2" in body or not LABEL_FIELDS & body.keys()
    return _parse_similarity(body, model) if is_similarity else _parse_labels(body, model)


def _parse_similarity(body: Mapping[str, Any], model: ServedModel) -> SimilarityRequest:
    check_names(body, POOLING_FIELDS | {"text_1", "text_2"}, NEUTRAL)
    texts = {name: _texts(name, required("", body, name)) for name in ("text_1", "text_2")}
    num_first, num_second = map(len, texts.values())
    if num_first not in (1, num_second):
        raise InvalidRequestError(
            f"text_1 has {num_first} texts and text_2 has {num_second}: give one for all, or as many", param="text_1"
        )
    return SimilarityRequest(pooling_request(body, model, texts), num_first)


def _parse_labels(body: Mapping[str, Any], model: ServedModel) -> LabelRequest:
    check_names(body, LABEL_FIELDS | {"model", "priority", "cache_salt"})
    query: Any = required("", body, "query")
    items = input_list("items", required("", body, "items"))
    if not isinstance(query, (str, list)):
        raise refusal("query", query, "a string or token ids")
    item_first = check_boolean("item_first", body.get("item_first", False))
    if any(type(item) is not type(query) for item in items):
        raise InvalidRequestError("query and items must be all strings, or all token ids", param="items")
    # One at a time: a long query is never there once for each of many items.
    prompts = (item + query if item_first else query + item for item in items)
    params = labelling(required("", body, "label_token_ids"))
    check_vocabulary("label_token_ids", list(params.label_token_ids), model)
    softmax = check_boolean("apply_softmax", body.get("apply_softmax", False))
    name, rank, salt = model_name(body, model), priority(body), cache_salt(body)
    return LabelRequest(PoolingRequest(name, encode_inputs({"items": prompts}, model), params, rank, salt), softmax)


def label_body(request: LabelRequest, outputs: Sequence[LabelOutput]) -> bytes:
    """The JSON that answers `request`, of which `outputs` has one for each item: for each label, in their order, how
    probable it is to follow."""
    scores = (json_bytes(_probabilities(output, request.applies_softmax)) for output in outputs)
    return join_object(
        {
            "object": json_bytes("scoring"),
            "model": json_bytes(request.pooled.model),
            "scores": join_list(scores),
            "usage": json_bytes(pooling_usage(request.pooled)),
        }
    )


def _probabilities(output: LabelOutput, applies_softmax: bool) -> list[float]:
    logprobs = output.logprobs.astype(np.float64)
    weights = np.exp(logprobs - logprobs.max()) if applies_softmax else np.exp(logprobs)
    probabilities: list[float] = (weights / weights.sum() if applies_softmax else weights).tolist()
    return probabilities


def similarity_body(
    request: SimilarityRequest, outputs: Sequence[EmbeddingOutput], *, name: str, created: int
) -> dict[str, Any]:
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
