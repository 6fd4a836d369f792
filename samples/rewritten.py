"""A GGUF written anew by gguf's own writer, with other keys, tensors or tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np

__all__ = ["CHATML", "chatml", "rewritten"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Edit: TypeAlias = Callable[[str, Any, Any], Iterable[tuple[str, Any, Any]]]


def rewritten(
    source: Path,
    path: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    tensors: Edit = lambda name, data, kind: [(name, data, kind)],
) -> Path:
    """Write `source` to `path`: `keys` added or replaced, those that begin with one of `without` left out, and each
    tensor (name, data, type) as `tensors` gives it.
    """
    reader = gguf.GGUFReader(source)
    architecture = (keys or {}).get("general.architecture", reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path, architecture)
    known = {}
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "general.alignment", *without)):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            known[field.name] = (field.contents(), field.types[0], sub)
    for name, value in (keys or {}).items():
        if name != "general.architecture":
            sub = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            known[name] = (value, known[name][1] if name in known else gguf.GGUFValueType.get_type(value), sub)
    for name, (value, kind, sub) in known.items():
        writer.add_key_value(name, value, kind, sub_type=sub)
    for tensor in reader.tensors:
        for name, data, kind in tensors(tensor.name, tensor.data, tensor.tensor_type):
            writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def chatml(source: Path, path: Path, template: str = CHATML) -> Path:
    """The same model with a chat template, and the two last tokens become its control tokens."""
    reader = gguf.GGUFReader(source)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    tokens[-2:], types[-2:] = ["<|im_start|>", "<|im_end|>"], [gguf.TokenType.CONTROL] * 2
    keys = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.chat_template": template,
    }
    return rewritten(source, path, keys=keys)
