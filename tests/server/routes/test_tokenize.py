"""`/tokenize` and `/detokenize` as clients see them."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator

import pytest

from tests.support.chat_models import write_chat_model
from tests.support.live_server import LiveServer, live_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(write_chat_model(tmp_path_factory.mktemp("models") / "tiny.gguf")) as server:
        yield server


def test_there_and_back(server: LiveServer) -> None:
    found = server.post("/tokenize", {"model": server.model, "prompt": "naïve 漢字 🙂"})
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 1024
    assert server.post("/detokenize", {"tokens": found["tokens"]}) == {"prompt": "naïve 漢字 🙂"}


def test_a_conversation_is_what_the_model_is_given(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1, "return_token_ids": True})
    assert server.post("/tokenize", {"messages": messages})["tokens"] == answer["choices"][0]["prompt_token_ids"]
    assert server.post("/tokenize", {"messages": messages})["count"] == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(("path", "param"), [("/tokenize", "prompt"), ("/detokenize", "tokens")])
def test_what_is_missing_is_named(server: LiveServer, path: str, param: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(path, {})
    assert caught.value.code == 400
    assert f'"param":"{param}"'.encode() in caught.value.read()
