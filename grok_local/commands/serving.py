"""A model behind HTTP."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from grok_local.commands.options import Bundle, ModelOption, Parallel, Reproducible, bundled, load_options, say
from grok_local.commands.running import opened, shown_packing
from grok_local.errors import GGUFError, OptionError
from grok_local.library.built_in import BUILT_IN

if TYPE_CHECKING:
    from grok_local.placement.load_options import LoadOptions, LoadRequest
    from grok_local.placement.whatif import Width
    from grok_local.runtime.text.model import Model
    from grok_local.serve.jobs.batch_queue import BatchQueue
    from grok_local.serve.service import Service

__all__ = ["serve"]

_MOST = 32  # sequences that are chosen by default: more make each of them slow


@bundled(loading=load_options)
def serve(
    model: ModelOption = BUILT_IN,
    host: Annotated[str, typer.Option(help="Where it listens; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any that is free.", min=0, max=65535)] = 8080,
    name: Annotated[
        Optional[list[str]],
        typer.Option(
            help="It is called so too, as a proxy's pages are or a machine in its network; may be repeated.",
            metavar="NAME",
        ),
    ] = None,
    parallel: Parallel = None,
    reproducible: Reproducible = False,
    queue: Annotated[
        int, typer.Option(help="Answers that may wait; what comes then is to come later.", min=1, max=1 << 20)
    ] = 128,
    api_key: Annotated[
        Optional[str],
        typer.Option(
            help="What clients have to know.  [default: nothing here, elsewhere a new one]", envvar="GROK_LOCAL_API_KEY"
        ),
    ] = None,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Fields of requests that nobody knows are ignored, with a warning.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="The log has what was asked.")] = False,
    routing_map: Annotated[
        bool, typer.Option("--routing-map", help="Count which experts tokens go to, for the page.")
    ] = False,
    template: Annotated[
        Optional[str],
        typer.Option(help="What lays conversations out.  [default: the model's own]", metavar="none|FILE"),
    ] = None,
    loading: Bundle = None,
) -> None:
    """Answer over HTTP as OpenAI's API does: to its clients, and to whatever speaks it.

    grok-local serve -m grok-1-q4_k
    """
    _require_server()
    from grok_local.serve.app import make_app
    from grok_local.serve.guard import names_of
    from grok_local.serve.listening import bound, key_for, listen

    (key, is_new), names = key_for(host, api_key), names_of(name or ())
    with bound(host, port) as sock:
        own = {"template": template, "count_experts": routing_map, "reproducible": reproducible}
        request, width = _fitted(model, {**(loading or {}), **own}, parallel)
        with opened(request) as running, _served(running, model, request, width, queue) as service:
            service.is_lenient, service.logs_prompts = lenient, log_prompts
            app = make_app(service, host=host, key=key, names=names)

            def ready() -> None:
                say(
                    f"serving {model} at {_url(sock.getsockname())}, {width.sequences} answers together; Ctrl-C ends it"
                )
                if is_new:
                    say(f"API key: {key}")

            loop = service.loop
            listen(app, sock, ready=ready, leaving=loop.stop, is_lost=lambda: loop.failure is not None)
            if loop.failure:
                raise loop.failure


@contextmanager
def _served(running: Model, name: str, request: LoadRequest, width: Width, queue: int) -> Iterator[Service]:
    """The model with its thread that computes."""
    from grok_local.formats.identity import identity
    from grok_local.placement.forecast import forecast
    from grok_local.runtime.jobs.batch_job import fingerprint
    from grok_local.serve.engine_loop import EngineLoop
    from grok_local.serve.figures import Figures
    from grok_local.serve.service import Service
    from grok_local.views.plans import describe_plan

    read = forecast(width.plan, together=width.plan.batch)
    figures = Figures(per_token=width.together.seconds, per_prompt_token=read.seconds / width.plan.batch)
    mark = fingerprint(identity(running.engine.headers), request)
    with EngineLoop(running, places=width.sequences, most_waiting=queue, figures=figures) as loop:
        service = Service(
            running,
            name,
            loop,
            mark,
            describe=lambda: describe_plan(running.placement.plan, width.alone, width=width),
            say=say,
        )
        with _batches(service, request) as service.batches:
            yield service


def _batches(service: Service, request: LoadRequest) -> AbstractContextManager[BatchQueue | None]:
    """The batches of this machine, which this server goes on with if no other does."""
    from grok_local.folders import server_folder
    from grok_local.runtime.jobs.batch_job import loaded_with
    from grok_local.runtime.jobs.batch_lines import Author
    from grok_local.serve.jobs.batch_queue import Means, kept_batches

    made_with = loaded_with(service.model.engine.headers, request, context=service.model.context_size)
    author = Author(service.name, service.fingerprint)
    means = Means(service.loop, service.tasks, author, made_with, service.model.context_size, say)
    return kept_batches(server_folder(), means)


def _fitted(model: str, loading: dict[str, Any], parallel: int | None) -> tuple[LoadRequest, Width]:
    """How the model is loaded for many answers together, as many as are fastest here if nobody says."""
    from grok_local.formats.gguf_file import read_model
    from grok_local.library.names import model_request
    from grok_local.placement.runnable import why_not
    from grok_local.placement.shape import ModelShape
    from grok_local.placement.wishes import usual_context
    from grok_local.runtime.jobs.batch_job import chosen_width

    request = model_request(model, cast("LoadOptions", loading), packing=shown_packing)
    headers = read_model(request.path)
    if reason := why_not(headers):
        raise GGUFError(f"{request.path}: {reason}")
    shape = ModelShape.from_headers(headers)
    size = usual_context(shape, request.wishes)
    width = chosen_width(request, shape, context=size, most=_MOST, parallel=parallel, say=say)
    return request.reshaped(parallel=width.sequences, reproducible=request.reproducible), width


def _require_server() -> None:
    """Raises OptionError where FastAPI, uvicorn or what reads forms are missing."""
    try:
        import fastapi  # noqa: F401  # only whether they are there
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise OptionError(
            "serve needs FastAPI and uvicorn: "
            f"{shlex.quote(sys.executable)} -m pip install 'fastapi>=0.115' 'python-multipart>=0.0.20' 'uvicorn>=0.30'"
        ) from None


def _url(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
