"""How a plan is shown: a table, a bar for each place, what a token costs; or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from grok_local.placement.whatif import enough_ram
from grok_local.placement.wishes import USUAL_BATCH, Wishes
from grok_local.units import format_bytes, format_figure, format_seconds, printable
from grok_local.views.tables import new_table, output_width

if TYPE_CHECKING:
    from grok_local.machine.doctor import Finding
    from grok_local.placement.forecast import Forecast
    from grok_local.placement.plan import Plan, Share
    from grok_local.placement.whatif import Width
    from grok_local.runtime.jobs.batch_job import Job
    from grok_local.runtime.jobs.bench import BenchReport

__all__ = ["bench_table", "describe_plan", "print_estimate", "print_findings", "print_plan"]

_BAR = 48
_SHOWN = 5  # of many alike
_TOKENS_A_WORD = 1.3  # of English
_EXPLAINED = {"between": "between: norms, attention, moving on"}
_PARTS = (("dense", "cyan"), ("experts", "green"), ("kv", "yellow"), ("compute", "magenta"))


def describe_plan(
    plan: Plan, prediction: Forecast, *, width: Width | None = None, remarks: Sequence[str] = ()
) -> dict[str, Any]:
    """What `plan --json` prints; sizes in bytes, speeds in tokens a second. `width` is how many sequences are to go
    together, and `remarks` join the notes.
    """
    together = {} if width is None else {"together": _described_width(width)}
    return {
        "verdict": verdict(plan, prediction),
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
        **together,
        "llama": llama_options(plan),
        "notes": [*plan.notes, *remarks],
        "assumptions": list(prediction.assumptions),
    }


def _described_width(width: Width) -> dict[str, Any]:
    return {"sequences": width.sequences, "tokens_per_second": float(f"{width.together.speed:.6g}")}


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
    options = ["-c", str(plan.cells), "-ngl", str(plan.gpu_layers), *_sequences(plan)]
    if len(plan.layers) > 1 and plan.gpu_layers:
        options += ["-ts", ",".join(map(str, plan.layers))]
    for pattern, place in plan.overrides:
        options += ["-ot", f"{pattern}={'CPU' if place == 'RAM' else place}"]
    if plan.wishes.kv_type != Wishes().kv_type:
        options += ["-ctk", plan.wishes.kv_type, "-ctv", plan.wishes.kv_type]
    if plan.batch != USUAL_BATCH:
        options += ["-b", str(plan.batch), "-ub", str(plan.batch)]
    return options


def _sequences(plan: Plan) -> list[str]:
    """llama.cpp's programs give each a part of the KV cache unless they are told otherwise."""
    if plan.wishes.sequences == 1:
        return []
    return ["-np", str(plan.wishes.sequences), *([] if plan.wishes.separate else ["-kvu"])]


def verdict(plan: Plan, prediction: Forecast) -> str:
    """What a user wants to know first: where it runs from, how long an answer takes, and what would help."""
    text = f"{_runs_from(plan)}: an answer of 100 words takes about {_waiting(prediction)}"
    better = enough_ram(plan)
    if better and better[1].seconds < 0.9 * prediction.seconds:
        text += f"; with {better[0] / 1e9:.0f} GB of RAM {_waiting(better[1])}"
    return f"{text}."


def _runs_from(plan: Plan) -> str:
    if plan.disk:
        share = plan.disk / max(plan.model.nbytes, 1)
        how = "It runs from the disk" if share > 0.05 else "It nearly fits, and runs partly from the disk"
        return f"{how} ({share:.0%} of it is read as needed)" if plan.streamed else f"{how}, mapped"
    devices = [share for share in plan.shares[:-1] if share.used]
    if devices and not plan.ram.experts:
        return "It fits on the GPU" if len(devices) == 1 else "It fits on the GPUs"
    return "It fits in GPU and RAM together" if devices else "It fits in RAM"


def _waiting(prediction: Forecast) -> str:
    seconds = _TOKENS_A_WORD * 100 * prediction.seconds
    for size, unit in ((3600, "hours"), (60, "minutes"), (1, "seconds")):
        if seconds >= 1.5 * size:
            return f"{_rounded(seconds / size)} {unit}"
    return "a second"


