"""More parts than the system lets a process have open."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Run


def limited(soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("most", [400, 40])
def test_many_parts(run: Run, small: Path, tmp_path: Path, most: int) -> None:
    """As many files as the parts take are asked for; where the system refuses them, its limit is named."""
    options = ("-o", tmp_path / "x.gguf", "--split-size", 5000)
    done = run("quantize", small, *options, preexec_fn=limited(40, most))
    if most > 40:
        assert done.returncode == 0, done.stderr
        assert len(list(tmp_path.glob("*.gguf"))) == 26
    else:
        assert done.returncode == 1
        assert "each part takes two, and the limit is 40" in done.stderr
        assert "--split-size" in done.stderr
        assert not list(tmp_path.glob("x*"))
