"""Opens llama.cpp's model and context as a plan says, and checks afterwards that it came true.

Where a device turns out to have less memory than it reported, the plan takes one step down there and is tried again.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp

from grok_local.errors import ModelError, PlacementError
from grok_local.files import first_part
from grok_local.formats.gguf_file import Header
from grok_local.ggml import log
from grok_local.ggml.devices import (
    BackendDevice,
    allocatable,
    backend_devices,
    buffer_name,
    buffer_type,
    can_allocate,
    cpu_device,
    extra_buffer_types,
)
from grok_local.ggml.libraries import kept_off_stderr
from grok_local.machine.facts import Device, Say
from grok_local.machine.limits import free_cores
from grok_local.machine.this_machine import this_machine
from grok_local.placement.load_options import LoadRequest
from grok_local.placement.plan import Plan, Share, patterns_of
from grok_local.placement.planner import make_plan
from grok_local.placement.runnable import remarks
from grok_local.placement.shape import ModelShape
from grok_local.placement.sizes.repacking import needs_speeds
from grok_local.placement.whatif import spare_of, with_less, with_smaller
from grok_local.placement.wishes import RAM
from grok_local.runtime.engine.protocol import Held, Placement, differences, tolerance
from grok_local.runtime.engine.reading import read_once
from grok_local.runtime.engine.watching import Watch, notes_on_routing, watch_for
from grok_local.runtime.graph.rows import Row
from grok_local.runtime.graph.tap import Tap
from grok_local.units import format_bytes

__all__ = ["accounted", "open_planned"]

_KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30}  # enum ggml_type
_ALLOCATION = re.compile(r"allocate (\S+) buffer")
_MOST_STEPS = 8
_STAGES = "Vulkan"  # the backend that copies from RAM by way of memory of the driver's, and throws where there is none
_SCRATCH = 3  # bytes for each token at once and each element of what is multiplied: it becomes f16, and there is more


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override of llama.h."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


@dataclass
class Opened:
    """llama.cpp's pointers, and what looks on while it computes."""

    model: Any
    context: Any
    placement: Placement
    watch: Watch | None

    def close(self) -> None:
        """Free everything. Safe to call twice."""
        _release(self.model, self.context, self.watch)
        self.model = self.context = self.watch = None


@dataclass(frozen=True)
class _Target:
    """What is opened; the same whatever the plan. `abort` is llama.cpp's callback."""

    path: Path
    headers: Sequence[Header]
    threads: int
    abort: Any


