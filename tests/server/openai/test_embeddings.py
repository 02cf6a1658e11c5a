from __future__ import annotations

import json
from base64 import b64decode
from typing import Any

import numpy as np
import pytest

from pellucid.core.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from pellucid.core.metrics import RequestMetrics
from pellucid.core.outputs import EmbeddingOutput
from pellucid.core.pooling_params import PoolingParams
from pellucid.server.openai.embeddings import embeddings_body, parse_embeddings
from tests.support.served_models import served_model

MODEL = served_model("m", "also")


def test_the_defaults_are_openais() -> None:
    request = parse_embeddings({"input": "abc"}, MODEL)
    assert not request.is_base64
    pooled = request.pooled
    assert (pooled.model, pooled.prompts, pooled.params) == ("m", [[1, 2, 3]], PoolingParams("mean", normalize=True))
    assert (pooled.priority, pooled.cache_salt) == (0, "")


def test_everything_at_once() -> None:
    body = {
        "model": "also",
        "input": [[1, 2], [3]],
        "encoding_format": "base64",
        "dimensions": 8,
        "user": "me",
        "pooling": "last",
        "normalize": False,
        "add_special_tokens": False,
        "priority": 3,
        "cache_salt": "s",
        "truncate_prompt_tokens": None,
    }
    request = parse_embeddings(body, MODEL)
    assert request.is_base64
    pooled = request.pooled
    assert (pooled.model, pooled.prompts, pooled.params) == ("also", [[1, 2], [3]], PoolingParams("last", False))
    assert (pooled.priority, pooled.cache_salt) == (3, "s")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("input", None, InvalidRequestError),
        ("input", "", InvalidRequestError),
        ("input", "a" * 1001, ContextLengthError),
        ("model", "other", ModelNotFoundError),
        ("model", 3, InvalidRequestError),
        ("encoding_format", "int8", InvalidRequestError),
        ("encoding_format", [], InvalidRequestError),
        ("dimensions", 4, InvalidRequestError),
        ("dimensions", 0, InvalidRequestError),
        ("dimensions", 9, InvalidRequestError),
        ("dimensions", 2**63, InvalidRequestError),
        ("dimensions", 8.0, InvalidRequestError),
        ("pooling", "max", InvalidRequestError),
        ("normalize", 1, InvalidRequestError),
        ("add_special_tokens", "yes", InvalidRequestError),
        ("truncate_prompt_tokens", -1, InvalidRequestError),
        ("messages", [], InvalidRequestError),
        ("temperature", 1, InvalidRequestError),
        ("user", 1, InvalidRequestError),
        ("priority", 2**40, InvalidRequestError),
        ("cache_salt", 1, InvalidRequestError),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(name: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        parse_embeddings({"input": "a", name: value}, MODEL)
    assert caught.value.param == name  # type: ignore[attr-defined]


def test_a_part_of_a_vector_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidRequestError, match=r"dimensions is 4, but this model's vectors have 8"):
        parse_embeddings({"input": "a", "dimensions": 4}, MODEL)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_the_answer_has_every_bit(encoding: str) -> None:
    request = parse_embeddings({"input": ["ab", "cde"], "encoding_format": encoding}, MODEL)
    vectors = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)
    outputs = [EmbeddingOutput(vector, None, [1], RequestMetrics()) for vector in vectors]
    body = json.loads(embeddings_body(request, outputs))
    assert body.keys() == {"object", "data", "model", "usage"}
    assert (body["object"], body["model"]) == ("list", "m")
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    for index, entry in enumerate(body["data"]):
        assert entry.keys() == {"object", "index", "embedding"}
        assert (entry["object"], entry["index"]) == ("embedding", index)
        found = entry["embedding"]
        values = np.frombuffer(b64decode(found), "<f4") if encoding == "base64" else np.array(found)
        assert np.array_equal(values, vectors[index])
