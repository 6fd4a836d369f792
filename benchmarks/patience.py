"""A server's long hours: answers that outlast the official clients' patience, and many clients of which half hang up.

    python -m benchmarks.patience slow [--seconds 700]
    python -m benchmarks.patience many [--clients 32] [--seconds 300]

`slow`: the official OpenAI and Anthropic clients with their own settings (600 seconds between bytes, two retries), each
with an answer at once and one as a stream, from an engine that is slowed down. `many`: the built-in model; every answer
is compared with the one it has when nobody else asks, and two clients ask for more than the context holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import psutil

import grok_local
from benchmarks.serving import served
from samples.checkpoints import REFERENCE, SMALL, write_checkpoint
from tests.serve.conftest import Running, started

_STEPS = 50


def slow(seconds: float) -> None:
    asks = (_openai, _openai_stream, _claude, _claude_stream)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "small", SMALL, REFERENCE / "small-tokenizer.model")
        path = grok_local.quantize_checkpoint(checkpoint, Path(folder) / "random.gguf").path
        with started(path, seconds=seconds / _STEPS) as server, ThreadPoolExecutor() as pool:
            began = time.monotonic()
            for ask, tokens in zip(asks, pool.map(lambda ask: ask(server), asks), strict=True):
                print(f"{ask.__name__.strip('_'):14} {tokens} tokens")
            print(f"all after {time.monotonic() - began:.0f} s; requests: {server.service.requests}")


def _openai(server: Running) -> int:
    answer = server.openai().completions.create(model="tiny", prompt="Once", max_tokens=_STEPS, seed=1)
    assert answer.usage
    return answer.usage.completion_tokens


def _openai_stream(server: Running) -> int:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(
        server.openai().completions.create(model="tiny", prompt="Twice", max_tokens=_STEPS, seed=2, **options)
    )
    tokens: int = pieces[-1].usage.completion_tokens
    return tokens


def _claude(server: Running) -> int:
    with anthropic.Anthropic(base_url=server.url, api_key="none") as client:
        answer = client.messages.create(**_message("How are you?"))
    tokens: int = answer.usage.output_tokens
    return tokens


def _claude_stream(server: Running) -> int:
    with (
        anthropic.Anthropic(base_url=server.url, api_key="none") as client,
        client.messages.stream(**_message("Who are you?")) as stream,
    ):
        return stream.get_final_message().usage.output_tokens


def _message(text: str) -> Any:
    return {"model": "tiny", "max_tokens": _STEPS, "messages": [{"role": "user", "content": text}]}


def many(clients: int, seconds: float) -> None:
    prompts = [f"{number}. What is an expert, and how many are there?" for number in range(64)]
    with served("tiny") as port:
        found = asyncio.run(_many(port, prompts, clients, seconds))
    for name, count in sorted(found.items()):
        print(f"{name:40} {count}")


async def _many(port: int, prompts: list[str], clients: int, seconds: float) -> Counter[str]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as http:
        alone = {prompt: (await _asked(http, prompt)).json()["choices"][0]["text"] for prompt in prompts}
        server = next(p for p in psutil.Process().children() if "serve" in p.cmdline())
        found: Counter[str] = Counter(resident_MB_at_the_start=server.memory_info().rss >> 20)
        end = time.monotonic() + seconds
        await asyncio.gather(*(_client(http, n, alone, end, found) for n in range(clients)))
        found["resident_MB_at_the_end"] = server.memory_info().rss >> 20
        found["server_running_afterwards"] = (await http.get("/local/machine")).json()["now"]["running"]
    return found


async def _asked(http: httpx.AsyncClient, prompt: str, **more: Any) -> httpx.Response:
    return await http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 64, "temperature": 0, **more})


async def _client(http: httpx.AsyncClient, number: int, alone: dict[str, str], end: float, found: Counter[str]) -> None:
    """The first two ask for too much, every second one of the others hangs up at random moments."""
    chance = random.Random(number)
    while time.monotonic() < end:
        prompt = chance.choice(list(alone))
        if number < 2:
            answer = await _asked(http, prompt * 99)
            found[f"beyond the context: status {answer.status_code}"] += 1
            await asyncio.sleep(0.5)
        elif number % 2:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_asked(http, prompt), chance.uniform(0, 1.5))
                found["would have hung up, was answered before"] += 1
                continue
            found["hung up"] += 1
        else:
            text = (await _asked(http, prompt)).json()["choices"][0]["text"]
            found["answers" if text == alone[prompt] else "answers other than alone"] += 1


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("what", choices=["slow", "many"])
    options.add_argument("--seconds", type=float)
    options.add_argument("--clients", type=int, default=32)
    given = options.parse_args()
    if given.what == "slow":
        slow(given.seconds or 700)
    else:
        many(given.clients, given.seconds or 300)


if __name__ == "__main__":
    main()
