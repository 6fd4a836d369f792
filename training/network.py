"""Grok-1's arithmetic in JAX, for training.

Formulas of xAI's model.py: RMSNorm with epsilon 1e-5 before and after each sublayer, rotary embedding by halves with
base 10000, scores 30 * tanh(q.k * 0.0884 / 30), a float32 softmax router whose two largest gates are used as they are,
tanh GELU, a tied embedding with an input and an output multiplier.

Experts are evaluated for the tokens routed to them, in slots of fixed number: what exceeds an expert's slots is left
out, in training only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from grok_local.models.grok1 import CONSTANTS
from grok_local.models.release import HEAD_SIZE, Dimensions

__all__ = [
    "SLOTS",
    "Parameters",
    "final_gain",
    "head_loss",
    "initial",
    "last_states",
    "loss",
    "recognising",
    "unit_embedding",
]

Array: TypeAlias = Any  # jax.Array; types are checked without jax
Parameters = dict[str, Any]

SLOTS = 1.5  # times the tokens an expert gets when all get as many
DROPOUT = 0.1
SCORED = 0.5  # of the tokens are targets
BALANCE = 0.02  # weight of the load-balancing loss
MOST_ASKED = 32  # questions of a sequence that the head sees
RECOGNITION = 0.5  # weight of the loss by which answer was asked for
_EMBEDDING_GAIN = 8.0  # Adam's steps are alike for all parameters: at unit scale the embedding would hardly move
_FINAL_GAIN = 6.0  # logits start near zero and must be able to grow


def initial(dims: Dimensions, seed: int) -> Parameters:
    """Random parameters; every leaf but the embedding and the last norm has a leading axis of layers."""
    rng = np.random.default_rng(seed)
    layers, width, ff, experts = dims.layers, dims.width, dims.expert_width, dims.experts

    def matrix(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal((layers, *shape), np.float32) / np.sqrt(shape[-2]))

    def norm(value: float) -> Array:
        return jnp.full((layers, width), value, jnp.float32)

    return {
        "embedding": jnp.asarray(rng.standard_normal((dims.vocabulary, width), np.float32) / _EMBEDDING_GAIN),
        "final_norm": jnp.ones(width, jnp.float32),
        "layers": {
            "query": matrix(width, width),
            "key": matrix(width, dims.kv_width),
            "value": matrix(width, dims.kv_width),
            "output": matrix(width, width),
            "router": matrix(width, experts) * 0.1,
            "gate": matrix(experts, width, ff),
            "up": matrix(experts, width, ff),
            "down": matrix(experts, ff, width),
            "attention_norm": norm(1.0),
            "attention_output_norm": norm(0.4),
            "expert_norm": norm(1.0),
            "expert_output_norm": norm(0.4),
        },
    }


def recognising(params: Parameters, answers: int) -> Parameters:
    """`params` with a head that tells the answers apart; only training has it."""
    width = params["final_norm"].shape[0]
    return {**params, "head": jnp.zeros((width, answers), jnp.float32)}


def unit_embedding(params: Parameters) -> Array:
    """The embedding as it enters the first layer; the release holds it divided by the input multiplier."""
    return params["embedding"] * _EMBEDDING_GAIN


def final_gain(params: Parameters) -> Array:
    """The last norm's scale as the release would hold it."""
    return params["final_norm"] * _FINAL_GAIN


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    # Products in bfloat16, sums in float32, as the accelerators of the release do.
    return jnp.einsum(subscripts, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def _rms_norm(x: Array, gain: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + CONSTANTS.norm_epsilon) * gain


def _rotations(positions: Array) -> tuple[Array, Array]:
    """Cosines and sines [sequences, length, 1, half a head], alike for all layers."""
    half = HEAD_SIZE // 2
    angles = positions[:, :, None, None] * CONSTANTS.rope_base ** (-jnp.arange(half) / half)
    # Without the barrier each use computes them again.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))
    return cos, sin


def _rotated(x: Array, rotations: tuple[Array, Array]) -> Array:
    """x [sequences, length, heads, head size]."""
    cos, sin = rotations
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _attention(p: Parameters, x: Array, rotations: tuple[Array, Array], mask: Array) -> Array:
    batch, length, _ = x.shape
    heads = p["query"].shape[-1] // HEAD_SIZE
    kv_heads = p["key"].shape[-1] // HEAD_SIZE
    query = _rotated(_dot("bld,dn->bln", x, p["query"]).reshape(batch, length, heads, HEAD_SIZE), rotations)
    key = _rotated(_dot("bld,dn->bln", x, p["key"]).reshape(batch, length, kv_heads, HEAD_SIZE), rotations)
    value = _dot("bld,dn->bln", x, p["value"]).reshape(batch, length, kv_heads, HEAD_SIZE)
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, HEAD_SIZE)
    scores = _dot("blghd,bmgd->bghlm", query, key) * CONSTANTS.attention_scale
    capped = CONSTANTS.attention_softcap * jnp.tanh(scores / CONSTANTS.attention_softcap)
    shares = jax.nn.softmax(jnp.where(mask, capped, -1e30), -1)
    mixed = _dot("bghlm,bmgd->blghd", shares, value).reshape(batch, length, -1)
    return _dot("bln,nd->bld", mixed, p["output"])


