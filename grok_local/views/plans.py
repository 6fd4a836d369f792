"""How a plan is shown: a table, a bar for each place, what a token costs; or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from grok_local.units import format_bytes, printable

if TYPE_CHECKING:
    from grok_local.machine.doctor import Finding
    from grok_local.placement.forecast import Forecast
    from grok_local.placement.plan import Plan, Share
    from grok_local.runtime.text.bench import BenchReport

__all__ = ["bench_table", "describe_plan", "findings_table", "print_plan"]

_BAR = 48
_USUAL_BATCH = 512  # llama.cpp's
_PARTS = (("dense", "cyan"), ("experts", "green"), ("kv", "yellow"), ("compute", "magenta"))


def describe_plan(plan: Plan, prediction: Forecast) -> dict[str, Any]:
    """What `plan --json` prints; sizes in bytes, speeds in tokens a second."""
    return {
        "model": plan.model.name,
        "bytes": plan.model.nbytes,
        "context": plan.context,
        "places": [_described(plan, share) for share in plan.shares],
        "disk": plan.disk,
        "streamed": plan.streamed,
        "batch": plan.batch,
        "repacked_tensors": len(plan.repacked),
        "bytes_per_token": plan.model.read_per_token,
        "tokens_per_second": float(f"{prediction.speed:.6g}"),
        "tokens_per_second_full_context": float(f"{prediction.full_speed:.6g}"),
        "token": [
            {"place": reading.place, "bytes": int(reading.nbytes), "seconds": float(f"{reading.seconds:.6g}")}
            for reading in prediction.readings
        ],
        "llama": llama_options(plan),
        "notes": list(plan.notes),
        "assumptions": list(prediction.assumptions),
    }


def _described(plan: Plan, share: Share) -> dict[str, Any]:
    names = [device.name for device in plan.machine.devices]
    layers = dict(zip(names, plan.layers, strict=True)).get(share.place, plan.model.layers + 1 - plan.gpu_layers)
    return {
        "place": share.place,
        "capacity": share.capacity,
        "used": share.used,
        "layers": layers,
        "expert_layers": plan.expert_layers[share.place],
        "dense": share.dense,
        "experts": share.experts,
        "kv": share.kv,
        "compute": share.compute,
    }


def llama_options(plan: Plan) -> list[str]:
    """The same placement in the options of llama.cpp's own programs."""
    options = ["-c", str(plan.context), "-ngl", str(plan.gpu_layers)]
    if len([count for count in plan.layers if count]) > 1:
        options += ["-ts", ",".join(map(str, plan.layers))]
    for pattern, place in plan.overrides:
        options += ["-ot", f"{pattern}={'CPU' if place == 'RAM' else place}"]
    if plan.batch != _USUAL_BATCH:
        options += ["-b", str(plan.batch), "-ub", str(plan.batch)]
    return options


