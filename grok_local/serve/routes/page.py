"""The page: files of the package, each at a path of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

__all__ = ["router"]

_FOLDER = Path(__file__).parents[1] / "page"
_FIRST = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}


def router() -> APIRouter:
    """A route for every file there is: `/` for the first, and `/page/NAME` for each."""
    found = APIRouter(include_in_schema=False)
    for file in sorted(_FOLDER.rglob("*")):
        if kind := _TYPES.get(file.suffix):
            show = partial(_shown, file.read_bytes(), kind)
            name = file.relative_to(_FOLDER).as_posix()
            for path in [f"/page/{name}", *(["/"] if name == _FIRST else [])]:
                found.add_api_route(path, show, methods=["GET"], name=path)
    return found


def _shown(data: bytes, kind: str) -> Response:
    return Response(data, media_type=kind, headers={"cache-control": "no-cache"})
