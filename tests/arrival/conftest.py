from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import grok_local
from tests.arrival.coming import Expected
from tests.hub.hub_server import Hub, files_of, serve, use


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub with the release that the test is for: Grok-2, or the one it is parametrized with."""
    release = getattr(request, "param", "grok-2")
    checkpoint = request.getfixturevalue("small" if release == "grok-1" else "small_grok2")
    with serve(Hub(files_of(checkpoint), repository=f"xai-org/{release}")) as server:
        use(server, monkeypatch)
        yield server


@pytest.fixture(scope="session")
def expected(small: Path, small_grok2: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What packing the whole folder of a release gives."""
    folder = tmp_path_factory.mktemp("whole")
    packed = {
        release: grok_local.quantize_checkpoint(path, folder / f"{release}.gguf").path.read_bytes()
        for release, path in (("grok-1", small), ("grok-2", small_grok2))
    }
    return lambda release: packed[release]
