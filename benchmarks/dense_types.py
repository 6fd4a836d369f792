"""What a type for Grok-2's dense feed-forward network costs a token to read, and what it saves in error.

    python -m benchmarks.dense_types [--narrower 8]

The sum of dense network and two experts, as the release weighs them, with random weights and inputs. Weights are drawn
from a normal distribution, and from one with heavier tails (Student's t with 5 degrees of freedom, rows and columns of
unequal size), as trained ones have them. Experts are packed to Q4_K throughout; errors are relative and RMS.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Q

from grok_local.ggml import quants
from grok_local.models import grok2
from grok_local.models.release import Dimensions, Kind
from grok_local.quantize.recipe import RECIPES
from samples.layers import Floats, gelu, softmax

TOKENS = 64


def drawn(rng: np.random.Generator, rows: int, columns: int, *, heavy: bool) -> Floats:
    if not heavy:
        normal = rng.standard_normal((rows, columns), dtype=np.float32)
        normal /= math.sqrt(columns)
        return normal
    sizes = np.exp(0.3 * rng.standard_normal((rows, 1))) * np.exp(0.3 * rng.standard_normal((1, columns)))
    tails = rng.standard_t(5, size=(rows, columns)) / math.sqrt(5 / 3)
    heavy_tailed: Floats = (tails * sizes / math.sqrt(columns)).astype(np.float32)
    return heavy_tailed


def network(rng: np.random.Generator, width: int, hidden: int, *, heavy: bool) -> list[Floats]:
    return [drawn(rng, *shape, heavy=heavy) for shape in ((hidden, width), (hidden, width), (width, hidden))]


def rounded(weights: Sequence[Floats], kind: Q) -> list[Floats]:
    out = []
    for matrix in weights:
        packed = np.empty(len(matrix) * quants.bytes_per_row(kind, matrix.shape[1]), np.uint8)
        quants.quantize_rows(kind, matrix, packed)
        out.append(np.empty_like(matrix))
        quants.dequantize(kind, packed, out[-1])
    return out


def through(z: Floats, weights: Sequence[Floats]) -> Floats:
    gate, up, down = weights
    out: Floats = (gelu(z @ gate.T) * (z @ up.T)) @ down.T
    return out


def relative(found: Floats, truth: Floats) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def read_per_token(dense: Q) -> float:
    """GB of weights that a token reads of the published Grok-2: two of eight experts, one row of the embedding."""
    recipe, total = RECIPES["q4_k"], 0.0
    for target in grok2.RELEASE.targets(grok2.RELEASE.published):
        kind = dense if target.kind is Kind.DENSE else recipe.wanted(target.kind)
        block, size = GGML_QUANT_SIZES[kind]
        share = {Kind.EXPERTS: 2 / 8, Kind.EMBEDDING: 0.0}.get(target.kind, 1.0)
        total += share * math.prod(target.shape) * size / block
    return total / 1e9


def report(dims: Dimensions, *, heavy: bool) -> None:
    rng = np.random.default_rng(1)
    z = rng.standard_normal((TOKENS, dims.width), dtype=np.float32)
    dense = network(rng, dims.width, dims.dense_width, heavy=heavy)
    experts = [network(rng, dims.width, dims.expert_width, heavy=heavy) for _ in range(2)]
    shares = np.sort(softmax(rng.standard_normal((TOKENS, 8), dtype=np.float32)))[:, :-3:-1]  # of the two largest
    outputs = [through(z, expert) for expert in experts]
    mixed = sum(shares[:, i, None] * output for i, output in enumerate(outputs))
    coarse = sum(shares[:, i, None] * through(z, rounded(e, Q.Q4_K)) for i, e in enumerate(experts))
    alone = through(z, dense)
    power = float(np.vdot(alone, alone) / (np.vdot(alone, alone) + np.vdot(mixed, mixed)))
    print(f"{'heavy tails' if heavy else 'normal'}: the dense network has {power:.0%} of the sum's power")
    for kind in (Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.Q8_0):
        packed = rounded(dense, kind)
        found = through(z, packed)
        errors = (relative(packed[0], dense[0]), relative(found, alone), relative(found + coarse, alone + mixed))
        texts = "  ".join(f"{error:7.2%}" for error in errors)
        print(f"  {kind.name}  {read_per_token(kind):5.1f} GB a token   weights, network, sum: {texts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--narrower", type=int, default=8, help="divide every width by this")
    narrower = parser.parse_args().narrower
    whole = grok2.RELEASE.published
    widths = [size // narrower for size in (whole.width, whole.expert_width, whole.dense_width)]
    for heavy in (False, True):
        report(Dimensions(1, widths[0], widths[1], 8, 128, 1, dense_width=widths[2]), heavy=heavy)


if __name__ == "__main__":
    main()
