"""What is in a GGUF or in a checkpoint, and what checking it found: tables, or what `--json` prints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from grok_local.units import format_bytes, printable
from grok_local.views.tables import cell, new_table, output_width

if TYPE_CHECKING:
    from grok_local.formats.gguf_file import Header
    from grok_local.quantize.sources.checkpoint import Checkpoint
    from grok_local.quantize.verify import TensorCheck, VerifyReport

__all__ = ["checkpoint_tables", "describe_checkpoint", "describe_gguf", "gguf_tables", "verify_summary", "verify_table"]

_WIDE = 140  # columns that checkpoints' long names need
_LONG = 8  # items of an array that are shown
_NUMBERS = {"i1": "int8", "bf16": "bfloat16", "f2": "float16", "f4": "float32"}


def describe_gguf(headers: list[Header]) -> dict[str, Any]:
    """What `inspect --json` prints for a GGUF."""
    return {
        "kind": "gguf",
        "files": [str(header.path) for header in headers],
        "bytes": sum(header.size for header in headers),
        "metadata": {key: _plain(value) for key, value in headers[0].metadata.items()},
        "tensors": [
            {
                "name": t.name,
                "type": t.type.name,
                "shape": t.shape,
                "bytes": t.nbytes,
                "offset": t.offset,
                "file": t.path.name,
            }
            for header in headers
            for t in header.tensors
        ],
    }


def _plain(value: Any) -> Any:
    """The value as JSON has it; of a long array, the beginning."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bool | int | float | str):
        return value
    items = [
        _plain(item.item() if hasattr(item, "item") and not hasattr(item, "__len__") else item)
        for item in value[:_LONG]
    ]
    return items if len(value) <= _LONG else {"length": len(value), "first": items}


def gguf_tables(headers: list[Header]) -> Iterator[Table]:
    """Metadata, then tensors."""
    described = describe_gguf(headers)
    keys = new_table("key", "value", caption=f"{headers[0].path.name}: {format_bytes(described['bytes'])}")
    for key, value in described["metadata"].items():
        long = isinstance(value, dict)
        keys.add_row(cell(key), cell(f"{value['length']} of {value['first']} ..." if long else str(value)))
    yield keys
    tensors = new_table("tensor", "type", "shape", "size", "offset")
    for tensor in described["tensors"]:
        tensors.add_row(*_tensor_row(tensor), str(tensor["offset"]))
    yield tensors


def _tensor_row(tensor: dict[str, Any]) -> tuple[str, str, str, str]:
    return cell(tensor["name"]), tensor["type"], " x ".join(map(str, tensor["shape"])), format_bytes(tensor["bytes"])


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `inspect --json` prints for a checkpoint."""
    return {
        "kind": "checkpoint",
        "release": checkpoint.release.name,
        "folder": str(checkpoint.folder),
        "bytes": checkpoint.nbytes,
        "dimensions": asdict(checkpoint.dimensions),
        "tensors": [
            {
                "name": tensor.where,
                "type": _NUMBERS[tensor.dtype],
                "shape": tensor.stored_shape,
                "bytes": tensor.nbytes,
                "scales": tensor.scales.shape if tensor.scales else None,
                "file": tensor.file_name,
                "files": [path.name for path in tensor.paths],
                "becomes": tensor.target.name,
            }
            for tensor in checkpoint.tensors
        ],
    }


def checkpoint_tables(checkpoint: Checkpoint) -> Iterator[Table]:
    """Dimensions, then tensors."""
    described = describe_checkpoint(checkpoint)
    size = format_bytes(checkpoint.nbytes)
    dims = new_table(
        "dimension", "size", caption=f"{checkpoint.folder}: a checkpoint in {checkpoint.release.title}'s format, {size}"
    )
    for name, size in described["dimensions"].items():
        dims.add_row(name.replace("_", " "), str(size))
    yield dims
    wide = output_width() >= _WIDE
    tensors = new_table("file", *(["tensor"] if wide else []), "type", "shape", "size", "becomes")
    for tensor in described["tensors"]:
        name, *rest = _tensor_row(tensor)
        tensors.add_row(tensor["file"], *([name] if wide else []), *rest, tensor["becomes"])
    yield tensors


def verify_summary(report: VerifyReport) -> str:
    """One line: what was checked, where nothing is wrong."""
    tensors = report.tensors
    start = f"{printable(str(report.path))}: {len(tensors)} tensors"
    if tensors and tensors[0].max_error is not None:
        exact = sum(check.exact for check in tensors)
        worst = max((check.relative_rms or 0.0 for check in tensors), default=0.0)
        return f"{start}, as packing the checkpoint gives them; {exact} exact, relative RMS error at most {worst:.3g}"
    if report.hashed:
        hashed = f"{start}, each with the hash it was packed with"
        return (
            f"{hashed}; whether that is what the release gives, --against CHECKPOINT tells where the release is there"
        )
    return f"{start}, all finite; the file has no hashes, so nothing but its structure could be checked"


def verify_table(report: VerifyReport, *, all_rows: bool) -> Table:
    """A line per tensor: of each, or of those with a problem."""
    compared = any(check.max_error is not None for check in report.tensors)
    errors = ("RMS error", "largest error") if compared else ()
    table = new_table("tensor", "type", *errors, "verdict", caption=str(report.path))
    for check in report.tensors if all_rows else [check for check in report.tensors if check.problem]:
        numbers = [_number(check.relative_rms), _number(check.max_error)] if compared else []
        table.add_row(cell(check.name), check.type, *numbers, _verdict(check, report))
    return table


def _verdict(check: TensorCheck, report: VerifyReport) -> str:
    if check.problem:
        return "[red]differs"
    if check.max_error is None:
        return "hash right" if report.hashed else "no hash"
    return "exact" if check.exact else "as packed"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.3g}"