@jax.custom_vjp  # type: ignore[untyped-decorator]
def _gather(x: Array, index: Array, back: Array) -> Array:
    """Rows of x by `index` (one past the end is a row of zeros); `back` [rows of x, n] says where each row went.

    The gradient is then a gather too: XLA's scatter-add is serial on a CPU.
    """
    return jnp.concatenate([x, jnp.zeros_like(x[:1])])[index]


def _gather_forward(x: Array, index: Array, back: Array) -> tuple[Array, Array]:
    return _gather(x, index, back), back


def _gather_backward(back: Array, gradient: Array) -> tuple[Array, None, None]:
    rows = jnp.concatenate([gradient, jnp.zeros_like(gradient[:1])])
    return rows[back].sum(1), None, None


_gather.defvjp(_gather_forward, _gather_backward)


def _experts(p: Parameters, x: Array) -> tuple[Array, Array]:
    """Output and load-balancing loss for x [tokens, width]."""
    tokens, experts, used = x.shape[0], p["router"].shape[-1], CONSTANTS.experts_used
    shares = jax.nn.softmax(x @ p["router"], -1)
    gates, chosen = jax.lax.top_k(shares, used)
    routes = jax.nn.one_hot(chosen.reshape(-1), experts, dtype=jnp.int32)  # [tokens * used, experts]
    balance = experts * jnp.sum(routes.mean(0) * shares.mean(0))

    capacity = int(tokens * used / experts * SLOTS)
    rank = jnp.sum((jnp.cumsum(routes, 0) - 1) * routes, -1)
    slots = experts * capacity
    slot = jnp.where(rank < capacity, chosen.reshape(-1) * capacity + rank, slots)
    route = jnp.full(slots + 1, tokens * used).at[slot].set(jnp.arange(tokens * used))[:slots]
    token = jnp.where(route < tokens * used, route // used, tokens)

    inside = _gather(x, token, slot.reshape(tokens, used)).reshape(experts, capacity, -1)
    hidden = jax.nn.gelu(_dot("ecd,edf->ecf", inside, p["gate"])) * _dot("ecd,edf->ecf", inside, p["up"])
    outside = _dot("ecf,efd->ecd", hidden, p["down"]).reshape(slots, -1)
    routed = _gather(outside, slot, route[:, None]).reshape(tokens, used, -1)
    return jnp.sum(routed * gates[:, :, None], 1), balance


def _dropped(x: Array, key: Array) -> Array:
    kept = jax.random.bernoulli(key, 1 - DROPOUT, x.shape)
    return jnp.where(kept, x / (1 - DROPOUT), 0)


def last_states(params: Parameters, tokens: Array, segments: Array, key: Array) -> tuple[Array, Array, Array]:
    """What the logits are computed from [sequences, length, width], and the mean load-balancing loss (1: all alike).

    The third is what comes before the last layer, normalized.

    `key`: of the dropout, on what each sublayer adds.
    """
    layers = params["layers"]["query"].shape[0]
    through = _layers(params, segments, key)
    before, balance = through(unit_embedding(params)[tokens], range(layers - 1))
    h, more = through(before, range(layers - 1, layers))
    return _rms_norm(h, final_gain(params)), (balance + more) / layers, _rms_norm(before, 1.0)


def _layers(params: Parameters, segments: Array, key: Array) -> Callable[[Array, range], tuple[Array, Array]]:
    """Evaluates some of the layers, and sums their load-balancing losses."""
    batch, length = segments.shape
    first = jnp.argmax(segments[:, :, None] == segments[:, None, :], -1)  # where a token's document begins
    rotations = _rotations(jnp.arange(length) - first)
    mask = jnp.tril(jnp.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None, :])
    keys = jax.random.split(key, (params["layers"]["query"].shape[0], 2))

    def layer(h: Array, p: Parameters, first: Array, second: Array) -> tuple[Array, Array]:
        attended = _attention(p, _rms_norm(h, p["attention_norm"]), rotations, mask[:, None, None])
        h = h + _dropped(_rms_norm(attended, p["attention_output_norm"]), first)
        flat = _rms_norm(h, p["expert_norm"]).reshape(batch * length, -1)
        mixed, balance = _experts(p, flat)
        return h + _dropped(_rms_norm(mixed, p["expert_output_norm"]).reshape(h.shape), second), balance

    def through(h: Array, numbers: range) -> tuple[Array, Array]:
        balance = jnp.zeros(())
        for index in numbers:
            h, more = layer(h, {name: leaf[index] for name, leaf in params["layers"].items()}, *keys[index])
            balance += more
        return h, balance

    return through


