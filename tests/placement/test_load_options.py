"""Options that contradict each other are refused, and what nobody asked for contradicts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grok_local.errors import OptionError
from grok_local.placement.load_options import load_request

PATH = Path("x.gguf")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gpu_layers": "all"}, "gpu_layers"),
        ({"gpu_layers": 3}, "gpu_layers"),
        ({"experts_on": "gpu"}, "experts_on"),
        ({"repack": "on"}, "repack"),
        ({"overrides": ["exps=CUDA0"]}, "override exps=CUDA0"),
        ({"workers": ["127.0.0.1:5000"]}, "workers"),
    ],
)
def test_what_is_reproducible_computes_on_the_cpu_alone(options: Any, named: str) -> None:
    given: Any = {"reproducible": True, **options}
    with pytest.raises(OptionError, match=named):
        load_request(PATH, given)
    request = load_request(PATH, options)
    with pytest.raises(OptionError, match=named):
        request.reshaped(parallel=1, reproducible=True)


def test_numbers_of_numpy_are_numbers() -> None:
    names = ("context", "threads", "parallel", "gpu_layers", "experts_on")
    theirs: Any = {name: np.int64(number) for number, name in enumerate(names, 1)}
    ours: Any = {name: number for number, name in enumerate(names, 1)}
    assert repr(load_request(PATH, theirs)) == repr(load_request(PATH, ours))
    for name in names:
        for value in (1.5, True, np.bool_(True)):
            given: Any = {name: value}
            with pytest.raises(OptionError, match=name):
                load_request(PATH, given)


@pytest.mark.parametrize("options", [{}, {"placement": "cpu"}, {"overrides": ["exps=RAM"]}, {"gpu_layers": 0}])
def test_what_does_not_contradict_it_goes_with_it(options: Any) -> None:
    given: Any = {"reproducible": True, **options}
    request = load_request(PATH, given)
    for _ in range(2):
        request = request.reshaped(parallel=4, reproducible=True)
        assert (request.parallel, request.wishes.gpu_layers, request.wishes.experts_on) == (4, 0, "cpu")
