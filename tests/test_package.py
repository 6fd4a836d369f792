"""What the package promises to others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import grok_local
from grok_local.errors import OptionError
from grok_local.units import format_bytes, parse_size

ROOT = Path(__file__).parents[1]


def test_the_public_names_are_exactly_the_list() -> None:
    for name in grok_local.__all__:
        assert getattr(grok_local, name).__doc__
    assert grok_local.__all__ == sorted(grok_local.__all__)
    with pytest.raises(AttributeError):
        grok_local.nothing  # noqa: B018


def test_the_changelog_has_this_version() -> None:
    assert f"## {grok_local.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_links_at_the_root_open_the_rooms() -> None:
    for name in ("cli.py", "quantize", "models"):
        link = ROOT / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / "grok_local" / name


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4G", 4 * 10**9),
        ("1.5G", 1_500_000_000),
        ("4Gi", 2**32),
        ("500M", 5 * 10**8),
        ("10k", 10**4),
        ("8192", 8192),
        (9, 9),
        ("2GB", 2 * 10**9),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["64", "7", "1.5"])
def test_a_few_bytes_were_meant_otherwise(text: str) -> None:
    with pytest.raises(OptionError, match=f"was {text}G meant"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "G", "4X", "-1G", "1e9", "4 G G", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match="not a size"):
        parse_size(text)


def test_sizes_as_people_read_them() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 1_611_137_347, 318_239_886_140)] == [
        *("0 B", "999 B", "1 kB", "1.61 GB", "318 GB")
    ]
