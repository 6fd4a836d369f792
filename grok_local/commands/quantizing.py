"""From a checkpoint to a GGUF, and what is in them."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from grok_local.commands.options import TYPES, Json, Threads, complete_model, print_json, resumable, say
from grok_local.errors import OptionError, VerifyError
from grok_local.views.terminal import wrapped

__all__ = ["inspect", "quantize", "verify"]


def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="The release's folder, its ckpt-0, or a name that was pulled.")],
    output: Annotated[
        Optional[Path],
        typer.Option(
            "-o", "--output", help="The GGUF.  [default: named after its folder and type, in the models folder]"
        ),
    ] = None,
    type: Annotated[
        str,
        typer.Option(
            help="q4_k, q4_0, iq4_xs, mxfp4, q8_0 (nothing of Grok-1 lost), bf16 (nothing of Grok-2) or f32.",
            autocompletion=TYPES,
        ),
    ] = "q4_k",
    tokenizer: Annotated[
        Optional[Path],
        typer.Option(help="The release's tokenizer.model or tokenizer.tok.json.  [default: in or above the folder]"),
    ] = None,
    threads: Threads = None,
    memory: Annotated[str, typer.Option(help="The process's peak memory; 1.5G is enough for either release.")] = "4G",
    split_size: Annotated[Optional[str], typer.Option(help="Write parts of at most this size.", metavar="SIZE")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Pack Grok-1's or Grok-2's release, or a checkpoint in their formats, into a GGUF.

    Killed or stopped, the same command goes on where it was.

    grok-local quantize ~/grok-1 --tokenizer ~/tokenizer.model
    """
    from grok_local.library import names
    from grok_local.quantize.convert import quantize_checkpoint
    from grok_local.views import progress

    source = names.resolve_checkpoint(checkpoint)
    target = names.named_output(output, type, source)
    with resumable(), progress.progress_view("quantize", as_json=as_json) as show:
        report = quantize_checkpoint(
            source,
            target,
            type=type,
            tokenizer=tokenizer,
            threads=threads,
            memory=memory,
            split_size=split_size,
            force=force,
            progress=show,
        )
    if as_json:
        print_json({"event": "done", **asdict(report)})
    else:
        print("\n".join(progress.quantize_summary(report)), file=sys.stderr)


def verify(
    gguf: Annotated[
        str,
        typer.Argument(help="The GGUF, or any part of one, or a model's name.", autocompletion=complete_model),
    ],
    against: Annotated[
        Optional[Path], typer.Option(help="Pack this checkpoint again and compare every byte.", metavar="CHECKPOINT")
    ] = None,
    sha256: Annotated[
        Optional[str], typer.Option(help="The SHA-256 the whole file must have, as hubs show it.", metavar="HEX")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Check a GGUF against its own hashes, or against its checkpoint.

    grok-local verify grok-1-q4_k.gguf --against ~/grok-1
    """
    from grok_local.library import names
    from grok_local.quantize.verify import verify as check
    from grok_local.views import inspection, progress, tables

    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256.strip()):
        raise OptionError(f"--sha256 {sha256}: 64 hexadecimal digits are wanted")
    with progress.progress_view("verify", as_json=False) as show:
        source = against and names.resolve_checkpoint(against)
        report = check(names.resolve_model(gguf), source, sha256=sha256, progress=show)
    if as_json:
        print_json(asdict(report))
    elif verbose or any(check.problem for check in report.tensors):
        tables.print_tables([inspection.verify_table(report, all_rows=verbose)])
    if not (as_json or report.problems):
        print(wrapped(inspection.verify_summary(report), sys.stdout))
    if report.problems:
        raise VerifyError(report.problems)


def inspect(
    path: Annotated[Path, typer.Argument(help="A GGUF, or a checkpoint's folder.")],
    as_json: Json = False,
) -> None:
    """Show what is in a GGUF or in a checkpoint. No weights are read.

    grok-local inspect ~/grok-1
    """
    from grok_local.library import names
    from grok_local.views import inspection, tables

    source = names.resolve_checkpoint(path)
    if source.is_dir():
        from grok_local.quantize.sources.recognise import open_checkpoint

        checkpoint = open_checkpoint(source)
        described, shown = inspection.describe_checkpoint(checkpoint), inspection.checkpoint_tables(checkpoint)
    else:
        from grok_local.formats import gguf_file
        from grok_local.placement.runnable import remarks, why_not

        headers = gguf_file.read_model(names.resolve_model(str(path)))
        for remark in [text for text in (why_not(headers), *remarks(headers)) if text]:
            say(f"note: {path}: {remark}")
        described, shown = inspection.describe_gguf(headers), inspection.gguf_tables(headers)
    if as_json:
        print_json(described)
    else:
        tables.print_tables(shown)