class _PlaceError(Exception):
    """A place is otherwise than it said. It never leaves this module."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(reason)
        self.place = place


class _OutOfMemoryError(_PlaceError):
    """It had not enough memory."""


class _HeldLessError(_PlaceError):
    """llama.cpp left in RAM what was to be there."""


def open_planned(
    request: LoadRequest,
    headers: Sequence[Header],
    *,
    workers: Sequence[Device],
    interrupted: Callable[[], bool],
    abort: Any,
    say: Say | None = None,
) -> Opened:
    """Plan for this machine and `workers`, and open what was planned. `abort` is llama.cpp's callback.

    Raises PlacementError, ModelError, GGUFError, OptionError or OutputError.
    """
    shape, wishes = ModelShape.from_headers(headers), request.wishes
    types = shape.types if needs_speeds(shape, wishes) else ()
    plan = make_plan(shape, this_machine(types, threads=request.threads, workers=workers, say=say), wishes)
    threads, busy = _threads_now(request)
    notes = [*remarks(headers), *notes_on_routing(headers, wishes), *busy]
    target, steps = _Target(first_part(request.path), headers, threads, abort), list[str]()
    while len(steps) < _MOST_STEPS:
        try:
            watch = watch_for(plan, headers, interrupted=interrupted)
            told = [*steps, *plan.notes, *notes, *(watch.notes if watch else ())]
            return _proven(_as_planned(_open(target, plan, watch=watch, notes=told)), by_a_batch=bool(steps))
        except _OutOfMemoryError as error:
            plan, note = _step_down(plan, error, step=len(steps))
        except _HeldLessError as error:
            plan, note = with_smaller(plan, error.place), str(error)
        steps.append(note)
    raise ModelError(f"{target.path}: {steps[-1]}, and less does not fit either")


def _threads_now(request: LoadRequest) -> tuple[int, list[str]]:
    """How many threads compute, and what to say where they are fewer than usual."""
    free = free_cores(request.threads) if request.yielding and request.threads > 1 else request.threads
    note = f"other programs keep cores busy: {free} of {request.threads} threads compute; --threads says how many shall"
    return free, [note] if free < request.threads else []


def _open(target: _Target, plan: Plan, *, watch: Watch | None, notes: Sequence[str]) -> Opened:
    log.clear()
    model = context = None
    try:
        model = _load_model(target, plan)
        warnings = [text for text in log.warnings() if "pre-tokenizer" not in text]  # `remarks` says that one
        if watch:
            watch.attach()
        done = watch and watch.only_once and _shown_once(model, target, plan, watch.tap)
        context = _new_context(model, target, plan, tap=watch.tap if watch and not done else None)
        held = tuple(_held(plan))
    except BaseException:
        _release(model, context, watch)
        raise
    return Opened(model, context, Placement(plan, held, (*notes, *warnings, *differences(plan, held))), watch)


def _release(model: Any, context: Any, watch: Watch | None) -> None:
    """Free them, in the order in which they need each other."""
    if context:
        llama_cpp.llama_free(context)
    if model:
        llama_cpp.llama_model_free(model)
    if watch:
        watch.tap.close()


def _load_model(target: _Target, plan: Plan, *, no_alloc: bool = False) -> Any:
    params = llama_cpp.llama_model_default_params()
    handles = _handles()
    used = [(d, n) for d, n, s in zip(plan.machine.devices, plan.layers, plan.shares, strict=False) if s.used]
    devices = (ctypes.c_void_p * (len(used) + 1))(*(handles[device.name].handle for device, _ in used), None)
    overrides = _overrides(plan, handles)
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    params.tensor_split = _tensor_split([count for _, count in used])
    params.n_gpu_layers = plan.gpu_layers
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE if no_alloc else llama_cpp.LLAMA_LOAD_MODE_MMAP
    params.no_alloc = no_alloc
    params.use_extra_bufts = bool(plan.repacked) and plan.machine.speeds.all_extra
    nothing = nullcontext(llama_cpp.llama_progress_callback())
    with nothing if no_alloc else read_once(plan, target.headers) as progress, kept_off_stderr():
        params.progress_callback = progress
        model = llama_cpp.llama_model_load_from_file(os.fsencode(target.path), params)
    if not model:
        _raise_if_out_of_memory(plan)
        raise ModelError(f"{target.path}: llama.cpp cannot load it: {log.reason()}")
    return model


def _handles() -> dict[str, BackendDevice]:
    return {device.name: device for device in backend_devices()}


def _tensor_split(counts: Sequence[int]) -> Any:
    split = (ctypes.c_float * max(int(llama_cpp.llama_max_devices()), len(counts)))(*counts)
    return ctypes.cast(split, ctypes.POINTER(ctypes.c_float))


def _overrides(plan: Plan, handles: dict[str, BackendDevice]) -> Any:
    """The plan's exceptions as llama.cpp takes them: the first that matches holds."""
    pairs = [] if plan.machine.speeds.all_extra else [(text, "") for text in patterns_of(plan.repacked)]
    places = {name: buffer_type(device) for name, device in handles.items()}
    places |= {RAM: buffer_type(cpu_device()), "": extra_buffer_types().get("CPU_REPACK", 0)}
    for place, names in plan.exceptions.items():
        pairs += [(text, place) for text in patterns_of(names)]
    array = (_Override * (len(pairs) + 1))()
    for entry, (pattern, place) in zip(array, pairs, strict=False):
        entry.pattern, entry.buft = pattern.encode(), places[place]
    return array


def _new_context(model: Any, target: _Target, plan: Plan, *, tap: Tap | None) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = plan.cells
    params.n_batch = params.n_ubatch = plan.batch
    params.n_seq_max = plan.wishes.sequences
    params.kv_unified = plan.wishes.sequences > 1 and not plan.wishes.separate
    params.n_threads = params.n_threads_batch = target.threads
    params.type_k = params.type_v = _KV_TYPES[plan.wishes.kv_type]
    params.abort_callback = target.abort
    if tap:
        params.cb_eval = tap.callback
    # A GPU would be given copies of experts before we know which are wanted.
    params.op_offload = not plan.streamed
    params.no_perf = True
    with kept_off_stderr():
        context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        _raise_if_out_of_memory(plan)
        raise ModelError(
            f"llama.cpp cannot make a context of {plan.context} tokens: {log.reason()}; try a smaller --context"
        )
    return context


def _shown_once(model: Any, target: _Target, plan: Plan, tap: Tap) -> bool:
    """Have a token evaluated in a context of its own, for `tap` to see: what looks on costs a few percent."""
    small, seen = replace(plan, context=min(plan.context, 256), batch=plan.wishes.sequences), log.buffer_count()
    context = _new_context(model, replace(target, abort=llama_cpp.ggml_abort_callback()), small, tap=tap)
    token = (llama_cpp.llama_token * 1)(0)
    try:
        tap.begin([Row(0, 0, 0, True)])
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1))
        tap.finish(complete=status == 0)
        return bool(status == 0)
    finally:
        llama_cpp.llama_free(context)
        log.forget_buffers(seen)


# -- out of memory -----------------------------------------------------------------------------------------------------


def _raise_if_out_of_memory(plan: Plan) -> None:
    places = _places_by_buffer(plan)
    for line in log.errors():
        found = _ALLOCATION.search(line)
        if found and (found[1] in places or (found[1] == "CPU_REPACK" and plan.repacked)):
            raise _OutOfMemoryError(places.get(found[1], RAM), line)


