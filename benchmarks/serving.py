"""Sixteen clients over HTTP against a batch of sixteen: the same prompts of the same model, in turns.

python -m benchmarks.serving [--model tiny] [--prompts 128] [--tokens 96] [--rounds 5] [--ids]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grok_local

CLIENTS = 16


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="tiny")
    options.add_argument("--prompts", type=int, default=128)
    options.add_argument("--tokens", type=int, default=96)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--ids", action="store_true", help="prompts of token ids, for a file without a tokenizer")
    given = options.parse_args()
    bodies = [
        {"prompt": prompt(number, ids=given.ids), "max_tokens": given.tokens, "temperature": 0.9, "seed": number}
        for number in range(given.prompts)
    ]
    with grok_local.load(given.model, parallel=CLIENTS, threads=1) as model, served(given.model) as port:
        by_batch(model, bodies[:CLIENTS])
        by_http(port, bodies[:CLIENTS])
        rounds = [(by_batch(model, bodies), by_http(port, bodies)) for _ in range(given.rounds)]
    for batch, served_ in rounds:
        print(f"batch {batch:8.1f} tokens/s    HTTP {served_:8.1f} tokens/s    ratio {served_ / batch:.3f}")
    print(f"median ratio {statistics.median(http / batch for batch, http in rounds):.3f}")


def prompt(number: int, *, ids: bool) -> str | list[int]:
    """One of 7 tokens or so, other than the others."""
    return [10 + number, *range(100, 106)] if ids else f"{number}. What is an expert?"


def by_batch(model: grok_local.Model, bodies: Sequence[dict[str, Any]]) -> float:
    """Tokens a second."""
    began = time.monotonic()
    tokens = sum(result.stats.generated_tokens for result in model.batch(bodies, parallel=CLIENTS))
    return tokens / (time.monotonic() - began)


def by_http(port: int, bodies: Sequence[dict[str, Any]]) -> float:
    """Likewise; the clients are a process of their own, as they would be."""
    command = [sys.executable, "-m", "benchmarks.serving", "client", str(port)]
    ended = subprocess.run(command, input=json.dumps(bodies), capture_output=True, text=True, check=True)
    return float(ended.stdout)


def client(port: int, bodies: Sequence[dict[str, Any]]) -> float:
    """Sixteen connections, each with one request after the other."""

    def ask(some: Sequence[dict[str, Any]]) -> int:
        connection, tokens = http.client.HTTPConnection("127.0.0.1", port), 0
        for body in some:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            tokens += json.loads(connection.getresponse().read())["usage"]["completion_tokens"]
        return tokens

    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        tokens = sum(pool.map(ask, [bodies[start::CLIENTS] for start in range(CLIENTS)]))
    return tokens / (time.monotonic() - began)


@contextmanager
def served(model: str) -> Iterator[int]:
    """A server of its own; the port."""
    command = [sys.executable, "-m", "grok_local", "serve", "-m", model, "--port", "0", "--parallel", str(CLIENTS)]
    command += ["--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "300"}) as process:
        assert process.stderr
        while not (found := re.search(r"serving .*:(\d+),", process.stderr.readline())):
            assert process.poll() is None
        with ThreadPoolExecutor(1) as pool:
            pool.submit(process.stderr.read)
            yield int(found[1])
            process.terminate()


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        print(client(int(sys.argv[2]), json.load(sys.stdin)))
    else:
        main()
