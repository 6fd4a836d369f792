"""scripts/run and scripts/test: what they find, what they say, and that a clone that is set up is left alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("sh", "dirname", "cat", "cksum", "grep", "uname", "python3")


@pytest.fixture
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "scripts" / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def path_with(folder: Path, names: Iterable[str], *, real: bool = True) -> str:
    """A PATH with these commands and no others."""
    folder.mkdir(exist_ok=True)
    for name in names:
        found = sys.executable if name == "python3" else shutil.which(name)
        (folder / name).symlink_to(found if real and found else "/bin/true")
    return str(folder)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    return folder


def run(clone: Path, name: str, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    command = [str(clone / "scripts" / name), *arguments]
    env = {"PATH": path, "HOME": str(clone)}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=60)


def set_up(clone: Path, kind: str) -> None:
    """As setup.py leaves it, with a program that prints its arguments."""
    program = clone / ".venv" / "bin" / "grok-local"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nfor word; do echo "[$word]"; done\n')
    program.chmod(0o755)
    (clone / ".venv" / "bin" / "python").symlink_to(sys.executable)
    packages = clone / ".venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    files = [clone / "pyproject.toml", clone / "scripts" / "setup.py"]
    data = b"".join(file.read_bytes() for file in files)
    mark = subprocess.run(["cksum"], input=data, capture_output=True, check=True).stdout.decode().strip()
    (clone / ".venv" / "grok-local.stamp").write_text(f"{kind} {mark} {clone.resolve()}\n")


@pytest.mark.parametrize("kind", ["run", "test"])
def test_a_clone_that_is_set_up_runs_at_once(clone: Path, tmp_path: Path, kind: str) -> None:
    set_up(clone, kind)
    done = run(clone, "run", "quantize", "a b", "--", "-x", path=path_with(tmp_path / "bin", TOOLS))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[quantize]\n[a b]\n[--]\n[-x]\n"


def moved(clone: Path) -> Path:
    return clone.rename(clone.parent / "elsewhere")


def copied(clone: Path) -> Path:
    return Path(shutil.copytree(clone, clone.parent / "elsewhere", symlinks=True))


def without_its_python(clone: Path) -> Path:
    (clone / ".venv" / "bin" / "python").unlink()
    (clone / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    return clone


def with_a_newer_python(clone: Path) -> Path:
    """The same name is another version now, which does not look where the old one's packages are."""
    packages = next((clone / ".venv" / "lib").iterdir())
    packages.rename(packages.parent / "python3.9")
    return clone


@pytest.mark.parametrize("happens", [moved, copied, without_its_python, with_a_newer_python])
def test_an_environment_that_is_another_clones_or_lost_its_python_is_not_run(
    clone: Path, tmp_path: Path, happens: Callable[[Path], Path]
) -> None:
    (clone / "scripts" / "setup.py").write_text("import sys\nsys.exit('called: ' + sys.argv[2])\n")
    set_up(clone, "run")
    clone = happens(clone)
    done = run(clone, "run", "chat", path=path_with(tmp_path / "bin", TOOLS))
    assert done.stdout == ""
    assert done.stderr.startswith("called: run ")
    assert done.stderr.endswith(f" {clone.resolve()}\n")


def test_it_is_made_anew(clone: Path, tmp_path: Path) -> None:
    set_up(clone, "run")
    clone = copied(clone)
    (clone / ".venv" / "lib" / "old").touch()
    done = run(clone, "run", "chat", path=path_with(tmp_path / "bin", TOOLS))
    assert done.returncode == 1  # for want of a compiler: there is none in this PATH
    assert done.stderr.startswith("making .venv anew: ")
    assert "error: no C++ compiler" in done.stderr
    assert not (clone / ".venv" / "lib" / "old").exists()
    again = run(clone, "run", "chat", path=path_with(tmp_path / "again", TOOLS))
    assert again.stderr.startswith("error: no C++ compiler")  # what was begun here is gone on with


def test_without_a_compiler_a_line_says_what_to_install(clone: Path, tmp_path: Path) -> None:
    set_up(clone, "run")
    (clone / "pyproject.toml").write_text((clone / "pyproject.toml").read_text() + "# changed\n")
    done = run(clone, "run", "chat", path=path_with(tmp_path / "bin", TOOLS))
    assert done.returncode == 1
    assert done.stderr.startswith("error: no C++ compiler, which llama.cpp needs: ")
    assert done.stderr.count("\n") == 1


