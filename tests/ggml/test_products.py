"""Products through ggml against numpy's, on the weights as dequantized."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType as Type

from grok_local.ggml import products
from grok_local.ggml.devices import extra_buffer_types
from grok_local.ggml.quants import dequantize

EXTRA = extra_buffer_types()
TYPES = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_K, Type.Q6_K, Type.Q8_0, Type.IQ4_XS, Type.MXFP4]


def unpacked(weights: products.Weights) -> npt.NDArray[np.float32]:
    out = np.empty((max(weights.experts, 1), weights.rows, weights.width), np.float32)
    dequantize(weights.type, weights.packed, out)
    return out


def inputs(count: int, width: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal((count, width), np.float32)


def relative_error(found: npt.NDArray[np.float32] | None, right: npt.NDArray[np.float32]) -> float:
    assert found is not None
    assert found.shape == right.shape
    return float(np.sqrt(((found - right) ** 2).mean() / (right**2).mean()))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_a_product_is_numpys(kind: Type) -> None:
    weights = products.random_weights(kind, rows=24, width=512)
    x = inputs(5, 512)
    assert relative_error(products.multiply(weights, x, threads=2), x @ unpacked(weights)[0].T) < 0.02


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_a_product_with_the_chosen_experts_is_numpys(kind: Type) -> None:
    weights = products.random_weights(kind, rows=24, width=512, experts=4)
    x, ids = inputs(3, 512), np.array([[0, 3], [2, 1], [3, 0]], np.int32)
    right = np.einsum("nw,nerw->ner", x, unpacked(weights)[ids])
    assert relative_error(products.multiply(weights, x, ids, threads=2), right) < 0.02


def test_which_types_the_processor_can_multiply() -> None:
    assert all(products.can_multiply(kind) for kind in TYPES)
    assert not products.can_multiply(Type.I32)


def test_random_weights_come_again_but_fill_everything() -> None:
    weights = products.random_weights(Type.Q8_0, rows=512, width=2048, experts=2)
    values = unpacked(weights)
    assert values.std(axis=2).min() > 0.9
    assert not (values[0, 0] == values[0, 1]).all()


def test_a_type_that_needs_an_importance_matrix_gets_bytes_to_time() -> None:
    weights = products.random_weights(Type.IQ2_XXS, rows=8, width=512)
    assert weights.packed.any()


@pytest.mark.skipif("CPU_REPACK" not in EXTRA, reason="this build rearranges nothing")
def test_a_buffer_type_says_what_it_does_not_hold() -> None:
    buffer = EXTRA["CPU_REPACK"]
    x = inputs(1, 512)
    assert products.multiply(products.random_weights(Type.F32, rows=24, width=512), x, buffer=buffer) is None
    assert products.multiply(products.random_weights(Type.Q4_0, rows=25, width=512), x, buffer=buffer) is None
    assert products.largest_error(Type.IQ4_XS, rows=24, buffer=buffer, threads=1) is None
    assert products.decode_speed(Type.IQ4_XS, threads=1, size=1, buffer=buffer) is None


def test_plain_memory_does_not_differ_from_itself() -> None:
    assert products.largest_error(Type.Q4_K, rows=24, buffer=None, threads=2) == 0


def test_decoding_has_a_speed() -> None:
    timing = products.decode_speed(Type.Q8_0, threads=1, size=1 << 25, seconds=0.0)
    assert timing is not None
    assert 1e8 < timing.speed < 1e12
    assert 0 < timing.share < 2
