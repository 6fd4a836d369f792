"""Tells models apart without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from grok_local.errors import GGUFError
from grok_local.formats.gguf_file import Header

__all__ = ["identity"]

_SAMPLES, _SAMPLE = 16, 1 << 16  # pieces of a file that are hashed, and their bytes


def identity(headers: Sequence[Header]) -> str:
    """A hash of the headers of all parts, and of pieces all over the weights. Raises GGUFError."""
    digest = hashlib.sha256()
    for header in headers:
        try:
            digest.update(f"{header.size}\n".encode())
            with header.path.open("rb") as file:
                digest.update(file.read(header.end))
                for number in range(_SAMPLES):
                    file.seek(header.end + (header.size - header.end) * number // _SAMPLES)
                    digest.update(file.read(_SAMPLE))
        except OSError as error:
            raise GGUFError(f"{header.path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()[:32]
