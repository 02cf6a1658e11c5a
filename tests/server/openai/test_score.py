from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from pellucid.core.errors import ContextLengthError, InvalidRequestError
from pellucid.core.metrics import RequestMetrics
from pellucid.core.outputs import EmbeddingOutput, LabelOutput
from pellucid.server.openai.score import (
    LabelRequest,
    SimilarityRequest,
    cosine,
    label_body,
    parse_score,
    similarity_body,
)
from tests.support.served_models import served_model

MODEL = served_model()
LABELS: dict[str, Any] = {"query": "ab", "items": ["c", "d"], "label_token_ids": [5, 7]}


def output(*values: float) -> EmbeddingOutput:
    return EmbeddingOutput(np.array(values, np.float32), None, [1], RequestMetrics())


@pytest.mark.parametrize(
    ("first", "second", "num_first"),
    [("a", "b", 1), ("a", ["b", "c"], 1), (["a"], ["b", "c"], 1), (["a", "b"], ["c", "d"], 2)],
)
def test_one_for_all_or_as_many(first: Any, second: Any, num_first: int) -> None:
    request = parse_score({"text_1": first, "text_2": second}, MODEL)
    assert isinstance(request, SimilarityRequest)
    assert request.num_first == num_first
    assert len(request.pooled.prompts) == num_first + len(second)
    assert request.pooled.params.normalize


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_1": "a"}, "text_2"),
        ({"text_2": "a"}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ({"text_1": "a", "text_2": ""}, "text_2"),
        ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": [1, 2], "text_2": "a"}, "text_1"),
        ({"text_1": "a", "text_2": [["a"]]}, "text_2"),
        ({"text_1": "a", "text_2": "b", "normalize": False}, "normalize"),
        ({"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"text_1": "a", "text_2": "b", "pooling": "cls"}, "pooling"),
        ({"text_1": "a", "text_2": "b", "apply_softmax": True}, "apply_softmax"),
        (LABELS | {"text_2": "a"}, "query"),
        (LABELS | {"query": None}, "query"),
        (LABELS | {"query": 3}, "query"),
        (LABELS | {"items": None}, "items"),
        (LABELS | {"items": []}, "items"),
        (LABELS | {"items": [[1]]}, "items"),
        (LABELS | {"query": [1]}, "items"),
        (LABELS | {"query": [61], "items": [[1]]}, "items"),
        (LABELS | {"label_token_ids": None}, "label_token_ids"),
        (LABELS | {"label_token_ids": []}, "label_token_ids"),
        (LABELS | {"label_token_ids": [61]}, "label_token_ids"),
        (LABELS | {"label_token_ids": [1.5]}, "label_token_ids"),
        (LABELS | {"label_token_ids": [1] * 129}, "label_token_ids"),
        (LABELS | {"apply_softmax": 1}, "apply_softmax"),
        (LABELS | {"item_first": "yes"}, "item_first"),
        (LABELS | {"pooling": "last"}, "pooling"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_score(body, MODEL)
    assert caught.value.param == param


def test_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(ContextLengthError, match="text_2: number 1 has 1001 tokens") as caught:
        parse_score({"text_1": "a", "text_2": "b" * 1001}, MODEL)
    assert caught.value.param == "text_2"


def test_scores_are_cosines() -> None:
    request = parse_score({"text_1": "a", "text_2": ["bb", "c"]}, MODEL)
    assert isinstance(request, SimilarityRequest)
    body = similarity_body(request, [output(1, 0), output(3, 4), output(-2, 0)], name="7", created=5)
    assert body == {
        "id": "score-7",
        "object": "list",
        "created": 5,
        "model": "m",
        "data": [
            {"index": 0, "object": "score", "score": pytest.approx(0.6)},
            {"index": 1, "object": "score", "score": -1.0},
        ],
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }
    pairs = parse_score({"text_1": ["a", "b"], "text_2": ["c", "d"]}, MODEL)
    assert isinstance(pairs, SimilarityRequest)
    outputs = [output(1, 0), output(0, 1), output(0, 1), output(0, 1)]
    assert [entry["score"] for entry in similarity_body(pairs, outputs, name="7", created=5)["data"]] == [0.0, 1.0]


def test_a_cosine_is_never_beyond_one_and_zero_has_none() -> None:
    vectors = np.random.default_rng(1).standard_normal((200, 5)).astype(np.float32)
    for vector in vectors:
        one = output(*vector)
        assert cosine(one, one) == pytest.approx(1, abs=1e-15)
        assert cosine(one, one) <= 1
    assert cosine(output(0, 0), output(1, 0)) == 0


def test_a_query_goes_with_each_item() -> None:
    for options, prompts in (
        ({}, [[1, 2, 3], [1, 2, 4]]),
        ({"item_first": True}, [[3, 1, 2], [4, 1, 2]]),
        ({"query": [9], "items": [[8], [7, 6]]}, [[9, 8], [9, 7, 6]]),
        ({"items": "c"}, [[1, 2, 3]]),
        ({"query": [9], "items": [8]}, [[9, 8]]),
        ({"query": ""}, [[3], [4]]),
    ):
        request = parse_score(LABELS | options, MODEL)
        assert isinstance(request, LabelRequest)
        assert request.pooled.prompts == prompts
        assert request.pooled.params.label_token_ids == (5, 7)
        assert not request.applies_softmax


def test_a_long_query_is_refused_before_it_is_there_for_every_item() -> None:
    tracemalloc.start()
    with pytest.raises(ContextLengthError, match="number 0"):
        parse_score({"query": "a" * 1_000_000, "items": ["b"] * 2000, "label_token_ids": [1]}, MODEL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000


@pytest.mark.parametrize(("applies_softmax", "scores"), [(False, [0.3, 0.1]), (True, [0.75, 0.25])])
def test_labels_have_probabilities(applies_softmax: bool, scores: list[float]) -> None:
    request = parse_score(LABELS | {"items": "c", "apply_softmax": applies_softmax}, MODEL)
    assert isinstance(request, LabelRequest)
    logprobs = np.log([0.3, 0.1]).astype(np.float32)
    body = json.loads(label_body(request, [LabelOutput(logprobs, None, [1, 2, 3], RequestMetrics())]))
    assert body == {
        "object": "scoring",
        "model": "m",
        "scores": [pytest.approx(scores)],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
