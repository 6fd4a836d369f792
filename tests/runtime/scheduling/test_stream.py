"""Stop strings and characters that come in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from grok_local.runtime.scheduling.stream import TextStream


def _stream(pieces: list[bytes], stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    shown = [stream.push(piece) for piece in pieces]
    return [*shown, stream.flush()], stream.stopped


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]


@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 200), max_size=8))
def test_any_cutting_gives_the_text(text: str, cuts: list[int]) -> None:
    text = text.encode("utf-8", "replace").decode()
    shown, stopped = _stream(_cut(text.encode(), cuts), [])
    assert "".join(shown) == text
    assert not stopped


@given(
    text=st.text(alphabet="ab\nHé", max_size=30),
    stop=st.lists(st.text(alphabet="ab\nHé", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_a_stop_string_never_shows_not_even_a_part(text: str, stop: list[str], cuts: list[int]) -> None:
    shown, stopped = _stream(_cut(text.encode(), cuts), stop)
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    # Which stop comes first may depend on where the pieces end, but none is ever shown.
    assert stopped == bool(found)
    result = "".join(shown)
    assert text.startswith(result)
    assert not any(s in result for s in stop)
    assert stopped or result == text


def test_half_a_stop_is_held_back_and_given_out_when_it_turns_out_to_be_none() -> None:
    stream = TextStream(["\nHuman:"])
    assert [stream.push(piece) for piece in (b"Yes.", b"\nHu", b"go", b"\nHuman", b":", b"x")] == [
        *("Yes.", "", "\nHugo", "", "", "")
    ]
    assert stream.stopped


def test_a_character_in_four_tokens() -> None:
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "🏬".encode()] == ["", "", "", "🏬"]
    assert stream.push(b"\xf0\x9f") + stream.flush() == ""  # cut inside a character
    stream = TextStream()
    assert stream.push(b"ok \xff more") + stream.flush() == "ok � more"
