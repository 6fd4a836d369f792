"""The releases by name."""

from __future__ import annotations

from grok_local.errors import OptionError
from grok_local.models import grok1, grok2
from grok_local.models.release import Release

__all__ = ["RELEASES", "release_named"]

RELEASES: dict[str, Release] = {grok1.RELEASE.name: grok1.RELEASE, grok2.RELEASE.name: grok2.RELEASE}


def release_named(name: str) -> Release:
    """Raises OptionError."""
    if name not in RELEASES:
        raise OptionError(f"no release {name!r}: choose one of {', '.join(RELEASES)}")
    return RELEASES[name]
