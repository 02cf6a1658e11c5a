from __future__ import annotations

import pytest
from starlette.responses import Response

from pellucid.server.http.draining import RefuseWhileDraining
from pellucid.server.serving import Serving
from pellucid.server.settings import ServerSettings
from tests.support.asgi_client import ask


@pytest.fixture
def serving() -> Serving:
    return Serving(ServerSettings())


def test_work_is_refused_while_draining_and_only_then(serving: Serving) -> None:
    app = RefuseWhileDraining(Response("done"), serving)
    assert ask(app, "POST", "/v1/completions").body == b"done"
    serving.set_draining()
    answer = ask(app, "POST", "/v1/completions", b'{"prompt": "x"}')
    assert answer.status == 503
    assert answer.json()["error"]["code"] == "engine_closed"
    assert (answer.headers["connection"], answer.headers["retry-after"]) == ("close", "1")
    assert ask(app, "GET", "/ready").body == b"done"


def test_in_the_form_of_its_api(serving: Serving) -> None:
    serving.set_draining()
    answer = ask(RefuseWhileDraining(Response("done"), serving), "POST", "/v1/messages")
    assert answer.json()["type"] == "error"
