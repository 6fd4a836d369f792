"""What the doctor says about machines that are made up, and about this one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grok_local.errors import GGUFError
from grok_local.formats.gguf_file import read_model
from grok_local.ggml.devices import cpu_features
from grok_local.machine.doctor import TOPICS, Finding, System, examine
from grok_local.machine.rebuild import pinned_version, rebuild_command
from grok_local.machine.trials import REPACK, Item, Outcome


class Canned:
    """What children answer, instead of children: 12 GB/s, and of every check that it is right."""

    def __init__(self, answers: dict[Item, Outcome]) -> None:
        self._answers = answers

    def __call__(self, items: Sequence[Item], **_: Any) -> dict[Item, Outcome]:
        usual = {"prompt": Outcome(1e9), "speed": Outcome(12e9), "check": Outcome(1e-7)}
        return {item: self._answers.get(item, usual[item.kind]) for item in items}


def system(root: Path = Path("/"), answers: dict[Item, Outcome] | None = None, **described: Any) -> System:
    """This machine, without measuring it, or one that is described."""
    return replace(System(root=root, trial=Canned(answers or {}), buffers=lambda: ["AMX", REPACK]), **described)


def examined(model: Path | None = None, **described: Any) -> list[Finding]:
    return examine(model, system=system(**described))


def rebuilt(options: str = "", *, clang: bool = False, backends: Sequence[str] = ()) -> str:
    """The command of this environment."""
    here = System()
    return rebuild_command(options, backends=backends or here.backends(), installer=here.installer(), clang=clang)


def about(topic: str, findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.topic == topic]


def only(topic: str, findings: Sequence[Finding]) -> Finding:
    (finding,) = about(topic, findings)
    return finding


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_every_topic_has_a_finding_of_one_line() -> None:
    findings = examined()
    assert {finding.topic for finding in findings} >= set(TOPICS) - {"huge pages"}
    for finding in findings:
        assert finding.text
        assert len((finding.text + finding.remedy).splitlines()) == 1
        assert finding.status in ("ok", "note", "problem")
        assert finding.status == "ok" or finding.remedy


def test_the_version_is_the_one_that_is_needed() -> None:
    assert only("llama.cpp", examined()) == Finding("llama.cpp", "ok", f"llama-cpp-python {pinned_version()}")
    for version, words in (("0.0.1", "llama-cpp-python 0.0.1 is installed"), (None, "is not installed")):
        finding = only("llama.cpp", examined(version=lambda version=version: version))
        assert words in finding.text
        assert (finding.status, finding.remedy) == ("problem", rebuilt())


def test_a_models_own_types_are_measured(packed: Path) -> None:
    answers = {Item("speed", "Q4_K"): Outcome(7e9)}
    _, *texts = [finding.text for finding in about("speed", examined(packed, answers=answers))]
    assert "Q4_K: 7 GB/s, rearranged 12 GB/s" in texts
    types = {tensor.type.name for header in read_model(packed) for tensor in header.tensors}
    assert {text.partition(":")[0] for text in texts} == types


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GGUFError):
        examined(tmp_path / "none.gguf")


# -- how to build it anew ----------------------------------------------------------------------------------------------


def test_in_a_clone_the_command_tells_uv_for_good(tmp_path: Path) -> None:
    command = rebuild_command("-DGGML_CUDA=ON", backends=["CPU"], installer="uv", clang=True)
    first, _, second = command.partition(" && ")
    subprocess.run(["sh", "-c", first], cwd=tmp_path, check=True)
    assert (tmp_path / "uv.toml").read_text() == (
        "[extra-build-variables.llama-cpp-python]\n"
        'CC = "clang"\nCXX = "clang++"\n'
        'CMAKE_ARGS = "-DGGML_CUDA=ON -DGGML_RPC=ON -DLLAVA_BUILD=OFF"\n'
    )
    assert second == "uv sync --no-cache --reinstall-package llama-cpp-python"


def test_elsewhere_the_command_is_pips() -> None:
    version = pinned_version()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert rebuild_command(backends=["CPU"], installer="pip", clang=True) == (
        'CC=clang CXX=clang++ CMAKE_ARGS="-DGGML_RPC=ON -DLLAVA_BUILD=OFF" pip install --force-reinstall --no-deps '
        f"--no-cache-dir --no-binary llama-cpp-python llama-cpp-python=={version}"
    )


def test_a_rebuild_keeps_the_backends_there_are() -> None:
    backends = ["CUDA", "CPU"]
    command = rebuild_command("-DGGML_VULKAN=ON", backends=backends, installer="pip")
    assert '"-DGGML_CUDA=ON -DGGML_VULKAN=ON -DGGML_RPC=ON ' in command
    finding = about("backends", examined(backends=lambda: backends))[1]
    assert (finding.status, finding.remedy) == ("note", rebuilt(backends=backends))


# -- GPUs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "text", "option"),
    [
        (
            {"proc/driver/nvidia/gpus/0/information": "Model: \t NVIDIA X9\nIRQ: 1\n"},
            "NVIDIA (NVIDIA X9): CUDA is not compiled in",
            "-DGGML_CUDA=ON",
        ),
        (
            {"sys/class/kfd/kfd/topology/nodes/1/properties": "cpu_cores_count 0\nsimd_count 120\n"},
            "AMD (1 that ROCm knows): ROCm is not compiled in",
            "-DGGML_HIP=ON",
        ),
        (
            {"dev/dri/renderD128": ""},
            "another maker (renderD128): Vulkan is not compiled in",
            "-DGGML_VULKAN=ON",
        ),
    ],
)
def test_a_gpu_that_this_build_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], text: str, option: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    backends = ["CPU", "RPC"]
    finding = only("GPU", examined(root=machine(tmp_path, files), devices=list, backends=lambda: backends))
    assert (finding.status, finding.text) == ("problem", text)
    assert finding.remedy.endswith(rebuilt(option, backends=backends))


def test_what_vulkan_is_compiled_with_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    root = machine(tmp_path, {"dev/dri/renderD128": ""})
    finding = only("GPU", examined(root=root, devices=list, backends=lambda: ["CPU", "RPC"]))
    assert "headers (1.3.272 or newer), glslc and SPIRV-Headers, or the Vulkan SDK" in finding.remedy


def test_a_gpu_whose_backend_sees_none(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/driver/nvidia/gpus/0/information": "Model: X9\n"})
    finding = only("GPU", examined(root=root, devices=list, backends=lambda: ["CPU", "CUDA", "RPC"]))
    assert finding.status == "problem"
    assert "CUDA_VISIBLE_DEVICES" in finding.remedy


# -- processor and kernels ---------------------------------------------------------------------------------------------


def test_a_build_for_another_processor(tmp_path: Path) -> None:
    if "AVX2" not in cpu_features():
        pytest.skip("this build is for none with AVX2")
    root = machine(tmp_path, {"proc/cpuinfo": "flags : fpu fma f16c sve\n"})
    foreign, unused = about("processor", examined(root=root))
    assert foreign.text.startswith("built for another processor: this one has no AVX2")
    assert unused.text == "built without SVE, which this processor has"
    assert foreign.remedy == unused.remedy == rebuilt()


def test_a_build_without_amx_is_less_of_a_problem(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/cpuinfo": "flags : avx2 amx_int8\n"})
    note, ok = about("processor", examined(root=root, features=lambda: {"AVX2": "1"}))
    assert (note.status, ok.status) == ("note", "ok")
    assert note.remedy.endswith(rebuilt(clang=True))


def test_a_broken_layout_is_named_and_cured() -> None:
    answers = {Item("check", "Q4_0", "AMX"): Outcome(failure="crashed (SIGSEGV)")}
    amx, repack = about("layouts", examined(answers=answers))
    assert (amx.status, amx.text) == ("problem", "AMX: Q4_0 crashed (SIGSEGV); not used")
    assert amx.remedy == f"with clang 19 or newer installed: {rebuilt(clang=True)}"
    assert (repack.status, repack.text) == ("ok", "CPU_REPACK: right for Q4_K, Q8_0, Q6_K, F32")


def test_a_kernel_that_cannot_be_used() -> None:
    answers = {Item("speed", "Q6_K"): Outcome(failure="crashed (SIGILL)")}
    assert Finding("speed", "problem", "Q6_K: no kernel here") in [
        Finding(found.topic, found.status, found.text) for found in examined(answers=answers)
    ]


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_containers_limits_are_said(tmp_path: Path) -> None:
    files = {"memory.max": "1000000000", "memory.current": "250000000", "cpu.max": "50000 100000"}
    groups = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    findings = examined(root=machine(tmp_path, {"proc/self/cgroup": "0::/\n", **groups}))
    memory, cores = only("memory", findings), only("cores", findings)
    assert (memory.status, memory.text.partition(";")[0]) == ("note", "750 MB of 1 GB available")
    assert (cores.status, cores.text.partition(" of")[0]) == ("note", "0.5 processors' time")


@pytest.mark.parametrize(("text", "status"), [("[always] madvise never", "ok"), ("always [madvise] never", "note")])
def test_huge_pages(tmp_path: Path, text: str, status: str) -> None:
    root = machine(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": text})
    assert only("huge pages", examined(root=root)).status == status


def test_the_disk_is_that_of_the_models(home: Path, tmp_path: Path) -> None:
    folder = home / "models"
    assert "no model here" in only("disk", examined()).text
    folder.mkdir(parents=True)
    (folder / "large.gguf").write_bytes(b"x" * (40 << 20))
    assert re.search(r"free in .*; reads [\d.]+ .B/s", only("disk", examined()).text)
