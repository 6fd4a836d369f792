"""What the releases' forward passes have in common, in numpy: an independent answer to what a graph computes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from grok_local.models.release import HEAD_SIZE

__all__ = ["Floats", "gelu", "normed", "rotated", "softmax"]

Floats = npt.NDArray[np.float32]


def normed(x: Floats, gain: Floats, epsilon: float) -> Floats:
    out: Floats = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(epsilon)) * gain
    return out


def softmax(x: Floats) -> Floats:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)  # type: ignore[no-any-return]


def gelu(x: Floats) -> Floats:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # type: ignore[no-any-return]


def rotated(x: Floats, base: float) -> Floats:
    """[tokens, heads, head size] by the tokens' positions; a head's halves are the pairs."""
    half = HEAD_SIZE // 2
    angles = np.arange(len(x))[:, None, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
