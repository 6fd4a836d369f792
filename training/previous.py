"""The parameters of a checkpoint that was exported before, from which a release's training goes on.

What changed in the program since is a small part of the corpus: a third of the steps learn it.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from grok_local.formats.pickles import Array, read_pickle
from grok_local.models import grok1, release
from training import network
from training.export import LEAF_NAMES, Floats

__all__ = ["restored_parameters"]


def restored_parameters(folder: Path, dims: release.Dimensions) -> network.Parameters:
    """What `export` wrote, as far as int8 tells. Raises CheckpointError for what it did not write."""
    layers: dict[str, list[Floats]] = {name: [] for name in LEAF_NAMES.values()}
    params = network.initial(dims, 0)
    for leaf in grok1.leaves(dims):
        value = _value(folder / "ckpt-0" / leaf.file_name)
        if leaf.kind is release.Kind.EMBEDDING:
            gain = network.unit_embedding({"embedding": 1.0})
            params["embedding"] = jnp.asarray(value * grok1.CONSTANTS.embedding_scale / gain)
        elif leaf.layer is None:
            params["final_norm"] = jnp.asarray(value / network.final_gain({"final_norm": 1.0}))
        else:
            layers[LEAF_NAMES[leaf.gguf_name.split(".")[2]]].append(value)
    return {**params, "layers": {name: jnp.asarray(np.stack(values)) for name, values in layers.items()}}


def _value(path: Path) -> Floats:
    stored = read_pickle(path)
    weight = _array(path, stored.weight)
    if stored.scales is None:
        return weight
    scales = _array(path, stored.scales)
    *lead, groups, columns = scales.shape
    rows = weight.shape[-2]
    split = weight.reshape(*lead, groups, rows // groups, columns)
    return (split * scales[..., None, :]).reshape(weight.shape)


def _array(path: Path, array: Array) -> Floats:
    data = path.read_bytes()[array.offset : array.offset + array.nbytes]
    if array.dtype == "bf16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(array.shape)
    return np.frombuffer(data, f"<{array.dtype}").astype(np.float32).reshape(array.shape)
