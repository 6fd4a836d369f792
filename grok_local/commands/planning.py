"""What this machine is, what fits it, how fast that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from grok_local.commands.options import (
    Bundle,
    Json,
    ModelOption,
    Threads,
    bundled,
    complete_model,
    load_options,
    print_json,
    say,
)
from grok_local.errors import OptionError

if TYPE_CHECKING:
    from grok_local.placement.shape import ModelShape

__all__ = ["bench", "doctor", "plan", "worker"]

_DEFAULT = "tiny"


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
        Optional[str], typer.Option(help="A release, before it is downloaded.", metavar="grok-1|grok-2")
    ] = None,
    type: Annotated[str, typer.Option(help="With --like: the type it would be packed to.")] = "q4_k",
    machine: Bundle = None,
    loading: Bundle = None,
    as_json: Json = False,
) -> None:
    """Show where a model's weights would go, what that takes, and how fast it would be.

    grok-local plan --like grok-1 --ram 128G --vram 24G
    """
    from grok_local.placement.forecast import forecast
    from grok_local.placement.load_options import wishes_of
    from grok_local.placement.planner import make_plan
    from grok_local.views.plans import describe_plan, print_plan

    shape, path = _shape(model, like, type)
    options = dict(loading or {})
    wishes = wishes_of(options)  # type: ignore[arg-type]
    found = _machine(shape, machine or {}, threads=options["threads"], workers=options["workers"], path=path)
    made = make_plan(shape, found, wishes)
    prediction = forecast(made)
    if as_json:
        print_json(describe_plan(made, prediction))
    else:
        print_plan(made, prediction)


@bundled(loading=load_options)
def bench(
    model: ModelOption = "tiny",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1, max=1 << 20)] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1, max=1 << 20)] = 64,
    repeats: Annotated[int, typer.Option(help="How often each is measured.", min=1, max=1000)] = 5,
    loading: Bundle = None,
    as_json: Json = False,
) -> None:
    """Measure how fast a model reads prompts and generates, against the plan's prediction and the memory's bandwidth.

    grok-local bench -m grok-1-q4_k
    """
    from dataclasses import replace

    from grok_local.commands.running import loaded
    from grok_local.machine.kernels import disk_speed, speeds, with_speeds
    from grok_local.runtime.text.bench import bench as measure
    from grok_local.views import tables
    from grok_local.views.plans import bench_table

    with loaded(model, loading) as running:
        planned, threads = running.placement.plan, running.engine.threads
        known = speeds(planned.model.types, threads=threads, say=say)
        devices = with_speeds(planned.machine.devices, planned.model.types, say=say)
        disk = disk_speed(running.path) if planned.disk else 0.0
        machine = replace(planned.machine, speeds=known, devices=tuple(devices), disk_speed=disk)
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
    """Say what llama.cpp was built with, what this machine has, and what would help.

    grok-local doctor
    """
    from dataclasses import asdict

    from grok_local.library import names
    from grok_local.machine.doctor import examine
    from grok_local.views import tables
    from grok_local.views.plans import findings_table

    findings = examine(names.resolve_model(model) if model else None, say=say)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        tables.print_tables([findings_table(findings)])


def worker(
    listen: Annotated[
        str, typer.Option(help="Where clients reach it; 0.0.0.0:50052 is everywhere.", metavar="HOST:PORT")
    ] = "127.0.0.1:50052",
    threads: Threads = None,
) -> None:
    """Lend this machine's memory and GPUs to another's grok-local (--worker there). Trusted networks only.

    grok-local worker --listen 192.168.1.2:50052
    """
    from grok_local.runtime.remote.server import serve_worker

    serve_worker(listen, threads=threads)


def _shape(model: str | None, like: str | None, type: str) -> tuple[ModelShape, Any]:
    """The model's shape, and its file if there is one."""
    from grok_local.formats import gguf_file
    from grok_local.library import names
    from grok_local.placement.shape import ModelShape
    from grok_local.quantize.outline import outline

    if model is not None and like is not None:
        raise OptionError("--model and --like: give one of them")
    if like is not None:
        return ModelShape.from_headers([outline(like.lower(), type=type)]), None
    path = names.resolve_model(model or _DEFAULT)
    return ModelShape.from_headers(gguf_file.read_model(path)), path


def _machine(
    shape: ModelShape, described: dict[str, Any], *, threads: int | None, workers: list[str] | None, path: Any
) -> Any:
    from grok_local.machine.limits import Machine, Speeds, this_machine
    from grok_local.placement.whatif import imagined
    from grok_local.runtime.remote.asking import probe_workers

    imagined(Machine(0, 0, 1, Speeds()), types=shape.types, **described)  # mistakes are told before it takes long
    devices = probe_workers(workers or ())
    types = () if described.get("ram_speed") else shape.types
    found = this_machine(
        types, threads=threads, model=None if described.get("disk_speed") else path, workers=devices, say=say
    )
    return imagined(found, types=shape.types, **described)
