"""The training loop: AdamW with warm-up and cosine decay, its state saved often, resumable to the same numbers."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from grok_local.models.release import Dimensions
from training import network
from training.documents import Batch, Documents

__all__ = ["DIMENSIONS", "Settings", "train"]

DIMENSIONS = Dimensions(layers=4, width=256, expert_width=256, experts=8, kv_width=128, vocabulary=2048)


_LENGTH = 256  # tokens of a sequence


@dataclass(frozen=True)
class Settings:
    """Numbers of a training run.

    A step sees `tokens` tokens of documents, in sequences of 256 at first, of 512 in the end, and `asked` of questions.
    """

    steps: int = 5000
    tokens: int = 1024
    asked: int = 2048
    seed: int = 1
    rate: float = 2e-3
    warm_up: int = 100
    head_first: int = 0  # steps in which the head alone learns: for layers that know something already
    decay: float = 0.05
    long_from: float = 0.8  # share of the steps after which sequences are long

    def length(self, step: int) -> int:
        return 512 if step >= self.long_from * self.steps else _LENGTH


def train(
    documents: Documents, folder: Path, settings: Settings, *, start: network.Parameters | None = None
) -> network.Parameters:
    """Train to the last step, from the state in `folder` if there is one. Writes state.npz and loss.csv there.

    `start` is where a run begins that has no state, by default anywhere.

    A state belongs to its corpus and its settings: give other ones another folder.
    """
    params = network.initial(DIMENSIONS, settings.seed) if start is None else start
    params = network.recognising(params, len(documents.answers))
    optimizer = _optimizer(settings)
    state: Any = (params, optimizer.init(params))
    first, state = _restored(folder / "state.npz", state)
    update, update_head = (_update(optimizer, loss) for loss in (network.loss, network.head_loss))
    log = _Log(folder / "loss.csv", first)
    for step, batches in _batches(documents, settings, first):
        key = jax.random.key(step, impl="unsafe_rbg")  # many times faster on a CPU than the default
        state, figures = (update if step >= settings.head_first else update_head)(state, batches, key)
        log.add(step, figures)
        if (step + 1) % 100 == 0 or step + 1 == settings.steps:
            _save(folder / "state.npz", step + 1, state)
    return state[0]  # type: ignore[no-any-return]


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.rate, settings.warm_up, settings.steps, settings.rate * 0.01
    )

    def decayed(params: network.Parameters) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 2, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=settings.decay, mask=decayed),
    )


def _update(optimizer: optax.GradientTransformation, loss: Callable[..., Any]) -> Any:
    def update(state: Any, batches: tuple[Batch, Batch], key: Any) -> Any:
        params, moments = state
        (total, figures), gradients = jax.value_and_grad(loss, has_aux=True)(params, *batches, key)
        changes, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, changes), moments), (total, *figures)

    return jax.jit(update, donate_argnums=0)


def _batches(documents: Documents, settings: Settings, first: int) -> Iterator[tuple[int, tuple[Batch, Batch]]]:
    def batch(step: int) -> tuple[Batch, Batch]:
        length = settings.length(step)
        return (
            documents.batch(step, sequences=settings.tokens // length, length=length + 1),
            documents.questions(step, sequences=settings.asked // _LENGTH, length=_LENGTH),
        )

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(batch, first)
        for step in range(first, settings.steps):
            ready, coming = coming.result(), pool.submit(batch, step + 1)
            yield step, ready


class _Log:
    """loss.csv: the means of every 20 steps."""

    _EVERY = 20
    _NAMES = ("step", "loss", "answers", "recognition", "balance", "seconds")

    def __init__(self, path: Path, first: int) -> None:
        self._path = path
        self._rows: list[list[str]] = []
        self._before = 0.0
        if first:
            rows = [row for row in csv.reader(path.open()) if row[0] != "step" and int(row[0]) <= first]
            self._rows = rows
            self._before = float(rows[-1][-1]) if rows else 0.0
        self._began = time.monotonic()
        self._recent: list[Any] = []

    def add(self, step: int, figures: Any) -> None:
        self._recent.append(figures)
        if (step + 1) % self._EVERY == 0:
            means = np.mean([[float(f) for f in figures] for figures in self._recent], 0)
            seconds = self._before + time.monotonic() - self._began
            self._rows.append([str(step + 1), *(f"{m:.4f}" for m in means), f"{seconds:.0f}"])
            self._recent = []
            with self._path.open("w", newline="") as file:
                csv.writer(file).writerows([self._NAMES, *self._rows])
            print(*(f"{name} {value}" for name, value in zip(self._NAMES, self._rows[-1], strict=True)), flush=True)


def _save(path: Path, step: int, state: Any) -> None:
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, step=step, **leaves)  # type: ignore[arg-type]
    partial.replace(path)


def _restored(path: Path, state: Any) -> tuple[int, Any]:
    if not path.exists():
        return 0, state
    saved = np.load(path)
    count = len(jax.tree.leaves(state))
    leaves = [jax.numpy.asarray(saved[f"leaf{i}"]) for i in range(count)]
    return int(saved["step"]), jax.tree.unflatten(jax.tree.structure(state), leaves)
