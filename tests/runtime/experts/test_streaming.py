"""Streamed models compute what resident ones do, whatever memory they have."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import grok_local
from grok_local.errors import OutputError, PlacementError
from grok_local.formats import gguf_file
from grok_local.ggml import mapping, tensors
from grok_local.placement.load_options import LoadRequest
from grok_local.placement.shape import ModelShape, Role
from grok_local.placement.wishes import Wishes
from grok_local.runtime.engine import watching
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.experts import streamer
from samples.checkpoints import Spec, write_checkpoint
from tests.conftest import TOKENIZER
from tests.runtime.experts.streaming import ALL, CONTEXT, IDS, OPTIONS, check, memory_for, results
from tests.workers import Worker


@pytest.fixture(scope="module")
def path(golden_q4: Path) -> Path:
    return golden_q4


@pytest.mark.parametrize("held", [2, 3.5, 9, 24, 40, 80, ALL])
def test_the_same_is_computed_in_any_memory(path: Path, expected: Any, held: float) -> None:
    with grok_local.load(path, stream="on", memory=memory_for(path, held), **OPTIONS) as model:
        check(model, expected)
        stats, plan = model.engine.expert_stats(), model.placement.plan
        assert stats is not None
        assert plan.streamed
        assert (plan.disk > 0) == (held < ALL)
        # Each batch chooses all experts, and each of the last layer's tokens two: what is not held is read.
        assert (stats.misses > 0) == (held < ALL)
        assert stats.bytes_read >= plan.disk
        assert 0 <= stats.wait_seconds <= stats.seconds


def test_auto_streams_what_does_not_fit(path: Path) -> None:
    with grok_local.load(path, memory=memory_for(path, 20), **OPTIONS) as model:
        assert model.placement.plan.streamed
        assert any("streamed" in note for note in model.placement.notes)
    with grok_local.load(path, memory=memory_for(path, ALL + 1), **OPTIONS) as model:
        assert not model.placement.plan.streamed
    with pytest.raises(PlacementError, match="beside its experts and 442 kB for those of a token"):
        grok_local.load(path, memory=memory_for(path, 1.5), **OPTIONS)


def test_a_wide_batch_reads_all_experts_once(path: Path, expected: Any) -> None:
    memory = memory_for(path, 24, batch=1024)
    with closing(
        LlamaEngine(LoadRequest(path, Wishes(CONTEXT, batch=1024, memory=memory, repack="off"), threads=2))
    ) as engine:
        engine.evaluate(IDS)
        stats = engine.expert_stats()
        assert stats is not None
        assert stats.hits + stats.misses <= ALL
        assert stats.misses >= 11 * 8


def test_nothing_is_read_ahead_that_a_batch_does_not_choose(path: Path) -> None:
    with grok_local.load(path, memory=memory_for(path, 24), **OPTIONS) as model:
        model.logits([7] * 300)  # all the same, so that their experts are
        stats = model.engine.expert_stats()
        assert stats is not None
        assert stats.misses < 4 * 12
        assert stats.bytes_read < 5 * 12 * 221_184


SEVERAL = 8 << 20  # bytes that the plan counts for several sequences


def test_sequences_together_are_what_they_are_together_in_memory(path: Path) -> None:
    rng = random.Random(2)
    steps = [{n: [rng.randrange(2000) for _ in range(rng.randrange(1, 4))] for n in range(16)} for _ in range(4)]
    steps += [{n: [rng.randrange(2000)] for n in rng.sample(range(16), 5)} for _ in range(4)]

    def run(**wishes: Any) -> list[npt.NDArray[np.float32]]:
        together = Wishes(CONTEXT // 16, sequences=16, separate=False, repack="off", **wishes)
        with closing(LlamaEngine(LoadRequest(path, together, threads=2))) as engine:
            return [engine.evaluate_together(step) for step in steps]

    resident, streamed = run(stream="off"), run(memory=memory_for(path, 10) + SEVERAL)
    assert all(np.array_equal(a, b) for a, b in zip(resident, streamed, strict=True))
    assert [len(logits) for logits in resident] == [16] * 4 + [5] * 4


def test_a_sequence_alone_is_what_it_is_among_others(golden: Path, tmp_path: Path) -> None:
    """In floats, where only the order of additions differs; another sequence's logits are nowhere near."""
    floats = grok_local.quantize_checkpoint(golden, tmp_path / "f32.gguf", type="f32").path
    wishes = Wishes(CONTEXT, kv_type="f32", sequences=3, repack="off")
    with closing(LlamaEngine(LoadRequest(floats, wishes, threads=2))) as engine:
        engine.evaluate(IDS[:5])
        together = engine.evaluate_together({0: IDS[5:8], 2: IDS[20:40], 1: IDS[50:53]})
        assert engine.cached[0] == IDS[:8]
    with closing(LlamaEngine(LoadRequest(floats, replace(wishes, sequences=1), threads=2))) as engine:
        alone = np.stack([engine.logits(ids)[-1] for ids in (IDS[:8], IDS[20:40], IDS[50:53])])
    for number, logits in enumerate(together):
        errors = np.sqrt(((alone - logits) ** 2).mean(1) / (alone**2).mean(1))
        assert errors[number] < 0.01
        assert np.delete(errors, number).min() > 0.3


