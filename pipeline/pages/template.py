"""Renders pages from templates; the only importer of Jinja. All values are escaped unless they are marked as trusted."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.errors.text import printable

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_STYLE = _TEMPLATES / "page.css"  # common to all pages


@contextlib.contextmanager
def report_extra(what: str) -> Iterator[None]:
    """Context for imports of packages of the extra `report`.

    Args:
      what: what needs them, for the error.

    Raises:
      UserError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} needs {error.name}, which is not installed; install the extra: pip install 'view-distill[report]'"
        ) from error


def trusted(text: str) -> Markup:
    """Marks text as HTML that needs no escaping."""
    from markupsafe import Markup

    return Markup(text)


def breakable(name: str) -> Markup:
    """A dotted name, escaped, that may break after each dot and underscore."""
    return trusted(re.sub(r"([._])", r"\1<wbr>", html.escape(printable(name))))


def _shown(value: Any) -> Any:
    """Escapes control characters, which could hide or reorder text on the page."""
    plain = isinstance(value, str) and not hasattr(value, "__html__")
    return printable(value, keep="\n\t") if plain else value


def render_page(template: Path, **values: Any) -> str:
    """Renders the template `NAME.html` with `NAME.css` and, if it exists, `NAME.js` beside it. It includes `head.html`, and sets
    `title` before.

    Args:
      template: path of `NAME.html`.
      **values: values of the template, in addition to `style`, `script` and `script_digest` (for the content security
        policy).
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script_file = template.with_suffix(".js")
    script = script_file.read_text() if script_file.exists() else ""
    return environment.get_template(template.name).render(
        style=trusted(_STYLE.read_text() + template.with_suffix(".css").read_text()),
        script=trusted(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )
