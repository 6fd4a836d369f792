"""What `load` may be told, in the words of its users, and the one form in which it travels from there on."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from grok_local.errors import OptionError
from grok_local.files import is_part
from grok_local.machine.limits import core_count
from grok_local.placement.wishes import ALL_LAYERS, RAM, Wishes
from grok_local.units import parse_size, whole_number

__all__ = ["LoadOptions", "LoadRequest", "load_request"]

_MAX_CONTEXT = 1 << 24
_SMALL = 32_000_000  # bytes of a model
_MAX_PARALLEL = 256  # LLAMA_MAX_SEQ
_MAX_THREADS = 512  # GGML_MAX_N_THREADS


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `grok_local.load`; each may be left out.

    `context`: tokens of each sequence, by default those the model was trained on and at most 8192; 0 is all of them.
    `parallel`: how many sequences go on together, each with a context of its own.
    `reproducible`: the numbers of a sequence do not depend on what goes on beside it, on one kind of CPU; without GPUs.
    `threads`: by
    default one per physical core, fewer where other programs are busy, one for a small model. `kv_type`: f16, bf16 or
    f32. `memory`: what weights, KV cache and buffers may take in RAM, "48G" or bytes. `placement`: "auto" plans for the
    GPUs there are, "cpu" leaves them alone. `gpu_layers`: so many of the last layers go to devices, the output counting
    as one, or "all". `experts_on`: "cpu", "gpu", or of how many layers the experts go to devices. `overrides`:
    "PATTERN=PLACE", a regular expression for tensor names, and RAM or a device. `repack`: "auto", "on" or "off":
    weights rearranged in RAM for llama.cpp's faster products. `stream`: "auto", "on" or "off": experts read as they are
    chosen, into at most what `memory` leaves them; "auto" does so where they do not fit.
    `trace_experts`: a file that shall record which experts each token is routed to; `count_experts`: how often each is
    chosen is counted. `routing`: "release" computes gates
    and attention as the model's release does also where llama.cpp does not, which is so with Grok-2; "llama.cpp" leaves
    it at that. `workers`: "HOST:PORT" each. `say` is told what takes long: measuring this machine, the first time.
    `template`: what lays conversations out, "none" for a plain transcript or a file with a Jinja template; by default
    the model's own.
    """

    context: int | None
    parallel: int
    reproducible: bool
    threads: int | None
    kv_type: str
    memory: int | str | None
    placement: Literal["auto", "cpu"]
    gpu_layers: int | Literal["all"] | None
    experts_on: Literal["cpu", "gpu"] | int | None
    overrides: Sequence[str] | None
    repack: Literal["auto", "on", "off"]
    stream: Literal["auto", "on", "off"]
    trace_experts: str | os.PathLike[str] | None
    count_experts: bool
    routing: Literal["release", "llama.cpp"]
    workers: Sequence[str] | None
    template: str | os.PathLike[str] | None
    say: Callable[[str], None] | None


@dataclass(frozen=True)
class LoadRequest:
    """A model's file, and how it is to be loaded. `workers` are HOST:PORT each; `template` is for conversations.

    With `yielding`, fewer threads compute where other programs keep cores busy. `temperature` is what suits the model.
    """

    path: Path
    wishes: Wishes
    threads: int
    workers: tuple[str, ...] = ()
    template: str | None = None
    yielding: bool = False
    temperature: float | None = None

    @property
    def contained(self) -> bool:
        """Whether the engine gets a process of its own: llama.cpp aborts the one it is in when a worker is lost, and
        decides once in a process which kernels it may use.
        """
        return bool(self.workers) or self.reproducible

    @property
    def reproducible(self) -> bool:
        """Whether the numbers of a sequence shall not depend on what goes on beside it."""
        return self.wishes.reproducible

    @property
    def parallel(self) -> int:
        """How many sequences go on together. Where they are reproducible there is a place more, to pad steps with."""
        return self.wishes.sequences - self.wishes.reproducible

    def reshaped(self, *, parallel: int, reproducible: bool) -> LoadRequest:
        """For so many sequences at once. Raises OptionError for a number that none can have, and for what cannot be
        reproducible.
        """
        parallel = _checked_parallel(parallel, most=_MAX_PARALLEL - reproducible)
        wishes = replace(self.wishes, sequences=parallel + reproducible, reproducible=reproducible)
        if reproducible:
            if self.workers:
                raise OptionError("reproducible: not with workers, whose processors may compute otherwise")
            if contrary := list(_against_reproducible(wishes)):
                raise OptionError(
                    f"reproducible: computes on the CPU, as weights lie in the file: not with {contrary[0]}"
                )
            wishes = replace(wishes, repack="off", gpu_layers=0, experts_on="cpu")
        return replace(self, wishes=wishes)