@pytest.mark.parametrize("alignment", [32, 64])
def test_files_of_other_programs_are_streamed(path: Path, expected: Any, tmp_path: Path, alignment: int) -> None:
    other = realigned(path, tmp_path / "other.gguf", alignment)
    assert any(tensor.offset % 4096 for tensor in gguf_file.read_header(other).tensors)
    with grok_local.load(other, memory=memory_for(path, 13), **OPTIONS) as model:
        check(model, expected)


def test_split_models_are_streamed(golden: Path, expected: Any, path: Path, tmp_path: Path) -> None:
    parts = grok_local.quantize_checkpoint(golden, tmp_path / "split.gguf", split_size=8_000_000)
    assert len(gguf_file.all_parts(parts.path)) > 3
    with grok_local.load(parts.path, memory=memory_for(path, 13), **OPTIONS) as model:
        check(model, expected)


def test_without_direct_reads(path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = os.open, []

    def refuse(name: Any, flags: int, *mode: int) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            refused.append(name)
            raise OSError(22, "Invalid argument")
        return real(name, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with grok_local.load(path, memory=memory_for(path, 13), **OPTIONS) as model:
        check(model, expected)
        assert "reads through its cache only" in " ".join(model.placement.notes)


def test_without_huge_pages(path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamer, "has_huge_pages", lambda: False)
    disable = 41  # PR_SET_THP_DISABLE of linux/prctl.h
    assert ctypes.CDLL(None).prctl(disable, 1, 0, 0, 0) == 0
    try:
        with grok_local.load(path, memory=memory_for(path, 13), **OPTIONS) as model:
            check(model, expected)
            assert "huge pages are off" in " ".join(model.placement.notes)
    finally:
        ctypes.CDLL(None).prctl(disable, 0, 0, 0, 0)
    monkeypatch.undo()
    with grok_local.load(path, memory=memory_for(path, 13), **OPTIONS) as model:
        assert "huge pages" not in " ".join(model.placement.notes)


def test_from_memory(path: Path, expected: Any) -> None:
    """A file on tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        copy = Path(shutil.copy(path, Path(folder) / "copy.gguf"))
        with grok_local.load(copy, memory=memory_for(path, 13), **OPTIONS) as model:
            check(model, expected)


def test_another_layout_of_tensors_is_noticed() -> None:
    fields = [field for field in tensors.TensorStruct._fields_ if field[0] != "view_offs"]
    assert tensors.layout_is_known()
    assert not tensors.layout_is_known(type("Other", (ctypes.Structure,), {"_fields_": fields}))


def test_where_memory_cannot_be_had_experts_are_read_ahead(
    path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "layout_is_known", lambda: False)
    with grok_local.load(path, memory=memory_for(path, 13), **OPTIONS) as model:
        assert "read ahead into the system's file cache" in " ".join(model.placement.notes)
        check(model, expected)
        assert model.engine.expert_stats().bytes_read > 0  # type: ignore[union-attr]


def test_dense_tensors_on_a_worker_and_experts_streamed_here(path: Path, expected: Any) -> None:
    with Worker() as worker:
        options: dict[str, Any] = {"workers": [worker.endpoint], "experts_on": "cpu", **OPTIONS}
        with grok_local.load(path, **options) as model:
            whole = model.placement.plan.ram
        memory = whole.used - whole.experts + whole.experts * 13 // ALL
        with grok_local.load(path, memory=memory, **options) as model:
            plan = model.placement.plan
            assert plan.streamed
            assert plan.gpu_layers == 13
            check(model, expected)
            assert model.engine.expert_stats().misses > 0  # type: ignore[union-attr]


def test_answers_have_the_room_of_prompts(path: Path, expected: Any) -> None:
    """While single tokens are evaluated, experts are where a prompt's scores were, and no more memory is taken."""
    with grok_local.load(path, memory=memory_for(path, 10), **OPTIONS) as model:
        plan = model.placement.plan
        most, held = plan.room_for_experts(1), plan.ram.experts
        assert most > 1.5 * held
        sizes = []
        for _ in range(2):
            model.logits(IDS[:512])
            sizes.append(anonymous_memory())
            before = model.engine.expert_stats()
            assert before is not None
            for count in range(60):
                model.engine.evaluate([*IDS[:20], *IDS[20 : 21 + count]])
            sizes.append(anonymous_memory())
            stats = model.engine.expert_stats()
            assert stats is not None
            whole = held + plan.disk
            assert stats.since(before).hit_rate > (held + most) / 2 / whole
        # What the prompt touched is gone when the answer has it all, and the answer's when the next prompt comes.
        assert sizes[1] - sizes[0] < 0.85 * (most - held)
        assert abs(sizes[2] - sizes[0]) < 4_000_000
        assert abs(sizes[3] - sizes[1]) < 4_000_000
        check(model, expected)


def anonymous_memory() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_slices_that_are_no_whole_blocks_are_streamed(tmp_path: Path) -> None:
    """As of models of other widths: each expert then begins somewhere else in its block."""
    spec = Spec(layers=3, width=256, expert_width=288, kv_width=128)
    odd = grok_local.quantize_checkpoint(
        write_checkpoint(tmp_path, spec, TOKENIZER), tmp_path / "odd.gguf", type="q8_0"
    )
    shape = ModelShape.from_headers(gguf_file.read_model(odd.path))
    assert shape.layer_bytes(0, Role.EXPERTS) // (3 * shape.experts) % 4096
    with grok_local.load(odd.path, stream="off", **OPTIONS) as model:
        resident = results(model)
    with grok_local.load(odd.path, memory=memory_for(odd.path, 9), **OPTIONS) as model:
        check(model, resident)
        assert model.engine.expert_stats().bytes_reread > 0  # type: ignore[union-attr]


# -- loading -----------------------------------------------------------------------------------------------------------


def test_loading_reads_nothing_but_what_is_dense(path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(path, tmp_path / "copy.gguf"))
    with copy.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with grok_local.load(copy, memory=memory_for(path, 13), **OPTIONS):
            cached = cached_bytes(copy)
    assert cached < 0.5 * copy.stat().st_size


def cached_bytes(path: Path) -> int:
    """Of a file, in the page cache."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view,
    ):
        pages = -(-len(view) // 4096)
        found = (ctypes.c_ubyte * pages)()
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(view)))
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(view)), found) == 0
        del address
        return 4096 * sum(int(page) & 1 for page in found)


def test_a_build_that_maps_otherwise_is_left_alone() -> None:
    with mapping.unread_mappings() as works:
        assert works
    fields = mapping.RegistryStruct._fields_
    moved = [
        *[field for field in fields if field[0] == "context"],
        *[field for field in fields if field[0] != "context"],
    ]
    with mapping.unread_mappings(type("Other", (ctypes.Structure,), {"_fields_": moved})) as works:
        assert not works


@pytest.mark.parametrize("options", [{"stream": "off"}, {"stream": "on"}, {"memory": "tight"}])
def test_a_record_does_not_change_what_is_computed(
    path: Path, expected: Any, tmp_path: Path, options: Mapping[str, Any]
) -> None:
    memory = memory_for(path, 9) if options.get("memory") else None
    trace = tmp_path / "trace.jsonl"
    with grok_local.load(path, trace_experts=trace, **{**OPTIONS, **options, "memory": memory}) as model:
        check(model, expected)
    assert len(trace.read_text().splitlines()) > 600
    with pytest.raises(OutputError, match="is there already"):
        grok_local.load(path, trace_experts=trace, **OPTIONS)


def realigned(path: Path, target: Path, alignment: int) -> Path:
    """The same model with its tensors at multiples of `alignment`."""
    found = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "grok")
    writer.add_custom_alignment(alignment)
    for field in found.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.alignment"):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for tensor in found.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
