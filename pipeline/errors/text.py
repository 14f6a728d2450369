"""Escapes control characters in text that is printed to a terminal."""

from __future__ import annotations

import unicodedata

# Unicode categories: control codes (ANSI escapes, line ends), formats (bidirectional overrides, zero width), lone surrogates, line
# and paragraph separators, and unassigned code points.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp", "Cn"}


def is_printable(text: str) -> bool:
    """Whether a text has no control characters."""
    return (text.isascii() and text.isprintable()) or not any(map(_is_control, text))


def printable(text: object, *, keep: str = "") -> str:
    r"""Escapes control characters as Python does: ESC becomes `\x1b`.

    Args:
      text: text, or an object that `str` converts.
      keep: control characters that are not escaped, such as line ends.
    """
    plain = str(text)
    if is_printable(plain):
        return plain
    return "".join(
        character.encode("unicode_escape").decode()
        if _is_control(character) and character not in keep
        else character
        for character in plain
    )


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in _UNPRINTABLE
