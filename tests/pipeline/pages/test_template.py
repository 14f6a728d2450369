"""pipeline.pages.template: escaping, missing values and missing packages."""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path

import jinja2
import pytest

from pipeline.errors import UserError
from pipeline.pages.template import breakable, render_page, report_extra, trusted


@pytest.fixture
def template(tmp_path: Path) -> Path:
    (tmp_path / "page.css").write_text(".mine > b { color: red; }")
    (tmp_path / "page.html").write_text(
        "<style>{{ style }}</style><p>{{ word }}</p>[{{ script }}] {{ script_digest }}"
    )
    return tmp_path / "page.html"


def test_values_are_escaped_unless_trusted(template: Path) -> None:
    page = render_page(template, word="<script>")
    assert "<p>&lt;script&gt;</p>[]" in page
    assert ".mine > b { color: red; }" in page
    assert "--ground: #ffffff" in page  # of all pages
    assert "<p><i></p>" in render_page(template, word=trusted("<i>"))


def test_a_script_beside_the_page_is_in_it_with_its_digest(template: Path) -> None:
    script = '"a" < "b"'
    template.with_suffix(".js").write_text(script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"[{script}] {digest}" in html.unescape(render_page(template, word=""))


def test_a_missing_value_is_an_error(template: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="'word' is undefined"):
        render_page(template)


def test_names_break_after_dots_and_underscores() -> None:
    assert breakable("a.b_<c>") == "a.<wbr>b_<wbr>&lt;c&gt;"


def test_a_package_that_is_not_installed_is_named_with_its_extra() -> None:
    with (
        pytest.raises(UserError, match=r"nowhere.*view-distill\[report\]"),
        report_extra("the page"),
    ):
        import nowhere  # noqa: F401