def _places_by_buffer(plan: Plan) -> dict[str, str]:
    """The device whose memory a buffer type of that name is in."""
    handles = _handles()
    names = [device.name for device in plan.machine.devices]
    return {buffer_name(buffer_type(handles[name])): name for name in names if name in handles}


def _step_down(plan: Plan, error: _OutOfMemoryError, *, step: int) -> tuple[Plan, str]:
    """A plan for what the place turns out to have, and what to say about it. Raises PlacementError."""
    if error.place == RAM:
        wishes = replace(plan.wishes, repack="off")
        return make_plan(plan.model, plan.machine, wishes), "RAM has no room for rearranged weights: mapped instead"
    before = _share(plan, error.place).used
    with kept_off_stderr():
        having = allocatable(_handles()[error.place], before)
    said = f"{error.place} ran out of memory with {format_bytes(before)}"
    try:
        lower = with_less(plan, error.place, having - (spare_of(plan, error.place, having) << step))
    except PlacementError as problem:
        raise PlacementError(f"{said}; it has {format_bytes(having)}: {problem}") from None
    return lower, f"{said}: tried again with {format_bytes(_share(lower, error.place).used)}"


def _share(plan: Plan, place: str) -> Share:
    return next(share for share in plan.shares if share.place == place)


# -- is there room to evaluate? ----------------------------------------------------------------------------------------


def _proven(opened: Opened, *, by_a_batch: bool) -> Opened:
    """Evaluating needs memory beyond what is held: try whether it is there while a step down is possible.

    Drivers throw exceptions where it is not, which end the process. Frees what is open and raises _OutOfMemoryError.
    """
    plan = opened.placement.plan
    try:
        handles = _handles()
        own = [device.name for device in plan.machine.devices if device.kind != "worker"]  # a try may end a worker
        for share in plan.shares[:-1]:
            if share.place in own:
                _prove_room(plan, share, handles[share.place])
        if by_a_batch and own:
            _evaluate_batch(opened)
    except BaseException:
        opened.close()
        raise
    return opened


def _prove_room(plan: Plan, share: Share, device: BackendDevice) -> None:
    """For what products multiply with, in a format of their own, and for the copy of a tensor of experts from RAM."""
    scratch = _SCRATCH * min(plan.batch, plan.cells) * plan.model.hidden + (1 << 20)
    copied = plan.model.largest_expert_tensor if plan.ram.experts and not plan.streamed else 0
    staged = copied if device.backend == _STAGES else 0
    with kept_off_stderr():
        if share.used and not can_allocate(device, scratch, staged=staged):
            raise _OutOfMemoryError(share.place, "no memory is left to evaluate with")


def _evaluate_batch(opened: Opened) -> None:
    """As many tokens as there may be at once; alike where experts are streamed, so that few of those are read."""
    plan, tap = opened.placement.plan, opened.watch.tap if opened.watch else None
    count = min(plan.batch, plan.context)
    ids = [0 if plan.streamed else i % plan.model.vocabulary for i in range(count)]
    if tap:
        tap.begin([Row(id_, i, 0, i == count - 1) for i, id_ in enumerate(ids)])
    tokens = (llama_cpp.llama_token * count)(*ids)
    status = llama_cpp.llama_decode(opened.context, llama_cpp.llama_batch_get_one(tokens, count))
    if tap:
        tap.finish(complete=False)  # nobody asked for it: it is in no record
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(opened.context), True)
    if status < 0:
        _raise_if_out_of_memory(plan)
        raise ModelError(f"llama.cpp cannot evaluate {count} tokens: {log.reason()}")


# -- did it come true? -------------------------------------------------------------------------------------------------


def _held(plan: Plan) -> Iterator[Held]:
    places = _places_by_buffer(plan)
    totals = {share.place: {"model": 0, "KV": 0, "compute": 0, "output": 0} for share in plan.shares}
    for buffer in log.buffers():
        totals[places.get(buffer.type, RAM)][buffer.use] += buffer.nbytes
    for place, sizes in totals.items():
        yield Held(place, sizes["model"], sizes["KV"], sizes["compute"] + sizes["output"])


def _as_planned(opened: Opened) -> Opened:
    """Raises _HeldLessError, having closed it, where a device holds less of the weights than it was to have."""
    placement = opened.placement
    for share, found in zip(placement.plan.shares[:-1], placement.held, strict=False):
        if share.weights - found.weights > tolerance(share.weights):
            opened.close()
            having, planned = format_bytes(found.weights), format_bytes(share.weights)
            raise _HeldLessError(
                share.place, f"{share.place} took {having} of weights where {planned} were planned: planned anew"
            )
    return opened


def accounted(path: Path, plan: Plan) -> list[Held]:
    """What llama.cpp would compute with, by its own account: nothing is allocated, and nothing read but the header."""
    log.listen()
    log.clear()
    target = _Target(path, (), 1, llama_cpp.ggml_abort_callback())
    model = _load_model(target, plan, no_alloc=True)
    context = _new_context(model, target, plan, tap=None)
    try:
        return list(_held(plan))
    finally:
        _release(model, context, None)
