"""Makes this clone's environment, .venv: setup.py run|test STAMP. Standard library only; `run` and `test` call it.

llama.cpp is compiled for what the machine has, in a folder that stays: stopped, the next call goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
VENV, BUILD = ROOT / ".venv", ROOT / "build" / "llama.cpp"
PYTHON, STAMP = VENV / "bin" / "python", VENV / "grok-local.stamp"
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
LLAMA = "llama-cpp-python"
CUDA = "-DGGML_CUDA=ON"
WITHOUT_COMMON = ROOT / "scripts" / "without_common.cmake"
_BUILD_FLAGS = ("CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX")  # what compilers are told by the environment
_BUILD_TOOLS = ("scikit-build-core>=0.10", "cmake>=3.21", "ninja")


class CompileError(Exception):
    """llama.cpp did not compile; the message has the compiler's last words and says where the others are."""


def main(kind: str, stamp: str) -> None:
    uv = shutil.which("uv")
    make_environment(uv, stamp)
    if installed_llama() != pinned_llama():
        install(uv, best_llama(uv))
    say("installing the other packages")
    install(uv, "-e", ROOT, *needed(kind))
    STAMP.write_text(f"{stamp}\n", encoding="utf-8")


# -- what there is -----------------------------------------------------------------------------------------------------


def find_compilers() -> dict[str, str]:
    """CC and CXX where the usual ones are not there: Python may name one that is missing. Exits without any."""
    if os.environ.get("CXX"):
        return {}
    pythons_own = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(pythons_own) and shutil.which("c++"):
        return {}
    versioned = [(path.name.replace("clang++", "clang"), path.name) for path in _in_path("clang++-*")]
    for cc, cxx in [("cc", "c++"), ("gcc", "g++"), ("clang", "clang++"), *versioned]:
        if shutil.which(cc) and shutil.which(cxx):
            return {"CC": cc, "CXX": cxx}
    return fail(f"no C++ compiler, which llama.cpp needs: {_install('g++', mac='xcode-select --install')}")


def compiler_version(name: str, compilers: dict[str, str]) -> tuple[str, str]:
    """What is called as CC or CXX, and what it says it is: a name can mean another compiler tomorrow."""
    usual = {"CC": sysconfig.get_config_var("CC") or "cc", "CXX": "c++"}[name]
    command = compilers.get(name) or os.environ.get(name) or usual
    return command, _output(*shlex.split(command), "--version")