def load_request(
    path: Path, options: LoadOptions, *, trained_context: int | None = None, temperature: float | None = None
) -> LoadRequest:
    """Of the model in `path`, which was trained on `trained_context` tokens where its file does not know it, and is
    best used at that temperature.

    Raises OptionError for values out of range, TypeError for unknown names.
    """
    unknown = set(options) - set(LoadOptions.__annotations__)
    if unknown:
        raise TypeError(f"load() has no option {', '.join(sorted(unknown))}")
    _check_lists(options)
    options = _with_whole(options)
    _check_ranges(options)
    threads, workers, template = options.get("threads"), options.get("workers"), options.get("template")
    request = LoadRequest(
        path,
        replace(_wishes(options), trained_context=trained_context),
        threads=threads or _usual_threads(path),
        workers=tuple(workers or ()),
        template=None if template is None else os.fspath(template),
        yielding=threads is None,
        temperature=temperature,
    )
    return request.reshaped(parallel=options.get("parallel", 1), reproducible=bool(options.get("reproducible")))


def _against_reproducible(wishes: Wishes) -> Iterator[str]:
    """The wishes that cannot be had with it, by the names of their options."""
    if wishes.gpu_layers:
        yield "gpu_layers"
    if wishes.experts_on not in (None, "cpu", 0):
        yield "experts_on"
    if wishes.repack == "on":
        yield 'repack "on"'
    yield from (f"override {pattern}={place}" for pattern, place in wishes.overrides if place != RAM)


def _usual_threads(path: Path) -> int:
    """One per core; one in all for a small model, whose products are done before another thread has woken up."""
    with suppress(OSError):
        if path.stat().st_size < _SMALL and not is_part(path):
            return 1
    return core_count()


def _wishes(options: LoadOptions) -> Wishes:
    memory, trace = options.get("memory"), options.get("trace_experts")
    if trace is not None and not str(trace):
        raise OptionError("--trace-experts: name a file")
    alone = _one_of(options, "placement", ("auto", "cpu")) == "cpu"
    wishes = Wishes(
        context=options.get("context"),
        kv_type=options.get("kv_type", "f16"),
        gpu_layers=0 if alone else _gpu_layers(options),
        experts_on="cpu" if alone else _number_or_word(options.get("experts_on")),
        overrides=tuple(map(_override, options.get("overrides") or ())),
        repack=_one_of(options, "repack", ("auto", "on", "off")),
        stream=_one_of(options, "stream", ("auto", "on", "off")),
        trace_experts=Path(trace) if trace else None,
        count_experts=bool(options.get("count_experts")),
        routing=_one_of(options, "routing", ("release", "llama.cpp")),
        memory=None if memory is None else parse_size(memory),
    )
    for name, value in (("gpu_layers", wishes.gpu_layers), ("experts_on", wishes.experts_on)):
        if value is not None and not isinstance(value, str):
            whole_number(name, value)
        if isinstance(value, int) and value < 0:
            raise OptionError(f"{name} {value}: must be 0 or more")
    return wishes


def _with_whole(options: LoadOptions) -> LoadOptions:
    given: dict[str, Any] = {name: options.get(name) for name in ("context", "threads", "parallel")}
    whole = {name: whole_number(name, value) for name, value in given.items() if value is not None}
    return cast("LoadOptions", {**options, **whole})


def _check_lists(options: LoadOptions) -> None:
    for name in ("overrides", "workers"):
        given: Any = options.get(name)
        if isinstance(given, str) or not all(isinstance(text, str) for text in given or ()):
            raise OptionError(f"{name} {given!r}: a list of texts is wanted")


def _check_ranges(options: LoadOptions) -> None:
    context, threads = options.get("context"), options.get("threads")
    if context is not None and not 0 <= context <= _MAX_CONTEXT:
        raise OptionError(f"context {context}: must be 1 to {_MAX_CONTEXT}, or 0 for all the model was trained on")
    if threads is not None and not 1 <= threads <= _MAX_THREADS:
        raise OptionError(f"{threads} threads: must be 1 to {_MAX_THREADS}")


def _checked_parallel(parallel: int, *, most: int) -> int:
    parallel = whole_number("parallel", parallel)
    if not 1 <= parallel <= most:
        raise OptionError(f"parallel {parallel}: must be 1 to {most}")
    return parallel


def _one_of(options: LoadOptions, name: str, values: Sequence[str]) -> Any:
    value = options.get(name, values[0])
    if value not in values:
        raise OptionError(f"{name} {value!r}: choose one of {', '.join(values)}")
    return value


def _gpu_layers(options: LoadOptions) -> int | None:
    value = _number_or_word(options.get("gpu_layers"))
    if value in ("all", "-1", -1):  # -1 is what other programs call all
        return ALL_LAYERS
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise OptionError(f"gpu_layers {value!r}: a whole number, or all")
    return value


def _number_or_word(value: Any) -> Any:
    if isinstance(value, str):
        return int(value) if value.isdecimal() and len(value) < 6 else value
    return operator.index(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def _override(text: str) -> tuple[str, str]:
    pattern, separator, place = text.rpartition("=")
    if not (pattern and separator and place):
        raise OptionError(f"--override {text}: write PATTERN=PLACE, for example 'blk\\.0\\.ffn_.*_exps={RAM}'")
    return pattern, RAM if place.upper() in (RAM, "CPU") else place
