"""Where the process would die without a word, it says one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOUCHED = """
import mmap, os, sys
from grok_local.ggml.libraries import exit_on_bus_error
exit_on_bus_error()
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    os.truncate(sys.argv[1], 10)
    print(mapped[5000])
"""

# What a GPU's driver throws comes out of llama.cpp as this comes out of the C++ library.
THROWN = """
import ctypes, threading
from grok_local.ggml.libraries import exit_on_abort
exit_on_abort()
library = ctypes.CDLL("libstdc++.so.6")
thread = threading.Thread(target=library._ZSt20__throw_out_of_rangePKc, args=(b"x",))
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="throws by a function of GNU's library")
def test_an_exception_of_a_driver_is_an_error_line() -> None:
    done = subprocess.run([sys.executable, "-c", THROWN], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: llama.cpp gave up (an exception, std::out_of_range): memory ran out, ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="throws by a function of GNU's library")
def test_what_drivers_print_is_not_seen_and_the_last_words_are() -> None:
    silenced = """
import os
from grok_local.ggml.libraries import kept_off_stderr
os.write(2, b"before\\n")
with kept_off_stderr():
    os.write(2, b"a driver's\\n")
os.write(2, b"after\\n")
kept_off_stderr().__enter__()
"""
    installed, thrown = THROWN.split("exit_on_abort()\n")
    program = f"{installed}exit_on_abort()\n{silenced}{thrown}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    before, after, last = done.stderr.splitlines()
    assert (done.returncode, before, after) == (1, "before", "after")
    assert last.startswith("error: llama.cpp gave up (an exception, std::out_of_range)")


def test_a_mapped_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(10000))
    done = subprocess.run([sys.executable, "-c", TOUCHED, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip().startswith("error: a file became shorter while it was read, or its disk failed")
