"""What this machine is, what fits it, how fast that is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from grok_local.commands.options import (
    TYPES,
    Bundle,
    Json,
    ModelOption,
    Parallel,
    Threads,
    bundled,
    complete_model,
    load_options,
    one_of,
    print_json,
    say,
)
from grok_local.errors import GGUFError, OptionError
from grok_local.library.built_in import BUILT_IN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from grok_local.machine.doctor import Finding
    from grok_local.machine.facts import Machine
    from grok_local.placement.load_options import LoadOptions, LoadRequest
    from grok_local.placement.plan import Plan
    from grok_local.placement.shape import ModelShape
    from grok_local.placement.whatif import WhatIf

__all__ = ["bench", "doctor", "plan", "worker"]


def _described_machine(
    ram: Annotated[Optional[str], typer.Option(help="What if there were so much RAM?", metavar="SIZE")] = None,
    vram: Annotated[
        Optional[str], typer.Option(help="What if there were these GPUs? 0 is none.", metavar="SIZE,SIZE")
    ] = None,
    ram_speed: Annotated[
        Optional[str], typer.Option(help="Bytes a second that products with weights in RAM read.", metavar="SIZE")
    ] = None,
    vram_speed: Annotated[
        Optional[str], typer.Option(help="The same of the GPUs.  [default: 600G]", metavar="SIZE")
    ] = None,
    disk_speed: Annotated[
        Optional[str], typer.Option(help="Bytes a second the disk reads.  [default: measured]", metavar="SIZE")
    ] = None,
) -> None:
    """A machine that is not this one."""


@bundled(machine=_described_machine, loading=load_options)
def plan(
    ctx: typer.Context,
    model: Annotated[
        Optional[str],
        typer.Option(
            "-m",
            "--model",
            help="A GGUF, or a name in the models folder.  [default: the built-in model]",
            metavar="MODEL",
            envvar="GROK_LOCAL_MODEL",
            autocompletion=complete_model,
        ),
    ] = None,
    like: Annotated[
        Optional[str],
        typer.Option(
            help="A release, before it is downloaded.",
            metavar="grok-1|grok-2",
            autocompletion=one_of("grok-1", "grok-2"),
        ),
    ] = None,
    type: Annotated[
        Optional[str],
        typer.Option(
            help="With --like: the type it would be packed to.  [default: q4_k]", metavar="TYPE", autocompletion=TYPES
        ),
    ] = None,
    parallel: Parallel = None,
    machine: Bundle = None,
    loading: Bundle = None,
    as_json: Json = False,
) -> None:
    """Show whether a model fits, where it goes and how fast it is.

    grok-local plan --like grok-1 --ram 128G --vram 24G
    """
    from grok_local.library.names import shown_name
    from grok_local.placement import whatif
    from grok_local.placement.forecast import forecast
    from grok_local.placement.planner import make_plan
    from grok_local.placement.whatif import Width, widest
    from grok_local.views.plans import describe_plan, print_plan

    if like is not None and _from_environment(ctx, "model"):
        model = None
    shape, request = _asked(model, like, type, loading or {})
    supposed = whatif.described(**(machine or {}))  # mistakes are told before it takes long
    request = request.reshaped(parallel=parallel or 1, reproducible=False)
    made = make_plan(shape, _supposed_machine(shape, request, supposed, measure_disk=like is None), request.wishes)
    prediction = forecast(made)
    width = Width(parallel, made, forecast(made, together=parallel), prediction) if parallel else widest(made)
    remarks = [*_space(like, supposed), *_unused(supposed, made)]
    prediction = replace(prediction, assumptions=(*supposed.assumptions(), *prediction.assumptions))
    name = "" if like else shown_name(request.path)
    if as_json:
        print_json(describe_plan(made, prediction, width=width, remarks=remarks))
    else:
        print_plan(made, prediction, width=width, name=name, remarks=remarks)


@bundled(loading=load_options)
def bench(
    model: ModelOption = BUILT_IN,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1, max=1 << 20)] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1, max=1 << 20)] = 64,
    repeats: Annotated[int, typer.Option(help="How often each is measured.", min=1, max=1000)] = 5,
    loading: Bundle = None,
    as_json: Json = False,
) -> None:
    """Measure how fast a model reads prompts and generates, beside what was predicted.

    grok-local bench -m grok-1-q4_k
    """
    from grok_local.commands.running import loaded
    from grok_local.machine.this_machine import this_machine
    from grok_local.runtime.jobs.bench import bench as measure
    from grok_local.views import tables
    from grok_local.views.plans import bench_table

    with loaded(model, loading) as running:
        planned = running.placement.plan
        workers = [device for device in planned.machine.devices if device.kind == "worker"]
        disk = running.path if planned.disk else None
        threads = running.engine.threads
        machine = this_machine(planned.model.types, threads=threads, disk=disk, workers=workers, say=say)
        report = measure(running, machine, prompt=prompt, tokens=tokens, repeats=repeats, say=say)
    if as_json:
        print_json(report.described())
    else:
        tables.print_tables([bench_table(report)])


def doctor(
    model: Annotated[
        Optional[str],
        typer.Option(
            "-m", "--model", help="Look at this model's file too.", metavar="MODEL", autocompletion=complete_model
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine has, and what would help. Exits with 1 where there is a problem.

    grok-local doctor
    """
    from dataclasses import asdict

    from grok_local.library import names
    from grok_local.machine.doctor import examine
    from grok_local.views.plans import print_findings

    path = names.resolve_model(model) if model else None
    findings = [*_of_model(path), *examine(path, say=say)]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_findings(findings)
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