def _rounded(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if value < 3 else f"{value:.0f}"


def print_plan(
    plan: Plan, prediction: Forecast, *, width: Width | None = None, name: str = "", remarks: Sequence[str] = ()
) -> None:
    """On stdout, as wide as it needs to be where that is no terminal. `name` is what `list` calls the model; `width` is
    how many sequences are to go together, and `remarks` come after the plan's notes.
    """
    console = Console(width=min(output_width(), 120))
    console.print(Group(*_parts(plan, prediction, width, name or plan.model.name, remarks)))


def _parts(
    plan: Plan, prediction: Forecast, width: Width | None, name: str, remarks: Sequence[str]
) -> Iterator[RenderableType]:
    size = format_bytes(plan.model.nbytes)
    yield Text(f"{printable(name)}: {size}, {plan.context} tokens of context", style="bold")
    yield Text(verdict(plan, prediction))
    yield _places_table(plan)
    yield _bars(plan)
    yield Text(_token_line(plan, prediction))
    if width and width.sequences > 1:
        speed = f"{format_figure(width.together.speed)} tokens a second in all"
        yield Text(f"{width.sequences} sequences together: {speed}")
    yield _token_table(prediction)
    for note in (*plan.notes, *remarks, *(f"assumed: {text}" for text in prediction.assumptions)):
        yield Text(note, style="dim")


def _places_table(plan: Plan) -> Table:
    titles = ("place", "layers", "dense", "experts of", "experts", "KV cache", "compute", "used")
    table = new_table(*titles)
    for column in table.columns[1:]:
        column.justify = "right"
    for share in plan.shares:
        found = _described(plan, share)
        sizes = [format_bytes(getattr(share, name)) for name in ("dense", "experts", "kv", "compute", "used")]
        layers, experts = str(found["layers"]), f"{found['expert_layers']} layers"
        table.add_row(escape(share.place), layers, sizes[0], experts, *sizes[1:])
    if plan.disk:
        table.add_row("disk", "", "", "", format_bytes(plan.disk), "", "", format_bytes(plan.disk))
    return table


def _bars(plan: Plan) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for share in plan.shares:
        percent = 100 * share.used / share.capacity if share.capacity > 0 else 0
        table.add_row(escape(share.place), _bar(share), f"{percent:.0f} % of {format_bytes(max(share.capacity, 0))}")
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
    text = f"a token: {_duration(prediction.seconds)}, {format_figure(prediction.speed)} tokens a second"
    if prediction.full_speed < 0.98 * prediction.speed:
        text += f" ({format_figure(prediction.full_speed)} with {plan.context} tokens in the context)"
    return text


def _token_table(prediction: Forecast) -> Table:
    table = new_table("reads from", "bytes", "time", "speed")
    for reading in prediction.readings:
        speed = f"{format_bytes(reading.nbytes / reading.seconds)}/s" if reading.nbytes else ""
        size = format_bytes(reading.nbytes) if reading.nbytes else ""
        table.add_row(escape(_EXPLAINED.get(reading.place, reading.place)), size, _duration(reading.seconds), speed)
    return table


def _duration(seconds: float) -> str:
    if seconds < 0:
        return f"-{_duration(-seconds)}"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= 0.9995 * size:
            return f"{format_figure(seconds / size)} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def bench_table(report: BenchReport) -> Table:
    """Measured speeds, and what they are to be compared with."""
    size = f"{format_bytes(report.nbytes)}, {format_bytes(report.bytes_per_token)} a token"
    repacked = f", {report.repacked_tensors} tensors repacked" if report.repacked_tensors else ""
    title = f"{report.model}: {size}, {report.threads} thread{'s' * (report.threads != 1)}{repacked}"
    table = new_table("", "tokens", "tokens a second", caption=title)
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


def print_findings(findings: Iterable[Finding]) -> None:
    """What the doctor found, and below each finding the command that helps, on a line of its own to be copied."""
    console = Console(width=output_width(), highlight=False)
    for finding in findings:
        line = Table.grid(padding=(0, 1))
        line.add_column(width=7)
        text = Text.assemble((finding.topic, "bold"), ": ", printable(finding.text))
        line.add_row(Text(finding.status, style=_COLOURS[finding.status]), text)
        console.print(line)
        if finding.remedy:
            console.print(Text(f"        {printable(finding.remedy)}", style="cyan"), soft_wrap=True)


def print_estimate(job: Job, width: Width, *, chosen: bool) -> None:
    """What a batch would take, on stdout: `chosen` says whether the width was."""
    from grok_local.runtime.jobs.batch_job import estimate

    found = estimate(job, width)
    refused = f", {len(job.refused)} that cannot be answered" if job.refused else ""
    print(f"lines       {len(job.lines)}{refused}")
    print(f"tokens in   {job.prompt_tokens}, beginnings that are shared counted each time")
    print(f"tokens out  {job.most_tokens} at most")
    print(f"context     {job.context} tokens a sequence")
    print(f"together    {width.sequences}: {_why(width, chosen=chosen)}")
    disk = f", {format_bytes(found.from_disk)} read from the disk" if found.from_disk else ""
    print(f"at most     {format_seconds(found.seconds)}{disk}")
    for asked, error in job.refused[:_SHOWN]:
        print(f"line {asked.line.number}: {error}")
    if len(job.refused) > _SHOWN:
        print(f"... and {len(job.refused) - _SHOWN} more")


def _why(width: Width, *, chosen: bool) -> str:
    speed = f"{format_figure(width.together.speed)} tokens a second together, {format_figure(width.alone.speed)} alone"
    kv = f"KV cache {format_bytes(width.plan.ram.kv + sum(share.kv for share in width.plan.shares[:-1]))}"
    return f"{speed}, {kv}" if chosen else f"as was said; {speed}, {kv}"
