"""The cache directory, and default limits of what it holds."""

from __future__ import annotations

import os
from pathlib import Path

SHARD_CACHE_BYTES = 16 << 30
DATA_CACHE_BYTES = 256 << 30


def cache_dir() -> Path:
    """Directory of the embedded default and of copies of bucket contents.

    Returns:
      `$VIEW_DISTILL_CACHE`, or else `$XDG_CACHE_HOME/view-distill`, or else `~/.cache/view-distill`. An empty variable counts as
      unset. The directory may not exist.
    """
    if own := os.environ.get("VIEW_DISTILL_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "view-distill"
