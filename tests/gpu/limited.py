"""Loads a model and evaluates a prompt on a device that is not what it says: python -m tests.gpu.limited MODEL JSON.

Prints what the device holds, as JSON; ends as grok-local does where it cannot.
"""

from __future__ import annotations

import json
import sys

import grok_local
from grok_local.errors import GrokLocalError
from grok_local.ggml.libraries import exit_on_abort


def main(path: str, options: str) -> None:
    exit_on_abort()
    try:
        with grok_local.load(path, **{"context": 32, "repack": "off", "threads": 2, **json.loads(options)}) as model:
            model.logits(list(range(5, 25)))
            held, plan = model.placement.held, model.placement.plan
            experts = next(iter(plan.expert_layers.values()))
            found = {"layers": plan.gpu_layers, "experts": experts, "held": held[0].weights + held[0].kv}
            found["compute"] = sum(place.compute for place in held)  # in software, RAM is the device's as well
            print(json.dumps({**found, "notes": model.placement.notes}))
    except GrokLocalError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(*sys.argv[1:])
