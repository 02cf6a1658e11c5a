"""`/v1/embeddings` and `/v1/score` as clients see them."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pellucid import LLM
from tests.support.chat_models import write_chat_model
from tests.support.live_server import LiveServer, live_server

TEXTS = ["Hi there", "the end", "naïve 漢字 🙂"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_chat_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[LiveServer]:
    with live_server(model) as server:
        yield server


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model, threads=1, kv_cache_memory=64 << 20) as llm:
        yield llm


def vectors(answer: Any) -> np.ndarray:
    return np.array([entry["embedding"] for entry in answer["data"]])


@pytest.mark.parametrize("options", [{}, {"pooling": "last"}, {"normalize": False}])
def test_vectors_are_those_of_the_engine_to_the_bit(server: LiveServer, llm: LLM, options: dict[str, Any]) -> None:
    wanted = llm.embed(TEXTS, **options)
    answer = server.post("/v1/embeddings", {"input": TEXTS, "model": server.model, **options})
    assert np.array_equal(vectors(answer), [output.embedding for output in wanted])
    assert answer["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in wanted)
    ids = server.post("/v1/embeddings", {"input": [output.prompt_token_ids for output in wanted], **options})
    assert np.array_equal(vectors(ids), vectors(answer))
    assert np.array_equal(vectors(server.post("/v1/embeddings", {"input": TEXTS[1], **options})), vectors(answer)[1:2])


def test_many_come_in_their_order(server: LiveServer, llm: LLM) -> None:
    texts = [f"text {number}" for number in range(300)]
    answer = server.post("/v1/embeddings", {"input": texts})
    assert [entry["index"] for entry in answer["data"]] == list(range(300))
    assert np.array_equal(vectors(answer), [output.embedding for output in llm.embed(texts)])


def test_scores(server: LiveServer) -> None:
    answer = server.post("/v1/score", {"text_1": TEXTS[0], "text_2": TEXTS})
    found = vectors(server.post("/v1/embeddings", {"input": TEXTS}))
    scores = [entry["score"] for entry in answer["data"]]
    assert scores == pytest.approx((found @ found[0]).tolist(), abs=1e-6)
    assert scores[0] == pytest.approx(1)
    assert answer["object"] == "list"
    swapped = server.post("/v1/score", {"text_1": TEXTS, "text_2": [TEXTS[0]] * 3})
    assert [entry["score"] for entry in swapped["data"]] == scores


def test_labels(server: LiveServer, llm: LLM) -> None:
    body = {"query": "Is it so? ", "items": ["Yes", "No way"], "label_token_ids": [10, 20, 30]}
    answer = server.post("/v1/score", body)
    wanted = llm.label_logprobs(["Is it so? Yes", "Is it so? No way"], [10, 20, 30])
    assert answer["scores"] == [np.exp(output.logprobs.astype(np.float64)).tolist() for output in wanted]
    for scores in server.post("/v1/score", {**body, "apply_softmax": True})["scores"]:
        assert sum(scores) == pytest.approx(1)


def test_the_client_of_openai_works_unchanged(server: LiveServer, llm: LLM) -> None:
    openai = pytest.importorskip("openai")
    wanted = [output.embedding for output in llm.embed(TEXTS)]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        for options in ({}, {"encoding_format": "float"}):  # by itself it asks for base64
            answer = client.embeddings.create(model=server.model, input=TEXTS, **options)
            assert np.array_equal(np.array([entry.embedding for entry in answer.data]), wanted)
            assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model=server.model, input="a", dimensions=3)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="other", input="a")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": "a" * 1025}, "input"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input"),
        ("/v1/embeddings", {"input": [[0, 2**63]]}, "input"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(server: LiveServer, path: str, body: Any, param: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(path, body)
    assert caught.value.code == 400
    assert f'"param":"{param}"'.encode() in caught.value.read()
