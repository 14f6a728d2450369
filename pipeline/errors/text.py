"""Text from elsewhere on its way to a terminal: control characters are shown, not sent."""

from __future__ import annotations

import unicodedata

# Control codes (ANSI escapes, line ends), formats (bidirectional overrides, zero width), lone surrogates, line and paragraph
# separators, and code points without a character.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp", "Cn"}


def is_printable(text: str) -> bool:
    """Whether a text changes nothing on a terminal but adds its characters."""
    return (text.isascii() and text.isprintable()) or not any(map(_is_control, text))


def printable(text: object, *, keep: str = "") -> str:
    r"""The text with every control character escaped as Python escapes it: ESC becomes `\x1b`.

    Args:
      text: or what `str` makes one of.
      keep: control characters that stay, such as the line ends of a text of several lines.
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
