"""Matplotlib figures as SVG inline in a page.

A figure takes its colors from the CSS variables of the page (`--ink`, `--blue`, ...), so it follows the light or
dark theme and prints in black. Matplotlib cannot draw with CSS variables, so figures are drawn with one placeholder color
per variable. Text stays text.
"""

from __future__ import annotations

import html
import io
import re

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from pipeline.errors.text import printable

# CSS variable to color on white: the palette of Okabe and Ito, darkened to a contrast of 4.5:1.
COLORS = {
    "ink": "#1c2024",
    "muted": "#5b646e",
    "rule": "#d9dde2",
    "part": "#7b8792",
    "blue": "#0067b0",
    "orange": "#c75000",
    "purple": "#a03c82",
    "green": "#007d5a",
    "grey": "#444b52",
    "olive": "#6b5d00",
}
# CSS variable to placeholder color, which occurs nowhere else in an SVG.
DRAWN = {name: f"#01f0{number:02x}" for number, name in enumerate(COLORS)}
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"

# Decorator with the Matplotlib settings under which a figure is made.
styled = matplotlib.rc_context(
    {
        "font.size": 10,
        "text.color": DRAWN["ink"],
        "text.parse_math": False,
        "hatch.linewidth": 1.1,
    }
)


def _draw(figure: Figure, name: str) -> tuple[str, str]:
    """View box and content of a figure's SVG, with placeholder colors; `name` makes its ids unique."""
    for text in figure.findobj(Text):  # names of runs and classes may come from untrusted files
        text.set_text(printable(text.get_text(), keep="\n"))
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
        svg = file.getvalue()
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    svg = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    svg = re.sub(r"<!--.*?-->|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", _FONTS, svg)
    used = set(re.findall(r"#([\w-]+)[)\"]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    return box[1], re.sub(r"\n\s*", "\n", svg)


def inline_svg(figure: Figure, name: str, *, title: str) -> str:
    """A figure as an element of an HTML page, as wide as its box.

    Args:
      figure: figure drawn with the colors of `DRAWN`.
      name: name that is unique on the page.
      title: text for screen readers.
    """
    box, content = _draw(figure, name)
    for variable, drawn in DRAWN.items():
        content = content.replace(drawn, f"var(--{variable})")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    label = f'role="img" aria-label="{html.escape(printable(title))}"'
    return f'<svg {names} viewBox="{box}" style="stroke-linejoin: round" {label}>{content}</svg>'
