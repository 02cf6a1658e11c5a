"""What operators and clients ask first: is it up, is it ready, which version, which models; and the page at `/`."""

from __future__ import annotations

import html
from pathlib import Path
from string import Template
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pellucid import __version__
from pellucid.core.errors import ModelNotFoundError
from pellucid.server.http.replies import RETRY_AFTER_SECONDS, json_response
from pellucid.server.serving import Serving, serving_of

PAGE = Path(__file__).parents[1] / "page"
FRESH = {"Cache-Control": "no-cache"}
"""Asked for again each time, so that a new version of the server has its own."""


async def health(request: Request) -> Response:
    """200 as long as the process answers at all, whatever the model is doing."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 once the model can be used; 503 before that and while the server drains, with what it is doing."""
    serving = serving_of(request)
    state = readiness(serving)
    if serving.state == "ready":
        return json_response(state)
    return json_response(state, 503, {"Retry-After": str(RETRY_AFTER_SECONDS)})


def readiness(serving: Serving) -> dict[str, Any]:
    """The state of the server, with what belongs to it."""
    state: dict[str, Any] = {"state": serving.state, "models": list(serving.settings.served_model_names)}
    if serving.state == "loading":
        progress = serving.progress
        state["progress"] = {"stage": progress.stage, "done": progress.done, "total": progress.total}
    if serving.failure is not None:
        state["error"] = serving.failure
    if serving.load_seconds is not None:
        state["load_seconds"] = round(serving.load_seconds, 3)
    return state


async def version(request: Request) -> Response:
    """Which Pellucid this is."""
    return json_response({"version": __version__})


async def models(request: Request) -> Response:
    """The names of the model, each as a model of its own."""
    serving = serving_of(request)
    return json_response({"object": "list", "data": [_model(serving, name) for name in serving.model.names]})


async def model(request: Request) -> Response:
    """One of them."""
    serving = serving_of(request)
    name = request.path_params["model"]
    if name not in serving.model.names:
        raise ModelNotFoundError(
            f"no model is served here under this name; there is {', '.join(serving.model.names)}", param="model"
        )
    return json_response(_model(serving, name))


def _model(serving: Serving, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "pellucid",
        "root": serving.settings.model,
        "max_model_len": serving.model.max_model_len,
    }


async def page(request: Request) -> Response:
    """What a person sees who opens the server in a browser."""
    serving = serving_of(request)
    values = {
        "version": __version__,
        "state": serving.state,
        "models": ", ".join(serving.settings.served_model_names),
        "model": serving.settings.served_model_names[0],
        "url": str(request.base_url).rstrip("/"),
    }
    shown = {name: html.escape(value) for name, value in values.items()}
    shown["key"] = "\n  -H 'Authorization: Bearer YOUR_KEY' \\" if serving.settings.api_keys else ""
    shown["routes"] = "".join(_rows(request))
    return Response(_TEMPLATE.substitute(shown), headers=FRESH, media_type="text/html")


def _rows(request: Request) -> list[str]:
    """Of the table of routes: the API first, then what is for operators."""
    rows = []
    routes = [route for route in request.app.routes if isinstance(route, Route) and route.include_in_schema]
    for route in sorted(routes, key=lambda route: (not route.path.startswith("/v1/"), route.path)):
        methods = " ".join(sorted((route.methods or set()) - {"HEAD"}))
        path = html.escape(route.path_format)
        is_link = "GET" in methods and "{" not in path
        shown = f'<a href="{path[1:] or "."}">{path}</a>' if is_link else path
        rows.append(f"<tr><td>{methods}</td><td>{shown}</td></tr>")
    return rows


async def script(request: Request) -> Response:
    """What keeps the page up to date."""
    return Response(_SCRIPT, headers=FRESH, media_type="text/javascript")


async def style(request: Request) -> Response:
    """How the page looks."""
    return Response(_STYLE, headers=FRESH, media_type="text/css")


_TEMPLATE = Template((PAGE / "page.html").read_text(encoding="utf-8"))
_SCRIPT = (PAGE / "page.js").read_bytes()
_STYLE = (PAGE / "page.css").read_bytes()

ROUTES = [
    Route("/", page),
    Route("/page.js", script, include_in_schema=False),
    Route("/page.css", style, include_in_schema=False),
    Route("/health", health),
    Route("/ready", ready),
    Route("/version", version),
    Route("/v1/models", models),
    Route("/v1/models/{model:path}", model),
]
