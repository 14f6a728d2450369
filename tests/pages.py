"""Parser of pages, for tests without a browser."""

from __future__ import annotations

import html.parser
import json
from typing import Any

VOID = {"meta", "link", "img", "wbr"}


class Reader(html.parser.HTMLParser):
    """Numbers, tags and text of a page; asserts that tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.figures: list[tuple[str, Any, str]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        given = dict(attrs)
        assert not [name for name in given if name.startswith("on")]
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if "data-figure" in given:
            self.figures.append((str(given["data-figure"]), json.loads(str(given["data-value"])), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words += data
            if self._open[-1] == "span" and self.figures and not self.figures[-1][2]:
                self.figures[-1] = (*self.figures[-1][:2], data)
