"""What llama.cpp's graph computes otherwise than a release does, as the GGUF's keys tell.

Of Grok-2 (SGLang's grok.py and router.py; docs/quantize.md): the release caps the router's logits softly, and takes the
chosen experts' shares as the softmax over all experts has them, where llama.cpp (src/models/grok.cpp) has no cap and
makes the shares add up to one. And its attention gets sharper from some position on. Grok-1 has neither key that
matters nor a dense network: the norm that follows its experts undoes any factor that their shares have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from grok_local.formats.gguf_file import Header

__all__ = ["Deviations", "deviations_of"]

_DENSE = "blk.0.ffn_up.weight"


@dataclass(frozen=True)
class Deviations:
    """`router_cap` softens the logits of the routers in all `layers`; queries at positions beyond `temperature_length`
    attend more sharply, or none do where that is 0, with scores that `score_cap` softens first.
    """

    layers: int
    router_cap: float
    temperature_length: int
    score_cap: float = 30.0

    @property
    def corrected(self) -> str:
        """What is said of a model whose graph is corrected."""
        sharper = f", attention sharper beyond {self.temperature_length} tokens" if self.temperature_length else ""
        return (
            f"computed as the release does, where llama.cpp would not: gates capped at {self.router_cap:g} and not "
            f"renormalised{sharper} (--routing llama.cpp leaves that out)"
        )

    @property
    def left(self) -> str:
        """What is said of one whose graph is left as it is."""
        attention = " and the attention" if self.temperature_length else ""
        return f"the gates{attention} are llama.cpp's, which differ from the release's"


def deviations_of(headers: Sequence[Header]) -> Deviations | None:
    """Of a GGUF, all its parts; None where llama.cpp computes what the release does."""
    metadata = headers[0].metadata
    layers, cap = metadata.get("grok.block_count"), metadata.get("grok.router_logit_softcapping")
    if metadata.get("general.architecture") != "grok" or not isinstance(layers, int) or not _is_cap(cap):
        return None
    if not any(tensor.name == _DENSE for header in headers for tensor in header.tensors):
        return None
    length = metadata.get("grok.attention.temperature_length")
    score_cap = metadata.get("grok.attn_logit_softcapping", 30.0)  # llama.cpp's default
    # Other converters have the file ask for YaRN, whose factor for long texts stands in for a temperature.
    is_plain = metadata.get("grok.rope.scaling.type", "none") == "none"
    if not (isinstance(length, int) and length > 1 and _is_cap(score_cap) and is_plain):
        return Deviations(layers, cap, temperature_length=0)
    return Deviations(layers, cap, length, score_cap)


def _is_cap(value: object) -> TypeGuard[float]:
    return isinstance(value, float) and math.isfinite(value) and value > 0
