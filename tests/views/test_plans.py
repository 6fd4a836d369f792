"""The placement in llama.cpp's own options: what its programs would do with them is what was planned."""

from __future__ import annotations

from typing import Any

import pytest

from grok_local.placement.planner import make_plan
from grok_local.placement.wishes import Wishes
from grok_local.views.plans import llama_options
from tests.placement.test_planner import machine, release


@pytest.mark.parametrize(
    ("sizes", "wishes", "options"),
    [
        ((256,), Wishes(), ["-c", "8192", "-ngl", "0"]),
        ((256, 24), Wishes(experts_on="cpu"), ["-c", "8192", "-ngl", "65"]),
        ((256, 24, 24), Wishes(experts_on="cpu"), ["-c", "8192", "-ngl", "65", "-ts", "34,31"]),
        # Without a split llama.cpp would fill both devices.
        ((256, 0.6, 24), Wishes(experts_on="cpu"), ["-c", "8192", "-ngl", "65", "-ts", "0,65"]),
        ((256, 24, 24), Wishes(gpu_layers=0, experts_on="cpu"), ["-c", "8192", "-ngl", "0"]),
        (
            (256,),
            Wishes(context=512, sequences=4, kv_type="f32"),
            ["-c", "2048", "-ngl", "0", "-np", "4", "-ctk", "f32", "-ctv", "f32"],
        ),
        ((64,), Wishes(context=500, sequences=4, batch=512), ["-c", "2000", "-ngl", "0", "-np", "4", "-kvu"]),
    ],
)
def test_llamas_options_say_what_is_planned(sizes: Any, wishes: Wishes, options: list[str]) -> None:
    found = llama_options(make_plan(release("grok-1"), machine(*sizes), wishes))
    given = found[: found.index("-ot")] + found[found.index("-ot") + 2 :] if "-ot" in found else found
    assert given == options
