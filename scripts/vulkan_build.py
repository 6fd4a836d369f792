"""Builds llama.cpp's Vulkan backend for tests/gpu: vulkan_build.py. Standard library only; `test-gpu` calls it.

The installed llama-cpp-python plus two libraries is enough: one that registers the backend, and the backend. They are
compiled once from the source of that version, and kept in a cache; a folder that begins with a copy of the package and
has them is laid beside it. The last line on stdout is that folder, for PYTHONPATH. Code 77 says that something is
lacking here that cannot be had.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from setup import (
    BUILD,
    LLAMA,
    ROOT,
    CompileError,
    compile_watched,
    compiler_version,
    cpu_flags,
    fail,
    find_compilers,
    run,
    say,
)

LIBRARIES = ("libggml.so.0", "libggml-vulkan.so.0")
PACKAGES = "mesa-vulkan-drivers libvulkan-dev glslc spirv-headers"
OVERLAY = ROOT / "build" / "vulkan"
_INCLUDE = Path("/usr/include")
_LACKING = 77  # as automake's tests say that they were skipped
_LEAST_HEADERS = (1, 3, 272)  # which brought VK_EXT_layer_settings
_NEWER = "trixie"  # Debian's release whose headers are new enough for all that llama.cpp names
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_VULKAN=ON",
    "-DGGML_RPC=ON",
    "-DGGML_RPC_RDMA=OFF",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")),
)


def main() -> None:
    if missing := _missing():
        give_up(f"{', '.join(missing)}: apt-get install {PACKAGES}")
    started = time.monotonic()
    include = _headers()
    folder = _cache() / _key(include)
    words = "found"
    if not (folder / "lib").is_dir():
        try:
            _build(folder, include)
        except CompileError as error:
            fail(str(error))
        words = "built"
    _lay_over(folder / "lib")
    say(f"llama.cpp's Vulkan backend: {words} in {folder} ({time.monotonic() - started:.0f} s)")
    print(OVERLAY)


def give_up(lacking: str) -> NoReturn:
    say(f"tests/gpu: not run, there is no {lacking}")
    raise SystemExit(_LACKING)


# -- what there is -----------------------------------------------------------------------------------------------------


def _missing() -> list[str]:
    """What a build or its use lacks here, in words."""
    if sys.platform != "linux":
        return ["Linux, where Vulkan has a device in software"]
    parts = {
        "glslc": shutil.which("glslc"),
        "cmake": shutil.which("cmake", path=_path()),
        "ninja": shutil.which("ninja", path=_path()),
        "Vulkan's headers": _version_of(_INCLUDE),
        "SPIR-V's headers": (_INCLUDE / "spirv" / "unified1" / "spirv.hpp").exists(),
        "Mesa's lavapipe": any(Path("/usr/share/vulkan/icd.d").glob("lvp_icd*")),
    }
    return [name for name, found in parts.items() if not found]


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def _version_of(include: Path) -> tuple[int, ...]:
    """The version of the Vulkan headers there; none where there are none."""
    file = include / "vulkan" / "vulkan_core.h"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    complete = re.search(r"define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION\(\d+, (\d+), (\d+)", text)
    patch = re.search(r"define VK_HEADER_VERSION (\d+)", text)
    return (int(complete[1]), int(complete[2]), int(patch[1])) if complete and patch else ()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grok-local" / "vulkan"


def _key(include: Path) -> str:
    """Of what the libraries depend on; they are compiled for this kind of processor."""
    compilers = [compiler_version("CXX", find_compilers())[1], _output("glslc", "--version")]
    parts = (_version(), _version_of(include), compilers, platform.machine(), cpu_flags(), _OPTIONS)
    return f"{_version()}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def _version() -> str:
    return importlib.metadata.version(LLAMA)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# -- headers -----------------------------------------------------------------------------------------------------------


def _headers() -> Path:
    """Where Vulkan headers are that are new enough: the system's, or Debian's next ones in the cache."""
    if _version_of(_INCLUDE) >= _LEAST_HEADERS:
        return _INCLUDE
    folder = _cache() / f"headers-{_NEWER}"
    if not _version_of(folder / "usr" / "include"):
        _fetch_headers(folder)
    return folder / "usr" / "include"


def _fetch_headers(folder: Path) -> None:
    """By apt, with a state of its own: what the machine has stays what it is, and so do the sources it is told."""
    say(f"fetching Vulkan headers of Debian's {_NEWER}: those here are older than llama.cpp needs")
    state = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    _write_sources(state)
    dirs = {"State::Lists": state / "lists", "Cache": state / "cache", "Etc::SourceList": "/dev/null"}
    options = [f"-oDir::{name}={value}" for name, value in {**dirs, "Etc::SourceParts": state}.items()]
    _quietly("apt-get", "-qq", *options, "update")
    _quietly("apt-get", "-qq", *options, "download", "libvulkan-dev", cwd=state)
    _quietly("dpkg", "-x", next(state.glob("libvulkan-dev*.deb")), folder)
    shutil.rmtree(state)


def _write_sources(state: Path) -> None:
    """The system's own sources with the newer release's name."""
    old = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    if not old:
        give_up("Vulkan headers of 1.3.272 or newer, which can be fetched on Debian alone")
    apt = Path("/etc/apt")
    for name, files in (
        ("newer.sources", apt.glob("sources.list.d/*.sources")),
        ("newer.list", [apt / "sources.list", *apt.glob("sources.list.d/*.list")]),
    ):
        text = "\n".join(file.read_text() for file in files if file.exists())
        (state / name).write_text(re.sub(rf"\b{old[1]}\b", _NEWER, text))


def _quietly(*command: str | Path, cwd: Path | None = None) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        give_up(f"newer Vulkan headers: {' '.join(words)}: {done.stderr.strip()[-500:]}")


# -- the libraries -----------------------------------------------------------------------------------------------------


def _build(folder: Path, include: Path) -> None:
    """Raises CompileError."""
    say("compiling llama.cpp's Vulkan backend, which happens once")
    folder.mkdir(parents=True, exist_ok=True)
    source, objects = _source(folder) / "vendor" / "llama.cpp", folder / "objects"
    env = {**os.environ, **find_compilers(), "PATH": _path()}
    configure = ["cmake", "-S", str(source), "-B", str(objects), "-G", "Ninja", *_OPTIONS]
    compile_watched([*configure, f"-DVulkan_INCLUDE_DIR={include}"], env, folder)
    compile_watched(["cmake", "--build", str(objects), "--target", "ggml", "--target", "ggml-vulkan"], env, folder)
    unfinished = folder / "unfinished"
    unfinished.mkdir(exist_ok=True)
    for name in LIBRARIES:
        shutil.copyfile(next(objects.rglob(name)), unfinished / name)
    unfinished.replace(folder / "lib")
    for scratch in ("objects", "source"):
        shutil.rmtree(folder / scratch, ignore_errors=True)


def _source(folder: Path) -> Path:
    """The unpacked source: the one that this clone was compiled from, or fetched anew."""
    name = f"llama_cpp_python-{_version()}"
    for found in BUILD.glob(f"*/{name}"):
        return found
    scratch = folder / "source"
    if not (scratch / name).exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", LLAMA]
        run(*pip, "-d", scratch, f"{LLAMA}=={_version()}")
        with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
            filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(scratch, **filters)
    return scratch / name


# -- the package that has them -----------------------------------------------------------------------------------------


def _lay_over(libraries: Path) -> None:
    """The installed package with other libraries: what is no library is linked."""
    package, copy = _installed(), OVERLAY / "llama_cpp"
    shutil.rmtree(OVERLAY, ignore_errors=True)
    (copy / "lib").mkdir(parents=True)
    _link(copy, (path for path in package.iterdir() if path.name not in ("lib", "__pycache__")))
    _link(copy / "lib", (path for path in (package / "lib").iterdir() if path.name not in LIBRARIES))
    _link(copy / "lib", (libraries / name for name in LIBRARIES))


def _link(folder: Path, targets: Iterator[Path]) -> None:
    for target in targets:
        (folder / target.name).symlink_to(target)


def _installed() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    places: Sequence[str] = (spec.submodule_search_locations if spec else None) or ()
    if not places:
        fail(f"{LLAMA} is not installed beside {sys.executable}: call scripts/test-gpu")
    return Path(places[0])


if __name__ == "__main__":
    main()
