"""Figures of Matplotlib's as SVG: inline in a page, or as a file.

Inline, they take their colours from the page's CSS variables (`--ink`, `--blue`, ...), so that they follow
the reader's light or dark theme and turn black on paper. A file has fixed colours on a white ground. Text stays text.
"""

from __future__ import annotations

import html
import io
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from pipeline.errors.text import printable
from pipeline.storage.files import write_text

# Name of a CSS variable to the colour on white. Okabe and Ito's palette, darkened to 4.5:1.
COLOURS = {
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
# What is drawn with: one colour a name that occurs nowhere else, replaced when the SVG is written.
DRAWN = {name: f"#01f0{number:02x}" for number, name in enumerate(COLOURS)}
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"

# Matplotlib's settings while a figure is made: a decorator.
styled = matplotlib.rc_context(
    {
        "font.size": 10,
        "text.color": DRAWN["ink"],
        "text.parse_math": False,
        "hatch.linewidth": 1.1,
    }
)


def _draw(figure: Figure, name: str) -> tuple[str, str]:
    """View box and content of a figure's SVG, in the colours that it is drawn with; `name` makes its ids its own."""
    for text in figure.findobj(Text):  # names of runs and classes may come from elsewhere
        text.set_text(printable(text.get_text(), keep="\n"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        svg = file.getvalue()
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    svg = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", _FONTS, svg)
    used = set(re.findall(r"#([\w-]+)[)\"]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    return box[1], re.sub(r"\n\s*", "\n", svg)


def _element(box: str, content: str, attributes: str) -> str:
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{box}" style="stroke-linejoin: round" {attributes}>{content}</svg>'


def inline_svg(figure: Figure, name: str, *, title: str) -> str:
    """A figure as an element of an HTML page, as wide as its box.

    Args:
      figure: drawn with `DRAWN`.
      name: unique on the page.
      title: what a screen reader says of it.
    """
    box, content = _draw(figure, name)
    for role, drawn in DRAWN.items():
        content = content.replace(drawn, f"var(--{role})")
    return _element(box, content, f'role="img" aria-label="{html.escape(printable(title))}"')


def save_svg(figure: Figure, path: Path, *, name: str) -> None:
    """Writes a figure as a file that reads on any page, light or dark; the same figure gives the same bytes.

    Args:
      figure: drawn with `DRAWN`.
      path: of the file.
      name: of the figure.
    """
    box, content = _draw(figure, name)
    for role, drawn in DRAWN.items():
        content = content.replace(drawn, COLOURS[role])
    _, _, width, height = box.split()
    ground = '<rect width="100%" height="100%" rx="6" fill="#ffffff"/>'
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    write_text(path, head + _element(box, ground + content, f'width="{width}pt" height="{height}pt"') + "\n")