def print_plan(plan: Plan, prediction: Forecast) -> None:
    """On stdout, as wide as it needs to be where that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(Group(*_parts(plan, prediction)))


def _parts(plan: Plan, prediction: Forecast) -> Iterator[RenderableType]:
    model = plan.model
    yield Text(f"{printable(model.name)}: {format_bytes(model.nbytes)}, {plan.context} tokens of context", style="bold")
    yield _places_table(plan)
    yield _bars(plan)
    yield Text(_token_line(plan, prediction))
    yield _token_table(prediction)
    for note in (*plan.notes, *(f"assumed: {text}" for text in prediction.assumptions)):
        yield Text(note, style="dim")


def _places_table(plan: Plan) -> Table:
    table = Table("place", "layers", "dense", "experts of", "experts", "KV cache", "compute", "used", "of")
    for column in table.columns[1:]:
        column.justify = "right"
    for share in plan.shares:
        found = _described(plan, share)
        sizes = [format_bytes(getattr(share, name)) for name in ("dense", "experts", "kv", "compute", "used")]
        room = format_bytes(max(share.capacity, 0))
        layers, experts = str(found["layers"]), f"{found['expert_layers']} layers"
        table.add_row(escape(share.place), layers, sizes[0], experts, *sizes[1:], room)
    if plan.disk:
        table.add_row("disk", "", "", "", format_bytes(plan.disk), "", "", format_bytes(plan.disk), "")
    return table


def _bars(plan: Plan) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for share in plan.shares:
        percent = 100 * share.used / share.capacity if share.capacity > 0 else 0
        table.add_row(escape(share.place), _bar(share), f"{percent:.0f} %")
    legend = Text("  ").join(Text(f"■ {name.replace('kv', 'KV cache')}", style=colour) for name, colour in _PARTS)
    table.add_row("", legend, "")
    return table


def _bar(share: Share) -> Text:
    bar, filled, total = Text(), 0, 0
    for name, colour in _PARTS:
        total += getattr(share, name)
        end = min(round(_BAR * total / max(share.capacity, total, 1)), _BAR)
        bar.append("█" * (end - filled), style=colour)
        filled = max(filled, end)
    return bar.append("░" * (_BAR - filled), style="dim")


def _token_line(plan: Plan, prediction: Forecast) -> str:
    text = f"a token: {_duration(prediction.seconds)}, {_figure(prediction.speed)} tokens a second"
    if prediction.full_speed < 0.98 * prediction.speed:
        text += f" ({_figure(prediction.full_speed)} with {plan.context} tokens in the context)"
    return text


def _token_table(prediction: Forecast) -> Table:
    table = Table("reads from", "bytes", "time", "speed")
    for reading in prediction.readings:
        speed = f"{format_bytes(reading.nbytes / reading.seconds)}/s" if reading.nbytes else ""
        size = format_bytes(reading.nbytes) if reading.nbytes else ""
        table.add_row(escape(reading.place), size, _duration(reading.seconds), speed)
    return table


def _duration(seconds: float) -> str:
    if seconds < 0:
        return f"-{_duration(-seconds)}"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= 0.9995 * size:
            return f"{_figure(seconds / size)} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def _figure(value: float) -> str:
    """Three figures, without powers of ten."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}" if value >= 0.001 else f"{value:.6f}"


def bench_table(report: BenchReport) -> Table:
    """Measured speeds, and what they are to be compared with."""
    size = f"{format_bytes(report.nbytes)}, {format_bytes(report.bytes_per_token)} a token"
    repacked = f", {report.repacked_tensors} tensors repacked" if report.repacked_tensors else ""
    title = f"{printable(report.model)}: {size}, {report.threads} threads{repacked}"
    table = Table("", "tokens", "tokens a second", title=escape(title), title_justify="left")
    for name, measured in (("prompt", report.prompt), ("generation", report.generation)):
        table.add_row(name, str(measured.tokens), f"{measured.mean:.2f} ± {measured.spread:.2f}")
    table.add_row("predicted generation", "", f"{report.predicted:.2f}{_ratio(report, report.predicted)}")
    if report.limit:
        table.add_row("the memory's limit", "", f"{report.limit:.2f}{_ratio(report, report.limit)}")
    if report.experts:
        read = format_bytes(int(report.experts["bytes_read_per_token"]))
        table.add_row("experts read a token", "", f"{read}, {report.experts['hit_rate']:.0%} were in memory")
    return table


def _ratio(report: BenchReport, other: float) -> str:
    return f"  (measured: {report.generation.mean / other:.2f} of it)" if other else ""


_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


def findings_table(findings: Iterable[Finding]) -> Table:
    """What the doctor found, and below each finding what would help."""
    table = Table("", "", "finding, and what helps")
    for finding in findings:
        text = Text(printable(finding.text))
        if finding.remedy:
            text.append(f"\n{printable(finding.remedy)}", style="cyan")
        status = Text(finding.status, style=_COLOURS[finding.status])
        table.add_row(escape(finding.topic), status, text)
    return table
