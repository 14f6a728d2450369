"""README and docs as the tests read them: their commands, code, headings and links."""

from __future__ import annotations

import re
import shlex
import string
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "docker" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# `$PROJECT` of `export PROJECT=...` on the same page.
Commands = list[list[str]]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> list[str]:
    """Each command of the `sh` blocks, on one line, with the page's exported variables filled in."""
    values: dict[str, str] = {}
    out = []
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        filled = string.Template(line.partition(" #")[0]).substitute(values).strip()
        if filled.startswith("export "):
            values |= dict(word.split("=", 1) for word in shlex.split(filled)[1:])
        elif filled:
            out.append(filled)
    return out


def python_commands(page: Path) -> Commands:
    """Arguments of each `python -m MODULE ...`, the module first; in the blocks and in the text."""
    inline = re.findall(
        r"`(python -m [^`]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    )
    lines = [*command_lines(page), *(" ".join(text.split()) for text in inline)]
    return [shlex.split(line)[2:] for line in lines if line.startswith("python -m ")]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Targets of the links to files and anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target for target in found if not re.match(r"https?://", target)]
