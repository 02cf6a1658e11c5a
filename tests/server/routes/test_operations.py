from __future__ import annotations

import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest

from pellucid import __version__
from pellucid.server.app import create_app, routes
from pellucid.server.routes import operations
from pellucid.server.serving import Serving
from pellucid.server.settings import ServerSettings
from tests.support.asgi_client import Answer, ask
from tests.support.fake_tokenizer import FakeTokenizer


def serving_in(state: str, **settings: Any) -> Serving:
    options = {"model": "some/model.gguf", "served_model_names": ("tiny", "org/also"), **settings}
    serving = Serving(ServerSettings(**options))
    if state in ("ready", "draining"):
        tokenizer = FakeTokenizer()
        spec = SimpleNamespace(vocab_size=tokenizer.vocab_size, hidden_size=8)
        serving.set_ready(SimpleNamespace(tokenizer=tokenizer, max_model_len=1000, spec=spec))  # type: ignore[arg-type]
    if state == "draining":
        serving.set_draining()
    if state == "failed":
        serving.set_failed("no such tensor")
    return serving


def get(path: str, state: str = "ready", method: str = "GET", **settings: Any) -> Answer:
    return ask(create_app(serving_in(state, **settings)), method, path)


@pytest.mark.parametrize("state", ["loading", "ready", "draining", "failed"])
def test_the_process_is_healthy_whatever_the_model_does(state: str) -> None:
    answer = get("/health", state)
    assert (answer.status, answer.json()) == (200, {"status": "ok"})
    assert get("/version", state).json() == {"version": __version__}


def test_ready_only_while_requests_are_taken() -> None:
    ready = get("/ready")
    assert ready.status == 200
    assert ready.json()["load_seconds"] >= 0
    for state in ("loading", "draining", "failed"):
        answer = get("/ready", state)
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["state"] == state
    assert get("/ready", "failed").json()["error"] == "no such tensor"
    assert get("/ready", "loading").json()["progress"] == {"stage": "starting", "done": 0, "total": 0}


def test_every_name_of_the_model_is_a_model() -> None:
    answer = get("/v1/models").json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == ["tiny", "org/also"]
    for model in answer["data"]:
        assert model.keys() == {"id", "object", "created", "owned_by", "root", "max_model_len"}
        assert (model["object"], model["max_model_len"], model["root"]) == ("model", 1000, "some/model.gguf")
        assert get(f"/v1/models/{model['id']}").json() == model | {
            "created": get("/v1/models").json()["data"][0]["created"]
        }


def test_another_model_is_not_found() -> None:
    answer = get("/v1/models/other")
    assert answer.status == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "tiny, org/also" in answer.json()["error"]["message"]


def test_there_are_no_models_before_one_is_loaded() -> None:
    for path in ("/v1/models", "/v1/models/tiny"):
        answer = get(path, "loading")
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "model_not_ready"


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/v1/chat/completions", "did you mean /v1/chat/completions?"),
        ("/models", "did you mean /v1/models?"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/healthz", "did you mean /health?"),
        ("/" + "x" * 30_000, "/ lists what there is"),
        ("/wp-login.php", "/ lists what there is"),
    ],
)
def test_what_is_not_there_is_said_with_what_is_near(path: str, near: str) -> None:
    answer = get(path)
    assert answer.status == 404
    message = answer.json()["error"]["message"]
    assert message.endswith(near)
    assert len(message) < 300


def test_a_method_that_a_route_does_not_take() -> None:
    answer = get("/v1/models", method="DELETE")
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS"
    assert answer.json()["error"]["code"] == "method_not_allowed"
    options = get("/v1/chat/completions", method="OPTIONS")
    assert (options.status, options.headers["allow"], options.body) == (204, "OPTIONS, POST", b"")
    assert get("/nowhere", method="OPTIONS").status == 404
    assert get("/ready", method="HEAD").status == 200


class Page(HTMLParser):
    """Elements with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


@pytest.mark.parametrize("state", ["loading", "ready", "failed"])
def test_the_page_says_the_state_and_how_to_go_on(state: str) -> None:
    answer = get("/", state)
    text = answer.body.decode()
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert f'<strong id="state">{state}</strong>' in text
    assert "curl http://localhost:8000/v1/chat/completions" in re.sub("<[^>]*>", "", text)
    for route in ("/v1/models", "/v1/chat/completions", "/metrics"):
        assert route in text
    assert "/page.js" not in text
    assert "YOUR_KEY" not in text


def test_the_example_has_a_key_where_one_is_asked_for() -> None:
    app = create_app(serving_in("ready", api_keys=["sesame"]))
    assert ask(app, "GET", "/").status == 401
    text = ask(app, "GET", "/", authorization="Bearer sesame").body.decode()
    assert "-H &#x27;Authorization" not in text
    assert "  -H 'Authorization: Bearer YOUR_KEY' \\\n" in text
    assert "sesame" not in text


def test_the_page_needs_nothing_from_elsewhere_and_holds_to_its_policy() -> None:
    page = Page(get("/").body.decode())
    known = {route.path for route in routes()}
    for tag, attributes in page.elements:
        assert not any(name == "style" or name.startswith("on") for name in attributes), tag
        for name in ("src", "href"):
            target = attributes.get(name)
            if target is not None and target != "data:,":
                assert ":" not in target
                assert not target.startswith("/")  # a proxy may have put the server under a path of its own
                assert f"/{target.removeprefix('.')}" in known
        assert tag != "script" or attributes.get("src") == "page.js"
    script = operations._SCRIPT.decode()
    assert not re.search(r"innerHTML|outerHTML|document\.write|eval\(|https?:", script)


def test_the_page_can_be_heard() -> None:
    page = Page(get("/").body.decode())
    assert ("html", {"lang": "en"}) in page.elements
    tags = [tag for tag, _ in page.elements]
    assert [tag for tag in tags if re.fullmatch("h[1-6]", tag)] == ["h1", "h2", "h2", "h2"]
    assert any(attributes.get("role") == "status" for _, attributes in page.elements)
    labels = {attributes.get("aria-labelledby") for tag, attributes in page.elements if tag == "section"}
    assert labels <= {attributes.get("id") for _, attributes in page.elements}


def test_names_are_text_on_the_page_not_markup() -> None:
    text = get("/", served_model_names=("<script>alert(1)</script>", "a'b\"c")).body.decode()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_markup_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mutant: a page that takes names as they are.
    monkeypatch.setattr(operations.html, "escape", lambda text: text)
    assert "<script>alert" in get("/", served_model_names=("<script>alert(1)</script>",)).body.decode()
