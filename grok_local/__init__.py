"""grok-local: quantizes xAI's Grok-1 release to 4-bit GGUF in one pass, and runs it with llama.cpp.

    report = grok_local.quantize_checkpoint("grok-1", "grok-1-q4_k.gguf")
    with grok_local.load("grok-1-q4_k.gguf") as model:
        for piece in model.generate("The answer to life is"):
            print(piece, end="")

Every failure that can be foreseen is a `GrokLocalError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grok_local.errors import GrokLocalError

if TYPE_CHECKING:
    from grok_local.library.names import load
    from grok_local.quantize.convert import Progress, QuantizeReport, quantize_checkpoint
    from grok_local.runtime.text.batch import Result
    from grok_local.runtime.text.model import Model
    from grok_local.runtime.text.reply import Reply, Stats, TokenLogprob
    from grok_local.runtime.text.scoring import Score

__version__ = "0.2.0"

__all__ = [
    "GrokLocalError",
    "Model",
    "Progress",
    "QuantizeReport",
    "Reply",
    "Result",
    "Score",
    "Stats",
    "TokenLogprob",
    "load",
    "quantize_checkpoint",
]

_HOMES = {
    **dict.fromkeys(("Progress", "QuantizeReport", "quantize_checkpoint"), "grok_local.quantize.convert"),
    "Model": "grok_local.runtime.text.model",
    **dict.fromkeys(("Reply", "Stats", "TokenLogprob"), "grok_local.runtime.text.reply"),
    "Result": "grok_local.runtime.text.batch",
    "Score": "grok_local.runtime.text.scoring",
    "load": "grok_local.library.names",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: numpy and llama.cpp would make `grok-local --help` take a second.
    if name not in _HOMES:
        raise AttributeError(f"module 'grok_local' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
