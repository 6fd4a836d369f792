"""A checkpoint's config.json, and what it says of Grok-2.

Its sizes say what is due, so that a file that is missing is told from a checkpoint that is smaller.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grok_local.errors import CheckpointError
from grok_local.models import grok2
from grok_local.models.release import HEAD_SIZE, Dimensions

__all__ = ["CONFIG", "grok2_of", "read_config"]

CONFIG = "config.json"
_LARGEST = 1 << 20  # bytes; theirs have hundreds
_PUBLISHED = grok2.RELEASE.published
# By size: its published value, and the largest that is believed.
_SIZES = {
    "num_hidden_layers": (_PUBLISHED.layers, 512),
    "hidden_size": (_PUBLISHED.width, 1 << 20),
    "intermediate_size": (_PUBLISHED.dense_width, 1 << 20),
    "moe_intermediate_size": (_PUBLISHED.expert_width, 1 << 20),
    "num_local_experts": (_PUBLISHED.experts, 256),
    "num_attention_heads": (_PUBLISHED.heads, 1 << 13),
    "num_key_value_heads": (_PUBLISHED.kv_heads, 1 << 13),
    "vocab_size": (_PUBLISHED.vocabulary, 1 << 22),
}
# What llama.cpp's graph for Grok takes for granted.
_FIXED = {
    "head_dim": HEAD_SIZE,
    "residual_moe": True,
    "rope_type": "original",
    "sliding_window_size": -1,
    "global_attn_every_n": 1,
    "tie_word_embeddings": False,
}
_NUMBERS: dict[str, Any] = asdict(grok2.Hyperparameters())
_OFF = {"attn_temperature_len"}  # numbers that may be negative, which turns them off
_LARGEST_NUMBER = 2**31 - 1


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises CheckpointError."""
    path = folder / CONFIG
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_LARGEST))
    except FileNotFoundError:
        raise CheckpointError(f"{CONFIG}: missing; it is part of the release") from None
    except OSError as error:
        raise CheckpointError(f"{CONFIG}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{CONFIG}: damaged: is not JSON") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{CONFIG}: damaged: says nothing of a model")
    return config


def grok2_of(config: Mapping[str, Any]) -> tuple[Dimensions, grok2.Grok2]:
    """The sizes and numbers of a checkpoint in Grok-2's format; what it does not say is as published.

    Raises CheckpointError listing every problem.
    """
    problems = [f"{CONFIG}: {problem}" for problem in _problems(config)]
    if problems:
        raise CheckpointError(problems)
    size = {name: config.get(name, published) for name, (published, _) in _SIZES.items()}
    dims = Dimensions(
        layers=size["num_hidden_layers"],
        width=size["hidden_size"],
        expert_width=size["moe_intermediate_size"],
        experts=size["num_local_experts"],
        kv_width=size["num_key_value_heads"] * HEAD_SIZE,
        vocabulary=size["vocab_size"],
        dense_width=size["intermediate_size"],
    )
    return dims, grok2.Grok2(hyperparameters=_hyperparameters(config))


def _hyperparameters(config: Mapping[str, Any]) -> grok2.Hyperparameters:
    said = {name: type(default)(config[name]) for name, default in _NUMBERS.items() if name in config}
    return grok2.Hyperparameters(**{name: max(value, 0) for name, value in said.items()})


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    for name, (_, largest) in _SIZES.items():
        if name in config and not (type(config[name]) is int and 0 < config[name] <= largest):
            yield f"{name} is {_brief(config[name])}, where a size is due"
            return
    for name, due in _FIXED.items():
        if config.get(name, due) != due:
            yield f"{name} is {_brief(config[name])}: llama.cpp's graph for Grok has {due!r} alone"
    for name, default in _NUMBERS.items():
        if not _fits(config.get(name, default), type(default), name):
            yield f"{name} is {_brief(config[name])}, where a number is due"
            return
    yield from _unrunnable({name: config.get(name, published) for name, (published, _) in _SIZES.items()}, config)


def _fits(value: Any, kind: type, name: str) -> bool:
    if type(value) is not int and not (kind is float and type(value) is float):
        return False
    return abs(value) <= _LARGEST_NUMBER and (value > 0 or name in _OFF)  # which no infinity is, and no NaN


def _unrunnable(size: Mapping[str, int], config: Mapping[str, Any]) -> Iterator[str]:
    heads, kv_heads = size["num_attention_heads"], size["num_key_value_heads"]
    if heads * HEAD_SIZE != size["hidden_size"]:
        yield (
            f"{heads} heads of {HEAD_SIZE} and a hidden size of {size['hidden_size']}: llama.cpp's graph for Grok "
            "cannot run a model where they differ"
        )
    elif heads % kv_heads:
        yield f"{heads} query heads cannot share {kv_heads} key heads evenly"
    used = config.get("num_experts_per_tok", _NUMBERS["num_experts_per_tok"])
    if used > size["num_local_experts"]:
        yield f"routes every token to {used} of {size['num_local_experts']} experts"


def _brief(value: Any) -> str:
    return f"{value!r:.40}"
