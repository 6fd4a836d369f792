"""Matrix products straight through ggml's CPU backend: whether a buffer type gets them right, and how fast they are.

An extra buffer type can crash the process: it holds only some types, and some builds of one are broken. Whoever is not
sure calls from a child process, as runtime/probes.py does.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from grok_local.errors import ModelError
from grok_local.ggml.devices import BackendDevice, DeviceKind, buffer_name, buffer_type, cpu_device
from grok_local.ggml.libraries import InitParams, open_library, prototype
from grok_local.ggml.quants import bytes_per_row, quantize_rows

__all__ = ["Weights", "can_multiply", "decode_speed", "largest_error", "multiply", "prompt_speed", "random_weights"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

_P, _I64, _SIZE, _INT, _BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int, ctypes.c_bool
_F32, _I32 = 0, 26  # enum ggml_type
_NODES = 4  # of a graph, for each product: weights, inputs, ids, result
_USED = 2  # experts of a token, as in Grok
_DISTINCT = 1 << 18  # random weights made; packing more takes seconds for some types

_CHECKED_WIDTH, _CHECKED_EXPERTS = 512, 8
_CHECKED_TOKENS = (1, 5, 32)  # one takes other kernels than many, and many are taken in fours

_TIMED_WIDTH = 6144  # Grok-1's
_DEVICE_BYTES = 32 << 20  # of an expert on a GPU: a kernel's start must not show
_PROMPT_ROWS, _PROMPT_TOKENS = 512, 128  # arithmetic is the limit here, so caches may hold it
_TIMED_BYTES = (16 << 20, 2 << 20)  # of an expert: at least, and for each thread: what else a product costs is little
_SLICE_SECONDS = 0.005  # what is timed at once takes at least so long, and starting threads is little of it
_QUANTILE = 0.05  # of those times


class _CPUTypeTraits(ctypes.Structure):
    """struct ggml_type_traits_cpu."""

    _fields_ = [("from_float", _P), ("vec_dot", _P), ("vec_dot_type", _INT), ("nrows", _I64)]


@cache
def _base() -> ctypes.CDLL:
    lib = open_library("ggml-base")
    prototype(lib, "ggml_init", _P, InitParams)
    prototype(lib, "ggml_free", None, _P)
    prototype(lib, "ggml_tensor_overhead", _SIZE)
    prototype(lib, "ggml_graph_overhead_custom", _SIZE, _SIZE, _BOOL)
    prototype(lib, "ggml_new_tensor", _P, _P, _INT, _INT, ctypes.POINTER(_I64))
    prototype(lib, "ggml_mul_mat", _P, _P, _P, _P)
    prototype(lib, "ggml_mul_mat_id", _P, _P, _P, _P, _P)
    prototype(lib, "ggml_new_graph_custom", _P, _P, _SIZE, _BOOL)
    prototype(lib, "ggml_build_forward_expand", None, _P, _P)
    prototype(lib, "ggml_quantize_requires_imatrix", _BOOL, _INT)
    prototype(lib, "ggml_backend_alloc_ctx_tensors_from_buft", _P, _P, _P)
    prototype(lib, "ggml_backend_buffer_free", None, _P)
    prototype(lib, "ggml_backend_dev_supports_op", _BOOL, _P, _P)
    prototype(lib, "ggml_backend_tensor_set", None, _P, _P, _SIZE, _SIZE)
    prototype(lib, "ggml_backend_tensor_get", None, _P, _P, _SIZE, _SIZE)
    prototype(lib, "ggml_backend_graph_compute", _INT, _P, _P)
    prototype(lib, "ggml_backend_dev_init", _P, _P, ctypes.c_char_p)
    prototype(lib, "ggml_backend_free", None, _P)
    return lib


@cache
def _cpu() -> ctypes.CDLL:
    lib = open_library("ggml-cpu")
    prototype(lib, "ggml_backend_cpu_set_n_threads", None, _P, _INT)
    prototype(lib, "ggml_get_type_traits_cpu", ctypes.POINTER(_CPUTypeTraits), _INT)
    return lib


def can_multiply(ggml_type: int) -> bool:
    """Whether the CPU has a kernel for weights of that type."""
    return bool(_cpu().ggml_get_type_traits_cpu(ggml_type).contents.vec_dot)


@dataclass(frozen=True)
class Weights:
    """Packed matrices of `rows` x `width` weights: `experts` of them, or 0 for a single one that has no number."""

    type: int  # enum ggml_type
    rows: int
    width: int
    experts: int
    packed: npt.NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, ...]:
        """In ggml's order."""
        return (self.width, self.rows, self.experts) if self.experts else (self.width, self.rows)


