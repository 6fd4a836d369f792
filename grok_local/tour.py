"""The guided tour: the whole way from a checkpoint to answers, with the built-in model, in under a minute."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from grok_local.errors import PlacementError, VerifyError
from grok_local.folders import scratch_folder
from grok_local.library import names
from grok_local.library.built_in import CHECKPOINT
from grok_local.models.release import Kind
from grok_local.units import format_bytes
from grok_local.views import progress
from grok_local.views.tables import new_table

if TYPE_CHECKING:
    from grok_local.quantize.convert import QuantizeReport
    from grok_local.quantize.sources.checkpoint import Checkpoint
    from grok_local.quantize.verify import TensorCheck, VerifyReport
    from grok_local.runtime.text.reply import Stats

__all__ = ["Tour"]

QUESTIONS = (
    "What is an expert?",
    "How do I quantize Grok-1?",
    "How much RAM does Grok-1 need?",
)


class Tour:
    """Prints to stdout; with `pause` it waits for Enter after each part."""

    def __init__(self, *, pause: bool) -> None:
        self._console = Console(highlight=False, emoji=False)
        self._pause = pause

    def run(self) -> None:
        """All parts. Raises whatever packing, verifying or loading raises."""
        with tempfile.TemporaryDirectory(prefix="grok-local-", dir=scratch_folder()) as folder:
            packed = self._pack(Path(folder) / "tiny-q4_k.gguf")
            self._rest()
            self._verify(packed.path)
            self._rest()
            stats = self._ask(packed.path)
        self._rest()
        self._figures(packed, stats)

    def _pack(self, output: Path) -> QuantizeReport:
        from grok_local.quantize.convert import quantize_checkpoint

        self._title("1. Pack: a checkpoint in the release's format becomes a 4-bit GGUF")
        self._say(
            "The built-in model is Grok-1 in miniature: int8 pickles as xAI released them, 8 experts a layer, 2 of "
            "them active. What happens to it here is what happens to the 318 GB."
        )
        self._command(f"grok-local quantize tiny -o {output.name}")
        with progress.progress_view("pack", as_json=False) as show:
            report = quantize_checkpoint(CHECKPOINT, output, progress=show)
        self._say(f"{report.tensors} tensors, {format_bytes(report.bytes)}, {report.seconds:.2f} s")
        return report

    def _verify(self, path: Path) -> None:
        from grok_local.quantize.sources.recognise import open_checkpoint
        from grok_local.quantize.verify import verify

        self._title("2. Verify: pack again, compare every byte, and say what was lost")
        self._command(f"grok-local verify {path.name} --against tiny")
        report = verify(path, CHECKPOINT)
        if report.problems:
            raise VerifyError(report.problems)
        self._console.print(_classes(open_checkpoint(CHECKPOINT), report))

    def _ask(self, path: Path) -> list[Stats]:
        self._title("3. Ask: llama.cpp runs it, weights mapped")
        self._command("grok-local chat")
        stats = []
        with names.load(path, context=512) as model:
            for question in QUESTIONS:
                self._console.print(f"> {question}", style="bold", markup=False)
                reply = model.chat([{"role": "user", "content": question}], temperature=0, max_tokens=100)
                for piece in reply:
                    self._console.print(piece, end="", markup=False, soft_wrap=True)
                self._console.print("\n")
                stats.append(reply.stats)
        return stats

    def _figures(self, packed: QuantizeReport, stats: list[Stats]) -> None:
        self._title("4. Figures, and what next")
        generated, seconds = sum(s.generated_tokens for s in stats), sum(s.generation_seconds for s in stats)
        read, reading = sum(s.evaluated_tokens for s in stats), sum(s.prompt_seconds for s in stats)
        table = new_table("", "here, tiny", "Grok-1")
        table.add_row("packing", f"{packed.seconds:.2f} s", "minutes (q4_0) to hours (q4_k): docs/quantize.md")
        table.add_row("GGUF", format_bytes(packed.bytes), "181 GB")
        table.add_row("prompts", f"{read / max(reading, 1e-9):.0f} tok/s", "")
        table.add_row("answers", f"{generated / max(seconds, 1e-9):.0f} tok/s", "memory bandwidth / 50 GB")
        self._console.print(table)
        self._say(_fit())
        self._say(_space())
        self._say("Talk to the built-in model:  grok-local chat")
        self._say("Fetch Grok-1 (318 GB):       grok-local pull grok-1")
        self._say("Then pack it:                grok-local quantize grok-1")

    def _title(self, text: str) -> None:
        self._console.print(f"\n{text}\n", style="bold cyan", markup=False)

    def _command(self, text: str) -> None:
        self._console.print(f"$ {text}", style="green", markup=False)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _rest(self) -> None:
        if self._pause:
            with suppress(EOFError):  # Ctrl-D goes on as well
                self._console.input("\n[dim]Enter goes on ...[/]")


def _fit() -> str:
    """Whether Grok-1 fits this machine, from arithmetic alone: its speed would have to be measured first."""
    from grok_local.machine.this_machine import this_machine
    from grok_local.placement.planner import make_plan
    from grok_local.placement.shape import ModelShape
    from grok_local.quantize.outline import outline

    try:
        plan = make_plan(ModelShape.from_headers([outline("grok-1")]), this_machine())
    except PlacementError as error:
        return f"On this machine:             {error}"
    places = [f"{format_bytes(share.used)} in {share.place}" for share in plan.shares if share.used]
    places += [f"{format_bytes(plan.disk)} left on the disk"] * bool(plan.disk)
    return f"Grok-1 on this machine:      {', '.join(places)} (grok-local plan --like grok-1)"


def _space() -> str:
    from grok_local import folders
    from grok_local.machine.disk import RELEASE_SPACE, free_space

    free = free_space(folders.home())
    room = "enough" if free >= RELEASE_SPACE else f"not the {format_bytes(RELEASE_SPACE)} of release and packed file"
    return f"Disk:                        {format_bytes(free)} free in {folders.home()}: {room}"


def _classes(checkpoint: Checkpoint, report: VerifyReport) -> Table:
    """What became of each class of tensors."""
    kinds = {tensor.target.name: tensor.target.kind for tensor in checkpoint.tensors}
    sizes = {tensor.target.name: tensor.nbytes for tensor in checkpoint.tensors}
    stored = {tensor.target.kind: "int8" if tensor.scales else "float32" for tensor in checkpoint.tensors}
    table = new_table("tensors", "count", "released", "size", "in the GGUF", "RMS error")
    for kind in (kind for kind in Kind if kind in stored):
        checks = [check for check in report.tensors if kinds[check.name] is kind]
        size = format_bytes(sum(sizes[check.name] for check in checks))
        types = ", ".join(sorted({check.type for check in checks}))
        table.add_row(kind.value, str(len(checks)), stored[kind], size, types, _loss(checks))
    return table


def _loss(checks: list[TensorCheck]) -> str:
    if all(check.exact for check in checks):
        return "0, exact"
    return f"{sum(check.relative_rms or 0 for check in checks) / len(checks):.4f}"
