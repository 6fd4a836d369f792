"""How a record of routing is shown: a heat map in the terminal, or as a picture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from grok_local.errors import OptionError, OutputError
from grok_local.units import printable
from grok_local.views.tables import new_table

if TYPE_CHECKING:
    from grok_local.runtime.experts.routing import Routing

__all__ = ["describe_routing", "draw_routing", "print_routing"]

_JUDGED = 1000  # tokens at the end of a record, by which memory is judged: of Grok-1 that takes 8 seconds
_SHADES = (17, 18, 19, 25, 31, 37, 72, 107, 142, 178, 214, 208, 202)  # of xterm's 256 colours, cold to hot


def describe_routing(routing: Routing) -> dict[str, Any]:
    """What `routing --json` prints: shares by layer and expert, and what they mean for memory."""
    last = replace(routing, experts=routing.experts[-_JUDGED:])
    return {
        "model": routing.model,
        "tokens": len(routing.experts),
        "shares": [[round(float(share), 6) for share in layer] for layer in routing.shares],
        "repeats": round(routing.repeats, 4),
        "hit_rates": [
            {
                "held": held,
                "streaming": round(last.hit_rate(held), 4),
                "pinned": round(last.pinned_rate(held), 4),
            }
            for held in range(1, routing.count)
        ],
    }


def print_routing(routing: Routing) -> None:
    """On stdout; in colour where that is a terminal."""
    console = Console()
    for part in _parts(routing):
        console.print(part)


def _parts(routing: Routing) -> Iterator[RenderableType]:
    tokens, layers, used = routing.experts.shape
    even = 1 / routing.count
    yield Text(f"{printable(routing.model)}: {tokens} tokens through {layers} layers", style="bold")
    yield f"each chooses {used} of {routing.count} experts; how often each was chosen, by layer, in percent:"
    table = Table.grid(padding=(0, 0))
    table.add_row("layer", *(Text(f"{expert:>5} ") for expert in range(routing.count)))
    for layer, shares in enumerate(routing.shares):
        table.add_row(f"{layer:>5} ", *(_cell(share, even) for share in shares.tolist()))
    yield table
    yield f"of a token's experts, {routing.repeats:.0%} are those of the token before ({used * even:.0%} if by chance)"
    yield _memory_table(routing)


def _cell(share: float, even: float) -> Text:
    shade = _SHADES[min(int(share / even / 2 * len(_SHADES)), len(_SHADES) - 1)]
    return Text(
        f"{100 * share:5.1f} ", style=f"color(231) on color({shade})" if shade < 100 else f"black on color({shade})"
    )


def _memory_table(routing: Routing) -> RenderableType:
    table = new_table("experts held of each layer", "choices found there", "if the hottest stayed")
    for column in table.columns:
        column.justify = "right"
    for row in describe_routing(routing)["hit_rates"]:
        table.add_row(str(row["held"]), f"{row['streaming']:.0%}", f"{row['pinned']:.0%}")
    return table


def draw_routing(routing: Routing, path: Path) -> None:
    """Write the heat map as PNG, SVG or PDF, by the name's ending. Raises OptionError, OutputError."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise OptionError(f"{path}: a picture's name ends in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise OptionError(f"pictures need matplotlib: {sys.executable} -m pip install matplotlib") from None
    tokens, layers, used = routing.experts.shape
    figure = Figure(figsize=(2.5 + 0.55 * routing.count, 1.8 + 0.16 * layers), layout="constrained", dpi=160)
    axes = figure.subplots()
    even = 100 / routing.count
    image = axes.imshow(100 * routing.shares, aspect="auto", cmap="inferno", vmin=0, vmax=max(2 * even, 1))
    axes.set(xlabel="expert", ylabel="layer", xticks=range(routing.count))
    axes.set_title(
        f"{printable(routing.model)}\n{tokens} tokens, {used} of {routing.count} experts", fontsize=10, parse_math=False
    )
    figure.colorbar(image, ax=axes, label=f"percent of a layer's choices (evenly: {even:.3g})")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel(f"{routing.repeats:.0%} of the choices repeat the token before", fontsize=8)
    try:
        figure.savefig(path, bbox_inches="tight")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None
