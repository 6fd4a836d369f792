"""How many of our functions lie between a command and llama.cpp: a reader follows each of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# The frames of the package, from the command's function on, each time llama.cpp is called.
TRACED = """
import atexit, json, sys, threading
import llama_cpp
from grok_local import cli
from grok_local.ggml import quants

ways = {}
def hops(name):
    frame, names = sys._getframe(2), []
    while frame:
        if frame.f_globals.get("__name__", "").startswith("grok_local."):
            names.append(f"{frame.f_globals['__name__']}:{frame.f_code.co_name}")
        frame = frame.f_back
    names = [n for n in names if not n.startswith(("grok_local.cli:", "grok_local.commands.options:"))]
    ways[name] = max(ways.get(name, []), names[::-1], key=len)

def watched(module, name):
    real = getattr(module, name)
    def call(*arguments):
        hops(name)
        return real(*arguments)
    setattr(module, name, call)

for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_decode", "llama_sampler_sample"):
    watched(llama_cpp, name)
watched(quants, "quantize_rows")
atexit.register(lambda: print(json.dumps(ways), file=sys.stderr))
cli.main()
"""


def ways(*arguments: object, stdin: str = "") -> dict[str, list[str]]:
    command = [sys.executable, "-c", TRACED, *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stderr.splitlines()[-1])
    return found


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_from_chat_to_llama_cpp(packed: Path, command: str) -> None:
    options = ("-m", packed, "--max-tokens", 3, "--context", 256)
    found = ways("chat", *options, stdin="Hello\n") if command == "chat" else ways("generate", "Hello", *options)
    assert set(found) == {"llama_model_load_from_file", "llama_init_from_model", "llama_decode", "llama_sampler_sample"}
    for name, way in found.items():
        assert way[0] == f"grok_local.commands.running:{command}"
        # So many hops: the last is the call itself. A draw is one of several, and its chain one of several kinds.
        assert len(way) <= (9 if name == "llama_sampler_sample" else 7), (name, way)


def test_from_quantize_to_the_packing_kernel(small: Path, tmp_path: Path) -> None:
    way = ways("quantize", small, "-o", tmp_path / "x.gguf")["quantize_rows"]
    # It begins in a thread of the pool, to which the command, quantize_checkpoint and PackingRun.pack have led.
    assert way[0] == "grok_local.quantize.packing.pool:_pack_piece"
    assert 3 + len(way) <= 6, way
