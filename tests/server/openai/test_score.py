from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pellucid.core.errors import ContextLengthError, InvalidRequestError
from pellucid.core.metrics import RequestMetrics
from pellucid.core.outputs import EmbeddingOutput
from pellucid.server.openai.score import cosine, parse_score, score_body
from tests.support.served_models import served_model

MODEL = served_model()


def output(*values: float) -> EmbeddingOutput:
    return EmbeddingOutput(np.array(values, np.float32), None, [1], RequestMetrics())


@pytest.mark.parametrize(
    ("first", "second", "num_first"),
    [("a", "b", 1), ("a", ["b", "c"], 1), (["a"], ["b", "c"], 1), (["a", "b"], ["c", "d"], 2)],
)
def test_one_for_all_or_as_many(first: Any, second: Any, num_first: int) -> None:
    request = parse_score({"text_1": first, "text_2": second}, MODEL)
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
    body = score_body(request, [output(1, 0), output(3, 4), output(-2, 0)], name="7", created=5)
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
    outputs = [output(1, 0), output(0, 1), output(0, 1), output(0, 1)]
    assert [entry["score"] for entry in score_body(pairs, outputs, name="7", created=5)["data"]] == [0.0, 1.0]


def test_a_cosine_is_never_beyond_one_and_zero_has_none() -> None:
    vectors = np.random.default_rng(1).standard_normal((200, 5)).astype(np.float32)
    for vector in vectors:
        one = output(*vector)
        assert cosine(one, one) == pytest.approx(1, abs=1e-15)
        assert cosine(one, one) <= 1
    assert cosine(output(0, 0), output(1, 0)) == 0
