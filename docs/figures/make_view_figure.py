"""Draws the figure of README.md: one view of the store that the quickstart writes.

    python -m pipeline.precompute --runner=DirectRunner          # the store: a minute
    python docs/figures/make_view_figure.py                      # writes docs/figures/view.png

The images are MNIST digits of the embedded default, and the teacher is the one trained on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline import open_store

VIEW = 116
PATH = Path(__file__).with_name("view.png")


def main() -> None:
    """Draws the view and writes the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="runs/mnist_5k/store", help="Directory of the store.")
    parser.add_argument("--view", type=int, default=VIEW, help="View index.")
    parser.add_argument("--output", type=Path, default=PATH, help="PNG file to write.")
    flags = parser.parse_args()
    open_store(flags.store).show(flags.view).savefig(flags.output, dpi=100)


if __name__ == "__main__":
    main()
