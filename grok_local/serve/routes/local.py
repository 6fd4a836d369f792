"""What only this server tells: the machine at work, and where tokens go."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from grok_local.errors import RefusedError
from grok_local.serve.bodies import answered
from grok_local.serve.failures import Json
from grok_local.serve.service import Service, service_of

__all__ = ["router"]

router = APIRouter()


@router.get("/local/machine", responses=answered())
async def machine(request: Request) -> Json:
    """The model, its plan, and what goes on now; sizes in bytes, speeds in tokens a second."""
    return Json(await asyncio.to_thread(_machine, service_of(request)))


@router.get("/local/routing", responses=answered())
async def routing(request: Request) -> Json:
    """How many tokens went to each expert of each layer since the start."""
    plan = service_of(request).model.placement.plan
    counts = await asyncio.to_thread(service_of(request).model.engine.routing_counts)
    if counts is None:
        message = "routing is counted where the server was started with --routing-map"
        raise RefusedError(404, message, code="not_counted")
    return Json({"layers": plan.model.layers, "experts": plan.model.experts, "counts": counts})


def _machine(service: Service) -> dict[str, Any]:
    loop, figures = service.loop, service.loop.figures
    experts = service.model.engine.expert_stats()
    tokens = figures.tokens + figures.prompt_tokens
    return {
        "model": service.name,
        "context": service.model.context_size,
        "parallel": loop.places,
        "plan": service.describe(),
        "now": {
            "running": loop.running,
            "queued": len(loop.waiting),
            "tokens_per_second": round(figures.speed, 3),
            "answers": figures.answers,
            "prompt_tokens": figures.prompt_tokens,
            "generated_tokens": figures.tokens,
        },
        "experts": experts.described(tokens) if experts else None,
    }