def random_weights(ggml_type: int, *, rows: int, width: int, experts: int = 0) -> Weights:
    """Normally distributed weights; after some hundred thousand they come again.

    Of the types that cannot be packed without an importance matrix, random bytes: fit for timing only.
    """
    total, stride = rows * max(experts, 1), bytes_per_row(ggml_type, width)
    some = min(_DISTINCT // width, total)
    random, block = np.random.default_rng(0), np.empty(some * stride, np.uint8)
    if _base().ggml_quantize_requires_imatrix(ggml_type):
        block[:] = random.integers(0, 256, block.size, np.uint8)
    else:
        quantize_rows(ggml_type, random.standard_normal((some, width), np.float32), block)
    return Weights(ggml_type, rows, width, experts, np.resize(block, total * stride))


def multiply(
    weights: Weights,
    inputs: Floats,
    ids: Ids | None = None,
    *,
    buffer: int | None = None,
    threads: int = 1,
    force: bool = False,
) -> Floats | None:
    """`inputs` [n, width] times the matrix: [n, rows]; or times each one's experts `ids` [n, 2]: [n, 2, rows].

    `buffer` is the ggml_backend_buffer_type_t that the weights are put into. None where it does not hold such weights;
    to `force` them into it crashes. Raises ModelError.
    """
    with _products(weights, count=1, tokens=len(inputs), buffer=buffer, threads=threads) as made:
        if not (made.is_held or force):
            return None
        product = made.each[0]
        product.fill(weights, inputs, ids)
        made.compute(*made.graphs(1))
        return product.output((*(inputs.shape[:1] if ids is None else ids.shape), weights.rows))


def largest_error(ggml_type: int, *, rows: int, buffer: int | None, threads: int, force: bool = False) -> float | None:
    """The largest relative RMS difference of products in `buffer` from those in plain memory; NaN if one is.

    None if the buffer type does not hold matrices of `rows` rows of that type. Raises ModelError.
    """
    errors = [
        _error(weights, tokens, buffer=buffer, threads=threads, force=force)
        for experts in (0, _CHECKED_EXPERTS)
        for weights in [random_weights(ggml_type, rows=rows, width=_CHECKED_WIDTH, experts=experts)]
        for tokens in _CHECKED_TOKENS
    ]
    held = [error for error in errors if error is not None]
    return float(np.max(held)) if held else None


def _error(weights: Weights, tokens: int, *, buffer: int | None, threads: int, force: bool) -> float | None:
    random = np.random.default_rng(tokens)
    inputs = random.standard_normal((tokens, weights.width), np.float32)
    ids = _routes(random, tokens) if weights.experts else None
    found = multiply(weights, inputs, ids, buffer=buffer, threads=threads, force=force)
    right = multiply(weights, inputs, ids, threads=threads, force=True)
    if found is None or right is None:
        return None
    return float(np.sqrt(np.mean((found - right) ** 2) / np.mean(right**2)))


def _routes(random: np.random.Generator, tokens: int) -> Ids:
    """Two different experts for each token."""
    choice = np.argsort(random.random((tokens, _CHECKED_EXPERTS)))[:, :_USED]
    return np.ascontiguousarray(choice, np.int32)


class Timing(NamedTuple):
    """How fast, and how much of its threads' time the process got while it was measured."""

    speed: float  # bytes of weights a second, of a process alone on the machine
    share: float  # 1: it was alone; less: others used the processor too, and the speed is an estimate


def decode_speed(
    ggml_type: int, *, threads: int, size: int, buffer: int | None = None, seconds: float = 0.5
) -> Timing | None:
    """Send one token through pairs of experts, `size` bytes of them in turn, for `seconds` at least.

    None if the buffer type does not hold such weights. Raises ModelError.
    """
    nbytes = max(_TIMED_BYTES[0], threads * _TIMED_BYTES[1])
    rows = nbytes // bytes_per_row(ggml_type, _TIMED_WIDTH) // 64 * 64
    pair = random_weights(ggml_type, rows=rows, width=_TIMED_WIDTH, experts=_USED)
    count = -(-size // pair.packed.nbytes)
    inputs, ids = np.ones((1, _TIMED_WIDTH), np.float32), np.arange(_USED, dtype=np.int32)
    with _products(pair, count=count, tokens=1, buffer=buffer, threads=threads) as made:
        if not made.is_held:
            return None
        for product in made.each:
            product.fill(pair, inputs, ids)
        group = int(_SLICE_SECONDS / min(_times(made, made.graphs(1), 0.0))) + 1
        return _timing(made, made.graphs(group), group * pair.packed.nbytes, seconds=seconds, threads=threads)


def prompt_speed(ggml_type: int, *, threads: int, buffer: int | None = None, seconds: float = 0.2) -> Timing | None:
    """Send many tokens through eight experts at once, each through two of them, for `seconds` at least; the bytes of
    weights of all tokens, one by one, a second.

    None if the buffer type does not hold such weights. Raises ModelError.
    """
    weights = random_weights(ggml_type, rows=_PROMPT_ROWS, width=_TIMED_WIDTH, experts=_CHECKED_EXPERTS)
    random = np.random.default_rng(1)
    inputs = random.standard_normal((_PROMPT_TOKENS, _TIMED_WIDTH), np.float32)
    ids = _routes(random, _PROMPT_TOKENS)
    nbytes = weights.packed.nbytes // _CHECKED_EXPERTS * _USED * _PROMPT_TOKENS
    with _products(weights, count=1, tokens=_PROMPT_TOKENS, buffer=buffer, threads=threads) as made:
        if not made.is_held:
            return None
        made.each[0].fill(weights, inputs, ids)
        return _timing(made, made.graphs(1), nbytes, seconds=seconds, threads=threads)


def device_speed(ggml_type: int, *, device: BackendDevice, size: int, seconds: float = 0.3) -> float | None:
    """As `decode_speed`, on a device with its weights in the device's own memory: bytes a second, the median.

    None if the device has no kernel for such weights. Raises ModelError.
    """
    rows = _DEVICE_BYTES // bytes_per_row(ggml_type, _TIMED_WIDTH) // 64 * 64
    pair = random_weights(ggml_type, rows=rows, width=_TIMED_WIDTH, experts=_USED)
    count = -(-size // pair.packed.nbytes)
    inputs, ids = np.ones((1, _TIMED_WIDTH), np.float32), np.arange(_USED, dtype=np.int32)
    with _products(pair, count=count, tokens=1, buffer=None, threads=1, device=device) as made:
        if not made.is_held:
            return None
        for product in made.each:
            product.fill(pair, inputs, ids)
        whole = made.graphs(count)  # all at once: starting a graph must not show
        list(_times(made, whole, 0.0))  # compiles kernels, where a backend does that
        times = list(_times(made, whole, seconds))
        return count * pair.packed.nbytes / float(np.median(times))


def _timing(made: _Products, graphs: Sequence[int], nbytes: int, *, seconds: float, threads: int) -> Timing:
    """The speed in the best moments; by the processor's time, where others leave no such moment.

    The latter is too low if threads that wait for each other are busy waiting: set GOMP_SPINCOUNT.
    """
    start, used = time.perf_counter(), time.process_time()
    threads = min(threads, os.cpu_count() or 1)  # more have no time of their own
    times = list(_times(made, graphs, seconds))
    used, elapsed = time.process_time() - used, time.perf_counter() - start
    best, mean = nbytes / float(np.quantile(times, _QUANTILE)), nbytes * len(times) * threads / used
    return Timing(max(best, mean), used / elapsed / threads)


def _times(made: _Products, graphs: Sequence[int], seconds: float) -> Iterator[float]:
    """Seconds of each graph in turn, in whole rounds."""
    begin = time.perf_counter()
    while True:
        for graph in graphs:
            start = time.perf_counter()
            made.compute(graph)
            yield time.perf_counter() - start
        if time.perf_counter() - begin > seconds:
            return


@dataclass(frozen=True)
class _Product:
    """The ggml_tensors of one product."""

    weights: int
    inputs: int
    ids: int | None
    result: int

    def fill(self, weights: Weights, inputs: Floats, ids: Ids | None) -> None:
        for tensor, values in ((self.weights, weights.packed), (self.inputs, inputs), (self.ids, ids)):
            if values is not None:
                _base().ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)

    def output(self, shape: tuple[int, ...]) -> Floats:
        out = np.empty(shape, np.float32)
        _base().ggml_backend_tensor_get(self.result, out.ctypes.data, 0, out.nbytes)
        return out


@dataclass(frozen=True)
class _Products:
    """Products that wait to be computed, and what is needed for it."""

    each: list[_Product]
    context: int
    backend: int
    device: int

    @property
    def is_held(self) -> bool:
        """Whether the weights' buffer type has a kernel for them, by its own account; llama.cpp asks the same."""
        return bool(_base().ggml_backend_dev_supports_op(self.device, self.each[0].result))

    def graphs(self, group: int) -> list[int]:
        """Graphs of `group` products each; what is left over has none. May be called twice."""
        group = min(group, len(self.each))
        return [self._graph(self.each[i : i + group]) for i in range(0, len(self.each) - group + 1, group)]

    def _graph(self, products: Sequence[_Product]) -> int:
        graph = _base().ggml_new_graph_custom(self.context, _NODES * len(products), False)
        for product in products:
            _base().ggml_build_forward_expand(graph, product.result)
        return int(graph)

    def compute(self, graph: int) -> None:
        status = _base().ggml_backend_graph_compute(self.backend, graph)
        if status:
            raise ModelError(f"ggml cannot compute a matrix product (status {status})")


@contextmanager
def _products(
    weights: Weights, *, count: int, tokens: int, buffer: int | None, threads: int, device: BackendDevice | None = None
) -> Iterator[_Products]:
    """Products of `count` tensors like `weights`, in `buffer`; inputs and results are in plain memory, the device's."""
    device = device or cpu_device()
    plain = buffer_type(device)
    with _context(count) as special, _context(count) as rest, _backend(threads, device) as backend:
        each = [_new_product(weights, tokens, special=special, rest=rest) for _ in range(count)]
        with _allocated(special, buffer or plain), _allocated(rest, plain):
            yield _Products(each, rest, backend, device.handle)


def _new_product(weights: Weights, tokens: int, *, special: int, rest: int) -> _Product:
    base, matrix = _base(), _new_tensor(special, weights.type, *weights.shape)
    if not weights.experts:
        inputs = _new_tensor(rest, _F32, weights.width, tokens)
        return _Product(matrix, inputs, None, base.ggml_mul_mat(rest, matrix, inputs))
    inputs, ids = _new_tensor(rest, _F32, weights.width, 1, tokens), _new_tensor(rest, _I32, _USED, tokens)
    return _Product(matrix, inputs, ids, base.ggml_mul_mat_id(rest, matrix, inputs, ids))


def _new_tensor(context: int, ggml_type: int, *shape: int) -> int:
    return int(_base().ggml_new_tensor(context, ggml_type, len(shape), (_I64 * len(shape))(*shape)))


@contextmanager
def _context(products: int) -> Iterator[int]:
    """Room for so many products and, twice, their graphs."""
    base = _base()
    size = products * (_NODES * base.ggml_tensor_overhead() + 2 * base.ggml_graph_overhead_custom(_NODES, False))
    context = base.ggml_init(InitParams(size, None, True))
    try:
        yield context
    finally:
        base.ggml_free(context)


@contextmanager
def _backend(threads: int, device: BackendDevice) -> Iterator[int]:
    backend: Any = _base().ggml_backend_dev_init(device.handle, None)
    if not backend:
        raise ModelError(f"{device.name} does not start")
    if device.kind is DeviceKind.CPU:
        _cpu().ggml_backend_cpu_set_n_threads(backend, threads)
    try:
        yield backend
    finally:
        _base().ggml_backend_free(backend)


@contextmanager
def _allocated(context: int, buffer: int) -> Iterator[None]:
    memory = _base().ggml_backend_alloc_ctx_tensors_from_buft(context, buffer)
    if not memory:
        raise ModelError(f"ggml has no memory for a matrix product in {buffer_name(buffer)}")
    try:
        yield
    finally:
        _base().ggml_backend_buffer_free(memory)
