"""Streamed models compute what resident ones do, whatever memory they have; and say so where they cannot."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import grok_local
from grok_local.errors import ModelError, OptionError, OutputError, PlacementError
from grok_local.formats import gguf_file
from grok_local.ggml import mapping, tensors
from grok_local.placement.load_options import LoadRequest
from grok_local.placement.shape import ModelShape, Role
from grok_local.placement.wishes import Wishes
from grok_local.runtime.engine import watching
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.experts import streamer
from samples.checkpoints import Spec, write_checkpoint
from tests.conftest import TOKENIZER, Run
from tests.workers import Worker

CONTEXT = 1024
IDS = random.Random(1).choices(range(5, 2000), k=700)
ALL = 12 * 8  # experts of the golden checkpoint
OPTIONS: dict[str, Any] = {"context": CONTEXT, "threads": 2, "repack": "off"}


@pytest.fixture(scope="module")
def path(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grok_local.quantize_checkpoint(golden, tmp_path_factory.mktemp("q4") / "golden.gguf").path


def memory_for(path: Path, held: float, context: int = CONTEXT, batch: int = 512) -> int:
    """RAM in which so many experts fit beside everything else."""
    shape = ModelShape.from_headers(gguf_file.read_model(path))
    dense = sum(weight.nbytes for weight in shape.weights if weight.role is not Role.EXPERTS and not weight.tied)
    kv = sum(shape.kv_bytes(layer, context=context, kv_type="f16") for layer in range(shape.layers))
    compute = shape.compute_bytes(context=context, batch=batch, attention=True, experts=True, output=True)
    return dense + kv + compute + int(held * shape.layer_bytes(0, Role.EXPERTS) / shape.experts)


def results(model: grok_local.Model) -> tuple[npt.NDArray[np.float32], list[list[int]]]:
    """Logits of every position, and what is generated: after a long prompt, and in a conversation."""
    logits = model.logits(IDS[:300])
    replies = [
        model.generate(model.detokenize(IDS[:150]), max_tokens=30, temperature=0),
        model.chat([{"role": "user", "content": "Why?"}], max_tokens=20, temperature=1.0, seed=3),
    ]
    return logits, [reply.tokens for reply in replies if "".join(reply)]


@pytest.fixture(scope="module")
def expected(path: Path) -> tuple[npt.NDArray[np.float32], list[list[int]]]:
    with grok_local.load(path, stream="off", **OPTIONS) as model:
        assert model.engine.expert_stats() is None
        return results(model)


def check(model: grok_local.Model, expected: tuple[npt.NDArray[np.float32], list[list[int]]]) -> None:
    logits, tokens = results(model)
    assert np.array_equal(logits, expected[0])
    assert tokens == expected[1]


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


def test_sequences_together_are_what_they_are_together_in_memory(path: Path) -> None:
    rng = random.Random(2)
    steps = [{n: [rng.randrange(2000) for _ in range(rng.randrange(1, 4))] for n in range(16)} for _ in range(4)]
    steps += [{n: [rng.randrange(2000)] for n in rng.sample(range(16), 5)} for _ in range(4)]

    def run(**wishes: Any) -> list[npt.NDArray[np.float32]]:
        with closing(
            LlamaEngine(LoadRequest(path, Wishes(CONTEXT // 16, sequences=16, repack="off", **wishes), threads=2))
        ) as engine:
            return [engine.evaluate_together(step) for step in steps]

    resident, streamed = run(stream="off"), run(memory=memory_for(path, 10))
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


# -- what can go wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(path: Path, tmp_path: Path) -> Iterator[grok_local.Model]:
    copy = Path(shutil.copy(path, tmp_path / "copy.gguf"))
    with grok_local.load(copy, memory=memory_for(path, 9), **OPTIONS) as model:
        yield model


def test_a_file_that_changes_is_noticed(streamed: grok_local.Model) -> None:
    reply = streamed.generate("Hello", max_tokens=400, temperature=0)
    next(reply)
    with streamed.path.open("rb+") as file:
        file.seek(20_000_000)
        file.write(b"something else")
    with pytest.raises(ModelError, match="has changed"):
        list(reply)
    with pytest.raises(ModelError, match="has changed"):
        list(streamed.generate("Hello", max_tokens=4))


def test_a_file_whose_time_is_put_back_is_noticed(streamed: grok_local.Model) -> None:
    status = streamed.path.stat()
    with streamed.path.open("rb+") as file:
        file.seek(20_000_000)
        file.write(b"something else")
    os.utime(streamed.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ModelError, match="has changed"):
        streamed.logits(IDS[:5])


def test_a_file_that_becomes_shorter_is_noticed(streamed: grok_local.Model) -> None:
    reply = streamed.generate("Hello", max_tokens=400, temperature=0)
    next(reply)
    os.truncate(streamed.path, 1_000_000)
    with pytest.raises(ModelError, match=r"changed|shorter"):
        list(reply)


def test_a_file_that_vanishes_is_noticed(streamed: grok_local.Model) -> None:
    reply = streamed.generate("Hello", max_tokens=400, temperature=0)
    next(reply)
    streamed.path.unlink()
    with pytest.raises(ModelError, match="was deleted while it was in use"):
        list(reply)


def test_a_read_that_fails_is_an_error_and_can_be_tried_again(
    streamed: grok_local.Model, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.preadv, [5]

    def preadv(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(ModelError, match=r"copy.gguf: cannot be read \(Input/output error\)"):
            streamed.logits(IDS[:300])
    assert np.array_equal(streamed.logits(IDS[:300]), expected[0])


def test_an_interrupt_ends_waiting_for_a_slow_disk(
    streamed: grok_local.Model, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(*arguments: Any) -> int:
        time.sleep(0.3)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        reply = streamed.generate(streamed.detokenize(IDS[:50]), max_tokens=100)
        threading.Timer(0.5, streamed.interrupt).start()
        started = time.monotonic()
        assert list(reply) == []
        assert time.monotonic() - started < 3
    assert reply.finish_reason == "interrupted"
    streamed.engine.interrupted = False
    assert np.array_equal(streamed.logits(IDS[:300]), expected[0])


def test_ctrl_c_at_any_moment_leaves_nothing_wrong(streamed: grok_local.Model) -> None:
    rng, caught, right = random.Random(4), 0, streamed.logits(IDS[:60])
    for _ in range(25):
        timer = threading.Timer(rng.uniform(0, 0.12), os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            found = streamed.logits(IDS[:60])
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            caught += 1
        else:
            assert np.array_equal(found, right)
        timer.join()
        assert np.array_equal(streamed.logits(IDS[:60]), right)
    assert caught > 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_from_outside_at_any_moment_leaves_nothing_wrong(streamed: grok_local.Model) -> None:
    def ring(*_: object) -> None:
        raise TimeoutError

    before, rng, broken = signal.signal(signal.SIGALRM, ring), random.Random(5), 0
    right = streamed.logits(IDS[:60])
    try:
        for _ in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 0.08))
                found = streamed.logits(IDS[:60])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (TimeoutError, ModelError):
                broken += 1
            else:
                assert np.array_equal(found, right)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert np.array_equal(streamed.logits(IDS[:60]), right)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert broken > 5


def test_a_graph_without_what_was_read_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "sources", lambda _: iter(()))  # no node uses any weight, as far as can be seen
    with (
        grok_local.load(path, memory=memory_for(path, 9), **OPTIONS) as model,
        pytest.raises(ModelError, match="--stream off"),
    ):
        model.logits(IDS[:5])


def test_an_exception_while_looking_on_comes_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with grok_local.load(path, memory=memory_for(path, 9), **OPTIONS) as model:
        monkeypatch.setattr(streamer, "read_ints", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.logits(IDS[:5])
        monkeypatch.undo()
        assert model.logits(IDS[:5]).shape == (5, 2048)


def test_memory_that_cannot_be_reserved_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def residents(*_: Any, **__: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(streamer, "residents", residents)
    with pytest.raises(ModelError, match="no memory can be reserved"):
        grok_local.load(path, memory=memory_for(path, 9), **OPTIONS)


# -- a record of routing -----------------------------------------------------------------------------------------------


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


def test_a_record_that_cannot_be_written_is_one_error(path: Path, tmp_path: Path, run: Run) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    options = ["--context", 512, "--max-tokens", 200, "--trace-experts", tmp_path / "t"]
    found = run("generate", "-m", path, "hello hello", *options, preexec_fn=small_files)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 't'}: the record of experts cannot be written")
    # What was written of it is of use.
    assert "tokens through 12 layers" in run("routing", tmp_path / "t").stdout


def test_a_record_without_a_token_does_not_stay(path: Path, tmp_path: Path) -> None:
    with grok_local.load(path, trace_experts=tmp_path / "t", **OPTIONS):
        assert (tmp_path / "t").exists()
    assert not (tmp_path / "t").exists()
    with pytest.raises(PlacementError):
        grok_local.load(path, trace_experts=tmp_path / "t", memory=1000, **OPTIONS)
    assert not (tmp_path / "t").exists()
    with pytest.raises(OptionError, match="name a file"):
        grok_local.load(path, trace_experts="", **OPTIONS)


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
