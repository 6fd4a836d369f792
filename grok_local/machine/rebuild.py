"""GPUs that llama.cpp could use, and the command that builds it anew: for them, or for this processor."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = [
    "GPU",
    "GPU_OPTIONS",
    "LLAMA",
    "Installer",
    "find_gpu",
    "installed_by",
    "pinned_version",
    "rebuild_command",
    "unused_gpu",
]

Installer = Literal["scripts", "uv", "pip"]

LLAMA = "llama-cpp-python"
GPU_OPTIONS = {  # by backend: how it is compiled in
    "CUDA": "-DGGML_CUDA=ON",
    "ROCm": "-DGGML_HIP=ON",
    "MTL": "-DGGML_METAL=ON",
    "Vulkan": "-DGGML_VULKAN=ON",
}
_BASE_OPTIONS = "-DGGML_RPC=ON -DLLAVA_BUILD=OFF"
_PROMPT_SECONDS = 10  # how long a driver's own tool may take
_STAMP = "grok-local.stamp"  # of an environment that scripts/run made


# -- GPUs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    """A maker's GPUs: llama.cpp's backend for them, and what compiling it in needs."""

    maker: str
    backend: str
    needs: str
    find: Callable[[Path], str]  # below root: a description, or nothing


def _find_nvidia(root: Path) -> str:
    listed = [path.read_text(errors="replace") for path in root.glob("proc/driver/nvidia/gpus/*/information")]
    models = [found[1].strip() for text in listed if (found := re.search(r"^Model:(.*)$", text, re.MULTILINE))]
    if not models and root == Path("/") and shutil.which("nvidia-smi"):  # WSL has the tool alone
        models = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", _output("nvidia-smi", "-L"), re.MULTILINE)
    return ", ".join(models)


def _find_amd(root: Path) -> str:
    nodes = [path.read_text(errors="replace") for path in root.glob("sys/class/kfd/kfd/topology/nodes/*/properties")]
    count = sum(bool(re.search(r"^simd_count [1-9]", text, re.MULTILINE)) for text in nodes)
    return f"{count} that ROCm knows" if count else ""


def _find_apple(_: Path) -> str:
    return "Apple silicon" if sys.platform == "darwin" and platform.machine() == "arm64" else ""


def _find_other(root: Path) -> str:
    names = sorted(path.name for path in root.glob("dev/dri/renderD*"))
    return ", ".join(names)


_VULKAN_NEEDS = "Vulkan's headers (1.3.272 or newer), glslc and SPIRV-Headers, or the Vulkan SDK which has all three"
_GPUS = (
    GPU("NVIDIA", "CUDA", "the CUDA toolkit", _find_nvidia),
    GPU("AMD", "ROCm", "ROCm", _find_amd),
    GPU("Apple", "MTL", "Xcode's command line tools", _find_apple),
    GPU("another maker", "Vulkan", _VULKAN_NEEDS, _find_other),
)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROMPT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def find_gpu(root: Path = Path("/")) -> tuple[GPU, str] | None:
    """The first maker's GPUs that the system knows, and what it calls them. `root` has proc, sys and dev."""
    return next(((gpu, text) for gpu in _GPUS if (text := gpu.find(root))), None)


def unused_gpu(backends: Iterable[str], root: Path = Path("/")) -> str | None:
    """A line about a GPU worth having that llama.cpp offers no device for; graphics inside a processor are not."""
    gpu, text = find_gpu(root) or (None, "")
    if gpu is None or gpu is _GPUS[-1]:
        return None
    reason = "sees none" if gpu.backend in set(backends) else "is not compiled in"
    return f"a GPU is there and not used: {gpu.maker} ({text}), but {gpu.backend} {reason}; grok-local doctor says more"


# -- building ----------------------------------------------------------------------------------------------------------


def pinned_version() -> str:
    """The llama-cpp-python that this package asks for; empty if the package itself is not installed."""
    try:
        needed = importlib.metadata.requires("grok-local") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    pin = re.search(rf"^{LLAMA}==([\w.]+)", "\n".join(needed), re.MULTILINE)
    return pin[1] if pin else ""


def installed_by() -> Installer:
    """What made this environment: scripts/run, or uv for a clone of the repository, or pip."""
    if (Path(sys.prefix) / _STAMP).exists():
        return "scripts"
    try:
        installer = importlib.metadata.distribution(LLAMA).read_text("INSTALLER") or ""
    except importlib.metadata.PackageNotFoundError:
        installer = "uv"
    in_clone = (Path(__file__).parents[2] / "pyproject.toml").is_file()
    return "uv" if installer.strip() == "uv" and in_clone else "pip"


def rebuild_command(options: str = "", *, backends: Iterable[str], installer: Installer, clang: bool = False) -> str:
    """The command for further CMake `options`; the `backends` there are stay."""
    kept = [option for backend, option in GPU_OPTIONS.items() if backend in set(backends)]
    wanted = " ".join(dict.fromkeys([*kept, *options.split(), *_BASE_OPTIONS.split()]))
    if installer == "scripts":
        compilers = "CC=clang CXX=clang++ " if clang else ""
        asked = " ".join(option for option in wanted.split() if option not in _BASE_OPTIONS.split())
        made, maker = shlex.quote(sys.prefix), shlex.quote(str(Path(sys.prefix).parent / "scripts" / "run"))
        return f'rm -r {made} && {compilers}CMAKE_ARGS="{asked}" {maker} doctor'
    if installer == "uv":
        # From the environment uv takes nothing that pyproject.toml sets, and what it did not build as set there it
        # builds again at the next `uv run`.
        compilers = 'CC = "clang"\\nCXX = "clang++"\\n' if clang else ""
        table = f'[extra-build-variables.{LLAMA}]\\n{compilers}CMAKE_ARGS = "{wanted}"\\n'
        return f"printf '{table}' > uv.toml && uv sync --no-cache --reinstall-package {LLAMA}"
    compilers = "CC=clang CXX=clang++ " if clang else ""
    version = pinned_version()
    install = f"pip install --force-reinstall --no-deps --no-cache-dir --no-binary {LLAMA}"
    return f'{compilers}CMAKE_ARGS="{wanted}" {install} {LLAMA}{"==" + version if version else ""}'
