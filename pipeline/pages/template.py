"""Templates to pages: the only importer of Jinja. Whatever comes from data is escaped unless it says otherwise."""

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
_STYLE = _TEMPLATES / "page.css"  # of all pages


@contextlib.contextmanager
def report_extra(what: str) -> Iterator[None]:
    """For code that needs the packages of the extra `report`.

    Args:
      what: needs them.

    Raises:
      UserError: one is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} needs {error.name}, which is not installed; install the extra: pip install 'view-distill[report]'"
        ) from error


def trusted(text: str) -> Markup:
    """Text of our own that is HTML already."""
    from markupsafe import Markup

    return Markup(text)


def breakable(name: str) -> Markup:
    """A dotted name, escaped, that a narrow column may break after each dot and underscore."""
    return trusted(re.sub(r"([._])", r"\1<wbr>", html.escape(printable(name))))


def _shown(value: Any) -> Any:
    """What a template prints of a value: text that would reorder the page or hide in it is escaped, as on a terminal."""
    plain = isinstance(value, str) and not hasattr(value, "__html__")
    return printable(value, keep="\n\t") if plain else value


def render_page(template: Path, **values: Any) -> str:
    """A page from the template `NAME.html`, with `NAME.css` and, where there is one, `NAME.js` beside it.

    Args:
      template: path of the HTML file.
      **values: for it; it has `style`, `script` and `script_digest`, for the content security policy, as well.
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
