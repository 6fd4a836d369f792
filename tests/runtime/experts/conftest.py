from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import grok_local
from tests.runtime.experts.streaming import OPTIONS, results


@pytest.fixture(scope="package")
def golden_q4(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grok_local.quantize_checkpoint(golden, tmp_path_factory.mktemp("q4") / "golden.gguf").path


@pytest.fixture(scope="package")
def expected(golden_q4: Path) -> tuple[npt.NDArray[np.float32], list[list[int]]]:
    with grok_local.load(golden_q4, stream="off", **OPTIONS) as model:
        assert model.engine.expert_stats() is None
        return results(model)
