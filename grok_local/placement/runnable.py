"""Tells what a GGUF is that is no text model, or none that the llama.cpp here runs, and what is odd about one that is.

llama.cpp's own words for most of these are "tensor not found", or nothing at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gguf.constants import MODEL_ARCH_NAMES

from grok_local.formats.gguf_file import Header

__all__ = ["remarks", "why_not", "why_not_continued", "why_not_loaded"]

_ONE_BY_ONE = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
_TEXT_MODEL = "it is no text model by itself: give the one it belongs to"
_TYPES = {  # of general.type
    "adapter": f"an adapter (LoRA) that changes another model; {_TEXT_MODEL}",
    "mmproj": f"a projector, which lets a model see or hear; {_TEXT_MODEL}",
    "imatrix": f"an importance matrix, which guides packing; {_TEXT_MODEL}",
    "vocab": f"a vocabulary alone; {_TEXT_MODEL}",
}
_NOT_LOADED = {  # by architecture
    **dict.fromkeys(("clip", "mmproj"), _TYPES["mmproj"]),
    **dict.fromkeys(("eagle3", "dflash", "gemma4-assistant"), f"a draft head for another model; {_TEXT_MODEL}"),
    **dict.fromkeys(
        ("flux", "sd1", "sd3", "sdxl", "wan", "ltxv", "hidream", "hyvid", "lumina2", "qwen_image", "aura", "cosmos"),
        "a model that makes pictures, and no text",
    ),
}
_NOT_CONTINUED = {
    "t5": "an encoder-decoder, which answers by other steps than grok-local takes: it cannot be run here",
    **dict.fromkeys(("wavtokenizer-dec", "qwen3tts", "pockettts"), "a model that makes sound, and no text"),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), "a diffusion model, which does not write word by word"),
}
_ENCODER = "an encoder, which turns text into numbers and continues none: it cannot be run here"
_ENCODERS = ("t5encoder", "llama-embed", "gemma-embedding", "eurobert")


def why_not(headers: Sequence[Header]) -> str | None:
    """What the file is, if it is no text model that llama.cpp can run here, and what to do about it."""
    return why_not_loaded(headers) or why_not_continued(headers)


def why_not_continued(headers: Sequence[Header]) -> str | None:
    """What it is, if llama.cpp can load it, and it does not continue text."""
    metadata = headers[0].metadata
    architecture = str(metadata.get("general.architecture"))
    bidirectional = metadata.get(f"{architecture}.attention.causal") is False
    encoder = bidirectional or architecture in _ENCODERS or "bert" in architecture
    return _NOT_CONTINUED.get(architecture) or (_ENCODER if encoder else None)


def why_not_loaded(headers: Sequence[Header]) -> str | None:
    """What it is, if llama.cpp cannot even load it."""
    metadata = headers[0].metadata
    architecture = metadata.get("general.architecture")
    if known := _TYPES.get(str(metadata.get("general.type"))) or _NOT_LOADED.get(str(architecture)):
        return known
    if not isinstance(architecture, str) or not architecture:
        return None  # damaged, and reading on tells how
    if not any(header.tensors for header in headers):
        return _TYPES["vocab"]
    if any(_ONE_BY_ONE.fullmatch(tensor.name) for header in headers for tensor in header.tensors):
        return (
            "its experts are stored one by one, an old layout that llama.cpp no longer reads: pack the release again, "
            "or fetch a newer file"
        )
    if not _is_known(architecture):
        return (
            f"its architecture {architecture!r} is unknown to the llama.cpp that is installed here: it is newer, or "
            "is no language model; a newer grok-local may run it"
        )
    return None


def remarks(headers: Sequence[Header]) -> list[str]:
    """What of the file makes its answers worse."""
    metadata = headers[0].metadata
    if metadata.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.pre" not in metadata:
        return [
            "the file does not say how its text is split (tokenizer.ggml.pre is missing): llama.cpp guesses, and "
            "answers may be worse; a newer conversion of the model has the key"
        ]
    return []


def _is_known(architecture: str) -> bool:
    if architecture in MODEL_ARCH_NAMES.values():
        return True  # the package with the names is never ahead of llama.cpp, and asking costs a start
    from grok_local.ggml.architectures import is_known

    return is_known(architecture)
