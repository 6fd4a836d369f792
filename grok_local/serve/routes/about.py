"""What the server is and does: its model, its health, its figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from grok_local.errors import RefusedError
from grok_local.serve.bodies import answered
from grok_local.serve.failures import Json
from grok_local.serve.service import Service, service_of

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models", responses=answered())
async def models(request: Request) -> Json:
    """The model: there is one."""
    return Json({"object": "list", "data": [_model(service_of(request))]})


@router.get("/v1/models/{id:path}", responses=answered())
async def model(request: Request, id: str) -> Json:
    """The model, whatever it is called: requests may call it anything, too, that is a name."""
    if not id.strip() or not id.isprintable():
        raise RefusedError(404, f"model {id!r:.80}: that is no name", code="not_found", param="id")
    return Json({**_model(service_of(request)), "id": id})


@router.get("/health", responses=answered())
async def health(request: Request) -> Json:
    """Whether it answers: it listens when the model is loaded."""
    if not service_of(request).loop.is_alive:
        raise RefusedError(503, "nothing is answered any more", code="server_stopping")
    return Json({"status": "ok"})


@router.get("/metrics", responses={**answered(), 200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> PlainTextResponse:
    """Figures as Prometheus reads them."""
    lines = "".join(_metrics(service_of(request)))
    return PlainTextResponse(lines, media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(service: Service) -> dict[str, Any]:
    plan, size = service.model.placement.plan, service.model.context_size
    return {
        "id": service.name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "grok-local",
        "max_model_len": size,
        "meta": {
            "n_ctx_train": plan.trained_context,
            "n_vocab": service.model.engine.vocabulary,
            "size": plan.model.nbytes,
        },
    }


def _metrics(service: Service) -> Iterator[str]:
    figures = service.loop.figures
    yield _head("requests_total", "counter", "Requests that were answered")
    for (endpoint, status), count in sorted(service.requests.items()):
        yield f'grok_local_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}\n'
    for name, kind, text, value in (
        ("answers_total", "counter", "Answers that ended", figures.answers),
        ("prompt_tokens_total", "counter", "Tokens of prompts that were evaluated", figures.prompt_tokens),
        (
            "cached_tokens_total",
            "counter",
            "Tokens of prompts that were in the KV cache already",
            figures.cached_tokens,
        ),
        ("generated_tokens_total", "counter", "Tokens of answers", figures.tokens),
        ("prompt_seconds_total", "counter", "Seconds of steps with prompts, for each of them", figures.prompt_seconds),
        ("generation_seconds_total", "counter", "Seconds of steps, for each answer", figures.generation_seconds),
        ("running", "gauge", "Sequences that are computed", service.loop.running),
        ("waiting", "gauge", "Sequences that wait for a place", len(service.loop.waiting)),
        ("places", "gauge", "Sequences that go together", service.loop.places),
        ("tokens_per_second", "gauge", "Tokens of answers in the last ten seconds", figures.speed),
    ):
        yield _head(name, kind, text) + f"grok_local_{name} {value:.10g}\n"


def _head(name: str, kind: str, text: str) -> str:
    return f"# HELP grok_local_{name} {text}.\n# TYPE grok_local_{name} {kind}\n"
