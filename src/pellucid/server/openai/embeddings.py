"""`/v1/embeddings` of the OpenAI API. (https://platform.openai.com/docs/api-reference/embeddings)"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError
from pellucid.core.outputs import EmbeddingOutput
from pellucid.core.pooling_params import PoolingParams
from pellucid.core.validation import check_boolean, check_integer, refusal
from pellucid.server.http.replies import join_list, join_object, json_bytes
from pellucid.server.json_fields import Neutral, required
from pellucid.server.openai.fields import cache_salt, check_names, model_name, priority, without_nulls
from pellucid.server.openai.inputs import encode_inputs, input_list
from pellucid.server.served_model import ServedModel

POOLING_FIELDS = frozenset(("model", "pooling", "add_special_tokens", "priority", "cache_salt"))
"""Parameters of whatever pools prompts, beside its inputs."""
NEUTRAL: Neutral = {"truncate_prompt_tokens": (), "messages": ()}
"""Parameters of vLLM that are not supported."""


@dataclass(frozen=True, slots=True)
class PoolingRequest:
    """Prompts that are to become vectors.

    Attributes:
        model: the model that the body names.
        prompts: token ids.
        params: how each is pooled.
        priority: lower runs first.
        cache_salt: prefix-cache entries are shared only between requests of the same salt.
    """

    model: str
    prompts: list[list[int]]
    params: PoolingParams
    priority: int
    cache_salt: str


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """What a body asks for.

    Attributes:
        pooled: the prompts.
        is_base64: whether vectors come as base64 of little-endian float32, and not as numbers.
    """

    pooled: PoolingRequest
    is_base64: bool


def parse_embeddings(body: Mapping[str, Any], model: ServedModel) -> EmbeddingsRequest:
    """The body of `POST /v1/embeddings`.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
        ContextLengthError: an input does not fit into the context.
        ModelNotFoundError: it asks for another model.
    """
    body = without_nulls(body)
    check_names(body, POOLING_FIELDS | {"input", "encoding_format", "dimensions", "normalize"}, NEUTRAL)
    encoding = body.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise refusal("encoding_format", encoding, '"float" or "base64"')
    if "dimensions" in body:
        dimensions = check_integer("dimensions", body["dimensions"], 1, model.hidden_size)
        if dimensions != model.hidden_size:
            raise InvalidRequestError(
                f"dimensions is {dimensions}, but this model's vectors have {model.hidden_size}: it was not trained "
                "for a part of one to mean anything",
                param="dimensions",
            )
    pooled = pooling_request(body, model, {"input": input_list("input", required("", body, "input"))})
    return EmbeddingsRequest(pooled, encoding == "base64")


def pooling_request(body: Mapping[str, Any], model: ServedModel, inputs: Mapping[str, Sequence[Any]]) -> PoolingRequest:
    """The inputs of a body, by the parameter that each list of them comes from, with what it says of all.

    Raises:
        As `parse_embeddings`.
    """
    name = model_name(body, model)
    params = PoolingParams(body.get("pooling", "mean"), body.get("normalize", True))
    special = check_boolean("add_special_tokens", body.get("add_special_tokens", True))
    rank, salt = priority(body), cache_salt(body)
    prompts = encode_inputs(inputs, model, add_special_tokens=special)
    return PoolingRequest(name, prompts, params, rank, salt)


def embeddings_body(request: EmbeddingsRequest, outputs: Sequence[EmbeddingOutput]) -> bytes:
    """The JSON that answers `request`, of which `outputs` has one for each prompt."""
    data = (
        json_bytes({"object": "embedding", "index": index, "embedding": _written(output.embedding, request.is_base64)})
        for index, output in enumerate(outputs)
    )
    return join_object(
        {
            "object": json_bytes("list"),
            "data": join_list(data),
            "model": json_bytes(request.pooled.model),
            "usage": json_bytes(pooling_usage(request.pooled)),
        }
    )


def pooling_usage(request: PoolingRequest) -> dict[str, int]:
    """How many tokens `request` took: nothing is generated."""
    num_tokens = sum(map(len, request.prompts))
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _written(embedding: NDArray[np.float32], is_base64: bool) -> str | list[float]:
    return b64encode(embedding.astype("<f4").tobytes()).decode() if is_base64 else embedding.tolist()
