"""Which GGML type each tensor gets.

Attention is 2 % of Grok-1's weights and 4 % of Grok-2's, and every token reads it, so it has eight bits whatever the
experts get: of Grok-1 they are the release's own.

Grok-2's dense network is added to what the experts say, and has four fifths of that sum's power, for the experts'
shares do not add up to one. Every token reads it, so its type costs speed. `benchmarks/dense_types.py` measured, with
experts of Q4_K and random weights of normal distribution (in brackets: of heavy tails):

    dense    GB a token reads    error of the sum
    Q4_K     69.2                12.5 % (15.1 %)
    Q6_K     82.4                 5.7 % (7.3 %)
    Q8_0     94.9                 5.0 % (6.4 %)

So it gets Q6_K where the experts get four bits: half the error for a fifth more to read, and for a tenth more in a
batch, whose tokens read all experts. Q8_0 would cost as much again, and what is left is the experts' error.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from grok_local.errors import OptionError
from grok_local.models.release import Kind

__all__ = ["PACKED_TYPES", "RECIPES", "Recipe", "choose_type", "recipe_named"]

_Q = GGMLQuantizationType

# llama-quantize's choices where a type's block does not divide a row (tensor_type_fallback in llama-quant.cpp).
_FALLBACKS = {_Q.Q4_K: _Q.Q5_0, _Q.Q6_K: _Q.Q8_0, _Q.IQ4_XS: _Q.IQ4_NL}


@dataclass(frozen=True)
class Recipe:
    """The types of the large tensors; norms and router stay F32."""

    name: str
    experts: GGMLQuantizationType
    dense: GGMLQuantizationType
    attention: GGMLQuantizationType
    embedding: GGMLQuantizationType
    file_type: LlamaFileType

    def wanted(self, kind: Kind) -> GGMLQuantizationType:
        large = {
            Kind.EXPERTS: self.experts,
            Kind.DENSE: self.dense,
            Kind.ATTENTION: self.attention,
            Kind.EMBEDDING: self.embedding,
            Kind.OUTPUT: self.embedding,
        }
        return large.get(kind, _Q.F32)


_F = LlamaFileType
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("q4_k", _Q.Q4_K, _Q.Q6_K, _Q.Q8_0, _Q.Q6_K, _F.MOSTLY_Q4_K_M),
        Recipe("q4_0", _Q.Q4_0, _Q.Q6_K, _Q.Q8_0, _Q.Q6_K, _F.MOSTLY_Q4_0),
        Recipe("iq4_xs", _Q.IQ4_XS, _Q.Q6_K, _Q.Q8_0, _Q.Q6_K, _F.MOSTLY_IQ4_XS),
        Recipe("mxfp4", _Q.MXFP4, _Q.Q6_K, _Q.Q8_0, _Q.Q6_K, _F.MOSTLY_MXFP4_MOE),
        Recipe("q8_0", _Q.Q8_0, _Q.Q8_0, _Q.Q8_0, _Q.F32, _F.MOSTLY_Q8_0),
        Recipe("bf16", _Q.BF16, _Q.BF16, _Q.BF16, _Q.BF16, _F.MOSTLY_BF16),
        Recipe("f32", _Q.F32, _Q.F32, _Q.F32, _Q.F32, _F.ALL_F32),
    )
}


PACKED_TYPES = {_Q.F32, _Q.F16, *_FALLBACKS.values()}
PACKED_TYPES |= {kind for r in RECIPES.values() for kind in (r.experts, r.dense, r.attention, r.embedding)}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name, in any case. Raises OptionError."""
    try:
        return RECIPES[name.lower()]
    except KeyError:
        raise OptionError(f"no type {name!r}: choose one of {', '.join(RECIPES)}") from None


def choose_type(recipe: Recipe, kind: Kind, row: int) -> GGMLQuantizationType:
    """The type for rows of `row` weights: the recipe's, or what llama-quantize falls back to where blocks do not
    fit.
    """
    wanted = recipe.wanted(kind)
    for candidate in (wanted, _FALLBACKS.get(wanted, wanted)):
        if row % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return _Q.F16