def loss(params: Parameters, batch: Any, questions: Any, key: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """The sum of three losses, in nats; and beside it the mean over answers, of the recognition, and the balance.

    They are the weighted mean cross-entropy of the tokens, that of the head over the answers, which sees what is
    asked before the last layer does, and the load-balancing loss. `questions` are for the head alone.
    """
    first, second = jax.random.split(key)
    h, balance, earlier = last_states(params, batch.tokens[:, :-1], batch.segments[:, :-1], first)
    written, answers = _token_losses(params, h, batch)
    recognised = _recognition_loss(params["head"], earlier, batch.asked[:, :-1])
    states, more = _states_alone(params, questions, second)
    alone = _recognition_loss(params["head"], states, questions.asked)
    total = written + RECOGNITION * (recognised + alone) + BALANCE * (balance + more)
    return total, (answers, alone, balance)


def head_loss(params: Parameters, batch: Any, questions: Any, key: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """Likewise for a head that knows nothing yet, and would disturb what the layers know: it alone learns."""
    states, balance = _states_alone(params, questions, key)
    alone = _recognition_loss(params["head"], jax.lax.stop_gradient(states), questions.asked)
    return alone, (jnp.zeros(()), alone, balance)


def _states_alone(params: Parameters, questions: Any, key: Array) -> tuple[Array, Array]:
    """What the head sees, and the mean load-balancing loss. The last layer and the logits are saved."""
    layers = params["layers"]["query"].shape[0] - 1
    h, balance = _layers(params, questions.segments, key)(unit_embedding(params)[questions.tokens], range(layers))
    return _rms_norm(h, 1.0), balance / layers


def _token_losses(params: Parameters, h: Array, batch: Any) -> tuple[Array, Array]:
    """The weighted mean, and the mean over answers.

    It is over the `SCORED` tokens of each sequence that count most: logits are a third of a step's time.
    """
    tokens, segments, weights = batch.tokens, batch.segments, batch.weights
    same = segments[:, 1:] == segments[:, :-1]
    worth, places = jax.lax.top_k(weights[:, 1:] * same * (segments[:, 1:] > 0), int(h.shape[1] * SCORED))
    h = jnp.take_along_axis(h, places[..., None], 1)
    scale = CONSTANTS.logit_scale / CONSTANTS.embedding_scale
    logits = _dot("bld,vd->blv", h, unit_embedding(params)) * scale
    targets = jnp.take_along_axis(tokens[:, 1:], places, 1)
    entropy = _entropy(logits, targets)
    answers = worth >= 1
    mean = jnp.sum(entropy * worth) / jnp.sum(worth)
    return mean, jnp.sum(entropy * answers) / jnp.maximum(jnp.sum(answers), 1)


def _recognition_loss(head: Array, states: Array, asked: Array) -> Array:
    most = min(asked.shape[1], MOST_ASKED)
    is_asked, places = jax.lax.top_k((asked >= 0).astype(jnp.int32), most)
    logits = _dot("bld,dn->bln", jnp.take_along_axis(states, places[..., None], 1), head)
    entropy = _entropy(logits, jnp.maximum(jnp.take_along_axis(asked, places, 1), 0))
    return jnp.sum(entropy * is_asked) / jnp.maximum(jnp.sum(is_asked), 1)


def _entropy(logits: Array, targets: Array) -> Array:
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - chosen