def _of_model(path: Path | None) -> Iterator[Finding]:
    from grok_local.formats.gguf_file import read_model
    from grok_local.machine.doctor import Finding
    from grok_local.placement.runnable import remarks, why_not

    if path is None:
        return
    headers = read_model(path)
    if reason := why_not(headers):
        yield Finding("model", "problem", reason)
    for remark in remarks(headers):
        yield Finding("model", "note", remark)


def worker(
    listen: Annotated[
        str, typer.Option(help="Where clients reach it; 0.0.0.0:50052 is everywhere.", metavar="HOST:PORT")
    ] = "127.0.0.1:50052",
    threads: Threads = None,
) -> None:
    """Lend this machine's memory and GPUs to another's grok-local. There it is --worker; trusted networks only.

    grok-local worker --listen 192.168.1.2:50052
    """
    from grok_local.runtime.remote.server import serve_worker

    serve_worker(listen, threads=threads)


def _from_environment(ctx: typer.Context, name: str) -> bool:
    """Whether an option is only what a variable says it usually is: what is given here has precedence."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "ENVIRONMENT"


def _asked(
    model: str | None, like: str | None, type: str | None, loading: dict[str, Any]
) -> tuple[ModelShape, LoadRequest]:
    """The shape of the model, or of a release that is not here yet, and what is asked for it."""
    from grok_local.formats.gguf_file import read_model
    from grok_local.library.names import model_request
    from grok_local.placement.load_options import load_request
    from grok_local.placement.runnable import why_not
    from grok_local.placement.shape import ModelShape
    from grok_local.quantize.outline import outline

    options = cast("LoadOptions", loading)
    if model is not None and like is not None:
        raise OptionError("--model and --like: give one of them")
    if like is not None:
        header = outline(like.lower(), type="q4_k" if type is None else type)
        return ModelShape.from_headers([header]), load_request(header.path, options)
    if type is not None:
        raise OptionError("--type belongs to --like")
    request = model_request(model or BUILT_IN, options)
    headers = read_model(request.path)
    if reason := why_not(headers):
        raise GGUFError(f"{request.path}: {reason}")
    return ModelShape.from_headers(headers), request


def _space(like: str | None, supposed: WhatIf) -> Iterator[str]:
    """Whether this disk has room for the release and what it is packed to."""
    from grok_local import folders
    from grok_local.machine.disk import RELEASE_SPACE, free_space
    from grok_local.placement import whatif
    from grok_local.units import format_bytes

    free = free_space(folders.home())
    if like == "grok-1" and supposed == whatif.described() and free < RELEASE_SPACE:
        yield (
            f"the release and its 4-bit file take {format_bytes(RELEASE_SPACE)} of disk, and {folders.home()} has "
            f"{format_bytes(free)} free: GROK_LOCAL_HOME moves it to another disk"
        )


def _unused(supposed: WhatIf, made: Plan) -> Iterator[str]:
    from grok_local.ggml.devices import backend_names
    from grok_local.machine.rebuild import unused_gpu

    if supposed.gpus is None and not made.machine.devices and (line := unused_gpu(backend_names())):
        yield line


def _supposed_machine(shape: ModelShape, request: LoadRequest, supposed: WhatIf, *, measure_disk: bool) -> Machine:
    """This machine, with what is described in place of its own; what is described is not measured."""
    from grok_local.machine.this_machine import this_machine
    from grok_local.runtime.remote.probing import probe_workers

    own = this_machine(
        () if supposed.ram_speed else shape.types,
        threads=request.threads,
        disk=request.path if measure_disk and not supposed.disk_speed else None,
        workers=probe_workers(request.workers),
        say=say,
    )
    return supposed.applied_to(own, types=shape.types)
