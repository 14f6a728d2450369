"""Whether a data set is prepared in a TFDS data directory, found out without TFDS."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from pipeline.cli.parser import is_url
from pipeline.errors import UserError

IMPORT = "python -m pipeline.dataset import"


def prepare_hint(name: str) -> str:
    """How to prepare a data set of TFDS or one's own images."""
    return (
        f"prepare it with `tfds build {name} --file_format=array_record --data_dir=DIR`, or your own images with "
        f"`{IMPORT} --folder=DIR --name=NAME --data_dir=DIR`, and pass `data_dir`=DIR"
    )


def check_prepared(name: str, data_dir: str | Path | None, *, parameter: str = "dataset") -> None:
    """Checks that a local data directory has a data set of that name, in any version.

    Args:
      name: `NAME[/CONFIG][:VERSION]`. A name with a namespace, or in CamelCase, is left to TFDS.
      data_dir: TFDS data directory. None and a URL are left to TFDS.
      parameter: the parameter that gave the name, for errors.

    Raises:
      UserError: it has none.
    """
    plain = re.fullmatch(r"([a-z0-9_]+)(/[^:]*)?(:[\d.*]+)?", name)
    if plain is None or data_dir is None or is_url(str(data_dir)) or Path(data_dir, plain[1]).is_dir():
        return
    known = sorted(
        {file.relative_to(data_dir).parts[0] for file in Path(data_dir).glob("*/**/features.json")}
    )
    if near := difflib.get_close_matches(plain[1], known, n=1):
        advice = f"did you mean {near[0]}?"
    else:
        has = f"it has {', '.join(known[:5])}{' ...' if known[5:] else ''}; " if known else ""
        advice = f"{has}{prepare_hint(name)}"
    raise UserError(f"`{parameter}`={name}: not found in {data_dir}; {advice}")
