"""The command that builds llama.cpp anew, with other options or for this processor."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["GPU_OPTIONS", "LLAMA", "is_clone", "pinned_version", "rebuild_command"]

LLAMA = "llama-cpp-python"
GPU_OPTIONS = {  # by backend: how it is compiled in
    "CUDA": "-DGGML_CUDA=ON",
    "ROCm": "-DGGML_HIP=ON",
    "MTL": "-DGGML_METAL=ON",
    "Vulkan": "-DGGML_VULKAN=ON",
}
_BASE_OPTIONS = "-DGGML_RPC=ON -DLLAVA_BUILD=OFF"


def pinned_version() -> str:
    """The llama-cpp-python that this package asks for; empty if the package itself is not installed."""
    try:
        needed = importlib.metadata.requires("grok-local") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    pin = re.search(rf"^{LLAMA}==([\w.]+)", "\n".join(needed), re.MULTILINE)
    return pin[1] if pin else ""


def is_clone() -> bool:
    """Whether uv made this environment for a clone of the repository."""
    try:
        installer = importlib.metadata.distribution(LLAMA).read_text("INSTALLER") or ""
    except importlib.metadata.PackageNotFoundError:
        installer = "uv"
    return installer.strip() == "uv" and (Path(__file__).parents[2] / "pyproject.toml").is_file()


def rebuild_command(options: str = "", *, backends: Iterable[str], clone: bool, clang: bool = False) -> str:
    """The command for further CMake `options`; the `backends` there are stay. In a `clone` it is uv's, else pip's."""
    kept = [option for backend, option in GPU_OPTIONS.items() if backend in set(backends)]
    wanted = " ".join(dict.fromkeys([*kept, *options.split(), *_BASE_OPTIONS.split()]))
    if clone:
        # From the environment uv takes nothing that pyproject.toml sets, and what it did not build as set there it
        # builds again at the next `uv run`.
        compilers = 'CC = "clang"\\nCXX = "clang++"\\n' if clang else ""
        table = f'[extra-build-variables.{LLAMA}]\\n{compilers}CMAKE_ARGS = "{wanted}"\\n'
        return f"printf '{table}' > uv.toml && uv sync --no-cache --reinstall-package {LLAMA}"
    compilers = "CC=clang CXX=clang++ " if clang else ""
    version = pinned_version()
    install = f"pip install --force-reinstall --no-deps --no-cache-dir --no-binary {LLAMA}"
    return f'{compilers}CMAKE_ARGS="{wanted}" {install} {LLAMA}{"==" + version if version else ""}'
