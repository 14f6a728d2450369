"""pipeline.errors.text: control characters are escaped."""

from __future__ import annotations

import pytest

from pipeline.errors.text import is_printable, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("one\ntwo\r\tthree", r"one\ntwo\r\tthree"),
        ("\x9b2J\x7f\0", r"\x9b2J\x7f\x00"),
        ("abc\u202edcba\u2066", r"abc\u202edcba\u2066"),
        ("a\u200bb\ufeff\u2028", r"a\u200bb\ufeff\u2028"),
        ("file-\udcff", r"file-\udcff"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    assert not is_printable(text)


@pytest.mark.parametrize("text", ["", "plain text", "größer, 図\u3000鑑, naïve\u00a0é", r"C:\new\x1b"])
def test_printable_text_is_unchanged(text: str) -> None:
    assert printable(text) == text
    assert is_printable(text)


def test_other_objects_are_converted_to_text() -> None:
    assert printable(None) == "None"
    assert printable(["\n"]) == r"['\n']"
