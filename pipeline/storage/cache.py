"""Where this project keeps what it can make or fetch again, and how much of it."""

from __future__ import annotations

import os
from pathlib import Path

SHARD_CACHE_BYTES = 16 << 30
DATA_CACHE_BYTES = 256 << 30


def cache_dir() -> Path:
    """Where the embedded default and copies of buckets are kept.

    Returns:
      `$VIEW_DISTILL_CACHE`, else `$XDG_CACHE_HOME/view-distill`, else `~/.cache/view-distill`. An empty
      variable counts as unset. The directory need not exist.
    """
    if own := os.environ.get("VIEW_DISTILL_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "view-distill"
