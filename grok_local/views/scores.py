"""How well a model predicts a text, in words and as JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grok_local.runtime.text.scoring import Divergence, Estimate

__all__ = ["describe_perplexity", "print_perplexity"]


def describe_perplexity(losses: Estimate, apart: Divergence | None) -> dict[str, Any]:
    """What `perplexity --json` prints; intervals are those of 95 %."""
    value, low, high = losses.exponentials
    found: dict[str, Any] = {"perplexity": value, "interval": _known(low, high), "tokens": losses.count}
    if apart:
        interval = _known(apart.nats.mean - apart.nats.margin, apart.nats.mean + apart.nats.margin)
        found["kl_divergence"] = {
            "mean": apart.nats.mean,
            "interval": interval,
            "largest": apart.largest,
            "same_top_token": apart.same_top,
        }
    return found


def _known(low: float, high: float) -> list[float] | None:
    """An interval; JSON has no infinity, which is what one token alone says."""
    return [low, high] if math.isfinite(low) and math.isfinite(high) else None


def print_perplexity(losses: Estimate, apart: Divergence | None) -> None:
    """A line, and one for the comparison."""
    value, low, high = losses.exponentials
    print(f"perplexity {value:.4f}, of {losses.count} tokens; {low:.4f} to {high:.4f} with 95 % confidence")
    if apart:
        nats = apart.nats
        print(
            f"KL divergence {nats.mean:.6f} nats a token, +-{nats.margin:.6f}; at most {apart.largest:.4f}; the same "
            f"likeliest token {apart.same_top:.2%}"
        )
