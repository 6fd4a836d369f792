"""What the tests of streaming share: the model is the golden checkpoint in four bits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import grok_local
from grok_local.formats import gguf_file
from grok_local.placement.shape import ModelShape, Role
from grok_local.placement.sizes.compute import compute_bytes

CONTEXT = 1024
IDS = random.Random(1).choices(range(5, 2000), k=700)
ALL = 12 * 8  # experts of the golden checkpoint
OPTIONS: dict[str, Any] = {"context": CONTEXT, "threads": 2, "repack": "off"}


def memory_for(path: Path, held: float, context: int = CONTEXT, batch: int = 512) -> int:
    """RAM in which so many experts fit beside everything else."""
    shape = ModelShape.from_headers(gguf_file.read_model(path))
    dense = sum(weight.nbytes for weight in shape.weights if weight.role is not Role.EXPERTS and not weight.tied)
    kv = sum(shape.kv_bytes(layer, context=context, kv_type="f16") for layer in range(shape.layers))
    compute = compute_bytes(shape, context=context, batch=batch)
    return dense + kv + compute + int(held * shape.layer_bytes(0, Role.EXPERTS) / shape.experts)


def results(model: grok_local.Model) -> tuple[npt.NDArray[np.float32], list[list[int]]]:
    """Logits of every position, and what is generated: after prompts of one batch and of two, and in a conversation."""
    logits = model.logits(IDS[:300])
    replies = [
        model.generate(model.detokenize(IDS[:150]), max_tokens=30, temperature=0),
        model.generate(IDS, max_tokens=4, temperature=0),
        model.chat([{"role": "user", "content": "Why?"}], max_tokens=20, temperature=1.0, seed=3),
    ]
    return logits, [reply.tokens for reply in replies if "".join(reply)]


def check(model: grok_local.Model, expected: tuple[npt.NDArray[np.float32], list[list[int]]]) -> None:
    logits, tokens = results(model)
    assert np.array_equal(logits, expected[0])
    assert tokens == expected[1]
