"""Reads the release's pickles without running them.

The opcodes are walked by pickletools over a file that hands out placeholders instead of payloads, so neither code nor
gigabytes ever enter the process. A stack machine rebuilds the one structure the release uses: a numpy array, or
`__main__.QuantizedWeight8bit` of an int8 array and its bfloat16 scales. Anything else is an error naming file and
cause.
"""

from __future__ import annotations

import math
import os
import pickletools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from grok_local.errors import CheckpointError

__all__ = ["Array", "StoredTensor", "parse_pickle", "read_pickle"]

_GLOBALS = {
    ("__main__", "QuantizedWeight8bit"): "quantized",
    ("numpy.core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "reconstruct",  # as numpy 2 writes it
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("ml_dtypes", "bfloat16"): "bfloat16",
}
_ITEM_SIZES = {"i1": 1, "f4": 4, "bf16": 2}
_MAX_OPCODES = 1000  # the release's longest pickle has about 100
_MAX_INLINE = 4096  # bytes; a longer read is skipped
_MAX_SIZE = 1 << 48


@dataclass(frozen=True)
class Array:
    """Where an array's C-order payload lies: `nbytes` at `offset` of the file. `dtype` is i1, f4 or bf16."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class StoredTensor:
    """One pickle: `weight`, and for int8 weights the bfloat16 `scales` [..., G, N]."""

    weight: Array
    scales: Array | None


def read_pickle(path: Path) -> StoredTensor:
    """Where the tensor in `path` lies. Raises CheckpointError naming the file and what is wrong in it."""
    try:
        with path.open("rb") as file:
            return parse_pickle(file, path.name)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror or error})") from None


def parse_pickle(file: BinaryIO, name: str) -> StoredTensor:
    """The same of an open file, which may be anything that can be read and sought in. Raises CheckpointError."""
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return _stored(_Machine(file, size).run(), size)
    except _RefusedError as error:
        raise CheckpointError(f"{name}: {error}") from None


class _RefusedError(Exception):
    """Why a pickle is not one of the release's."""


@dataclass(frozen=True)
class _Payload:
    """Stands for bytes that stay in the file; pickletools only asks for their length."""

    offset: int
    size: int

    def __len__(self) -> int:
        return self.size


class _Skipping:
    """A file whose long reads are skipped and come back as `_Payload`."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def read(self, size: int = -1) -> Any:
        if size <= _MAX_INLINE:
            return self._file.read(max(size, 0))
        offset = self._file.tell()
        if offset + size > self._size:
            missing = offset + size - self._size
            raise _RefusedError(f"truncated: {missing} bytes are missing at its end, fetch it again")
        self._file.seek(size, os.SEEK_CUR)
        return _Payload(offset, size)

    def readline(self) -> bytes:
        return self._file.readline(_MAX_INLINE)

    def tell(self) -> int:
        return self._file.tell()


@dataclass
class _Global:
    name: str


@dataclass
class _Dtype:
    code: str


@dataclass
class _NDArray:
    state: tuple[Any, ...] | None = None


@dataclass
class _Quantized:
    fields: dict[str, Any] = field(default_factory=dict)


_MARK = object()


class _Machine:
    """The pickle virtual machine, reduced to what the release's pickles do."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = _Skipping(file, size)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self._file)):  # type: ignore[arg-type]
                if count >= _MAX_OPCODES:
                    raise _RefusedError("not a tensor of the release: its pickle goes on and on")
                self._step(opcode.name, argument)
            return self._finish()
        except _RefusedError:
            raise
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, MemoryError) as error:
            raise _RefusedError(
                f"not a pickle of the release, or truncated ({_brief(error)}): fetch it again"
            ) from None

    def _finish(self) -> Any:
        if self._file.read(1):
            raise _RefusedError("has bytes after the end of its pickle: fetch it again")
        if len(self._stack) != 1:
            raise _RefusedError("not a pickle of the release")
        return self._stack[0]

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _IGNORED:
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _BYTES:
            stack.append(_Payload(self._file.tell() - len(argument), len(argument)))
        elif name in _TUPLES:
            items = [self._pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(items[::-1]))
        elif name in _HANDLERS:
            _HANDLERS[name](self, argument)
        else:
            raise _RefusedError(f"refused: its pickle uses the opcode {name}, which no tensor of the release needs")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise _RefusedError("not a pickle of the release")
        return value

    def _pop_to_mark(self) -> list[Any]:
        at = len(self._stack) - 1 - self._stack[::-1].index(_MARK)
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _put(self, argument: Any) -> None:
        self._memo[argument] = self._stack[-1]

    def _get(self, argument: Any) -> None:
        self._stack.append(self._memo[argument])

    def _setitems(self, _: Any) -> None:
        items = self._pop_to_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._stack[-1][_text(key)] = value

    def _setitem(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._stack[-1][_text(key)] = value

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._stack.append(_lookup(module, name))

    def _global(self, argument: str) -> None:
        self._stack.append(_lookup(*argument.split(" ", 1)))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        kind = function.name
        if kind == "reconstruct" and isinstance(arguments[0], _Global) and arguments[0].name == "ndarray":
            self._stack.append(_NDArray())
        elif kind == "dtype":
            self._stack.append(_Dtype(_dtype_code(arguments[0])))
        elif kind == "quantized":
            self._stack.append(_Quantized())
        else:
            raise _RefusedError("not a pickle of the release")

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._stack[-1]
        if isinstance(target, _NDArray):
            target.state = state
        elif isinstance(target, _Quantized):
            target.fields = state.copy()
        elif not isinstance(target, _Dtype) or state[1] == ">":
            raise _RefusedError("not a pickle of the release")


_IGNORED = {"PROTO", "FRAME", "STOP"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"}
_BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_HANDLERS = {
    "TUPLE": _Machine._tuple,
    "EMPTY_DICT": _Machine._empty_dict,
    "MEMOIZE": _Machine._memoize,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "SETITEM": _Machine._setitem,
    "SETITEMS": _Machine._setitems,
    "STACK_GLOBAL": _Machine._stack_global,
    "GLOBAL": _Machine._global,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._reduce,
    "BUILD": _Machine._build,
}


def _lookup(module: Any, name: Any) -> _Global:
    known = _GLOBALS.get((_text(module), _text(name)))
    if known is None:
        raise _RefusedError(f"refused: its pickle would import {_brief(module)}.{_brief(name)}; nothing was run")
    return _Global(known)


def _text(value: Any) -> str:
    # Nothing but a string is ever hashed or printed: tuples of shared tuples would take for ever.
    if not isinstance(value, str):
        raise _RefusedError("not a pickle of the release")
    return value


def _dtype_code(argument: Any) -> str:
    if isinstance(argument, _Global) and argument.name == "bfloat16":
        return "bf16"
    if argument in ("i1", "f4"):
        return str(argument)
    raise _RefusedError(f"has numbers of type {_brief(_text(argument))}; the release has int8, bfloat16 and float32")


def _stored(value: Any, file_size: int) -> StoredTensor:
    if isinstance(value, _NDArray):
        return StoredTensor(_array(value, file_size), None)
    if isinstance(value, _Quantized) and set(value.fields) == {"weight", "scales"}:
        return StoredTensor(_array(value.fields["weight"], file_size), _array(value.fields["scales"], file_size))
    raise _RefusedError("holds neither an array nor a QuantizedWeight8bit")


def _array(value: Any, file_size: int) -> Array:
    if not isinstance(value, _NDArray) or not isinstance(value.state, tuple) or len(value.state) != 5:
        raise _RefusedError("holds no array where one is due")
    _, shape, dtype, fortran, payload = value.state
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 < n < _MAX_SIZE for n in shape) or len(shape) > 4:
        raise _RefusedError("has an array whose shape makes no sense")
    if not isinstance(dtype, _Dtype) or fortran is not False:
        raise _RefusedError("has an array in an order or of a type the release does not use")
    array = Array(dtype.code, shape, _offset(payload))
    if array.nbytes != len(payload) or array.offset + array.nbytes > file_size:
        raise _RefusedError(f"has {len(payload)} bytes for an array of shape {list(shape)}, which takes {array.nbytes}")
    return array


def _offset(payload: Any) -> int:
    if not isinstance(payload, _Payload):
        raise _RefusedError("has an array without its payload")
    return payload.offset


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