def test_without_python_a_line_says_so(clone: Path, tmp_path: Path) -> None:
    done = run(clone, "run", "chat", path=path_with(tmp_path / "bin", set(TOOLS) - {"python3"}))
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Python 3.10 or newer: ")


@pytest.mark.parametrize(
    ("commands", "chosen"),
    [
        (["clang", "clang++"], {"CC": "clang", "CXX": "clang++"}),
        (["clang-14", "clang++-14"], {"CC": "clang-14", "CXX": "clang++-14"}),
        (["gcc", "g++", "clang", "clang++"], {"CC": "gcc", "CXX": "g++"}),
        (["the-gcc", "c++"], {}),
        (["c++", "cc"], {"CC": "cc", "CXX": "c++"}),
    ],
)
def test_which_compiler_is_taken(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commands: list[str], chosen: dict[str, str]
) -> None:
    """Python was built with "the-gcc", which may be missing."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sysconfig.get_config_var", lambda _: "the-gcc -pthread")
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin", commands, real=False))
    assert setup.find_compilers() == chosen


def test_a_wheel_is_one_compilers_and_one_processors(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another compiler, also one with the same name, or another kind of processor: what is there is of no use."""

    def key(machine: str, compilers: dict[str, str]) -> str:
        return str(setup.build_key(compilers, options="-DA=ON", root=tmp_path / machine))

    for machine, line in {"old": "flags\t\t: avx2", "new": "flags\t\t: avx2 avx512f", "arm": "Features\t: sve"}.items():
        (tmp_path / machine / "proc").mkdir(parents=True)
        (tmp_path / machine / "proc" / "cpuinfo").write_text(f"{line}\n")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    usual = key("old", {})
    assert usual == key("old", {})
    assert len({key(machine, {}) for machine in ("old", "new", "arm")}) == 3
    monkeypatch.setenv("CXX", str(tmp_path / "mine"))
    named = key("old", {})
    (tmp_path / "mine").write_text("#!/bin/sh\necho version 19\n")
    (tmp_path / "mine").chmod(0o755)
    assert len({usual, named, key("old", {})}) == 3


def test_what_it_reads_off_the_project(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import version

    assert setup.pinned_llama() == version("llama-cpp-python")
    assert {name.partition(">")[0] for name in setup.needed("test")} >= {"pytest", "hypothesis", "ruff", "mypy"}
    assert [need.partition(">")[0] for need in setup.needed("run")] == ["fastapi", "python-multipart", "uvicorn"]
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_VULKAN=ON")
    assert setup.cmake_options(cuda=True) == "-DGGML_RPC=ON -DLLAVA_BUILD=OFF -DGGML_CUDA=ON -DGGML_VULKAN=ON"
    assert setup.cmake_options(cuda=False) == "-DGGML_RPC=ON -DLLAVA_BUILD=OFF -DGGML_VULKAN=ON"


def test_a_card_is_one_that_the_driver_knows(setup: ModuleType, tmp_path: Path) -> None:
    """CUDA's compiler alone is on many machines, and its libraries need the driver's."""
    assert not setup.has_nvidia_card(tmp_path)
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    assert setup.has_nvidia_card(tmp_path)


@pytest.mark.parametrize("works", [True, False])
def test_what_does_not_compile_for_the_card_is_compiled_for_the_processor(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, works: bool
) -> None:
    tried: list[str] = []

    def build(_compilers: dict[str, str], _uv: str | None, *, options: str) -> Path:
        tried.append(options)
        if "CUDA" in options and not works:
            raise setup.CompileError("no cuda_driver")
        return Path("a.whl")

    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    for name, found in {"find_compilers": {}, "find_nvcc": "/nvcc", "has_nvidia_card": True}.items():
        monkeypatch.setattr(setup, name, lambda found=found: found)
    monkeypatch.setattr(setup, "build_llama", build)
    assert setup.best_llama(None) == Path("a.whl")
    assert len(tried) == (1 if works else 2)
    assert ("for the processor alone" in capsys.readouterr().err) is not works


def test_they_are_plain_posix_shell() -> None:
    for name in ("run", "test", "environment.sh"):
        shell = shutil.which("dash") or "sh"
        subprocess.run([shell, "-n", ROOT / "scripts" / name], check=True)
    assert os.access(ROOT / "scripts" / "run", os.X_OK)
    assert os.access(ROOT / "scripts" / "test", os.X_OK)