def cpu_flags(root: Path = Path("/")) -> str:
    """What this kind of processor can do: llama.cpp is compiled for it, and a clone may be on several machines."""
    found = re.search(r"^(flags|Features).*", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[0] if found else _output("sysctl", "-n", "machdep.cpu.brand_string")


def cmake_options(*, cuda: bool) -> str:
    """The project's, CUDA's if wanted, and what the user's CMAKE_ARGS say, which have the last word."""
    base = re.search(r'CMAKE_ARGS = "([^"]*)"', PROJECT)
    wanted = [base[1] if base else "", CUDA if cuda else "", os.environ.get("CMAKE_ARGS", "")]
    return " ".join(filter(None, wanted))


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def has_nvidia_card(root: Path = Path("/")) -> bool:
    """Whether the driver knows one: the compiler alone is on many machines without. WSL has the tool alone."""
    if any(root.glob("proc/driver/nvidia/gpus/*")):
        return True
    if root != Path("/") or not shutil.which("nvidia-smi"):
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def pinned_llama() -> str:
    pin = re.search(rf'"{LLAMA}==([\w.]+)"', PROJECT)
    return pin[1] if pin else ""


def installed_llama() -> str:
    found = [path.name.split("-")[1] for path in VENV.glob("lib/python*/site-packages/llama_cpp_python-*.dist-info")]
    return found[0].removesuffix(".dist") if found else ""


def _output(*command: str) -> str:
    """What it prints; nothing where it is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def _in_path(pattern: str) -> Iterator[Path]:
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield from sorted(Path(folder).glob(pattern), reverse=True)


# -- the environment ---------------------------------------------------------------------------------------------------


def make_environment(uv: str | None, stamp: str) -> None:
    """One that works and was made here stays, as far as it is; another is replaced: it would run another's code."""
    if environment_works() and made_here():
        return
    if VENV.is_symlink():
        VENV.unlink()
    elif VENV.exists():
        say("making .venv anew: the clone was moved or copied, or the Python that it was made with is gone")
        shutil.rmtree(VENV)
    _new_environment(uv)
    STAMP.write_text(f"unfinished {stamp.partition(' ')[2]}\n", encoding="utf-8")


def environment_works() -> bool:
    """Whether its Python is there, and of the version that its packages were installed for."""
    version = _output(str(PYTHON), "-ISc", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    return bool(version) and (VENV / f"lib/python{version}/site-packages").is_dir()


def made_here() -> bool:
    """Whether no stamp says otherwise: it is a kind, a checksum of two numbers, and the clone's path."""
    return not STAMP.exists() or _text(STAMP).rstrip("\n").split(" ", 3)[3:] == [str(ROOT)]


def _new_environment(uv: str | None) -> None:
    if uv:
        run(uv, "venv", "--quiet", "--seed", "--python", sys.executable, VENV)
        return
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        fail(f"Python's venv module is missing: {_install('python3-venv')}")
    run(sys.executable, "-m", "venv", VENV)


def install(uv: str | None, *arguments: str | Path) -> None:
    if uv:
        run(uv, "pip", "install", "--quiet", "--python", PYTHON, *arguments)
    else:
        run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def needed(kind: str) -> list[str]:
    """What is wanted beside the project and what it needs: serve's packages, and for the tests theirs."""
    names = ["server", "dev"] if kind == "test" else ["server"]
    groups = [re.search(rf"^{name} = \[(.*?)\]$", PROJECT, re.MULTILINE | re.DOTALL) for name in names]
    lines = [line for group in groups if group for line in group[1].splitlines() if not line.lstrip().startswith("#")]
    return list(dict.fromkeys(re.findall(r'"([^"]+)"', "\n".join(lines))))


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


def best_llama(uv: str | None) -> Path:
    """A wheel of llama.cpp for this machine: with CUDA where that can be had. Exits where it cannot be compiled."""
    compilers = find_compilers()
    if find_nvcc() and has_nvidia_card():
        try:
            return build_llama(compilers, uv, options=cmake_options(cuda=True))
        except CompileError as error:
            say(f"{error}\nllama.cpp did not compile for the GPU: compiling it for the processor alone")
    try:
        return build_llama(compilers, uv, options=cmake_options(cuda=False))
    except CompileError as error:
        return fail(str(error))


def build_llama(compilers: dict[str, str], uv: str | None, *, options: str) -> Path:
    """A wheel of llama.cpp, compiled with these options of CMake. Raises CompileError."""
    version = pinned_llama()
    folder = BUILD / build_key(compilers, options=options)
    done = sorted(folder.glob("wheels/*.whl"))
    if done:
        return done[0]
    say(f"compiling llama.cpp, which happens once ({options})")
    install(uv, *_BUILD_TOOLS)
    env = {
        **os.environ,
        **compilers,
        "CMAKE_ARGS": f"{options} -DCMAKE_PROJECT_llama.cpp_INCLUDE={shlex.quote(str(WITHOUT_COMMON))}",
        "SKBUILD_BUILD_DIR": str(folder / "objects"),
        "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    if nvcc := find_nvcc():
        env.setdefault("CUDACXX", nvcc)
    wheel = [str(PYTHON), "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "unfinished")]
    compile_watched([*wheel, str(_source(folder, version))], env, folder)
    (folder / "unfinished").replace(folder / "wheels")
    return next((folder / "wheels").glob("*.whl"))


def build_key(compilers: dict[str, str], *, options: str, root: Path = Path("/")) -> str:
    """Of all that a wheel depends on: with anything else it is another one. `root` has proc."""
    called = [compiler_version(name, compilers) for name in ("CC", "CXX")]
    flags = [os.environ.get(name, "") for name in _BUILD_FLAGS]
    parts = (pinned_llama(), options, called, flags, platform.machine(), cpu_flags(root), sys.version_info[:2])
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def _source(folder: Path, version: str) -> Path:
    """The unpacked source, fetched once: the objects of an interrupted build belong to its path."""
    source = folder / f"llama_cpp_python-{version}"
    if not source.exists():
        pip = [PYTHON, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", LLAMA]
        run(*pip, "-d", folder, f"{LLAMA}=={version}")
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            # Debian 12's Python has no filters yet; the archive is the one whose hash the index gave.
            filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(folder / "unpacking", **filters)
        next((folder / "unpacking").iterdir()).replace(source)
    return source


def compile_watched(command: Sequence[str], env: dict[str, str], folder: Path) -> None:
    """Run it with a line that moves; its own words go to a file. Raises CompileError."""
    log = folder / "compile.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
    started = shown = time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.5)
            if sys.stderr.isatty() or time.monotonic() - shown > 30:
                shown = time.monotonic()
                _show(folder / "objects", shown - started)
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if sys.stderr.isatty():
        say("")
    if process.returncode:
        words = [
            line for line in log.read_text(errors="replace").splitlines() if re.search(r"error|Error|No such", line)
        ]
        raise CompileError(f"llama.cpp did not compile; {log} has all of it:\n  " + "\n  ".join(words[-5:]))


def _show(objects: Path, seconds: float) -> None:
    total = len(re.findall(r"^build \S+\.o:", _text(objects / "build.ninja"), re.MULTILINE))
    done = len(set(re.findall(r"\t(\S+\.o)\t", _text(objects / ".ninja_log"))))
    files = f"{done} of {total} files" if total else "configuring"
    line = f"llama.cpp: {files}, {seconds // 60:.0f}:{seconds % 60:02.0f} min"
    print(f"\r{line}  ", end="", file=sys.stderr, flush=True) if sys.stderr.isatty() else say(line)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# -- words -------------------------------------------------------------------------------------------------------------


def run(*command: str | Path) -> None:
    if subprocess.run([str(word) for word in command], check=False).returncode:
        raise SystemExit(1)  # it has said why


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    say(f"error: {text}")
    raise SystemExit(1)


def _install(package: str, *, mac: str = "") -> str:
    """The command that installs a Debian package, or what it is called elsewhere."""
    if sys.platform == "darwin":
        return mac or "brew install python"
    others = {"g++": {"dnf": "gcc-c++", "pacman": "gcc", "zypper": "gcc-c++"}, "python3-venv": {"apk": "python3"}}
    for tool, command in (
        ("apt", "install"),
        ("dnf", "install"),
        ("zypper", "install"),
        ("apk", "add"),
        ("pacman", "-S"),
    ):
        if shutil.which(tool):
            return f"sudo {tool} {command} {others.get(package, {}).get(tool, package)}"
    return f"install {package}"


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        say("\nstopped: the same command goes on from here")
        raise SystemExit(130) from None
